"""The records of this room: what is on disk, said without models, devices or torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .._records import cheap_init, computed_once


@cheap_init
@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a checkpoint, where it lies.

    Attributes:
        key: its name in the checkpoint.
        dtype: name of the torch dtype, such as `"bfloat16"`.
        shape: in elements of that dtype.
        file: the shard that holds it.
        offset: absolute byte offset in that file; of a packed tensor an address of its shard (see `Packed`).
        nbytes: length in bytes of the range that it spans there.
        strides: in elements; None means dense and row-major, as every safetensors tensor is.
        swapped: the bytes of each element are in big-endian order.
        packed: the bytes do not lie in the file as they are.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    strides: tuple[int, ...] | None = None
    swapped: bool = False
    packed: bool = False

    @property
    def end(self) -> int:
        """Byte offset just behind the tensor."""
        return self.offset + self.nbytes

    @property
    def is_plain(self) -> bool:
        """Whether its bytes in the file are what torch has in memory: dense, in this machine's order, not packed."""
        return self.strides is None and not self.swapped and not self.packed


@dataclass(frozen=True, slots=True)
class Packed:
    """A range of a file whose bytes must be unpacked, one after the other, from its beginning.

    What it unpacks to has addresses of its own behind the file's end, so that an entry's offset tells both.

    Attributes:
        address: of the first unpacked byte; not below the file's size.
        size: bytes when unpacked.
        offset: where the packed bytes begin in the file.
        nbytes: how many they are.
        method: `"deflate"` (raw, as in a zip), or `"latin1"`: bytes written as UTF-8 text, one character a byte, as
            pickles of protocol 2 write numpy arrays.
        crc: CRC-32 of the unpacked bytes, or None.
    """

    address: int
    size: int
    offset: int
    nbytes: int
    method: Literal["deflate", "latin1"]
    crc: int | None = None


Container = Literal["safetensors", "torch zip", "torch legacy"]


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a checkpoint.

    Attributes:
        file: its path.
        size: in bytes.
        mtime_ns: modification time.
        data_offset: where the data begins; of a torch zip where its pickle does.
        metadata: its own, text to text.
        container: what kind of file it is.
        packed: the ranges that must be unpacked, by address.
    """

    file: Path
    size: int
    mtime_ns: int
    data_offset: int
    metadata: Mapping[str, str]
    container: Container = "safetensors"
    packed: tuple[Packed, ...] = ()


def origin_of(entry: TensorEntry, shard: Shard) -> tuple[Any, ...]:
    """What tells the bytes of an entry in its file; the address of a packed one depends on what else was asked for."""
    if not entry.packed:
        return entry.offset, entry.nbytes
    packed = next(p for p in shard.packed if p.address <= entry.offset <= entry.end <= p.address + p.size)
    return packed.offset, packed.nbytes, packed.method, entry.offset - packed.address, entry.nbytes


def stored_bytes(entries: Iterable[TensorEntry]) -> int:
    """Bytes of the entries' ranges; a range that several share is counted once."""
    return sum({(id(entry.file), entry.offset, entry.nbytes): entry.nbytes for entry in entries}.values())


@cheap_init
@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor as a pickle describes it: what it looks like, and where it lies in a storage of its file.

    Attributes:
        dtype: name of the torch dtype.
        shape: in elements.
        strides: in elements, or None for dense and row-major.
        storage: the name of its storage in the file.
        offset: bytes from the beginning of the storage to its first element.
        nbytes: bytes of the storage that it spans.
        why_not: why it cannot be read (sparse, quantised, …), or None when it can.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    storage: str
    offset: int
    nbytes: int
    why_not: str | None = None


@dataclass(frozen=True, eq=False)
class Candidate:
    """A mapping of tensors inside of a pickled checkpoint: weights, averaged weights, or an optimizer's state.

    Attributes:
        path: the keys that lead to it, joined by dots; empty for the whole file.
        flatten: makes `leaves`, when they are first asked for: an optimizer's never are.
        module: it is a pickled `torch.nn.Module` and not a mapping.
        own: it holds tensors itself, and not only in mappings inside of it.
    """

    path: str
    flatten: Callable[[], Mapping[str, Leaf]] = field(repr=False)
    module: bool = False
    own: bool = True

    @computed_once
    def leaves(self) -> Mapping[str, Leaf]:
        """Key → tensor, in the order they were pickled; those of nested mappings have their keys joined by dots."""
        return self.flatten()

    def is_inside(self, outer: Candidate) -> bool:
        """Whether it is a part of `outer`, and not `outer` itself."""
        if self.path == outer.path:
            return False
        return not outer.path or self.path.startswith(f"{outer.path}.")

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors; what several share is counted once."""
        return sum({(leaf.storage, leaf.offset, leaf.nbytes): leaf.nbytes for leaf in self.leaves.values()}.values())


@dataclass(frozen=True, eq=False)
class PickledFile:
    """A pickled file, looked at and not executed.

    Attributes:
        shard: the file.
        root: what was pickled: dicts, lists, tuples and plain values as they are, tensors as `Leaf`, bytes as
            `Span`, objects as `pickles.Inert` and their classes as `pickles.Global`. It may be deep, and hold itself.
        locate: leaves → their entries in the file, and the shard with the packed ranges that they need. Reads what
            stands before each storage in the file, and checks that the leaf fits its storage.
        storages: how many the pickle names, the optimizer's too.
        described: bytes of memory that all which it describes takes while it is looked at, estimated.
    """

    shard: Shard
    root: Any = field(repr=False)
    locate: Callable[[Mapping[str, Leaf]], tuple[dict[str, TensorEntry], Shard]] = field(repr=False)
    storages: int = 0
    described: int = 0


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
        opened: the path of the mapping inside a pickled file that holds the weights; empty for the whole file.
        unreadable: key → why it cannot be read: sparse, quantised, on no device. An error only for who wants it.
        described: bytes of memory that all which its pickles describe takes while they are looked at, estimated.
        order: the keys as a program gets them that loads it: those of pickles in the order in which they were pickled.
            Empty for the order of the files.
        labels: of several sources, what stands before the keys of each.
    """

    source: str
    folder: Path
    shards: tuple[Shard, ...]
    entries: Mapping[str, TensorEntry] = field(repr=False)
    index: Path | None = None
    config: Path | None = None
    warnings: tuple[str, ...] = ()
    opened: str = ""
    unreadable: Mapping[str, str] = field(default_factory=dict, repr=False)
    described: int = 0
    order: tuple[str, ...] = field(default=(), repr=False)
    labels: tuple[str, ...] = ()

    def own_key(self, entry: TensorEntry) -> str:
        """The key of an entry in its file, without the label of its source."""
        key = entry.key
        fitting = [label for label in self.labels if key.startswith(f"{label}: ")]
        return key[len(max(fitting, key=len)) + 2 :] if fitting else key

    def __getitem__(self, key: str) -> TensorEntry:
        return self.entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; what several share is counted once."""
        return stored_bytes(self.entries.values())

    def dtypes(self) -> dict[str, tuple[int, int]]:
        """dtype → (tensors, bytes)."""
        held: dict[str, list[TensorEntry]] = {}
        for entry in self.entries.values():
            held.setdefault(entry.dtype, []).append(entry)
        return {dtype: (len(entries), stored_bytes(entries)) for dtype, entries in held.items()}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, as `lowmem inspect --json` prints it."""
        held: dict[Path, list[TensorEntry]] = {shard.file: [] for shard in self.shards}
        for entry in self.entries.values():
            held[entry.file].append(entry)
        return {
            "source": self.source,
            "folder": str(self.folder),
            "index": self.index.name if self.index else None,
            "opened": self.opened,
            "config": self.config.name if self.config else None,
            "bytes": self.nbytes,
            "dtypes": {name: {"tensors": n, "bytes": b} for name, (n, b) in self.dtypes().items()},
            "shards": [
                {
                    "file": shard.file.name,
                    "container": shard.container,
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
                    **({} if entry.is_plain else _oddness(entry)),
                }
                for entry in self.entries.values()
            },
            "unreadable": dict(self.unreadable),
            "warnings": list(self.warnings),
        }


def _oddness(entry: TensorEntry) -> dict[str, Any]:
    """How a pickled tensor lies, where it is not what torch has in memory."""
    strides = None if entry.strides is None else list(entry.strides)
    return {"strides": strides, "swapped": entry.swapped, "packed": entry.packed}
