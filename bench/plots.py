"""Results as pictures: time and peak per case, and memory over time of one case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.results import Results, Row
from lowmem.sizes import MIB

# Of the lines that are neither lowmem's nor the limit's.
_OTHERS = tuple(f"tab:{name}" for name in ("orange", "green", "red", "purple", "brown", "pink", "olive", "cyan"))


def draw(results: Results, folder: Path) -> list[Path]:
    """Write `times.png`, `peaks.png` and `timeline.png`, those that the results allow; returns what was written."""
    import matplotlib

    matplotlib.use("Agg")
    written = []
    rows = [row for row in results["rows"] if row["status"] == "ok"]
    if rows:
        written.append(_bars(results, rows, "least", "weights phase, s (least)", folder / "times.png"))
    peaks = [{**row, "peak": row["peak"] / MIB} for row in rows if "peak" in row]
    if peaks:
        written.append(_bars(results, peaks, "peak", "anonymous peak above imports, MiB", folder / "peaks.png"))
        written.append(_timeline(results, peaks, folder / "timeline.png"))
    return written


def _bars(results: Results, rows: list[Row], key: str, label: str, file: Path) -> Path:
    """One panel per case, one bar per loader."""
    from matplotlib import pyplot

    cases = [case for case in results["cases"] if any(row["case"] == case["name"] for row in rows)]
    height = sum(0.6 + 0.25 * _count(rows, case) for case in cases)
    figure, panels = pyplot.subplots(
        len(cases),
        squeeze=False,
        figsize=(8, height),
        layout="constrained",
        height_ratios=[0.6 + 0.25 * _count(rows, case) for case in cases],
    )
    for panel, case in zip(panels[:, 0], cases, strict=True):
        mine = sorted((row for row in rows if row["case"] == case["name"]), key=lambda row: -row[key])
        titles = [results["titles"][row["loader"]] for row in mine]
        bars = panel.barh(titles, [row[key] for row in mine], color=[_colour(row["loader"]) for row in mine])
        panel.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
        panel.margins(x=0.1)
        panel.set_title(case["title"], fontsize=9, loc="left")
        panel.tick_params(labelsize=8)
    panels[-1, 0].set_xlabel(label)
    return _save(figure, file)


def _count(rows: list[Row], case: dict[str, Any]) -> int:
    return sum(row["case"] == case["name"] for row in rows)


def _colour(loader: str) -> str:
    return {"lowmem": "tab:blue", "limit": "black"}.get(loader, "tab:gray")


def _timeline(results: Results, rows: list[Row], file: Path) -> Path:
    """Anonymous memory over time, of the case that most is moved in, a line per loader."""
    from matplotlib import pyplot

    name = max(rows, key=lambda row: row["resident"])["case"]
    figure, panel = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    others = iter(_OTHERS)
    for row in rows:
        if row["case"] == name:
            colour = _colour(row["loader"]) if row["loader"] in ("lowmem", "limit") else next(others, "gold")
            seconds = [point[0] for point in row["timeline"]]
            sizes = [point[1] / MIB for point in row["timeline"]]
            panel.plot(seconds, sizes, label=results["titles"][row["loader"]], color=colour)
    panel.set_title(next(case["title"] for case in results["cases"] if case["name"] == name), fontsize=10, loc="left")
    panel.set_xlabel("seconds of the load that was measured (build included)")
    panel.set_ylabel("anonymous memory above imports, MiB")
    panel.legend(fontsize=8)
    return _save(figure, file)


def _save(figure: Any, file: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(file, dpi=120)
    pyplot.close(figure)
    return file
