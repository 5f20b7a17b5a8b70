"""What tells a function from others: its source and all that it names, if every bit of that can be told."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
# Packages whose version says what they do: nobody changes them in place. Of any other, what it imports counts too.
_PACKAGES = frozenset({"torch", "numpy", "timm", "transformers", "einops", "scipy"})
# What of the standard library gives the same whenever and wherever it is asked.
_PURE = {"__future__", "abc", "bisect", "cmath", "collections", "copy", "dataclasses", "decimal", "enum", "fractions"}
_PURE |= {"functools", "heapq", "itertools", "logging", "math", "numbers", "operator", "re", "statistics", "string"}
_PURE |= {"textwrap", "types", "typing", "warnings"}
# Names by which files, the environment and settings are read, of modules, functions and methods alike.
_READS = re.compile(
    r"os|io|sys|environ|open|input|vars|locals|load.*|read.*|from_?(file|txt|regex|buffer)|genfromtxt|mem_?map|pickle|"
    r"json|Path|getenv|ops|hub|import_module|random|rand.*|get_.*|is_available|backends|version|__dict__|__builtins__"
)


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
    # Two lambdas of one line have one source.
    yield from _codes(function.__code__)
    yield _plain((function.__defaults__, tuple(sorted((function.__kwdefaults__ or {}).items()))))
    for name in sorted(_names(function.__code__)):
        if _READS.fullmatch(name):
            raise _UntoldError
        if name not in function.__globals__:
            # An attribute, or one of Python's own.
            continue
        value = function.__globals__[name]
        yield name
        if isinstance(value, FunctionType) and _version(value.__module__) is None:
            yield from _lines(value, seen)
        else:
            yield _told(value)


def _codes(code: CodeType) -> Iterator[str]:
    """The instructions of a function and of those inside of it, with their constants."""
    yield f"{code.co_code.hex()} {code.co_names} {code.co_varnames}"
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
        else:
            yield repr(sorted(map(repr, constant))) if isinstance(constant, frozenset) else repr(constant)


def _names(code: CodeType) -> set[str]:
    inner = (part for part in code.co_consts if isinstance(part, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _told(value: Any) -> str:
    """A value that a function names."""
    if isinstance(value, ModuleType):
        version = _version(value.__name__)
        if version is not None:
            return f"{value.__name__} {version}"
        # What is in it may come from anywhere.
        raise _UntoldError
    if isinstance(value, (FunctionType, BuiltinFunctionType, type)):
        version = _version(value.__module__)
        if version is not None:
            return f"{value.__module__}.{value.__qualname__} {version}"
        raise _UntoldError
    return _plain(value)


def _version(module: str | None) -> str | None:
    """That of the package of a module, where it tells what the module does.

    Raises:
        _UntoldError: a module of Python's that reads files, clocks or the like.
    """
    top = (module or "").partition(".")[0]
    if top in sys.stdlib_module_names and top != "__main__":
        if top not in _PURE and top != "builtins":
            raise _UntoldError
        return sys.version
    if top not in _PACKAGES:
        return None
    version = getattr(sys.modules.get(top), "__version__", None)
    return version if isinstance(version, str) else None


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_plain, value))})"
    if type(value) not in _PLAIN:
        raise _UntoldError
    return repr(value)
