"""What the readers do next: reads in file order, with their files open and their destinations allocated."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..checkpoint import Shard
from ..errors import CheckpointError
from ..planner import LoadPlan, Placement
from ..planner.moves import Read
from ..planner.records import may_read_directly
from .accelerator import AcceleratorDestination, accelerators_of
from .destinations import Destination, MemoryDestination
from .int8 import MeasuringDestination, RowsDestination, Scales
from .reading import ShardReader
from .ways import Ways

_LEAST_RUN = 64 * 1024

ShardCallback = Callable[[Path], None]


class Writer(Protocol):
    """Gives what is to be on disk its place in a file."""

    def destination(self, placement: Placement) -> Destination:
        """The range that belongs to `placement`."""


@dataclass(eq=False, slots=True)
class Job:
    """One read, with all that it needs: the open shard, the destination of each of its moves, and its place in the
    queue of those that must be unpacked, if it is one of them.
    """

    read: Read
    reader: ShardReader
    destinations: list[Destination]
    ticket: int | None = None


class Feed:
    """Jobs for several threads; opens each shard at its first read and closes it after its last.

    Args:
        plan: what is read.
        writer: the files, when the plan writes some.
        window: bytes of tensors that may be begun and not yet handed over, or None for no bound. One tensor may
            always be begun, however large.
        on_shard: called with each shard when it is opened.
        ways: chooses how bytes are read; its own when not given.
        scales: those that the plan wants in memory before.
    """

    def __init__(
        self,
        plan: LoadPlan,
        writer: Writer | None = None,
        window: int | None = None,
        on_shard: ShardCallback | None = None,
        ways: Ways | None = None,
        scales: Scales | None = None,
    ) -> None:
        self._plan = plan
        # A run of small tensors is begun at once, and must not fill the window alone.
        self._reads: Iterator[Read] = plan.reads(None if window is None else max(_LEAST_RUN, window // 8))
        self._next: Read | None = None
        self._shards: dict[Path, Shard] = {shard.file: shard for shard in plan.checkpoint.shards}
        self._writer = writer
        self._window = window
        self._scales: Scales = {} if scales is None else scales
        self._begun = 0
        self._on_shard = on_shard
        # Also for what is the interpreter's work alone. Threads that each do it by themselves hand its lock to and fro
        # at every small tensor, which costs more than the tensor.
        # Taken as a bare lock, in one step of the interpreter: a Ctrl-C inside a condition's own `__enter__` or
        # `__exit__`, which are written in Python, would leave it locked, and the readers waiting for ever.
        self.turn = threading.RLock()
        self._room = threading.Condition(self.turn)
        self._reader: ShardReader | None = None
        self._open: dict[ShardReader, int] = {}
        self._destinations: dict[Placement, Destination] = {}
        self._pending: dict[Placement, int] = {}
        self._rewritten: list[Path] = []
        self._stopped = False
        self.ways = Ways(plan.reading.io) if ways is None else ways
        # Here, where the streams of the caller are the current ones.
        self.accelerators = accelerators_of(plan)

    def prepare(self) -> None:
        """Allocate the large destinations of a load, which are address space until they are filled.

        Between the reads, each allocation would wait for the page faults of the other readers.

        Raises:
            BudgetError: the host refuses the memory.
        """
        for placement in self._plan.placements:
            if placement.residency == "copy" and placement.is_fed and placement.is_apart:
                self._destination(placement)

    def take(self) -> Job | None:
        """The next read; waits while the window is full. None when there is no more, or after `stop`."""
        with self.turn:
            while True:
                if self._next is None:
                    self._next = next(self._reads, None)
                if self._stopped or self._next is None:
                    return None
                fresh = self._fresh(self._next)
                if not fresh or not self._begun or self._window is None or self._begun + fresh <= self._window:
                    break
                self._room.wait()
            read, self._next = self._next, None
            self._begun += fresh
            reader = self._reader_of(read.file)
            destinations = [self._destination(move.placement) for move in read.moves]
            self._open[reader] += 1
            return Job(read, reader, destinations, reader.ticket(read.offset))

    def _fresh(self, read: Read) -> int:
        """Bytes of tensors that this read begins."""
        if self._window is None:
            return 0
        return sum({m.placement: m.placement.nbytes for m in read.moves if m.placement not in self._pending}.values())

    def _reader_of(self, file: Path) -> ShardReader:
        if self._reader is None or self._reader.shard.file != file:
            reading = self._plan.reading
            direct = self._plan.staging.bounce > 0 and may_read_directly(reading.io, file)
            previous = self._reader
            self._reader = ShardReader(self._shards[file], self.ways, keep_cache=reading.keep_cache, direct=direct)
            self._open[self._reader] = 0
            if previous is not None and not self._open[previous]:
                self._drop(previous)
            if self._on_shard is not None:
                self._on_shard(file)
        return self._reader

    def _destination(self, placement: Placement) -> Destination:
        found = self._destinations.get(placement)
        if found is None:
            found = self._make_destination(placement)
            self._destinations[placement] = found
            self._pending[placement] = placement.source_elements
        return found

    def _make_destination(self, placement: Placement) -> Destination:
        if placement.measures:
            return MeasuringDestination(placement)
        found = self._place(placement)
        if placement.scales is not None or any(link.scales is not None for link in placement.links):
            made = None if placement.scales is None else self._place(placement.scales)
            return RowsDestination(placement, found, made, self._scales)
        return found

    def _place(self, placement: Placement) -> Destination:
        if placement.residency == "write":
            assert self._writer is not None
            return self._writer.destination(placement)
        accelerator = self.accelerators.get(placement.device)
        if accelerator is not None:
            return AcceleratorDestination(placement, accelerator)
        return MemoryDestination(placement, in_place=self._plan.reading.in_place)

    def done(self, job: Job) -> list[tuple[Placement, Destination]]:
        """The job's bytes are in place; returns what is whole with them."""
        whole = []
        with self.turn:
            for move in job.read.moves:
                left = self._pending[move.placement] - move.region.count
                if left:
                    self._pending[move.placement] = left
                else:
                    del self._pending[move.placement]
                    whole.append((move.placement, self._destinations.pop(move.placement)))
        return whole

    def give_back(self, job: Job) -> None:
        """The job has ended, well or not."""
        reader = job.reader
        if job.ticket is not None:
            reader.give_back(job.ticket)
        with self.turn:
            self._open[reader] -= 1
            if not self._open[reader] and reader is not self._reader:
                self._drop(reader)

    def hand_over(self, placement: Placement) -> None:
        """The tensor is the caller's now, so another may be begun."""
        with self.turn:
            self._begun -= placement.nbytes
            self._room.notify_all()

    def _drop(self, reader: ShardReader) -> None:
        if not reader.is_unchanged():
            self._rewritten.append(reader.shard.file)
        reader.close()
        del self._open[reader]

    def finish(self) -> None:
        """After the last read.

        Raises:
            CheckpointError: a file was written to while it was read, so what was read may be of two minds.
        """
        for reader in list(self._open):
            self._drop(reader)
        if self._rewritten:
            raise CheckpointError(
                f"{self._rewritten[0]}: changed during the load; wait until nothing writes to it and load again"
            )

    def stop(self) -> None:
        """No more jobs; whoever waits for one gets None. May be interrupted and called again."""
        self._stopped = True
        with self.turn:
            self._room.notify_all()

    def close(self) -> None:
        """Close what is still open; for when the threads have ended."""
        for reader in list(self._open):
            reader.close()
            del self._open[reader]
        self._destinations.clear()
        for accelerator in self.accelerators.values():
            accelerator.close()
