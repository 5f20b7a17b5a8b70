"""Whether a load gave what the checkpoint holds: bit for bit, and in the memory that the case asks for."""

from __future__ import annotations

import bisect
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from bench.cases import BESIDE_INT8, Case, becomes_int8, is_layer
from bench.models import Weights

# Elements that are compared at once, so that a check needs little memory.
_CHUNK = 16 * 1024 * 1024


class WrongResultError(Exception):
    """The loaded weights are not the checkpoint's."""


class WrongMemoryError(Exception):
    """The weights are in another kind of memory than the case asks for."""


def check_values(case: Case, source: Path, model: nn.Module | Mapping[str, torch.Tensor]) -> int:
    """Compare every tensor with safetensors, cast where the case casts; returns how many there were.

    int8 and floats are made of one another by bitsandbytes itself.

    Raises:
        WrongResultError: names the first tensor that differs.
    """
    from safetensors import safe_open

    weights = Weights(model)
    count = 0
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - it is no mapping
                for name, expected, dtype in _expected(case, source, key, opened.get_tensor(key)):
                    try:
                        found = weights.find(name)
                    except KeyError:
                        raise WrongResultError(f"{name}: not there") from None
                    _compare(name, expected, found, dtype)
                    count += 1
    return count


_Expected = tuple[str, torch.Tensor, torch.dtype]


def _expected(case: Case, source: Path, key: str, stored: torch.Tensor) -> Iterator[_Expected]:
    """Names that a tensor of the checkpoint has in the model, with the values there, yet to be cast to the dtype."""
    floats = getattr(torch, case.float_dtype)
    if not case.is_int8:
        yield key, stored, floats
    elif key.endswith(BESIDE_INT8):
        # How int8 lies is no value.
        if case.dtype == "int8" and key.endswith(".SCB"):
            yield key, stored, torch.float32
    elif case.dtype == case.stored or not becomes_int8(key):
        yield key, stored, stored.dtype if becomes_int8(key) else floats
    else:
        import bitsandbytes.functional as by_rows

        scales = key.removesuffix("weight") + "SCB"
        if case.dtype == "int8":
            values, largest, _ = by_rows.int8_vectorwise_quant(stored.half())
            yield key, values, torch.int8
            yield scales, largest, torch.float32
        else:
            yield key, by_rows.int8_vectorwise_dequant(stored, _read(source, scales)), floats


def _read(source: Path, key: str) -> torch.Tensor:
    """A tensor of a checkpoint, in whichever file it is."""
    from safetensors import safe_open

    import lowmem

    with safe_open(lowmem.inspect(source)[key].file, framework="pt") as opened:
        found: torch.Tensor = opened.get_tensor(key)
    return found


def _compare(key: str, expected: torch.Tensor, found: torch.Tensor, dtype: torch.dtype) -> None:
    if found.shape != expected.shape:
        raise WrongResultError(f"{key}: expected shape {tuple(expected.shape)}, found {tuple(found.shape)}")
    if found.dtype != dtype:
        raise WrongResultError(f"{key}: expected {dtype}, found {found.dtype}")
    a, b = expected.reshape(-1), found.reshape(-1)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
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

    from lowmem.offload.weights import MappedParameter, OffloadedParameter

    if not isinstance(model, nn.Module):
        return
    mapped = _file_ranges()
    wanted = case.residency == "map" and not case.casts
    weights = Weights(model)
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - it is no mapping
                if case.is_int8 and key.endswith(BESIDE_INT8):
                    continue
                tensor = weights.declared(key)
                away = tensor.is_meta or isinstance(tensor, (MappedParameter, OffloadedParameter))
                if away != (case.on_disk and is_layer(key)):
                    raise WrongMemoryError(f"{key} is {'not loaded' if away else 'in memory, not on disk'}")
                if away or not tensor.numel():
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
