"""Weights on disk or on other devices by accelerate's hooks, told where everything lies: `dispatch="accelerate"`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .._shared import ignoring, silent
from ..modeling.rules import Rules
from ..modeling.targets import is_bitsandbytes, owner_of, tensor_of
from ..planner import LoadPlan, Placement
from ..planner.moves import is_one
from .hooked_weights import MappedWeights


def dispatch_by_hooks(model: nn.Module, plan: LoadPlan, rules: Rules) -> None:
    """Make `model(...)` work wherever its weights are.

    On one device nothing is attached. Otherwise `accelerate.dispatch_model` moves weights and inputs at run time; a
    weight on disk is read from where the plan left it: the checkpoint itself, cast where its dtype is another, or the
    offload folder. What accelerate cannot open there is mapped here.
    """
    devices = set(plan.device_map.values())
    if devices == {"cpu"}:
        return
    if len(devices) == 1 and "disk" not in devices:
        # The weights are there; this moves the buffers that no checkpoint holds.
        move(model, torch.device(devices.pop()))
        return
    from accelerate import dispatch_model

    with quiet():
        dispatch_model(
            model,
            device_map={module: as_accelerate(device) for module, device in plan.device_map.items()},
            main_device=as_accelerate(plan.main_device),
            state_dict=_held(model, plan),
            offload_index=offload_index(plan),
            skip_keys=list(rules.skip_keys) or None,
            # Before 1.15 it takes a whole model on disk so only.
            force_hooks=devices == {"disk"},
        )
    # Its hooks import bitsandbytes, which takes seconds.
    if any(is_bitsandbytes(module) for module in model.modules()):
        from .hooked_int8 import exchange_hooks

        exchange_hooks(model)


def move(model: nn.Module, device: torch.device) -> None:
    """All that is in memory."""
    if getattr(model, "is_loaded_in_8bit", False):
        # transformers' own `to` refuses int8 models beside older bitsandbytes.
        nn.Module.to(model, device)
    else:
        model.to(device)


@contextmanager
def quiet() -> Iterator[None]:
    """What accelerate warns of is what the plan says: weights on meta, and parameters named beside split modules."""
    with silent("accelerate.big_modeling"), ignoring("The following device_map keys do not match any submodules"):
        yield


def offload_index(plan: LoadPlan) -> dict[str, dict[str, str]]:
    """Name → file and key, and dtype where it is cast, as accelerate's `OffloadedWeightsLoader` reads it, for every
    weight on disk that it can open.
    """
    mapped = _mapped_here(plan)
    index: dict[str, dict[str, str]] = {}
    for placement in plan.placements:
        if placement.residency == "refer":
            entry = placement.links[0].entry
            if placement in mapped:
                continue
            where = {
                "safetensors_file": os.fspath(entry.file.absolute()),
                "weight_name": plan.checkpoint.own_key(entry),
            }
            if entry.dtype != placement.dtype:
                where["dtype"] = placement.dtype
        elif placement.residency == "write":
            assert plan.offload is not None
            file = plan.offload.find(placement.target)
            where = {"safetensors_file": os.fspath(file.absolute()), "weight_name": placement.target}
        else:
            continue
        index.update(dict.fromkeys(placement.names, where))
    return index


def _mapped_here(plan: LoadPlan) -> set[Placement]:
    """Weights on disk that accelerate cannot open by their file and key: in pickles, of a key that only names another,
    of another shape than the model's, parts of tensors, or int8 that become floats.
    """
    shards = {shard.file: shard for shard in plan.checkpoint.shards}
    found = set()
    for placement in plan.placements:
        if placement.residency == "refer":
            link, entry = placement.links[0], placement.links[0].entry
            shard = shards[entry.file]
            as_stored = link.whole and is_one(placement.links, placement.shape)
            shared = plan.checkpoint.own_key(entry) in shard.metadata
            as_stored = as_stored and shard.container == "safetensors" and not shared
            as_stored = as_stored and link.scales is None
            if not as_stored or plan.checkpoint[entry.key].shape != placement.shape:
                found.add(placement)
    return found


def _held(model: nn.Module, plan: LoadPlan) -> Mapping[str, torch.Tensor] | None:
    """What accelerate is to take from here: weights that wait in memory, and those on disk that it cannot open."""
    kept = _kept_in_memory(model, plan)
    lying = {name: placement for placement in _mapped_here(plan) for name in placement.names}
    return MappedWeights(kept or {}, lying, plan) if lying else kept


def _kept_in_memory(model: nn.Module, plan: LoadPlan) -> dict[str, torch.Tensor] | None:
    """Weights that wait in host memory for another device, or that have no file although their layer is on disk."""
    kept: dict[str, torch.Tensor] = {}
    for placement in plan.placements:
        waits = placement.device == "cpu" and plan.main_device != "cpu"
        if waits or (placement.residency == "init" and "disk" in plan.device_map.values()):
            kept.update({name: present(model, name).detach() for name in placement.names})
    return kept or None


def present(model: nn.Module, name: str) -> torch.Tensor:
    """The tensor under `name`; the scales of a layer of bitsandbytes are no parameter of it."""
    owner, leaf = owner_of(model, name)
    if leaf == "SCB" and leaf not in owner._parameters:
        layer: Any = owner
        # bitsandbytes moves them from the weight to its state at the first forward.
        scales: torch.Tensor = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
        return scales
    return tensor_of(model, name)


def as_accelerate(device: str) -> Any:
    """accelerate counts accelerators by number."""
    kind, _, index = device.partition(":")
    return int(index) if kind in ("cuda", "xpu", "npu") else device


__all__ = ["MappedWeights", "dispatch_by_hooks", "offload_index"]
