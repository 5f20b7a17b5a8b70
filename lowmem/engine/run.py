"""Run the moves of a plan: a few reader threads in file order, memory bounded by the plan's staging."""

from __future__ import annotations

import mmap
import queue
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

from .._collector import paused_collector
from ..checkpoint import Shard
from ..errors import BudgetError, CheckpointError
from ..planner import LoadPlan, Move, Placement, Progress, ProgressCallback
from .cleanup import undisturbed
from .destinations import Destination, MemoryDestination, allocate
from .install import Installer
from .mapping import map_shard, view_of
from .offload_writer import OffloadWriter
from .reading import ShardReader

# What a worker reports: a finished move, an error, or None when it found no more moves.
_Event = Move | BaseException | None
_PROGRESS_EVERY = 0.05


def run(plan: LoadPlan, installer: Installer, progress: ProgressCallback | None = None) -> None:
    """Move everything that the plan says, and install each tensor when its last move is done.

    On any error, Ctrl-C included, the threads end, files and temporary folders are gone and the error is raised;
    undoing what is installed is the caller's part.

    Raises:
        CheckpointError: a file changed, shrank or cannot be read.
        OffloadError: the offload folder cannot be written.
        BudgetError: memory that the plan counted on was taken by others.
    """
    _Run(plan, installer, progress).run()


class _Feed:
    """Moves for the workers, one at a time; opens each shard at its first move and closes it after its last."""

    def __init__(self, plan: LoadPlan, writer: OffloadWriter | None) -> None:
        self._moves: Iterator[Move] = plan.moves()
        self._shards: dict[Path, Shard] = {shard.file: shard for shard in plan.checkpoint.shards}
        self._writer = writer
        self._lock = threading.Lock()
        self._reader: ShardReader | None = None
        self._open: dict[ShardReader, int] = {}
        self._destinations: dict[Placement, Destination] = {}
        self._changed: list[Path] = []
        self.pending: dict[Placement, int] = {}
        self.stopped = False

    def take(self) -> tuple[Move, ShardReader, Destination] | None:
        with self._lock:
            move = None if self.stopped else next(self._moves, None)
            if move is None:
                return None
            if self._reader is None or self._reader.shard.file != move.file:
                previous, self._reader = self._reader, ShardReader(self._shards[move.file])
                self._open[self._reader] = 0
                if previous is not None and not self._open[previous]:
                    self._drop(previous)
            destination = self._destinations.get(move.placement)
            if destination is None:
                destination = self._make(move.placement)
                self._destinations[move.placement] = destination
                self.pending[move.placement] = move.placement.source_bytes
            self._open[self._reader] += 1
            return move, self._reader, destination

    def _make(self, placement: Placement) -> Destination:
        if placement.residency == "write":
            assert self._writer is not None
            return self._writer.destination(placement)
        return MemoryDestination(placement)

    def give_back(self, reader: ShardReader) -> None:
        with self._lock:
            self._open[reader] -= 1
            if not self._open[reader] and reader is not self._reader:
                self._drop(reader)

    def finished(self, placement: Placement, nbytes: int) -> Destination | None:
        """Count bytes of a placement; its destination once the last of them is in place."""
        with self._lock:
            self.pending[placement] -= nbytes
            if self.pending[placement]:
                return None
            del self.pending[placement]
            return self._destinations.pop(placement)

    def _drop(self, reader: ShardReader) -> None:
        if not reader.is_unchanged():
            self._changed.append(reader.shard.file)
        reader.close()
        del self._open[reader]

    def finish(self) -> None:
        """After the last move.

        Raises:
            CheckpointError: a file was written to while it was read, so what was read may be of two minds.
        """
        for reader in list(self._open):
            self._drop(reader)
        if self._changed:
            raise CheckpointError(
                f"{self._changed[0]}: changed during the load; wait until nothing writes to it and load again"
            )

    def close(self) -> None:
        for reader in list(self._open):
            reader.close()
            del self._open[reader]
        self._destinations.clear()


def _buffer(size: int) -> torch.Tensor:
    """A buffer of its own mapping: the kernel gets every page back at once, where a heap might keep them."""
    if hasattr(mmap, "MAP_ANONYMOUS"):
        # Private: the default is shared memory, which no measure of anonymous memory would show.
        return torch.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)


def _end(feed: _Feed, threads: list[threading.Thread]) -> None:
    feed.stopped = True
    for thread in threads:
        # After a Ctrl-C inside start() a thread may be about to begin, and join() would refuse it.
        for _ in range(1000):
            if thread.is_alive() or thread not in threading.enumerate():
                break
            time.sleep(0.001)
        if thread.ident is not None:
            thread.join()
    feed.close()


class _Run:
    def __init__(self, plan: LoadPlan, installer: Installer, progress: ProgressCallback | None) -> None:
        self._plan = plan
        self._installer = installer
        self._progress = progress
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._total = plan.bytes_read
        self._done = 0
        self._started = time.monotonic()
        self._reported = 0.0

    def run(self) -> None:
        offload = self._plan.offload
        if offload is None or offload.reused:
            self._run(None)
            return
        writer = OffloadWriter(offload, self._plan.checkpoint.source)
        try:
            writer.open()
            self._run(writer)
            writer.finish()
        except BaseException:
            undisturbed(writer.abandon)
            raise

    def _run(self, writer: OffloadWriter | None) -> None:
        feed = _Feed(self._plan, writer)
        threads: list[threading.Thread] = []
        try:
            self._start(feed, threads)
            # Two objects a tensor and no cycles; nobody else's code runs meanwhile.
            with paused_collector():
                self._settle_unmoved()
            self._drain(feed, len(threads))
            feed.finish()
            if self._progress is not None and not self._total:
                # Nothing had to be read; whoever draws a bar still learns that it is done.
                self._progress(Progress(0, 0, 0.0, 0.0, ""))
        finally:
            undisturbed(lambda: _end(feed, threads))

    def _start(self, feed: _Feed, threads: list[threading.Thread]) -> None:
        for i in range(self._plan.staging.workers if self._total else 0):
            thread = threading.Thread(target=self._work, args=(feed,), name=f"lowmem-{i}", daemon=True)
            # Before it runs: a Ctrl-C inside start() must not lose it.
            threads.append(thread)
            try:
                thread.start()
            except RuntimeError as error:
                threads.pop()
                if threads:
                    # Fewer readers are slower, not wrong.
                    return
                raise BudgetError(
                    f"the system refused a thread ({error}); a limit on memory or processes may be the reason "
                    "(ulimit -d, -v, -u): raise it",
                    required=self._plan.host.peak,
                    limit=0,
                ) from error

    def _work(self, feed: _Feed) -> None:
        """A reader thread."""
        try:
            self._move_all(feed)
            self._events.put(None)
        except BaseException as error:  # handed to the caller's thread, which raises it
            self._events.put(error)

    def _move_all(self, feed: _Feed) -> None:
        """Move after move, through a buffer that ends with this call."""
        staging = self._plan.staging
        buffer = _buffer(staging.each) if staging.each else torch.empty(0, dtype=torch.uint8)
        while (job := feed.take()) is not None:
            move, reader, destination = job
            try:
                destination.take(move, reader, buffer)
            finally:
                feed.give_back(reader)
            self._events.put(move)

    def _settle_unmoved(self) -> None:
        """What needs no byte: mapped, referred to, empty, and what the model will initialise."""
        shards = {shard.file: shard for shard in self._plan.checkpoint.shards}
        pages: dict[Path, mmap.mmap] = {}
        for placement in self._plan.placements:
            if placement.device == "disk":
                self._installer.leave_on_disk(placement)
            elif not placement.source_bytes:
                self._installer.install(placement, allocate(placement))
            elif placement.residency == "map":
                entry = placement.links[0].entry
                if entry.file not in pages:
                    pages[entry.file] = map_shard(shards[entry.file])
                self._installer.install(placement, view_of(pages[entry.file], entry))

    def _drain(self, feed: _Feed, workers: int) -> None:
        while workers:
            event = self._events.get()
            if event is None:
                workers -= 1
                continue
            if isinstance(event, BaseException):
                # Whoever keeps the error keeps its frames, and those hold the buffer and a tensor.
                traceback.clear_frames(event.__traceback__)
                raise event
            destination = feed.finished(event.placement, event.nbytes)
            if isinstance(destination, MemoryDestination):
                self._installer.install(event.placement, destination.tensor)
            self._done += event.nbytes
            self._report(event.file)

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
