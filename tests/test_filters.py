"""Functions of a state dict: what becomes of what they rename, move, compute, leave out and ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F  # noqa: N812

import lowmem


class Model(nn.Module):
    def __init__(self, grid: int = 4, width: int = 8) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, 5)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "model.safetensors"
    save_file(
        {
            "pos": torch.randn(1, 10, 8),
            "qkv.weight": torch.randn(24, 8),
            "qkv.bias": torch.randn(24),
            "proj": torch.randn(8, 5),
            "logit_scale": torch.randn(()),
        },
        path,
    )
    return path


def resized(pos: torch.Tensor, model: nn.Module) -> torch.Tensor:
    new = int((model.pos_embed.shape[1] - 1) ** 0.5)
    grid = pos[:, 1:].float().reshape(1, 3, 3, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True)
    return torch.cat([pos[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2).to(pos.dtype)], dim=1)


def convert(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    found = {}
    for key, value in state.items():
        if key.startswith("qkv"):
            kind = key.removeprefix("qkv")
            found[f"q{kind}"], found[f"kv{kind}"] = value[:8], value[8:]
        elif key == "pos":
            found["pos_embed"] = resized(value, model)
        elif key == "proj":
            found["head.weight"] = value.T
            found["head.bias"] = torch.zeros(value.shape[1])
    return found


@pytest.mark.parametrize("residency", ["map", "copy"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_a_filter_gives_what_it_gives_on_values(file: Path, residency: str, stored: torch.dtype, dtype: str) -> None:
    state = {key: value.to(stored) for key, value in load_file(file).items()}
    save_file(state, file)
    model = Model()
    result = lowmem.load(file, model=model, filter_fn=convert, residency=residency, dtype=dtype)
    expected = {key: value.clone() for key, value in convert(state, Model()).items()}
    loaded = model.state_dict()
    assert loaded.keys() == expected.keys()
    for key, value in expected.items():
        final = value.dtype if dtype == "auto" else getattr(torch, dtype)
        assert torch.equal(loaded[key], value.to(final)), key
        assert loaded[key].dtype == final
    assert [group.what for group in result.plan.groups] == ["filter_fn convert"] * 2
    assert any("1 tensors are left out ('logit_scale')" in line for line in result.plan.warnings)
