"""Runs of the cases: rounds of all ways in the same ranks, then new ranks for the peak, and under a kernel limit."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import psutil
from torch._C._distributed_c10d import TCPStore

from bench.forward.children import Child
from bench.page_cache import warm
from bench.results import Row
from lowmem.sizes import MIB

from .cases import Case, Member, Order
from .child import Runner
from .limited import interpreter, run_limited

Tell = Callable[[str], None]

# What a rank's imports take, and what must be left to others.
_INTERPRETER = 300 * MIB
_SPARE = 1024 * MIB
# How often a way holds what the ranks hold together, at its worst moment; measured.
_TIMES = {"torch": 2, "accelerate": 3}
_MAPS = ("lowmem", "transformers")


@dataclass(frozen=True)
class Plan:
    """How to run.

    Attributes:
        cases: in this order.
        ranks: how many there are, each number in its turn.
        folder: of the checkpoint.
        rounds: turns of each way.
        seconds: limit of each answer.
        limits: whether the loads are also run under a kernel limit.
    """

    cases: tuple[Case, ...]
    ranks: tuple[int, ...]
    folder: Path
    rounds: int
    seconds: float
    limits: bool


class Ranks:
    """Processes that load together; once one of them fails, none answers any more."""

    def __init__(self, context: ForkServerContext, count: int, seconds: float) -> None:
        self._store, members = _members(count, seconds)
        self._pool = ThreadPoolExecutor(count)
        self._children = [Child(context, Runner, member, 2 * seconds) for member in members]
        self._failed: Row = {}
        self.ask("join")

    def ask(self, what: str, order: Order | None = None) -> list[Row]:
        """The answer of each rank; of the first that failed alone, where one did."""
        if not self._failed:
            answers = list(self._pool.map(lambda child: child.ask(what, order), self._children))
            bad = [(rank, answer) for rank, answer in enumerate(answers) if answer["status"] != "ok"]
            if not bad:
                return answers
            # What the others say is mostly that a connection was closed.
            rank, answer = min(bad, key=lambda one: "onnection" in one[1]["reason"])
            self._failed = {**answer, "reason": f"rank {rank}: {answer['reason']}"}
        return [self._failed]

    @property
    def works(self) -> bool:
        """Whether none has failed."""
        return not self._failed

    def close(self) -> None:
        """End them all at once: each may wait for the others."""
        list(self._pool.map(Child.close, self._children))
        self._pool.shutdown()


def _members(count: int, seconds: float) -> tuple[TCPStore, list[Member]]:
    """The store, which lives as long as somebody holds it, and who may use it."""
    limit = timedelta(seconds=seconds)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=limit)
    return store, [Member(rank, count, store.port, seconds) for rank in range(count)]


def run(plan: Plan, context: ForkServerContext, done: Callable[[Row], None], tell: Tell) -> None:
    """Run the cases, `tell` of each turn, and hand every finished row to `done`."""
    idle: dict[int, Row] = {}
    for count in plan.ranks:
        for case in plan.cases:
            orders = [Order(way, case.division, case.dtype, plan.folder) for way in case.ways]
            name = f"{case.name}, {count} ranks"
            rows = {order.way: row for order, row in zip(orders, _blank(case, count, orders), strict=True)}
            say = partial(_say, tell, name)
            for order in orders:
                rows[order.way] |= _room(order, count)
            _take_turns(plan, context, orders, rows, say)
            _look(plan, context, orders, rows, say)
            if plan.limits:
                if count not in idle:
                    idle[count] = _idle(plan, orders[0], count)
                _limit(plan, orders, rows, idle[count], say)
            for row in rows.values():
                done(_summed_up(row))


def _say(tell: Tell, name: str, text: str) -> None:
    tell(f"{name}, {text}")


def _room(order: Order, count: int) -> Row:
    """The status of a way that this machine has no memory for: the kernel would kill whatever is largest."""
    whole = sum(file.stat().st_size for file in order.folder.glob("*.safetensors"))
    if order.dtype == "float32":
        whole *= 2
    elif order.way in _MAPS:
        # TP copies what is divided by columns.
        whole = whole // 2 if order.division == "tp" else 0
    parts = whole * (count if order.division == "replicated" else 1) * _TIMES.get(order.way, 1)
    needed, free = parts + count * _INTERPRETER + _SPARE, psutil.virtual_memory().available
    if needed <= free:
        return {}
    return {"status": "cannot", "reason": f"it takes about {needed / 1e9:.1f} GB, of which {free / 1e9:.1f} are free"}


def _blank(case: Case, count: int, orders: Iterable[Order]) -> Iterator[Row]:
    for order in orders:
        yield {"case": case.name, "ranks": count, "loader": order.way, "status": "ok", "reason": "", "turns": []}


def _take_turns(plan: Plan, context: ForkServerContext, orders: list[Order], rows: dict[str, Row], tell: Tell) -> None:
    """Each round starts with another way, so that none always comes after the same."""
    with ExitStack() as stack:
        ranks = _new(stack, context, plan, rows)
        for turn in range(plan.rounds):
            shift = turn % len(orders)
            for order in orders[shift:] + orders[:shift]:
                row = rows[order.way]
                if row["status"] != "ok":
                    continue
                if not ranks.works:
                    # One way's failure is not the others'.
                    ranks = _new(stack, context, plan, rows)
                warm(sorted(plan.folder.glob("*.safetensors")))
                answers = ranks.ask("turn", order)
                if _is_fine(row, answers):
                    row["turns"].append(answers)
                    tell(f"{order.way}: {max(answer['seconds'] for answer in answers):.3f} s")
                else:
                    tell(f"{order.way}: {row['status']}: {row['reason']}")


def _new(stack: ExitStack, context: ForkServerContext, plan: Plan, rows: dict[str, Row]) -> Ranks:
    ranks = Ranks(context, next(iter(rows.values()))["ranks"], plan.seconds)
    stack.callback(ranks.close)
    return ranks


def _is_fine(row: Row, answers: list[Row]) -> bool:
    """Whether all ranks are; the row gets the reason why not."""
    bad = next((answer for answer in answers if answer["status"] != "ok"), None)
    if bad is not None:
        status = "wrong" if "WrongResultError" in bad["reason"] else bad["status"]
        row |= {"status": status, "reason": bad["reason"]}
    return bad is None


def _look(plan: Plan, context: ForkServerContext, orders: list[Order], rows: dict[str, Row], tell: Tell) -> None:
    """A first load in new processes: what earlier ones left behind would be used again, and not be seen."""
    for order in orders:
        row = rows[order.way]
        if row["status"] != "ok":
            continue
        with ExitStack() as stack:
            answers = _new(stack, context, plan, rows).ask("look", order)
        if _is_fine(row, answers):
            peaks = [answer["peak"] for answer in answers]
            row |= {"peak_sum": sum(peaks), "peak_most": max(peaks), "kept_sum": sum(a["kept"] for a in answers)}
            row |= {"first": max(a["seconds"] for a in answers)}
            row |= {"held": max(a["held"] for a in answers), "equal": min(a["equal"] for a in answers)}
        tell(f"{order.way}: measured, {row['status']} {row['reason']}")


def _idle(plan: Plan, order: Order, count: int) -> Row:
    with _Store(count, plan.seconds) as members:
        return interpreter(order, members, plan.seconds)


def _limit(plan: Plan, orders: list[Order], rows: dict[str, Row], idle: Row, tell: Tell) -> None:
    """Every way gets the same: what its rank holds is the same for all that were found right."""
    held = max((row["held"] for row in rows.values() if "held" in row), default=None)
    for order in orders:
        row = rows[order.way]
        if row["status"] == "cannot":
            continue
        if held is None or idle["status"] != "ok":
            row["limited"] = {"status": "cannot", "reason": "nothing to compare with"}
            continue
        with _Store(row["ranks"], plan.seconds) as members:
            row["limited"] = run_limited(order, members, held, idle["interpreter"], plan.seconds)
        tell(f"{order.way}: under a limit, {row['limited']['status']} {row['limited']['reason']}")


class _Store:
    """New members each time they are asked for; their stores live until the end."""

    def __init__(self, count: int, seconds: float) -> None:
        self._count, self._seconds = count, seconds
        self._stores: list[TCPStore] = []

    def __enter__(self) -> Callable[[], list[Member]]:
        return self._make

    def __exit__(self, *_: object) -> None:
        self._stores.clear()

    def _make(self) -> list[Member]:
        store, members = _members(self._count, self._seconds)
        self._stores.append(store)
        return members


def _summed_up(row: Row) -> Row:
    """The row with the least of the slowest ranks, and the least of each phase likewise."""
    turns: list[list[dict[str, Any]]] = row["turns"]
    kept = {key: value for key, value in row.items() if key != "turns"}
    if row["status"] != "ok":
        return kept
    times = [max(answer["seconds"] for answer in turn) for turn in turns]
    found: Row = {"least": min(times), "median": statistics.median(times), "times": times}
    last = turns[-1]
    if "read" in last[0]:
        found["read"] = sum(answer["read"] for answer in last)
        found["mapped"] = max(answer["mapped"] for answer in last)
        phases = [{name: max(a["phases"][name] for a in turn) for name in turn[0]["phases"]} for turn in turns]
        found["phases"] = {name: min(one[name] for one in phases) for name in phases[0]}
    return {**kept, **found}
