"""Functions of a state dict in a mapping: presets, the user's filter, that of the model's kind, and transforms."""

from __future__ import annotations

import difflib
import functools
import hashlib
import inspect
import uuid
import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .._patterns import name_matches
from ..checkpoint import Checkpoint, TensorEntry
from ..errors import KeysError, UnsupportedError
from ..modeling.conversions import Conversion, Renaming
from ..modeling.describing import described
from ..modeling.skeleton import Skeleton
from ..modeling.targets import Target
from ..modeling.tracing import Change, Step, Tracing
from ..sizes import shown
from .names import Given
from .records import KeyRules
from .transforms import Transform

# What wrappers of modules put before names.
_FRONTS = ("module.", "_orig_mod.")
# Names that are told one by one.
_MOST_NAMES = 3


def make_names(given: Given, checkpoint: Checkpoint, skeleton: Skeleton, rules: KeyRules) -> Given:
    """What the functions make of the chosen tensors, under the names that they give them.

    Raises:
        KeysError: a function fails, or gives something else than tensors.
        UnsupportedError: it asks for the values of tensors.
    """
    steps = tuple(_steps(skeleton, rules))
    if not steps or not given.entries:
        return given
    tracing = Tracing(steps, _as_loaded(given.entries, checkpoint), checkpoint.source)
    idle = given.idle
    if tracing.left_out:
        first = given.entries[tracing.left_out[0]].key
        more = ", …" if len(tracing.left_out) > 1 else ""
        idle = (*idle, f"{tracing.what}: {len(tracing.left_out)} tensors are left out ({first!r}{more})")
    if tracing.own:
        more = ", …" if len(tracing.own) > 1 else ""
        idle = (
            *idle,
            f"{tracing.what}: {len(tracing.own)} tensors are the model's own ({tracing.own[0]!r}{more}), and count as "
            "not given",
        )
    asked = rules.preset is not None or rules.filter_fn is not None
    if asked and not tracing.made and tracing.entries.keys() == given.entries.keys():
        # As a rename that fits nothing: it is meant for another file.
        idle = (*idle, f"{tracing.what}: changed no key and no tensor")
    return replace(given, entries=tracing.entries, tracing=tracing, chosen=given.entries, idle=idle)


def _as_loaded(entries: Mapping[str, TensorEntry], checkpoint: Checkpoint) -> Mapping[str, TensorEntry]:
    """The tensors in the order in which a program has them that loads the file: functions may pair them by it."""
    if not checkpoint.order:
        return entries
    places = {id(checkpoint[key]): i for i, key in enumerate(checkpoint.order)}
    return dict(sorted(entries.items(), key=lambda row: places[id(row[1])]))


def _steps(skeleton: Skeleton, rules: KeyRules) -> list[Step]:
    steps = []
    preset, function = rules.preset, rules.filter_fn
    if preset is not None:
        shapes = {name: target.shape for name, target in skeleton.targets.items() if target.persistent}
        what = f"preset {preset.name!r}"
        # A preset is data of lowmem's own.
        steps.append(Step(what, lambda state: preset.apply(state, shapes), repr(preset)))
    if function is not None:
        named = getattr(function, "__qualname__", None) or repr(function)
        steps.append(_with_model(f"filter_fn {named}", function, skeleton.model))
    kind = skeleton.rules.filter_step()
    return steps if kind is None else [*steps, kind]


def _with_model(what: str, function: Callable[..., Mapping[str, Any]], model: nn.Module) -> Step:
    """A function as a step; one that has a place for a model is given that, as timm gives it.

    The second argument is one, unless it has a value already and is not called so. What such a function makes may
    hang on anything in the model, so it is never told that it is the same.
    """
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        places = [p for p in inspect.signature(function).parameters.values() if p.kind in kinds]
    except (TypeError, ValueError):
        places = []
    # Plans outlive models; while one is loaded it is there.
    known = weakref.ref(model)
    if len(places) > 1 and (places[1].default is inspect.Parameter.empty or places[1].name == "model"):
        return Step(what, lambda state: function(state, known()), uuid.uuid4().hex, known)
    return Step(what, function, owner=known)


def kind_of(skeleton: Skeleton) -> str:
    """What tells a module that its own kind converts from others: its class, its config, and its operations."""
    model = skeleton.model
    config = getattr(getattr(model, "config", None), "to_json_string", None)
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    return f"{kind} {config() if callable(config) else ''} {skeleton.rules.how_converted()}"


def odd_names(given: Given, finals: Mapping[str, str], state: Collection[str]) -> list[str]:
    """What functions gave that the model does not have, a sentence each; and a prefix that they may not have known.

    Args:
        given: what they gave. A name that they were given too is the checkpoint's, and nothing is said of it.
        finals: name → what became of it afterwards, where anything did.
        state: names of the model.
    """
    if given.tracing is None:
        return []
    what, said = given.tracing.what, []
    for front in _FRONTS:
        kept = [name for name in given.chosen if name in given.entries]
        if 2 * len(kept) > len(given.chosen) and all(name.startswith(front) for name in given.chosen):
            said.append(
                f"{what} was given names that begin with {front!r}: prefix={front[:-1]!r} (--prefix) takes them without"
            )
    odd = [name for name in given.entries if name not in given.chosen and finals.get(name, name) not in state]
    for name in odd[:_MOST_NAMES]:
        like = difflib.get_close_matches(finals.get(name, name), state, n=1)
        hint = f"; like it is {like[0]!r}" if like else ""
        said.append(f"{what} gives {name!r} (of {given.entries[name].key!r}), which the model does not have{hint}")
    return [*said, f"… ({len(odd)} such)"] if len(odd) > _MOST_NAMES else said


class Transforms:
    """What is done to tensors that feed certain targets.

    Args:
        source: the checkpoint, for messages.
        asked: names of the model, or patterns, with their transforms; the first that fits counts.
        state: the targets of the state dict.

    Raises:
        KeysError: a name that the model does not have.

    Attributes:
        by_target: name of the model → its transform.
    """

    def __init__(self, source: str, asked: tuple[tuple[str, Transform], ...], state: Mapping[str, Target]) -> None:
        self._source = source
        self.by_target: dict[str, Transform] = {}
        for pattern, transform in reversed(asked):
            names = [pattern] if pattern in state else [name for name in state if name_matches(name, pattern)]
            if not names:
                raise KeysError(
                    f"{source}: transforms: {shown(pattern)}: expected a tensor, a module or a pattern with *, found "
                    "no such name in the model"
                )
            self.by_target.update(dict.fromkeys(names, transform))

    def used(self, targets: Collection[str]) -> str:
        """What tells the transforms of these targets from others."""
        return "; ".join(f"{name}: {_told(t)}" for name, t in self.by_target.items() if name in targets)

    def conversion(
        self, name: str, entry: TensorEntry, target: Target, tracing: Tracing | None
    ) -> tuple[Conversion, Mapping[str, TensorEntry]]:
        """How a tensor becomes a target, and the tensors by the names that this has for them.

        Args:
            name: of the tensor, among the given ones.
            entry: the tensor.
            target: the target.
            tracing: what made the tensor, if anything did.

        Raises:
            KeysError: the transform cannot change it.
        """
        transform = self.by_target.get(target.name)
        if tracing is None or name not in tracing.made:
            tracing = Tracing((), {name: entry}, self._source)
        if transform is None:
            return tracing.conversion(name, target.name), tracing.given
        change = _change(transform, entry, target)
        return tracing.conversion(name, target.name, change, transform.what), tracing.given


def _told(transform: Transform) -> str:
    """What tells a transform from others; of a function that is not lowmem's own its text, if that says all."""
    function = transform.function
    if isinstance(function, functools.partial) and function.func.__module__ == Transform.__module__:
        return transform.what
    text = described(function) or uuid.uuid4().hex
    return f"{transform.what} {hashlib.sha256(text.encode()).hexdigest()}"


def _change(transform: Transform, entry: TensorEntry, target: Target) -> Change:
    def changed(tensor: torch.Tensor) -> torch.Tensor:
        try:
            return transform(tensor, target.shape)
        except ValueError as error:
            raise KeysError(
                f"{entry.file}: tensor {entry.key!r}: {transform.what} for {target.name!r}: {error}"
            ) from error

    return changed


def refuse_twice(name: str, entry: TensorEntry, renaming: Renaming) -> None:
    """Refuse what both a function and the model's own conversion would change.

    Raises:
        UnsupportedError: both do.
    """
    if name in renaming.converted:
        raise UnsupportedError(
            f"{entry.file}: tensor {entry.key!r}: expected one way for it to become {renaming.names[name]!r}, found a "
            "preset, filter or transform that changes it beside the model's own conversion; leave that tensor to the "
            "latter"
        )
