"""Whether a rank holds what torch would give it of the checkpoint, compared in pieces of a few MiB."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from bench.checks import WrongResultError
from lowmem.sizes import MIB

_INDEX = "model.safetensors.index.json"


def check(model: Any, folder: Path, dtype: str) -> dict[str, int]:
    """How many tensors are `equal` to the checkpoint's, and the bytes `held` of them on this rank.

    Raises:
        WrongResultError: a tensor is not what it should be, or has no values.
    """
    where: dict[str, str] = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
    held = 0
    named = dict(model.named_parameters(remove_duplicate=False))
    if missing := sorted(named.keys() ^ where.keys()):
        raise WrongResultError(f"{missing[0]}: in the model or the checkpoint only")
    for name, tensor in named.items():
        with safe_open(folder / where[name], framework="pt") as file:
            held += _check_one(name, tensor.detach(), file.get_slice(name), getattr(torch, dtype))
    rotary = type(model.model.rotary_emb)(config=model.config)
    for name, buffer in rotary.named_buffers():
        if not torch.equal(getattr(model.model.rotary_emb, name), buffer):
            raise WrongResultError(f"{name}: not the table that the config gives")
    return {"equal": len(named), "held": held}


def _check_one(name: str, tensor: torch.Tensor, source: Any, dtype: torch.dtype) -> int:
    shape = tuple(source.get_shape())
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise WrongResultError(f"{name}: {tensor.dtype} {tuple(tensor.shape)}, wanted {dtype} {shape}")
    local, start = tensor, (0,) * len(shape)
    if isinstance(tensor, DTensor):
        wanted, start = compute_local_shape_and_global_offset(shape, tensor.device_mesh, tensor.placements)
        local = tensor.to_local()
        if tuple(local.shape) != tuple(wanted):
            raise WrongResultError(f"{name}: a part of {tuple(local.shape)}, wanted {tuple(wanted)}")
    if local.is_meta:
        raise WrongResultError(f"{name}: no values")
    for first, last in _pieces(local):
        rows = slice(start[0] + first, start[0] + last)
        rest = [slice(at, at + size) for at, size in zip(start[1:], local.shape[1:], strict=True)]
        if not torch.equal(local[first:last], source[(rows, *rest)].to(dtype)):
            raise WrongResultError(f"{name}: other values in rows {rows.start} to {rows.stop}")
    return local.nbytes


def _pieces(tensor: torch.Tensor) -> Iterator[tuple[int, int]]:
    """First and last row of pieces of at most 4 MiB, or of one row."""
    count = tensor.shape[0]
    step = max(1, 4 * MIB * count // max(1, tensor.nbytes))
    for first in range(0, count, step):
        yield first, min(count, first + step)
