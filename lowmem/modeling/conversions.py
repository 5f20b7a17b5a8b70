"""What a kind of model makes of the checkpoint's tensors before they are its own: the records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from .._records import cheap_init

# What helps where an operation, which is not lowmem's own, does something else than it says.
REMEDY = "load this model with the library's own loader, and report the operation there"


@dataclass(frozen=True, slots=True)
class Renaming:
    """What a kind of model calls the checkpoint's tensors.

    Attributes:
        names: key → target name. A name that is no target makes the key an unexpected one.
        converted: keys that do not become their target as they are, but in another form or together with others; what
            the kind of model wants to know of them again. Their names are those of the first target they help to make.
    """

    names: Mapping[str, str]
    converted: Mapping[str, Any] = field(default_factory=dict)


@cheap_init
@dataclass(frozen=True, slots=True)
class Part:
    """A part of a tensor of the checkpoint that becomes a part of one of the model.

    Both ends as torch's `as_strided` takes them, in elements of a tensor that lies in row-major order, and of one
    shape.

    Attributes:
        key: the checkpoint's tensor.
        offset: first element there.
        strides: there.
        target: the model's tensor.
        into: first element there.
        into_strides: there.
        shape: of both ends.
    """

    key: str
    offset: int
    strides: tuple[int, ...]
    target: str
    into: int
    into_strides: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cost:
    """What an operation gives and takes.

    Attributes:
        results: shape and dtype (by torch's name) of each tensor that it gives.
        scratch: bytes at the worst moment besides sources and results.
    """

    results: tuple[tuple[tuple[int, ...], str], ...]
    scratch: int


# Name → tensor, and the same as it is to be loaded.
StateFunction = Callable[[dict[str, Any]], Mapping[str, Any]]


class Operation(Protocol):
    """An operation on whole tensors, which may be run several times."""

    def cost(self, dtype: str) -> Cost:
        """What it gives and takes when its sources are cast to `dtype` before."""

    def __call__(self, sources: list[torch.Tensor]) -> list[torch.Tensor]:
        """The model's tensors from the checkpoint's; it may empty the list to free them early."""


@dataclass(frozen=True, slots=True, eq=False)
class Conversion:
    """Tensors of the checkpoint that become others of the model together.

    Attributes:
        what: names of the operations, for messages.
        keys: the checkpoint's tensors, in order.
        targets: the model's tensors that they become; all get the dtype that the first would have.
        shapes: of the tensors that they become, in the order of `targets`.
        operation: computes the tensors of `targets` from those of `keys`.
        parts: which part of the one goes where in the other, all of `targets`; None when that could not be found out,
            so that `operation` must be run.
        dtype: of what `operation` gives, where the sources come as they are and the results are cast to their final
            dtype. Empty where the sources are cast before, to the final dtype of the first target.
    """

    what: str
    keys: tuple[str, ...]
    targets: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    operation: Operation
    parts: tuple[Part, ...] | None = None
    dtype: str = ""
