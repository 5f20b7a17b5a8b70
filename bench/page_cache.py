"""Files out of the page cache, and the proof that they are."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Iterable
from pathlib import Path

_PAGE = mmap.PAGESIZE


def drop(files: Iterable[Path]) -> int:
    """Ask the kernel to drop the pages of `files`; returns how many stayed.

    Pages that are mapped anywhere, or not yet written to the disk, cannot be dropped.
    """
    files = list(files)
    stayed = 0
    # Pages that the kernel is still busy with, read ahead for instance, can be dropped a moment later.
    for wait in (0.0, 0.1, 0.4):
        time.sleep(wait)
        for file in files:
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        stayed = sum(cached_pages(file) for file in files)
        if not stayed:
            break
    return stayed


def warm(files: Iterable[Path]) -> None:
    """Read what of `files` is not in the page cache."""
    for file in files:
        if cached_pages(file) * _PAGE < file.stat().st_size:
            with file.open("rb", buffering=0) as stream:
                while stream.read(8 * 1024 * 1024):
                    pass


def cached_pages(file: Path) -> int:
    """How many pages of `file` are in the page cache, by mincore.

    Raises:
        OSError: the kernel does not say.
    """
    size = file.stat().st_size
    if not size:
        return 0
    pages = -(-size // _PAGE)
    found = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    # A private mapping, because ctypes tells the address of writable memory only; nothing is written.
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
        address = ctypes.c_char.from_buffer(mapped)
        try:
            failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(address)), ctypes.c_size_t(size), found)
        finally:
            del address
        if failed:
            raise OSError(ctypes.get_errno(), "mincore", str(file))
    return sum(byte & 1 for byte in bytes(found))
