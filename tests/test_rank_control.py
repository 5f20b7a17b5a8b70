"""Ranks that load together: all end well, or all end with one's error; none waits for ever."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from rank_processes import Died, Raised, run_ranks
from safetensors.torch import save_file
from torch import nn

import lowmem
from lowmem import CheckpointError, OptionError, RankError
from lowmem.engine import Installer, reading, run
from lowmem.engine.crew import Crew
from lowmem.ranks import Together, control, find_neighbours, gather, hosts, links

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"),
]

ALL = range(5)
LONG = "ü€😀" * 3000
NO_WORD = "ended without a word (killed, or its machine is gone)"


def attempt(play: Callable[..., Any], *args: Any) -> Any:
    """What `play` gives, or its error; and no thread is left by it, or none that does not end by itself."""
    try:
        result = play(*args)
    except BaseException as error:
        result = f"{type(error).__name__}: {error}"
    until = time.monotonic() + 30
    # A load waits some seconds for them, which on a machine that does much else are not enough.
    while left := [thread.name for thread in threading.enumerate() if thread.name.startswith("lowmem")]:
        if time.monotonic() > until:
            break
        time.sleep(0.05)
    return f"{result}, and threads are left: {left}" if left else result


def look(together: Together) -> None:
    """Wait as the engine does, for reads that never come."""
    crew = Crew(cast(Any, None), cast(Any, None), together.check, at_once=True)
    crew._working = 1
    crew.next()


def fail(text: str, kind: type[Exception] = CheckpointError) -> None:
    raise kind(text)


def all_well(members: list[int], rank: int) -> Any:
    with Together(members) as together:
        together.check()
        return gather(together, {"rank": rank, "text": "ü", "none": None})


def many_rounds(members: list[int], rank: int) -> Any:
    with Together(members) as together:
        return [gather(together, (rank * round_) * "x" if round_ < 9 else LONG + str(rank)) for round_ in range(10)]


def one_fails_at_once(members: list[int], rank: int) -> None:
    with Together(members) as together:
        if rank == members[-1]:
            fail("a.safetensors: ended at byte 7")
        look(together)


def one_fails_later(members: list[int], rank: int) -> None:
    with Together(members) as together:
        gather(together, rank)
        if rank == members[0]:
            time.sleep(0.3)
            fail("a.safetensors: ended at byte 8")
        look(together)


def one_fails_while_others_gather(members: list[int], rank: int) -> None:
    with Together(members) as together:
        gather(together, rank)
        if rank == members[1]:
            time.sleep(0.3)
            fail("late")
        gather(together, rank)


def one_fails_while_others_are_done(members: list[int], rank: int) -> None:
    with Together(members) as together:
        gather(together, rank)
        if rank == members[-1]:
            time.sleep(0.3)
            fail("last")


def one_fails_before_others_come(members: list[int], rank: int) -> None:
    if rank != members[0]:
        time.sleep(1)
    with Together(members) as together:
        if rank == members[0]:
            fail("early")
        gather(together, rank)


def one_misses_the_load(members: list[int], rank: int) -> Any:
    if rank == members[1]:
        with pytest.raises(RankError) as missed, Together(members) as together:
            gather(together, rank)
        assert missed.value.rank == members[0]
        return [str(missed.value), all_well(members, rank)]
    without = attempt(_one_fails_without_another, members, rank)
    assert "CheckpointError: without me" in without
    return all_well(members, rank)


def _one_fails_without_another(members: list[int], rank: int) -> None:
    with Together(members) as together:
        if rank == members[0]:
            fail("without me")
        gather(together, rank)


def two_fail(members: list[int], rank: int) -> None:
    with Together(members) as together:
        if rank in (members[0], members[-1]):
            fail(f"of {rank}")
        look(together)


def all_fail(members: list[int], rank: int) -> None:
    with Together(members):
        fail(f"of {rank}")


def long_text(members: list[int], rank: int) -> None:
    with Together(members) as together:
        if rank == members[0]:
            fail(LONG, ValueError)
        look(together)


def odd_text(members: list[int], rank: int) -> None:
    with Together(members) as together:
        if rank == members[0]:
            fail("/t/\udcff\n.bin")
        look(together)


def interrupted(members: list[int], rank: int) -> None:
    with Together(members) as together:
        if rank == members[0]:
            raise KeyboardInterrupt
        look(together)


def interrupted_when_done(members: list[int], rank: int) -> None:
    with Together(members) as together:
        gather(together, rank)
        if rank == members[-1]:
            # A leaf: it has said that it is done when it is interrupted.
            threading.Timer(0.5, signal.raise_signal, [signal.SIGINT]).start()
        if rank == members[0]:
            look(together)


def different_steps(members: list[int], rank: int) -> None:
    with Together(members) as together:
        if rank == members[0]:
            gather(together, rank)


def no_json(members: list[int], rank: int) -> None:
    with Together(members) as together:
        gather(together, {1, 2} if rank == members[0] else None)


def neighbours(members: list[int], rank: int) -> Any:
    if rank == members[1]:
        hosts.name_host = lambda: "elsewhere"
    with Together(members) as together:
        found = find_neighbours(together)
    return [found.ranks, found.index, found.count]


def in_any_order(members: list[int], rank: int) -> Any:
    with Together(members[::-1] if rank == members[0] else members) as together:
        return gather(together, rank)


def not_a_member(members: list[int], rank: int) -> None:
    Together([rank + 1])


def deep(members: list[int], rank: int) -> Any:
    """Every failure and message through two levels of the tree."""
    control.WIDTH = 2
    results = [attempt(play, members, rank) for play in (all_well, one_fails_at_once, one_fails_later, two_fail)]
    results += [attempt(play, members, rank) for play in (many_rounds, all_fail, one_fails_while_others_are_done)]
    results.append(attempt(all_well, members, rank))
    control.WIDTH = 8
    return results


def beats(members: list[int], rank: int) -> Any:
    """Ranks that say nothing for long are alive: messages of no meaning come and change nothing."""
    links.BEAT_EVERY = 0.05
    with Together(members) as together:
        first = gather(together, rank)
        time.sleep(0.5)
        return [first, gather(together, rank)]


def nobody_comes(members: list[int], rank: int) -> None:
    if rank == members[0]:
        links.COMING = links.timedelta(seconds=0.3)
        one_fails_while_others_gather(members, rank)


SCENARIOS: dict[str, tuple[list[int], Callable[..., Any]]] = {
    "alone": ([3], all_well),
    "pair": ([0, 1], all_well),
    "four": ([0, 1, 2, 3], all_well),
    "subset": ([1, 2, 4], all_well),
    "all": (list(ALL), all_well),
    "many rounds": ([0, 1, 2, 3], many_rounds),
    "at once": ([0, 1, 2, 3], one_fails_at_once),
    "later": ([0, 1, 2, 3], one_fails_later),
    "while gathering": ([0, 1, 2, 3], one_fails_while_others_gather),
    "while done": ([0, 1, 2, 3], one_fails_while_others_are_done),
    "before": ([0, 1, 2, 3], one_fails_before_others_come),
    "again": ([0, 1, 2, 3], all_well),
    "missed": ([0, 3, 4], one_misses_the_load),
    "two": ([0, 1, 2, 3], two_fail),
    "everyone": ([0, 1, 2, 3], all_fail),
    "long": ([0, 1, 2, 3], long_text),
    "odd": ([0, 1], odd_text),
    "interrupted": ([0, 1, 2, 3], interrupted),
    "interrupted when done": ([0, 1, 2, 3], interrupted_when_done),
    "steps": ([0, 1, 2], different_steps),
    "no json": ([0, 1], no_json),
    "neighbours": ([0, 1, 2, 4], neighbours),
    "any order": ([1, 2, 4], in_any_order),
    "not a member": ([1], not_a_member),
    "deep": (list(ALL), deep),
    "beats": ([0, 1, 2], beats),
    "nobody": ([0, 4], nobody_comes),
    "at last": (list(ALL), all_well),
}


def play_all(rank: int) -> dict[str, Any]:
    # Pickled errors and sets would do; text that came through JSON cannot hide a mistake in them.
    return {name: attempt(play, members, rank) for name, (members, play) in SCENARIOS.items() if rank in members}


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of five processes saw, scenario after scenario; played once for all workers of pytest-xdist."""
    run_id = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    shared = tmp_path_factory.getbasetemp().parent / f"played-{run_id}.pickle"
    if run_id is None:
        answers = run_ranks(len(ALL), play_all, timeout=150)
    else:
        try:
            shared.with_suffix(".mine").touch(exist_ok=False)
        except FileExistsError:
            while not shared.exists():
                time.sleep(0.1)
        else:
            made = shared.with_suffix(".made")
            made.write_bytes(pickle.dumps(run_ranks(len(ALL), play_all, timeout=150)))
            made.rename(shared)
        answers = pickle.loads(shared.read_bytes())
    assert all(isinstance(answer, dict) for answer in answers), answers
    return list(answers)


def facts(members: list[int]) -> list[Any]:
    return [{"rank": rank, "text": "ü", "none": None} for rank in members]


def saw(played: list[Any], name: str) -> list[Any]:
    return [played[rank][name] for rank in SCENARIOS[name][0]]


@pytest.mark.parametrize("name", ["alone", "pair", "four", "subset", "all", "again", "at last"])
def test_facts_of_all_come_to_all_in_the_order_of_ranks(played: list[Any], name: str) -> None:
    members = SCENARIOS[name][0]
    assert saw(played, name) == [facts(members)] * len(members)


def test_rounds_do_not_mix(played: list[Any]) -> None:
    expected = [["x" * (rank * turn) if turn < 9 else LONG + str(rank) for rank in range(4)] for turn in range(10)]
    assert saw(played, "many rounds") == [expected] * 4


@pytest.mark.parametrize(
    ("name", "culprit", "text"),
    [
        ("at once", 3, "CheckpointError: a.safetensors: ended at byte 7"),
        ("later", 0, "CheckpointError: a.safetensors: ended at byte 8"),
        ("while gathering", 1, "CheckpointError: late"),
        ("while done", 3, "CheckpointError: last"),
        ("before", 0, "CheckpointError: early"),
        ("interrupted", 0, "KeyboardInterrupt"),
        ("interrupted when done", 3, "KeyboardInterrupt"),
    ],
)
def test_an_error_of_one_ends_all_with_its_text(played: list[Any], name: str, culprit: int, text: str) -> None:
    own = text if ":" in text else f"{text}: "
    expected = [own if rank == culprit else f"RankError: rank {culprit}: {text}" for rank in SCENARIOS[name][0]]
    assert saw(played, name) == expected


def test_who_misses_a_load_that_failed_is_told_at_the_next(played: list[Any]) -> None:
    well = facts([0, 3, 4])
    assert saw(played, "missed") == [well, ["rank 0: CheckpointError: without me", well], well]


def test_two_errors_each_keep_their_own_and_the_others_get_one_of_them(played: list[Any]) -> None:
    first, *others, last = saw(played, "two")
    assert (first, last) == ("CheckpointError: of 0", "CheckpointError: of 3")
    assert {*others} <= {"RankError: rank 0: CheckpointError: of 0", "RankError: rank 3: CheckpointError: of 3"}
    assert saw(played, "everyone") == [f"CheckpointError: of {rank}" for rank in range(4)]


def test_long_texts_are_cut_and_odd_ones_arrive(played: list[Any]) -> None:
    own, *others = saw(played, "long")
    assert own == f"ValueError: {LONG}"
    assert len({*others}) == 1
    told = others[0].removeprefix("RankError: rank 0: ")
    assert len(told) == control.LONGEST
    assert told.endswith("…")
    assert own.startswith(told[:-1])
    assert saw(played, "odd")[1] == "RankError: rank 0: CheckpointError: /t/\\udcff\n.bin"


def test_members_at_different_steps_end(played: list[Any]) -> None:
    assert all("are at different steps of the load" in str(result) for result in saw(played, "steps"))


def test_facts_without_a_form_in_json_end_all(played: list[Any]) -> None:
    text = "TypeError: Object of type set is not JSON serializable"
    assert saw(played, "no json") == [text, f"RankError: rank 0: {text}"]


def test_neighbours_are_those_of_one_host(played: list[Any]) -> None:
    assert saw(played, "neighbours") == [[(0, 2, 4), 0, 3], [(1,), 0, 1], [(0, 2, 4), 1, 3], [(0, 2, 4), 2, 3]]


def test_members_are_a_set(played: list[Any]) -> None:
    assert saw(played, "any order") == [[1, 2, 4]] * 3
    assert "rank 1 is not among those that are to load together ([2])" in saw(played, "not a member")[0]


def test_a_tree_of_several_levels_behaves_the_same(played: list[Any]) -> None:
    results = [list(column) for column in zip(*saw(played, "deep"), strict=True)]
    well, once, later, two, rounds, every, done, again = results
    assert well == again == [facts(list(ALL))] * 5
    assert once == ["RankError: rank 4: CheckpointError: a.safetensors: ended at byte 7"] * 4 + [
        "CheckpointError: a.safetensors: ended at byte 7"
    ]
    assert later[1:] == ["RankError: rank 0: CheckpointError: a.safetensors: ended at byte 8"] * 4
    assert {*two[1:-1]} <= {f"RankError: rank {rank}: CheckpointError: of {rank}" for rank in (0, 4)}
    assert rounds == [rounds[0]] * 5
    assert every == [f"CheckpointError: of {rank}" for rank in ALL]
    assert done[:-1] == ["RankError: rank 4: CheckpointError: last"] * 4


def test_beats_are_not_messages(played: list[Any]) -> None:
    assert saw(played, "beats") == [[[0, 1, 2], [0, 1, 2]]] * 3


def test_who_does_not_come_is_not_waited_for_without_end(played: list[Any]) -> None:
    assert saw(played, "nobody")[0] == "RankError: rank 4 has not come to the load within 0:00:00.300000"


def test_the_engine_stops_when_its_watch_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it waits for reads that take long; nothing else is different."""
    save_file({"weight": torch.ones(4, 4), "bias": torch.zeros(4)}, tmp_path / "model.safetensors")
    plan = lowmem.plan(tmp_path / "model.safetensors", model=nn.Linear(4, 4, device="meta"), dtype="bfloat16")
    model, looks = nn.Linear(4, 4, device="meta"), [0]
    run(plan, Installer(model), watch=lambda: looks.append(1))
    assert len(looks) > 1
    assert model.weight.dtype == torch.bfloat16
    assert model.weight.sum() == 16

    told, fill = threading.Event(), reading.ShardReader.fill

    def wait_and_fill(*args: Any) -> None:
        assert told.wait(60)
        fill(*args)

    def watch() -> None:
        looks.append(1)
        if len(looks) == 3:
            told.set()
            raise RankError("rank 3: is gone", rank=3)

    looks.clear()
    monkeypatch.setattr(reading.ShardReader, "fill", wait_and_fill)
    with pytest.raises(RankError, match="rank 3"):
        run(plan, Installer(nn.Linear(4, 4, device="meta")), watch=watch)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lowmem")]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def be_killed(rank: int) -> Any:
    """Rank after rank dies, each in a load with ranks 0 and 1, which go on."""
    # One that dies while it connects is missed when this is over.
    links.CONNECTING = links.timedelta(seconds=5)
    results = []
    for victim, moment in ((4, "at start"), (3, "in the engine"), (2, "at the end")):
        if rank in (0, 1, victim):
            results.append(attempt(_be_killed, rank, victim, moment))
    results.append(attempt(all_well, [0, 1], rank))
    return results


def _be_killed(rank: int, victim: int, moment: str) -> None:
    with Together([0, 1, victim]) as together:
        if moment != "at start":
            gather(together, None)
        if rank == victim:
            time.sleep(0.0 if moment == "at start" else 0.3)
            die()
        if moment != "at the end":
            look(together)


def test_a_killed_rank_ends_the_others_and_they_can_load_again() -> None:
    seen = run_ranks(5, be_killed)
    assert seen[2:] == [Died(-signal.SIGKILL)] * 3
    for rank in (0, 1):
        at_start, *others, again = seen[rank]
        # Before it was connected it cannot be known whether it was killed.
        assert at_start.startswith("RankError: rank 4 ")
        assert others == [f"RankError: rank {victim} {NO_WORD}" for victim in (3, 2)]
        assert again == facts([0, 1])


def lose_the_root(rank: int) -> Any:
    """The root of the tree, which holds the store too."""
    return attempt(_lose_the_root, rank)


def _lose_the_root(rank: int) -> None:
    control.WIDTH = 2
    with Together([0, 1, 2, 3]) as together:
        gather(together, None)
        if rank == 0:
            time.sleep(0.3)
            die()
        look(together)


def test_the_root_and_the_store_may_die() -> None:
    seen = run_ranks(4, lose_the_root, store_at=0)
    assert seen[0] == Died(-signal.SIGKILL)
    assert seen[1:] == [f"RankError: rank 0 {NO_WORD}"] * 3


def stop_one(rank: int) -> Any:
    return attempt(_stop_one, rank)


def _stop_one(rank: int) -> None:
    with Together([0, 1, 2]) as together:
        pids = gather(together, os.getpid())
        if rank == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        elif rank == 0:
            # It cannot be known to another when one has stopped.
            time.sleep(0.5)
            threading.Timer(8, os.kill, [pids[2], signal.SIGCONT]).start()
            fail("not waited for")
        look(together)


def test_a_stopped_rank_keeps_none_from_ending_and_hears_of_it_when_it_goes_on() -> None:
    seen = run_ranks(3, stop_one)
    assert seen == ["CheckpointError: not waited for"] + ["RankError: rank 0: CheckpointError: not waited for"] * 2


def test_one_alone_needs_no_process_group() -> None:
    with Together([5]) as together:
        together.check()
        assert gather(together, (1, "a")) == [[1, "a"]]
        assert find_neighbours(together).ranks == (5,)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("lowmem")]
    with pytest.raises(KeyboardInterrupt), Together([5]):
        raise KeyboardInterrupt


def test_several_need_one() -> None:
    with pytest.raises(OptionError, match="init_process_group"):
        Together([0, 1])


def test_the_room_opens_without_torch() -> None:
    code = "import json, sys, lowmem.ranks; print(json.dumps('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout) is False


def raise_or_leave(rank: int) -> Any:
    if rank == 1:
        raise ValueError("as it is")
    return rank


def test_the_helper_tells_answers_from_errors() -> None:
    first, second = run_ranks(2, raise_or_leave)
    assert first == 0
    assert isinstance(second, Raised)
    assert second.text == "ValueError: as it is"
