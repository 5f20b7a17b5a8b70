"""The order in which a model uses its weights: what is guessed, and that no guess ever hurts."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable, Sequence
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem.offload.order import Order

DENSE = list(range(10))


def forward(order: Order, units: Iterable[int], *, begin: bool = True) -> list[bool]:
    """One forward of the whole model; whether each use came in order."""
    if begin:
        order.begin()
    return [order.use(unit) for unit in units]


def guessed(order: Order, units: Sequence[int], *, begin: bool = True, ahead: int = 1) -> list[bool]:
    """One forward; whether each use was among the next `ahead` that were given before it."""
    if begin:
        order.begin()
    found = []
    for unit in units:
        found.append(unit in islice(order.upcoming(), ahead))
        order.use(unit)
    return found


def after(order: Order) -> list[int]:
    return list(order.upcoming())


# -- examples


def test_nothing_is_known_at_the_first_forward() -> None:
    order = Order()
    assert after(order) == []
    assert 0 not in order
    order.begin()
    for unit in DENSE:
        assert order.use(unit)
        assert after(order) == []
        assert unit in order
    assert 10 not in order


@pytest.mark.parametrize("begin", [True, False])
def test_a_dense_model_is_known_from_the_second_forward_on(begin: bool) -> None:
    order = Order()
    forward(order, DENSE, begin=begin)
    for _ in range(3):
        if begin:
            order.begin()
        for unit in DENSE:
            assert order.use(unit)
            assert after(order) == DENSE[unit + 1 :] + DENSE[: unit + 1]


def test_a_beginning_gives_the_beginning() -> None:
    order = Order()
    forward(order, DENSE)
    order.begin()
    assert after(order) == DENSE
    order.begin()  # one that came to nothing
    assert after(order) == DENSE
    assert all(forward(order, DENSE))


def test_a_head_tied_to_the_embedding_is_used_at_both_ends() -> None:
    order = Order()
    tied = [0, 1, 2, 3, 0]
    expected = [[1, 2, 3, 0], [2, 3, 0, 1], [3, 0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3]]
    forward(order, tied)
    for _ in range(3):
        order.begin()
        for unit, rest in zip(tied, expected, strict=True):
            assert order.use(unit)
            assert after(order) == rest


def test_a_tied_head_without_beginnings_keeps_what_is_between() -> None:
    order = Order()
    for _ in range(4):
        forward(order, [0, 1, 2, 3, 0], begin=False)
        assert after(order) == ([1, 2, 3, 0])


def test_an_encoder_that_runs_in_the_first_step_is_not_read_ahead_in_the_others() -> None:
    order = Order()
    encoder, decoder = list(range(20)), list(range(20, 30))
    forward(order, encoder + decoder)
    forward(order, decoder)
    for _ in range(3):
        assert all(guessed(order, decoder))
        assert set(after(order)) == set(decoder)


@pytest.mark.parametrize("inside", [True, False])
def test_an_encoder_that_comes_back_is_known_again_after_its_first_units(inside: bool) -> None:
    """In the model's own forward, or before it as `generate` runs those of encoder-decoders."""
    order = Order()
    encoder, decoder = list(range(20)), list(range(20, 30))
    for step in range(4):
        if inside:
            found = guessed(order, encoder + decoder)
        else:
            found = guessed(order, encoder, begin=False) + guessed(order, decoder)
        if step:
            assert not any(found[:8])
            # Of what follows, only the first of the decoder could be missed.
            assert found[8:20].count(False) == 0
            assert all(found[21:])
        for _ in range(6):
            forward(order, decoder)
        assert all(guessed(order, decoder))


def layers(experts: Sequence[Sequence[int]]) -> list[int]:
    """Uses of a forward: of each layer one unit that always comes, the experts that were picked, and one more."""
    uses = []
    for layer, picked in enumerate(experts):
        uses += [1000 * layer, *(1000 * layer + 1 + expert for expert in sorted(picked)), 1000 * layer + 999]
    return uses


def test_experts_that_a_router_picks_are_not_read_ahead_for_long() -> None:
    rng = random.Random(3)
    order = Order()
    given_ahead: list[int] = []
    for token in range(60):
        picked = [rng.sample(range(32), 4) for _ in range(6)]
        order.begin()
        for unit in layers(picked):
            if token >= 30:
                given_ahead += islice(order.upcoming(), 2)
            order.use(unit)
    wrong = [unit for unit in given_ahead if unit % 1000 not in (0, 999)]
    assert len(wrong) < 0.05 * len(given_ahead)
    # What always comes is always given, in order, round to the beginning.
    always = [unit for unit in after(order) if unit % 1000 in (0, 999)]
    assert always == [1000 * layer + end for layer in range(6) for end in (0, 999)]


def test_an_expert_between_what_always_comes_is_in_order() -> None:
    order = Order()
    everything = [range(8), range(8)]
    forward(order, layers(everything))
    for _ in range(4):
        forward(order, layers([[], []]))
    assert after(order) == layers([[], []])
    assert forward(order, layers([[2], [5]])) == [True] * 6


def test_an_expert_comes_back_when_it_is_used_every_time() -> None:
    order = Order()
    forward(order, layers([range(4)]))
    for _ in range(9):
        forward(order, layers([[]]))
    uses = 0
    while 3 not in after(order):
        forward(order, layers([[2]]))
        uses += 1
    assert 1 < uses < 9
    forward(order, layers([[]]))
    order.begin()
    assert 3 not in after(order)


def test_experts_that_the_first_token_did_not_use_find_their_places() -> None:
    order = Order()
    forward(order, layers([[0], [0]]))
    for _ in range(4):
        forward(order, layers([[0, 3], [2]]))
    assert guessed(order, layers([[0, 3], [2]])) == [True] * 7
    assert after(order) == layers([[0, 3], [2]])


def test_early_exit_is_learned_and_unlearned() -> None:
    order = Order()
    forward(order, DENSE)
    forward(order, DENSE[:4])
    assert all(guessed(order, DENSE[:4]))
    assert after(order) == DENSE[:4]
    for _ in range(4):
        forward(order, DENSE)
    assert guessed(order, DENSE) == [True] * 10


def test_layers_beyond_an_early_exit_are_put_behind_it() -> None:
    order = Order()
    forward(order, DENSE[:4])
    forward(order, DENSE)
    forward(order, DENSE)
    assert guessed(order, DENSE) == [True] * 10
    assert after(order) == DENSE


def test_reversed_every_second_call() -> None:
    order = Order()
    forward(order, DENSE)
    for _ in range(3):
        found = forward(order, DENSE[::-1])
        assert not any(found[1:])
        assert all(forward(order, DENSE))
        assert after(order) == DENSE


@pytest.mark.parametrize("begin", [True, False])
def test_shared_layers(begin: bool) -> None:
    """An embedding, two groups of layers six times over, a head."""
    order = Order()
    uses = [0, *[1, 2, 3] * 6, 4]
    forward(order, uses, begin=begin)
    assert forward(order, uses, begin=begin) == [True] * 20
    assert all(guessed(order, uses, begin=begin)[1:])
    assert after(order) == [0, 1, 2, 3, 4]


def test_a_loop_inside_the_first_forward_stays_bounded() -> None:
    order = Order()
    order.begin()
    for _ in range(5000):
        for unit in (5, 6, 7):
            order.use(unit)
    assert len(order._units) <= 64 + 4 * 3
    assert sum(guessed(order, [5, 6, 7] * 100, ahead=2)) >= 290


def test_parts_that_are_called_by_themselves_move_the_cursor() -> None:
    order = Order()
    forward(order, DENSE)
    forward(order, DENSE)
    assert forward(order, DENSE[5:8], begin=False) == [False, True, True]
    assert after(order)[:2] == [8, 9]
    assert forward(order, DENSE) == [True] * 10


def test_another_thread_may_look_ahead_meanwhile() -> None:
    rng = random.Random(5)
    order = Order()
    ended = threading.Event()
    seen: list[bool] = []

    def look() -> None:
        while not ended.is_set():
            found = after(order)
            seen.append(len(found) == len(set(found)))

    looking = threading.Thread(target=look)
    looking.start()
    for _ in range(200):
        forward(order, [rng.randrange(300) for _ in range(40)], begin=rng.random() < 0.7)
    ended.set()
    looking.join()
    assert seen
    assert all(seen)


# -- whatever comes

STEPS = st.lists(st.one_of(st.none(), st.integers(0, 12)), max_size=300)


def play(order: Order, steps: Iterable[int | None]) -> None:
    for step in steps:
        if step is None:
            order.begin()
        else:
            order.use(step)


@settings(max_examples=300, deadline=None)
@given(steps=STEPS)
def test_only_known_units_are_given_each_once_whatever_comes(steps: list[int | None]) -> None:
    order = Order()
    known = set()
    for step in steps:
        play(order, [step])
        known |= {step} - {None}
        found = after(order)
        assert len(found) == len(set(found))
        assert set(found) <= known
        assert all(unit in order for unit in known)
        assert len(order._units) <= 64 + 5 * len(known)
        assert order._places.keys() == known
        assert {unit: places for unit, places in order._places.items() if places} == {
            unit: [place for place, other in enumerate(order._units) if other == unit] for unit in order._units
        }
        assert 0 <= order._cursor <= len(order._units)
        if step is not None and order._places[step]:
            assert order._units[order._cursor - 1] == step
        assert all(-4 <= trust <= 2 for trust in order._trust)


@settings(max_examples=200, deadline=None)
@given(units=st.lists(st.integers(-5, 50), unique=True, min_size=2, max_size=30), begin=st.booleans())
def test_after_two_forwards_of_units_that_differ_the_guess_is_exact(units: list[int], begin: bool) -> None:
    order = Order()
    forward(order, units, begin=begin)
    assert all(forward(order, units, begin=begin))
    for _ in range(2):
        if begin:
            order.begin()
        for number, unit in enumerate(units):
            assert order.use(unit)
            assert after(order) == units[number + 1 :] + units[: number + 1]


@settings(max_examples=200, deadline=None)
@given(uses=st.lists(st.integers(0, 9), min_size=1, max_size=40))
def test_after_two_forwards_any_sequence_is_exact(uses: list[int]) -> None:
    """Where beginnings are told: next comes what is next, shared layers and all."""
    order = Order()
    forward(order, uses)
    assert all(forward(order, uses))
    order.begin()
    for number, unit in enumerate(uses):
        round_again = dict.fromkeys(uses[number:] + uses[:number])
        assert after(order) == list(round_again)
        assert order.use(unit)


@settings(max_examples=100, deadline=None)
@given(steps=STEPS, units=st.lists(st.integers(0, 12), unique=True, min_size=2))
def test_whatever_came_before_the_same_forward_again_and_again_is_known(
    steps: list[int | None], units: list[int]
) -> None:
    """In the order that was learned, an order that stays is found; each unit is given, and nothing else."""
    order = Order()
    play(order, steps)
    for _ in range(10):
        forward(order, units)
    order.begin()
    assert set(after(order)) == set(units)


def test_a_use_costs_the_same_however_many_units_there_are() -> None:
    """By the places that are looked at, and no clock."""

    class Counted(list):  # type: ignore[type-arg]
        looked = 0

        def __getitem__(self, index: object) -> object:
            Counted.looked += 1
            return super().__getitem__(index)  # type: ignore[call-overload]

    count = 30_000
    order = Order()
    forward(order, range(count))
    rng = random.Random(7)
    shuffled = rng.sample(range(count), count)
    order.begin()
    for name in ("_units", "_trust", "_seen", "_worth"):
        setattr(order, name, Counted(getattr(order, name)))
    for unit in shuffled:
        order.use(unit)
        list(islice(order.upcoming(), 3))
    assert Counted.looked < 60 * count
