"""Moves and casts of a whole model that weights on disk cannot follow: refused before anything changed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import RunningError
from ..modeling.targets import walk
from .weights import OffloadedParameter, is_on_disk


class Apply:
    """Stands for `torch.nn.Module._apply` of a module with weights on disk, inside it or its own.

    Args:
        module: whose it is.
    """

    def __init__(self, module: nn.Module) -> None:
        # Or the model would end only when the collector comes.
        self._owner = weakref.ref(module)

    def __call__(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """Apply `fn` to all that is in memory.

        Raises:
            RunningError: it would change what is on disk.
        """
        module = self._owner()
        if module is None:
            raise RunningError("a copy of a model with weights on disk cannot be moved or cast; load it once more")
        for name, parameter in _away(module, recurse):
            _check(fn, name, parameter)
        own = dict(module._parameters)
        kept = {leaf: p for leaf, p in own.items() if isinstance(p, OffloadedParameter)}
        for leaf in kept:
            module._parameters[leaf] = None
        try:
            _apply(module, fn, recurse)
        finally:
            module._parameters.update(kept)
        return module

    def __reduce__(self) -> Any:
        """Pickled, every weight is in memory."""
        return PlainApply, (self._owner(),)


class PlainApply:
    """`torch.nn.Module._apply` itself."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """As the class has it."""
        return _apply(self._module, fn, recurse)


def _apply(module: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool) -> nn.Module:
    kind: Any = type(module)
    applied: nn.Module = kind._apply(module, fn, recurse)
    return applied


def refuse_moves(model: nn.Module) -> None:
    """At every module that has weights on disk, or modules with them."""
    for module in _concerned(model):
        module.__dict__["_apply"] = Apply(module)


def take_back_refusals(model: nn.Module) -> None:
    """As if `refuse_moves` had not been called."""
    for _, module in walk(model):
        if isinstance(module.__dict__.get("_apply"), Apply):
            del module.__dict__["_apply"]


def _concerned(model: nn.Module) -> list[nn.Module]:
    found: dict[str, nn.Module] = {}
    modules = dict(walk(model))
    for prefix, module in modules.items():
        if any(map(is_on_disk, module._parameters.values())):
            at = prefix
            while at not in found:
                found[at] = modules[at]
                at = at[:-1].rpartition(".")[0] + "." if "." in at[:-1] else ""
    return list(found.values())


def _away(module: nn.Module, recurse: bool) -> list[tuple[str, torch.Tensor]]:
    return [
        (prefix + leaf, parameter)
        for prefix, inner in (walk(module) if recurse else [("", module)])
        for leaf, parameter in inner._parameters.items()
        if parameter is not None and is_on_disk(parameter)
    ]


def _check(fn: Callable[[torch.Tensor], torch.Tensor], name: str, parameter: torch.Tensor) -> None:
    # As many dimensions, for what changes the order of elements in memory.
    probe = torch.empty((2,) * parameter.dim(), dtype=parameter.dtype, device=parameter.device)
    with torch.no_grad():
        try:
            found = fn(probe)
        except Exception as error:
            raise RunningError(
                f"{name!r} is on disk and cannot be moved or cast; what was asked for fails besides ({error}); load "
                "the checkpoint with the dtype and the device_map that you want"
            ) from error
    shared: Any = probe.is_shared  # torch gives it no type
    if found is probe and not (probe.device.type == "cpu" and shared()):
        return
    what = f"{found.dtype} on {found.device}" if found is not probe else "shared memory"
    raise RunningError(
        f"{name!r} is on disk and cannot be moved or cast (expected {parameter.dtype} on {parameter.device}, asked for "
        f"{what}); load the checkpoint with the dtype and the device_map that you want, or without 'disk' in it"
    )
