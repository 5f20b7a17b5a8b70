"""One safetensors file, beside the reference reader's."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

import lowmem

from .damage import change, damage
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
    wanted.update({name: wanted[held] for name, held in shared.items() if held in wanted and name not in wanted})
    check_equal(made, wanted)


def _mutate(data: bytes, chance: random.Random) -> bytes:
    if chance.random() < 0.3:
        return damage(data, chance)
    length = int.from_bytes(data[:8], "little")
    try:
        table = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError):
        return damage(data, chance)
    body = data[8 + length :]
    for _ in range(chance.choice((1, 1, 2, 3))):
        table = change(table, chance)
        if isinstance(table, dict) and chance.random() < 0.5:
            body = _relaid(table, body)
    if chance.random() < 0.2:
        body = damage(body, chance)
    text = json.dumps(table, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")
    if chance.random() < 0.1:
        text = damage(text, chance)
    claimed = len(text) if chance.random() < 0.95 else chance.choice((0, len(text) + 1, 2**63, 2**64 - 1))
    return claimed.to_bytes(8, "little") + text + body


def _relaid(table: dict[str, object], body: bytes) -> bytes:
    """Offsets that fit dtypes and shapes again, so that what else was changed is what is looked at."""
    at = 0
    for info in table.values():
        if not isinstance(info, dict) or not isinstance(info.get("shape"), list):
            continue
        try:
            count = 1
            for n in info["shape"]:
                count *= n
            bits = int("".join(c for c in str(info["dtype"])[1:3] if c.isdigit()) or 8)
            nbytes = count * bits // 8
            if 0 <= nbytes < 1 << 16:
                info["data_offsets"] = [at, at + nbytes]
                at += nbytes
        except (TypeError, KeyError, ValueError):
            continue
    return (body + bytes(at))[:at]


TARGETS = (Target("safetensors", _seeds, _execute, _mutate),)
