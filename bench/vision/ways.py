"""Ways to load: lowmem's, timm's, and what people write by hand for several sources."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import lowmem

from .cases import BY_HAND, Order
from .model import MODEL_GRID, interpolated, make_model

Way = Callable[[Order], Any]


def by_lowmem(order: Order, residency: str) -> Any:
    if (order.folder / "config.json").exists():
        options = dict(order.options)
        kwargs = {name: options.pop(name) for name in ("img_size",) if name in options}
        source = f"local-dir:{order.folder}"
        return lowmem.load(source, model_kwargs=kwargs, residency=residency, **options).model
    sources: dict[str, Any] = {
        "": order.folder / "llm",
        "model.vision_tower": lowmem.Source(
            order.folder / "tower.pth", transforms={"pos_embed": lowmem.interpolate(antialias=False)}
        ),
        "model.mm_projector": order.folder / "mm_projector.bin",
    }
    return lowmem.load(sources, model=lambda: make_model(order.sizes), residency=residency, ram=order.ram).model


def by_timm(order: Order) -> Any:
    """In eval mode, as lowmem's is."""
    import timm

    return timm.create_model(f"local-dir:{order.plain}", pretrained=True, **order.options).eval()


def by_hand(order: Order, mmap: bool, assign: bool) -> Any:
    def read(file: Path) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = torch.load(file, map_location="cpu", mmap=mmap, weights_only=True)
        return state

    with torch.device("meta") if assign else contextlib.nullcontext():
        model = make_model(order.sizes)
    for shard in sorted((order.folder / "llm").glob("*.bin")):
        model.load_state_dict(read(shard), strict=False, assign=assign)
    model.load_state_dict(read(order.folder / "mm_projector.bin"), strict=False, assign=assign)
    tower = read(order.folder / "tower.pth")
    tower["pos_embed"] = interpolated(tower["pos_embed"], MODEL_GRID)
    model.model.vision_tower.load_state_dict(tower, assign=assign)
    if assign:
        # Its buffers are in no file, and still on meta.
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    return model.eval()


WAYS: dict[str, Way] = {
    "lowmem": partial(by_lowmem, residency="map"),
    "lowmem-copy": partial(by_lowmem, residency="copy"),
    "timm": by_timm,
    **{name: partial(by_hand, mmap="mmap" in name, assign="assign" in name) for name in BY_HAND},
}
