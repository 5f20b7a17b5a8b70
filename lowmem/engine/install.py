"""Put finished tensors into the model, and give a borrowed model back as it was when the load fails."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import nn

from .._collector import paused_collector
from ..int8.linear import FrozenParameter
from ..modeling.sharding import is_sharded, wrapped
from ..modeling.targets import walk
from ..planner import Placement

# accelerate quantises the weights of these (bitsandbytes) once they reach an accelerator.
_QUANTISED_THERE = frozenset({"Linear8bitLt", "Linear4bit"})
# Classes of parameters that are made of a tensor and the flag alone.
_PLAIN = (nn.Parameter, FrozenParameter)


class Snapshot:
    """Everything that a load may change in a model: tensors, their attributes, hooks, flags. Values are not copied."""

    def __init__(self, model: nn.Module) -> None:
        with paused_collector():
            modules = {id(module): module for _, module in walk(model)}.values()
            tables: list[dict[str, Any]] = [t for m in modules for t in (vars(m), m._parameters, m._buffers)]
            # accelerate takes an attribute off the tensor that it replaces.
            tensors = [t for m in modules for table in (m._parameters, m._buffers) for t in table.values()]
            tables += [vars(t) for t in tensors if t is not None]
            self._before = [(table, table.copy()) for table in tables]

    def restore(self) -> None:
        """Make the model what it was. May be interrupted and run again."""
        for table, before in self._before:
            for name in table.keys() - before.keys():
                del table[name]
            table.update(before)


class Installer:
    """Installs placements one by one."""

    def __init__(self, model: nn.Module) -> None:
        # One walk instead of a descent for each name.
        self._modules = dict(walk(model))

    def install(self, placement: Placement, tensor: torch.Tensor) -> None:
        """Set `tensor` under every name of the placement; tied names share one parameter."""
        shared: torch.Tensor | None = None
        for name in placement.names:
            at = name.rfind(".") + 1
            owner, leaf = self._modules[name[:at]], name[at:]
            if shared is None:
                shared = replace_tensor(owner, leaf, tensor)
                continue
            table: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
            table[leaf] = shared

    def leave_on_disk(self, placement: Placement) -> None:
        """Only shape and final dtype: the weight itself stays in its file."""
        self.install(placement, torch.empty(placement.shape, dtype=getattr(torch, placement.dtype), device="meta"))


def replace_tensor(owner: nn.Module, leaf: str, tensor: torch.Tensor) -> torch.Tensor:
    """Put `tensor` in the place of the parameter or buffer `leaf` of `owner`; returns what lies there afterwards.

    The outcome is that of accelerate's `set_module_tensor_to_device`, with the old parameter's attributes kept and
    without a gradient for integers. Buffers and plain parameters, which are nearly all, are set here at a part of
    its cost; it sets those with a class of their own, and refuses what does not fit.
    """
    old = owner._parameters.get(leaf)
    if getattr(old, "is_released", False):
        owner._parameters[leaf] = fresh = nn.Parameter(tensor, _may_require_grad(tensor))
        return fresh
    if old is None:
        buffer = owner._buffers.get(leaf)
        if is_sharded(buffer):
            whole: torch.Tensor = wrapped(tensor, buffer)
            owner._buffers[leaf] = whole
            return whole
        if buffer is None or buffer.shape != tensor.shape:
            return _replace_by_accelerate(owner, leaf, tensor)
        owner._buffers[leaf] = tensor
        return tensor
    kind = type(old)
    if kind not in _PLAIN and is_sharded(old):
        fresh = nn.Parameter(wrapped(tensor, old), old.requires_grad and _may_require_grad(tensor))
        fresh.__dict__.update(vars(old))
        owner._parameters[leaf] = fresh
        return fresh
    if kind not in _PLAIN or old.shape != tensor.shape or type(owner).__name__ in _QUANTISED_THERE:
        return _replace_by_accelerate(owner, leaf, tensor)
    fresh = kind(tensor, old.requires_grad and _may_require_grad(tensor))
    # What the model's author hung on the parameter (`no_decay`, say) is the model's, not the weights'.
    fresh.__dict__.update(vars(old))
    owner._parameters[leaf] = fresh
    return fresh


def _may_require_grad(tensor: torch.Tensor) -> bool:
    # Asked of the dtype: the tensor's own methods give the interpreter's lock away and wait for it again.
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


def _replace_by_accelerate(owner: nn.Module, leaf: str, tensor: torch.Tensor) -> torch.Tensor:
    old = owner._parameters.get(leaf)
    attributes = {} if old is None else dict(vars(old))
    lent = old if old is not None and old.requires_grad and not _may_require_grad(tensor) else None
    try:
        if lent is not None:
            # The helper copies the flag of the old parameter.
            lent.requires_grad_(False)
        set_module_tensor_to_device(owner, leaf, tensor.device, value=tensor, dtype=tensor.dtype, clear_cache=False)
    finally:
        if lent is not None:
            lent.requires_grad_(True)
    shared = owner._parameters[leaf] if leaf in owner._parameters else owner._buffers[leaf]
    assert shared is not None
    if attributes:
        vars(shared).update(attributes)
    return shared
