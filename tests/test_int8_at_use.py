"""int8 entries of a checkpoint on disk that become floats whenever they are used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lowmem.checkpoint import inspect
from lowmem.int8 import dequantise, work_size
from lowmem.mapping import Link, Region
from lowmem.mapping.records import whole
from lowmem.offload import MappedWeights, offload_index
from lowmem.planner import Placement


def link_of(link: Link, scales: Any) -> Link:
    """A link whose int8 entry becomes floats."""
    return replace(link, scales=scales)


def float_of(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    found = torch.empty(values.shape, dtype=dtype)
    dequantise(values, scales, found, torch.empty(work_size(values.shape[1]), dtype=torch.uint8))
    return found


def mapped_floats(
    folder: Path, tensors: dict[str, torch.Tensor], shape: tuple[int, ...], dtype: str, regions: Any
) -> Any:
    """A weight that is made of int8 entries, key → region, at use."""
    save_file(tensors, folder / "model.safetensors")
    checkpoint = inspect(folder)
    links = tuple(
        link_of(Link(checkpoint[key], "w", region, whole=True), checkpoint[f"{key}.SCB"])
        for key, region in regions.items()
    )
    placement = Placement("w", ("w",), shape, dtype, 0, "disk", "refer", links)
    plan: Any = SimpleNamespace(placements=[placement], checkpoint=checkpoint)
    assert offload_index(plan) == {}
    return MappedWeights({}, {"w": placement}, plan)["w"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", [(5, 7), (1, 3), (300, 256), (2, 70000), (0, 4), (4, 0)])
def test_int8_on_disk_becomes_floats_at_use(tmp_path: Path, shape: tuple[int, int], dtype: str) -> None:
    values = torch.randint(-127, 128, shape, dtype=torch.int8)
    scales = torch.rand(shape[0])
    found = mapped_floats(tmp_path, {"k": values, "k.SCB": scales}, shape, dtype, {"k": whole(shape)})
    wanted = float_of(values, scales, getattr(torch, dtype))
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)


REGIONS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "one behind the other": lambda whole, n: whole.view(3, 6, 4)[n],
    "beside each other": lambda whole, n: whole.view(6, 12)[:, 4 * n : 4 * n + 4],
    "transposed": lambda whole, n: whole.view(3, 4, 6)[n].t(),
    "of another shape": lambda whole, n: whole.view(2, 3, 12)[:, :, 4 * n : 4 * n + 4],
}


@pytest.mark.parametrize("how", REGIONS)
def test_a_weight_of_several_int8_entries_is_put_together_at_use(tmp_path: Path, how: str) -> None:
    wanted = torch.empty(72, dtype=torch.bfloat16)
    tensors, regions = {}, {}
    for n in range(3):
        values, scales = torch.randint(-127, 128, (6, 4), dtype=torch.int8), torch.rand(6)
        tensors |= {f"k{n}": values, f"k{n}.SCB": scales}
        place = REGIONS[how](wanted, n)
        place.copy_(float_of(values, scales, torch.bfloat16).reshape(place.shape))
        regions[f"k{n}"] = Region(place.storage_offset(), tuple(place.shape), place.stride())
    found = mapped_floats(tmp_path, tensors, (72,), "bfloat16", regions)
    assert torch.equal(found, wanted)
