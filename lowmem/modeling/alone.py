"""One thread at a time runs code that builds or initialises models.

transformers sets torch's default dtype and replaces some of torch's functions while it builds, for all threads: two
models at once would get tensors of each other's dtypes, and might leave the default dtype as the other had it.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .._shared import Shared, lasting_lock

_turn = lasting_lock()


@contextmanager
def alone() -> Iterator[None]:
    """Wait until no other thread is inside. A thread that is may come in again."""
    with _turn:
        yield


_before: list[tuple[torch.dtype, dict[tuple[Any, str], Any]]] = []


def _remember() -> None:
    functions: dict[tuple[Any, str], Any] = {(torch, "linspace"): torch.linspace}
    # Where transformers replaces initialisers: in every module of torch that has them by name.
    names = [name for name in vars(nn.init) if name.endswith("_") and not name.startswith("_")]
    for module in {id(m): m for m in (nn.init, *_importers())}.values():
        functions.update({(module, name): vars(module)[name] for name in names if name in vars(module)})
    _before.append((torch.get_default_dtype(), functions))


def _importers() -> list[Any]:
    from transformers import initialization

    names = getattr(initialization, "TORCH_MODULES_TO_PATCH", ())
    return [sys.modules[name] for name in names if name in sys.modules]


def _restore() -> None:
    if _before:
        dtype, functions = _before[0]
        torch.set_default_dtype(dtype)
        for (module, name), function in functions.items():
            setattr(module, name, function)
        _before.clear()


_building = Shared(_remember, _restore)


@contextmanager
def as_before() -> Iterator[None]:
    """What transformers changes for all threads while it builds or initialises is as before in the end.

    Also in a child that is forked meanwhile, and after a Ctrl-C between a change and its own end.
    """
    with alone(), _building.changed():
        yield


class Modes:
    """Torch's modes of this thread.

    `torch.no_grad` and `torch.device` are changed and changed back by Python's code, and a Ctrl-C in it leaves them.

    Attributes:
        outside: the error that is being handled meanwhile, if any.
    """

    def __init__(self) -> None:
        self._gradients = torch.is_grad_enabled()
        self._stack = [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]
        self.outside = sys.exc_info()[1]

    def restore(self, error: BaseException) -> None:
        """They are as they were before this error, whatever further Ctrl-C comes meanwhile."""
        while True:
            try:
                self._end_all(error)
                torch.set_grad_enabled(self._gradients)
                while torch._C._len_torch_function_stack():
                    torch._C._pop_torch_function_stack()
                for mode in self._stack:
                    torch._C._push_on_torch_function_stack(mode)
                break
            except KeyboardInterrupt:
                continue

    def _end_all(self, error: BaseException | None) -> None:
        """What a Ctrl-C kept from its end has it with the traceback, and some of it puts modes where they were then."""
        while error is not None and error is not self.outside:
            traceback.clear_frames(error.__traceback__)
            error = error.__context__


@contextmanager
def modes_as_before() -> Iterator[None]:
    """After a Ctrl-C torch's modes of this thread are as before; nearly always, for another may come before the end."""
    modes = Modes()
    try:
        yield
    except KeyboardInterrupt as interrupt:
        modes.restore(interrupt)
        raise
