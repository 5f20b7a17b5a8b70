"""Small facts of every member of a load, known to all of them."""

from __future__ import annotations

from typing import TypeVar, cast

from ..errors import ModelError
from .control import Together

_Fact = TypeVar("_Fact")


def gather(together: Together, value: _Fact, step: str = "") -> list[_Fact]:
    """The value of each member, in the order of `together.members`.

    Args:
        together: the members.
        value: of this one.
        step: what the values are about; the same on all members.

    Every member must call it, equally often and in the same order. Values travel as JSON, through the tree of the
    members: numbers, text, None, and lists and dicts (with text for keys) of them; nothing is unpickled. Of a member
    alone, too, the value comes back as JSON gives it.

    Raises:
        RankError: another member has failed, or is gone.
        ModelError: another member is at another step, so that they do not load the same.
        TypeError: the value has no form in JSON.
        ValueError: it contains itself.
    """
    answers = together.exchange([step, value])
    for rank, (theirs, _) in zip(together.members, answers, strict=True):
        if theirs != step:
            raise ModelError(
                f"rank {together.rank} and rank {rank} do not load the same: this rank exchanges {step}, and that one "
                f"{theirs}; give every rank the same model, checkpoint and options"
            )
    return cast("list[_Fact]", [value for _, value in answers])
