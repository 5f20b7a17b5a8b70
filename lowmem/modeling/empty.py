"""Build a model without its weights: parameters on meta, buffers real."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .._shared import Shared

_here = threading.local()
_register: Callable[..., None] = nn.Module.register_parameter


@dataclass(eq=False)
class Registrations:
    """What a build registered, in order, and which of it keeps its values.

    Attributes:
        real: numbers of the parameters that do not go to the meta device.
        made: what was registered, None where that is no parameter.
    """

    real: Collection[int] = ()
    made: list[nn.Parameter | None] = field(default_factory=list)


@contextmanager
def empty_parameters(registrations: Registrations | None = None) -> Iterator[None]:
    """Every parameter that this thread registers inside goes to the meta device; buffers keep their values.

    Those that `registrations` names by their number stay real: a second build of the same model, which registers the
    same in the same order, gives the initial values of some parameters for the memory of these.

    accelerate's `init_empty_weights` does the same, but makes a new object at each registration, which loses ties
    (`head.weight = embed.weight`), and acts on every thread. Here a parameter that is on meta already stays the
    object that it is. Buffers stay real because no checkpoint holds the non-persistent ones (rotary `inv_freq`).
    """
    with _emptying.changed():
        outer = getattr(_here, "empty", None)
        try:
            _here.empty = Registrations() if registrations is None else registrations
            yield
        finally:
            _here.empty = outer


def _begin() -> None:
    global _register
    _register = nn.Module.register_parameter
    nn.Module.register_parameter = _register_here  # type: ignore[method-assign, assignment]


def _end() -> None:
    nn.Module.register_parameter = _register  # type: ignore[method-assign]


_emptying = Shared(_begin, _end)


def _register_here(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
    _register(module, name, param)
    registrations: Registrations | None = getattr(_here, "empty", None)
    if registrations is None:
        return
    number = len(registrations.made)
    registrations.made.append(param)
    if param is None or param.is_meta or number in registrations.real:
        return
    if is_lazy(param) or nn.Parameter not in type(param).__mro__:
        return  # has no shape, or wraps a tensor subclass: refused by checks.py, with its name
    attributes: dict[str, Any] = dict(param.__dict__)
    kind: Any = type(param)
    if kind is nn.Parameter:
        moved = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        moved.__dict__.update(attributes)
    else:
        moved = kind(param.detach().to("meta"), requires_grad=param.requires_grad, **attributes)
    module._parameters[name] = registrations.made[number] = moved


@contextmanager
def real_tensors() -> Iterator[None]:
    """Tensors made inside without a device have values, also where the caller's default device is meta.

    Another default device stays what it is.
    """
    if torch.tensor([]).is_meta:
        with torch.device("cpu"):
            yield
    else:
        yield
