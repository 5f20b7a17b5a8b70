"""A model as LLaVA names its modules, small, and its files: an LLM, a tower and a projector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn


class Tower(nn.Module):
    def __init__(self, depth: int = 3, width: int = 12, grid: int = 4) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, width))
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.register_buffer("scale", torch.full((1,), 3.0), persistent=False)


class Llava(nn.Module):
    """`model.layers`, `model.vision_tower`, `model.mm_projector`, `lm_head`: as LLaVA names them."""

    def __init__(self, depth: int = 3, listed: bool = False, delayed: bool = False) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(20, 8)
        self.model.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        tower: Any = None if delayed else Tower(depth)
        self.model.vision_tower = [tower] if listed and not delayed else [] if listed else tower
        self.model.mm_projector = nn.Sequential(nn.Linear(12, 8), nn.GELU(), nn.Linear(8, 8))
        self.lm_head = nn.Linear(8, 20, bias=False)


def random_state(module: nn.Module, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(v.shape, generator=generator).to(dtype) for k, v in module.state_dict().items()}


def write_files(tmp_path: Path) -> dict[str, Any]:
    """An LLM whose shards hold an older tower, in bf16; the tower's own file in fp16; a projector in fp32."""
    llm = random_state(Llava(), 0, torch.bfloat16)
    (tmp_path / "llm").mkdir()
    llm = {key: value for key, value in llm.items() if "mm_projector" not in key}
    torch.save(llm, tmp_path / "llm" / "pytorch_model.bin")
    tower = random_state(Tower(), 1, torch.float16)
    torch.save({"model": tower, "epoch": 3}, tmp_path / "tower.pth")
    projector = random_state(Llava().model.mm_projector, 2)
    beside = {"model.mm_projector_old.0.weight": torch.ones(8, 12)}
    torch.save({f"model.mm_projector.{k}": v for k, v in projector.items()} | beside, tmp_path / "mm_projector.bin")
    return {"folder": tmp_path, "llm": llm, "tower": tower, "projector": projector}


def sources(files: dict[str, Any], **more: Any) -> dict[str, Any]:
    folder = files["folder"]
    return {
        "": folder / "llm",
        "model.vision_tower": folder / "tower.pth",
        "model.mm_projector": folder / "mm_projector.bin",
    } | more


def expected(files: dict[str, Any]) -> dict[str, torch.Tensor]:
    state = {key: value for key, value in files["llm"].items() if "vision_tower" not in key}
    state |= {f"model.vision_tower.{key}": value for key, value in files["tower"].items()}
    return state | {f"model.mm_projector.{key}": value for key, value in files["projector"].items()}


def check(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    for key, value in state.items():
        assert loaded[key].dtype == value.dtype, key
        assert torch.equal(loaded[key], value), key
