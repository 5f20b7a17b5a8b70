"""An offload folder that is there before the load: the model gives what the checkpoint says, whatever lies in it."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import nn

import lowmem
from lowmem.planner.offload import INDEX, boot_id

from . import scenes
from .equal import check_equal
from .guard import Guard
from .targets import Target

_WEIGHTS = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([0.5, -2.0])}
_CAST = {name: tensor.bfloat16() for name, tensor in _WEIGHTS.items()}
_TIME = 1_600_000_000_000_000_000
_DATA = "$folder/offload-00001-of-00001.safetensors"
_INDEX = f"$folder/{INDEX}"
# Folder of the executions → fingerprint and bytes of the file there; the fingerprint is also of the source's path.
_known: dict[Path, tuple[str, bytes]] = {}


def _seeds() -> list[bytes]:
    index = {
        "format": "lowmem-offload/2",
        "boot": None,
        "source": "model",
        "fingerprint": "$fingerprint",
        "files": {"offload-00001-of-00001.safetensors": 190},
        "mtimes": {"offload-00001-of-00001.safetensors": "$time"},
        "tensors": dict.fromkeys(_WEIGHTS, "offload-00001-of-00001.safetensors"),
    }
    sound = {_DATA: ["sound"], _INDEX: ["json", index]}
    return [
        scenes.encode(sound),
        scenes.encode({**sound, _INDEX: ["json", {**index, "boot": "$boot"}]}),
        scenes.encode({"$folder": ["link", "$elsewhere"]}),
        scenes.encode({".$folder-1-0123abcd.tmp": ["folder"], **sound}),
    ]


def _execute(guard: Guard, data: bytes, folder: Path) -> None:
    if folder not in _known:
        _known[folder] = _first(folder)
    fingerprint, held = _known[folder]
    known = {
        "$folder": fingerprint[:16],
        "$fingerprint": fingerprint,
        "$time": _TIME,
        "$boot": boot_id(),
        "$elsewhere": str(scenes.elsewhere(folder)),
    }
    files = scenes.decode(data)
    if files is None:
        # No scene: an index.
        (folder / "off" / fingerprint[:16]).mkdir(parents=True)
        (folder / "off" / fingerprint[:16] / INDEX).write_bytes(data)
        files = {_DATA: ["sound"]}
    scenes.make(files, folder / "off", {_DATA: held}, known, _TIME)
    believed = any(node[0] == "damaged" for node in files.values())
    model = _model(folder)
    made = guard.run(lambda: _load(model, folder / "off"), size=len(data), read=model, write=folder / "off")
    scenes.check_elsewhere(folder / "elsewhere")
    if made is None:
        return
    there = (folder / "off" / fingerprint[:16] / "offload-00001-of-00001.safetensors").read_bytes()
    begin = 8 + int.from_bytes(held[:8], "little")
    if believed and (len(there), there[:begin]) == (len(held), held[:begin]):
        # A tensor's bytes are believed where size, time and header are as they were written: SECURITY.md.
        return
    check_equal({"y": made}, {"y": _forward(_CAST)})
    check_equal(load(there), _CAST)


def _first(folder: Path) -> tuple[str, bytes]:
    model = _model(folder)
    _load(model, folder / "first")
    (place,) = (folder / "first").iterdir()
    index = json.loads((place / INDEX).read_text(encoding="utf-8"))
    (name,) = index["files"]
    return index["fingerprint"], (place / name).read_bytes()


def _model(folder: Path) -> Path:
    model = folder / "model"
    if not model.exists():
        model.mkdir()
        (model / "model.safetensors").write_bytes(save(_WEIGHTS))
    os.utime(model / "model.safetensors", ns=(_TIME, _TIME))
    return model


def _load(source: Path, off: Path) -> torch.Tensor:
    with scenes.without_a_child():
        return _loaded(source, off)


def _loaded(source: Path, off: Path) -> torch.Tensor:
    result = lowmem.load(
        source, model=lambda: nn.Linear(3, 2), dtype="bfloat16", device_map={"": "disk"}, offload_folder=off, ram="1GiB"
    )
    # A graph would keep the weights, and with them the files that they are pages of.
    with torch.no_grad():
        made: torch.Tensor = result.model(_inputs())
    return made


def _inputs() -> torch.Tensor:
    return torch.eye(3).bfloat16()


def _forward(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return nn.functional.linear(_inputs(), weights["weight"], weights["bias"])


def _mutate(data: bytes, chance: random.Random) -> bytes:
    # The bytes are the same wherever the folder of the executions is.
    held = next(iter(_known.values()))[1] if _known else b""
    return scenes.mutate(data, chance, {_DATA: held})


TARGETS = (Target("offload-folder", _seeds, _execute, _mutate),)
