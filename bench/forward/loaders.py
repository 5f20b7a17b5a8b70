"""Ways to have a model that can run: fully in memory, or with weights on disk. Each runs in a process of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .cases import device_map


@dataclass(frozen=True)
class Order:
    """What to load.

    Attributes:
        source: a checkpoint with a `config.json`.
        dtype: torch name of the floats of the model.
        on_disk: `everything` or `half`.
        folder: an empty folder for what the loader writes.
        ram: bytes, lowmem's option; None for what the machine has.
    """

    source: Path
    dtype: str
    on_disk: str
    folder: Path
    ram: int | None = None


def transformers_class(source: Path) -> Any:
    """The class that the config names."""
    import transformers

    return getattr(transformers, transformers.AutoConfig.from_pretrained(source).architectures[0])


def _loaded(order: Order) -> nn.Module:
    model: nn.Module = transformers_class(order.source).from_pretrained(order.source, dtype=order.dtype)
    return model


def _lowmem(order: Order, **options: Any) -> nn.Module:
    import lowmem

    return lowmem.load(order.source, dtype=order.dtype, ram=order.ram, **options).model


def _on_disk(order: Order) -> nn.Module:
    return _lowmem(order, device_map=device_map(order.source, order.on_disk))


def _on_disk_cast_once(order: Order) -> nn.Module:
    return _lowmem(order, device_map=device_map(order.source, order.on_disk), offload_folder=order.folder)


def _loaded_map(order: Order) -> nn.Module:
    return _lowmem(order, residency="map")


def _loaded_copy(order: Order) -> nn.Module:
    return _lowmem(order, residency="copy")


def _accelerate(order: Order) -> nn.Module:
    """`from_pretrained` with a device map: `accelerate.dispatch_model`, with transformers' index of what is on disk."""
    model: nn.Module = transformers_class(order.source).from_pretrained(
        order.source,
        dtype=order.dtype,
        device_map=device_map(order.source, order.on_disk),
        offload_folder=str(order.folder),
    )
    return model


def _accelerate_dat(order: Order) -> nn.Module:
    """`accelerate.load_checkpoint_and_dispatch`, which copies what is on disk into a `.dat` file for each tensor.

    In its two steps, because of tied weights: it writes one name of them and asks for both.
    """
    import accelerate
    import torch
    import transformers

    from bench.models import tie

    dtype = getattr(torch, order.dtype)
    config = transformers.AutoConfig.from_pretrained(order.source)
    with accelerate.init_empty_weights(include_buffers=False):
        model: nn.Module = transformers_class(order.source)._from_config(config, dtype=dtype)
    tie(model)
    files = sorted(order.source.glob("*.safetensors"))
    placed = _with_two_devices(device_map(order.source, order.on_disk))
    target, folder = str(order.source if len(files) > 1 else files[0]), str(order.folder)
    accelerate.load_checkpoint_in_model(model, target, device_map=placed, offload_folder=folder, dtype=dtype)
    tie(model)
    _name_tied(order.folder)
    dispatched: nn.Module = accelerate.dispatch_model(model, device_map=placed, offload_dir=folder)
    return dispatched.eval()


def _name_tied(folder: Path) -> None:
    """Give the head in an offload folder of accelerate the file of the embedding, where only that one is there."""
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if embedding in index and head not in index:
        os.link(folder / f"{embedding}.dat", folder / f"{head}.dat")
        (folder / "index.json").write_text(json.dumps({**index, head: index[embedding]}), encoding="utf-8")


def _with_two_devices(placed: dict[str, str]) -> dict[str, str]:
    """The same places of all weights: accelerate's reader knows no map of which `disk` is the only device."""
    if placed != {"": "disk"}:
        return placed
    parts = ("model.embed_tokens", "model.layers", "model.norm", "lm_head")
    return {**dict.fromkeys(parts, "disk"), "model.rotary_emb": "cpu"}


Load = Callable[[Order], nn.Module]
LOADERS: dict[str, Load] = {
    "loaded": _loaded,
    "loaded-map": _loaded_map,
    "loaded-copy": _loaded_copy,
    "lowmem": _on_disk,
    "lowmem-folder": _on_disk_cast_once,
    "accelerate": _accelerate,
    "accelerate-dat": _accelerate_dat,
}
TITLES = {
    "loaded": "in memory (transformers)",
    "loaded-map": "in memory (lowmem, mapped)",
    "loaded-copy": "in memory (lowmem, copied)",
    "lowmem": "lowmem",
    "lowmem-folder": "lowmem, offload folder",
    "accelerate": "accelerate (transformers' index)",
    "accelerate-dat": "accelerate (.dat copies)",
    "disk": "the disk's own time",
}
