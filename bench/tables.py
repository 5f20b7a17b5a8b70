"""Results as Markdown, which README quotes."""

from __future__ import annotations

from collections.abc import Mapping

from bench.goals import judge
from bench.results import Results, Row, find_row
from lowmem.sizes import GIB, MIB

_HEAD = (
    "| loader | least, s | median | most | first | of the limit | build | import | whole | peak, MiB "
    "| above resident | least memory |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
)
_COLUMNS = 12


def as_markdown(results: Results) -> str:
    """The machine, the goals, and a table for each case, in groups."""
    parts = [machine_line(results), goals_table(results)]
    for group in dict.fromkeys(case["group"] for case in results["cases"]):
        parts.append(f"### {group}")
        for case in results["cases"]:
            if case["group"] == group:
                parts.append(case_table(results, case["name"]))
    parts.append(_explained())
    return "\n\n".join(part for part in parts if part)


def machine_line(results: Results) -> str:
    """Hardware, versions and settings in one paragraph."""
    machine, options = results["machine"], results["options"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory'] / GIB:.1f} GiB, {machine['kernel']}, "
        f"{machine['file_system']}, Python {machine['python']}; {versions}; commit {machine['commit']}, "
        f"{machine['date']}; {options['rounds']} processes of {options['repeats']} loads each."
    )


def summary(results: Results) -> str:
    """One row a case, for README: lowmem's time, its share of the limit, and how many times as long its peers take."""
    lines = [
        "| case | lowmem, s | of the limit | transformers | accelerate | the best peer | above resident, MiB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for case in results["cases"]:
        ours = find_row(results, case["name"], "lowmem")
        if ours is None:
            continue
        limit = find_row(results, case["name"], "limit")
        peers = [r for r in results["rows"] if r["case"] == case["name"] and r["status"] == "ok"]
        peers = [r for r in peers if r["loader"] not in ("lowmem", "limit")]
        best = min(peers, key=lambda row: row["least"], default=None)
        cells = [
            case["title"],
            f"{ours['least']:.3f}",
            "-" if limit is None else f"{limit['least'] / ours['least']:.0%}",
        ]
        cells += [_times(ours, find_row(results, case["name"], name)) for name in ("transformers", "accelerate")]
        cells.append("-" if best is None else f"{_times(ours, best)} ({results['titles'][best['loader']]})")
        cells.append(f"{ours['above'] / MIB:.0f}" if "above" in ours else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _times(ours: Row, peer: Row | None) -> str:
    return "-" if peer is None else f"{peer['least'] / ours['least']:.1f}x"


def goals_table(results: Results) -> str:
    """Goals met and missed, empty when the run tells about none."""
    outcomes = judge(results)
    if not outcomes:
        return ""
    lines = ["| case | goal | found | |", "|---|---|---|---|"]
    for one in outcomes:
        lines.append(f"| {one.case} | {one.goal} | {_cell(one.found)} | {'met' if one.met else '**missed**'} |")
    return "\n".join(lines)


def case_table(results: Results, name: str) -> str:
    """One case: a row per loader, the fastest first, those that cannot last."""
    case = next(case for case in results["cases"] if case["name"] == name)
    rows: list[Row] = [row for row in results["rows"] if row["case"] == name]
    limit = find_row(results, name, "limit")
    good = sorted((row for row in rows if row["status"] == "ok"), key=lambda row: row["least"])
    lines = [f"**{case['title']}** (`{name}`, {case['checkpoint']})", "", _HEAD]
    lines += [_row(row, limit, results["titles"]) for row in good]
    for row in rows:
        if row["status"] != "ok":
            reason = row["reason"] if row["status"] == "wrong" else f"{row['status']}: {row['reason']}"
            empty = " |" * (_COLUMNS - 2)
            lines.append(f"| {results['titles'].get(row['loader'], row['loader'])} | {_cell(reason)} |{empty}")
    notes = [f"{results['titles'][row['loader']]} {row['note']}." for row in good if row["note"]]
    return "\n".join(lines) + ("\n\n" + " ".join(notes) if notes else "")


def _row(row: Row, limit: Row | None, titles: Mapping[str, str]) -> str:
    share = f"{limit['least'] / row['least']:.0%}" if limit is not None else "-"
    title: str = titles.get(row["loader"], row["loader"])
    if row["variant"]:
        title += f" ({row['variant']})"
    cells: list[str] = [title, *(f"{row[key]:.3f}" for key in ("least", "median", "most", "first")), share]
    cells += [f"{row['build']:.3f}", "-" if row["import"] is None else f"{row['import']:.1f}", f"{row['whole']:.2f}"]
    cells += ["-", "-"] if "peak" not in row else [f"{row[key] / MIB:.0f}" for key in ("peak", "above")]
    cells.append(_least_memory(row))
    return "| " + " | ".join(cells) + " |"


def _least_memory(row: Row) -> str:
    found = row.get("least_memory")
    if found is None:
        return "-"
    return f"{found['least'] / MIB:.0f}" if found["status"] == "ok" else _cell(f"{found['status']}: {found['reason']}")


def _cell(text: str) -> str:
    """Without what would end a cell, and no longer than a line can hold."""
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= 160 else text[:157] + "..."


def _explained() -> str:
    return (
        "Times are seconds of the weights phase: all of the load except making the model (build). `least`, `median` "
        "and `most` are over all loads of all processes, `first` is the median of each process's first load, `whole` "
        "adds imports and build. Peaks are anonymous memory above the imports; `above resident` is what is not "
        "weights. `least memory` is the smallest memory cgroup, in MiB, under which the load still passes, with the "
        "imports' own memory outside of it. A dash is what was not measured."
    )
