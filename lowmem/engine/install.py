"""Put finished tensors into the model, and take them out again when the load fails."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import nn

from ..modeling.targets import owner_of
from ..planner import Placement


class Installer:
    """Installs placements one by one; `undo` restores what the model held before."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before: list[tuple[dict[str, Any], str, Any, dict[str, Any]]] = []

    def install(self, placement: Placement, tensor: torch.Tensor) -> None:
        """Set `tensor` under every name of the placement; tied names share one parameter."""
        first = placement.names[0]
        owner, leaf = self._remember(first)
        old = owner._parameters.get(leaf)
        if old is not None and old.requires_grad and not (tensor.is_floating_point() or tensor.is_complex()):
            # Integers cannot require a gradient; the helper would copy the flag of the old parameter.
            owner._parameters[leaf] = nn.Parameter(old.detach(), requires_grad=False)
        set_module_tensor_to_device(owner, leaf, tensor.device, value=tensor, dtype=tensor.dtype, clear_cache=False)
        shared = owner._parameters.get(leaf) if leaf in owner._parameters else owner._buffers[leaf]
        for name in placement.names[1:]:
            other, other_leaf = self._remember(name)
            table: dict[str, Any] = other._parameters if other_leaf in other._parameters else other._buffers
            table[other_leaf] = shared

    def leave_on_disk(self, placement: Placement) -> None:
        """Only shape and final dtype: the weight itself stays in its file."""
        self.install(placement, torch.empty(placement.shape, dtype=getattr(torch, placement.dtype), device="meta"))

    def undo(self) -> None:
        """Restore everything, the last change first."""
        while self._before:
            table, leaf, value, attributes = self._before[-1]
            table[leaf] = value
            vars(value).update(attributes)
            # Last, so that a Ctrl-C in between loses nothing.
            self._before.pop()

    def commit(self) -> None:
        """Let go of what the model held before."""
        self._before.clear()

    def _remember(self, name: str) -> tuple[nn.Module, str]:
        owner, leaf = owner_of(self._model, name)
        table: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
        # With its attributes: accelerate takes one of them off the tensor that it replaces.
        self._before.append((table, leaf, table[leaf], dict(vars(table[leaf]))))
        return owner, leaf
