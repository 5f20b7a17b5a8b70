"""The order of things: checkpoints, then for each case rounds in which the loaders take turns."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lowmem
from bench.cases import Case
from bench.children import Forks, Fresh
from bench.kernel_limits import cgroup_kind
from bench.results import Row, make_row
from bench.sources import make_checkpoint, settle

# Loaders that read a format of their own. Named here so that the bench itself imports no torch; a test compares.
CONVERTING = ("torch", "flashpack", "tensorizer")


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        cases: in this order.
        loaders: names.
        folder: where checkpoints and conversions are.
        work: an empty folder on the same disk, for what loads write.
        rounds: processes of each case and loader.
        repeats: loads in each process.
        seconds: limit of a process.
        least_memory: whether to bisect.
    """

    cases: tuple[Case, ...]
    loaders: tuple[str, ...]
    folder: Path
    work: Path
    rounds: int
    repeats: int
    seconds: float
    least_memory: bool


def run(plan: Plan, children: Fresh | Forks, done: Callable[[Row], None], tell: Callable[[str], None]) -> None:
    """Run the cases, `tell` of each process that has ended, and hand every finished row to `done`."""
    for number, case in enumerate(plan.cases):
        source = make_checkpoint(plan.folder, case.checkpoint, case.stored, case.shard)
        answers: dict[str, list[dict[str, Any]]] = {loader: [] for loader in plan.loaders}
        for turn in range(plan.rounds):
            # Each round starts with another one, so that none always comes after the same.
            shift = (turn + number) % len(plan.loaders)
            for loader in plan.loaders[shift:] + plan.loaders[:shift]:
                # What fails does so again, and what takes minutes does too.
                if not any(answer["status"] != "ok" or answer["cut"] for answer in answers[loader]):
                    answers[loader].append(_ask(plan, children, case, source, loader, turn))
                    tell(f"{case.name}, round {turn + 1}, {loader}: {_brief(answers[loader][-1])}")
        resident = case.resident(lowmem.inspect(source))
        for loader in plan.loaders:
            row = make_row(case, loader, answers[loader], resident)
            if case.least_memory and plan.least_memory and row["status"] == "ok" and loader != "limit":
                row["least_memory"] = _least_memory(plan, children, case, source, row)
            done(row)
        later = [(c.checkpoint, c.stored) for c in plan.cases[number + 1 :] if _takes_converted(c)]
        if (case.checkpoint, case.stored) not in later:
            for loader in CONVERTING:
                shutil.rmtree(_converted(source, loader), ignore_errors=True)


def _takes_converted(case: Case) -> bool:
    """Whether a loader with a format of its own can do the case."""
    return not case.on_disk and case.staging is None and not case.is_int8


def _converted(source: Path, loader: str) -> Path:
    return source.with_name(f"{source.name}.{loader}")


def _order(plan: Plan, case: Case, source: Path, loader: str, do: str) -> dict[str, Any]:
    converted = str(_converted(source, loader)) if loader in CONVERTING else None
    return {
        "do": do,
        "case": asdict(case),
        "loader": loader,
        "source": str(source),
        "converted": converted,
        "work": str(plan.work),
    }


def _ask(plan: Plan, children: Fresh | Forks, case: Case, source: Path, loader: str, turn: int) -> dict[str, Any]:
    """Time a loader once; its conversion is written before its first turn."""
    order = _order(plan, case, source, loader, "time")
    converted = None if order["converted"] is None else Path(order["converted"])
    if converted is not None and not converted.exists():
        reason = _convert(children, {**order, "do": "convert"}, converted, plan.seconds)
        if reason is not None:
            return reason
    # The limit of cold files tries many readers, each as often as its share of the repeats.
    repeats = max(2, plan.repeats // 2) if loader == "limit" and case.cold else plan.repeats
    repeats = min(repeats, case.repeats or repeats)
    answer = children.ask({**order, "repeats": repeats, "peak": turn == 0 and not case.cold}, plan.seconds)
    # What a process that was ended has left.
    shutil.rmtree(plan.work / "offload", ignore_errors=True)
    return answer


def _convert(children: Fresh | Forks, order: dict[str, Any], converted: Path, seconds: float) -> dict[str, Any] | None:
    converted.mkdir()
    answer = children.ask(order, seconds)
    if answer["status"] == "ok":
        settle()
        return None
    shutil.rmtree(converted)
    return answer


def _least_memory(plan: Plan, children: Fresh | Forks, case: Case, source: Path, row: Row) -> dict[str, Any]:
    kind = cgroup_kind()
    if kind is None:
        return {"status": "cannot", "reason": "this process may make no memory cgroup"}
    order = _order(plan, case, source, row["loader"], "least")
    answer = children.ask({**order, "kind": kind, "first": row.get("peak", row["resident"])}, 10 * plan.seconds)
    # What a process that was ended has left.
    shutil.rmtree(plan.work / "offload", ignore_errors=True)
    return answer


def _brief(answer: dict[str, Any]) -> str:
    if answer["status"] != "ok":
        return f"{answer['status']}: {answer['reason']}"
    return f"least {min(run['weights'] for run in answer['runs']):.3f} s"
