"""Put finished tensors into the model, and give a borrowed model back as it was when the load fails."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import nn

from ..modeling.targets import owner_of
from ..planner import Placement


class Snapshot:
    """Everything that a load may change in a model: tensors, their attributes, hooks, flags. Values are not copied."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        tables: list[dict[str, Any]] = [t for m in modules for t in (vars(m), m._parameters, m._buffers)]
        # accelerate takes an attribute off the tensor that it replaces.
        tables += [vars(t) for t in (*model.parameters(), *model.buffers())]
        self._before = [(table, dict(table)) for table in tables]

    def restore(self) -> None:
        """Make the model what it was. May be interrupted and run again."""
        for table, before in self._before:
            for name in table.keys() - before.keys():
                del table[name]
            table.update(before)


class Installer:
    """Installs placements one by one."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def install(self, placement: Placement, tensor: torch.Tensor) -> None:
        """Set `tensor` under every name of the placement; tied names share one parameter."""
        owner, leaf = owner_of(self._model, placement.names[0])
        old = owner._parameters.get(leaf)
        attributes = {} if old is None else dict(vars(old))
        if old is not None and old.requires_grad and not (tensor.is_floating_point() or tensor.is_complex()):
            # Integers cannot require a gradient; the helper would copy the flag of the old parameter.
            owner._parameters[leaf] = nn.Parameter(old.detach(), requires_grad=False)
        set_module_tensor_to_device(owner, leaf, tensor.device, value=tensor, dtype=tensor.dtype, clear_cache=False)
        shared = owner._parameters.get(leaf) if leaf in owner._parameters else owner._buffers[leaf]
        if attributes:
            # What the model's author hung on the parameter (`no_decay`, say) is the model's, not the weights'.
            vars(shared).update(attributes)
        for name in placement.names[1:]:
            other, other_leaf = owner_of(self._model, name)
            table: dict[str, Any] = other._parameters if other_leaf in other._parameters else other._buffers
            table[other_leaf] = shared

    def leave_on_disk(self, placement: Placement) -> None:
        """Only shape and final dtype: the weight itself stays in its file."""
        self.install(placement, torch.empty(placement.shape, dtype=getattr(torch, placement.dtype), device="meta"))
