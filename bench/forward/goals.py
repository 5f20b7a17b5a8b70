"""What the forward of weights on disk must reach, as ratios within one run: least of the tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from bench.goals import Outcome
from bench.results import Row
from lowmem.sizes import MIB

from .cases import CASES, LOADED

_OURS = ("lowmem", "lowmem-folder")
_PEERS = ("accelerate", "accelerate-dat")
# Within 15 %.
_NEAR = 1.15
# Noise of an allocator that keeps some pages and maps large blocks apart; a leak of one weight a forward is far more.
_GROWTH = {"anonymous": 4 * MIB, "handles": 0, "threads": 0, "mappings": 8}

Goal = Callable[[str, dict[str, Row]], Iterator[Outcome]]


def judge(rows: Sequence[Row]) -> list[Outcome]:
    """Every goal that the rows can tell about; rows that are wrong or failed meet none."""
    found: list[Outcome] = []
    for case in CASES:
        own = [row for row in rows if row["case"] == case.name]
        for row in own:
            ours = row["loader"].startswith("lowmem")
            if row["status"] not in ("ok", "cannot") and ours:
                found.append(Outcome(case.name, f"{row['loader']} runs", f"{row['status']}: {row['reason']}", False))
        fine = {row["loader"]: row for row in own if row["status"] == "ok"}
        for goal in _GOALS[case.name]:
            found.extend(goal(case.name, fine))
    return found


def _times(least: float, ours: Sequence[str], peers: Sequence[str]) -> Goal:
    """At least so many times as many tokens a second as each peer."""

    def judged(case: str, rows: dict[str, Row]) -> Iterator[Outcome]:
        for one in ours:
            for peer in peers:
                if one in rows and peer in rows:
                    ratio = rows[peer]["least"] / rows[one]["least"]
                    found = f"{ratio:.2f}x (medians {rows[peer]['median'] / rows[one]['median']:.2f}x)"
                    yield Outcome(case, f"{one} ≥ {least:g}x {peer}", found, ratio >= least)

    return judged


def _near(ours: Sequence[str], peers: Sequence[str]) -> Goal:
    """At most 15 % more time than the quickest of the peers."""

    def judged(case: str, rows: dict[str, Row]) -> Iterator[Outcome]:
        there = [peer for peer in peers if peer in rows]
        for one in ours:
            if one in rows and there:
                best = min(there, key=lambda peer: rows[peer]["least"])
                ratio = rows[one]["least"] / rows[best]["least"]
                goal = f"{one} within 15 % of {'loaded' if best in LOADED else best}"
                medians = rows[one]["median"] / rows[best]["median"]
                found = f"{ratio:.2f} of its time ({best}; medians {medians:.2f})"
                yield Outcome(case, goal, found, ratio <= _NEAR)

    return judged


def _limited(case: str, rows: dict[str, Row]) -> Iterator[Outcome]:
    for loader in ("lowmem, cold", "lowmem, warm"):
        if loader in rows and "no limit, in memory" in rows:
            row = rows[loader]
            goal = f"{loader}: the same tokens under {row['limit'] / MIB:.0f} MiB"
            found = f"passes, {row['median']:.2f} s a token" if "median" in row else "passes"
            yield Outcome(case, goal, found, True)


def _steady(case: str, rows: dict[str, Row]) -> Iterator[Outcome]:
    for loader, row in rows.items():
        first, last = row["states"]
        for what, most in _GROWTH.items():
            growth = last[what] - first[what]
            shown = f"{growth / MIB:+.1f} MiB" if what == "anonymous" else f"{growth:+d}"
            goal = f"{loader}: {what} do not grow" if what != "anonymous" else f"{loader}: memory does not grow"
            yield Outcome(case, goal, f"{shown} in {row['forwards'][1] - row['forwards'][0]} forwards", growth <= most)


_WARM: tuple[Goal, ...] = (
    _times(2, ("lowmem",), ("accelerate",)),
    _times(3, ("lowmem",), ("accelerate-dat",)),
    _near(("lowmem",), LOADED),
)
_GOALS: dict[str, tuple[Goal, ...]] = {
    "warm-all": _WARM,
    "warm-half": _WARM,
    "cast": (_times(3, _OURS, _PEERS), _near(("lowmem-folder",), LOADED)),
    "cold": (_times(1.5, ("lowmem",), ("accelerate",)), _near(("lowmem",), ("disk",))),
    "experts-warm": (_times(2, _OURS, ("accelerate",)),),
    "experts-cold": (_times(1.5, _OURS, ("accelerate",)),),
    "limit": (_limited,),
    "steady-dense": (_steady,),
    "steady-experts": (_steady,),
    "steady-cast": (_steady,),
}
