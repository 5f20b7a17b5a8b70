"""Devices that compute, as a running model sees them: where buffers are, and when what was asked of them is done."""

from __future__ import annotations

import mmap
from typing import Any, Protocol

import torch

from ..engine.destinations import huge_map
from ..errors import BudgetError
from ..sizes import format_size


class Recipe(Protocol):
    """How a weight, or a part of one, is made in host memory."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def is_scratch(self) -> bool:
        """Whether there is nothing to make, and whoever has the buffer writes to it."""

    @property
    def by_rows(self) -> bool:
        """Whether some of its rows can be made without the others."""

    def make(self, into: torch.Tensor) -> None:
        """All of it, into a dense tensor in host memory."""

    def make_rows(self, begin: int, end: int, into: torch.Tensor) -> None:
        """`[begin:end]` of it, likewise."""


class Place(Protocol):
    """A device that computes. A stamp says when something that it was asked to do is done; None: it is."""

    device: torch.device

    def allocate(self, nbytes: int) -> torch.Tensor:
        """A flat uint8 tensor there."""

    def bring(self, recipe: Recipe, into: torch.Tensor, writable: Any) -> Any:
        """Make a weight into a tensor there, and give the stamp of that.

        Args:
            recipe: makes it. One with `parts` of more than 1 gives the recipe of each by `part(index)`.
            into: dense, of its shape and dtype.
            writable: a stamp, or several in a tuple: when the tensor may be written to. None: now.
        """

    def user(self) -> Any:
        """What the calling thread computes with: a stream."""

    def wait(self, stamp: Any) -> None:
        """Let what the calling thread asks for from now on wait for a stamp."""

    def stamp(self, user: Any) -> Any:
        """When all is done that a user was asked for until now."""


class HostPlace:
    """The CPU: weights are made where they are used, and what is done is done."""

    device = torch.device("cpu")

    def allocate(self, nbytes: int) -> torch.Tensor:
        """In a mapping of its own and of huge pages where there are any; a small one in the heap."""
        if nbytes < mmap.PAGESIZE:
            return torch.empty(nbytes, dtype=torch.uint8)
        try:
            return torch.frombuffer(huge_map(nbytes), dtype=torch.uint8, count=nbytes)
        except (OSError, MemoryError) as error:
            raise BudgetError(
                f"the system refused {format_size(nbytes)} for a weight that is made at use ({error}); others took "
                "memory since the load; free some, or load with a smaller ram",
                required=nbytes,
                limit=0,
            ) from error

    def bring(self, recipe: Recipe, into: torch.Tensor, writable: Any) -> None:
        """Made in place."""
        recipe.make(into)

    def user(self) -> None:
        """Nothing that works on when asked."""

    def wait(self, stamp: Any) -> None:
        """Nothing to wait for."""

    def stamp(self, user: Any) -> None:
        """Done."""
