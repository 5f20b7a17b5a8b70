"""The order of things: the ways of a case take turns, each in a process of its own; then their tensors are compared."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from bench.forward.children import Child
from bench.page_cache import warm
from bench.results import Row

from .cases import Case, Order, Sizes
from .checkpoints import files_of, make
from .child import Runner, difference
from .limited import run_limited
from .operators import has_timm

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """How to run.

    Attributes:
        cases: in this order.
        folder: where checkpoints are.
        sizes: of the checkpoints.
        rounds: turns of each way.
        seconds: limit of each answer.
    """

    cases: tuple[Case, ...]
    folder: Path
    sizes: Sizes
    rounds: int
    seconds: float


def run(plan: Plan, context: ForkServerContext, done: Callable[[Row], None], tell: Tell) -> None:
    """Run the cases, `tell` of each turn, and hand every finished row to `done`."""
    for case in plan.cases:
        rows: Iterable[Row]
        if case.needs_timm and not has_timm():
            rows = [{"loader": way, "status": "cannot", "reason": "timm is not installed"} for way in case.ways]
        elif case.kind == "limits":
            tell(f"{case.name}: writing what is not there yet")
            rows = run_limited(_orders(plan, case), plan.seconds, tell)
        else:
            tell(f"{case.name}: writing what is not there yet")
            rows = _take_turns(plan, context, case, tell)
        for row in rows:
            done({"case": case.name, "status": "ok", "reason": "", **row})


def _orders(plan: Plan, case: Case) -> list[Order]:
    folder = make(plan.folder, case.checkpoint, plan.sizes)
    plain = make(plan.folder, case.plain, plan.sizes) if case.plain else folder
    return [Order(way, folder, plain, case.options, plan.sizes) for way in case.ways]


def _take_turns(plan: Plan, context: ForkServerContext, case: Case, tell: Tell) -> list[Row]:
    orders = _orders(plan, case)
    rows: dict[str, Row] = {order.way: {"loader": order.way, "status": "ok", "times": []} for order in orders}

    def ask(child: Child, order: Order, what: str) -> None:
        if rows[order.way]["status"] != "ok":
            return
        warm(files_of(order.plain if order.way == "timm" else order.folder))
        answer = child.ask(what) if child.loaded["status"] == "ok" else child.loaded
        rows[order.way] |= {key: value for key, value in answer.items() if key != "seconds"}
        if "seconds" in answer:
            rows[order.way]["times"].append(answer["seconds"])
        tell(f"{case.name}, {order.way}: {_brief(answer)}")

    with ExitStack() as stack:
        children = {order.way: Child(context, Runner, order, plan.seconds) for order in orders}
        for child in children.values():
            stack.callback(child.close)
        for turn in range(plan.rounds):
            # Each round starts with another one, so that none always comes after the same.
            shift = turn % len(orders)
            for order in orders[shift:] + orders[:shift]:
                ask(children[order.way], order, "turn")
    for order in orders:
        # A first load in a process of its own: what earlier ones left behind would be used again, and not be seen.
        child = Child(context, Runner, order, plan.seconds)
        ask(child, order, "look")
        child.close()
    return [_summed_up(row) for row in check_tensors(list(rows.values()), case.reference)]


def _brief(answer: dict[str, Any]) -> str:
    if answer["status"] != "ok":
        return f"{answer['status']}: {answer['reason']}"
    return f"{answer['seconds']:.3f} s" if "seconds" in answer else "measured"


def check_tensors(rows: Sequence[Row], reference: str) -> list[Row]:
    """The rows, with those called `wrong` whose tensors are not the reference's; none counts where that has none."""
    known = next(row for row in rows if row["loader"] == reference)
    found = []
    for row in rows:
        if row["status"] == "ok" and known["status"] != "ok":
            row = {**row, "status": "cannot", "reason": f"nothing to compare with: {reference} {known['status']}"}
        elif row["status"] == "ok":
            name = difference(row["tensors"], known["tensors"], row.get("fresh", []))
            if name:
                row = {**row, "status": "wrong", "reason": f"{name} is not that of {reference}"}
        found.append(row)
    return found


def _summed_up(row: Row) -> Row:
    times = row["times"]
    kept = {key: value for key, value in row.items() if key not in ("tensors", "fresh")}
    if row["status"] != "ok":
        return kept
    return {**kept, "least": min(times), "median": statistics.median(times), "first": times[0]}
