"""Small facts of every member of a load, known to all of them."""

from __future__ import annotations

from typing import TypeVar, cast

from .control import Together

_Fact = TypeVar("_Fact")


def gather(together: Together, value: _Fact) -> list[_Fact]:
    """The value of each member, in the order of `together.members`.

    Every member must call it, equally often and in the same order. Values travel as JSON, through the tree of the
    members: numbers, text, None, and lists and dicts (with text for keys) of them; nothing is unpickled. Of a member
    alone, too, the value comes back as JSON gives it.

    Raises:
        RankError: another member has failed, or is gone.
        TypeError: the value has no form in JSON.
        ValueError: it contains itself.
    """
    return cast("list[_Fact]", together.exchange(value))
