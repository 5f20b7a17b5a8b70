"""Inputs travel to the device that computes, and outputs back, by accelerate's hooks; no weight does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..modeling.targets import walk
from ..planner import LoadPlan
from ..planner.devices import OFFLOADED
from .hooks import as_accelerate, move, quiet
from .weights import OffloadedParameter


def align(model: nn.Module, plan: LoadPlan, device: torch.device, skip_keys: Sequence[str]) -> None:
    """Let inputs be given on any device, and move what no checkpoint holds to where it computes.

    Args:
        model: whose weights are in their places.
        plan: says which modules compute on which accelerator; those that are elsewhere compute on the main device.
        device: the main device.
        skip_keys: names of arguments and results that stay where they are, such as a cache of keys and values.
    """
    table = {name: plan.main_device if on in OFFLOADED else on for name, on in plan.device_map.items()}
    if len(set(table.values())) > 1:
        from accelerate import dispatch_model

        with aside(model), quiet():
            dispatch_model(
                model,
                device_map={name: as_accelerate(on) for name, on in table.items()},
                main_device=as_accelerate(plan.main_device),
                skip_keys=list(skip_keys) or None,
                force_hooks=True,
            )
        return
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    with aside(model):
        move(model, device)
        # What accelerate hangs at the root of a model whose layers are elsewhere.
        hook = AlignDevicesHook(device, io_same_device=True, skip_keys=list(skip_keys) or None)
        add_hook_to_module(model, hook)


def settle(model: nn.Module, plan: LoadPlan, skip_keys: Sequence[str]) -> None:
    """Where every weight is on the accelerator that computes with it: move what no checkpoint holds to one, and let
    inputs travel between several.
    """
    accelerators = {device for device in plan.device_map.values() if device not in OFFLOADED}
    if len(accelerators) == 1:
        move(model, torch.device(plan.main_device))
    elif accelerators:
        align(model, plan, torch.device(plan.main_device), skip_keys)


def take_back(model: nn.Module) -> None:
    """As if `align` had not been called, but for where things are."""
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(model, recurse=any(hasattr(child, "_hf_hook") for child in model.children()))


@contextmanager
def aside(model: nn.Module) -> Iterator[None]:
    """A model with others, which are empty, for the parameters that bring their values: whoever moves all parameters
    would bring them. accelerate hangs nothing at modules that have none.
    """
    kept = [
        (module._parameters, leaf, parameter)
        for _, module in walk(model)
        for leaf, parameter in module._parameters.items()
        if isinstance(parameter, OffloadedParameter)
    ]
    for table, leaf, _ in kept:
        table[leaf] = nn.Parameter(torch.empty(0, device="cpu"), requires_grad=False)
    try:
        yield
    finally:
        for table, leaf, parameter in kept:
            table[leaf] = parameter
