"""What tells a function from others: its source and all that it names, if every bit of that can be told."""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def described(function: Any) -> str | None:
    """A text that is equal for functions that do the same; None where something may differ that it cannot say."""
    try:
        return "\n".join(_lines(function, set()))
    except (_UntoldError, OSError, TypeError):
        return None


class _UntoldError(Exception):
    """What a function would do cannot be told by its text."""


def _lines(function: Any, seen: set[int]) -> Iterator[str]:
    if not inspect.isfunction(function) or function.__closure__ or function.__dict__:
        raise _UntoldError
    if id(function) in seen:
        return
    seen.add(id(function))
    source = inspect.getsource(function)
    if re.search(r"\b(import|globals|eval|exec|getattr)\b", source):
        raise _UntoldError
    yield source
    yield _plain((function.__defaults__, tuple(sorted((function.__kwdefaults__ or {}).items()))))
    for name in sorted(_names(function.__code__)):
        if name not in function.__globals__:
            # An attribute, or one of Python's own.
            continue
        value = function.__globals__[name]
        yield name
        if isinstance(value, FunctionType) and _version(value.__module__) is None:
            yield from _lines(value, seen)
        else:
            yield _told(value)


def _names(code: CodeType) -> set[str]:
    inner = (part for part in code.co_consts if isinstance(part, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _told(value: Any) -> str:
    """A value that a function names."""
    if isinstance(value, ModuleType):
        version = _version(value.__name__)
        if version is not None:
            return f"{value.__name__} {version}"
        file = getattr(value, "__file__", None)
        if file is None:
            raise _UntoldError
        return f"{value.__name__} {hashlib.sha256(Path(file).read_bytes()).hexdigest()}"
    if isinstance(value, (FunctionType, BuiltinFunctionType, type)):
        version = _version(value.__module__)
        if version is not None:
            return f"{value.__module__}.{value.__qualname__} {version}"
        raise _UntoldError
    return _plain(value)


def _version(module: str | None) -> str | None:
    """That of the package of a module, which is not the user's own then."""
    top = (module or "").partition(".")[0]
    if top in sys.stdlib_module_names and top != "__main__":
        return sys.version
    version = getattr(sys.modules.get(top), "__version__", None)
    return version if isinstance(version, str) else None


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_plain, value))})"
    if type(value) not in _PLAIN:
        raise _UntoldError
    return repr(value)
