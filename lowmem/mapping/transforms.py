"""Named changes of one tensor on its way into the model: position embeddings of another grid, rows, axes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .._strides import Shape


@dataclass(frozen=True, slots=True)
class Transform:
    """A change of one tensor.

    Made of torch's functions only: it is run once without values when the load is planned. What only moves elements
    about becomes moves; anything else is computed while loading, and its memory is in the plan.

    Attributes:
        what: how it was asked for, for messages, such as `"interpolate(grid=(16, 16))"`.
        function: of a tensor of the checkpoint and the shape of the model's. Raises `ValueError`, saying what was
            expected and found, for a tensor that it cannot change.
    """

    what: str
    function: Callable[[torch.Tensor, Shape], torch.Tensor]

    def __call__(self, tensor: torch.Tensor, shape: Shape) -> torch.Tensor:
        """The changed tensor; `shape` is that of the model's."""
        return self.function(tensor, shape)
