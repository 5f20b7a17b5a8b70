"""Read a file that is small where it is what it should be: never a pipe that nobody fills, never without an end."""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path

# What describes a model: larger ones are none, and what is made of a JSON text is many times as large as the text.
MOST_OF_A_CONFIG = 16 * 1024**2
# Without these (Windows) there are no pipes in folders either.
_AT_ONCE = getattr(os, "O_NONBLOCK", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


def open_regular(path: Path, *, links: bool = True) -> io.FileIO:
    """Open a regular file to read.

    Args:
        path: of the file.
        links: whether it may be a link to one.

    Raises:
        OSError: it is none, or cannot be opened.
    """
    # Looked at before, for to open a device may do something; and after, for it may be another by then.
    _check(path.stat(follow_symlinks=links).st_mode, path)
    opened = io.FileIO(path, opener=lambda name, flags: os.open(name, flags | _AT_ONCE | (0 if links else _NO_LINK)))
    try:
        _check(os.fstat(opened.fileno()).st_mode, path)
    except BaseException:
        opened.close()
        raise
    return opened


def _check(mode: int, path: Path) -> None:
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "expected a regular file", os.fspath(path))


def read_small(path: Path, most: int, *, links: bool = True) -> bytes:
    """All of a regular file.

    Args:
        path: of the file.
        most: bytes that it may have.
        links: whether it may be a link to one.

    Raises:
        OSError: it is no such file, or cannot be read.
    """
    with open_regular(path, links=links) as opened:
        size = os.fstat(opened.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"expected at most {most} bytes, found {size}", os.fspath(path))
        # Some file systems tell no size (/proc).
        found = bytearray()
        while part := opened.read(most + 1 - len(found)):
            found += part
            if len(found) > most:
                raise OSError(errno.EFBIG, f"expected at most {most} bytes, found more", os.fspath(path))
    return bytes(found)
