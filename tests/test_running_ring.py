"""Buffers for weights that are made at use: never overwritten while someone holds them, nor more than there may be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem.errors import RunningError
from lowmem.offload.ring import Entry, Ring


def make_ring(capacity: int, ahead: int = 0) -> Ring:
    return Ring(capacity, ahead, lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))


def bring(ring: Ring, key: Any, nbytes: int, value: int = 0, *, is_part: bool = False, needed: bool = True) -> Any:
    """As the runtime does it: found, or made with `value` in every byte."""
    entry = ring.find(key)
    if entry is None:
        found = ring.admit(key, (nbytes,), torch.uint8, is_part=is_part, needed=needed)
        if found is None:
            return None
        entry = found[0]
        fill(entry, value)
    return ring.take(entry, key)


def fill(entry: Entry, value: int) -> None:
    entry.tensor.fill_(value)
    entry.version = entry.tensor._version
    entry.ready = True


STEPS = st.lists(
    st.tuples(st.integers(0, 11), st.sampled_from(["use", "hold", "ahead", "let go", "part"])), min_size=1, max_size=80
)


@given(steps=STEPS, capacity=st.integers(100, 700), ahead=st.integers(0, 300))
def test_what_someone_holds_is_never_overwritten(steps: list[tuple[int, str]], capacity: int, ahead: int) -> None:
    """Weights of three sizes, used, kept and brought ahead in any order; each has its own number in every byte."""
    ring = make_ring(capacity, min(ahead, capacity))
    held: dict[int, torch.Tensor] = {}
    for number, step in steps:
        nbytes = (50, 80, 100)[number % 3]
        if step == "let go":
            held.pop(number, None)
            continue
        if step == "ahead":
            if ring.find(number) is None:
                found = ring.admit(number, (nbytes,), torch.uint8, is_part=False, needed=False)
                if found is not None:
                    fill(found[0], number)
                    assert ring.held <= capacity or held
                # It would hold the buffer for good.
                del found
            continue
        tensor = bring(ring, number, nbytes, number, is_part=step == "part")
        assert bool((tensor == number).all())
        if step == "hold":
            held[number] = tensor
        del tensor
        assert all(bool((one == kept).all()) for kept, one in held.items())
    if not held:
        bring(ring, "one more", 100)
        assert ring.held <= max(capacity, 100)


def test_what_passes_gives_its_buffer_to_the_next() -> None:
    ring = make_ring(200, ahead=200)
    places = set()
    for number in range(20):
        tensor = bring(ring, number, 100, number)
        places.add(tensor.data_ptr())
        del tensor
    assert len(places) <= 2
    assert ring.held <= 200


def test_what_fits_is_made_once() -> None:
    ring = make_ring(1000)
    first = [bring(ring, number, 100, number).data_ptr() for number in range(10)]
    assert [bring(ring, number, 100, 99).data_ptr() for number in range(10)] == first


def test_of_more_than_fits_the_first_stay() -> None:
    ring = make_ring(500, ahead=200)
    for _ in range(3):
        for number in range(10):
            assert bool((bring(ring, number, 100, number) == number).all())
    assert all(ring.find(number) is not None for number in range(3))
    assert ring.held <= 500


def test_parts_that_were_not_used_for_the_longest_time_go_first() -> None:
    ring = make_ring(300)
    for number in (0, 1, 2, 0):
        bring(ring, number, 100, number, is_part=True)
    bring(ring, 3, 100, 3, is_part=True)
    assert ring.find(1) is None
    assert ring.find(0) is not None
    assert ring.held <= 300


def test_nothing_is_made_ahead_where_there_is_no_room() -> None:
    ring = make_ring(200, ahead=200)
    kept = [bring(ring, number, 100, number) for number in range(2)]
    assert ring.admit("ahead", (100,), torch.uint8, is_part=False, needed=False) is None
    needed = bring(ring, "needed", 100, 7)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(kept))
    assert bool((needed == 7).all())


@pytest.mark.parametrize("gone", [False, True])
def test_a_write_through_a_view_is_told_at_the_next_use(gone: bool) -> None:
    ring = make_ring(100, ahead=100)
    view = bring(ring, "weight", 100, 3)[5:]
    view.zero_()
    del view
    if gone:
        bring(ring, "other", 100, 4)
        assert ring.find("weight") is None
    with pytest.raises(RunningError, match="changed through a view"):
        bring(ring, "weight", 100, 3)


def test_what_could_not_be_made_leaves_no_room_taken() -> None:
    ring = make_ring(100)
    assert ring.admit("weight", (100,), torch.uint8, is_part=False, needed=True) is not None
    ring.drop("weight")
    assert ring.held == 0
    assert bool((bring(ring, "weight", 100, 5) == 5).all())
