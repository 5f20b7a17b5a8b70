"""The rules of a timm model: its weights are adapted by timm's own `load_pretrained`, its head initialised by timm."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from .alone import alone
from .empty import Registrations, empty_parameters, real_tensors
from .rules import Rules
from .targets import tensor_of, walk
from .timm import Adaptation, TimmModel, create, import_timm
from .tracing import Step

# Entries of a `pretrained_cfg` that say where weights are; a state dict counts only without them.
_SOURCES = frozenset({"source", "file", "url", "hf_hub_id", "hf_hub_filename"})
# What a batch norm counts; torch's own load does without.
_COUNTER = ".num_batches_tracked"


class TimmRules(Rules):
    """The rules of a timm model that lowmem built."""

    kind = "timm"

    def __init__(self, built: TimmModel) -> None:
        super().__init__(built.model)
        self.owns_dtypes = True
        self._blueprint = built.blueprint
        self._adaptation = built.adaptation
        self._relaxed: set[str] = set()
        self._counted = True
        numbers: dict[int, list[int]] = defaultdict(list)
        for number, parameter in enumerate(built.registrations.made):
            numbers[id(parameter)].append(number)
        # Which parameters of a second build are those of this name: what the names hold changes with the load.
        self._numbers = {
            prefix + leaf: numbers.get(id(parameter), [])
            for prefix, module in walk(built.model)
            for leaf, parameter in module._parameters.items()
            if parameter is not None
        }
        self._outer = {} if built.adaptation is None else _outer_names(built.adaptation.model, built.model)

    def filter_step(self) -> Step | None:
        """timm's `load_pretrained`, up to where it would set the tensors."""
        if self._adaptation is None:
            return None
        made = self._blueprint
        version = import_timm(made.where).__version__
        return Step("timm's load_pretrained", self._adapt, f"timm {version} {made.options!r} {made.text}")

    def _adapt(self, state: dict[str, Any]) -> Mapping[str, Any]:
        from timm.models import _builder
        from timm.models._helpers import clean_state_dict

        adaptation = self._adaptation
        assert adaptation is not None
        model, options = adaptation.model, dict(adaptation.options)
        options.pop("cache_dir", None)
        cleaned: dict[str, Any] = clean_state_dict(state)
        if not cleaned:
            return cleaned
        table = options.get("pretrained_cfg") or model.pretrained_cfg
        assert isinstance(table, dict)
        table = {name: value for name, value in table.items() if name not in _SOURCES}
        filtered, filter_fn = dict.fromkeys(cleaned), options.get("filter_fn")

        def noted(given: dict[str, Any], *_: nn.Module) -> Any:
            nonlocal filtered
            result = _filtered(filter_fn, given, model)
            filtered = dict.fromkeys(result)
            return result

        if filter_fn is not None:
            options["filter_fn"] = noted
        loaded: list[tuple[dict[str, Any], bool]] = []
        with _loading_into(model, loaded), torch.no_grad():
            _builder.load_pretrained(model, **{**options, "pretrained_cfg": {**table, "state_dict": cleaned}})
        found, strict = loaded[-1]
        dropped = filtered.keys() - found.keys()
        self._counted = any(name.endswith(_COUNTER) for name in found)
        self._relaxed = set()
        if not strict:
            self._relaxed = {self._name(name) for name in (*dropped, *_classifiers(adaptation, table))}
        named = ((self._name(name), value) for name, value in found.items())
        return {name: value for name, value in named if name}

    def _name(self, name: str) -> str:
        """The name of what `load_pretrained` calls so, in the model that the user gets; empty for what it left out."""
        return self._outer.get(name, name)

    def may_miss(self, names: Collection[str]) -> set[str]:
        """What timm dropped or could not adapt, and the counters of batch norms where an old checkpoint has none."""
        counters = () if self._counted else [name for name in names if name.endswith(_COUNTER)]
        return {*counters, *self._relaxed.intersection(names)}

    def check_initialisable(self, names: Collection[str]) -> None:
        """timm initialises every module."""

    def initialise(self, names: Collection[str]) -> None:
        """A second build, of which only these parameters have values: those that timm gives them.

        Raises:
            ModelError: timm builds another model the second time.
        """
        numbers = {number for name in names for number in self._numbers.get(name, [])}
        with alone(), real_tensors():
            again = self._again(Registrations(numbers), names)
            if again is None:
                again = self._again(None, names)
        if again is None:
            raise ModelError(
                f"{self._blueprint.where}: timm built another {self._blueprint.architecture} the second time, so its "
                f"initial values for {next(iter(names))!r} are not known; bring a checkpoint that has all tensors"
            )
        with torch.no_grad():
            for name in names:
                _give(tensor_of(self.model, name), tensor_of(again, name))

    def _again(self, registrations: Registrations | None, names: Collection[str]) -> nn.Module | None:
        """The same model once more; None where these tensors of it have no values or other shapes.

        Without `registrations`, all of it is real.
        """
        try:
            if registrations is None:
                model = create(self._blueprint)[0]
            else:
                with empty_parameters(registrations):
                    model = create(self._blueprint)[0]
            made = {name: tensor_of(model, name) for name in names}
        except (ModelError, AttributeError, KeyError):
            return None
        same = all(
            not tensor.is_meta and tensor.shape == tensor_of(self.model, name).shape for name, tensor in made.items()
        )
        return model if same else None


def _give(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Give a tensor these values, by their memory where it can be: so they are there once."""
    if (tensor.dtype, tensor.device, tensor.stride()) == (values.dtype, values.device, values.stride()):
        tensor.data = values.data
    else:
        tensor.copy_(values)


def _filtered(filter_fn: Any, state: dict[str, Any], model: nn.Module) -> Any:
    """As timm calls it: old ones take the state dict alone."""
    try:
        return filter_fn(state, model)
    except TypeError as error:
        try:
            return filter_fn(state)
        except TypeError:
            raise error from None


@contextmanager
def _loading_into(model: nn.Module, loaded: list[tuple[dict[str, Any], bool]]) -> Iterator[None]:
    """What the model is asked to load goes to `loaded`; a failure says that it was timm's."""

    def load_state_dict(state: dict[str, Any], strict: bool = True, **_: Any) -> Any:
        loaded.append((dict(state), strict))
        return torch.nn.modules.module._IncompatibleKeys([], [])

    own = model.__dict__
    own["load_state_dict"] = load_state_dict
    try:
        yield
    finally:
        del own["load_state_dict"]


def _classifiers(adaptation: Adaptation, table: Mapping[str, Any]) -> Iterator[str]:
    """The names of a classifier that has other classes than the checkpoint says, which may lack it then."""
    if adaptation.options.get("num_classes", 1000) == table.get("num_classes"):
        return
    names = table.get("classifier") or ()
    for name in (names,) if isinstance(names, str) else names:
        yield from (f"{name}.weight", f"{name}.bias")


def _outer_names(inner: nn.Module, outer: nn.Module) -> dict[str, str]:
    """What tensors of `inner` are called in `outer`, which holds its modules: the same objects. Empty: left out."""
    if inner is outer:
        return {}
    held = {id(tensor): name for name, tensor in _tensors(outer)}
    return {name: held.get(id(tensor), "") for name, tensor in _tensors(inner)}


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, module in walk(model):
        tables: list[dict[str, Any]] = [module._parameters, module._buffers]
        for table in tables:
            for leaf, tensor in table.items():
                if tensor is not None:
                    yield prefix + leaf, tensor
