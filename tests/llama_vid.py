"""A model as LLaMA-VID has it, its files, and the state that its own code would give it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.vision.model import interpolated

Sizes = dict[str, int]
TINY: Sizes = {"width": 64, "layers": 4, "words": 128, "tower": 48, "depth": 5}


class Block(nn.Module):
    """Of EVA's tower, whose attention has biases for queries and values only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = nn.Module()
        self.attn.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn.q_bias = nn.Parameter(torch.zeros(width))
        self.attn.v_bias = nn.Parameter(torch.zeros(width))
        self.attn.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


class EvaTower(nn.Module):
    """One block less than the file has, for an image of `grid` x `grid` patches."""

    def __init__(self, width: int, depth: int, grid: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, 14, 14)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))


def make_model(sizes: Sizes = TINY) -> nn.Module:
    """`LlavaLlamaAttForCausalLM` as it is before `load_model`: a tower that comes later, in a list."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, tower = sizes["width"], sizes["tower"]
    config = LlamaConfig(
        vocab_size=sizes["words"],
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=sizes["layers"],
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    model: Any = LlamaForCausalLM(config)
    model.model.vision_tower = []
    model.model.mm_projector = nn.Linear(tower, width)
    model.model.vlm_att_projector = nn.Linear(tower, tower)
    model.model.vlm_att_ln = nn.LayerNorm(tower)
    return model


def make_tower(sizes: Sizes = TINY) -> nn.Module:
    """The tower for a larger image than the file was trained with."""
    return EvaTower(sizes["tower"], sizes["depth"] - 1, 24)


def _random(module: nn.Module, seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.empty(value.shape).uniform_(-1, 1, generator=generator).to(dtype)
        for key, value in module.state_dict().items()
    }


def write_files(folder: Path, sizes: Sizes = TINY, shards: int = 3) -> dict[str, torch.Tensor]:
    """Write the LLM's shards, the tower's file and the projector's, and give what the model must be.

    The shards hold the tower that the LLM was trained beside, and an older projector.
    """
    with torch.device("cpu"):
        model: Any = make_model(sizes)
        whole = EvaTower(sizes["tower"], sizes["depth"], 16)
    llm = _random(model, 0, torch.bfloat16)
    tower = _random(whole, 1, torch.float16)
    adapter = {key: value for key, value in _random(model, 2, torch.float32).items() if _is_adapter(key)}
    stale = {f"model.vision_tower.{key}": value for key, value in _random(whole, 3, torch.bfloat16).items()}
    (folder / "llm").mkdir(parents=True)
    keys = [*llm, *stale]
    held, weight_map = llm | stale, {}
    for number in range(shards):
        name = f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
        part = keys[number::shards]
        torch.save({key: held[key] for key in part}, folder / "llm" / name)
        weight_map.update(dict.fromkeys(part, name))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "llm/pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    beside = {"norm.weight": torch.ones(sizes["tower"]), "head.weight": torch.ones(4, sizes["tower"])}
    torch.save({**tower, **beside}, folder / "eva_vit_g.pth")
    torch.save({**adapter, "model.mm_projector_2.weight": torch.ones(3)}, folder / "mm_projector.bin")
    expected = {key: value for key, value in llm.items() if not _is_adapter(key)} | adapter
    last = f"blocks.{sizes['depth'] - 1}."
    expected |= {f"model.vision_tower.{k}": v for k, v in tower.items() if not k.startswith(last)}
    expected["model.vision_tower.pos_embed"] = interpolated(tower["pos_embed"], 24)
    return expected


def _is_adapter(key: str) -> bool:
    return "mm_projector" in key or "vlm_att" in key


def sources(folder: Path, sizes: Sizes = TINY) -> dict[str, Any]:
    """What `lowmem.load` is given."""
    import lowmem

    return {
        "": folder / "llm",
        "model.vision_tower": lowmem.Source(
            folder / "eva_vit_g.pth",
            model=lambda: make_tower(sizes),
            skip=f"blocks.{sizes['depth'] - 1}",
            transforms={"pos_embed": lowmem.interpolate(antialias=False)},
        ),
        "model.mm_projector": folder / "mm_projector.bin",
        "model.vlm_att_projector": folder / "mm_projector.bin",
        "model.vlm_att_ln": folder / "mm_projector.bin",
    }


def state_of(model: Any) -> dict[str, torch.Tensor]:
    """All of it, the tower in its list too."""
    state = dict(model.state_dict())
    return state | {f"model.vision_tower.{k}": v for k, v in model.model.vision_tower[0].state_dict().items()}
