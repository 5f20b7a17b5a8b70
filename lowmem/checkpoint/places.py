"""Where the tensors of a pickled file lie in it: what zip and legacy files have in common."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Protocol

from ..dtypes import itemsize
from ..errors import CheckpointError, UnsupportedError
from .pickled_tensors import Storage
from .records import Leaf, Packed, Shard, TensorEntry
from .safetensors import check_extent

# Addresses of unpacked ranges are multiples of it, so that elements are aligned there as in a file.
_ALIGNMENT = 64


class FileRange:
    """A part of an open file as a stream for a pickle.

    Args:
        f: the file, without a buffer of its own.
        start: its first byte.
        size: how many bytes it has.
    """

    def __init__(self, f: BinaryIO, start: int, size: int) -> None:
        self._f, self._at, self._left = f, start, size

    def read(self, n: int, /) -> bytes:
        """The next `n` bytes, or less at the end."""
        data = read_at(self._f, self._at, min(n, self._left))
        self._at += len(data)
        self._left -= len(data)
        return data

    def skip(self, n: int, /) -> int:
        """Pass over `n` bytes, or less at the end; how many."""
        n = min(n, self._left)
        self._at += n
        self._left -= n
        return n


def read_at(f: BinaryIO, offset: int, n: int) -> bytes:
    """`n` bytes of an unbuffered file from `offset`, or less at its end."""
    f.seek(offset)
    data = f.read(n) or b""
    while len(data) < n and (more := f.read(n - len(data))):
        data += more
    return data


@contextmanager
def opened(file: Path) -> Iterator[tuple[BinaryIO, os.stat_result]]:
    """A regular file, opened without a buffer, and its status.

    Raises:
        CheckpointError: of another kind, or it cannot be read; also for errors of reading within the block.
    """
    try:
        # Ask before opening: opening a fifo would hang, a device could do anything.
        if not stat.S_ISREG(file.stat().st_mode):
            raise CheckpointError(f"{file}: expected a regular file, found another kind; give the path of the weights")
        with file.open("rb", buffering=0) as f:
            yield f, os.fstat(f.fileno())
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be read: {error.strerror or error}; check the path and its permissions"
        ) from error


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where a storage lies.

    Attributes:
        offset: of its first byte, in the file or of `packed`.
        size: bytes that are there.
        packed: the range that must be unpacked; its address is set when places are given out.
        swapped: its elements are big-endian.
    """

    offset: int
    size: int
    packed: Packed | None = None
    swapped: bool = False


class Container(Protocol):
    """What a kind of file says of its storages."""

    def place(self, f: BinaryIO, storage: Storage) -> Place:
        """Where a storage lies, as its own header in the file confirms.

        Raises:
            CheckpointError: the file says something else, or has no such storage.
            UnsupportedError: it is encrypted, or packed in a way that is not read.
        """


@dataclass(frozen=True, slots=True, eq=False)
class Locator:
    """Gives leaves their entries; see `PickledFile.locate`.

    Attributes:
        shard: the file.
        storages: name → what the pickle says of it.
        container: what the file says of it.
    """

    shard: Shard
    storages: Mapping[str, Storage]
    container: Container

    def locate(self, leaves: Mapping[str, Leaf]) -> tuple[dict[str, TensorEntry], Shard]:
        """Entries of `leaves`, and the shard with the packed ranges that they need.

        Raises:
            CheckpointError: a tensor that its storage does not hold, or the file was changed since it was read.
            UnsupportedError: a tensor that cannot be read.
        """
        wanted: dict[str, str] = {}
        for key, leaf in leaves.items():
            if leaf.why_not is not None:
                raise UnsupportedError(
                    f"{self.shard.file}: tensor {key!r}: expected one that can be read, but {leaf.why_not}; "
                    "leave it out, or save it as a plain tensor"
                )
            if leaf.nbytes:
                wanted.setdefault(leaf.storage, key)
        places: dict[str, Place] = {}
        with opened(self.shard.file) as (f, status):
            if (status.st_size, status.st_mtime_ns) != (self.shard.size, self.shard.mtime_ns):
                raise CheckpointError(
                    f"{self.shard.file}: expected {self.shard.size} bytes as when it was looked at, found "
                    f"{status.st_size}, written since; let it be finished, and try again"
                )
            for name, key in wanted.items():
                places[name] = self._place(f, name, key)
        packed = self._give_addresses(places)
        entries = {key: self._entry(key, leaf, places.get(leaf.storage)) for key, leaf in leaves.items()}
        return entries, replace(self.shard, packed=packed)

    def _place(self, f: BinaryIO, name: str, key: str) -> Place:
        storage = self.storages.get(name)
        if storage is None:
            raise CheckpointError(
                f"{self.shard.file}: tensor {key!r}: its storage is not in this file; look at it again"
            )
        place = self.container.place(f, storage)
        if place.size < storage.nbytes:
            raise CheckpointError(
                f"{self.shard.file}: tensor {key!r}: expected a storage of {storage.nbytes} bytes, found {place.size}; "
                "download it again"
            )
        if place.packed is None and place.offset + place.size > self.shard.size:
            raise CheckpointError(
                f"{self.shard.file}: tensor {key!r}: truncated: expected its storage up to byte "
                f"{place.offset + place.size}, found a file of {self.shard.size}; download it again"
            )
        return place

    def _give_addresses(self, places: dict[str, Place]) -> tuple[Packed, ...]:
        """Addresses behind the file for what must be unpacked, in the order of the file; one for what several name."""
        made: dict[tuple[int, int], Packed] = {}
        # Behind the end and not at it: no read goes from the one into the other.
        at = (self.shard.size // _ALIGNMENT + 1) * _ALIGNMENT
        ranges = {(p.offset, p.nbytes): p for p in (place.packed for place in places.values()) if p is not None}
        for where, packed in sorted(ranges.items()):
            made[where] = replace(packed, address=at)
            at += -(-packed.size // _ALIGNMENT) * _ALIGNMENT
        for name, place in places.items():
            if place.packed is not None:
                packed = made[place.packed.offset, place.packed.nbytes]
                places[name] = replace(place, offset=packed.address + place.offset, packed=packed)
        return tuple(made.values())

    def _entry(self, key: str, leaf: Leaf, place: Place | None) -> TensorEntry:
        check_extent(self.shard.file, key, leaf.shape)
        if not leaf.nbytes or place is None:
            return TensorEntry(key, leaf.dtype, leaf.shape, self.shard.file, 0, 0, leaf.strides)
        # What the pickle says of the storage, and not what lies there: more may, and is not the storage's.
        held = self.storages[leaf.storage].nbytes
        if leaf.offset + leaf.nbytes > held:
            raise CheckpointError(
                f"{self.shard.file}: tensor {key!r}: expected bytes {leaf.offset} to {leaf.offset + leaf.nbytes} of "
                f"its storage, found a storage of {held}; the file is damaged, download it again"
            )
        return TensorEntry(
            key,
            leaf.dtype,
            leaf.shape,
            self.shard.file,
            place.offset + leaf.offset,
            leaf.nbytes,
            leaf.strides,
            place.swapped and itemsize(leaf.dtype) > 1,
            place.packed is not None,
        )


def place_of_array(file: Path, storage: Storage, pickle: Packed | None = None) -> Place | None:
    """Where an array within the pickle lies, or None for a storage outside of it.

    Args:
        file: for messages.
        storage: of the array.
        pickle: the range of the file that holds the pickle, when it must be unpacked.

    Raises:
        UnsupportedError: packed, and written as text.
    """
    span = storage.span
    if span is None:
        return None
    if span.kind == "bytes":
        return Place(span.offset, span.nbytes, pickle, storage.swapped)
    if pickle is not None:
        raise UnsupportedError(
            f"{file}: a numpy array at byte {span.offset} of its compressed pickle: expected bytes, found bytes "
            "written as text, which pickle protocol 2 does; unzip the file and zip it without compression"
        )
    packed = Packed(0, storage.nbytes, span.offset, span.nbytes, "latin1")
    return Place(0, storage.nbytes, packed, storage.swapped)
