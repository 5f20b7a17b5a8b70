"""Files of `torch.save` from before torch 1.6: some pickles, and the storages behind them.

Format (`_legacy_save` and `_legacy_load` in torch's `serialization.py`, and `THPStorage_writeFileRaw`): the pickles of
a magic number, the protocol version, facts of the system, the object, and the list of storage keys; then of each
storage in that order the number of elements, 8 bytes, and the elements. All is little-endian, whatever wrote it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .._collector import paused_collector
from ..dtypes import itemsize
from ..errors import CheckpointError, UnsupportedError
from .pickled_tensors import Storage, Tensors
from .pickles import MEMORY_OF_A_STEP, Machine
from .places import FileRange, Locator, Place, place_of_array, read_at
from .records import PickledFile, Shard

# `MAGIC_NUMBER` and `PROTOCOL_VERSION` in torch's serialization.py.
MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001


def read_torch_legacy(file: Path, f: BinaryIO, status: os.stat_result) -> PickledFile:
    """Look at a legacy file that is open as `f`.

    Raises:
        CheckpointError: damaged, truncated, or it contradicts itself.
        UnsupportedError: of another protocol.
    """
    at, values = 0, []
    for _ in range(3):
        machine: Machine = Machine(FileRange(f, at, status.st_size - at), at, str(file))
        machine.limit(0)
        values.append(machine.run())
        at = machine.position
    if values[0] != MAGIC or type(values[1]) is not int:
        raise CheckpointError(f"{file}: expected the magic number of torch.save, found another; download it again")
    if values[1] != _PROTOCOL:
        raise UnsupportedError(
            f"{file}: expected protocol {_PROTOCOL} of torch's legacy format, found {values[1]}; "
            "save it again with torch.save"
        )
    with paused_collector():
        tensors = Tensors(FileRange(f, at, status.st_size - at), at, str(file))
        tensors.limit(status.st_size)
        root = tensors.run()
        at = tensors.position
        machine = Machine(FileRange(f, at, status.st_size - at), at, str(file))
        machine.limit(status.st_size)
        keys = machine.run()
    data = machine.position
    starts = _starts(file, keys, tensors.storages, data, status.st_size)
    shard = Shard(file, status.st_size, status.st_mtime_ns, data, {}, "torch legacy")
    locator = Locator(shard, tensors.storages, _Legacy(file, starts))
    return PickledFile(shard, root, locator.locate, len(tensors.storages), MEMORY_OF_A_STEP * tensors.steps)


def _starts(file: Path, keys: Any, storages: dict[str, Storage], at: int, size: int) -> dict[str, int]:
    """Name of a storage → where it begins, by what the pickle says of the ones before it."""
    starts: dict[str, int] = {}
    for key in keys if type(keys) is list else [None]:
        name = f"data/{key}" if type(key) is str or type(key) is int else ""
        if name not in storages or name in starts:
            raise CheckpointError(
                f"{file}: byte {at}: expected a list of the storages that were pickled, each once, found another; "
                "download it again"
            )
        starts[name] = at
        at += 8 + storages[name].nbytes
    if at > size:
        raise CheckpointError(
            f"{file}: truncated: expected {at} bytes by the sizes of its {len(starts)} storages, found {size}; "
            "download it again"
        )
    return starts


@dataclass(frozen=True, slots=True, eq=False)
class _Legacy:
    """The storages of a legacy file: where each begins, with its count."""

    file: Path
    starts: dict[str, int]

    def place(self, f: BinaryIO, storage: Storage) -> Place:
        """Where a storage lies; the count before it must be the pickle's."""
        array = place_of_array(self.file, storage)
        if array is not None:
            return array
        start = self.starts.get(storage.name)
        if start is None:
            raise CheckpointError(f"{self.file}: storage {storage.key!r} was not written; download it again")
        count = int.from_bytes(read_at(f, start, 8), "little", signed=True)
        expected = storage.nbytes // itemsize(storage.dtype)
        if count != expected:
            raise CheckpointError(
                f"{self.file}: storage {storage.key!r} at byte {start}: expected {expected} elements of "
                f"{storage.dtype}, found {count}; the file is damaged, download it again"
            )
        return Place(start + 8, storage.nbytes)
