"""Locks on folders: they leave no file behind, and the kernel takes them back from a process that dies."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .cleanup import open_into

if sys.platform != "win32":
    import fcntl


def hold(folder: Path, wait: bool = False) -> int | None:
    """A file descriptor that locks `folder` until it is closed; None where there are no such locks (Windows, some NFS).

    Raises:
        BlockingIOError: someone else holds it, and `wait` is false.
        FileNotFoundError: it is gone.
    """
    if sys.platform == "win32":
        return None
    fds: list[int] = []
    try:
        # What is no folder is not opened: a pipe would wait for its other end.
        open_into(fds, folder, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
        fcntl.flock(fds[0], fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException as error:
        for fd in fds:
            os.close(fd)
        if fds and isinstance(error, OSError) and not isinstance(error, BlockingIOError):
            return None
        raise
    return fds[0]


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other load is in such a block for `folder`."""
    fd = hold(folder, wait=True)
    try:
        yield
    finally:
        if fd is not None:
            os.close(fd)


def is_abandoned(folder: Path) -> bool:
    """Whether whoever locked `folder` is gone; false when that cannot be told."""
    try:
        fd = hold(folder)
    except OSError:
        return False
    if fd is None:
        return False
    os.close(fd)
    return True
