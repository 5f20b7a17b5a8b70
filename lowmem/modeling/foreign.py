"""What a foreign function did besides: the line of it that went wrong, and numbers that it drew by chance."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What calls a function, or is called by it, and is not the user's to change.
_OTHERS = frozenset({"lowmem", "torch", "timm", "transformers", "numpy", "einops"})
# Where numpy's generator stands before it is first used.
_UNUSED = 624


def line_of(error: BaseException) -> str:
    """` at <file>:<line>` of the innermost line that is the user's; empty where there is none."""
    found, step = "", error.__traceback__
    while step is not None:
        top = str(step.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        if top not in _OTHERS and (top == "__main__" or top not in sys.stdlib_module_names):
            found = f" at {Path(step.tb_frame.f_code.co_filename).name}:{step.tb_lineno}"
        step = step.tb_next
    return found


class Chance:
    """Whether numbers were drawn of Python or numpy, which torch knows nothing of."""

    drawn = False


@contextmanager
def watch_chance() -> Iterator[Chance]:
    """Tell whether numbers are drawn inside, and have the generators go on as if none were."""
    chance, python, array = Chance(), random.getstate(), _numpy_state()
    try:
        yield chance
    finally:
        if random.getstate() != python:
            chance.drawn = True
            random.setstate(python)
        now = _numpy_state()
        if array is None:
            # It was imported inside; nothing of the user hangs on how it goes on.
            chance.drawn |= now is not None and now[2] != _UNUSED
        elif now is None or _comparable(now) != _comparable(array):
            chance.drawn = True
            sys.modules["numpy.random"].set_state(array)


def _numpy_state() -> Any:
    numpy_random: Any = sys.modules.get("numpy.random")
    # While it is imported, by another thread say, it has none.
    return numpy_random.get_state() if hasattr(numpy_random, "get_state") else None


def _comparable(state: Any) -> list[Any]:
    if isinstance(state, dict):
        # Of a generator of another kind.
        return [repr(state)]
    return [part.tobytes() if hasattr(part, "tobytes") else part for part in state]
