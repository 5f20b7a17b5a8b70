"""Small files that a stranger may have written: told to be small before they are read, and weighed before decoded."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
from pathlib import Path

# The limit of the reference reader of safetensors for a header; no index or config comes near it.
MOST = 100_000_000
# What decoding may take beside the bytes that a file has.
ROOM = 48 * 1024**2
# More than any name of a tensor has: as long as a path may be.
LONGEST_NAME = 4096
# Of a config, in the libraries that read it.
COPIES = 4
# Of a shape: what torch itself can compute with.
MOST_SIZES = 64
_PIECE = 1 << 20
# What became a pipe since it was asked must not hang. Without these (Windows) there are none in folders.
_AT_ONCE = getattr(os, "O_NONBLOCK", 0)
# Bytes that CPython takes for what a character of JSON begins or ends, where most of it is that; half a text's for a
# quotation mark. A list of nothing, a table of one, the place in a table, the place in a list and a number.
_WEIGHTS = {b"[": 104, b"{": 250, b":": 110, b",": 42, b'"': 32}


class TooHeavyError(ValueError):
    """JSON that would take much memory when it is decoded."""


def open_regular(path: Path, *, links: bool = True) -> io.FileIO:
    """Open a regular file to read.

    Args:
        path: of the file.
        links: whether it may be a link to one.

    Raises:
        OSError: it is of another kind, which could hang or never end; or it cannot be opened.
    """
    # Ask before opening, for to open a device may do something; and after, for it may be another by then.
    _check(path, path.stat(follow_symlinks=links))
    flags = os.O_RDONLY | _AT_ONCE | (0 if links else getattr(os, "O_NOFOLLOW", 0)) | getattr(os, "O_BINARY", 0)
    # In one step each, of C code: a Ctrl-C between a call and its assignment would lose the open file.
    fds: list[int] = []
    try:
        fds.extend(map(os.open, (path,), (flags,)))
        _check(path, os.fstat(fds[0]))
        (opened,) = map(io.FileIO, fds)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return opened


def read_small(path: Path, most: int = MOST, *, links: bool = True) -> bytes:
    """All bytes of a regular file of at most `most`.

    Raises:
        OSError: it is of another kind; it is larger; or it cannot be read.
    """
    pieces, size = [], 0
    with open_regular(path, links=links) as file:
        claimed = os.fstat(file.fileno()).st_size
        if claimed > most:
            raise _larger(path, most, str(claimed))
        # Some file systems tell no size (/proc).
        while size <= most and (piece := file.read(_PIECE)):
            pieces.append(piece)
            size += len(piece)
    if size > most:
        raise _larger(path, most, f"{size} or more")
    return b"".join(pieces)


def read_config(path: Path, weights: Path | None = None) -> bytes:
    """All bytes of a small file, to be decoded as a config, also by others.

    Args:
        path: of the file.
        weights: the folder of those that it is for, where it does not lie beside them.

    Raises:
        OSError: as `read_small`.
        TooHeavyError: decoding it would take more memory than it may: as much as the weights besides, for a config has
            the name of each label of which they have a row.
    """
    raw = read_small(path)
    check_weight(raw, held_in(weights or path.parent), COPIES)
    return raw


def held_in(folder: Path) -> int:
    """Bytes of the files in a folder: those of a model are many times what its index and its config take."""
    total = 0
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_file():
                total += entry.stat().st_size
    return total


def check_weight(raw: bytes, more: int = 0, times: int = 1) -> None:
    """Look whether decoding JSON would take little memory beside its own bytes: `"[[],[],[]..."` takes 25 times them.

    Args:
        raw: the text.
        more: bytes that may be taken besides.
        times: how often it will be in memory: configs are copied by who reads them.

    Raises:
        TooHeavyError: it would take more.
    """
    if times * len(raw) > ROOM // 128 and (taken := times * decoded_size(raw)) > len(raw) + ROOM + more:
        raise TooHeavyError(
            f"expected at most {len(raw) + ROOM + more} bytes of memory to decode it, found {len(raw)} bytes of JSON "
            f"that take about {taken}"
        )


def decoded_size(raw: bytes) -> int:
    """Bytes that JSON takes at most when it is decoded, with its text; an estimate that is seldom too low."""
    # One character may give all of the text four bytes for each.
    width = 1 if raw.isascii() else 4
    return len(raw) * (width + 1) + sum(weight * raw.count(mark) for mark, weight in _WEIGHTS.items())


def _check(path: Path, info: os.stat_result) -> None:
    if not stat.S_ISREG(info.st_mode):
        raise OSError(errno.EINVAL, "expected a regular file, found another kind", str(path))


def _larger(path: Path, most: int, found: str) -> OSError:
    return OSError(errno.EFBIG, f"expected a regular file of at most {most} bytes, found {found} bytes", str(path))
