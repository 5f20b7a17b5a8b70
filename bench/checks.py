"""Whether a load gave what the checkpoint holds: bit for bit, and in the memory that the case asks for."""

from __future__ import annotations

import bisect
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from bench.cases import Case, is_layer
from bench.models import Weights

# Elements that are compared at once, so that a check needs little memory.
_CHUNK = 16 * 1024 * 1024


class WrongResultError(Exception):
    """The loaded weights are not the checkpoint's."""


class WrongMemoryError(Exception):
    """The weights are in another kind of memory than the case asks for."""


def check_values(case: Case, source: Path, model: nn.Module | Mapping[str, torch.Tensor]) -> int:
    """Compare every tensor with safetensors, cast where the case casts; returns how many there were.

    Raises:
        WrongResultError: names the first tensor that differs.
    """
    from safetensors import safe_open

    dtype = getattr(torch, case.dtype)
    weights = Weights(model)
    count = 0
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - it is no mapping
                expected = opened.get_tensor(key)
                try:
                    found = weights.find(key)
                except KeyError:
                    raise WrongResultError(f"{key}: not there") from None
                _compare(key, expected, found, dtype)
                count += 1
    return count


def _compare(key: str, expected: torch.Tensor, found: torch.Tensor, dtype: torch.dtype) -> None:
    if found.shape != expected.shape:
        raise WrongResultError(f"{key}: expected shape {tuple(expected.shape)}, found {tuple(found.shape)}")
    if found.dtype != dtype:
        raise WrongResultError(f"{key}: expected {dtype}, found {found.dtype}")
    a, b = expected.reshape(-1), found.reshape(-1)
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    for start in range(0, a.numel(), _CHUNK):
        part = slice(start, start + _CHUNK)
        # As integers: NaN is equal to itself, and 0 is not -0.
        if not torch.equal(a[part].to(dtype).view(bits), b[part].view(bits)):
            raise WrongResultError(f"{key}: values differ")


def check_memory(case: Case, source: Path, model: nn.Module | Mapping[str, torch.Tensor]) -> None:
    """See that a model's weights are pages of files where the case maps, and memory of their own where it copies.

    Raises:
        WrongMemoryError: names the first tensor that is not.
    """
    from safetensors import safe_open

    if not isinstance(model, nn.Module):
        return
    mapped = _file_ranges()
    wanted = case.residency == "map" and not case.casts
    weights = Weights(model)
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - it is no mapping
                tensor = weights.declared(key)
                if tensor.is_meta != (case.on_disk and is_layer(key)):
                    raise WrongMemoryError(f"{key} is {'not loaded' if tensor.is_meta else 'in memory, not on disk'}")
                if tensor.is_meta or not tensor.numel():
                    continue
                is_mapped = _within(tensor.data_ptr(), mapped)
                # With layers on disk either will do too: what matters there is that the layers are.
                if case.on_disk or case.residency == "any":
                    continue
                if wanted and not is_mapped:
                    raise WrongMemoryError(f"it copies: {key} is not pages of a file")
                if is_mapped and not wanted:
                    raise WrongMemoryError(f"it does not copy: {key} stays pages of a file")


def _file_ranges() -> list[tuple[int, int]]:
    """Address ranges of this process that are pages of files, in order; libraries do not matter."""
    found = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        fields = line.split(maxsplit=5)
        # The inode is 0 for anonymous memory.
        if fields[4] != "0" and ".so" not in fields[5]:
            low, high = (int(part, 16) for part in fields[0].split("-"))
            found.append((low, high))
    return found


def _within(address: int, ranges: list[tuple[int, int]]) -> bool:
    index = bisect.bisect_right(ranges, (address, sys.maxsize)) - 1
    return index >= 0 and ranges[index][0] <= address < ranges[index][1]
