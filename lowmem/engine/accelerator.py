"""Accelerators that a load fills: readers fill pinned slots in turn, and each has a stream of its own on each device.

Work on a device is asked for and done later, in the order of its stream. Five orders make the bytes right. A slot is
filled again when the copies out of it are done. A copy into a tensor comes after what the caller's stream was asked
for before the tensor was allocated, which may still use its memory. A cast follows the copy of its source on the same
stream, as does the next copy into the same chunk. Whoever gets a tensor waits for its copies: the caller's stream
before it is installed, and the caller before a load ends or a stream of tensors hands it over. And memory, of the host
or the device, is let go of when every stream that was asked to use it has been waited for.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..errors import BudgetError, LowmemError
from ..mapping import Region
from ..planner import LoadPlan, Move, Placement
from ..planner.accelerators import is_cast_before, is_streamed
from ..planner.records import Staging
from .destinations import MemoryDestination, Scratch, huge_map, matched, refusal, viewed
from .streams import Backend, StreamBackend

# Elements that are cast by way of the heap, before there is room in front of the others.
_FIRST = 4096


def open_backend(device: str) -> Backend:
    """A stream, and all that goes with it, of a device such as `"cuda:0"`; without index of the current one."""
    found = torch.device(device)
    index = torch.cuda.current_device() if found.index is None else found.index
    # Readers that are ahead of the bus must not take the processors of those that are not.
    return StreamBackend(torch.device(found.type, index), torch.cuda, patient=True)


def accelerators_of(plan: LoadPlan) -> dict[str, Accelerator]:
    """Those that the plan fills and that have streams, by name; to be called where the caller's streams are current."""
    names = {p.device for p in plan.placements if p.residency == "copy" and p.is_fed and is_streamed(p.device)}
    return {name: Accelerator(name, plan.staging) for name in sorted(names)} if plan.staging.each else {}


class Accelerator:
    """A device that the readers of a load fill. Its memory belongs to the stream that the caller had there."""

    def __init__(self, name: str, staging: Staging) -> None:
        self.backend = open_backend(name)
        # A thread may have another current device.
        self.name = str(self.backend.device) if name == "cuda" else name
        self._home = self.backend.current()
        self._readers = staging.workers
        # As the plan counts it. A multiple of `ALIGNMENT`, so any dtype may begin at each of them.
        self._size = staging.each
        self._turn = threading.Lock()
        self._chunks: torch.Tensor | None = None
        self._given = 0

    def allocate(self, placement: Placement) -> tuple[torch.Tensor, Any]:
        """An uninitialised tensor, and the event that comes before its first use.

        Raises:
            BudgetError: the device refuses the memory.
            LowmemError: it failed.
        """
        with _blaming(self, placement.target):
            try:
                tensor = self.backend.empty(self._home, placement.shape, getattr(torch, placement.dtype))
            except torch.OutOfMemoryError as error:
                raise refusal(placement, error) from error
            return tensor, self.backend.record(self._home)

    def chunk(self) -> tuple[torch.Tensor, Any]:
        """Memory of the device for the stream of one reader, and the event that comes before its first use.

        Those of all readers at once: torch's cache takes 20 MiB for each stream that allocates a few.
        """
        with self._turn:
            if self._chunks is None:
                self._chunks = self.backend.empty(self._home, (self._readers * self._size,), torch.uint8)
            begin = self._given * self._size
            self._given += 1
            return self._chunks[begin : begin + self._size], self.backend.record(self._home)

    def put(self, into: torch.Tensor, source: torch.Tensor, since: Any) -> None:
        """Copy host memory that is not pinned, and that may be written to when this comes back."""
        with self._turn:
            self.backend.wait(None, since)
            self.backend.copy(into, source)
            self.backend.finish(self.backend.record(None))

    def close(self) -> None:
        """For when all streams have been waited for."""
        self._chunks = None


class AcceleratorDestination(MemoryDestination):
    """A tensor on an accelerator, whose values come behind the calls that ask for them: see `order` and `finish`."""

    def __init__(self, placement: Placement, accelerator: Accelerator) -> None:
        self.placement = placement
        self.accelerator = accelerator
        self.tensor, self.since = accelerator.allocate(placement)
        # The last copies of each reader, told by their threads.
        self.copied: dict[_Route, Any] = {}

    def begin(self, move: Move, scratch: Scratch, at: int) -> memoryview:
        """In the slot."""
        begin = scratch.place_of(move, at)
        return scratch.memory[begin : begin + move.nbytes]

    def end(self, move: Move, scratch: Scratch, at: int) -> None:
        """Ask for the copy."""
        assert isinstance(scratch, Slot)
        source = scratch.elements(move, scratch.place_of(move, at))
        # A view is gathered on the device, and cast with that.
        if move.source is None and is_cast_before(move.dtype, self.placement.dtype):
            source = narrowed(source, self.tensor.dtype)
        scratch.lane.send(self, move.region, source, move.source)

    def put(self, region: Region, source: torch.Tensor, scratch: Scratch | None = None) -> None:
        """Ask for the copy of what is in a slot; what is not is copied."""
        if isinstance(scratch, Slot):
            scratch.lane.send(self, region, source, None)
            return
        into, source = matched(self.tensor, region, source)
        with _blaming(self.accelerator, self.placement.target):
            self.accelerator.put(into, source, self.since)

    def order(self) -> None:
        """What the calling thread asks the device for from now on finds the values."""
        backend = self.accelerator.backend
        with _blaming(self.accelerator, self.placement.target):
            stream = backend.current()
            for event in self.copied.values():
                backend.wait(stream, event)

    def finish(self) -> None:
        """Wait for the values."""
        with _blaming(self.accelerator, self.placement.target):
            for event in self.copied.values():
                self.accelerator.backend.finish(event)


class Slot(Scratch):
    """A buffer that is not to be written to while copies out of it are on their way."""

    def __init__(self, memory: memoryview, work: torch.Tensor, lane: Lane) -> None:
        super().__init__(len(memory), memory=memory)
        self.work = work
        self.lane = lane
        # The copies' events, and the name of the first tensor that they are for.
        self.pending: list[tuple[_Route, Any, str]] = []

    def wait(self) -> None:
        """Until the copies are done.

        Raises:
            LowmemError: one of them failed.
        """
        while self.pending:
            route, event, name = self.pending[-1]
            with _blaming(route.accelerator, name):
                route.backend.finish(event)
            self.pending.pop()


class Lane:
    """One reader's slots, and its streams. To be closed by the thread that made it, however it ends.

    Args:
        accelerators: the devices of the load.
        staging: its buffers.
    """

    def __init__(self, accelerators: Mapping[str, Accelerator], staging: Staging) -> None:
        memory = huge_map(staging.slots * staging.each)
        self._memory = torch.frombuffer(memory, dtype=torch.uint8, count=staging.slots * staging.each)
        work = Scratch(staging.work).tensor
        parts = [memoryview(memory)[i * staging.each : (i + 1) * staging.each] for i in range(staging.slots)]
        self._slots = [Slot(part, work, self) for part in parts]
        self._turn = 0
        self._routes: dict[Accelerator, _Route] = {}
        # Once for all devices. What is not pinned is copied more slowly, and in the same order.
        self._backend = next(iter(accelerators.values())).backend
        self._backend.enter()
        self._is_pinned = self._backend.pin(self._memory)

    def take(self) -> Slot:
        """The slot that was sent first, when its copies are done.

        Raises:
            LowmemError: one of them failed.
        """
        slot = self._slots[self._turn]
        self._turn = (self._turn + 1) % len(self._slots)
        slot.wait()
        return slot

    def send(
        self, destination: AcceleratorDestination, region: Region, source: torch.Tensor, gather: Region | None
    ) -> None:
        """Ask for the copy of dense elements of a slot into a region.

        Args:
            destination: whose region.
            region: where in it.
            source: the elements.
            gather: those of them that are meant, where not all are.

        Raises:
            BudgetError: the device has no memory for a chunk.
            LowmemError: the device refuses the copy.
        """
        accelerator = destination.accelerator
        with _blaming(accelerator, destination.placement.target):
            route = self._routes.get(accelerator)
            if route is None:
                route = self._routes[accelerator] = _Route(accelerator)
            if destination not in route.fed:
                route.backend.wait(None, destination.since)
                route.fed[destination] = None
            if gather is None and source.dtype == destination.tensor.dtype:
                into, whole = matched(destination.tensor, region, source)
                if into.is_contiguous():
                    route.backend.copy(into, whole)
                    return
            # torch would cast or gather it on the host, in memory that nobody counts.
            there = route.chunk()[: source.nbytes].view(source.dtype).view(source.shape)
            route.backend.copy(there, source)
            route.backend.copy(*matched(destination.tensor, region, viewed(there, gather)))

    def sent(self, slot: Slot) -> None:
        """All copies out of the slot were asked for; their tensors are not whole before this.

        Raises:
            LowmemError: a device failed.
        """
        for route in self._routes.values():
            if not route.fed:
                continue
            name = next(iter(route.fed)).placement.target
            with _blaming(route.accelerator, name):
                event = route.backend.record(None)
            slot.pending.append((route, event, name))
            for destination in route.fed:
                destination.copied[route] = event
            route.fed.clear()

    def finish(self) -> None:
        """Wait for all copies.

        Raises:
            LowmemError: one of them failed.
        """
        for slot in self._slots:
            slot.wait()

    def close(self) -> None:
        """Wait for all that was asked for, and let go of the memory; a second call does nothing."""
        for route in self._routes.values():
            # One that has failed does nothing more.
            with contextlib.suppress(RuntimeError):
                route.backend.finish(route.backend.record(None))
            route.let_go()
        self._routes.clear()
        if self._is_pinned:
            self._is_pinned = False
            self._backend.unpin(self._memory)
        self._slots.clear()


class _Route:
    """A reader's stream on one device, and its chunk there."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.backend = open_backend(accelerator.name)
        # What was asked for since the last event.
        self.fed: dict[AcceleratorDestination, None] = {}
        self._chunk: torch.Tensor | None = None

    def chunk(self) -> torch.Tensor:
        """Device memory for what is not yet in its place; the order of the stream says whose it is."""
        if self._chunk is None:
            self._chunk, since = self.accelerator.chunk()
            self.backend.wait(None, since)
        return self._chunk

    def let_go(self) -> None:
        """Of the chunk, when the stream has been waited for: tensors know their routes for longer than a load takes."""
        self._chunk = None


def narrowed(source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The elements as a dtype of half their size or less, in the beginning of their own memory.

    What was cast leaves a gap before the rest, with room for as many elements again: each step does twice as many as
    the one before, and writes nothing that is still to be read.
    """
    count = source.numel()
    result = source.view(torch.uint8)[: count * dtype.itemsize].view(dtype)
    done = min(count, _FIRST)
    result[:done].copy_(source[:done].to(dtype))
    while done < count:
        end = min(2 * done, count)
        result[done:end].copy_(source[done:end])
        done = end
    return result


@contextlib.contextmanager
def _blaming(accelerator: Accelerator, target: str) -> Iterator[None]:
    """Say which tensor and which device an error is about; one that comes late may be about an earlier tensor."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise BudgetError(
            f"tensor {target!r}: {accelerator.name} refused a reader's chunk: {error}; "
            "others took memory since the plan was made; lower staging or max_memory, or free memory",
            required=0,
            limit=0,
        ) from error
    except RuntimeError as error:
        raise LowmemError(
            f"tensor {target!r}, or one before it: copying to {accelerator.name} failed: {error}; the device may have "
            "failed for the whole process: load again in a new one"
        ) from error
