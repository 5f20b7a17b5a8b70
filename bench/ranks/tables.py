"""The results as Markdown, a table for each case and number of ranks."""

from __future__ import annotations

from bench.results import Results, Row
from lowmem.sizes import MIB

from .cases import CASES, TITLES

_COLUMNS = {
    "s, least": ("least", 1, 3),
    "median": ("median", 1, 3),
    "first, new process": ("first", 1, 3),
    "peak of all, MiB": ("peak_sum", MIB, 0),
    "of one": ("peak_most", MIB, 0),
    "part of one": ("held", MIB, 0),
    "mapped by one": ("mapped", MIB, 0),
    "read by all": ("read", MIB, 0),
    "tensors equal": ("equal", 1, 0),
}
_PHASES = ("inspect", "import", "build", "plan", "weights")


def as_markdown(results: Results) -> str:
    """Everything that the run tells, for people."""
    lines: list[str] = []
    for count in results["options"]["ranks"]:
        for case in CASES:
            rows = [row for row in results["rows"] if (row["case"], row["ranks"]) == (case.name, count)]
            if rows:
                limit = next((row["limited"]["limit"] for row in rows if row.get("limited", {}).get("limit")), None)
                lines += [f"**{case.title}, {count} ranks**", "", *_table(rows, limit), ""]
    rows = [row for row in results["rows"] if "phases" in row]
    if rows:
        lines += ["**lowmem's phases, seconds of the slowest rank, least**", "", *_phases(rows), ""]
    return "\n".join(lines)


def _table(rows: list[Row], limit: int | None) -> list[str]:
    last = "under the limit" if limit is None else f"under {limit / MIB:.0f} MiB for each"
    lines = [f"| loader | {' | '.join(_COLUMNS)} | {last} |", f"|---|{'---:|' * len(_COLUMNS)}---|"]
    for row in rows:
        if row["status"] == "ok":
            cells = [_number(row, *column) for column in _COLUMNS.values()]
        else:
            cells = [_escaped(f"{row['status']}: {row['reason']}"), *[""] * (len(_COLUMNS) - 1)]
        lines.append(f"| {TITLES[row['loader']]} | {' | '.join(cells)} | {_verdict(row.get('limited'))} |")
    return lines


def _verdict(limited: Row | None) -> str:
    if limited is None:
        return "-"
    if limited["status"] == "ok":
        return f"passes, {limited['group_peak'] / MIB:.0f} MiB in all" if limited.get("group_peak") else "passes"
    return "killed" if limited["status"] == "killed" else _escaped(f"{limited['status']}: {limited['reason']}")


def _phases(rows: list[Row]) -> list[str]:
    titles = {case.name: case.title for case in CASES}
    lines = [f"| load | ranks | {' | '.join(_PHASES)} |", f"|---|---:|{'---:|' * len(_PHASES)}"]
    for row in rows:
        cells = [f"{row['phases'].get(name, 0):.3f}" for name in _PHASES]
        name = f"{titles[row['case']]}: {TITLES[row['loader']]}"
        lines.append(f"| {name} | {row['ranks']} | {' | '.join(cells)} |")
    return lines


def _number(row: Row, key: str, unit: int, digits: int) -> str:
    return "-" if row.get(key) is None else f"{row[key] / unit:.{digits}f}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
