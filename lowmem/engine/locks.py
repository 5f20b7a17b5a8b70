"""Locks on folders: they leave no file behind, and the kernel takes them back from a process that dies."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .cleanup import OpenFiles, close_last, close_read, open_into, undisturbed

if sys.platform != "win32":
    import fcntl


def hold(held: list[int], folder: Path, wait: bool = False) -> bool:
    """Lock `folder` until `release` of `held`, which gets an open file; false where there are no such locks (Windows,
    some NFS).

    Raises:
        BlockingIOError: someone else holds it, and `wait` is false.
        FileNotFoundError: it is gone.
    """
    if sys.platform == "win32":
        return False
    while True:
        # What is no folder is not opened: a pipe would wait for its other end.
        open_into(held, folder, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
        try:
            fcntl.flock(held[-1], fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:
            return False
        # Whoever held it may have removed it, and another made it anew: that one is not locked by this.
        if os.path.samestat(os.fstat(held[-1]), folder.stat()):
            return True
        close_last(held)


def release(held: list[int]) -> None:
    """Give up what is locked. May be interrupted and called again.

    Not by closing alone: a child that was forked meanwhile has the same open file, and would keep the lock.
    """
    if sys.platform != "win32":
        for fd in held:
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_UN)
    close_read(held)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other load is in such a block for `folder`."""
    held = OpenFiles()
    try:
        hold(held, folder, wait=True)
        yield
    finally:
        undisturbed(functools.partial(release, held))


def is_abandoned(folder: Path) -> bool:
    """Whether whoever locked `folder` is gone; false when that cannot be told."""
    held = OpenFiles()
    try:
        return hold(held, folder)
    except OSError:
        return False
    finally:
        undisturbed(functools.partial(release, held))
