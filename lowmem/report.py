"""Records for people: the report of a load, and every record as a table."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from . import plots
from .sizes import format_size

if TYPE_CHECKING:
    from rich.table import Table

    from .checkpoint import Checkpoint
    from .memory import Measurement
    from .planner import LoadPlan
    from .planner.ranks import HostShare, RankPlan, RanksPlan

T = TypeVar("T")
# So many rows are read one by one; of more, equal ones become one.
_MANY_ROWS = 16


@dataclass(frozen=True, eq=False)
class LoadReport:
    """What happened in a load.

    Attributes:
        plan: what was decided.
        phases: seconds of each part: `inspect` (headers), `import` (the model's class and its config), `build` (the
            model without weights), `plan`, `weights` (every byte moved and installed).
        memory: the measured peaks, with a mark where each shard was opened.
        read: bytes by the way they were read: `buffered` (through the page cache), `direct` (past it), `mmap`.
    """

    plan: LoadPlan = field(repr=False)
    phases: Mapping[str, float]
    memory: Measurement = field(repr=False)
    read: Mapping[str, int] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Of all phases."""
        return sum(self.phases.values())

    @property
    def predicted_peak(self) -> int:
        """Bytes of anonymous host memory that the plan said the load would add at most."""
        return self.plan.host.peak

    @property
    def peak(self) -> int:
        """Bytes of anonymous host memory that the load added at its worst moment, as measured."""
        return self.memory.peak

    @property
    def bytes_read(self) -> int:
        """Tensor bytes that were read; mapped and referred ones were not."""
        return self.plan.bytes_read

    @property
    def bytes_written(self) -> int:
        """Bytes that were written into the offload folder."""
        return self.plan.bytes_written

    @property
    def opened(self) -> str:
        """The path of the mapping inside a pickled file that held the weights; empty for the whole file."""
        return self.plan.checkpoint.opened

    @property
    def initialised(self) -> tuple[str, ...]:
        """Names that no key fed, so the model's own rule gave them their values."""
        return tuple(name for p in self.plan.placements if p.residency == "init" for name in p.names)

    @property
    def unexpected(self) -> tuple[str, ...]:
        """Keys of the checkpoint that fed nothing."""
        return self.plan.mapping.unexpected

    @property
    def rate(self) -> float:
        """Tensor bytes read per second of moving."""
        return self.plan.bytes_read / max(self.phases["weights"], 1e-9)

    def assert_peak_below(self, limit: int | str) -> None:
        """For tests: the measured host peak is below `limit`.

        Raises:
            PeakExceededError: it is not.
        """
        self.memory.assert_peak_below(limit)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw memory over time, with the shards and the predicted peak, into a .png, .svg or .pdf file.

        Needs `pip install 'lowmem[plot]'`. Sizes are what the load added.

        Raises:
            OptionError: `path` is not that of a picture, or cannot be written.
            PlotError: matplotlib is not here, or the disk is full.
        """
        target = plots.parse_target(path)
        name = Path(self.plan.checkpoint.source).name or self.plan.checkpoint.source
        title = f"{name}: loaded in {self.seconds:.2f} s"
        plots.save(plots.draw(self.memory, title=title, levels=self._levels()), target)

    def _levels(self) -> list[plots.Level]:
        host = self.plan.host
        levels = [plots.Level("predicted peak", host.peak)]
        if host.limit < host.available:
            levels.append(plots.Level("ram", host.limit, optional=True))
        return levels + [
            plots.Level("predicted peak", device.peak, name)
            for name, device in self.plan.devices.items()
            if name in self.memory.device_samples
        ]

    def to_dict(self) -> dict[str, Any]:
        """The plan's values, and seconds, predicted and measured peaks in bytes; `lowmem load --json` prints it."""
        predicted = {name: {"peak": device.peak} for name, device in self.plan.devices.items()}
        measured = {name: {"peak": peak} for name, peak in self.memory.devices.items()}
        if "cpu" in predicted:
            measured["cpu"] = {"peak": self.peak}
        return {
            **self.plan.to_dict(),
            "seconds": self.seconds,
            "phases": dict(self.phases),
            "bytes_per_second": self.rate,
            "bytes_by_way": dict(self.read),
            "initialised": list(self.initialised),
            "predicted": {"host": {"peak": self.predicted_peak}, "devices": predicted},
            "measured": {
                "host": {"peak": self.peak, "rss": self.memory.peak_rss, "cgroup": self.memory.cgroup_peak},
                "devices": measured,
            },
        }


def checkpoint_tables(checkpoint: Checkpoint) -> Iterator[Table]:
    """A checkpoint for people: its shards, then its dtypes."""
    opened = f" in {checkpoint.opened!r}" if checkpoint.opened else ""
    shards = _table(f"{checkpoint.source}: {len(checkpoint)} tensors, {format_size(checkpoint.nbytes)}{opened}")
    for title in ("shard", "size", "tensors"):
        shards.add_column(title, justify="left" if title == "shard" else "right")
    counts: dict[Any, int] = {}
    for entry in checkpoint.values():
        counts[entry.file] = counts.get(entry.file, 0) + 1
    for shard in checkpoint.shards:
        shards.add_row(plain(shard.file.name), format_size(shard.size), str(counts.get(shard.file, 0)))
    yield shards
    dtypes = _table(None)
    for title in ("dtype", "bytes", "tensors"):
        dtypes.add_column(title, justify="left" if title == "dtype" else "right")
    for name, (count, size) in sorted(checkpoint.dtypes().items()):
        dtypes.add_row(name, format_size(size), str(count))
    yield dtypes


def tensor_table(checkpoint: Checkpoint) -> Table:
    """Every tensor of a checkpoint; names are never cut."""
    table = _table(None)
    for title in ("tensor", "dtype", "shape", "size", "shard", "offset"):
        table.add_column(title, justify="right" if title in ("size", "offset") else "left", overflow="fold")
    for entry in checkpoint.values():
        shape = " x ".join(map(str, entry.shape)) or "scalar"
        table.add_row(
            plain(entry.key), entry.dtype, shape, format_size(entry.nbytes), plain(entry.file.name), str(entry.offset)
        )
    return table


def _source_table(plan: LoadPlan) -> Table:
    """What each of several sources feeds."""
    table = _table(None)
    for title in ("module", "source", "tensors", "bytes"):
        table.add_column(title, justify="right" if title in ("tensors", "bytes") else "left", overflow="fold")
    for share in plan.mapping.shares:
        table.add_row(
            plain(share.module or "the rest"), plain(share.source), str(share.tensors), format_size(share.nbytes)
        )
    return table


def plan_tables(plan: LoadPlan) -> Iterator[Table]:
    """A plan for people: bytes per device, by dtype if some are int8, the host's budget, what was asked of reading."""
    opened = f" of {plan.checkpoint.opened!r}" if plan.checkpoint.opened else ""
    devices = _table(f"{plan.checkpoint.source}: {len(plan.placements)} tensors{opened}")
    for title in ("device", "weights", "mapped", "resident", "staging", "peak"):
        devices.add_column(title, justify="left" if title == "device" else "right")
    for name, device in plan.devices.items():
        values = (device.weights, device.mapped, device.resident, device.staging, device.peak)
        devices.add_row(name, *map(format_size, values))
    yield devices
    if plan.mapping.shares:
        yield _source_table(plan)
    if "int8" in plan.dtypes:
        yield _dtype_table(plan)
    host = plan.host
    budget = _table(None)
    budget.add_column("host memory")
    budget.add_column("bytes", justify="right")
    for name, size in (
        ("resident copies", host.resident),
        ("staging", host.staging),
        *([("computing, one group at a time", host.computing)] if host.computing else []),
        ("model objects and plan", host.overhead),
        ("predicted peak (anonymous)", host.peak),
        ("allowed", host.limit),
        (f"available ({host.bound_by})", host.available),
        ("to read now", plan.bytes_read),
        ("to map, read when first used", host.mapped),
        ("to write into the offload folder", plan.bytes_written),
    ):
        budget.add_row(name, format_size(size))
    running = plan.running
    if running.mapped or running.made:
        for name, size in (
            ("forward: weights used where they lie", running.mapped),
            ("forward: weights made or brought at each use", running.made),
            ("forward: buffers for these", running.buffers),
        ):
            if size:
                budget.add_row(name, format_size(size))
    yield budget
    asked = _table(None)
    asked.add_column("reading")
    asked.add_column("as asked", justify="right")
    if plan.reading.io != "auto":
        asked.add_row("io", plan.reading.io)
    if plan.reading.prefetch:
        asked.add_row("prefetch", format_size(plan.reading.prefetch))
    if plan.reading.keep_cache:
        asked.add_row("keep_cache", "on")
    if asked.row_count:
        yield asked


def ranks_tables(plan: RanksPlan) -> Iterator[Table]:
    """A plan of several ranks for people: each of them, each host, all together."""
    mesh = " x ".join(f"{name} {count}" for name, count in plan.mesh.items())
    ranks = _table(f"{plan.source}: {len(plan.ranks)} ranks, {mesh or 'no mesh'}")
    for title in ("rank", "in the mesh", "host", "holds", "mapped", "copies", "reads", "staging", "peak"):
        ranks.add_column(title, justify="left" if title in ("rank", "in the mesh", "host") else "right")
    for same in _folded(plan.ranks, _sizes_of_rank):
        at = " ".join(f"{name}={_spans(rank.at[name] for rank in same)}" for name in plan.mesh)
        hosts = _spans(rank.host for rank in same)
        ranks.add_row(_spans(r.rank for r in same), at, hosts, *map(format_size, _sizes_of_rank(same[0])))
    yield ranks
    hosts_ = _table(None)
    for title in ("host", "ranks", "mapped once", "reads", "sum of peaks"):
        hosts_.add_column(title, justify="left" if title in ("host", "ranks") else "right")
    for some in _folded(plan.hosts, _sizes_of_host):
        numbers = _spans(number for host in some for number in host.ranks)
        hosts_.add_row(_spans(host.host for host in some), numbers, *map(format_size, _sizes_of_host(some[0])))
    yield hosts_
    total = _table(None)
    total.add_column("all ranks")
    total.add_column("bytes", justify="right")
    total.add_column("of the model", justify="right")
    held, reads = sum(rank.weights for rank in plan.ranks), sum(host.reads for host in plan.hosts)
    mapped = sum(host.mapped for host in plan.hosts)
    for name, size in (
        ("the whole model", plan.weights),
        ("held", held),
        ("to read now", reads),
        ("to map, once on each host", mapped),
        ("to read and to map", reads + mapped),
    ):
        total.add_row(name, format_size(size), f"{size / max(plan.weights, 1):.2f}x")
    yield total


def _sizes_of_rank(rank: RankPlan) -> tuple[int, ...]:
    return rank.weights, rank.mapped, rank.resident, rank.reads, rank.staging, rank.peak


def _sizes_of_host(host: HostShare) -> tuple[int, ...]:
    return host.mapped, host.reads, host.peak


def _folded(rows: Sequence[T], value: Callable[[T], Hashable]) -> list[list[T]]:
    """The rows in groups of one row of the table each: those of equal values, where there are many."""
    if len(rows) <= _MANY_ROWS:
        return [[row] for row in rows]
    groups: dict[Hashable, list[T]] = {}
    for row in rows:
        groups.setdefault(value(row), []).append(row)
    return list(groups.values())


def _spans(numbers: Iterable[int]) -> str:
    """`"0-3,8"` for 0, 1, 2, 3 and 8."""
    spans: list[list[int]] = []
    for number in sorted(set(numbers)):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _dtype_table(plan: LoadPlan) -> Table:
    scales = sum(p.nbytes for p in plan.placements if p.target.rpartition(".")[2] == "SCB")
    table = _table(None)
    table.add_column("dtype")
    table.add_column("weights", justify="right")
    for dtype, size in plan.dtypes.items():
        parts = [(dtype, size)]
        if dtype == "float32" and scales:
            parts = [("float32 (scales of int8)", scales), (dtype, size - scales)]
        for name, part in parts:
            if part:
                table.add_row(name, format_size(part))
    return table


def report_table(report: LoadReport) -> Table:
    """Predicted beside measured."""
    ways = ", ".join(f"{format_size(size)} {way}" for way, size in report.read.items())
    moved = f", {format_size(int(report.rate))}/s moved ({ways})" if report.bytes_read else ""
    table = _table(f"loaded in {report.seconds:.2f} s{moved}")
    table.add_column("anonymous peak")
    table.add_column("predicted", justify="right")
    table.add_column("measured", justify="right")
    table.add_row("host", format_size(report.predicted_peak), format_size(report.peak))
    for name, peak in report.memory.devices.items():
        if name in report.plan.devices:
            table.add_row(name, format_size(report.plan.devices[name].peak), format_size(peak))
    return table


def phase_table(report: LoadReport) -> Table:
    """Seconds of each phase of a load."""
    table = _table(None)
    table.add_column("phase")
    table.add_column("seconds", justify="right")
    for name, seconds in report.phases.items():
        table.add_row(name, f"{seconds:.3f}")
    return table


def measurement_table(memory: Measurement) -> Table:
    """The peaks of a measured program or block."""
    table = _table(f"{memory.seconds:.2f} s")
    table.add_column("peak")
    table.add_column("bytes", justify="right")
    table.add_row("anonymous", format_size(memory.peak_anonymous))
    table.add_row("resident set", format_size(memory.peak_rss))
    if memory.cgroup_peak is not None:
        table.add_row("cgroup", format_size(memory.cgroup_peak))
    for name, peak in memory.devices.items():
        table.add_row(name, format_size(peak))
    return table


def plain(text: str) -> str:
    """`text` without control characters or markup: a name from a file must not steer a terminal."""
    from rich.markup import escape

    return escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))


def _table(title: str | None) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(title=plain(title) if title else None, box=SIMPLE_HEAD, title_justify="left", title_style="bold")
