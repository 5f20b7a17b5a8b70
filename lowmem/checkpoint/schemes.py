"""What stands before a colon in a source: `local:path`, `hf-hub:org/name`, and what programs register."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from ..errors import OptionError, SourceError
from . import hub
from .selection import Selection
from .there import looking_at

Scheme = Callable[[str, bool], "str | os.PathLike[str]"]
_Follow = Callable[[str, Selection], "str | os.PathLike[str]"]

# Two letters at least: C:\models is a path.
_NAME = re.compile(r"[a-z][a-z0-9+.-]+")
_PREFIX = re.compile(r"([A-Za-z][\w+.-]+):(.*)", re.ASCII | re.DOTALL)


def register_scheme(name: str, function: Scheme, *, replace: bool = False) -> None:
    """Let sources begin with `name:`.

    Args:
        name: two or more of a-z, 0-9, `+`, `.`, `-`, a letter first. In a source its case does not matter.
        function: is given what stands after the colon, and whether it may use the network; returns the path of a
            folder or file that exists. What it raises as a `LowmemError` or `OSError` becomes the source's error.
        replace: whether it may take the place of a scheme that is there.

    Raises:
        OptionError: a name that cannot be one or is taken, or no function.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise OptionError(f"scheme {name!r}: expected two or more of a-z, 0-9, +, . and -, a letter first")
    if not callable(function):
        raise OptionError(f"scheme {name!r}: expected a function of a text and a flag, found {function!r}")
    if name in _SCHEMES and not replace:
        raise OptionError(f"scheme {name!r}: is there already; choose another name, or give replace=True")

    def follow_it(rest: str, selection: Selection) -> str | os.PathLike[str]:
        selection.refuse_revision(f"{name}:{rest}", f"what the scheme {name}: leads to")
        return function(rest, selection.download)

    _SCHEMES[name] = follow_it


def follow(text: str, selection: Selection) -> Path | None:
    """Where a source leads that is no path: by its scheme, or as the name of a model of the hub.

    Of the selection, the subfolder is only looked into; the path is that of the whole.

    Returns:
        A folder or file that exists; None when `text` has no scheme and cannot be a name of the hub.

    Raises:
        SourceError: an unknown scheme, or one that leads nowhere.
        OptionError: a revision of what has none, or beside another one.
    """
    found = _PREFIX.fullmatch(text)
    if found is None:
        with looking_at(Path(text)):
            return hub.by_name(text, selection)
    name, rest = found[1].lower(), found[2]
    if name not in _SCHEMES:
        raise SourceError(
            f"{text}: no such file or folder, and {found[1]}: is no scheme; those known are "
            + ", ".join(f"{known}:" for known in sorted(_SCHEMES))
        )
    try:
        led = _SCHEMES[name](rest, selection)
    except OSError as error:
        raise SourceError(f"{text}: cannot be followed: {error}; check what stands after {found[1]}:") from error
    try:
        path = Path(led).expanduser()
        there = path.exists()
    except TypeError as error:
        raise SourceError(f"{text}: expected {found[1]}: to lead to a path, found {led!r}; mend the scheme") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise SourceError(f"{text}: leads to {led!r}, not a path that can be followed: {error}") from error
    if not there:
        raise SourceError(f"{text}: leads to {str(path)!r}, where nothing is; check what stands after {found[1]}:")
    return path


def _local(rest: str, selection: Selection) -> Path:
    """A path, whatever it looks like: `local:` as people write it, `local-dir:` as timm does."""
    if not rest:
        raise SourceError("local: expected a path after the colon, found nothing")
    selection.refuse_revision(rest, "a local path")
    return Path(rest)


_SCHEMES: dict[str, _Follow] = {"local": _local, "local-dir": _local, "hf-hub": hub.snapshot}
