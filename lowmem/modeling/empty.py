"""Build a model without its weights: parameters on meta, buffers real."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def empty_parameters() -> Iterator[None]:
    """Every parameter that is registered inside goes to the meta device; buffers keep their values.

    accelerate's `init_empty_weights` does the same, but makes a new object at each registration, which loses ties
    (`head.weight = embed.weight`). Here a parameter that is on meta already stays the object that it is. Buffers
    stay real because no checkpoint holds the non-persistent ones (rotary `inv_freq`).
    """
    register: Callable[..., None] = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is None or param.is_meta:
            return
        attributes: dict[str, Any] = dict(param.__dict__)
        kind: Any = type(param)
        if kind is nn.Parameter:
            moved = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
            moved.__dict__.update(attributes)
        else:
            moved = kind(param.detach().to("meta"), requires_grad=param.requires_grad, **attributes)
        module._parameters[name] = moved

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
