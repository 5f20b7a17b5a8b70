"""What is at a path. What cannot be told is an error: taken for absence, it would make another choice quietly."""

from __future__ import annotations

import errno
import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .._files import check_weight, held_in, read_small
from ..errors import SourceError
from ..sizes import MIB

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
# What may not be read, or is no small file, is no failure of the machine: its reader says so.
_CLOSED = (*_ABSENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.EFBIG, errno.EINVAL)

# More than the index of any model takes when it is decoded, which may be there before its shards.
_FOR_AN_INDEX = 16 * MIB


@contextmanager
def looking_at(path: Path) -> Iterator[None]:
    """Turn what the system says of a path into a `SourceError`."""
    try:
        yield
    except OSError as error:
        raise SourceError(
            f"{error.filename or path}: cannot be looked at: {error.strerror or error}; check it and its permissions"
        ) from error


def is_file_at(path: Path) -> bool:
    """Whether a regular file is there, or a link to one.

    Raises:
        SourceError: the system cannot tell.
    """
    return stat.S_ISREG(_mode(path))


def is_folder_at(path: Path) -> bool:
    """Whether a folder is there, or a link to one; raises as `is_file_at`."""
    return stat.S_ISDIR(_mode(path))


def is_there(path: Path) -> bool:
    """Whether anything is there; raises as `is_file_at`."""
    return _mode(path) != 0


def table_at(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one when there is none, or none that may be read: its reader says so.

    Raises:
        SourceError: the disk failed, or another limit of the machine was met.
    """
    if not is_file_at(path):
        return {}
    with looking_at(path):
        try:
            raw = read_small(path)
            check_weight(raw, held_in(path.parent) + _FOR_AN_INDEX)
            table = json.loads(raw)
        except OSError as error:
            if error.errno not in _CLOSED:
                raise
            return {}
        except (ValueError, RecursionError):
            return {}
    return table if isinstance(table, dict) else {}


def _mode(path: Path) -> int:
    """As stat(2) has it; 0 for nothing."""
    with looking_at(path):
        try:
            return path.stat().st_mode
        except OSError as error:
            if error.errno not in _ABSENT:
                raise
        except ValueError:
            pass  # a name that no file has
    return 0
