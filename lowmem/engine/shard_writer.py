"""Write the files of a conversion: the engine's moves go into them, and behind it one thread brings them to the disk
and reads them back.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch

from .._page_cache import give_back
from .._shared import start
from ..dtypes import itemsize
from ..errors import LowmemError, OutputError
from ..mapping import Region
from ..planner import LoadPlan, Move, Placement
from ..planner.records import OffloadFile
from ..sizes import MIB, format_size
from .cleanup import join
from .crew import Done, carry_out
from .destinations import FileDestination, MemoryDestination, Scratch, write_at
from .feed import Feed
from .int8 import RowsDestination
from .offload_writer import reserve
from .read_back import Piece, ReadBack, checksum

# Bytes that are brought to the disk at once: less is more flushes of the disk, more leaves it idle at the beginning.
_BATCH = 128 * MIB
# Written while the one before is still on its way to the disk.
_MOST_OPEN = 2
# Bytes of one checksum of what was scattered.
_STEP = 4 * MIB


class ShardFile:
    """One file of the result while it is written, under a name that ends in `.partial`.

    Args:
        file: its name, first bytes and size.
        folder: where it is written.
    """

    def __init__(self, file: OffloadFile, folder: Path) -> None:
        self.file = file
        self.path = folder / f"{file.name}.partial"
        self.pieces: list[Piece] = []
        self.is_written = False
        self._opened: io.FileIO | None = None

    def open(self) -> None:
        """Make it, at its final size, and write its header.

        Raises:
            OutputError: the disk is full, or the folder cannot be written.
        """
        try:
            self._opened = io.FileIO(self.path, "x+")
            reserve(self._opened.fileno(), self.file.size)
            self.write(memoryview(self.file.head), 0, "")
        except OSError as error:
            raise OutputError(
                f"{self.path}: cannot reserve {format_size(self.file.size)}: {error.strerror or error}; "
                "make room, or convert into a folder on another disk"
            ) from error

    @property
    def fd(self) -> int:
        """Its descriptor while it is open."""
        assert self._opened is not None
        return self._opened.fileno()

    def destination(self, placement: Placement) -> ShardDestination:
        """The range that belongs to `placement`."""
        return ShardDestination(placement, self)

    def write(self, view: memoryview, offset: int, tensor: str) -> None:
        """Write `view`, and remember what it was.

        Raises:
            OSError: the disk is full, or failed.
        """
        expected = checksum(view)
        write_at(self.fd, view, offset)
        self.pieces.append(Piece(offset, len(view), expected, tensor))

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._opened is not None:
            self._opened.close()

    def discard(self) -> None:
        """Close and remove it; a second call does nothing, and what another run has made in its place stays."""
        if self._opened is None or self._opened.closed:
            return
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self.fd), self.path.stat()):
                self.path.unlink()
        self.close()


class ShardDestination(FileDestination):
    """A range of a file; what needs no cast is written from where it was read to."""

    def __init__(self, placement: Placement, shard: ShardFile) -> None:
        super().__init__(placement, shard.fd, shard.file.spans[placement.target][0], os.fspath(shard.path))
        entry = placement.links[0].entry if placement.links else None
        self._as_it_is = entry is not None and entry.is_plain and entry.dtype == placement.dtype
        self._shard = shard
        self._tensor = placement.target
        self._is_scattered = False

    def begin(self, move: Move, scratch: Scratch, at: int) -> memoryview:
        """A place in the buffer."""
        if not self._as_it_is:
            return super().begin(move, scratch, at)
        begin = scratch.place_of(move, at)
        return scratch.memory[begin : begin + move.nbytes]

    def end(self, move: Move, scratch: Scratch, at: int) -> None:
        """Write from there, or cast and write."""
        if not self._as_it_is:
            super().end(move, scratch, at)
            return
        self._write(self.begin(move, scratch, at), self._offset + move.region.offset * self._dtype.itemsize)

    def _scatter(self, region: Region, source: torch.Tensor) -> None:
        super()._scatter(region, source)
        self._is_scattered = True

    def _failed(self, what: str) -> LowmemError:
        return OutputError(
            f"{self._path}: tensor {self._tensor!r}: {what}; make room, or convert into a folder on another disk"
        )

    def settle(self) -> None:
        """The tensor is whole. What was scattered is remembered now, as it lies in the file."""
        if not self._is_scattered or self._pages is None:
            return
        begin = self._offset % mmap.ALLOCATIONGRANULARITY
        with memoryview(self._pages) as pages:
            for at in range(0, self._nbytes, _STEP):
                size = min(_STEP, self._nbytes - at)
                with pages[begin + at : begin + at + size] as part:
                    self._shard.pieces.append(Piece(self._offset + at, size, checksum(part), self._tensor))
        self._pages = None

    def write_zeros(self) -> None:
        """All of it, which nothing feeds: what is not written is not read back either, and no record tells of it."""
        self._write(memoryview(bytes(self._nbytes)), self._offset)

    def _write(self, view: memoryview, offset: int) -> None:
        try:
            self._shard.write(view, offset, self._tensor)
        except OSError as error:
            raise self._failed(
                f"writing {len(view)} bytes at byte {offset} failed: {error.strerror or error}"
            ) from error


def settle(fd: int, size: int) -> None:
    """Wait until what was written is on the disk, and let go of its pages, so that the disk is asked for them."""
    sync = getattr(os, "fdatasync", os.fsync)
    sync(fd)
    give_back(fd, 0, size)


class Sealer:
    """Brings files to the disk and reads them back, in a thread of its own, while others are written.

    Args:
        verify: read back what was written, from the disk.
        seal: called with each file that is whole, in the sealer's thread.
    """

    def __init__(self, *, verify: bool, seal: Callable[[ShardFile], None]) -> None:
        self._audit = ReadBack() if verify else None
        self._seal = seal
        # Taken as a bare lock, as that of `Feed`.
        self._turn = threading.RLock()
        self._news = threading.Condition(self._turn)
        self._shards: deque[ShardFile] = deque()
        # Bytes of the newest file since some of it was last brought to the disk.
        self._waiting = 0
        self._error: BaseException | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="lowmem-sealer", daemon=True)

    def begin(self, shard: ShardFile) -> None:
        """Another file; waits while too many are on their way to the disk.

        Raises:
            OutputError: it cannot be made, or one before it cannot be brought to the disk or differs.
        """
        self._wait(_MOST_OPEN - 1)
        with self._turn:
            # Known before it is there, so that it is removed however this ends.
            self._shards.append(shard)
            self._waiting = 0
        shard.open()
        if self._thread.ident is None:
            try:
                start(self._thread)
            except RuntimeError as error:
                raise OutputError(f"the system refused a thread ({error}); raise its limit (ulimit -u, -v)") from error

    def add(self, nbytes: int) -> None:
        """So much more was written into the newest file.

        Raises:
            OutputError: something written before cannot be brought to the disk, or differs.
        """
        with self._turn:
            self._raise()
            self._waiting += nbytes
            self._news.notify_all()

    def close(self, shard: ShardFile) -> None:
        """All of `shard` is written; raises as `add`."""
        shard.is_written = True
        self.add(0)

    def finish(self) -> None:
        """Wait until all files are whole.

        Raises:
            OutputError: one cannot be brought to the disk, or differs.
        """
        self._wait(0)

    def end(self) -> None:
        """End the thread and remove what is not whole. May be called again."""
        self._stopped = True
        if self._audit is not None:
            self._audit.stop()
        with self._turn:
            self._news.notify_all()
        join(self._thread)
        for shard in self._shards:
            shard.discard()

    def _wait(self, most: int) -> None:
        with self._turn:
            while len(self._shards) > most and self._error is None:
                self._news.wait()
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            while (shard := self._next()) is not None:
                self._bring(shard)
        except OSError as error:
            path = self._shards[0].path
            self._error = OutputError(
                f"{path}: cannot be brought to the disk: {error.strerror or error}; make room, or convert into a "
                "folder on another disk"
            )
            self._error.__cause__ = error
        except BaseException as error:  # handed to the caller's thread, which raises it
            self._error = error
        finally:
            if self._audit is not None:
                self._audit.end()
        with self._turn:
            self._news.notify_all()

    def _next(self) -> ShardFile | None:
        """The oldest file, when it is written or enough of it is; None when all is done."""
        with self._turn:
            while not self._stopped:
                shard = self._shards[0] if self._shards else None
                if shard is not None and (shard.is_written or self._waiting >= _BATCH):
                    self._waiting = 0
                    return shard
                self._news.wait()
        return None

    def _bring(self, shard: ShardFile) -> None:
        # In this order: what is written after the look is for the next time.
        is_written = shard.is_written
        settle(shard.fd, shard.file.size)
        if not is_written:
            return
        if self._audit is not None:
            self._audit.begin(shard.path, sorted(shard.pieces))
            if not self._audit.finish():
                return
        self._seal(shard)
        with self._turn:
            self._shards.popleft()
            self._news.notify_all()


def write_shard(plan: LoadPlan, shard: ShardFile, sealer: Sealer, moved: Callable[[int], None]) -> None:
    """Run the moves of one file; the sealer makes it whole later.

    Args:
        plan: its moves.
        shard: the file, not open yet.
        sealer: takes it from here.
        moved: called from the calling thread with bytes that were read and written.

    Raises:
        CheckpointError: a source file changed, shrank or cannot be read.
        OutputError: the file cannot be written, or one before it differs from what was written.
        BudgetError: memory that the plan counted on was taken by others.
    """
    sealer.begin(shard)
    scales: dict[Placement, torch.Tensor] = {}

    def keep(finished: list[Done]) -> None:
        for done in finished:
            scales.update({p: place.tensor for p, place in done.whole if isinstance(place, MemoryDestination)})
        moved(sum(done.read.nbytes for done in finished))

    def take(finished: list[Done]) -> None:
        for done in finished:
            for _, destination in done.whole:
                made = destination.places if isinstance(destination, RowsDestination) else [destination]
                for place in made:
                    if isinstance(place, ShardDestination):
                        place.settle()
        moves = [move for done in finished for move in done.read.moves]
        sealer.add(sum(move.region.count * itemsize(move.placement.dtype) for move in moves))
        moved(sum(done.read.nbytes for done in finished))

    if plan.scales:
        before = plan.scales_plan()
        carry_out(before, Feed(before), keep)
    known = {key: scales[placement] for key, placement in plan.scales.items()}
    carry_out(plan, Feed(plan, shard, scales=known), take)
    computed = {placement.scales for placement in plan.placements}
    for placement in plan.placements:
        if not placement.links and placement not in computed:
            shard.destination(placement).write_zeros()
    sealer.close(shard)
