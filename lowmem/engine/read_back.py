"""Read back what was written, from the disk and not from memory, and compare it with what was meant to be written."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np

from .._page_cache import give_back
from ..errors import OutputError
from ..planner.moves import BLOCK
from ..sizes import MIB
from .destinations import anonymous_map
from .helpers import begin

_BUFFER = 2 * MIB
_WORKERS = 3
# Bytes of one task: many for the workers to share, and few files opened.
_TASK = 16 * MIB


class Piece(NamedTuple):
    """A range of a file that was written at once.

    Attributes:
        offset: in the file.
        nbytes: its length.
        checksum: of the bytes that were to be written.
        tensor: whose they are; empty for the header.
    """

    offset: int
    nbytes: int
    checksum: int
    tensor: str


def checksum(view: memoryview, before: int = 0) -> int:
    """CRC-32 of the sums of all blocks of 4 KiB, and of what is behind the last whole one.

    A wrong, missing, stale or misplaced block changes it. Several times as fast as a CRC of all bytes, which would take
    longer than copying them. `before` is the checksum of what lies in front, which must be whole blocks.
    """
    whole = len(view) // BLOCK * BLOCK
    if whole:
        words = np.frombuffer(view[:whole], dtype=np.uint64).reshape(-1, BLOCK // 8)
        before = crc32(words.sum(axis=1, dtype=np.uint64), before)
    return crc32(view[whole:], before)


def find_difference(path: Path, pieces: Sequence[Piece]) -> str | None:
    """Read pieces back, best in file order: what differs from what was written, in words, or None.

    Past the page cache where the file system can; elsewhere what is read is given back. Not for a file that is still
    being written: ext4 lets nobody write while it is read directly.

    Raises:
        OSError: the file cannot be read.
    """
    with _Window(path, max((piece.offset + piece.nbytes for piece in pieces), default=0)) as window:
        for piece in pieces:
            found = done = 0
            while done < piece.nbytes:
                view = window.at(piece.offset + done, piece.nbytes - done)
                if not view:
                    return f"{path}: ended at byte {piece.offset + done}, expected {piece.nbytes - done} bytes more"
                found = checksum(view, found)
                done += len(view)
            if found != piece.checksum:
                whose = f"tensor {piece.tensor!r}" if piece.tensor else "the header"
                return (
                    f"{path}: {whose}: {piece.nbytes} bytes at byte {piece.offset} differ from what was written: "
                    f"expected checksum {piece.checksum:08x}, found {found:08x}"
                )
    return None


class _Window:
    """A part of a file in memory; moves on as it is asked for later bytes, up to `end`."""

    def __init__(self, path: Path, end: int) -> None:
        self._memory = memoryview(anonymous_map(_BUFFER))
        self._begin = self._end = 0
        self._last = end
        self._path = path
        self._direct = True
        self._file = _open(path, True)

    def __enter__(self) -> _Window:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def at(self, offset: int, most: int) -> memoryview:
        """Bytes from `offset` on: `most`, or fewer whole blocks, or none at the end of the file."""
        size = self._usable(offset, most)
        if not size:
            self._load(offset)
            size = self._usable(offset, most)
        return self._memory[offset - self._begin : offset - self._begin + size]

    def _usable(self, offset: int, most: int) -> int:
        here = self._end - offset if self._begin <= offset else 0
        return most if here >= most else max(0, here // BLOCK * BLOCK)

    def _load(self, offset: int) -> None:
        self._begin = self._end = offset - offset % BLOCK
        size = min(_BUFFER, self._last + -self._last % BLOCK - self._begin)
        # Only the last block of a file is read short.
        while self._end < self._begin + size and self._end % BLOCK == 0:
            got = self._read(self._memory[self._end - self._begin : size])
            if not got:
                break
            self._end += got
        give_back(self._file.fileno(), self._begin, size)

    def _read(self, view: memoryview) -> int:
        try:
            self._file.seek(self._end)
            return self._file.readinto(view) or 0
        except OSError as error:
            if error.errno != errno.EINVAL or not self._direct:
                raise
        # A file system that took the flag and not the read, or a device that wants larger blocks.
        self._direct = False
        self._file.close()
        self._file = _open(self._path, False)
        return self._read(view)


def _open(path: Path, direct: bool) -> io.FileIO:
    flag = getattr(os, "O_DIRECT", 0) if direct else 0
    if flag:
        # Not on this file system, or the path cannot be read, which the last line says.
        with contextlib.suppress(OSError):
            return io.FileIO(path, opener=lambda name, flags: os.open(name, flags | flag))
    return io.FileIO(path)


class ReadBack:
    """Compares what is on the disk with what was to be written, by a few threads, while others write."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="lowmem-read-back")
        self._tasks: list[Future[None]] = []
        # No event, which a Ctrl-C inside `set` leaves locked.
        self._stopped = False

    def begin(self, path: Path, pieces: Sequence[Piece]) -> None:
        """Look at these pieces of `path`, which are on the disk; see `find_difference`."""
        group: list[Piece] = []
        size = 0
        for piece in pieces:
            group.append(piece)
            size += piece.nbytes
            if size >= _TASK:
                self._submit(path, group)
                group, size = [], 0
        if group:
            self._submit(path, group)

    def _submit(self, path: Path, pieces: Sequence[Piece]) -> None:
        self._tasks.append(begin(self._pool, functools.partial(self._look, path, pieces)))

    def finish(self) -> bool:
        """Wait until all was looked at; False when it was stopped before.

        Raises:
            OutputError: a piece differs from what was to be written.
            OSError: the file cannot be read.
        """
        for task in self._tasks:
            task.result()
        self._tasks = []
        return not self._stopped

    def stop(self) -> None:
        """Let what is not begun be."""
        self._stopped = True

    def end(self) -> None:
        """End the threads. May be called again."""
        self.stop()
        self._pool.shutdown(cancel_futures=True)

    def _look(self, path: Path, pieces: Sequence[Piece]) -> None:
        if self._stopped:
            return
        problem = find_difference(path, pieces)
        if problem is not None:
            raise OutputError(f"{problem}; the disk or the memory of this machine is not to be trusted")
