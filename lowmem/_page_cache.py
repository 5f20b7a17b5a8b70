"""The page cache: which pages of a file are in it, giving back those that were not, and asking for those to come.

Looking changes nothing. Where the system cannot say, everything counts as there before, so nothing is given back.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# Read-ahead is cut by the kernel to what one request of the device may be; this is below it everywhere.
_STEP = 2 * 1024 * 1024
# The same number on all of Linux's machines (6.5 on; asm-generic/unistd.h).
_CACHESTAT = 451


class CachedPages:
    """Which pages of a file were in the page cache when it was looked at."""

    def __init__(self, pages: npt.NDArray[np.bool_] | bool, count: int) -> None:
        """`pages`: one truth value a page, or one for all of the `count` pages."""
        # A bit a page: a checkpoint has many of them.
        self._bits = None if isinstance(pages, bool) else np.packbits(pages)
        self._all = isinstance(pages, bool) and pages
        self._count = count

    @property
    def everything(self) -> bool:
        """Whether every page was there."""
        return self._all

    @property
    def share(self) -> float:
        """How many of the pages were there, 0 to 1."""
        if self._bits is None:
            return float(self._all)
        return float(np.unpackbits(self._bits, count=self._count).mean())

    def holds(self, offset: int, nbytes: int) -> bool:
        """Whether at least half of the pages of this byte range were there."""
        if self._bits is None:
            return self._all
        pages = self._pages(offset, nbytes)
        return bool(2 * np.count_nonzero(pages) >= len(pages))

    def absent(self, offset: int, nbytes: int) -> Iterator[tuple[int, int]]:
        """(offset, length) in bytes of each run of pages that was not there, of all that this byte range touches.

        A page that it shares with its neighbour may be given back before the neighbour is read: a page read twice.
        """
        if self._all or nbytes <= 0:
            return
        first = offset // mmap.PAGESIZE
        if self._bits is None:
            yield first * mmap.PAGESIZE, (-(-(offset + nbytes) // mmap.PAGESIZE) - first) * mmap.PAGESIZE
            return
        gone = np.concatenate(([False], ~self._pages(offset, nbytes), [False]))
        edges = np.flatnonzero(gone[1:] != gone[:-1])
        for begin, end in edges.reshape(-1, 2).tolist():
            yield (first + begin) * mmap.PAGESIZE, (end - begin) * mmap.PAGESIZE

    def _pages(self, offset: int, nbytes: int) -> npt.NDArray[np.bool_]:
        assert self._bits is not None
        first, last = offset // mmap.PAGESIZE, min(self._count, -(-(offset + nbytes) // mmap.PAGESIZE))
        bits = np.unpackbits(self._bits[first // 8 : -(-last // 8)])
        return bits[first % 8 : first % 8 + last - first].astype(np.bool_)


def look(fd: int, size: int) -> CachedPages:
    """Which pages of the open file of `size` bytes are in the page cache now."""
    count = -(-size // mmap.PAGESIZE)
    if _count_cached(fd, size) == count:
        return CachedPages(True, count)
    pages = _each_cached(fd, size, count)
    if pages is None or pages.all():
        return CachedPages(True, count)
    return CachedPages(pages if pages.any() else False, count)


def cached_share(file: Path) -> float:
    """How much of a file is in the page cache now, 0 to 1; 1 where the system cannot say."""
    try:
        # An object and no descriptor, which a Ctrl-C could leave open. A fifo would keep us waiting.
        if not file.is_file():
            return 1.0
        with file.open("rb", buffering=0) as opened:
            fd = opened.fileno()
            size = os.fstat(fd).st_size
            cached = _count_cached(fd, size)
            return min(1.0, cached * mmap.PAGESIZE / size) if cached else look(fd, size).share
    except OSError:
        return 1.0  # whoever reads it will say so


def give_back(fd: int, offset: int, nbytes: int) -> None:
    """Let the kernel drop these pages; those that are mapped or not yet written stay."""
    if hasattr(os, "posix_fadvise"):
        # Advice only: a file system that cannot is no error.
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)


def ask_for(pages: mmap.mmap, offset: int, nbytes: int) -> None:
    """Ask the kernel to read a byte range of a mapped file ahead."""
    if not hasattr(pages, "madvise"):
        return
    begin = offset // mmap.PAGESIZE * mmap.PAGESIZE
    for at in range(begin, offset + nbytes, _STEP):
        try:
            pages.madvise(mmap.MADV_WILLNEED, at, min(_STEP, offset + nbytes - at))
        except OSError:
            return  # advice only: a file system that cannot is no error


def read_ahead(file: Path) -> int:
    """Bytes that the kernel reads around what is missing of a file; 0 where it does not say.

    Of the file's device, as in Documentation/ABI/testing/sysfs-class-bdi.
    """
    try:
        device = file.stat().st_dev
        told = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb").read_text(encoding="ascii")
        return int(told) * 1024
    except (OSError, ValueError, AttributeError):
        return 0


class _Range(ctypes.Structure):
    _fields_ = (("off", ctypes.c_uint64), ("len", ctypes.c_uint64))


class _Stat(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cache", "dirty", "writeback", "evicted", "recently"))


def _count_cached(fd: int, size: int) -> int | None:
    """Pages of the file in the cache, by cachestat(2), which is twenty times faster than asking page by page.

    None where it cannot be asked. A zero means nothing: overlayfs gives it for every file, whose pages it keeps under
    another (linux-mm, "cachestat() reports all zeroes for them"); mincore(2) knows.
    """
    system = libc()
    if system is None or not hasattr(system, "syscall"):
        return None
    span, stat = _Range(0, size), _Stat()
    if system.syscall(_CACHESTAT, fd, ctypes.byref(span), ctypes.byref(stat), 0):
        return None
    cached: int = stat.cache
    return cached


def _each_cached(fd: int, size: int, count: int) -> npt.NDArray[np.bool_] | None:
    """Page by page, by mincore(2); None where it cannot be asked. Others' files it calls cached altogether."""
    system = libc()
    if system is None or not hasattr(system, "mincore") or not size:
        return None
    try:
        view = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    except (OSError, ValueError):
        return None  # no address space for it
    found = np.zeros(count, dtype=np.uint8)
    try:
        address = np.frombuffer(view, dtype=np.uint8).ctypes.data
        if system.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_void_p(found.ctypes.data)):
            return None
    finally:
        view.close()
    return (found & 1).astype(np.bool_)


@functools.cache
def libc() -> Any:
    """The C library of Linux, or None elsewhere. Its calls leave their error in `ctypes.get_errno()`."""
    return ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
