"""Run the moves of a plan: into a model, or one tensor after the other into the caller's hands."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Generator
from contextlib import nullcontext
from pathlib import Path

import torch

from .._collector import paused_collector
from .._page_cache import ask_for
from ..errors import LowmemError
from ..planner import LoadPlan, Placement, Progress, ProgressCallback
from .cleanup import undisturbed
from .crew import Crew, Done
from .destinations import MemoryDestination, allocate
from .feed import Feed, ShardCallback
from .install import Installer
from .mapping import map_shard, view_of
from .offload_writer import OffloadWriter, settle

_PROGRESS_EVERY = 0.05
_SMALL = 256 * 1024


def run(
    plan: LoadPlan,
    installer: Installer,
    progress: ProgressCallback | None = None,
    on_shard: ShardCallback | None = None,
) -> dict[str, int]:
    """Move everything that the plan says, and install each tensor when its last move is done.

    On any error, Ctrl-C included, the threads end, files and temporary folders are gone and the error is raised;
    undoing what is installed is the caller's part.

    Args:
        plan: the moves.
        installer: puts tensors into the model.
        progress: called from the calling thread.
        on_shard: called with each shard's path when it is opened or mapped, from any thread.

    Returns:
        Bytes by the way they were read: `buffered`, `direct`, `mmap`.

    Raises:
        CheckpointError: a file changed, shrank or cannot be read.
        OffloadError: the offload folder cannot be written.
        BudgetError: memory that the plan counted on was taken by others.
    """
    return _Run(plan, installer, progress, on_shard).run()


def iterate(plan: LoadPlan, window: int) -> Generator[tuple[str, torch.Tensor], None, None]:
    """The name and the tensor of each placement, in the plan's order, read ahead by at most `window` bytes.

    The placements must lie in file order, each fed from one place. A tensor that was given out is the caller's; the
    threads end with the iterator, however it ends.

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
        # A fork takes no threads along, and locks as they were.
        if os.getpid() == process:
            undisturbed(crew.end)


def _collect(finished: list[Done] | None, whole: dict[Placement, torch.Tensor]) -> None:
    assert finished is not None, "every placement of the plan is fed"
    for done in finished:
        for placement, destination in done.whole:
            assert isinstance(destination, MemoryDestination)
            whole[placement] = destination.tensor


class _Run:
    def __init__(
        self, plan: LoadPlan, installer: Installer, progress: ProgressCallback | None, on_shard: ShardCallback | None
    ) -> None:
        self._plan = plan
        self._installer = installer
        self._progress = progress
        self._on_shard = on_shard
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
            undisturbed(writer.abandon)
            raise
        return read

    def _run(self, writer: OffloadWriter | None) -> dict[str, int]:
        feed = Feed(self._plan, writer, on_shard=self._on_shard)
        crew = Crew(self._plan, feed, at_once=False)
        try:
            with paused_collector() if self._is_all_small() else nullcontext():
                feed.prepare()
                crew.start()
                mapped = self._settle_unmoved()
                while (finished := crew.next()) is not None:
                    self._take(feed, finished)
            feed.finish()
            if self._progress is not None and (self._done < self._total or not self._total):
                # Whoever draws a bar still learns that it is done.
                self._progress(Progress(self._total, self._total, 0.0, 0.0, ""))
        finally:
            undisturbed(crew.end)
        # Last, so that nothing that is given back was asked for.
        self._read_ahead(mapped)
        return feed.ways.read

    def _is_all_small(self) -> bool:
        """Whether tensors are so small that the interpreter's work is the load: objects by the ten thousand, no cycles.

        Such a load takes seconds; the collector is not kept away for longer.
        """
        return self._total <= _SMALL * len(self._plan.placements)

    def _settle_unmoved(self) -> dict[Path, mmap.mmap]:
        """What needs no byte: mapped, referred to, empty, and what the model will initialise; gives the mappings."""
        shards = {shard.file: shard for shard in self._plan.checkpoint.shards}
        pages: dict[Path, mmap.mmap] = {}
        for placement in self._plan.placements:
            if placement.device == "disk":
                self._installer.leave_on_disk(placement)
            elif not placement.is_fed:
                self._installer.install(placement, allocate(placement))
            elif placement.residency == "map":
                entry = placement.links[0].entry
                if entry.file not in pages:
                    pages[entry.file] = map_shard(shards[entry.file])
                    if self._on_shard is not None:
                        self._on_shard(entry.file)
                self._installer.install(placement, view_of(pages[entry.file], entry, placement.shape))
        return pages

    def _read_ahead(self, pages: dict[Path, mmap.mmap]) -> None:
        left = self._plan.reading.prefetch
        for placement in self._plan.placements:
            if left <= 0:
                return
            if placement.residency == "map" and placement.is_fed:
                entry = placement.links[0].entry
                ask_for(pages[entry.file], entry.offset, min(entry.nbytes, left))
                left -= entry.nbytes

    def _take(self, feed: Feed, finished: list[Done]) -> None:
        with feed.turn:
            for done in finished:
                for placement, destination in done.whole:
                    if isinstance(destination, MemoryDestination):
                        self._installer.install(placement, destination.tensor)
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
