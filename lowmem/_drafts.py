"""Files that get their name when they are whole: whoever looks sees the old content or the new."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

if sys.platform != "win32":
    import fcntl

_DRAFT = re.compile(r"\.lowmem-[0-9a-f]{16}\.draft")


@contextlib.contextmanager
def new_content(target: Path) -> Iterator[IO[bytes]]:
    """A hidden file beside `target`, which takes its place, from the disk on, when the block ends well.

    Each writer has a hidden file of its own, locked while it lives; those of killed ones are removed.

    Raises:
        OSError: the folder cannot be written.
    """
    _sweep(target.parent)
    with contextlib.ExitStack() as undo:
        hidden, fd = _new_file(target.parent)
        # By then it has its name, or is to go.
        undo.callback(hidden.unlink, missing_ok=True)
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(fd)
            if sys.platform == "win32":
                # There an open file keeps its name.
                file.close()
            hidden.replace(target)


def check_writable(folder: Path) -> None:
    """Make a hidden file, and remove it.

    Raises:
        OSError: the folder cannot be written.
    """
    hidden, fd = _new_file(folder)
    try:
        hidden.unlink()
    finally:
        os.close(fd)


def _new_file(folder: Path) -> tuple[Path, int]:
    """A new file with the rights that any new file has, and its descriptor, which locks it."""
    while True:
        path = folder / f".lowmem-{secrets.token_hex(8)}.draft"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        if sys.platform == "win32":
            return path, fd
        try:
            if _is_ours(path, fd):
                return path, fd
        except BaseException:
            os.close(fd)
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        os.close(fd)


def _is_ours(path: Path, fd: int) -> bool:
    """Lock a new file: whether nobody has taken it for abandoned before."""
    # Without locks (some NFS) nobody finds it abandoned either.
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _sweep(folder: Path) -> None:
    """Remove what killed writers left, where we may."""
    if sys.platform == "win32":
        return
    for path in folder.glob(".lowmem-*.draft"):
        if not _DRAFT.fullmatch(path.name):
            continue
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(fd)
