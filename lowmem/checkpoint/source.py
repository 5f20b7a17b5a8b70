"""Source to files: which weights a path, a scheme or a name of the hub stands for."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import SourceError
from .file_names import (
    PICKLES,
    SAFETENSORS,
    canonical_name,
    is_index,
    is_of_rank,
    is_pickled,
    kind_of,
    listed,
    shard_number,
    variant_of,
)
from .folder import choose, instead_of_index
from .instead import of_ranks, unsupported
from .location import local_place
from .schemes import follow
from .selection import Selection
from .there import is_file_at, is_folder_at

_EXPECTED = "a folder, an index file (*.safetensors.index.json, *.bin.index.json) or a weights file"
_ALL = Selection()


@dataclass(frozen=True, slots=True)
class Source:
    """What a source resolved to: either an index, or the shards themselves.

    Attributes:
        text: as the user gave it.
        folder: where the files lie.
        index: the index to believe, or None.
        shards: without an index, the weight files.
        config: the `config.json` beside them, if there is one.
        warnings: what was odd and what was believed.
        pickled: the weights are pickles by their names, not safetensors.
        path: what the text led to: a folder, an index or a weights file.
    """

    text: str
    folder: Path
    index: Path | None
    shards: tuple[Path, ...]
    config: Path | None
    warnings: tuple[str, ...] = ()
    pickled: bool = False
    path: Path = Path()


def resolve(source: str | os.PathLike[str], selection: Selection = _ALL) -> Source:
    """Find the weights that `source` stands for.

    What exists is believed first: a folder, an index file or a weights file (`.safetensors`, `.bin`, `.pt`, `.pth`,
    `.ckpt`). Then a text may begin with a scheme (`local:`, `local-dir:`, `hf-hub:`, or one of `register_scheme`), or
    be the name of a model in the hub's cache, `org/name` or `org/name@revision`. A `Path` is only ever a path.
    In a folder `folder.choose` decides.

    Args:
        source: a path, `scheme:rest`, or the name of a model of the hub.
        selection: a variant, a folder inside the source, a revision, and whether a scheme may use the network.

    Raises:
        SourceError: nothing there, no weights, several candidates (they are listed), or an unknown scheme.
        OptionError: the selection chooses among what this source cannot have.
        UnsupportedError: only weights of kinds that lowmem does not read.
    """
    try:
        text = os.fsdecode(source)
    except TypeError as error:
        raise SourceError(f"source: expected a path, found {source!r}") from error
    path = _existing(text, text)
    if path is not None:
        selection.refuse_revision(text, "a local path")
    elif not isinstance(source, os.PathLike):
        led = follow(text, selection)
        path = None if led is None else _existing(text, os.fspath(led))
    if path is None:
        raise SourceError(f"{text or repr(text)}: no such file or folder; give {_EXPECTED}")
    if not is_folder_at(path):
        selection.refuse_choice(text)
        return replace(_of_file(text, path), path=path)
    return _in_folder(text, path, selection)


def _existing(text: str, path: str) -> Path | None:
    """The path when something is there; an error when that cannot be told."""
    try:
        found = Path(path).expanduser()
        return found if path and found.exists() else None
    except (OSError, RuntimeError, ValueError) as error:
        raise SourceError(f"{text}: not a path that can be followed: {error}; check it and its permissions") from error


def _in_folder(text: str, outer: Path, selection: Selection) -> Source:
    path = outer / selection.subfolder
    if selection.subfolder and not is_folder_at(path):
        there = listed(local_place(text, outer).below()) or "none"
        raise SourceError(
            f"{text}: subfolder {selection.subfolder}: no such folder in {outer} (folders there: {there}); "
            "give one of them"
        )
    choice = choose(local_place(text, path, selection.subfolder), selection.variant)
    return Source(
        text,
        path,
        path / choice.index if choice.index else None,
        tuple(path / name for name in choice.files),
        _config(path),
        choice.warnings,
        choice.pickled,
        path,
    )


def _of_file(text: str, path: Path) -> Source:
    config, pickled, name = _config(path.parent), is_pickled(path.name), path.name
    if is_index(name):
        whole = path.parent / canonical_name(pickled, variant_of(name))
        instead = instead_of_index(local_place(text, path.parent), name, whole.name) if is_file_at(whole) else None
        if instead:
            return Source(text, path.parent, None, (whole,), config, (instead,), pickled)
        return Source(text, path.parent, path, (), config, (), pickled)
    if name.lower().endswith(".json"):
        raise SourceError(
            f"{text}: expected an index, which ends in .safetensors.index.json or .bin.index.json; "
            "give that file or its folder"
        )
    if is_of_rank(name):
        raise of_ranks(text, [name])
    if pickled or name.lower().endswith(SAFETENSORS):
        part = shard_number(name)
        odd = (f"{name} is shard {part[0]} of {part[1]}; its folder or its index is the whole",) if part else ()
        return Source(text, path.parent, None, (path,), config, odd, pickled)
    if kind := kind_of(name):
        raise unsupported(text, {name: kind})
    raise SourceError(f"{text}: expected {_EXPECTED} ({', '.join((SAFETENSORS, *PICKLES))})")


def _config(folder: Path) -> Path | None:
    config = folder / "config.json"
    return config if is_file_at(config) else None
