"""What a running model uses at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .pages import Pages


@dataclass(eq=False, slots=True)
class Unit:
    """What is used at once: the mapped weights of one module, or one weight that is made.

    Attributes:
        number: its place among the units.
        nbytes: of memory while it is used.
        pages: of a mapped one, its pages.
        make: of one that is made: gives what brings it, if there is room, as long as the weight lives.
        keeps: whether it stays between two uses; None while it was not used.
        by_need: whether only some of it is used at once, such as experts, so that it is not brought ahead.
        failed: whether bringing it ahead failed; whoever uses it meets the error.
    """

    number: int
    nbytes: int
    pages: Pages | None = None
    make: Callable[[], Callable[[], bool] | None] | None = None
    keeps: bool | None = None
    by_need: bool = False
    failed: bool = False
