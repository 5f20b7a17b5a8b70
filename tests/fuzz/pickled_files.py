"""Files of torch.save, zip and legacy, beside torch's own reader."""

from __future__ import annotations

import io
import pickle
import random
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

import lowmem

from .damage import NUMBERS, damage
from .equal import check_equal, check_same
from .guard import Broken, Guard, Unwatched
from .opcodes import length_of, mutate_pickle
from .reference import check_pickled
from .targets import Target
from .zips import Record, mutate_zip, read_records, write_records

# Bytes of the pickles that stand before and behind that of a legacy file.
_BEFORE = 3


def saved(value: Any, protocol: int = 2, legacy: bool = False) -> bytes:
    """What torch.save writes, without the padding that only takes room."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(value, buffer, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    if legacy:
        return buffer.getvalue()
    kept = ("data.pkl", "version", "byteorder")
    records = read_records(buffer.getvalue()) or []
    short = [r for r in records if r.name.endswith(tuple(name.encode() for name in kept)) or b"/data/" in r.name]
    return write_records([Record(b"a/" + r.name.partition(b"/")[2], r.data) for r in short])


def _plain() -> dict[str, torch.Tensor]:
    values = torch.arange(1, 25)
    return {
        "a": values.float().reshape(4, 6),
        "b.weight": values.to(torch.bfloat16),
        "b.bias": values[3:7],
        "none": torch.zeros(0, 3),
        "scalar": torch.tensor(True),
    }


def _views() -> dict[str, torch.Tensor]:
    whole = torch.arange(30, dtype=torch.float16)
    return {
        "whole": whole,
        "part": whole[2:20:3],
        "turned": whole.reshape(5, 6).t(),
        "wide": whole[:1].expand(2, 3),
        "f8": whole.to(torch.float8_e4m3fn),
        "u": torch.arange(4).to(torch.uint16),
        "c": torch.ones(2, dtype=torch.complex64),
    }


class _Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(2, 3)
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("lost", torch.zeros(2), persistent=False)


def _wrapped() -> list[Any]:
    weights = OrderedDict((key, value.clone()) for key, value in list(_plain().items())[:3])
    weights._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    averages = {key: value * 2 for key, value in weights.items()}
    arrays = {"x": np.arange(6, dtype="<f4").reshape(2, 3), "y": np.arange(4, dtype=">i2"), "z": np.array(2.5)}
    return [
        {"state_dict": weights, "optimizer_states": [{"state": {0: weights["a"]}}], "epoch": 3, "lr": 1e-3},
        {"model": weights, "model_ema": averages, "args": {"name": "x"}},
        {"module": weights, "dp_world_size": 1, "param_shapes": [{"a": torch.Size([4, 6])}], "ds_version": "0.1"},
        {"params": averages, "best": {0: "x", 1: torch.ones(2)}},
        {"net": [weights, (torch.ones(1),)]},
        torch.nn.Parameter(torch.ones(2, 2)),
        {"p": torch.nn.Parameter(torch.ones(2)), "i": 2**70, "s": {1, 2}, "b": b"bytes", "f": frozenset((1,))},
        arrays,
    ]


def _zip_seeds() -> list[bytes]:
    packed = [
        Record(r.name, r.data, True, descriptor=r.name.endswith(b"0"), zip64=r.name.endswith(b"1"))
        for r in read_records(saved(_plain())) or []
    ]
    return [saved(_plain()), saved(_views(), 4), write_records(packed), saved({"a": torch.ones(2)}, 5), saved({})]


def _legacy_seeds() -> list[bytes]:
    return [saved(value, legacy=True) for value in (_plain(), _views(), *_wrapped()[:2], {})]


def _pickled_seeds() -> list[bytes]:
    wrapped = _wrapped()
    modules = [saved(_Small()), saved({"model": _Small(), "epoch": 1}, 4), saved(_Small(), legacy=True)]
    return [
        *(saved(value, protocol) for value, protocol in zip(wrapped, (2, 4, 2, 5, 2, 2, 4, 2), strict=True)),
        *(saved(wrapped[-1], protocol) for protocol in (3, 5)),
        *modules,
    ]


def _execute(guard: Guard, data: bytes, folder: Path) -> None:
    file = folder / "pytorch_model.bin"
    file.write_bytes(data)
    made = guard.run(lambda: (lowmem.inspect(file), dict(lowmem.stream(file))), size=len(data), read=folder)
    if made is None:
        return
    checkpoint, tensors = made
    check_pickled(file, checkpoint.opened, tensors, checkpoint.unreadable.keys())
    if isinstance(guard, Unwatched) or zlib.crc32(data) % 8 == 0:
        check_converted(guard, file, tensors, len(data))


def check_converted(guard: Guard, source: Path, tensors: dict[str, torch.Tensor], size: int) -> None:
    """Convert it, and see that the reference reader finds the same tensors.

    Raises:
        Broken: it does not.
    """
    out = source.parent / "out"
    report = guard.run(lambda: lowmem.convert(source, out), size=size, read=source.parent, write=out)
    if report is None:
        if (out / "model.safetensors").exists() or list(out.glob("*.index.json")):
            raise Broken("a refused conversion left what looks finished")
        return
    check_equal(dict(lowmem.stream(out)), tensors)
    for file in out.glob("*.safetensors"):
        with safe_open(file, "pt") as written:
            for name in written.keys():  # noqa: SIM118
                problem = check_same(written.get_tensor(name), tensors[name])
                if problem:
                    raise Broken(f"converted {name!r}: {problem}")


def _mutate_record(name: bytes, data: bytes, chance: random.Random) -> bytes:
    if name.endswith(b".pkl"):
        return mutate_pickle(data, chance)
    if name.endswith(b"byteorder"):
        return chance.choice((b"little", b"big", b"", b"middle"))
    return damage(data, chance)


def _mutate_zip(data: bytes, chance: random.Random) -> bytes:
    return mutate_zip(data, chance, _mutate_record)


def _mutate_legacy(data: bytes, chance: random.Random) -> bytes:
    """Its five pickles, and the storages behind: mostly of the fourth, which holds the tensors."""
    parts: list[bytes] = []
    rest = data
    while len(parts) < 5 and (length := length_of(rest)):
        parts.append(rest[:length])
        rest = rest[length:]
    if len(parts) < 5 or chance.random() < 0.03:
        return damage(data, chance)
    kind = chance.randrange(20)
    if kind < 14:
        parts[_BEFORE] = mutate_pickle(parts[_BEFORE], chance)
    elif kind == 14:
        at = chance.randrange(5)
        parts[at] = mutate_pickle(parts[at], chance)
    elif kind == 15:
        parts[4] = mutate_pickle(parts[4], chance)
    elif kind == 16 and rest:
        at = chance.randrange(len(rest))
        rest = rest[:at] + (chance.choice(NUMBERS) % 2**64).to_bytes(8, "little") + rest[at + 8 :]
    elif kind == 17:
        rest = damage(rest, chance)
    elif kind == 18:
        rest += rest[-16:]
    else:
        rest = rest[: chance.randrange(len(rest) + 1)]
    return b"".join(parts) + rest


def _mutate_pickled(data: bytes, chance: random.Random) -> bytes:
    """Only the pickle, or a whole object of another in its place; what is around it stays sound."""
    records = read_records(data)
    if not records:
        return _mutate_legacy(data, chance)
    made = []
    for record in records:
        if record.name.endswith(b"data.pkl"):
            mutate: Callable[[bytes, random.Random], bytes] = _wrap if chance.random() < 0.15 else mutate_pickle
            record = Record(record.name, mutate(record.data, chance), record.deflated)
        made.append(record)
    return write_records(made)


def _wrap(data: bytes, chance: random.Random) -> bytes:
    """The same object inside of another one."""
    name = chance.choice(("state_dict", "model", "module", "optimizer", "ema", "x.y", "", "0", "params_ema"))
    inner = data[2 : length_of(data) - 1] if data[:1] == b"\x80" else data[:-1]
    key = pickle.dumps(name, 2)[2:-1].split(b"q\x00")[0]
    before, after = chance.choice(((b"}" + key, b"s"), (b"](", b"e"), (b"(", b"t")))
    return b"\x80\x02" + before + inner + after + b"."


TARGETS = (
    Target("zip", _zip_seeds, _execute, _mutate_zip),
    Target("legacy", _legacy_seeds, _execute, _mutate_legacy),
    Target("pickled", _pickled_seeds, _execute, _mutate_pickled),
)
