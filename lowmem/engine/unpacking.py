"""Bytes that do not lie in the file as they are: compressed records, and bytes that were written as text."""

from __future__ import annotations

import codecs
import threading
import zlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Protocol

from ..checkpoint import Shard
from ..checkpoint.records import Packed
from ..errors import CheckpointError

# Packed bytes that are read at once, and unpacked bytes that are made at once.
_STEP = 256 * 1024
# How often all may be unpacked from the beginning, for views that lie across each other.
_MOST_AGAIN = 16
# Bytes that are unpacked in a moment, however often.
_FEW = 1024 * 1024 * 1024

ReadAt = Callable[[memoryview, int], None]


class _Unpacker(Protocol):
    def feed(self, data: bytes) -> None:
        """More packed bytes; for when `take` gave nothing."""

    def take(self, most: int) -> bytes:
        """Up to `most` unpacked bytes; none when more packed ones are needed."""


class _Inflate:
    """Raw deflate, as in a zip."""

    def __init__(self) -> None:
        self._state = zlib.decompressobj(-zlib.MAX_WBITS)
        self._left = b""

    def feed(self, data: bytes) -> None:
        self._left = data

    def take(self, most: int) -> bytes:
        made = self._state.decompress(self._left, most)
        self._left = self._state.unconsumed_tail
        if not made and self._state.eof:
            # What is fed behind the end would be kept.
            raise ValueError("it ends too early")
        return made


class _Latin1:
    """UTF-8 text whose characters are bytes."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._left = b""

    def feed(self, data: bytes) -> None:
        self._left += self._decoder.decode(data).encode("latin-1")

    def take(self, most: int) -> bytes:
        made, self._left = self._left[:most], self._left[most:]
        return made


class PackedRanges:
    """The packed ranges of one open shard, unpacked from the beginning to wherever bytes are wanted.

    Unpacking cannot begin in the middle, so readers take turns: in the order of their tickets, which is that of the
    file. Only one range is unpacked at a time, in buffers of 256 KiB.

    Args:
        shard: the file.
        read: fills a view from an offset of the file.
    """

    def __init__(self, shard: Shard, read: ReadAt) -> None:
        self._shard = shard
        self._read = read
        self._begins = [packed.address for packed in shard.packed]
        self._turn = threading.Condition()
        self._given = self._next = 0
        self._over: set[int] = set()
        self._range: Packed | None = None
        self._begun = 0

    def ticket(self) -> int:
        """A place in the queue; each must be given back by `give_back`, used or not."""
        self._given += 1
        return self._given - 1

    def fill(self, views: Sequence[memoryview], address: int, ticket: int) -> None:
        """Fill the views, one after the other, with unpacked bytes from `address` on.

        Raises:
            CheckpointError: the packed bytes are damaged.
        """
        with self._turn:
            while self._next != ticket:
                self._turn.wait()
        for view in views:
            self._fill(view, address)
            address += len(view)

    def give_back(self, ticket: int) -> None:
        """The holder of the ticket is done, well or not: the next may come. May be called again."""
        with self._turn:
            if ticket >= self._next:
                self._over.add(ticket)
            while self._next in self._over:
                self._over.remove(self._next)
                self._next += 1
            self._turn.notify_all()

    def _fill(self, view: memoryview, address: int) -> None:
        done = 0
        while done < len(view):
            packed = self._shard.packed[bisect_right(self._begins, address + done) - 1]
            at = address + done - packed.address
            size = min(len(view) - done, packed.size - at)
            if packed is not self._range or at < self._at:
                self._begin(packed)
            try:
                while self._at < at:
                    self._unpack(min(_STEP, at - self._at))
                while size:
                    made = self._unpack(min(_STEP, size))
                    view[done : done + len(made)] = made
                    done += len(made)
                    size -= len(made)
            except (zlib.error, ValueError) as error:
                self._range = None
                raise self._damaged(packed, str(error)) from error

    def _begin(self, packed: Packed) -> None:
        self._begun += packed.size
        if self._begun > max(_FEW, _MOST_AGAIN * sum(p.size for p in self._shard.packed)):
            raise CheckpointError(
                f"{self._shard.file}: views lie across each other in its compressed records, which would be unpacked "
                f"more than {_MOST_AGAIN} times; unzip it, and zip it again without compression"
            )
        self._range = packed
        self._unpacker: _Unpacker = _Inflate() if packed.method == "deflate" else _Latin1()
        self._at = self._fed = 0
        self._crc = 0

    def _unpack(self, most: int) -> bytes:
        """Some of the next bytes, at least one and at most `most`."""
        packed = self._range
        assert packed is not None
        while not (made := self._unpacker.take(most)):
            size = min(_STEP, packed.nbytes - self._fed)
            if not size:
                raise self._damaged(packed, f"expected {packed.size} bytes, found {self._at}")
            data = bytearray(size)
            self._read(memoryview(data), packed.offset + self._fed)
            self._fed += size
            self._unpacker.feed(bytes(data))
        self._at += len(made)
        if packed.crc is not None:
            self._crc = zlib.crc32(made, self._crc)
        if self._at == packed.size:
            self._check_end(packed)
        return made

    def _check_end(self, packed: Packed) -> None:
        if packed.crc is not None:
            if self._crc != packed.crc:
                raise self._damaged(packed, f"expected the checksum {packed.crc:08x}, found {self._crc:08x}")
        elif self._fed < packed.nbytes or self._unpacker.take(1):
            raise self._damaged(packed, f"expected {packed.size} bytes, found more")

    def _damaged(self, packed: Packed, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self._shard.file}: the packed bytes at byte {packed.offset} are damaged ({what}); "
            "download the file again"
        )
