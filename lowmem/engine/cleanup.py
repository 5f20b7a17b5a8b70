"""Undo that Ctrl-C does not cut short, and memory that nobody keeps."""

from __future__ import annotations

import ctypes
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


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


def let_go(error: BaseException | None) -> None:
    """Whoever keeps an error keeps its frames and those of what caused it, and they hold buffers and tensors."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def trim_heap() -> None:
    """Give the kernel what foreign code has freed and the C library's heap would keep, where it can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
