"""Where files are: a folder, or a repository of the hub before anything of it is fetched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SourceError
from .file_names import is_weights
from .there import is_there, table_at


@dataclass(frozen=True, slots=True)
class Place:
    """Where files are: a folder, or a repository of the hub before anything of it is fetched.

    Attributes:
        text: what errors call it.
        names: the files that lie directly in it, in order.
        below: sub-folder → the files that lie directly in that; called only when it matters.
        shards: name of an index → the names of its shards, or None when it cannot be read; called only when it matters.
        has: whether a file is there, by its path from here.
        table: name of a small JSON file → the object in it, or an empty one; called only when it matters.
        part: a sub-folder → how to name it as a source.
        incomplete: what to do when a part of a set is missing.
        empty: what to do when there are no weights at all.
    """

    text: str
    names: Sequence[str]
    below: Callable[[], Mapping[str, Sequence[str]]]
    shards: Callable[[str], frozenset[str] | None]
    has: Callable[[str], bool]
    table: Callable[[str], Mapping[str, Any]]
    part: Callable[[str], str]
    incomplete: str = "bring the index"
    empty: str = "is it the model's folder?"


def local_place(text: str, folder: Path, subfolder: str = "") -> Place:
    """The files of a local folder.

    Args:
        text: what errors call the source.
        folder: its path.
        subfolder: where in the source it is, when it is not the source itself.

    Raises:
        SourceError: it cannot be listed.
    """
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        where = "" if text == str(folder) else f" ({folder})"
        raise SourceError(f"{text}{where}: cannot be listed: {error.strerror or error}") from error
    # A folder may be called model.bin, but its weights are then inside.
    files = [n for n in names if not ((is_weights(n, False) or is_weights(n, True)) and _is_folder(folder / n))]
    return Place(
        within(text, subfolder),
        files,
        lambda: {n: names_in(folder / n) for n in names if not n.startswith(".") and _is_folder(folder / n)},
        lambda index: shards_named(folder / index),
        lambda name: is_there(folder / name),
        lambda name: table_at(folder / name),
        lambda below: f"such as {folder / below}, or say subfolder={within(subfolder, below)!r} (--subfolder)",
    )


def within(outer: str, name: str) -> str:
    """A name inside of `outer`, either of which may be empty."""
    return f"{outer}/{name}" if outer and name else outer or name


def shards_named(index: Path) -> frozenset[str] | None:
    """The names of the shards in an index, or None when it cannot be read: that is for its reader to say."""
    named = table_at(index).get("weight_map")
    if not isinstance(named, dict):
        return None
    return frozenset(name for name in named.values() if isinstance(name, str))


def _is_folder(path: Path) -> bool:
    """Whether a folder is there, and can be told to be."""
    try:
        return path.is_dir()
    except OSError:
        return False


def names_in(folder: Path) -> list[str]:
    """What lies in a folder, in order; nothing where it cannot be listed."""
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return []
