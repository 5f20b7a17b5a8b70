"""Undo that Ctrl-C does not cut short, and memory that nobody keeps."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from .._shared import Shared
from ..sizes import MIB


def undisturbed(*steps: Callable[[], None]) -> None:
    """Run the steps, once more for each Ctrl-C that interrupts them, and let the last one through when all are done.

    They must bear to be run again after they were interrupted anywhere.
    """
    interrupt: KeyboardInterrupt | None = None
    while True:
        try:
            for step in steps:
                step()
            break
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


class OpenFiles(list[int]):
    """Open files that are closed with the list at the latest, where a Ctrl-C came just before they were."""

    def __del__(self) -> None:
        interrupt = None
        # Nobody comes behind this: what it leaves open stays so.
        while self:
            try:
                close_read(self)
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt


def close_all(fds: list[int]) -> None:
    """Close open files and forget them, each as one step: after a Ctrl-C those that are left are still open."""
    for _ in map(os.close, map(fds.pop, [-1] * len(fds))):
        pass


def close_last(fds: list[int]) -> None:
    """As `close_all`, of the last alone."""
    for _ in map(os.close, map(fds.pop, [-1])):
        pass


def move_all(fds: list[int], to: list[int]) -> None:
    """Let another list own the open files, each as one step."""
    to.extend(map(fds.pop, [-1] * len(fds)))


def close_read(fds: list[int]) -> None:
    """As `close_all`, of files that were only read, or locks: gone whatever close(2) says, and nothing is lost."""
    while fds:
        with contextlib.suppress(OSError):
            close_all(fds)


def join(thread: threading.Thread, timeout: float | None = None) -> None:
    """Wait, or so many seconds, for the end of a thread whose start a Ctrl-C may have cut short: it may be about to
    begin, and its own `join` would refuse it.
    """
    if not _has_begun(thread):
        # `Thread.start` is Python's code. A Ctrl-C in it may leave the lock taken under which the thread says that it
        # runs, and waits for it for ever; or it comes before there is a thread, and this one only seems to be.
        lock = getattr(getattr(getattr(thread, "_started", None), "_cond", None), "_lock", None)
        with contextlib.suppress(AttributeError, RuntimeError):
            lock.release()  # type: ignore[union-attr]
            _has_begun(thread)
        if thread.ident is None:
            getattr(threading, "_limbo", {}).pop(thread, None)
    if thread.ident is not None:
        thread.join(timeout)


def _has_begun(thread: threading.Thread) -> bool:
    """Wait a second for it; one that was never started has begun as far as it ever will."""
    for _ in range(1000):
        if thread.is_alive() or thread not in threading.enumerate():
            return True
        time.sleep(0.001)
    return False


def open_into(fds: list[int], path: Path, flags: int, mode: int = 0o777) -> None:
    """Open a file and append its descriptor, as one step: with `fd = os.open(...)` a Ctrl-C that arrives during the
    call is raised before the assignment, and nobody knows the open file any more.
    """
    fds.extend(map(os.open, (path,), (flags,), (mode,)))


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


def large_blocks_apart() -> AbstractContextManager[None]:
    """Large blocks of the C library go back to the kernel as soon as they are freed, where it can (glibc).

    By itself it keeps blocks of up to 32 MiB in its heap once some were freed, in pieces that later ones do not fit
    into: an operation took up to 1.6 times what its tensors are. Afterwards it is as glibc leaves a program that has
    freed a block of 32 MiB. Who set `MALLOC_MMAP_THRESHOLD_` has it as it is.
    """
    if _set_option() is None or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return nullcontext()
    return _apart.changed()


def _set_option() -> Callable[[int, int], object] | None:
    return getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None


def _begin() -> None:
    if (set_option := _set_option()) is not None:
        set_option(_M_MMAP_THRESHOLD, _LARGE)


def _end() -> None:
    if (set_option := _set_option()) is not None:
        set_option(_M_MMAP_THRESHOLD, _LARGEST)
        set_option(_M_TRIM_THRESHOLD, 2 * _LARGEST)


_apart = Shared(_begin, _end)


def trim_heap() -> None:
    """Give the kernel what foreign code has freed and the C library's heap would keep, where it can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
