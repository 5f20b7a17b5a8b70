"""What torch imports when it first computes on the meta device: memory of the program, and not of the load."""

from __future__ import annotations

import importlib.util

from .._shared import lasting_lock
from ..memory import anonymous_memory

# `torch._compile.inner`, which is around the kernels that are written in Python.
_MODULES = ("torch._dynamo",)
_lock = lasting_lock()
_taken: int | None = None


def import_meta_kernels() -> None:
    """Import it now, and remember what it takes: hundreds of modules, of which a load without functions needs none."""
    global _taken
    if _taken is not None:
        return
    with _lock:
        if _taken is not None:
            return
        before = anonymous_memory()
        for name in _MODULES:
            # A torch that keeps them elsewhere imports them by itself.
            if importlib.util.find_spec(name) is not None:
                importlib.import_module(name)
        _taken = max(0, anonymous_memory() - before)


def bytes_of_imports() -> int:
    """Anonymous memory that these imports took in this process."""
    return _taken or 0
