"""A device map, in a file for the shell and as Python's dict: each weight goes where the nearest name says."""

from __future__ import annotations

import contextlib
import io
import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

import lowmem
from lowmem.cli import main

from .damage import change, damage
from .guard import Broken, Guard
from .targets import Target

_DEVICES = ("cpu", "disk", "cuda:0", "cuda", 0, 1, "1", "auto", "meta", "CPU", " cpu", "cuda:128", "mps", "cpu:0")


class Net(nn.Module):
    """Names inside names, and names that begin like others."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        self.ab = nn.Linear(2, 2, bias=False)


_NAMES = tuple(Net().state_dict())
_MODULES = ("", "a", "a.0", "a.1", "ab", *_NAMES)


def _seeds() -> list[bytes]:
    maps: list[dict[str, Any]] = [
        {"": "cpu"},
        {"a": "cpu", "ab": "disk"},
        {"a.0": 0, "a.1": "cuda:0", "ab": "cpu"},
        {"": "disk", "a.1.weight": "cpu"},
        {"": "cpu", "a": "disk", "a.0": "cpu", "a.0.bias": "disk"},
    ]
    return [json.dumps(table).encode() for table in maps]


def _execute(guard: Guard, data: bytes, folder: Path) -> None:
    model = folder / "model.safetensors"
    model.write_bytes(save({name: torch.zeros(tensor.shape) for name, tensor in Net().state_dict().items()}))
    file = folder / "map.json"
    file.write_bytes(data)
    words = ["plan", str(model), "--model", f"{__name__}:Net", "--device-map", str(file), "--ram", "1GiB", "--json"]
    said, text = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(said):
        code = guard.run(lambda: main(words), size=len(data), read=folder)
    if code not in (0, 1, 2):
        raise Broken(f"exit code {code}")
    shown = said.getvalue() + text.getvalue()
    if any(c != "\n" and not c.isprintable() for c in shown) or len(shown) > 40_000:
        raise Broken(f"printed raw, or {len(shown)} characters: {shown[:500]!r}")
    if (code and not said.getvalue().strip()) or "Traceback" in shown:
        raise Broken(f"exit code {code} and {said.getvalue()!r}")
    table, twice = _read(data)
    plan = None
    if table is not None:
        options: dict[str, Any] = {"model": Net, "device_map": table, "ram": "1GiB"}
        plan = guard.run(lambda: lowmem.plan(model, **options), size=len(data), read=folder)
    if (plan is None or twice) != (code != 0):
        raise Broken(f"the shell ends with {code} and {said.getvalue()!r}; Python refuses: {plan is None}")
    if plan is not None and table is not None:
        _check_places({p.target: p.device for p in plan.placements}, table)


def _read(data: bytes) -> tuple[Any, bool]:
    """The map, None where there is none; and whether a name stands there twice."""
    twice: list[bool] = []

    def as_table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice.append(len(dict(pairs)) < len(pairs))
        return dict(pairs)

    try:
        table = json.loads(data, object_pairs_hook=as_table)
    except (ValueError, RecursionError):
        return None, False
    return (table if isinstance(table, dict) else None), any(twice)


def _check_places(found: dict[str, str], table: dict[str, Any]) -> None:
    for name in _NAMES:
        names = [key for key in table if key in ("", name) or name.startswith(f"{key}.")]
        if not names:
            raise Broken(f"{name} is nowhere in {table!r}, and is placed")
        said = str(table[max(names, key=len)]).strip()
        said = f"cuda:{said}" if said.isdecimal() else said
        said = {"cuda": "cuda:0", "cpu:0": "cpu", "disk:0": "disk", "mps:0": "mps"}.get(said, said)
        kind, colon, number = said.partition(":")
        said = f"{kind}:{int(number)}" if colon else {"xpu": "xpu:0", "npu": "npu:0"}.get(said, said)
        # Beside a GPU, weights of the CPU compute on that.
        if found[name] != said and (set(found.values()) <= {"cpu", "disk"} or said not in ("cpu", "disk")):
            raise Broken(f"{name} is on {found[name]} by {table!r}")


def _mutate(data: bytes, chance: random.Random) -> bytes:
    try:
        table = json.loads(data)
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict) or chance.random() < 0.15:
        return damage(data, chance)
    for _ in range(chance.choice((1, 1, 2, 3))):
        if chance.random() < 0.6:
            table = {**table, chance.choice(_MODULES): chance.choice(_DEVICES)}
        else:
            table = change(table, chance)
        if not isinstance(table, dict):
            break
    text = json.dumps(table, ensure_ascii=chance.random() < 0.5)
    if chance.random() < 0.05:
        text = "[" * chance.choice((1, 900, 100_000)) + text
    if chance.random() < 0.05 and text.startswith("{") and len(text) > 2:
        text = "{" + (text[1:-1] + ", ") * chance.choice((1, 2000)) + text[1:]
    return text.encode("utf-8", "surrogatepass")[: 1 << 16]


TARGETS = (Target("device-map", _seeds, _execute, _mutate),)
