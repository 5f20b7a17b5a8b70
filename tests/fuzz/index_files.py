"""Index files beside fixed shards, links, a pipe and a folder; the shards beside the reference readers."""

from __future__ import annotations

import functools
import json
import os
import random
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors.torch import load, save

import lowmem

from .damage import NUMBERS, TEXTS, change, damage
from .equal import check_equal
from .guard import Broken, Guard
from .pickled_files import saved
from .targets import Target

_KINDS = {b"s": ("model", "safetensors"), b"b": ("pytorch_model", "bin")}
_HELD = {
    "00001-of-00002": {"a": torch.arange(6.0).reshape(2, 3), "b.c": torch.ones(3, dtype=torch.int64)},
    "00002-of-00002": {"d": torch.zeros(2, dtype=torch.bfloat16)},
    "sub": {"e": torch.tensor(5.0)},
    "stray": {"f": torch.ones(2), "a": torch.zeros(1)},
}


@functools.cache
def _files(kind: bytes) -> dict[str, bytes]:
    """Name → bytes of the shards."""
    stem, suffix = _KINDS[kind]
    write = save if kind == b"s" else saved
    names = {"sub": f"sub/{stem}.{suffix}", "stray": f"other.{suffix}"}
    return {names.get(key, f"{stem}-{key}.{suffix}"): write(held) for key, held in _HELD.items()}


def _names(kind: bytes) -> tuple[str, ...]:
    suffix = _KINDS[kind][1]
    odd = ("pipe", "folder", "link", "outside", "nowhere", "loop", "device")
    return (
        *_files(kind),
        *(f"{name}.{suffix}" for name in odd),
        f"./{next(iter(_files(kind)))}",
        "sub/../x",
        "/dev/zero",
    )


def _seeds() -> list[bytes]:
    made = []
    for kind in _KINDS:
        one, two, sub, _ = _files(kind)
        whole = {"metadata": {"total_size": 52}, "weight_map": {"a": one, "b.c": one, "d": two}}
        for table in (whole, {"weight_map": {"a": one, "b.c": one, "e": sub}}, {"weight_map": {"d": two}}):
            made.append(kind + json.dumps(table).encode())
    return made


def _make(data: bytes, folder: Path) -> tuple[bytes, Path]:
    kind = data[:1] if data[:1] in _KINDS else b"s"
    stem, suffix = _KINDS[kind]
    inside = folder / "model"
    (inside / "sub").mkdir(parents=True)
    (inside / f"folder.{suffix}").mkdir()
    for name, content in _files(kind).items():
        (inside / name).write_bytes(content)
    (folder / f"secret.{suffix}").write_bytes(next(iter(_files(kind).values())))
    os.mkfifo(inside / f"pipe.{suffix}")
    for name, target in (("link", f"{stem}-00001-of-00002.{suffix}"), ("outside", f"../secret.{suffix}")):
        (inside / f"{name}.{suffix}").symlink_to(target)
    for name, target in (("nowhere", "gone"), ("loop", f"loop.{suffix}"), ("device", "/dev/zero")):
        (inside / f"{name}.{suffix}").symlink_to(target)
    (inside / f"{stem}.{suffix}.index.json").write_bytes(data[1:])
    return kind, inside


def _execute(guard: Guard, data: bytes, folder: Path) -> None:
    kind, inside = _make(data, folder)
    made = guard.run(lambda: dict(lowmem.stream(inside)), size=len(data) + 4096, read=inside)
    if made is None:
        return
    table = json.loads(data[1:])
    wanted: dict[str, torch.Tensor] = {}
    listed = table["weight_map"]
    for name in {str(PurePath(name)) for name in listed.values()}:
        raw = (inside / name).read_bytes()
        held = load(raw) if kind == b"s" else torch.load(inside / name, weights_only=True)
        for key, tensor in held.items():
            if key in wanted:
                raise Broken(f"{key!r} is in two shards, and one of them was taken")
            wanted[key] = tensor
    if not listed.keys() <= wanted.keys():
        raise Broken(f"{sorted(listed.keys() - wanted.keys())[:4]!r} are in no shard, and it was loaded")
    check_equal(made, wanted)


def _mutate(data: bytes, chance: random.Random) -> bytes:
    kind = data[:1] if data[:1] in _KINDS and chance.random() < 0.95 else chance.choice(list(_KINDS))
    try:
        table = json.loads(data[1:])
    except (ValueError, RecursionError):
        return damage(data, chance)
    if chance.random() < 0.05:
        return kind + damage(data[1:], chance)
    for _ in range(chance.choice((1, 1, 2, 3))):
        held = table.get("weight_map") if isinstance(table, dict) else None
        if not isinstance(held, dict) or not held or chance.random() < 0.2:
            table = change(table, chance)
        else:
            table = {**table, "weight_map": _remapped(held, kind, chance)}
    text = json.dumps(table, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")
    return kind + text


def _remapped(held: dict[str, Any], kind: bytes, chance: random.Random) -> dict[str, Any]:
    made = dict(held)
    keys = list(made)
    keys_known = [key for tensors in _HELD.values() for key in tensors]
    names = _names(kind)
    way = chance.randrange(6)
    if way == 0:
        del made[chance.choice(keys)]
    elif way == 1:
        made[chance.choice((*keys_known, *TEXTS))] = chance.choice(names)
    elif way == 2:
        made[chance.choice(keys)] = chance.choice((*names, *TEXTS, *NUMBERS[:4]))
    elif way == 3:
        key = chance.choice(keys)
        made[key] = chance.choice((f"./{made[key]}", f"{made[key]}/", f"sub/../{made[key]}", str(made[key]).upper()))
    elif way == 4:
        # All of one shard, as it is.
        name, tensors = chance.choice(list(zip(_files(kind), _HELD.values(), strict=True)))
        made.update(dict.fromkeys(tensors, name))
    else:
        made = {key: made[key] for key in chance.sample(keys, len(keys))}
    return made


TARGETS = (Target("index", _seeds, _execute, _mutate),)
