"""One thread at a time runs code that builds or initialises models.

transformers sets torch's default dtype and replaces some of torch's functions while it builds, for all threads: two
models at once would get tensors of each other's dtypes, and might leave the default dtype as the other had it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .._shared import Shared, lasting_lock

_turn = lasting_lock()


@contextmanager
def alone() -> Iterator[None]:
    """Wait until no other thread is inside. A thread that is may come in again."""
    with _turn:
        yield


_before: list[tuple[torch.dtype, Any]] = []


def _remember() -> None:
    _before.append((torch.get_default_dtype(), torch.linspace))


def _restore() -> None:
    if _before:
        dtype, linspace = _before[0]
        torch.set_default_dtype(dtype)
        torch.linspace = linspace
        _before.clear()


_building = Shared(_remember, _restore)


@contextmanager
def as_before() -> Iterator[None]:
    """What transformers changes for all threads while it builds is as before, also in a child that is forked
    meanwhile, and after a Ctrl-C between a change and its end.
    """
    with alone(), _building.changed():
        yield
