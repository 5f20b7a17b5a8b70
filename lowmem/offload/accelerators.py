"""Accelerators as a place that computes: weights are made in pinned host memory and copied on a stream of their own.

Work on a device is asked for and done later, in the order of its stream; an event says when what a stream was asked
for is done (the CUDA programming guide, "Asynchronous Concurrent Execution"). Four orders make the numbers right:
a copy waits for those who compute with what its buffer held before; who computes waits for the copy; host memory is
written again when the copy out of it is done; and device memory that is let go of is given to nobody before those who
used it are done (`Tensor.record_stream`).
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..engine.streams import Backend, PlainBackend, StreamBackend, has_streams
from ..errors import BudgetError
from ..planner.running import PIECES, Running
from ..sizes import format_size
from .places import Recipe

# Where a weight begins in pinned memory: any dtype can be read there, and none shares a line of the cache.
_ALIGNMENT = 64


class _Slot:
    """Pinned memory that is filled from its beginning to its end, and again when all copies out of it are done."""

    def __init__(self, backend: Backend, nbytes: int) -> None:
        self._backend = backend
        self._nbytes = nbytes
        self._memory: torch.Tensor | None = None
        self._filled = 0
        self._event: Any = None

    def room(self, nbytes: int) -> torch.Tensor:
        """So many bytes that nobody reads any more. More than it has are more from then on."""
        begin = -(-self._filled // _ALIGNMENT) * _ALIGNMENT
        if self._memory is not None and begin + nbytes > self._memory.numel():
            if self._event is not None:
                self._backend.finish(self._event)
            self._event = None
            begin = 0
            if nbytes > self._memory.numel():
                self._memory = None
        if self._memory is None:
            begin, self._nbytes = 0, max(self._nbytes, nbytes)
            with torch.inference_mode(False):
                self._memory = self._backend.pinned(self._nbytes)
        self._filled = begin + nbytes
        return self._memory[begin : begin + nbytes]

    def sent(self) -> None:
        """A copy of what it holds was asked for."""
        self._event = self._backend.record(None)


class _Slots:
    """Pinned memory: some pieces that threads take turns at, and one for what comes only as a whole and is larger."""

    def __init__(self, backend: Backend, piece: int, count: int, large: int) -> None:
        self.piece = piece
        self._ready = threading.Condition()
        # The one whose copies began first comes first.
        self._waiting = deque(_Slot(backend, piece) for _ in range(count))
        self._large = _Slot(backend, large)
        self._at_large = threading.Lock()

    @contextmanager
    def taken(self, nbytes: int) -> Iterator[_Slot]:
        """One that nobody else fills. Who has one takes no other, so that nobody waits for ever."""
        if nbytes > self.piece:
            with self._at_large:
                yield self._large
            return
        with self._ready:
            self._ready.wait_for(lambda: self._waiting)
            slot = self._waiting.popleft()
        try:
            yield slot
        finally:
            with self._ready:
                self._waiting.append(slot)
                self._ready.notify()


class _Ticket:
    """A weight that is there when an event has come."""

    __slots__ = ("event", "into")

    def __init__(self, event: Any, into: torch.Tensor) -> None:
        self.event = event
        # The tensor of the ring itself, which does not count as another holder of its memory.
        self.into = into


class AcceleratorPlace:
    """A device that computes on streams of its own.

    Args:
        backend: of the device.
        piece: bytes of each piece of pinned memory.
        count: how many of them.
        large: bytes of another for what is larger than a piece and comes only as a whole.
    """

    def __init__(self, backend: Backend, piece: int, count: int = PIECES, large: int = 0) -> None:
        self.device = backend.device
        self._backend = backend
        self._slots = _Slots(backend, piece, count, large)

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Device memory.

        Raises:
            BudgetError: there is none left.
        """
        try:
            return self._backend.allocate(nbytes)
        except RuntimeError as error:
            raise BudgetError(
                f"{self.device} refused {format_size(nbytes)} for a weight that is brought there at use ({error}); "
                "others took its memory since the load, such as activations or a cache of keys and values; give it a "
                "smaller max_memory (--max-memory), or a shorter input",
                required=nbytes,
                limit=0,
            ) from error

    def bring(self, recipe: Recipe, into: torch.Tensor, writable: Any) -> _Ticket:
        """Make it in pinned memory, and have it copied."""
        for stamp in writable if isinstance(writable, tuple) else (writable,):
            if stamp is not None:
                self._backend.wait(None, stamp)
        if not recipe.is_scratch:
            self._send(recipe, into)
        return _Ticket(self._backend.record(None), into)

    def user(self) -> Any:
        """The current stream."""
        return self._backend.current()

    def wait(self, stamp: _Ticket | None) -> None:
        """The current stream waits for what `bring` gave."""
        if stamp is None:
            return
        stream = self._backend.current()
        self._backend.wait(stream, stamp.event)
        self._backend.keep(stamp.into, stream)

    def stamp(self, user: Any) -> Any:
        """An event of that stream."""
        return self._backend.record(user)

    def _send(self, recipe: Recipe, into: torch.Tensor) -> None:
        """As much at once as a piece of pinned memory holds, where it can be made in parts."""
        if not into.numel():
            return
        row = into.itemsize * math.prod(into.shape[1:])
        parts: int = getattr(recipe, "parts", 1)
        if into.nbytes > self._slots.piece and recipe.by_rows and row <= self._slots.piece:
            step = self._slots.piece // row
            for begin in range(0, into.shape[0], step):
                end = min(begin + step, into.shape[0])
                self._copy(_rows(recipe, begin, end), into[begin:end])
        elif into.nbytes > self._slots.piece and parts > 1:
            whole: Any = recipe
            for index in range(parts):
                self._send(whole.part(index), into[index])
        else:
            self._copy(recipe.make, into)

    def _copy(self, make: Callable[[torch.Tensor], None], into: torch.Tensor) -> None:
        with self._slots.taken(into.nbytes) as slot:
            source = slot.room(into.nbytes).view(into.dtype).view(into.shape)
            make(source)
            self._backend.copy(into, source)
            slot.sent()


def _rows(recipe: Recipe, begin: int, end: int) -> Callable[[torch.Tensor], None]:
    def make(into: torch.Tensor) -> None:
        recipe.make_rows(begin, end, into)

    return make


def accelerator_place(device: str, running: Running) -> AcceleratorPlace:
    """The place of a device such as `"cuda:0"`, `"xpu:1"` or `"mps"`."""
    found = torch.device(device)
    api = getattr(torch, found.type, None)
    backend: Backend = PlainBackend(found)
    if has_streams(api):
        backend = StreamBackend(found, api)
    return AcceleratorPlace(backend, running.piece, large=running.pinned - PIECES * running.piece)
