"""What a load does to a model whose weights do not stay where they compute, and how that ends."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import OptionError
from ..modeling.rules import Rules
from ..modeling.targets import Uses, owner_of, tensor_of, uses_of, walk
from ..planner import LoadPlan, Placement
from ..planner.running import in_one_piece, is_away, lies_ready, parts_of
from .accelerators import accelerator_place
from .aligning import align, settle, take_back
from .bringing import Weight, waiting
from .files import Files, as_lying, away, entry_of
from .hooks import dispatch_by_hooks
from .observing import ExpertsObserver, Lies, Observer, Range
from .pages import Pages
from .places import HostPlace, Place
from .refusals import refuse_moves, take_back_refusals
from .runtime import Runtime
from .units import Unit
from .weights import MappedParameter, OffloadedParameter, ReleasedWeight, is_on_disk, refuse_gradient

# Every model that was loaded, and what brings its weights, if any are elsewhere.
_loaded: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Runtime] | None] = weakref.WeakKeyDictionary()
# Modules that it has in lists, and that were loaded with it.
_beside: weakref.WeakKeyDictionary[nn.Module, tuple[nn.Module, ...]] = weakref.WeakKeyDictionary()


@dataclass(eq=False)
class Brought:
    """What `bring_weights` leaves to `attach`, and to whoever gives up between the two.

    Attributes:
        runtime: brings what is elsewhere.
        owners: every module that has mapped weights of its own, and what is used with it.
        experts: every module that has weights on disk of which parts are used: how many there are, and where each lies.
    """

    runtime: Runtime
    owners: list[tuple[nn.Module, Unit]] = field(default_factory=list)
    experts: dict[nn.Module, list[tuple[int, Lies]]] = field(default_factory=dict)

    def add_experts(self, model: nn.Module, placement: Placement, parts: int, lies: Lies) -> None:
        """A weight on disk that is used in parts."""
        if parts > 1:
            for name in placement.names:
                self.experts.setdefault(owner_of(model, name)[0], []).append((parts, lies))


@torch.inference_mode(False)  # or they could not be used in a graph later
def bring_weights(model: nn.Module, plan: LoadPlan) -> Brought | None:
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
    brought = Brought(runtime)
    units: dict[int, Unit] = {}
    uses = uses_of(model)
    for placement in _in_order(model, found):
        if plan.main_device == "cpu" and lies_ready(placement):
            entry = entry_of(placement, plan)
            tensor = runtime.files.view(entry, placement.shape)
            _install(model, placement, functools.partial(MappedParameter, tensor))
            span = entry.file, tensor.data_ptr(), placement.nbytes, entry.offset
            for name in placement.names:
                owner, _ = owner_of(model, name)
                if id(owner) not in units:
                    units[id(owner)] = runtime.add(0, Pages())
                    brought.owners.append((owner, units[id(owner)]))
                unit = units[id(owner)]
                assert unit.pages is not None
                unit.pages.add(span)
                # Of a table that is looked up, a few pages are used.
                unit.nbytes = 0 if name in uses.looked_up else unit.pages.nbytes
                unit.by_need = unit.by_need or name in uses.looked_up or parts_of(placement, uses) > 1
            parts = parts_of(placement, uses)
            brought.add_experts(model, placement, parts, functools.partial(_part_of, *span[1:3], parts))
        elif placement.device == "cpu":
            _let_wait(model, placement, runtime, uses)
        else:
            weight = Weight(as_lying(placement, plan), runtime.files.view, runtime, uses)
            _install(model, placement, functools.partial(OffloadedParameter, weight, is_registered=True))
            brought.add_experts(model, placement, weight.parts, weight.part_to_expect)
    return brought


def _part_of(address: int, nbytes: int, parts: int, index: int) -> Iterator[Range]:
    yield address + index * (nbytes // parts), nbytes // parts


def _in_order(model: nn.Module, placements: list[Placement]) -> list[Placement]:
    """As their modules are in the model, which is mostly how they are used."""
    places: dict[str, int] = {}
    for prefix, module in walk(model):
        for leaf in module._parameters:
            places[prefix + leaf] = len(places)
    return sorted(placements, key=lambda p: min(places[name] for name in p.names))


def comes_at_use(parameter: torch.Tensor) -> bool:
    """Whether its values are brought whenever an operation takes it."""
    return isinstance(parameter, OffloadedParameter)


def _place_of(plan: LoadPlan) -> Place:
    return HostPlace() if plan.main_device == "cpu" else accelerator_place(plan.main_device, plan.running)


def _let_wait(model: nn.Module, placement: Placement, runtime: Runtime, uses: Uses) -> None:
    """A weight that is in host memory, for a device that computes with it."""
    tensor = tensor_of(model, placement.target).detach()
    weight = Weight(in_one_piece(placement), waiting(tensor), runtime, uses)
    _install(model, placement, functools.partial(OffloadedParameter, weight, is_registered=True))


def _initialised_away(plan: LoadPlan) -> Iterator[Placement]:
    """What no file holds, and is not where it computes."""
    return (p for p in plan.placements if p.residency == "init" and p.nbytes and is_away(p, plan.main_device))


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


def attach(
    model: nn.Module, plan: LoadPlan, rules: Rules, brought: Brought | None, beside: Sequence[nn.Module] = ()
) -> None:
    """Last of all: observe the forward, refuse what cannot be done, and bring inputs to several accelerators.

    Modules `beside` the children of the model are among these only now: it has them in lists.

    A model that computes on the CPU gets no `hf_device_map`: every weight is there whenever it is used, and libraries
    that read the map take it for one with accelerate's hooks (pipelines compute on the device of its first entry).
    """
    _loaded[model] = None if brought is None else weakref.ref(brought.runtime)
    _beside[model] = tuple(beside)
    if plan.running.dispatch == "accelerate":
        dispatch_by_hooks(model, plan, rules)
        return
    if brought is None:
        settle(model, plan, rules.skip_keys)
        return
    runtime = brought.runtime
    if plan.main_device != "cpu":
        uses = uses_of(model)
        for placement in _initialised_away(plan):
            _let_wait(model, placement, runtime, uses)
        align(model, plan, runtime.place.device, rules.skip_keys)
    _observe(model, brought)
    for prefix, module in walk(model):
        for leaf, parameter in module._parameters.items():
            if isinstance(parameter, MappedParameter) and parameter.requires_grad:
                hooked: Any = parameter
                hooked.register_hook(functools.partial(_refuse_gradient, prefix + leaf))
    refuse_moves(model)


def _refuse_gradient(name: str, gradient: torch.Tensor) -> None:
    refuse_gradient(name)


def _observe(model: nn.Module, brought: Brought) -> None:
    """Hooks at every module that has mapped weights of its own, or experts, and at the model."""
    hooks = brought.runtime.hooks
    hooks.append(model.register_forward_pre_hook(Observer(brought.runtime.start), prepend=True))
    hooked: Any = model
    hooks.append(hooked.register_state_dict_pre_hook(Observer(brought.runtime.check)))
    for owner, unit in brought.owners:
        tell = functools.partial(brought.runtime.use, unit)
        hooks.append(owner.register_forward_pre_hook(Observer(tell), prepend=True))
    for owner, experts in brought.experts.items():
        observer = ExpertsObserver(brought.runtime.expect, experts)
        hooks.append(owner.register_forward_pre_hook(observer, prepend=True, with_kwargs=True))


def give_up(model: nn.Module, brought: Brought) -> None:
    """Undo what was begun: nothing of it is left at the model but parameters, which are the caller's to put back."""
    brought.runtime.close()
    _detach(model, brought.runtime)
    _loaded.pop(model, None)


def _detach(model: nn.Module, runtime: Runtime) -> None:
    """Take back hooks and refusals."""
    if any("_hf_hook" in vars(module) for module in model.modules()):
        take_back(model)
    take_back_refusals(model)
    for hook in runtime.hooks:
        # Also of modules that were taken out of the model since.
        hook.remove()
    runtime.hooks.clear()


def release(model: nn.Module) -> None:
    """End what a loaded model holds of the disk: the threads that read ahead, and the mappings of weights on disk.

    These weights are gone then, and those that waited in host memory for another device: the model cannot be run any
    more, and another checkpoint can be loaded into it. What else is in memory stays, mapped or copied. A model that is
    dropped releases itself.

    Args:
        model: what `load` gave; not a part of it. A second time does nothing.

    Raises:
        OptionError: not a model that `load` gave.
    """
    if not isinstance(model, nn.Module) or model not in _loaded:
        raise OptionError(
            f"release: expected a model that lowmem loaded, found {type(model).__name__} that it did not; give the "
            "model itself (result.model; of a wrapper what it wraps), and not a part of it"
        )
    known = _loaded[model]
    runtime = None if known is None else known()
    if runtime is None:
        return
    if not isinstance(runtime.place, HostPlace) and not runtime.closed:
        take_back(model)
    runtime.close()
    _detach(model, runtime)
    beside = _beside.get(model, ())
    for inner in beside:
        take_back_refusals(inner)
    for prefix, module in (place for whole in (model, *beside) for place in walk(whole)):
        for leaf, parameter in module._parameters.items():
            if parameter is not None and is_on_disk(parameter):
                module._parameters[leaf] = _released(prefix + leaf, parameter, runtime.source)
                state: Any = module.__dict__.get("state")
                if hasattr(state, "reset_grads"):
                    # bitsandbytes keeps the weight there too.
                    state.CB = state.SCB = None


def _released(name: str, parameter: torch.Tensor, source: str) -> Any:
    weight: Any = ReleasedWeight(name, tuple(parameter.shape), parameter.dtype, source)
    return OffloadedParameter(weight, parameter.requires_grad, is_registered=True)
