"""A model as LLaVA has it: an LLM, a vision tower and a projector between them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from .cases import Sizes

# Patches of the tower's file and of the model, along each side.
FILE_GRID, MODEL_GRID = 16, 24


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


class Tower(nn.Module):
    """For an image of `grid` x `grid` patches."""

    def __init__(self, width: int, depth: int, grid: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, width))
        self.patch_embed = nn.Conv2d(3, width, 14, 14)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))


def make_model(sizes: Sizes, grid: int = MODEL_GRID) -> Any:
    """All of it, each part in the dtype of its file."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, tower = sizes.width, sizes.tower
    config = LlamaConfig(
        vocab_size=sizes.words,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=sizes.layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
    )
    with _default(torch.bfloat16):
        model: Any = LlamaForCausalLM(config)
    with _default(torch.float16):
        model.model.vision_tower = Tower(tower, sizes.depth, grid)
    with _default(torch.float32):
        model.model.mm_projector = nn.Sequential(nn.Linear(tower, width), nn.GELU(), nn.Linear(width, width))
    return model


@contextlib.contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def interpolated(embedding: torch.Tensor, grid: int) -> torch.Tensor:
    """MAE's `interpolate_pos_embed`, in the dtype of the file."""
    extra, tokens = embedding[:, :1].float(), embedding[:, 1:].float()
    size = int(tokens.shape[1] ** 0.5)
    tokens = tokens.reshape(-1, size, size, tokens.shape[-1]).permute(0, 3, 1, 2)
    tokens = F.interpolate(tokens, size=(grid, grid), mode="bicubic", align_corners=False)
    tokens = tokens.permute(0, 2, 3, 1).flatten(1, 2)
    return torch.cat((extra, tokens), dim=1).to(embedding.dtype)
