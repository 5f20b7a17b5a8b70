"""Planning and mapping cost in proportion to the tensors: calls are counted, so that no clock decides."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lowmem

# What a run may call more or less of, however large the checkpoint is: waiting, waking, hashing that collides.
CONSTANT = 500


def prepare(folder: Path, size: int) -> tuple[Path, nn.Module]:
    """A checkpoint of `size` tensors, of which some share a shape and some are tied, and its module on meta."""
    with torch.device("meta"):
        model = nn.ModuleList(nn.Linear(2 + n % 7, 3, bias=False) for n in range(size))
        for n in range(0, size - 7, 50):
            model[n + 7].weight = model[n].weight
    tied = {f"{n + 7}.weight" for n in range(0, size - 7, 50)}
    path = folder / f"{size}.safetensors"
    save_file({name: torch.zeros(t.shape) for name, t in model.state_dict().items() if name not in tied}, path)
    return path, model


ACTIONS = {
    "inspect": lambda path, model: lowmem.inspect(path),
    "plan": lambda path, model: lowmem.plan(path, model=model),
    "plan a cast with a list": lambda path, model: lowmem.plan(
        path, model=model, dtype="bfloat16", keep_fp32=["3", "*5*"]
    ),
    "plan for disk": lambda path, model: lowmem.plan(path, model=model, device_map={"": "cpu", "1": "disk"}),
    "map": lambda path, model: lowmem.load(path, model=model),
    "copy": lambda path, model: lowmem.load(path, model=model, residency="copy"),
}


def calls_of(action: str, folder: Path, size: int) -> int:
    """How many functions `action` calls in this thread for `size` tensors, those in C included."""
    ACTIONS[action](*prepare(folder, 20))  # what is imported or looked up once
    path, model = prepare(folder, size)
    count = 0

    def see(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        ACTIONS[action](path, model)
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize("action", ACTIONS)
def test_twice_the_tensors_are_at_most_twice_the_calls(action: str, tmp_path: Path) -> None:
    few, many = (calls_of(action, tmp_path, size) for size in (1000, 2000))
    assert many <= 2 * few + CONSTANT


@pytest.mark.parametrize(("action", "most"), [("inspect", 10), ("plan", 70), ("map", 160)])
def test_a_tensor_costs_few_calls(action: str, most: int, tmp_path: Path) -> None:
    """Of Python's functions and C's; 30,000 tensors at 100 calls are a quarter of a second."""
    few, many = (calls_of(action, tmp_path, size) for size in (1000, 2000))
    assert (many - few) / 1000 <= most
