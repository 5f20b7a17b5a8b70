"""Small files that a stranger may have written: told to be small before they are read, and weighed before decoded."""

from __future__ import annotations

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
# Bytes that CPython takes for what a character of JSON begins or ends, where most of it is that; half a text's for a
# quotation mark. A list of nothing, a table of one, the place in a table, the place in a list and a number.
_WEIGHTS = {b"[": 104, b"{": 250, b":": 110, b",": 42, b'"': 32}


class TooHeavyError(ValueError):
    """JSON that would take much memory when it is decoded."""


def read_small(path: Path, most: int = MOST) -> bytes:
    """All bytes of a regular file of at most `most`.

    Raises:
        OSError: it is of another kind, which could hang or never end; it is larger; or it cannot be read.
    """
    # Ask before opening: opening a fifo would hang, a device could do anything.
    _check(path, path.stat(), most)
    pieces, size = [], 0
    with io.FileIO(path, opener=_open) as file:
        _check(path, os.fstat(file.fileno()), most)
        while size <= most and (piece := file.read(_PIECE)):
            pieces.append(piece)
            size += len(piece)
    if size > most:
        raise _larger(path, most, f"{size} or more")
    return b"".join(pieces)


def check_kind(path: Path) -> None:
    """Look whether a file is a regular one.

    Raises:
        OSError: it is of another kind, or is not there.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "expected a regular file, found another kind", str(path))


def check_small(path: Path, most: int = MOST) -> None:
    """Look whether a file that others will read is small, and whether decoding it as JSON would take little.

    Raises:
        OSError: as `read_small`.
        TooHeavyError: decoding it would take more memory than it may.
    """
    check_weight(read_small(path, most), times=COPIES)


def check_weight(raw: bytes, more: int = 0, times: int = 1) -> None:
    """Look whether decoding JSON would take little memory beside its own bytes: `"[[],[],[]..."` takes 25 times them.

    Args:
        raw: the text.
        more: bytes that may be taken besides.
        times: how often it will be in memory: configs are copied by who reads them.

    Raises:
        TooHeavyError: it would take more.
    """
    if len(raw) > ROOM // 128 and (taken := times * decoded_size(raw)) > len(raw) + ROOM + more:
        raise TooHeavyError(
            f"expected at most {len(raw) + ROOM + more} bytes of memory to decode it, found {len(raw)} bytes of JSON "
            f"that take about {taken}"
        )


def decoded_size(raw: bytes) -> int:
    """Bytes that JSON takes at most when it is decoded, with its text; an estimate that is seldom too low."""
    # One character may give all of the text four bytes for each.
    width = 1 if raw.isascii() else 4
    return len(raw) * (width + 1) + sum(weight * raw.count(mark) for mark, weight in _WEIGHTS.items())


def _open(path: str, flags: int) -> int:
    # What became a fifo since it was asked must not hang either.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check(path: Path, info: os.stat_result, most: int) -> None:
    if not stat.S_ISREG(info.st_mode):
        raise OSError(errno.EINVAL, f"expected a regular file of at most {most} bytes, found another kind", str(path))
    if info.st_size > most:
        raise _larger(path, most, str(info.st_size))


def _larger(path: Path, most: int, found: str) -> OSError:
    return OSError(errno.EFBIG, f"expected a regular file of at most {most} bytes, found {found} bytes", str(path))
