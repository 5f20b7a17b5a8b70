"""A folder as one input: what each file in it is, in JSON, so that a mutation damages a file and not the whole."""

from __future__ import annotations

import base64
import json
import os
import random
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from unittest.mock import patch

from lowmem import memory

from .damage import ODD, TEXTS, change, damage
from .guard import Broken

# Of a scene: path in it → what is there:
#   ["sound"]                         the bytes that belong there
#   ["damaged", base64]               others
#   ["json", value]                   a text; "$name" in it stands for a value that only the execution knows
#   ["link", target]                  "$elsewhere" is a folder that nobody named to lowmem
#   ["fifo"], ["folder"]
# and "ages": path → seconds since it was written, where it matters; the rest is as old as is told in `make`.
Scene = dict[str, Any]

LINKS = ("$elsewhere", "$elsewhere/held", "$elsewhere/none", "/dev/zero", "/dev/null", ".", "..", "/etc/passwd", "loop")
_DEPTHS = (10, 300, 900, 5000, 100_000)


def encode(files: Mapping[str, list[Any]]) -> bytes:
    """A scene as an input."""
    return json.dumps({"files": files}).encode()


def decode(data: bytes) -> dict[str, list[Any]] | None:
    """The files of a scene; None where the input is none."""
    try:
        files = json.loads(data)["files"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    good = isinstance(files, dict) and all(isinstance(n, list) and n and isinstance(n[0], str) for n in files.values())
    return files if good else None


def make(
    files: Mapping[str, list[Any]],
    root: Path,
    sound: Mapping[str, bytes],
    known: Mapping[str, Any],
    time_ns: int,
) -> None:
    """Lay the scene out in `root`; a name that would lead out of it is left out, and what the system refuses too.

    Args:
        files: the scene.
        root: an empty folder, or one that is not there.
        sound: path → the bytes that belong there.
        known: what stands for `$name` in names, links and texts.
        time_ns: when the files were last written.
    """
    root.mkdir(exist_ok=True)
    for name, node in files.items():
        path = PurePosixPath(_filled(name, known))
        if path.is_absolute() or ".." in path.parts or not path.parts:
            continue
        place = root / path
        try:
            if os.path.lexists(place) or not os.path.realpath(place.parent).startswith(os.path.realpath(root)):
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            _put(place, name, node, sound, known)
            os.utime(place, ns=(time_ns, time_ns), follow_symlinks=False)
        except (OSError, ValueError):
            continue


def _put(place: Path, name: str, node: list[Any], sound: Mapping[str, bytes], known: Mapping[str, Any]) -> None:
    kind, value = node[0], node[1] if len(node) > 1 else None
    if kind == "sound":
        place.write_bytes(sound.get(name, b""))
    elif kind == "damaged":
        place.write_bytes(_bytes(value))
    elif kind == "json":
        place.write_text(json.dumps(_filled(value, known)), encoding="utf-8")
    elif kind == "deep":
        depth = value if isinstance(value, int) and 0 <= value <= 200_000 else 1
        text = json.dumps(_filled(node[2] if len(node) > 2 else {}, known))
        inner = "[" * depth + "]" * depth
        place.write_text(f'{text[:-1]}{", " if text != "{}" else ""}"deep": {inner}}}', encoding="utf-8")
    elif kind == "link":
        place.symlink_to(_filled(str(value), known))
    elif kind == "fifo":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()


def _bytes(text: Any) -> bytes:
    try:
        return base64.b64decode(str(text))
    except ValueError:
        return b""


def _filled(value: Any, known: Mapping[str, Any]) -> Any:
    """The value with what stands for each `$name` in it."""
    if isinstance(value, str):
        if value in known:
            return known[value]
        for name, held in known.items():
            value = value.replace(name, str(held)) if isinstance(held, str) else value
        return value
    if isinstance(value, dict):
        return {_filled(key, known): _filled(item, known) for key, item in value.items()}
    return [_filled(item, known) for item in value] if isinstance(value, list) else value


def mutate(data: bytes, chance: random.Random, sound: Mapping[str, bytes]) -> bytes:
    """Another scene: one to three of its files are something else."""
    files = decode(data)
    if not files:
        return damage(data, chance)
    files = dict(files)
    for _ in range(chance.choice((1, 1, 2, 3))):
        name = chance.choice(list(files))
        kind = chance.randrange(12)
        if kind == 0 and len(files) > 1:
            del files[name]
        elif kind == 1:
            files[name] = ["link", chance.choice((*LINKS, *files))]
        elif kind == 2:
            files[name] = chance.choice((["fifo"], ["folder"], ["damaged", ""]))
        elif kind == 3:
            files[name + chance.choice(("x", "/x", ".draft", ".partial", ".tmp"))] = chance.choice(list(files.values()))
        elif kind == 4:
            files[chance.choice(TEXTS)] = files[name]
        elif kind == 5:
            other = chance.choice(list(files))
            files[name], files[other] = files[other], files[name]
        else:
            files[name] = _damaged(name, files[name], chance, sound)
        if not files:
            break
    return encode(files)


def _damaged(name: str, node: list[Any], chance: random.Random, sound: Mapping[str, bytes]) -> list[Any]:
    if node[0] == "json" and len(node) > 1:
        if chance.random() < 0.05:
            return ["deep", chance.choice(_DEPTHS), node[1]]
        value = node[1]
        for _ in range(chance.choice((1, 1, 2))):
            value = change(value, chance)
        return ["json", value]
    if node[0] == "damaged" and len(node) > 1:
        return ["damaged", base64.b64encode(damage(_bytes(node[1]), chance)).decode()]
    if node[0] == "sound":
        return ["damaged", base64.b64encode(damage(sound.get(name, b""), chance)).decode()]
    return chance.choice((["sound"], ["json", chance.choice(ODD)], ["folder"]))


def without_a_child() -> Any:
    """Loads inside measure themselves by a thread: a process for each execution would take longer than all else."""
    return patch.object(memory, "_start_sampler", memory.ThreadSampler)


def elsewhere(folder: Path) -> Path:
    """A folder with a file in it that lowmem has nothing to do with."""
    place = folder / "elsewhere"
    place.mkdir()
    (place / "held").write_bytes(b"held")
    (place / "state.json").write_bytes(b"{}")
    return place


def check_elsewhere(place: Path) -> None:
    """Nothing there has changed.

    Raises:
        Broken: it has.
    """
    found = {path.name: path.read_bytes() if stat.S_ISREG(path.lstat().st_mode) else b"?" for path in place.iterdir()}
    if found != {"held": b"held", "state.json": b"{}"}:
        raise Broken(f"another folder was changed: {found}")
