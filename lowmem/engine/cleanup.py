"""Undo that Ctrl-C does not cut short, and memory that nobody keeps."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..sizes import MIB


def undisturbed(step: Callable[[], None]) -> None:
    """Run `step`, once more for each Ctrl-C that interrupts it, and let the last one through when it is done.

    `step` must bear to be run again after it was interrupted anywhere.
    """
    interrupt: KeyboardInterrupt | None = None
    while True:
        try:
            step()
            break
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def open_into(fds: list[int], path: Path, flags: int, mode: int = 0o777) -> None:
    """Open a file and append its descriptor, as one step: with `fd = os.open(...)` a Ctrl-C that arrives during the
    call is raised before the assignment, and nobody knows the open file any more.
    """
    fds.extend(map(os.open, (path,), (flags,), (mode,)))


def close_read(*fds: int) -> None:
    """Close files that were only read, or locks: they are gone whatever close(2) says, and nothing is lost."""
    for fd in fds:
        with suppress(OSError):
            os.close(fd)


def let_go(error: BaseException | None) -> None:
    """Whoever keeps an error keeps its frames and those of what caused it, and they hold buffers and tensors."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


# glibc's `malloc.h`, and where its own adaptation of the threshold ends on machines of 64 bits.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE, _LARGEST = MIB, 32 * MIB
_lock = threading.Lock()
_users = 0


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Large blocks of the C library go back to the kernel as soon as they are freed, where it can (glibc).

    By itself it keeps blocks of up to 32 MiB in its heap once some were freed, in pieces that later ones do not fit
    into: an operation took up to 1.6 times what its tensors are. Afterwards it is as glibc leaves a program that has
    freed a block of 32 MiB. Who set `MALLOC_MMAP_THRESHOLD_` has it as it is.
    """
    global _users
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is None or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        yield
        return
    with _lock:
        _users += 1
        set_option(_M_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                set_option(_M_MMAP_THRESHOLD, _LARGEST)
                set_option(_M_TRIM_THRESHOLD, 2 * _LARGEST)


def trim_heap() -> None:
    """Give the kernel what foreign code has freed and the C library's heap would keep, where it can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
