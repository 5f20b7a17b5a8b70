"""Weights on disk or on other devices at run time: accelerate's hooks, told where everything lies."""

from __future__ import annotations

import logging
import mmap
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoint import TensorEntry
from .engine.destinations import fill
from .engine.mapping import map_shard, view_of
from .modeling.rules import Rules
from .modeling.targets import tensor_of
from .planner import LoadPlan, Placement
from .planner.moves import is_one


def dispatch(model: nn.Module, plan: LoadPlan, rules: Rules) -> None:
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
        model.to(torch.device(devices.pop()))
        return
    from accelerate import dispatch_model

    with _quiet():
        dispatch_model(
            model,
            device_map={module: _as_accelerate(device) for module, device in plan.device_map.items()},
            main_device=_as_accelerate(plan.main_device),
            state_dict=_held(model, plan),
            offload_index=offload_index(plan),
            skip_keys=list(rules.skip_keys) or None,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """What accelerate warns of is what the plan says: weights on meta, and parameters named beside split modules."""
    logger = logging.getLogger("accelerate.big_modeling")
    disabled = logger.disabled
    logger.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The following device_map keys do not match any submodules", UserWarning)
            yield
    finally:
        logger.disabled = disabled


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
            where = {"safetensors_file": os.fspath(entry.file.absolute()), "weight_name": entry.key}
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
    of another shape than the model's, or parts of tensors.
    """
    shards = {shard.file: shard for shard in plan.checkpoint.shards}
    found = set()
    for placement in plan.placements:
        if placement.residency == "refer":
            link, entry = placement.links[0], placement.links[0].entry
            shard = shards[entry.file]
            as_stored = link.whole and is_one(placement.links, placement.shape)
            shared = entry.key in shard.metadata
            as_stored = as_stored and shard.container == "safetensors" and not shared
            if not as_stored or plan.checkpoint[entry.key].shape != placement.shape:
                found.add(placement)
    return found


def _held(model: nn.Module, plan: LoadPlan) -> Mapping[str, torch.Tensor] | None:
    """What accelerate is to take from here: weights that wait in memory, and those on disk that it cannot open."""
    kept = _kept_in_memory(model, plan)
    lying = {name: placement for placement in _mapped_here(plan) for name in placement.names}
    return MappedWeights(kept or {}, lying, plan) if lying else kept


class MappedWeights(Mapping[str, torch.Tensor]):
    """Weights that stay in their files, mapped when they are first used, beside others that are in memory.

    Args:
        kept: name → tensor in memory.
        lying: name → where it lies.
        plan: gives the files.
    """

    def __init__(self, kept: Mapping[str, torch.Tensor], lying: Mapping[str, Placement], plan: LoadPlan) -> None:
        self._kept = kept
        self._lying = lying
        self._shards = {shard.file: shard for shard in plan.checkpoint.shards}
        self._pages: dict[Path, mmap.mmap] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor at its final dtype: pages of the file where nothing changes, else put together from its parts.

        Raises:
            CheckpointError: the file changed since the load.
        """
        if name in self._kept:
            return self._kept[name]
        placement = self._lying[name]
        dtype: torch.dtype = getattr(torch, placement.dtype)
        if is_one(placement.links, placement.shape):
            entry = placement.links[0].entry
            return view_of(self._mapped(entry), entry, placement.shape).to(dtype)
        tensor = torch.empty(placement.shape, dtype=dtype)
        for link in placement.links:
            fill(tensor, link.region, view_of(self._mapped(link.entry), link.entry))
        return tensor

    def _mapped(self, entry: TensorEntry) -> mmap.mmap:
        pages = self._pages.get(entry.file)
        if pages is None:
            pages = self._pages[entry.file] = map_shard(self._shards[entry.file])
        return pages

    def __contains__(self, name: object) -> bool:
        return name in self._kept or name in self._lying

    def __iter__(self) -> Iterator[str]:
        yield from self._kept
        yield from self._lying

    def __len__(self) -> int:
        return len(self._kept) + len(self._lying)


def _kept_in_memory(model: nn.Module, plan: LoadPlan) -> dict[str, torch.Tensor] | None:
    """Weights that wait in host memory for another device, or that have no file although their layer is on disk."""
    kept: dict[str, torch.Tensor] = {}
    for placement in plan.placements:
        waits = placement.device == "cpu" and plan.main_device != "cpu"
        if waits or (placement.residency == "init" and "disk" in plan.device_map.values()):
            kept.update({name: tensor_of(model, name).detach() for name in placement.names})
    return kept or None


def _as_accelerate(device: str) -> Any:
    kind, _, index = device.partition(":")
    return int(index) if kind in ("cuda", "xpu", "npu") else device
