"""Files that tests push out of the page cache, and what the kernel itself says of them."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lowmem.checkpoint import Shard

PAGE = mmap.PAGESIZE


def shard_of(path: Path) -> Shard:
    """Any file as a shard: no header is looked at."""
    info = path.stat()
    return Shard(path, info.st_size, info.st_mtime_ns, 0, {})


def drop(path: Path, offset: int = 0, nbytes: int = 0) -> None:
    """Push the file, or a range of it, out of the page cache; written pages go to the disk first."""
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def warm(path: Path) -> None:
    """Bring all of the file into the page cache."""
    path.read_bytes()


def resident(path: Path) -> list[bool]:
    """Page by page, whether it is in the page cache, by mincore(2)."""
    size = path.stat().st_size
    if not size:
        return []
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    with path.open("rb") as file:
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    assert address not in (None, ctypes.c_void_p(-1).value)
    found = (ctypes.c_ubyte * (-(-size // PAGE)))()
    try:
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), found) == 0
    finally:
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    return [bool(value & 1) for value in found]


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Poll: what the kernel does by itself takes its time. False when the time is over."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


@functools.cache
def why_not_cold() -> str | None:
    """Why files in the temporary folder cannot be pushed out of the page cache, or None when they can."""
    if sys.platform != "linux" or not hasattr(os, "posix_fadvise"):
        return "needs Linux's page cache"
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(16 * PAGE))
        file.flush()
        drop(Path(file.name))
        return "the temporary folder is memory" if any(resident(Path(file.name))) else None


@functools.cache
def why_not_direct() -> str | None:
    """Why files in the temporary folder cannot be read past the page cache, or None when they can."""
    if not hasattr(os, "O_DIRECT"):
        return "this system has no O_DIRECT"
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(PAGE))
        file.flush()
        try:
            fd = os.open(file.name, os.O_RDONLY | os.O_DIRECT)
        except OSError as error:
            return f"the temporary folder refuses direct I/O: {error.strerror}"
        try:
            os.preadv(fd, [mmap.mmap(-1, PAGE)], 0)
        except OSError as error:
            return f"the temporary folder refuses direct reads: {error.strerror}"
        finally:
            os.close(fd)
    return None


needs_cold = pytest.mark.skipif(why_not_cold() is not None, reason=str(why_not_cold()))
needs_direct = pytest.mark.skipif(why_not_direct() is not None, reason=str(why_not_direct()))


class Preadv:
    """Counts the reads that pass through `os.preadv`, and knows which of them are direct.

    `answer`, when given, takes (the real preadv, fd, views, offset) in place of the kernel.
    """

    def __init__(self, answer: Callable[..., int] | None = None) -> None:
        self.calls: list[tuple[str, bool, int, int]] = []
        self._real = os.preadv
        self._answer = answer

    def __call__(self, fd: int, views: Any, offset: int) -> int:
        import fcntl

        direct = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))
        if self._answer is not None:
            got = self._answer(self._real, fd, views, offset, direct)
        else:
            got = self._real(fd, views, offset)
        self.calls.append((os.path.realpath(f"/proc/self/fd/{fd}"), direct, offset, got))
        return got

    @property
    def direct(self) -> list[tuple[str, bool, int, int]]:
        return [call for call in self.calls if call[1]]


def patched(answer: Callable[..., int] | None = None) -> Iterator[Preadv]:
    """For a `with` over `contextmanager(patched)`: `os.preadv` is counted, or answered by the test."""
    patch = pytest.MonkeyPatch()
    seen = Preadv(answer)
    patch.setattr(os, "preadv", seen)
    try:
        yield seen
    finally:
        patch.undo()
