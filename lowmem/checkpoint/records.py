"""The records of this room: what is on disk, said without models, devices or torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._records import cheap_init


@cheap_init
@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a checkpoint, where it lies.

    Attributes:
        key: its name in the checkpoint.
        dtype: name of the torch dtype, such as `"bfloat16"`.
        shape: in elements of that dtype.
        file: the shard that holds it.
        offset: absolute byte offset in that file.
        nbytes: length in bytes.
        strides: in elements; None means dense and row-major, as every safetensors tensor is.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    strides: tuple[int, ...] | None = None

    @property
    def end(self) -> int:
        """Byte offset just behind the tensor."""
        return self.offset + self.nbytes


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a checkpoint: size in bytes, modification time, where the data begins, its own metadata."""

    file: Path
    size: int
    mtime_ns: int
    data_offset: int
    metadata: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Checkpoint(Mapping[str, TensorEntry]):
    """The tensors of all files of a source: a read-only mapping of key to `TensorEntry`, in file order.

    Attributes:
        source: as the user gave it.
        folder: where the files lie.
        shards: the weight files, in the order they are read.
        index: the index file that named them, if there is one.
        config: the model's `config.json` beside them, if there is one.
        warnings: what was odd and what was believed.
    """

    source: str
    folder: Path
    shards: tuple[Shard, ...]
    entries: Mapping[str, TensorEntry] = field(repr=False)
    index: Path | None = None
    config: Path | None = None
    warnings: tuple[str, ...] = ()

    def __getitem__(self, key: str) -> TensorEntry:
        return self.entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    def dtypes(self) -> dict[str, tuple[int, int]]:
        """dtype → (tensors, bytes)."""
        table: dict[str, tuple[int, int]] = {}
        for entry in self.entries.values():
            count, size = table.get(entry.dtype, (0, 0))
            table[entry.dtype] = (count + 1, size + entry.nbytes)
        return table

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, as `lowmem inspect --json` prints it."""
        held: dict[Path, list[TensorEntry]] = {shard.file: [] for shard in self.shards}
        for entry in self.entries.values():
            held[entry.file].append(entry)
        return {
            "source": self.source,
            "folder": str(self.folder),
            "index": self.index.name if self.index else None,
            "config": self.config.name if self.config else None,
            "bytes": self.nbytes,
            "dtypes": {name: {"tensors": n, "bytes": b} for name, (n, b) in self.dtypes().items()},
            "shards": [
                {
                    "file": shard.file.name,
                    "size": shard.size,
                    "tensors": len(held[shard.file]),
                    "metadata": dict(shard.metadata),
                }
                for shard in self.shards
            ],
            "tensors": {
                entry.key: {
                    "dtype": entry.dtype,
                    "shape": list(entry.shape),
                    "file": entry.file.name,
                    "offset": entry.offset,
                    "bytes": entry.nbytes,
                }
                for entry in self.entries.values()
            },
            "warnings": list(self.warnings),
        }
