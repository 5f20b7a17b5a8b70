"""The parameters and buffers of a model, as records."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from .._records import cheap_init
from ..errors import ModelError
from ..int8 import Int8Linear
from .sharding import Sharding, sharding_of

# Nearly all tensors are of these, and are not asked how they are divided.
_PLAIN = (torch.Tensor, nn.Parameter)


@cheap_init
@dataclass(frozen=True, slots=True)
class Target:
    """One parameter or buffer of the model.

    Attributes:
        name: dotted name in the model.
        shape: in elements.
        dtype: name of the torch dtype that the model gave it.
        kind: `"parameter"` or `"buffer"`.
        persistent: whether it belongs to the state dict.
        tie: name of the first target that shares its tensor; its own name when nothing does.
        real: whether it has values already, that is, does not lie on the meta device.
        scales: of the weight of an `Int8Linear`, the name of the target with its row scales; else empty.
        floats: of such a weight, the dtype that it had when it was floats; else empty.
        turned: the weight of GPT-2's `Conv1D`, or of what stands in its place: the floats of a checkpoint are the
            transpose of its int8.
        sharding: of a DTensor, how it is divided among ranks, of which each holds a part of `shape`; else None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str
    persistent: bool
    tie: str
    real: bool
    scales: str = ""
    floats: str = ""
    turned: bool = False
    sharding: Sharding | None = None


def read_targets(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, Target]:
    """All parameters and buffers of a model, by name, in its order. `modules` is what `walk` yields."""
    targets: dict[str, Target] = {}
    first: dict[int, str] = {}

    def add(
        name: str, tensor: torch.Tensor, kind: str, persistent: bool, scales: str = "", turned: bool = False
    ) -> None:
        tie = first.setdefault(id(tensor), name)
        dtype, real = dtype_name(tensor.dtype), not tensor.is_meta
        sharding = None if type(tensor) in _PLAIN else sharding_of(tensor, name)
        targets[name] = Target(
            name, tuple(tensor.shape), dtype, kind, persistent, tie, real, scales, turned=turned, sharding=sharding
        )

    # Models have few classes, and calls are what reading them costs.
    transposed: dict[type, bool] = {}
    # Shared modules count under each of their names, as in the state dict.
    for prefix, module in modules:
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                scaled = leaf == "weight" and isinstance(module, Int8Linear)
                kind = type(module)
                if kind not in transposed:
                    transposed[kind] = is_conv1d(module)
                across = leaf == "weight" and transposed[kind]
                add(prefix + leaf, parameter, "parameter", True, f"{prefix}SCB" if scaled else "", across)
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                add(prefix + leaf, buffer, "buffer", leaf not in module._non_persistent_buffers_set)
    return targets


def _has_base(module: nn.Module, name: str, package: str) -> bool:
    return any(base.__name__ == name and base.__module__.startswith(package) for base in type(module).__mro__)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is a `Conv1D` of transformers: a linear layer that keeps the transpose of its weight."""
    return _has_base(module, "Conv1D", "transformers.")


def is_bitsandbytes(module: nn.Module) -> bool:
    """Whether it is a `Linear8bitLt` whose weight is int8."""
    if not _has_base(module, "Linear8bitLt", "bitsandbytes."):
        return False
    return not getattr(module.__dict__.get("state"), "has_fp16_weights", True)


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(prefix, module) in the order of `named_modules`, whose nested generators cost more than all the rest here.

    Raises:
        ModelError: a module is inside itself.
    """
    yield "", model
    # Iterators instead of lists of children: a collector's pass costs more than the walk, and lists would call for it.
    above: dict[int, str] = {id(model): ""}
    path = [("", id(model), iter(model._modules.items()))]
    while path:
        prefix, parent, children = path[-1]
        for leaf, module in children:
            if module is None:
                continue
            inner = f"{prefix}{leaf}."
            if id(module) in above:
                outer = repr(above[id(module)][:-1]) if above[id(module)] else "the model itself"
                raise ModelError(
                    f"module {inner[:-1]!r} is {outer}, which it is inside of: expected a tree of modules, found a "
                    "cycle; keep the reference outside of the module's children, for example in a list"
                )
            yield inner, module
            if module._modules:
                above[id(module)] = inner
                path.append((inner, id(module), iter(module._modules.items())))
                break
        else:
            del above[parent]
            path.pop()


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """`"bfloat16"` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def join_declared(targets: dict[str, Target], declared: Mapping[str, str]) -> dict[str, Target]:
    """Merge tie groups that are only declared; a group is named after its first member in the model's order.

    Args:
        targets: as `read_targets` found them.
        declared: name → name pairs that share a tensor although the objects differ now (transformers declares these).
    """
    if not declared:
        return targets
    root = {name: target.tie for name, target in targets.items()}

    def find(name: str) -> str:
        while root[name] != name:
            name = root[name]
        return name

    order = {name: i for i, name in enumerate(targets)}
    for name, other in declared.items():
        if name in root and other in root:
            a, b = sorted((find(name), find(other)), key=order.__getitem__)
            root[b] = a
    return {
        name: target if (tie := find(name)) == target.tie else _with_tie(target, tie)
        for name, target in targets.items()
    }


def _with_tie(target: Target, tie: str) -> Target:
    return replace(target, tie=tie)


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the target `name`, and the leaf name there."""
    path, _, leaf = name.rpartition(".")
    return (model.get_submodule(path) if path else model), leaf


def tensor_of(model: nn.Module, name: str) -> torch.Tensor:
    """The tensor that the model holds under `name` now."""
    owner, leaf = owner_of(model, name)
    tensor: torch.Tensor | None = owner._parameters.get(leaf)
    if tensor is None:
        tensor = owner._buffers[leaf]
    assert tensor is not None
    return tensor


@dataclass(frozen=True)
class Uses:
    """How a model uses its weights, as far as their modules tell: names.

    Attributes:
        by_rows: matrices of torch's linear layers and embeddings, which can do with some rows at a time.
        looked_up: those of embeddings alone.
        in_parts: of three dimensions, and not of one of torch's own modules: experts, of which some are used.
    """

    by_rows: frozenset[str]
    looked_up: frozenset[str]
    in_parts: frozenset[str]


def uses_of(model: nn.Module) -> Uses:
    """How a model uses its weights."""
    by_rows, looked_up, in_parts = [], [], []
    for prefix, module in walk(model):
        kind = type(module)
        if kind in (nn.Linear, nn.Embedding):
            by_rows.append(f"{prefix}weight")
            if kind is nn.Embedding:
                looked_up.append(f"{prefix}weight")
        elif not kind.__module__.startswith("torch.nn."):
            in_parts += [prefix + leaf for leaf, p in module._parameters.items() if p is not None and p.dim() == 3]
    return Uses(frozenset(by_rows), frozenset(looked_up), frozenset(in_parts))
