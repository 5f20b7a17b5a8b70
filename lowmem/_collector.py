"""The cyclic garbage collector, paused while many records are made."""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager

from ._shared import Shared

_before: list[bool] = []


def _pause() -> None:
    _before.append(gc.isenabled())
    gc.disable()


def _resume() -> None:
    if _before:
        if _before[0]:
            gc.enable()
        _before.clear()


_paused = Shared(_pause, _resume)


def paused_collector() -> AbstractContextManager[None]:
    """Reading headers and planning make many records and no cycles, and each pass of the collector walks them all."""
    return _paused.changed()
