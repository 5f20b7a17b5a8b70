"""The results as Markdown, a table for each case."""

from __future__ import annotations

from collections.abc import Sequence

from bench.results import Results, Row
from lowmem.sizes import MIB

from .cases import CASES, TITLES

_TURNS = {
    "s, least": ("least", 1, 3),
    "median": ("median", 1, 3),
    "first run": ("first", 1, 3),
    "anonymous peak, MiB": ("peak", MIB, 0),
    "held, MiB": ("held", MIB, 0),
    "tensors, MiB": ("size", MIB, 0),
}
_LIMITS = {
    "s": ("least", 1, 3),
    "limit, MiB": ("limit", MIB, 0),
    "peak of the group, MiB": ("group_peak", MIB, 0),
    "held, MiB": ("held", MIB, 0),
}


def as_markdown(results: Results) -> str:
    """Everything that the run tells, for people."""
    lines: list[str] = []
    for case in CASES:
        rows = [row for row in results["rows"] if row["case"] == case.name]
        if rows:
            lines += [f"**{case.title}**", "", *_table(rows, _LIMITS if case.kind == "limits" else _TURNS), ""]
    return "\n".join(lines)


def _table(rows: Sequence[Row], columns: dict[str, tuple[str, int, int]]) -> list[str]:
    lines = [f"| loader | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for row in rows:
        if row["status"] == "ok":
            cells = [_number(row, *column) for column in columns.values()]
        else:
            reason = row["reason"].replace("|", "\\|")
            cells = [f"{row['status']}: {reason}", *[""] * (len(columns) - 1)]
        lines.append(f"| {TITLES.get(row['loader'], row['loader'])} | {' | '.join(cells)} |")
    return lines


def _number(row: Row, key: str, unit: int, digits: int) -> str:
    return "-" if row.get(key) is None else f"{row[key] / unit:.{digits}f}"
