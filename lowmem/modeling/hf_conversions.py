"""transformers' own description of how a checkpoint's tensors become a model's, read and not repeated.

`conversion_mapping.get_model_conversion_mapping` gives renamings and converters (`core_model_loading.WeightRenaming`,
`WeightConverter`, transformers 5). Keys are renamed by transformers' own function. What a converter does is found out
by running it on tensors without values (`following`), so that its operations need not be known here; one that cannot
be followed is run on the values, a group of tensors at a time.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import pickle
import traceback
import uuid
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from .._strides import Shape, columns
from ..checkpoint import TensorEntry
from ..errors import KeysError
from .conversions import Conversion, Cost, Part, Renaming
from .following import Followed, NotFollowedError, follow, refusals
from .rehearsing import Counting, rehearse
from .targets import Target, dtype_name

# Transforms of one key know nothing of the keys before it; any other may, and wants them in transformers' order.
_ALONE = ("WeightRenaming", "WeightConverter", "PrefixChange", "Inkling2IndexOffsetWeightRename")


@dataclass(frozen=True, slots=True)
class _Match:
    """Which converter a key belongs to, and which of its patterns it bears."""

    converter: Any
    pattern: str


# These look at nothing of the model but the shape of the first target, and at the whole config.
_SHAPES_ONLY = ("MergeModulelist", "Concatenate", "Transpose", "Interleave", "Conv3dToLinear", "PermuteForRope")

_VALUES = "; if it asks for the values of tensors, it cannot be planned: load with from_pretrained and save that once"

# target → shape, and for each piece: source, first element there, strides there, the same of the target, shape.
_Followings = dict[str, tuple[Shape, list[tuple[int, int, Shape, int, Shape, Shape]]]]


def _looks_at_shapes_only(operation: Any) -> bool:
    cls = type(operation)
    return cls.__module__ == "transformers.core_model_loading" and cls.__name__ in _SHAPES_ONLY


def _transforms_of(model: Any, key_mapping: Mapping[str, str] | None) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    return list(get_model_conversion_mapping(model, dict(key_mapping) if key_mapping else None))


def _parted(transforms: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """What renames keys, and what converts their tensors."""
    from transformers.core_model_loading import WeightConverter

    renamings: list[Any] = []
    converters: list[Any] = []
    for transform in transforms:
        (converters if isinstance(transform, WeightConverter) else renamings).append(transform)
    return renamings, converters


def reported(model: nn.Module, keys: Sequence[str], key_mapping: Mapping[str, str] | None = None) -> set[str]:
    """Keys that a model does not use, as transformers reports them: under the names that its renames give them.

    Args:
        model: a transformers model.
        keys: of the checkpoint.
        key_mapping: as for `HFConversions`.
    """
    from transformers.core_model_loading import rename_source_key

    hf: Any = model
    renamings, converters = _parted(_transforms_of(hf, key_mapping))
    state = dict.fromkeys(hf.state_dict(), True)
    names: set[str] = set()
    for key in sorted(keys):
        name, pattern = rename_source_key(key, renamings, converters, hf.base_model_prefix, state)
        targets = next((c.target_patterns for c in converters if pattern in c.source_patterns), None)
        names |= {name} if targets is None else {name.replace(targets[0], target) for target in targets}
    return names


class HFConversions:
    """The conversions of one model.

    Args:
        model: a transformers model.
        key_mapping: regular expression → replacement, applied before transformers' own.
    """

    def __init__(self, model: nn.Module, key_mapping: Mapping[str, str] | None = None) -> None:
        self._model: Any = model
        self._key_mapping = key_mapping
        self._transforms: list[Any] = []

    @property
    def used(self) -> list[Any]:
        """Those that the last renaming used; `save_pretrained` reverts them."""
        return [transform for transform in self._transforms if transform.was_used()]

    def described(self) -> str:
        """What the operations are and do: transformers' version, their settings, and the source of foreign ones."""
        import transformers

        operations = [op for transform in self._transforms for op in getattr(transform, "operations", ())]
        return "; ".join([f"transformers {transformers.__version__}", *map(_described, operations)])

    def rename(self, entries: Mapping[str, TensorEntry], state: Mapping[str, Target]) -> Renaming:
        """Old names, scoped prefixes, converters and the base model's prefix, by transformers' own functions.

        Args:
            entries: the checkpoint's tensors by their keys.
            state: the targets of the state dict.
        """
        from transformers.core_model_loading import dot_natural_key, rename_source_key

        self._transforms = _transforms_of(self._model, self._key_mapping)
        renamings, converters = _parted(self._transforms)
        # As transformers has it: of two with one pattern the last counts.
        matches = {
            pattern: _Match(converter, pattern) for converter in converters for pattern in converter.source_patterns
        }
        prefix = self._model.base_model_prefix
        keys: Sequence[str] = list(entries)
        if any(type(t).__name__ not in _ALONE for t in self._transforms):
            keys = sorted(keys, key=dot_natural_key)
        # It looks names up with .get() and compares with None.
        known = dict(state)
        names: dict[str, str] = {}
        converted: dict[str, _Match] = {}
        for key in keys:
            name, pattern = rename_source_key(key, renamings, converters, prefix, known)
            if name not in state and key in state:
                name, pattern = rename_source_key(key, [], [], prefix, known)
            names[key] = name
            if pattern is not None and name in state:
                converted[key] = matches[pattern]
        return Renaming(names, converted)

    def convert(
        self, entries: Mapping[str, TensorEntry], renaming: Renaming, state: Mapping[str, Target]
    ) -> list[Conversion]:
        """How the converted keys become targets, a group each.

        Args:
            entries: the checkpoint's tensors by their keys.
            renaming: what `rename` made of these.
            state: the targets of the state dict.

        Raises:
            KeysError: transformers cannot convert them.
        """
        groups: dict[tuple[str, int], list[str]] = defaultdict(list)
        for key, match in renaming.converted.items():
            groups[renaming.names[key], id(match.converter)].append(key)
        conversions = []
        missing = set(state)
        known: dict[Any, _Followings] = {}
        order = _natural_order()
        for (name, _), keys in groups.items():
            keys.sort(key=order)
            matches = tuple(renaming.converted[key] for key in keys)
            group = _Group(self._model, name, tuple(keys), matches, entries, missing)
            conversions.append(group.convert(state[name], known))
        return conversions


def _natural_order() -> Callable[[str], list[Any]]:
    """transformers' `dot_natural_key`, asked once for each component: tens of thousands of experts share a few."""
    from transformers.core_model_loading import dot_natural_key

    part_of = functools.cache(lambda part: dot_natural_key(part)[0])
    return lambda key: list(map(part_of, key.split(".")))


@dataclass(frozen=True, slots=True)
class _Group:
    """Keys that one converter makes into its targets together."""

    model: Any = field(repr=False)
    name: str
    keys: tuple[str, ...]
    matches: tuple[_Match, ...]
    entries: Mapping[str, TensorEntry] = field(repr=False)
    missing: set[str] = field(repr=False)

    @property
    def what(self) -> str:
        return "+".join(type(operation).__name__ for operation in self.matches[0].converter.operations)

    def convert(self, target: Target, known: dict[Any, _Followings]) -> Conversion:
        """Find out what becomes of the keys.

        Args:
            target: the first that they help to make.
            known: what was found out of groups that are alike; most layers of a model are.

        Raises:
            KeysError: transformers cannot convert them.
        """
        shapes = tuple(self.entries[key].shape for key in self.keys)
        converter = self.matches[0].converter
        alike = (id(converter), tuple(match.pattern for match in self.matches), shapes, target.shape, target.dtype)
        found = known.get(alike)
        if found is None:
            try:
                found = self._follow(shapes, getattr(torch, target.dtype))
            except Exception as error:
                return self._to_compute(target, error)
            # The name of one result is that of the group.
            if list(found) == [self.name] and all(_looks_at_shapes_only(op) for op in converter.operations):
                known[alike] = found
        else:
            found = {self.name: next(iter(found.values()))}
        keys, targets = self.keys, tuple(found)
        parts = [
            Part(keys[source], offset, strides, name, into, into_strides, shape)
            for name, (_, pieces) in found.items()
            for source, offset, strides, into, into_strides, shape in pieces
        ]
        operation = _ConverterOperation(self, targets)
        return Conversion(self.what, keys, targets, tuple(s for s, _ in found.values()), operation, tuple(parts))

    def _follow(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> _Followings:
        refused = refusals()
        # What it makes itself has no memory.
        with torch.device("meta"):
            results = _ConverterOperation(self, ()).run([follow(i, shape, dtype) for i, shape in enumerate(shapes)])
        if refusals() != refused:
            raise NotFollowedError("code that goes on where it cannot be followed")
        found: _Followings = {}
        for name, result in results.items():
            if not isinstance(result, Followed):
                raise NotFollowedError("a tensor that is made of no source")
            pieces = []
            for piece in result.pieces:
                shape, into, strides = columns(piece.dimensions)
                pieces.append((piece.source, piece.offset, strides, piece.into, into, shape))
            found[name] = tuple(result.shape), pieces
        return found

    def _to_compute(self, target: Target, reason: Exception) -> Conversion:
        """Find out what the operations give, without values; `reason`: why they could not be followed."""
        traceback.clear_frames(reason.__traceback__)
        try:
            results = _ConverterOperation(self, ()).rehearse(target.dtype, Counting())
        except Exception as error:
            # Where torch refuses too, what was said first says more.
            first = error if isinstance(reason, NotFollowedError) else reason
            raise self._failed(first, maybe_values=first is error) from first
        shapes = tuple(tuple(result.shape) for result in results.values())
        return Conversion(self.what, self.keys, tuple(results), shapes, _ConverterOperation(self, tuple(results)))

    def _failed(self, error: Exception, maybe_values: bool) -> KeysError:
        first = self.entries[self.keys[0]]
        more = f" and {len(self.keys) - 1} more" if len(self.keys) > 1 else ""
        return KeysError(
            f"{first.file}: tensor {first.key!r}{more} cannot become {self.name!r} of "
            f"{type(self.model).__name__}: transformers' conversion ({self.what}) failed: {error}; bring the shards "
            f"that are missing, or the checkpoint that belongs to the config{_VALUES if maybe_values else ''}"
        )


@dataclass(frozen=True, slots=True)
class _ConverterOperation:
    """A converter of transformers, run on a group."""

    group: _Group
    targets: tuple[str, ...]

    def cost(self, dtype: str) -> Cost:
        """What it gives and takes when its sources are cast to `dtype` before."""
        counting = Counting()
        results = self.rehearse(dtype, counting)
        ends = [(tuple(results[name].shape), dtype_name(results[name].dtype)) for name in self.targets]
        return Cost(tuple(ends), max(0, counting.most - sum(result.nbytes for result in results.values())))

    def rehearse(self, dtype: str, counting: Counting) -> dict[str, torch.Tensor]:
        """Target name → tensor without values, from sources that are cast to `dtype` before.

        Args:
            dtype: name of the dtype.
            counting: counts what is made meanwhile.
        """
        return rehearse(counting, lambda device: self._sources(dtype, device), self.run)

    def _sources(self, dtype: str, device: str) -> list[torch.Tensor]:
        return [
            torch.empty(self.group.entries[key].shape, dtype=getattr(torch, dtype), device=device)
            for key in self.group.keys
        ]

    def __call__(self, sources: list[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors of `targets`; `sources` is empty afterwards."""
        results = self.run(sources)
        return [results[name] for name in self.targets]

    def run(self, sources: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Target name → tensor, by transformers' own `convert`; `sources` is empty afterwards."""
        from transformers.core_model_loading import SkipParameters

        group = self.group
        converter = copy.deepcopy(group.matches[0].converter)
        converter.collected_tensors.clear()
        for key, match in zip(group.keys, group.matches, strict=True):
            converter.add_tensor(group.name, key, match.pattern, sources.pop(0))
        # Operations may look at what is missing yet, and take out what they bring.
        info = SimpleNamespace(missing_keys=group.missing, conversion_errors={})
        try:
            with torch.no_grad():
                results = converter.convert(group.name, model=group.model, config=group.model.config, loading_info=info)
        except SkipParameters as skipped:
            raise skipped.__context__ or skipped from None
        found = {name: made[0] if isinstance(made, list) else made for name, made in results.items()}
        for name, made in found.items():
            if not isinstance(made, torch.Tensor):
                raise TypeError(f"it gives {name!r} as {type(made).__name__}, which is no tensor")
        # Sources are cast for the first.
        return dict(sorted(found.items(), key=lambda row: row[0] != group.name))


def _described(operation: Any) -> str:
    """An operation's class, settings and source; another text each time where that cannot be told."""
    cls = type(operation)
    try:
        settings = hashlib.sha256(pickle.dumps(vars(operation))).hexdigest()
        source = "" if cls.__module__.startswith("transformers.") else inspect.getsource(cls)
    except Exception:
        return f"{cls.__module__}.{cls.__qualname__} {uuid.uuid4().hex}"
    return f"{cls.__module__}.{cls.__qualname__} {settings} {source}"
