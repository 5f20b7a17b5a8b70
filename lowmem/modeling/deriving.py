"""Code on tensors without values that goes on where it cannot be followed.

`following` tells where the elements of a result come from, as long as they are only moved. Inside of a `Deriving` any
other function of torch gives a tensor too, of which it is known only which sources it was made of: whoever wants its
values runs the code again with the values of these, and of no others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .following import HERE, Followed, derived, refuse

# What gives no tensor but a value, or tensors whose shape depends on values.
_VALUES = frozenset(
    {"_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "unique", "_unique2", "masked_select"}
)


class Deriving:
    """Inside, every function of torch gives something of tensors without values."""

    def __init__(self) -> None:
        # Sources that were written into a tensor after it was made, by its storage; all that lies there has them.
        self._written: dict[int, frozenset[int]] = {}
        # A number of a storage is another's when that is gone.
        self._kept: list[torch.UntypedStorage] = []

    def __enter__(self) -> Deriving:
        self._outer = HERE.deriver
        HERE.deriver = self
        return self

    def __exit__(self, *_: object) -> None:
        HERE.deriver = self._outer

    def takes(self, tensor: torch.Tensor) -> frozenset[int]:
        """Numbers of the sources that a tensor is made of."""
        own = tensor.takes if isinstance(tensor, Followed) else frozenset()
        return own | self._written.get(_storage(tensor)._cdata, frozenset()) if self._written else own

    def is_changed(self, arguments: Any) -> bool:
        """Whether one of the tensors was written into."""
        return bool(self._written) and any(_storage(t)._cdata in self._written for t in _tensors(arguments))

    def derive(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a function of torch gives, by tensors of the meta device.

        Raises:
            NotFollowedError: it asks for values.
        """
        name = func.overloadpacket.__name__
        if name in _VALUES:
            raise refuse("the values of a tensor")
        takes = frozenset[int]().union(*(self.takes(t) for t in _tensors((args, kwargs))))
        on_meta = {key: _like(value) for key, value in kwargs.items()}
        if "device" in on_meta:
            on_meta["device"] = torch.device("meta")
        try:
            made = func(*map(_like, args), **on_meta)
        except NotImplementedError as error:
            raise refuse(f"torch's {name}: {error}") from error
        written = [
            args[i] if i < len(args) else kwargs.get(argument.name)
            for i, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        for tensor in _tensors(written):
            self._write(tensor, takes)
        if written:
            return written[0] if len(written) == 1 else tuple(written)
        if isinstance(made, torch.Tensor):
            return derived(made, takes)
        if not isinstance(made, (list, tuple)):
            raise refuse("the values of a tensor")
        return type(made)(derived(one, takes) if isinstance(one, torch.Tensor) else one for one in made)

    def _write(self, tensor: torch.Tensor, takes: frozenset[int]) -> None:
        storage = _storage(tensor)
        self._kept.append(storage)
        self._written[storage._cdata] = self._written.get(storage._cdata, frozenset()) | takes


def _storage(tensor: torch.Tensor) -> Any:
    return (tensor.like if isinstance(tensor, Followed) else tensor).untyped_storage()


def _like(value: Any) -> Any:
    """The argument with tensors of the meta device."""
    if isinstance(value, Followed):
        return value.like
    if isinstance(value, torch.Tensor):
        return (
            value
            if value.is_meta
            else torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        )
    if isinstance(value, (list, tuple)):
        return type(value)(map(_like, value))
    return value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
