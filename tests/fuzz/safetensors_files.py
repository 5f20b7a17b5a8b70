"""One safetensors file, beside the reference reader's."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

import lowmem

from .damage import TEXTS, change, damage
from .equal import check_equal
from .guard import Broken, Guard
from .targets import Target


def _seeds() -> list[bytes]:
    values = torch.arange(12).reshape(3, 4)
    kinds = (torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64)
    return [
        save({"a": values.float()}),
        save({}),
        save({str(kind): values.to(kind) for kind in kinds}, {"format": "pt"}),
        save({"scalar": torch.tensor(1.0), "none": torch.zeros(0, 3), "x.y": torch.ones(5)}, {"z": "x.y"}),
    ]


def _execute(guard: Guard, data: bytes, folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(data)
    made = guard.run(lambda: dict(lowmem.stream(file)), size=len(data), read=folder)
    if made is None:
        return
    try:
        with safe_open(file, "pt") as reference:
            wanted = {name: reference.get_tensor(name) for name in reference.keys()}  # noqa: SIM118
            shared = reference.metadata() or {}
    except (SafetensorError, RuntimeError, OSError, ValueError, KeyError, AttributeError) as error:
        raise Broken(f"read, and the reference reader refuses it: {error}") from error
    # What `save_model` left out, as `load_model` gives it again.
    aliases = {name: held for name, held in shared.items() if held in wanted and name not in (*wanted, "format")}
    wanted.update({name: wanted[held] for name, held in aliases.items()})
    check_equal(made, wanted)


def _mutate(data: bytes, chance: random.Random) -> bytes:
    if chance.random() < 0.1:
        return damage(data, chance)
    length = int.from_bytes(data[:8], "little")
    try:
        table = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError):
        return damage(data, chance)
    body = data[8 + length :]
    if not isinstance(table, dict):
        table = {}
    for _ in range(chance.choice((1, 1, 2, 3))):
        table = _changed(table, chance)
    # Most are made to fit again: what else was changed is then what is looked at.
    if chance.random() < 0.85:
        body = _relaid(table, body)
    if chance.random() < 0.15:
        table = change(table, chance)
    if chance.random() < 0.05:
        body = damage(body, chance)
    return _file(table, body, chance)


def _file(table: Any, body: bytes, chance: random.Random) -> bytes:
    spaced = chance.random() < 0.2
    written = json.dumps(table, ensure_ascii=chance.random() < 0.5, indent=chance.choice((None, 0)) if spaced else None)
    text = written.encode("utf-8", "surrogatepass")
    if chance.random() < 0.3:
        text += b" " * (-len(text) % 8)
    if chance.random() < 0.05:
        text = damage(text, chance)
    claimed = len(text) if chance.random() < 0.97 else chance.choice((0, len(text) + 1, 2**63, 2**64 - 1))
    return claimed.to_bytes(8, "little") + text + body


def _changed(table: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """Another sound header, but for its offsets: tensors more, fewer, renamed, of other kinds and shapes, reordered."""
    made = {key: dict(info) if isinstance(info, dict) else info for key, info in table.items()}
    names = [key for key, info in made.items() if key != "__metadata__" and isinstance(info, dict) and "dtype" in info]
    kind = chance.randrange(7)
    if not names or kind == 0:
        made[_name(names, chance)] = {
            "dtype": chance.choice(tuple(_BITS)),
            "shape": _shape(chance),
            "data_offsets": [0, 0],
        }
    elif kind == 1:
        made[chance.choice(names)]["dtype"] = chance.choice(tuple(_BITS))
    elif kind == 2:
        made[chance.choice(names)]["shape"] = _shape(chance)
    elif kind == 3:
        old, new = chance.choice(names), _name(names, chance)
        made = {(new if key == old else key): info for key, info in made.items()}
    elif kind == 4:
        held = made.get("__metadata__")
        shared = dict(held) if isinstance(held, dict) else {}
        shared[_name(names, chance)] = chance.choice((*names, "pt", *TEXTS))
        made["__metadata__"] = shared
    elif kind == 5:
        order = list(made)
        chance.shuffle(order)
        made = {key: made[key] for key in order}
    elif len(names) > 1:
        del made[chance.choice(names)]
    return made


def _name(names: list[str], chance: random.Random) -> str:
    return chance.choice((*names, f"{chance.choice((*names, 'x'))}.{chance.randrange(3)}", *TEXTS))


def _shape(chance: random.Random) -> list[int]:
    return [chance.choice((0, 1, 1, 2, 2, 3, 4, 6, 8, 16)) for _ in range(chance.choice((0, 1, 1, 2, 2, 3, 4, 9)))]


_BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "C64": 64,
    "BOOL": 8,
    "BF16": 16,
    **{f"{kind}{bits}": bits for kind in "IUF" for bits in (16, 32, 64)},
    **dict.fromkeys(("I8", "U8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
}


def _relaid(table: dict[str, Any], body: bytes) -> bytes:
    """Offsets that fit dtypes and shapes again, and a body as long as they say."""
    at = 0
    for info in table.values():
        if not isinstance(info, dict) or not isinstance(info.get("shape"), list):
            continue
        bits = _BITS.get(info["dtype"]) if isinstance(info.get("dtype"), str) else None
        if bits is None or not all(type(n) is int and n >= 0 for n in info["shape"]):
            continue
        nbytes = math.prod(info["shape"]) * bits // 8
        if at + nbytes < 1 << 13:
            info["data_offsets"] = [at, at + nbytes]
            at += nbytes
    return (body + bytes(range(1, 98)) * (at // 97 + 1))[:at]


TARGETS = (Target("safetensors", _seeds, _execute, _mutate),)
