"""Pages of files that are mapped: bringing them, whether they are there, and letting go of those nobody wrote to.

Linux only; elsewhere nothing is brought or let go of. All calls go through ctypes, which gives the interpreter's lock
away meanwhile: the `madvise` of a mapping keeps it.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
from pathlib import Path

import numpy as np

from ._page_cache import libc

# asm-generic/mman-common.h; alpha and parisc number some otherwise and refuse these.
_WILLNEED, _DONTNEED, _POPULATE_READ = 3, 4, 22
# Of an entry of /proc/<pid>/pagemap (Documentation/admin-guide/mm/pagemap.rst), which anyone may read of itself.
_PRESENT, _SWAPPED, _OF_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))
_ENTRY = 8
_PAGEMAP = Path("/proc/self/pagemap")
# Pagemap is read in pieces of so many bytes: 32 MiB of pages each.
_PIECE = 64 * 1024
# Pieces in which WILLNEED is asked: the kernel cuts what is more than one request of the device.
_STEP = 2 * 1024 * 1024


def address_of(pages: mmap.mmap) -> int:
    """Where a mapping begins. Nothing is kept of it, so that it can be closed; it must be open and not empty."""
    return int(np.frombuffer(pages, dtype=np.uint8, count=1).ctypes.data)


def bring(address: int, nbytes: int, *, exactly: bool = True) -> None:
    """Read what a range of a mapped file touches, and map it, so that using it waits for nothing.

    Returns when it is there, where the kernel can do that (MADV_POPULATE_READ, Linux 5.14), and else when it is asked
    for. Advice only: what cannot be brought (a file that shrank, a full cgroup) is found out by who uses it.

    Args:
        address: within a mapping. Rounded outward to whole pages, which belong to the same mapping, since a mapping
            has no others.
        nbytes: bytes from there, all of the same mapping.
        exactly: ask for just these pages, all at once. Otherwise they come as the kernel reads ahead of page faults:
            with neighbours on both sides, and in larger pages, which takes less of the processor. That is quicker where
            the neighbours are used too, and its read-ahead is far (`_page_cache.read_ahead`).
    """
    begin, end = _outward(address, nbytes)
    if exactly:
        for at in range(begin, end, _STEP):
            if _advise(at, min(_STEP, end - at), _WILLNEED):
                break
    if end > begin and _advise(begin, end - begin, _POPULATE_READ) == errno.EINVAL and not exactly:
        bring(address, nbytes)


def holds(address: int, nbytes: int, samples: int = 8) -> bool:
    """Whether pages of a mapped range are in memory, going by `samples` of them, evenly spread from the first to the
    last that are the range's alone: those at its ends may be there because of its neighbours. True where the system
    cannot say. Others' files it calls cached altogether (mincore(2)).
    """
    system = libc()
    begin, end = _inward(address, nbytes)
    if end <= begin:
        begin, end = _outward(address, nbytes)
    if system is None or end <= begin:
        return True
    last = (end - begin) // mmap.PAGESIZE - 1
    count = min(max(2, samples), last + 1)
    found = ctypes.c_ubyte(1)
    for number in range(count):
        page = begin + last * number // max(1, count - 1) * mmap.PAGESIZE
        asked = system.mincore(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), ctypes.byref(found))
        if not asked and not found.value & 1:
            return False
    return True


def written(address: int, nbytes: int) -> bool:
    """Whether any page that a range of a private mapping touches was written to, so that it is memory and not the
    file any more; also one that the kernel swapped out. True where the system cannot say.
    """
    begin, end = _outward(address, nbytes)
    if end <= begin:
        return False
    if libc() is None:
        return True
    at, stop = begin // mmap.PAGESIZE * _ENTRY, end // mmap.PAGESIZE * _ENTRY
    try:
        # An object and no descriptor, which a Ctrl-C could leave open.
        with _PAGEMAP.open("rb", buffering=0) as pagemap:
            pagemap.seek(at)
            while at < stop:
                piece = pagemap.read(min(_PIECE, stop - at))
                if not piece or len(piece) % _ENTRY:
                    return True
                entries = np.frombuffer(piece, dtype=np.uint64)
                if np.any((entries & (_PRESENT | _SWAPPED) != 0) & (entries & _OF_FILE == 0)):
                    return True
                at += len(piece)
    except OSError:
        return True
    return False


def let_go(address: int, nbytes: int) -> bool:
    """Unmap the whole pages inside a range of a private mapping of a file: they leave the resident set, and are read
    again when they are used.

    Nothing is done if any of them was written to, since what was written would be lost (MADV_DONTNEED). Nobody may
    write to them meanwhile. Where the kernel mapped 2 MiB at once, the rest of those leaves too, and comes back from
    the page cache when it is used.

    Args:
        address: within a mapping. Rounded inward to whole pages, so that neighbours keep theirs.
        nbytes: bytes from there, all of the same mapping.

    Returns:
        Whether it was done; also if there is no whole page.
    """
    begin, end = _inward(address, nbytes)
    if end <= begin:
        return True
    return not written(begin, end - begin) and not _advise(begin, end - begin, _DONTNEED)


def _outward(address: int, nbytes: int) -> tuple[int, int]:
    if nbytes <= 0:
        return address, address
    return address // mmap.PAGESIZE * mmap.PAGESIZE, -(-(address + nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE


def _inward(address: int, nbytes: int) -> tuple[int, int]:
    return -(-address // mmap.PAGESIZE) * mmap.PAGESIZE, (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE


def _advise(begin: int, nbytes: int, advice: int) -> int:
    """The error's number, or 0 when it was taken."""
    system = libc()
    if system is None:
        return errno.ENOSYS
    while system.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(nbytes), advice):
        number = ctypes.get_errno()
        if number not in (errno.EINTR, errno.EAGAIN):
            return number
    return 0
