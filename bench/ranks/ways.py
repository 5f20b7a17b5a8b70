"""Ways to load on several ranks: lowmem's, transformers', accelerate's, and torch's own tools."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils.fsdp_utils import fsdp2_load_full_state_dict
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import lowmem

from .cases import Order

# Its methods have no types.
_AUTO: Any = AutoModelForCausalLM


@dataclass(frozen=True)
class Loaded:
    """A model, and what its loader tells of the load: `read` and `mapped` bytes, seconds of its `phases`."""

    model: Any
    told: dict[str, Any] = field(default_factory=dict)


Way = Callable[[Order], Loaded]


def by_lowmem(order: Order, **options: Any) -> Loaded:
    result = lowmem.load(
        order.folder, dtype=order.dtype, ram=order.ram, distributed_config=_division(order) or None, **options
    )
    told = {
        "read": sum(result.report.read.values()),
        "mapped": result.plan.host.mapped,
        "phases": dict(result.report.phases),
    }
    return Loaded(result.model, told)


def by_transformers(order: Order) -> Loaded:
    divided = _division(order)
    # Not by keywords: mypy would have each of them fit every parameter.
    config = {"distributed_config": DistributedConfig.from_dict(divided)} if divided else {}
    return Loaded(_AUTO.from_pretrained(order.folder, dtype=getattr(torch, order.dtype), **config).eval())


def by_torch(order: Order) -> Loaded:
    """Rank 0 reads everything and gives it out, tensor after tensor."""
    model = _empty(order)
    state: dict[str, Any] = {}
    if dist.get_rank() == 0:
        for file in _shards(order.folder):
            state |= load_file(file)
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    return Loaded(model)


def by_accelerate(order: Order) -> Loaded:
    """What `Accelerator.prepare` does with `cpu_ram_efficient_loading`, but on the CPU: rank 0 has the whole model."""
    first = dist.get_rank() == 0
    state = by_transformers(replace(order, division="replicated")).model.state_dict() if first else {}
    model = _on_meta(order)
    fsdp2_load_full_state_dict(SimpleNamespace(is_main_process=first), model, state)
    return Loaded(_finished(model))


def by_torch_each(order: Order) -> Loaded:
    """Each rank copies every shard."""
    model = _empty(order)
    for file in _shards(order.folder):
        model.load_state_dict(load_file(file), strict=False)
    return Loaded(model)


def _empty(order: Order) -> Any:
    """The model with memory and without values, but for its rotary tables."""
    return _finished(_on_meta(order).to_empty(device="cpu"))


def _on_meta(order: Order) -> Any:
    """The model without memory, and divided."""
    config = AutoConfig.from_pretrained(order.folder)
    with torch.device("meta"):
        model = _AUTO.from_config(config, dtype=getattr(torch, order.dtype))
    if order.division == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def _finished(model: Any) -> Any:
    # Its buffers are in no file.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    return model.eval()


def _division(order: Order) -> dict[str, int]:
    return {} if order.division == "replicated" else {f"{order.division}_size": dist.get_world_size()}


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


WAYS: dict[str, Way] = {
    "lowmem": by_lowmem,
    "lowmem-copy": partial(by_lowmem, residency="copy"),
    "lowmem-once": partial(by_lowmem, residency="copy", read="once"),
    "lowmem-each": partial(by_lowmem, residency="copy", read="each"),
    "transformers": by_transformers,
    "torch": by_torch,
    "accelerate": by_accelerate,
    "torch-each": by_torch_each,
}
