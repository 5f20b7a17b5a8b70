"""What makes two transformers models the same: shared by the bench's parity matrix and the tests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn


def every_tensor(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers under each of their names, non-persistent buffers too."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit: dtype, shape, and every bit, NaNs included."""
    if (a.dtype, a.shape, a.device) != (b.dtype, b.shape, b.device):
        return False
    if a.is_meta:
        return True
    return torch.equal(_bits(a), _bits(b))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def ties_of(model: nn.Module) -> set[frozenset[str]]:
    """Groups of names that are one object."""
    return _groups((name, id(tensor)) for name, tensor in every_tensor(model).items())


def shared_memory_of(model: nn.Module) -> set[frozenset[str]]:
    """Groups of names whose values begin at one address, one object or not."""
    found = {name: tensor for name, tensor in every_tensor(model).items() if tensor.numel() and not tensor.is_meta}
    return _groups((name, tensor.data_ptr()) for name, tensor in found.items())


def _groups(pairs: Iterable[tuple[str, int]]) -> set[frozenset[str]]:
    groups: dict[int, set[str]] = {}
    for name, key in pairs:
        groups.setdefault(key, set()).add(name)
    return {frozenset(names) for names in groups.values() if len(names) > 1}


def differences_of(ours: Any, theirs: Any) -> Iterator[str]:
    """Everything that a user of a transformers model can see and that is not the same, a sentence each.

    Compared are the class, each parameter and buffer bit for bit (those outside of the state dict too) with its kind,
    `requires_grad` and strides, the order of the state dict, ties, each submodule's class, mode, description and plain
    tensor attributes, config and generation configs.
    """
    if type(ours) is not type(theirs):
        yield f"class: expected {type(theirs).__name__}, found {type(ours).__name__}"
        return
    found, expected = every_tensor(ours), every_tensor(theirs)
    if list(found) != list(expected):
        yield f"names: expected {_only(expected, found)} too, and not {_only(found, expected)}"
        return
    for name, tensor in expected.items():
        yield from _of_tensors(name, found[name], tensor)
    if list(ours.state_dict()) != list(theirs.state_dict()):
        yield f"state dict: its keys differ: {_only(theirs.state_dict(), ours.state_dict())} (or their order)"
    for what, groups in (("ties", ties_of), ("shared memory", shared_memory_of)):
        if groups(ours) != groups(theirs):
            yield f"{what}: expected {_sorted(groups(theirs))}, found {_sorted(groups(ours))}"
    for (path, module), other in zip(ours.named_modules(), theirs.modules(), strict=True):
        yield from _of_modules(path or "model", module, other)
    for name in ("dtype", "all_tied_weights_keys", "name_or_path"):
        yield from _of_values(name, getattr(ours, name), getattr(theirs, name))
    yield from _of_configs("config", ours.config, theirs.config)


def _of_tensors(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> Iterator[str]:
    if not same(ours, theirs):
        yield f"{name}: expected {_described(theirs)}, found {_described(ours)}"
    for what in ("requires_grad", "is_leaf"):
        yield from _of_values(f"{name}: {what}", getattr(ours, what), getattr(theirs, what))
    yield from _of_values(f"{name}: type", type(ours), type(theirs))
    if ours.shape == theirs.shape:
        yield from _of_values(f"{name}: strides", ours.stride(), theirs.stride())


def _of_modules(path: str, ours: Any, theirs: Any) -> Iterator[str]:
    yield from _of_values(f"{path}: class", _kind(ours), _kind(theirs))
    yield from _of_values(f"{path}: training", ours.training, theirs.training)
    yield from _of_values(f"{path}: description", ours.extra_repr(), theirs.extra_repr())
    for name, value in vars(theirs).items():
        mine = vars(ours).get(name)
        if isinstance(value, torch.Tensor) and not (isinstance(mine, torch.Tensor) and same(mine, value)):
            yield f"{path}.{name}, a plain attribute: expected {_described(value)}, found {mine!r}"
    mine, value = getattr(ours, "generation_config", None), getattr(theirs, "generation_config", None)
    if mine is None or value is None or isinstance(value, nn.Module):
        yield from _of_values(f"{path}: generation config", mine, value)
    else:
        yield from _of_values(f"{path}: generation config", mine.to_dict(), value.to_dict())


def _kind(module: nn.Module) -> Any:
    """The class; for a parametrized module, which has a class of its own, that of which it was made."""
    kind = type(module)
    return ("parametrized", kind.__mro__[1]) if kind.__name__.startswith("Parametrized") else kind


def _of_configs(path: str, ours: Any, theirs: Any) -> Iterator[str]:
    yield from _of_values(f"{path}: class", type(ours), type(theirs))
    yield from _of_values(path, ours.to_dict(), theirs.to_dict())
    for name in ("dtype", "_attn_implementation", "_experts_implementation"):
        yield from _of_values(f"{path}.{name}", getattr(ours, name, None), getattr(theirs, name, None))
    for name in getattr(theirs, "sub_configs", {}):
        inner = getattr(theirs, name, None)
        if inner is not None and hasattr(inner, "to_dict"):
            yield from _of_configs(f"{path}.{name}", getattr(ours, name, None), inner)


def _of_values(what: str, ours: Any, theirs: Any) -> Iterator[str]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in {**theirs, **ours}:
            if key not in ours or key not in theirs:
                yield f"{what}: {key!r} is {'missing' if key in theirs else 'too many'}"
            else:
                yield from _of_values(f"{what}[{key!r}]", ours[key], theirs[key])
    elif ours != theirs:
        yield f"{what}: expected {theirs!r}, found {ours!r}"


def _described(tensor: torch.Tensor) -> str:
    values = "" if tensor.is_meta or not tensor.numel() else f" {tensor.detach().reshape(-1)[:3].tolist()}..."
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}{values}"


def _only(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return [name for name in a if name not in b][:5]


def _sorted(groups: set[frozenset[str]]) -> list[list[str]]:
    return sorted(sorted(names) for names in groups)[:5]


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Every tensor in what a model returned, in order; caches and other objects are left out."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for inner in value.values() for tensor in tensors_in(inner)]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [tensor for inner in value for tensor in tensors_in(inner)]
    return []


def same_outputs(ours: Any, theirs: Any) -> bool:
    """Whether two models returned the same tensors, bit for bit, and at least one."""
    mine, others = tensors_in(ours), tensors_in(theirs)
    return bool(others) and len(mine) == len(others) and all(map(same, mine, others))
