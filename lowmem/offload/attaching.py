"""What a load does to a model whose weights do not stay where they compute, and how that ends."""

from __future__ import annotations

import functools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import OptionError
from ..modeling.rules import Rules
from ..modeling.targets import owner_of, tensor_of, walk
from ..planner import LoadPlan, Placement
from ..planner.devices import OFFLOADED
from ..planner.running import in_one_piece, is_away, lies_ready, parts_of
from .accelerators import accelerator_place
from .aligning import align, take_back
from .bringing import Weight, waiting
from .files import Files, as_lying, away, entry_of
from .hooks import move
from .places import HostPlace, Place
from .refusals import refuse_moves, take_back_refusals
from .runtime import Runtime, Unit
from .weights import MappedParameter, OffloadedParameter, ReleasedWeight, refuse_gradient


@dataclass(eq=False)
class _Attached:
    """What is at a model: its runtime, and the names of parameters that are pages of files."""

    source: str
    runtime: Runtime | None
    mapped: tuple[str, ...] = field(repr=False)
    aligned: bool = False


_attached: weakref.WeakKeyDictionary[nn.Module, _Attached] = weakref.WeakKeyDictionary()


class Observer:
    """A forward pre-hook: says what is used now. No value depends on it."""

    is_of_lowmem = True

    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell = tell

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Called before the module's forward."""
        if not torch.compiler.is_compiling():
            self._tell()

    def __reduce__(self) -> Any:
        """In another process there is nothing to tell."""
        return _Nobody, ()


class _Nobody:
    """What stands for an observer where there is nothing to observe."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Nothing."""


def bring_weights(model: nn.Module, plan: LoadPlan) -> Runtime | None:
    """Put weights that are elsewhere into the model: pages of files, or parameters that bring them when they are used.

    Nothing to do for accelerate's hooks, or where every weight is where it computes.

    Raises:
        CheckpointError: a file changed since it was planned, or cannot be mapped.
    """
    found = list(away(plan))
    if plan.running.dispatch == "accelerate" or not (found or any(_initialised_away(plan))):
        return None
    place = _place_of(plan)
    runtime = Runtime(plan.checkpoint.source, plan.running, Files(plan), place, plan.host.available - plan.host.peak)
    for placement in found:
        if plan.main_device == "cpu" and lies_ready(placement):
            entry = entry_of(placement, plan)
            _install(model, placement, _mapped(runtime.files.view(entry, placement.shape)))
        elif placement.device == "cpu":
            _let_wait(model, placement, runtime)
        else:
            weight = Weight(as_lying(placement, plan), runtime.files.view, runtime)
            _install(model, placement, functools.partial(OffloadedParameter, weight))
    return runtime


def comes_at_use(parameter: torch.Tensor) -> bool:
    """Whether its values are brought whenever an operation takes it."""
    return isinstance(parameter, OffloadedParameter)


def _place_of(plan: LoadPlan) -> Place:
    return HostPlace() if plan.main_device == "cpu" else accelerator_place(plan.main_device, plan.running)


def _let_wait(model: nn.Module, placement: Placement, runtime: Runtime) -> None:
    """A weight that is in host memory, for a device that computes with it."""
    tensor = tensor_of(model, placement.target).detach()
    weight = Weight(in_one_piece(placement), waiting(tensor), runtime)
    _install(model, placement, functools.partial(OffloadedParameter, weight))


def _initialised_away(plan: LoadPlan) -> Iterator[Placement]:
    """What no file holds, and is not where it computes."""
    return (p for p in plan.placements if p.residency == "init" and p.nbytes and is_away(p, plan.main_device))


def _mapped(tensor: torch.Tensor) -> Callable[[bool], torch.Tensor]:
    def make(requires_grad: bool) -> torch.Tensor:
        return MappedParameter(tensor, requires_grad)

    return make


def _install(model: nn.Module, placement: Placement, make: Callable[[bool], torch.Tensor]) -> None:
    """Under every name that it has; what the model's author hung on the parameter stays."""
    parameter: Any = None
    for name in placement.names:
        owner, leaf = owner_of(model, name)
        old = owner._parameters[leaf]
        assert old is not None
        if parameter is None:
            if type(old) is nn.Parameter:
                parameter = make(old.requires_grad and (old.is_floating_point() or old.is_complex()))
            else:
                # The parameter of an int8 layer has a class of its own.
                parameter = make(False)
                if type(parameter) is MappedParameter:
                    parameter = type(old)(parameter.detach(), False)
                    parameter.lies_on_disk = True
            parameter.__dict__.update(vars(old))
            if isinstance(parameter, MappedParameter):
                parameter.name_on_disk = name  # type: ignore[attr-defined]
        owner._parameters[leaf] = parameter


def attach(model: nn.Module, plan: LoadPlan, rules: Rules, runtime: Runtime | None) -> None:
    """Last of all: observe the forward, refuse what cannot be done, and bring inputs to several accelerators."""
    mapped = tuple(p.target for p in plan.placements if p.residency == "map")
    if runtime is not None or mapped:
        _attached[model] = _Attached(plan.checkpoint.source, runtime, mapped)
    accelerators = set(plan.device_map.values()) - set(OFFLOADED)
    if runtime is None and len(accelerators) == 1:
        # The weights are there; this moves the buffers that no checkpoint holds.
        move(model, torch.device(plan.main_device))
    if runtime is None and len(accelerators) > 1:
        align(model, plan, torch.device(plan.main_device), rules.skip_keys)
    if runtime is None:
        return
    if accelerators:
        for placement in _initialised_away(plan):
            _let_wait(model, placement, runtime)
        align(model, plan, runtime.place.device, rules.skip_keys)
        _attached[model].aligned = True
    _observe(model, plan, runtime)
    for name, parameter in _on_disk(model):
        if isinstance(parameter, MappedParameter) and parameter.requires_grad:
            hooked: Any = parameter
            hooked.register_hook(functools.partial(_refuse_gradient, name))
    refuse_moves(model)
    # As accelerate says it; transformers and others look for it.
    model.hf_device_map = dict(plan.device_map)  # type: ignore[assignment]


def _refuse_gradient(name: str, gradient: torch.Tensor) -> None:
    refuse_gradient(name)


def _on_disk(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, module in walk(model):
        for leaf, parameter in module._parameters.items():
            if isinstance(parameter, (MappedParameter, OffloadedParameter)):
                yield prefix + leaf, parameter


def _observe(model: nn.Module, plan: LoadPlan, runtime: Runtime) -> None:
    """Hooks at every module that has mapped weights of its own, and at the model."""
    model.register_forward_pre_hook(Observer(runtime.start), prepend=True)
    owners: dict[int, tuple[nn.Module, list[Placement]]] = {}
    spans: dict[int, list[tuple[Any, int, int, int]]] = defaultdict(list)
    for placement in away(plan):
        if plan.main_device != "cpu" or not lies_ready(placement):
            continue
        entry = entry_of(placement, plan)
        for name in placement.names:
            owner, leaf = owner_of(model, name)
            tensor = owner._parameters[leaf]
            assert tensor is not None
            owners.setdefault(id(owner), (owner, []))[1].append(placement)
            spans[id(owner)].append((entry.file, tensor.data_ptr(), placement.nbytes, entry.offset))
    for key, (owner, placements) in owners.items():
        theirs = type(owner).__module__.startswith("torch.nn.")
        by_need = not theirs and any(parts_of(p) > 1 for p in placements)
        nbytes = sum(nbytes for _, _, nbytes, _ in spans[key])
        unit = runtime.add(nbytes, tuple(spans[key]), by_need=by_need)
        owner.register_forward_pre_hook(Observer(functools.partial(_use, runtime, unit)), prepend=True)


def _use(runtime: Runtime, unit: Unit) -> None:
    runtime.use(unit)


def release(model: nn.Module) -> None:
    """End what a loaded model holds: the threads that read ahead, and the mappings of its files.

    Its weights that lie in files are gone then, in memory or not: the model cannot be run any more, and another
    checkpoint can be loaded into it. Memory of weights that were read into it is the model's and ends with it. A model
    that is dropped releases itself.

    Args:
        model: what `load` gave; not a part of it. A second time does nothing.

    Raises:
        OptionError: not a module, or not one that `load` gave.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"model: expected a module that lowmem loaded, found {type(model).__name__}")
    attached = _attached.get(model)
    if attached is None:
        raise OptionError(
            f"model: expected a model that lowmem.load gave, with weights that lie in files; found "
            f"{type(model).__name__} without any"
        )
    if attached.runtime is not None:
        attached.runtime.close()
    take_back_refusals(model)
    if attached.aligned:
        take_back(model)
        attached.aligned = False
    mapped = set(attached.mapped)
    attached.mapped = ()
    for prefix, module in walk(model):
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, Observer):
                del module._forward_pre_hooks[key]
        for leaf, parameter in module._parameters.items():
            name = prefix + leaf
            if parameter is None:
                continue
            in_file = isinstance(parameter, (MappedParameter, OffloadedParameter)) or _is_int8_page(parameter)
            if in_file or name in mapped:
                module._parameters[leaf] = _released(name, parameter, attached.source)
                state: Any = module.__dict__.get("state")
                if hasattr(state, "reset_grads"):
                    # bitsandbytes keeps the weight there too.
                    state.CB = state.SCB = None
        for leaf, buffer in module._buffers.items():
            if buffer is not None and prefix + leaf in mapped:
                module._buffers[leaf] = buffer.to("meta")


def _is_int8_page(parameter: torch.Tensor) -> bool:
    return bool(getattr(parameter, "lies_on_disk", False))


def _released(name: str, parameter: torch.Tensor, source: str) -> Any:
    weight: Any = ReleasedWeight(name, tuple(parameter.shape), parameter.dtype, source)
    return OffloadedParameter(weight, parameter.requires_grad)
