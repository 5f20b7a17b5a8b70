"""Run the moves of a plan: into a model, or one tensor after the other into the caller's hands."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Generator
from contextlib import nullcontext
from pathlib import Path

import torch

from .._collector import paused_collector
from .._page_cache import ask_for
from ..checkpoint import Shard
from ..errors import LowmemError
from ..planner import LoadPlan, Placement, Progress, ProgressCallback
from ..planner.records import Group
from ..ranks.carrier import Carrier
from .cleanup import trim_heap, undisturbed
from .computing import compute
from .crew import Crew, Done, carry_out
from .destinations import MemoryDestination, allocate
from .feed import Feed, ShardCallback
from .install import Installer
from .int8 import RowsDestination
from .mapping import map_shard, node_of, refuse_written, view_of
from .offload_writer import OffloadWriter, settle
from .sharing import share
from .ways import Ways

_PROGRESS_EVERY = 0.05
_SMALL = 256 * 1024


def run(
    plan: LoadPlan,
    installer: Installer,
    progress: ProgressCallback | None = None,
    on_shard: ShardCallback | None = None,
    watch: Callable[[], None] | None = None,
    carrier: Carrier | None = None,
) -> dict[str, int]:
    """Move everything that the plan says, and install each tensor when its last move is done.

    On any error, Ctrl-C included, the threads end, files and temporary folders are gone and the error is raised;
    undoing what is installed is the caller's part.

    Args:
        plan: the moves.
        installer: puts tensors into the model.
        progress: called from the calling thread.
        on_shard: called with each shard's path when it is opened or mapped, from any thread.
        watch: called from the calling thread several times a second while it waits; what it raises ends the load.
        carrier: brings what is read once from rank to rank; where the plan has such tensors.

    Returns:
        Bytes by the way they were read: `buffered`, `direct`, `mmap`.

    Raises:
        CheckpointError: a file changed, shrank or cannot be read.
        OffloadError: the offload folder cannot be written.
        BudgetError: memory that the plan counted on was taken by others.
        ModelError: an operation failed that computes tensors of the model.
    """
    return _Run(plan, installer, progress, on_shard, watch, carrier).run()


def iterate(plan: LoadPlan, window: int) -> Generator[tuple[str, torch.Tensor], None, None]:
    """The name and the tensor of each placement, in the plan's order, read ahead by at most `window` bytes.

    The placements must lie in file order, each fed from one place. A tensor that was given out is the caller's, and its
    values are there for every stream of its device. Its memory belongs to the stream that was current when the first
    was asked for: whoever uses it on another one calls `Tensor.record_stream` before he lets go of it, or waits for
    that use, because torch gives the memory out again at once. The threads end with the iterator, however it ends.

    Raises:
        CheckpointError: a file changed, shrank or cannot be read.
        BudgetError: memory that the plan counted on was taken by others.
        LowmemError: the process was forked meanwhile, and this is the new one.
    """
    feed = Feed(plan, window=window)
    crew = Crew(plan, feed, at_once=True)
    whole: dict[Placement, torch.Tensor] = {}
    process = os.getpid()
    try:
        crew.start()
        for placement in plan.placements:
            if os.getpid() != process:
                raise LowmemError(
                    f"{plan.checkpoint.source}: a stream ends at a fork; begin another in the new process"
                )
            if not placement.is_fed:
                yield placement.target, allocate(placement)
                continue
            while placement not in whole:
                _collect(crew.next(), whole)
            feed.hand_over(placement)
            # Not by a name here, which would keep it.
            yield placement.target, whole.pop(placement)
        feed.finish()
    finally:
        # Twice: a Ctrl-C may be raised where `undisturbed` is entered, before it can do anything.
        try:
            undisturbed(crew.end)
        finally:
            undisturbed(crew.end)


def _collect(finished: list[Done] | None, whole: dict[Placement, torch.Tensor]) -> None:
    assert finished is not None, "every placement of the plan is fed"
    for done in finished:
        for placement, destination in done.whole:
            assert isinstance(destination, MemoryDestination)
            # The caller may use it on any stream, which nobody told to wait.
            destination.finish()
            whole[placement] = destination.tensor


def _is_all_small(plan: LoadPlan) -> bool:
    """Whether tensors are so small that the interpreter's work is the load: objects by the ten thousand, no cycles.

    Such a load takes seconds; the collector is not kept away for longer.
    """
    return plan.bytes_read <= _SMALL * len(plan.placements)


class _Run:
    def __init__(
        self,
        plan: LoadPlan,
        installer: Installer,
        progress: ProgressCallback | None,
        on_shard: ShardCallback | None,
        watch: Callable[[], None] | None,
        carrier: Carrier | None,
    ) -> None:
        self._plan = plan
        self._installer = installer
        self._progress = progress
        self._on_shard = on_shard
        self._watch = watch
        self._carrier = carrier
        self._ways = Ways(plan.reading.io)
        self._opened: set[Path] = set()
        self._pages: dict[Path, mmap.mmap] = {}
        self._mapped: list[tuple[Shard, tuple[int, int] | None]] = []
        self._total = plan.bytes_read
        self._done = 0
        self._started = time.monotonic()
        self._reported = 0.0

    def run(self) -> dict[str, int]:
        offload = self._plan.offload
        if offload is None or offload.reused:
            if offload is not None:
                settle(offload)
            return self._run(None)
        writer = OffloadWriter(offload, self._plan.checkpoint.source)
        try:
            writer.open()
            read = self._run(writer)
            writer.finish()
        except BaseException:
            try:
                undisturbed(writer.abandon)
            finally:
                undisturbed(writer.abandon)
            raise
        return read

    def _run(self, writer: OffloadWriter | None) -> dict[str, int]:
        self._move_and_share(writer)
        for group in self._plan.groups:
            self._compute(group, writer)
            # What an operation frees between its results stays in the heap otherwise, group after group.
            trim_heap()
        if self._progress is not None and (self._done < self._total or not self._total):
            # Whoever draws a bar still learns that it is done.
            self._progress(Progress(self._total, self._total, 0.0, 0.0, ""))
        # Last, so that nothing that is given back was asked for.
        self._read_ahead(self._pages)
        refuse_written(self._mapped)
        return self._ways.read

    def _move_and_share(self, writer: OffloadWriter | None) -> None:
        install, shared = self._installer.install, self._plan.shared
        if not shared:
            self._move(self._plan, writer, install, self._settle_unmoved)
            return
        assert self._carrier is not None, "who plans that ranks share gives them a carrier"
        wanted = {one.placement for one in shared if one.reader == self._carrier.rank}
        read: dict[Placement, torch.Tensor] = {}

        def keep(placement: Placement, tensor: torch.Tensor) -> None:
            install(placement, tensor)
            if placement in wanted:
                read[placement] = tensor

        self._move(self._plan, writer, keep, self._settle_unmoved)
        share(shared, read, install, self._carrier)

    def _move(
        self,
        plan: LoadPlan,
        writer: OffloadWriter | None,
        keep: Callable[[Placement, torch.Tensor], None],
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """All moves of a plan; `keep` gets each tensor that is whole, if it is not in a file."""
        scales: dict[Placement, torch.Tensor] = {}
        if plan.scales:
            self._move(plan.scales_plan(), None, scales.__setitem__)
        known = {key: scales[placement] for key, placement in plan.scales.items()}
        feed = Feed(plan, writer, on_shard=self._open, ways=self._ways, scales=known)
        with paused_collector() if _is_all_small(plan) else nullcontext():
            feed.prepare()
            carry_out(plan, feed, lambda finished: self._take(feed, finished, keep), meanwhile, self._watch)

    def _compute(self, group: Group, writer: OffloadWriter | None) -> None:
        """Read the sources of a group, run its operation, and bring what it gives to its places."""
        read: dict[Placement, torch.Tensor] = {}
        self._move(self._plan.sources_of(group), None, read.__setitem__)
        # In a list of which nobody else holds anything: the operation may free them early.
        sources = [read.pop(p) if p.is_fed else allocate(p) for p in group.sources]
        for placement, tensor in compute(group, sources, self._plan.checkpoint.source):
            if placement.residency == "copy":
                there = tensor if placement.device == "cpu" else allocate(placement).copy_(tensor)
                self._installer.install(placement, there)
            elif writer is not None:
                # Without one it is in the folder already.
                writer.store(placement, tensor)

    def _open(self, file: Path) -> None:
        """A shard that is read for groups too is told of once."""
        if self._on_shard is not None and file not in self._opened:
            self._opened.add(file)
            self._on_shard(file)

    def _settle_unmoved(self) -> None:
        """What needs no byte: mapped, referred to, empty, and what the model will initialise."""
        shards = {shard.file: shard for shard in self._plan.checkpoint.shards}
        pages = self._pages
        for placement in self._plan.placements:
            if placement.device == "disk":
                self._installer.leave_on_disk(placement)
            elif placement.residency == "init" or not placement.nbytes:
                self._installer.install(placement, allocate(placement))
            elif placement.residency == "map":
                entry = placement.links[0].entry
                if entry.file not in pages:
                    pages[entry.file] = map_shard(shards[entry.file])
                    self._mapped.append((shards[entry.file], node_of(entry.file)))
                    self._open(entry.file)
                self._installer.install(placement, view_of(pages[entry.file], entry, placement.shape))

    def _read_ahead(self, pages: dict[Path, mmap.mmap]) -> None:
        left = self._plan.reading.prefetch
        for placement in self._plan.placements:
            if left <= 0:
                return
            if placement.residency == "map" and placement.is_fed:
                entry = placement.links[0].entry
                ask_for(pages[entry.file], entry.offset, min(entry.nbytes, left))
                left -= entry.nbytes

    def _take(self, feed: Feed, finished: list[Done], keep: Callable[[Placement, torch.Tensor], None]) -> None:
        with feed.turn:
            for done in finished:
                for placement, destination in done.whole:
                    if isinstance(destination, MemoryDestination | RowsDestination):
                        destination.order()
                    if isinstance(destination, MemoryDestination):
                        keep(placement, destination.tensor)
                    elif isinstance(destination, RowsDestination):
                        for made, tensor in destination.tensors():
                            keep(made, tensor)
                self._done += done.read.nbytes
            # The gaps of views are read where they are small, and cuts leave some of them out.
            self._done = min(self._done, self._total)
        self._report(finished[-1].read.file)

    def _report(self, file: Path) -> None:
        if self._progress is None:
            return
        now = time.monotonic()
        if now - self._reported < _PROGRESS_EVERY and self._done < self._total:
            return
        self._reported = now
        rate = self._done / max(now - self._started, 1e-9)
        left = (self._total - self._done) / rate if rate else None
        self._progress(Progress(self._done, self._total, rate, left, file.name))
