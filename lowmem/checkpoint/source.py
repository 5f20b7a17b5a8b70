"""Source to files: which weights a path stands for."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import SourceError, UnsupportedError

INDEX_SUFFIX = ".safetensors.index.json"
_NUMBERED = re.compile(r"-(\d{5,})-of-(\d{5,})\.safetensors$")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class Source:
    """What a source resolved to: either an index, or the shards themselves."""

    text: str
    folder: Path
    index: Path | None
    shards: tuple[Path, ...]
    config: Path | None
    warnings: tuple[str, ...] = ()


def resolve(source: str | os.PathLike[str]) -> Source:
    """Find the weights that `source` stands for: a folder, an index file or one `.safetensors` file.

    In a folder the index is believed before a consolidated file, and `model*` before other names.

    Raises:
        SourceError: nothing there, no weights, or several candidates (they are listed).
        UnsupportedError: only pickled weights are there.
    """
    try:
        text = os.fsdecode(source)
        path = Path(text).expanduser()
        there = bool(text) and path.exists()
    except TypeError as error:
        raise SourceError(f"source: expected a path, found {source!r}") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise SourceError(f"{text}: not a path that can be followed: {error}; check it and its permissions") from error
    if not there:
        hub = f". For a model of the hub: hf download {text} --local-dir FOLDER" if _HUB_ID.fullmatch(text) else ""
        raise SourceError(
            f"{text or repr(text)}: no such file or folder; give a folder, an index file or a .safetensors file{hub}"
        )
    if path.is_dir():
        return _in_folder(text, path)
    config = _config(path.parent)
    if path.name.endswith(".json"):
        if not path.name.endswith(INDEX_SUFFIX):
            raise SourceError(f"{text}: expected an index that ends in {INDEX_SUFFIX}; give that file or its folder")
        return Source(text, path.parent, path, (), config)
    if path.suffix == ".safetensors":
        return Source(text, path.parent, None, (path,), config)
    if path.suffix in _PICKLES:
        raise UnsupportedError(_pickle_message(text, [path.name]))
    raise SourceError(f"{text}: expected a folder, *{INDEX_SUFFIX} or *.safetensors")


def _in_folder(text: str, folder: Path) -> Source:
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise SourceError(f"{text}: cannot be listed: {error.strerror or error}") from error
    indexes = [n for n in names if n.endswith(INDEX_SUFFIX)]
    files = [n for n in names if n.endswith(".safetensors")]
    config = _config(folder)
    if indexes:
        index = _one(text, indexes, "model" + INDEX_SUFFIX, "indexes")
        return Source(text, folder, folder / index, (), config)
    if "model.safetensors" in files:
        beside = [n for n in files if n != "model.safetensors"]
        odd = (f"{', '.join(beside)}: beside model.safetensors, which was believed",) if beside else ()
        return Source(text, folder, None, (folder / "model.safetensors",), config, odd)
    numbered = [n for n in files if _NUMBERED.search(n)]
    if numbered:
        return Source(
            text,
            folder,
            None,
            _complete_set(text, folder, numbered),
            config,
            (f"no index beside {numbered[0]}: the shards' own headers were believed",),
        )
    if files:
        return Source(text, folder, None, (folder / _one(text, files, "model.safetensors", "weight files"),), config)
    pickles = [n for n in names if n.endswith(_PICKLES)]
    if pickles:
        raise UnsupportedError(_pickle_message(text, pickles))
    raise SourceError(f"{text}: no .safetensors file and no index in this folder; is it the model's folder?")


def _one(text: str, names: list[str], preferred: str, what: str) -> str:
    if len(names) > 1 and preferred not in names:
        raise SourceError(f"{text}: several {what}: {', '.join(names)}; give the path of the one you mean")
    return preferred if preferred in names else names[0]


def _complete_set(text: str, folder: Path, names: list[str]) -> tuple[Path, ...]:
    """Numbered shards without an index can be believed only when the numbering is whole."""
    stems = {_NUMBERED.sub("", n) for n in names}
    counts = {int(m[2]) for n in names if (m := _NUMBERED.search(n))}
    numbers = sorted(int(m[1]) for n in names if (m := _NUMBERED.search(n)))
    if len(stems) > 1 or counts != {len(names)} or numbers != list(range(1, len(names) + 1)):
        raise SourceError(
            f"{text}: shards without an index, and not one whole set: {', '.join(names)}; bring the index"
        )
    return tuple(folder / n for n in names)


def _config(folder: Path) -> Path | None:
    config = folder / "config.json"
    try:
        return config if config.is_file() else None
    except OSError:
        return None


def _pickle_message(text: str, names: list[str]) -> str:
    return (
        f"{text}: only pickled weights ({', '.join(names[:5])}); lowmem reads safetensors. "
        "Convert them, for instance with the model's save_pretrained"
    )
