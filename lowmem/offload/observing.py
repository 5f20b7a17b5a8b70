"""What the forward says of itself: which module comes now, and which of its experts a router chose. Advice only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

# Address and bytes of what is read of a file.
Range = tuple[int, int]
# So many numbers are sorted sooner by Python.
_FEW = 256
# Gives the ranges of the expert of a number.
Lies = Callable[[int], Iterable[Range]]


class Observer:
    """A forward pre-hook: says what is used now. No value depends on it."""

    is_of_lowmem = True

    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell = tell

    def __call__(self, module: nn.Module, *args: Any) -> None:
        """Called before the module's forward, or its state dict."""
        if not torch.compiler.is_compiling():
            self._tell()

    def __reduce__(self) -> Any:
        """In another process there is nothing to tell."""
        return _Nobody, ()


class ExpertsObserver(Observer):
    """A forward pre-hook, with keywords, of a module that has experts: says where those lie that will be used.

    Which they are is in its inputs, as a tensor of their numbers: routers give them to the module that has the experts
    (`top_k_index`, `router_indices`). Where none is like that, or it means something else, nothing is read ahead, or
    something in vain.

    Args:
        tell: takes the ranges in the order in which they will be used.
        experts: of each weight, how many experts it has and where the one of a number lies.
    """

    def __init__(
        self,
        tell: Callable[[Sequence[Range]], None],
        experts: Sequence[tuple[int, Lies]],
    ) -> None:
        self._tell_ranges = tell
        self._experts = experts

    def __call__(self, module: nn.Module, *args: Any) -> None:
        """Called before the module's forward with its arguments, a tuple and a dictionary."""
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return
        positional, named = args
        count = min(count for count, _ in self._experts)
        for value in (*positional, *named.values()):
            numbers = _numbers(value, count)
            if numbers:
                self._tell_ranges([one for n in numbers for _, lies in self._experts for one in lies(n)])
                return


class _Nobody:
    """What stands for an observer where there is nothing to observe."""

    def __call__(self, module: nn.Module, *args: Any) -> None:
        """Nothing."""


def _numbers(value: Any, count: int) -> list[int]:
    """Numbers of experts, each once, in their order; none where the value is something else."""
    if type(value) is not torch.Tensor or value.dtype not in (torch.int64, torch.int32) or value.is_meta:
        return []
    try:
        few = value.numel() <= _FEW
        numbers: list[int] = sorted(set(value.flatten().tolist())) if few else torch.unique(value).tolist()
    except Exception:
        return []  # there are no values to look at, as under vmap
    # Some routers give the number behind the last to tokens that no expert takes.
    if not numbers or numbers[0] < 0 or numbers[-1] > count:
        return []
    return numbers[:-1] if numbers[-1] == count else numbers
