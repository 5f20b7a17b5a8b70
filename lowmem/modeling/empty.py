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

from ..errors import ModelError

_here = threading.local()
_lock = threading.Lock()
_users = 0
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
    outer = getattr(_here, "empty", None)
    with _hearing():
        _here.empty = Registrations() if registrations is None else registrations
        try:
            yield
        finally:
            _here.empty = outer


@contextmanager
def few_parameters(most: int, where: str) -> Iterator[None]:
    """This thread registers at most so many parameters inside.

    Each costs memory and time on the meta device too, and a config may ask for any number of layers.

    Args:
        most: how many.
        where: what is refused otherwise.

    Raises:
        ModelError: there are more.
    """
    outer = getattr(_here, "room", None)
    with _hearing():
        _here.room = [most, most, where]
        try:
            yield
        finally:
            _here.room = outer


@contextmanager
def _hearing() -> Iterator[None]:
    global _users, _register
    with _lock:
        if not _users:
            _register = nn.Module.register_parameter
            nn.Module.register_parameter = _register_here  # type: ignore[method-assign, assignment]
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                nn.Module.register_parameter = _register  # type: ignore[method-assign]


def _register_here(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
    _register(module, name, param)
    room = getattr(_here, "room", None)
    if room is not None:
        room[0] -= 1
        if room[0] < 0:
            raise ModelError(
                f"{room[2]}: describes a model of more than {room[1]} parameters, many times what the checkpoint "
                "holds; bring the config.json that belongs to the checkpoint, or give model="
            )
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
