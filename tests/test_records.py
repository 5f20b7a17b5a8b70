"""A record with the cheap `__init__` cannot be told from one without."""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import FrozenInstanceError, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem._records import cheap_init
from lowmem.checkpoint import TensorEntry
from lowmem.modeling.targets import Target
from lowmem.planner import Placement

CLASSES = (TensorEntry, Target, Placement)


@dataclass(frozen=True, slots=True)
class Plain:
    name: str
    size: int
    more: tuple[int, ...] | None = None
    text: str = "x"


@cheap_init
@dataclass(frozen=True, slots=True)
class Cheap:
    name: str
    size: int
    more: tuple[int, ...] | None = None
    text: str = "x"


@given(st.lists(st.integers() | st.text() | st.none(), min_size=2, max_size=4))
def test_it_is_made_printed_compared_and_hashed_as_a_dataclass_is(values: list[Any]) -> None:
    plain, cheap = Plain(*values), Cheap(*values)
    assert repr(cheap) == repr(plain).replace("Plain", "Cheap")
    assert hash(cheap) == hash(plain)
    assert cheap == Cheap(*values)
    assert type(cheap) is Cheap
    assert [getattr(cheap, f.name) for f in fields(cheap)] == [getattr(plain, f.name) for f in fields(plain)]
    assert replace(cheap, size=7) == Cheap(values[0], 7, *values[2:]) == Cheap(name=values[0], size=7, **vars_of(cheap))


def vars_of(record: Cheap) -> dict[str, Any]:
    return {"more": record.more, "text": record.text}


def test_its_signature_is_the_dataclasss() -> None:
    assert str(inspect.signature(Cheap)) == str(inspect.signature(Plain))
    for arguments in ((), ("a",), ("a", 1, None, "x", 5)):
        with pytest.raises(TypeError, match="argument"):
            Cheap(*arguments)


def sample(cls: type) -> Any:
    return cls(*(Path(f.name) if f.name == "file" else f.name for f in fields(cls)))


@pytest.mark.parametrize("cls", CLASSES)
def test_every_record_that_has_it_is_frozen_and_copies_and_pickles(cls: type) -> None:
    record = sample(cls)
    for field in fields(cls):
        with pytest.raises(FrozenInstanceError):
            setattr(record, field.name, 1)
        with pytest.raises(FrozenInstanceError):
            delattr(record, field.name)
    # A name that is no field: refused too, by slots or by being frozen.
    with pytest.raises((AttributeError, TypeError)):
        record.other = 1
    assert not hasattr(record, "__dict__")
    for again in (copy.copy(record), pickle.loads(pickle.dumps(record)), replace(record)):
        assert type(again) is cls
        assert [getattr(again, f.name) for f in fields(cls)] == [getattr(record, f.name) for f in fields(cls)]
