"""The record of a run of the bench: the machine, and a row for each case and loader."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil

from bench.cases import Case
from lowmem._mounts import file_system

Results = dict[str, Any]
Row = dict[str, Any]


def describe_machine(folder: Path, versions: dict[str, str]) -> dict[str, Any]:
    """What a reader must know to compare: hardware, kernel, versions, file system of `folder`, commit, date."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions,
        "file_system": file_system(folder) or "unknown",
        "commit": _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Those of the packages that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit of the tree that the bench is in, with a + when it was changed."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def make_row(case: Case, loader: str, answers: Sequence[dict[str, Any]], resident: int) -> Row:
    """One row from the answers of the children of one case and loader, one per round."""
    row: Row = {"case": case.name, "loader": loader, "status": "ok", "reason": ""}
    bad = next((answer for answer in answers if answer["status"] != "ok"), None)
    if bad is not None:
        return {**row, "status": bad["status"], "reason": bad["reason"]}
    runs = [run for answer in answers for run in answer["runs"]]
    best = min(runs, key=lambda run: run["weights"])
    # A loader that tries several ways is judged by its best one.
    same = [run["weights"] for run in runs if run["variant"] == best["variant"]]
    imports = [answer["import"] for answer in answers if answer["import"] is not None]
    build = min(run["build"] for run in runs)
    row.update(
        {
            "least": best["weights"],
            "median": statistics.median(same),
            "most": max(same),
            "first": statistics.median(_first(answer["runs"], best["variant"]) for answer in answers),
            "build": build,
            "import": min(imports) if imports else None,
            "whole": best["weights"] + build + (min(imports) if imports else 0.0),
            "variant": best["variant"],
            "times": [[run["weights"] for run in answer["runs"]] for answer in answers],
            "variants": _by_variant(runs),
            "checked": min(answer["checked"] for answer in answers),
            "resident": resident,
            "note": answers[0]["note"],
        }
    )
    peaks = [answer["peak"] for answer in answers if answer.get("peak")]
    if peaks and "peak" in peaks[0]:
        row.update(peak=peaks[0]["peak"], above=peaks[0]["peak"] - resident, timeline=peaks[0]["timeline"])
    elif peaks:
        row["peak_error"] = peaks[0]["error"]
    return row


def _first(runs: Iterable[dict[str, Any]], variant: str) -> float:
    return next(float(run["weights"]) for run in runs if run["variant"] == variant)


def _by_variant(runs: Iterable[dict[str, Any]]) -> dict[str, float]:
    least: dict[str, float] = {}
    for run in runs:
        least[run["variant"]] = min(run["weights"], least.get(run["variant"], float("inf")))
    return least


def make_results(machine: dict[str, Any], cases: Sequence[Case], options: dict[str, Any]) -> Results:
    """Plain values, ready for JSON, without rows yet; `titles` are the loaders' and belong in too."""
    return {"machine": machine, "options": options, "cases": [asdict(case) for case in cases], "rows": []}


def write(results: Results, file: Path) -> None:
    """As JSON, a row a line: timelines are long, and a change of one row is a change of one line."""
    rows = ",\n".join(json.dumps(row) for row in results["rows"])
    head = json.dumps({key: value for key, value in results.items() if key != "rows"}, indent=1)
    file.write_text(f'{head[:-2]},\n "rows": [\n{rows}\n]\n}}\n', encoding="utf-8")


def read(file: Path) -> Results:
    """What `write` wrote."""
    found: Results = json.loads(file.read_text(encoding="utf-8"))
    return found


def find_row(results: Results, case: str, loader: str) -> Row | None:
    """The row of a case and loader that has times, None when there is none."""
    for row in results["rows"]:
        if row["case"] == case and row["loader"] == loader and row["status"] == "ok":
            found: Row = row
            return found
    return None
