"""What a kind of model decides for itself. `Rules` is the plain `nn.Module`; other kinds override what differs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import nn

from ..checkpoint import TensorEntry
from ..errors import ModelError
from .alone import alone
from .conversions import Conversion, Renaming
from .empty import real_tensors
from .targets import Target, owner_of, walk
from .tracing import Step


class Rules:
    """The rules of a plain `nn.Module`.

    Attributes:
        kind: name for reports.
        owns_dtypes: the model was built at its final dtypes, so the checkpoint's dtypes do not decide them.
        unties: tied tensors whose values differ in the checkpoint get each their own.
        no_split: class names of modules that must stay on one device.
        skip_keys: keyword names that accelerate's hooks must not move between devices.
    """

    kind = "torch.nn.Module"
    owns_dtypes = False
    unties = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.no_split: tuple[str, ...] = ()
        self.skip_keys: tuple[str, ...] = ()

    def declared_ties(self) -> Mapping[str, str]:
        """Targets that will share a tensor after the load, beyond those that share one now."""
        return {}

    def filter_step(self) -> Step | None:
        """What this kind does to a state dict, by a function that is run on tensors without values. None: nothing."""
        return None

    def rename(self, entries: Mapping[str, TensorEntry], targets: Mapping[str, Target]) -> Renaming:
        """Which target each key is for.

        Args:
            entries: the checkpoint's tensors by their keys, as far as those are renamed already.
            targets: the model's, of the state dict.
        """
        return Renaming({key: key for key in entries})

    def convert(
        self, entries: Mapping[str, TensorEntry], renaming: Renaming, targets: Mapping[str, Target]
    ) -> list[Conversion]:
        """How the keys become targets that do not do so as they are.

        Args:
            entries: the checkpoint's tensors by their keys.
            renaming: what `rename` gave for these.
            targets: the model's, of the state dict.

        Raises:
            KeysError, UnsupportedError: they cannot.
        """
        return []

    def how_converted(self) -> str:
        """What tells the operations of `convert` from others: equal texts mean equal results."""
        return ""

    def keep_fp32(self, dtype: str, names: Iterable[str]) -> set[str]:
        """Targets that the model itself wants in fp32 when the rest is `dtype`."""
        return set()

    def vocabularies(self) -> Mapping[int, str]:
        """Size of a vocabulary → the entry of the model's config that says so."""
        return {}

    def may_miss(self, names: Collection[str]) -> set[str]:
        """Those of `names` that this model may lack in the checkpoint without it being an error."""
        return set()

    def may_ignore(self, keys: Collection[str]) -> set[str]:
        """Those of the checkpoint's keys that this model never uses, which is nothing to report."""
        return set()

    def check_initialisable(self, names: Collection[str]) -> None:
        """Refuse before the load what `initialise` could not do.

        Raises:
            ModelError: a module with a missing tensor has no `reset_parameters`.
        """
        for name in names:
            owner, leaf = owner_of(self.model, name)
            if not callable(getattr(owner, "reset_parameters", None)):
                raise ModelError(
                    f"tensor {name!r} is not in the checkpoint, and {type(owner).__name__} has no reset_parameters to "
                    f"initialise {leaf!r} with; give a model that has values there"
                )

    def initialise(self, names: Collection[str]) -> None:
        """Give the allocated but uninitialised tensors `names` the values of the model's own rule.

        Raises:
            ModelError: a module with a missing tensor has no `reset_parameters`.
        """
        self.check_initialisable(names)
        for path in sorted({name.rpartition(".")[0] for name in names}):
            module = self.model.get_submodule(path) if path else self.model
            leaves = {name.rpartition(".")[2] for name in names if name.rpartition(".")[0] == path}
            _reset_only(module, leaves)

    def settle(self, module: nn.Module) -> None:
        """What is done to each module when its tensors are in their place; by `finish`, which visits them all."""

    def finish(self, missing: Collection[str]) -> None:
        """After every tensor is in its place. `missing`: state-dict names that no key of the checkpoint fed."""
        lost: dict[int, str] = {}
        for prefix, module in walk(self.model):
            self.settle(module)
            for leaf, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:
                    lost.setdefault(id(buffer), prefix + leaf)
        if lost:
            first = next(iter(lost.values()))
            raise ModelError(
                f"buffer {first!r} is on the meta device and not in the checkpoint ({len(lost)} such); give lowmem a "
                "callable that builds the model, so that buffers keep their values"
            )


def _reset_only(module: nn.Module, leaves: Collection[str]) -> None:
    """Run `reset_parameters` so that it changes only `leaves`: the others lend it scratch tensors meanwhile."""
    kept = {leaf: p for leaf, p in module._parameters.items() if p is not None and leaf not in leaves}
    kept_buffers = {leaf: b for leaf, b in module._buffers.items() if b is not None and leaf not in leaves}
    try:
        for leaf, parameter in kept.items():
            # meta tensors take every in-place initialiser and cost nothing
            module._parameters[leaf] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        for leaf, buffer in kept_buffers.items():
            module._buffers[leaf] = buffer.to("meta")
        reset = module.reset_parameters
        assert callable(reset)
        with alone(), torch.no_grad(), real_tensors():
            reset()
    finally:
        module._parameters.update(kept)
        module._buffers.update(kept_buffers)
