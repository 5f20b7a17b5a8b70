"""The results as Markdown: a table for each kind of case, then the goals beside what was seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.results import Results, Row
from lowmem.sizes import MIB

from .cases import CASES
from .goals import judge
from .loaders import TITLES


def as_markdown(results: Results) -> str:
    """Everything that the run tells, for people."""
    lines: list[str] = []
    for case in CASES:
        rows = [row for row in results["rows"] if row["case"] == case.name]
        if rows:
            lines += [f"**{case.title}**", "", *_TABLES[case.kind](rows), ""]
    lines += ["**goals**", "", "| case | goal | seen | met |", "|---|---|---|---|"]
    for outcome in judge(results["rows"]):
        met = "yes" if outcome.met else "no"
        lines.append(f"| {outcome.case} | {outcome.goal} | {outcome.found} | {met} |")
    return "\n".join(lines)


def _cells(row: Row, *cells: str) -> str:
    loader: str = row["loader"]
    title = TITLES.get(loader, loader)
    if row["status"] != "ok":
        reason = row["reason"].replace("|", "\\|")
        cells = (f"{row['status']}: {reason}", *[""] * (len(cells) - 1))
    return f"| {' | '.join((title, *cells))} |"


def _number(row: Row, key: str, unit: float = 1, digits: int = 3) -> str:
    return "-" if row.get(key) is None else f"{row[key] / unit:.{digits}f}"


def _steps(rows: Sequence[Row]) -> list[str]:
    lines = ["| loader | s a token, least | median | tokens/s | load, s |", "|---|---:|---:|---:|---:|"]
    for row in rows:
        rate = f"{1 / row['least']:.2f}" if "least" in row else "-"
        cells = (_number(row, "least"), _number(row, "median"), rate, _number(row, "load", digits=2))
        note = f" ({row['variant']})" if "variant" in row else ""
        lines.append(_cells(row, cells[0] + note, *cells[1:]))
    return lines


def _limit(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| run | limit, MiB | ram, MiB | s a token, least | median | anonymous peak, MiB | peak of the group, MiB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        sizes = [_number(row, key, MIB, 0) for key in ("limit", "ram", "anonymous", "peak")]
        lines.append(_cells(row, *sizes[:2], _number(row, "least"), _number(row, "median"), *sizes[2:]))
    return lines


def _steady(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| loader | forwards | s a forward | anonymous, MiB | handles | threads | mappings |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        seconds = _number(row, "least")
        if row["status"] != "ok":
            lines.append(_cells(row, *[""] * 6))
            continue
        for count, state in zip(row["forwards"], row["states"], strict=True):
            counts = (str(state[key]) for key in ("handles", "threads", "mappings"))
            lines.append(_cells(row, str(count), seconds, _number(state, "anonymous", MIB, 1), *counts))
    return lines


_TABLES: dict[str, Callable[[Sequence[Row]], list[str]]] = {"steps": _steps, "limit": _limit, "steady": _steady}
