"""Read byte ranges of files; never through a mapping, so that a file that shrinks is an error and not a signal."""

from __future__ import annotations

import os
from contextlib import ExitStack, closing
from pathlib import Path

from ..checkpoint import Shard, TensorEntry
from ..errors import CheckpointError
from .cleanup import open_into

_COMPARE = 4 * 1024 * 1024


class ShardReader:
    """One open shard, checked to be the file that was planned."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self._fd = open_shard(shard)
        self._lock_free = hasattr(os, "preadv")

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` from byte `offset`. Safe from several threads.

        Raises:
            CheckpointError: the file ended early or could not be read.
        """
        done, size = 0, len(view)
        try:
            while done < size:
                got = self._read(view[done:], offset + done)
                if got == 0:
                    raise CheckpointError(
                        f"{self.shard.file}: ended at byte {offset + done}, expected {size - done} bytes more; "
                        "the file changed during the load; bring it back and load again"
                    )
                done += got
        except OSError as error:
            raise CheckpointError(
                f"{self.shard.file}: reading at byte {offset + done} failed: {error.strerror or error}"
            ) from error

    def _read(self, view: memoryview, offset: int) -> int:
        if self._lock_free:
            return os.preadv(self._fd, [view], offset)
        data = _pread_fallback(self._fd, len(view), offset)
        view[: len(data)] = data
        return len(data)

    def is_unchanged(self) -> bool:
        """Whether the open file is still as it was planned: size and time."""
        info = os.fstat(self._fd)
        return (info.st_size, info.st_mtime_ns) == (self.shard.size, self.shard.mtime_ns)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _pread_fallback(fd: int, size: int, offset: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(fd, min(size, 1 << 22), offset)
    # Windows: no positional read; a private handle keeps other threads' positions out of the way.
    with os.fdopen(os.dup(fd), "rb", buffering=0) as f:
        f.seek(offset)
        return f.read(min(size, 1 << 22)) or b""


def open_shard(shard: Shard) -> int:
    """A file descriptor of the shard.

    Raises:
        CheckpointError: gone, or not the file that was planned (size or time differ).
    """
    fds: list[int] = []
    try:
        open_into(fds, shard.file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
        info = os.fstat(fds[0])
        if (info.st_size, info.st_mtime_ns) != (shard.size, shard.mtime_ns):
            raise CheckpointError(
                f"{shard.file}: changed since it was planned (expected {shard.size} bytes, found {info.st_size}); "
                "plan and load again"
            )
    except BaseException as error:
        for fd in fds:
            os.close(fd)
        if isinstance(error, OSError):
            raise CheckpointError(f"{shard.file}: cannot be opened: {error.strerror or error}") from error
        raise
    return fds[0]


def same_bytes(a: TensorEntry, b: TensorEntry, shards: dict[Path, Shard]) -> bool:
    """Whether two entries hold the same values, compared piece by piece."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with ExitStack() as opened:
        first, second = (opened.enter_context(closing(ShardReader(shards[entry.file]))) for entry in (a, b))
        buffers = bytearray(min(_COMPARE, a.nbytes)), bytearray(min(_COMPARE, a.nbytes))
        for at in range(0, a.nbytes, _COMPARE):
            size = min(_COMPARE, a.nbytes - at)
            views = [memoryview(buffer)[:size] for buffer in buffers]
            first.read_into(views[0], a.offset + at)
            second.read_into(views[1], b.offset + at)
            if views[0] != views[1]:
                return False
    return True
