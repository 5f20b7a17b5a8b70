"""What lowmem must reach, as ratios within one run: least of the repeats, weights phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bench.results import Results, Row, find_row
from lowmem.sizes import MIB

_PEERS = ("transformers", "accelerate", "safetensors", "torch", "fastsafetensors", "runai", "flashpack", "tensorizer")
_MAPPING = ("transformers", "accelerate", "safetensors", "torch")
_STREAMERS = ("fastsafetensors", "runai")
_ABOVE_RESIDENT = 80 * MIB


@dataclass(frozen=True)
class Outcome:
    """A goal and what was found.

    Attributes:
        case: name of the case.
        goal: in words.
        found: in words.
        met: None when the run does not tell.
    """

    case: str
    goal: str
    found: str
    met: bool | None


def judge(results: Results) -> list[Outcome]:
    """Every goal that the run's cases and loaders can tell about."""
    found: list[Outcome] = []
    for case in dict.fromkeys(row["case"] for row in results["rows"]):
        ours = find_row(results, case, "lowmem")
        if ours is None:
            if case in _GOALS:
                found.append(Outcome(case, "be loaded by lowmem", _why_not(results, case), False))
            continue
        for goal in _GOALS.get(case, ()):
            found.extend(goal(results, case, ours))
        if "above" in ours:
            above = ours["above"]
            text = f"{above / MIB:.1f} MiB"
            found.append(Outcome(case, "peak above resident ≤ 80 MiB", text, above <= _ABOVE_RESIDENT))
    return found


def _why_not(results: Results, case: str) -> str:
    row: Row = next((r for r in results["rows"] if r["case"] == case and r["loader"] == "lowmem"), {})
    return f"{row['status']}: {row['reason']}" if row else "not run"


Goal = Callable[[Results, str, Row], Iterator[Outcome]]


def _seconds(most: float) -> Goal:
    def judged(results: Results, case: str, ours: Row) -> Iterator[Outcome]:
        yield Outcome(case, f"≤ {most:g} s", f"{ours['least']:.3f} s", ours["least"] <= most)

    return judged


def _above_limit(most: float) -> Goal:
    """At most so many seconds above what moving the bytes takes."""

    def judged(results: Results, case: str, ours: Row) -> Iterator[Outcome]:
        limit = find_row(results, case, "limit")
        if limit is not None:
            above = ours["least"] - limit["least"]
            yield Outcome(case, f"≤ {most:g} s above the limit", f"{above:.3f} s", above <= most)

    return judged


def _limit(least: float) -> Goal:
    def judged(results: Results, case: str, ours: Row) -> Iterator[Outcome]:
        limit = find_row(results, case, "limit")
        if limit is not None:
            share = limit["least"] / ours["least"]
            yield Outcome(case, f"≥ {least:.0%} of the limit", f"{share:.0%} ({limit['variant']})", share >= least)

    return judged


def _times(least: float, *loaders: str) -> Goal:
    """At least so many times as fast as each of the loaders."""

    def judged(results: Results, case: str, ours: Row) -> Iterator[Outcome]:
        for loader in loaders:
            peer = find_row(results, case, loader)
            if peer is not None:
                ratio = peer["least"] / ours["least"]
                yield Outcome(case, f"≥ {least:g}x {loader}", f"{ratio:.2f}x", ratio >= least)

    return judged


def _best(least: float, *loaders: str) -> Goal:
    """At least so many times as fast as the best of the loaders."""

    def judged(results: Results, case: str, ours: Row) -> Iterator[Outcome]:
        found = [row for loader in loaders if (row := find_row(results, case, loader)) is not None]
        if found:
            peer = min(found, key=lambda row: row["least"])
            ratio = peer["least"] / ours["least"]
            text = "not slower than any peer" if least == 1 else f"≥ {least:g}x the best peer"
            yield Outcome(case, text, f"{ratio:.2f}x ({peer['loader']})", ratio >= least)

    return judged


def _staging(other: str, most: float) -> Goal:
    """At most so many times as long as with another staging."""

    def judged(results: Results, case: str, ours: Row) -> Iterator[Outcome]:
        peer = find_row(results, other, "lowmem")
        if peer is not None:
            ratio = ours["least"] / peer["least"]
            goal = f"staging 16 MiB takes ≤ {most:g}x the time of 64 MiB"
            yield Outcome(case, goal, f"{ratio:.2f}x", ratio <= most)

    return judged


_GOALS: dict[str, tuple[Goal, ...]] = {
    "map-bf16": (_seconds(0.06), _best(1, *_PEERS)),
    "copy-bf16": (_limit(0.85), _best(2, *_PEERS), _times(4, *_STREAMERS)),
    "bf16-fp32": (_limit(0.85), _times(3, "transformers"), _times(3.5, "accelerate")),
    "cold-copy-bf16": (_limit(0.9), _times(1.5, *_MAPPING)),
    "cold-bf16-fp32": (_limit(0.9), _times(1.5, *_MAPPING)),
    "disk-fp32": (_times(2, "transformers"), _times(3, "accelerate")),
    "experts-bf16": (_times(3, "transformers"),),
    "experts-fp32": (_times(3, "transformers"),),
    "experts-many": (_above_limit(2), _times(3, "transformers")),
    "small-map": (_seconds(1.0), _best(1, *_PEERS), _times(3, "transformers", "accelerate")),
    "small-copy": (_times(3, "transformers", "accelerate"),),
    "int8-quantise": (_times(4, "transformers"),),
    "staging-16": (_staging("staging-64", 1.1),),
}
