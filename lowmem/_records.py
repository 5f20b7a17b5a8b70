"""Records that cost little, for the tens of thousands that a checkpoint of small tensors needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")


class computed_once(Generic[T]):  # noqa: N801
    """A property that is computed when it is first asked for, and kept; a frozen record may have one.

    As `functools.cached_property`, which before Python 3.12 holds a lock of its whole class while it computes: a child
    that is forked meanwhile would wait for ever. Threads that ask at once may each compute it; all get the first's.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute = compute
        self._name = compute.__name__
        self.__doc__ = compute.__doc__

    @overload
    def __get__(self, record: None, kind: type) -> computed_once[T]: ...

    @overload
    def __get__(self, record: object, kind: type) -> T: ...

    def __get__(self, record: object | None, kind: type) -> computed_once[T] | T:
        if record is None:
            return self
        made: T = vars(record).setdefault(self._name, self._compute(record))
        return made


def cheap_init(cls: type[T]) -> type[T]:
    """Make records of `cls`, a frozen dataclass with slots, at half the price or less.

    The `__init__` of a frozen dataclass sets each field by a call of `object.__setattr__`. This one lets the record be
    of a class with the same slots, which allows setting, until its fields are there. For plain fields only: none
    with a default factory, and no `__post_init__`.
    """
    table = fields(cls)  # type: ignore[arg-type]
    draft = type(cls.__name__, (), {"__slots__": tuple(field.name for field in table)})
    scope: dict[str, Any] = {"become": object.__setattr__, "Draft": draft, "Record": cls}
    scope.update({f"default_{field.name}": field.default for field in table})
    arguments = [f.name if f.default is MISSING else f"{f.name}=default_{f.name}" for f in table]
    lines = [
        f"def __init__(self, {', '.join(arguments)}):",
        "become(self, '__class__', Draft)",
        *(f"self.{field.name} = {field.name}" for field in table),
        "self.__class__ = Record",
    ]
    exec("\n    ".join(lines), scope)
    made = scope["__init__"]
    old: Any = cls.__init__
    made.__qualname__, made.__module__, made.__annotations__ = old.__qualname__, cls.__module__, old.__annotations__
    cls.__init__ = made  # type: ignore[method-assign]
    return cls
