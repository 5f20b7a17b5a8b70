"""The folder of a conversion that somebody began: the second run makes what an undisturbed one makes, or refuses."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import save

import lowmem
from lowmem.engine.conversion_folder import HIDDEN, ConversionFolder

from . import scenes
from .guard import Broken, Guard
from .targets import Target

_WEIGHTS = {"a": torch.arange(600.0), "b": torch.arange(12.0).reshape(3, 4) - 6}
_TIME = 1_600_000_000_000_000_000
_FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
# Folder of the executions → what an undisturbed conversion makes there, and what waits in the hidden folder before.
_known: dict[Path, tuple[dict[str, bytes], dict[str, bytes]]] = {}


class _EndedError(Exception):
    """What ends a conversion when all its files are whole."""


def _seeds() -> list[bytes]:
    names = [f"{HIDDEN}/{name}" for name in (*_FILES, *(f"{name}.json" for name in _FILES), "state.json")]
    sound: dict[str, list[object]] = {name: ["sound"] for name in names}
    record = {"fingerprint": "$fingerprint", "size": 1, "mtime_ns": "$time"}
    pieces = (["$head1", [1288, 1200, 0]], ["$head2", [88, 24, 0]])
    state = {"format": "$format", "fingerprint": "$fingerprint", "source": "model"}
    return [
        scenes.encode(sound),
        scenes.encode({name: sound[name] for name in names if _FILES[1] not in name}),
        scenes.encode({**sound, f"{HIDDEN}/{_FILES[1]}": ["damaged", ""], f"{HIDDEN}/x.partial": ["damaged", ""]}),
        scenes.encode({**sound, f"{HIDDEN}/state.json": ["json", state]}),
        scenes.encode(
            {
                **sound,
                f"{HIDDEN}/{_FILES[0]}.json": ["json", {**record, "pieces": "$pieces1"}],
                f"{HIDDEN}/{_FILES[1]}.json": ["json", {**record, "pieces": "$pieces2"}],
            }
        ),
        scenes.encode({**sound, f"{HIDDEN}/{_FILES[0]}.json": ["json", {**record, "pieces": pieces[0]}]}),
        scenes.encode({**sound, _FILES[0]: ["sound"], "config.json": ["json", {"dtype": "bfloat16"}]}),
        scenes.encode({}),
    ]


def _execute(guard: Guard, data: bytes, folder: Path) -> None:
    if folder not in _known:
        _known[folder] = _first(folder)
    wanted, waiting = _known[folder]
    records = [json.loads(waiting[f"{name}.json"]) for name in _FILES]
    known = {
        "$time": _TIME,
        "$elsewhere": str(scenes.elsewhere(folder)),
        "$pieces1": records[0]["pieces"],
        "$pieces2": records[1]["pieces"],
        "$head1": records[0]["pieces"][0],
        "$head2": records[1]["pieces"][0],
        **{f"${key}": value for key, value in json.loads(waiting["state.json"]).items() if key != "source"},
    }
    sound = {f"{HIDDEN}/{name}": text for name, text in waiting.items()} | {name: wanted[name] for name in _FILES}
    (folder / "to").mkdir(exist_ok=True)
    files = scenes.decode(data)
    if files is None:
        # No scene: the record of the first file.
        files = {name: ["sound"] for name in sound if name.startswith(HIDDEN)}
        (folder / "to" / "out" / HIDDEN).mkdir(parents=True)
        (folder / "to" / "out" / HIDDEN / f"{_FILES[0]}.json").write_bytes(data)
    scenes.make(files, folder / "to" / "out", sound, known, _TIME)
    model = _model(folder)
    made = guard.run(lambda: _convert(model, folder / "to" / "out"), size=len(data), read=model, write=folder / "to")
    scenes.check_elsewhere(folder / "elsewhere")
    if made is not None:
        _check_same(folder / "to" / "out", wanted)


def _check_same(out: Path, wanted: dict[str, bytes]) -> None:
    inside = list(out.iterdir())
    hidden = out / HIDDEN
    if hidden.is_dir() and not hidden.is_symlink() and any(path.is_dir() for path in hidden.iterdir()):
        # A folder that someone else made in it stays, and so does the one around it.
        inside.remove(hidden)
    links = [path.name for path in inside if path.is_symlink() or not path.is_file()]
    if links:
        raise Broken(f"links or folders in what was made: {links}")
    found = {path.name: path.read_bytes() for path in inside}
    if found != wanted:
        names = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise Broken(f"other than what an undisturbed conversion makes: {names}")


def _first(folder: Path) -> tuple[dict[str, bytes], dict[str, bytes]]:
    model = _model(folder)
    _convert(model, folder / "whole")
    whole = {path.name: path.read_bytes() for path in (folder / "whole").iterdir()}
    try:
        with patch.object(ConversionFolder, "publish", side_effect=_EndedError):
            _convert(model, folder / "to" / "out")
    except _EndedError:
        pass
    waiting = {path.name: path.read_bytes() for path in (folder / "to" / "out" / HIDDEN).iterdir()}
    for name in _FILES:
        record = json.loads(waiting[f"{name}.json"])
        waiting[f"{name}.json"] = json.dumps({**record, "mtime_ns": _TIME}, separators=(",", ":")).encode()
    for path in (folder / "to" / "out" / HIDDEN).iterdir():
        path.unlink()
    (folder / "to" / "out" / HIDDEN).rmdir()
    return whole, waiting


def _model(folder: Path) -> Path:
    model = folder / "model"
    if not model.exists():
        model.mkdir()
        (model / "model.safetensors").write_bytes(save(_WEIGHTS))
        (model / "config.json").write_text('{"dtype": "float32"}')
        (model / "vocab.txt").write_text("a\n")
    os.utime(model / "model.safetensors", ns=(_TIME, _TIME))
    return model


def _convert(source: Path, out: Path) -> object:
    return lowmem.convert(source, out, dtype="bfloat16", max_shard_size="1KiB", staging="1MiB")


def _mutate(data: bytes, chance: random.Random) -> bytes:
    if not _known:
        return scenes.mutate(data, chance, {})
    wanted, waiting = next(iter(_known.values()))
    return scenes.mutate(data, chance, {f"{HIDDEN}/{name}": text for name, text in waiting.items()} | wanted)


TARGETS = (Target("conversion", _seeds, _execute, _mutate),)
