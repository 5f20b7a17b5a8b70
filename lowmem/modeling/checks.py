"""What a module must not be, for its weights to be set from outside: checked once, before anything is planned."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..errors import ModelError
from ..int8 import Int8Linear
from .sharding import is_sharded
from .targets import is_bitsandbytes, walk

# What these packages do to a state dict on the way in is for files of older versions: keys renamed, dropped or
# resized (torchvision's MLP and FrozenBatchNorm2d, torch's weight_norm). Keys of the model's own names pass unchanged,
# and any others are a KeysError here.
_HARMLESS = ("torch", "torchvision", "timm", "torchmetrics", "transformers")
_INSTEAD = "load the checkpoint with torch's load_state_dict"


def checked_modules(model: nn.Module, transformers: bool) -> Iterator[tuple[str, nn.Module]]:
    """`walk`, refusing a model that would compute with other weights than those that the load sets.

    Refused are modules whose weights are held elsewhere (accelerate's hooks, TorchScript, tensor subclasses), not
    there yet (lazy parameters), without a name in a state dict (cycles, dots), or made from the state dict by code
    of their own. For the last, the rule is:

    - `set_extra_state` and `_save_to_state_dict` overridden: state beyond parameters and buffers, always refused;
    - `_load_from_state_dict` overridden, or a `load_state_dict` pre-hook: may change any value, so refused, except
      where torch, torchvision, timm, torchmetrics or transformers brought it, and in a transformers model:
      `from_pretrained` never runs either.

    Each module is yielded once it is checked, so that one pass over tens of thousands serves this and the reader.

    Args:
        model: any module.
        transformers: whether `model` is a transformers model.

    Raises:
        ModelError: with the path of the module or tensor, what was found there, and the remedy.
    """
    problems: dict[type, str | None] = {}
    for prefix, module in walk(model):
        kind = type(module)
        if kind not in problems:
            problems[kind] = _problem_of(kind, transformers)
        if (problem := problems[kind]) and not is_bitsandbytes(module):
            raise ModelError(f"{_place(prefix, module)}: {problem}")
        if "_hf_hook" in vars(module):
            raise ModelError(
                f"{_place(prefix, module)}: expected no accelerate hooks, found {type(module._hf_hook).__name__} "
                "of a former load, dispatch or offload, which would bring back the old weights; call "
                "accelerate.hooks.remove_hook_from_submodules(model), or give a fresh model"
            )
        if any(getattr(hook, "is_of_lowmem", False) for hook in module._forward_pre_hooks.values()):
            raise ModelError(
                f"{_place(prefix, module)}: expected no weights on disk, found those of a former load, whose files the "
                "model still uses; call lowmem.release(model) first, or give a fresh model"
            )
        _check_names(prefix, module)
        _check_tensors(prefix, module)
        if module._load_state_dict_pre_hooks and not transformers and not is_bitsandbytes(module):
            _check_hooks(_place(prefix, module), module._load_state_dict_pre_hooks.values())
        yield prefix, module


def refuse_hidden(model: nn.Module) -> None:
    """Refuse modules in lists that are no children, and that nothing can fill.

    Of a model that lowmem builds they are on meta as all the rest, and no state dict has them (LLaVA's towers).

    Raises:
        ModelError: with the path of the list.
    """
    held: dict[int, str] = {}
    hidden: list[tuple[str, nn.Module]] = []
    for prefix, module in walk(model):
        held.update({id(p): prefix for p in module._parameters.values() if p is not None})
        for name, value in vars(module).items():
            if isinstance(value, (list, tuple)) and value and isinstance(value[0], nn.Module):
                hidden += [(prefix + name, inner) for inner in value if isinstance(inner, nn.Module)]
    for path, inner in hidden:
        lost = [name for name, p in inner.named_parameters() if p.is_meta and id(p) not in held]
        if lost:
            raise ModelError(
                f"module {path!r}: it is in a list, so that no state dict has its {len(lost)} tensors ({lost[0]!r}, …) "
                f"and no source is for it; give it one ({{'': ..., {path!r}: ...}}), or build the model yourself and "
                "pass the module"
            )


def _place(prefix: str, module: nn.Module) -> str:
    kind = type(module).__name__
    return f"module {prefix[:-1]!r} ({kind})" if prefix else f"model ({kind})"


def _problem_of(kind: type[nn.Module], transformers: bool) -> str | None:
    """What forbids modules of this class, or None."""
    if issubclass(kind, torch.jit.ScriptModule):
        return "expected a torch.nn.Module in Python, found TorchScript, whose weights cannot be replaced from outside"
    if issubclass(kind, Int8Linear):
        # What it adds to a state dict is known here.
        return None
    if kind.set_extra_state is not nn.Module.set_extra_state:
        return f"it keeps extra state (set_extra_state), which lowmem cannot fill; {_INSTEAD}"
    if not kind._save_to_state_dict.__module__.startswith("torch.nn."):  # torch.nn's lazy modules are harmless
        return f"it stores its state in a form of its own (packed parameters), which lowmem cannot fill; {_INSTEAD}"
    load: Any = kind._load_from_state_dict
    if load is not nn.Module._load_from_state_dict and not transformers and not _is_harmless(load):
        return f"it loads by code of its own (_load_from_state_dict), which lowmem does not run; {_INSTEAD}"
    return None


def _check_names(prefix: str, module: nn.Module) -> None:
    """Refuse names that no state dict could address."""
    for table in (module._parameters, module._buffers, module._modules):
        for leaf in table:
            if not isinstance(leaf, str) or not leaf or "." in leaf:
                raise ModelError(f"{_place(prefix, module)}: expected names without a dot, found {leaf!r}; rename it")


def _check_tensors(prefix: str, module: nn.Module) -> None:
    """Refuse tensors that lowmem could not rebuild."""
    for table in (module._parameters, module._buffers):
        for leaf, tensor in table.items():
            kind = type(tensor)
            if kind is nn.Parameter or kind is torch.Tensor or tensor is None:
                continue
            if getattr(tensor, "is_released", False):
                continue  # what is left of weights on disk: nothing but a shape
            if is_lazy(tensor):
                raise ModelError(
                    f"{_place(prefix, module)}: tensor {prefix + leaf!r} is lazy and has no shape yet; run one dummy "
                    "forward first, and give lowmem the module"
                )
            if is_sharded(tensor):
                # What it is made of is a plain tensor here, or is refused.
                inner: Any = tensor
                tensor, kind = inner._local_tensor, nn.Parameter
            # A parameter around a tensor subclass keeps the class of what it holds.
            if nn.Parameter not in kind.__mro__ or type(tensor.data) not in (torch.Tensor, nn.Parameter, kind):
                raise ModelError(
                    f"{_place(prefix, module)}: tensor {prefix + leaf!r}: expected a plain torch tensor, found "
                    f"{kind.__name__}, which lowmem cannot rebuild; load before the tensors are wrapped, or {_INSTEAD}"
                )


def _check_hooks(where: str, hooks: Iterable[Any]) -> None:
    for hook in hooks:
        function = getattr(hook, "hook", hook)
        while isinstance(function, functools.partial):
            function = function.func
        if not _is_harmless(function):
            name = getattr(function, "__qualname__", type(function).__name__)
            raise ModelError(
                f"{where}: its load_state_dict pre-hook {name} may rename or change weights, and lowmem does not run "
                f"it; {_INSTEAD}, or, if the checkpoint has the model's own names and values, remove the hook"
            )


def _is_harmless(function: Any) -> bool:
    return (getattr(function, "__module__", None) or "").partition(".")[0] in _HARMLESS
