"""A device that is not there: streams whose work is done late and out of order, and memory that is used again at once.

As on a real one, an operation that was asked for knows addresses and holds no tensor.
"""

from __future__ import annotations

import ctypes
import random
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

_SIDE = "side"


class Event:
    """When a stream has done what it was asked for."""

    def __init__(self, stream: str, *, done: bool = False) -> None:
        self.stream = stream
        self.done = done


class _Block:
    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.memory = ctypes.create_string_buffer(b"\xaa" * nbytes, nbytes)
        self.streams: set[str] = set()
        self.pending: list[Event] = []


class FakeBackend:
    """See `lowmem.offload.accelerators.Backend`.

    Args:
        seed: of what is done when.
        immediate: what users compute is done at once, by the CPU; else `submit` says what they compute.
        room: bytes of device memory; None for no bound.
    """

    device = torch.device("cpu")

    def __init__(self, seed: int = 0, *, immediate: bool = True, room: int | None = None) -> None:
        self.lock = threading.RLock()
        self.random = random.Random(seed)
        self.immediate = immediate
        self.room = room
        self.streams: dict[str, deque[tuple[str, Any]]] = {_SIDE: deque()}
        self.user = "user"
        self.held = self.peak = self.copies = self.pinned_bytes = 0
        self.blocks: list[_Block] = []
        self.free: list[_Block] = []

    def allocate(self, nbytes: int) -> torch.Tensor:
        """What was let go of first, if nobody is known to use it."""
        if not nbytes:
            return torch.empty(0, dtype=torch.uint8)
        with self.lock:
            self.stir()
            if self.room is not None and self.held + nbytes > self.room:
                raise RuntimeError("out of memory")
            fitting = [b for b in self.free if b.nbytes == nbytes and all(event.done for event in b.pending)]
            block = fitting[0] if fitting else _Block(nbytes)
            if fitting:
                self.free.remove(block)
            else:
                self.blocks.append(block)
            block.streams.clear()
            self.held += nbytes
            self.peak = max(self.peak, self.held)
        owner = (ctypes.c_char * nbytes).from_address(ctypes.addressof(block.memory))
        weakref.finalize(owner, self._let_go, block).atexit = False
        return torch.frombuffer(owner, dtype=torch.uint8)

    def _let_go(self, block: _Block) -> None:
        with self.lock:
            self.held -= block.nbytes
            block.pending = [self.record(stream) for stream in block.streams]
            self.free.append(block)

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Ordinary memory."""
        self.pinned_bytes += nbytes
        return torch.full((nbytes,), 0xBB, dtype=torch.uint8)

    def current(self) -> str:
        """As the test says."""
        return self.user

    def record(self, stream: str | None) -> Event:
        """At the end of the stream."""
        with self.lock:
            name = stream or _SIDE
            if self.immediate and name != _SIDE:
                return Event(name, done=True)
            event = Event(name)
            self.streams.setdefault(name, deque()).append(("record", event))
            return event

    def wait(self, stream: str | None, event: Event) -> None:
        """Where users compute at once, they wait at once."""
        with self.lock:
            name = stream or _SIDE
            if self.immediate and name != _SIDE:
                self.finish(event)
            else:
                self.streams.setdefault(name, deque()).append(("wait", event))
            self.stir()

    def finish(self, event: Event) -> None:
        """Do what comes before it, and nothing else."""
        with self.lock:
            while not event.done:
                assert self._step(event.stream), "streams wait for each other"

    def copy(self, into: torch.Tensor, source: torch.Tensor) -> None:
        """Reads the source when it is done, not now."""
        assert into.is_contiguous()
        assert source.is_contiguous()
        assert into.nbytes == source.nbytes
        there, here, nbytes = into.data_ptr(), source.data_ptr(), into.nbytes
        with self.lock:
            self.copies += 1
        self.submit(None, lambda: ctypes.memmove(there, here, nbytes))
        with self.lock:
            self.stir()

    def keep(self, tensor: torch.Tensor, stream: str) -> None:
        """The block at this address is used by a stream."""
        address = tensor.data_ptr()
        with self.lock:
            for block in self.blocks:
                begin = ctypes.addressof(block.memory)
                if begin <= address < begin + block.nbytes:
                    block.streams.add(stream)

    def submit(self, stream: str | None, work: Callable[[], object]) -> None:
        """Ask a stream for something."""
        with self.lock:
            self.streams.setdefault(stream or _SIDE, deque()).append(("run", work))

    def stir(self) -> None:
        """Some streams do some of their work."""
        if self.random.random() < 0.5:
            name = self.random.choice(sorted(self.streams))
            for _ in range(self.random.randrange(6)):
                if not self._step(name, push=False):
                    break

    def drain(self) -> None:
        """Everything is done."""
        while any(self.streams.values()):
            names = [name for name, queue in self.streams.items() if queue]
            self._step(self.random.choice(names))

    def _step(self, name: str, *, push: bool = True) -> bool:
        """The next thing of a stream; `push`: what it waits for first. False where nothing can be done."""
        queue = self.streams[name]
        if not queue:
            return False
        kind, what = queue[0]
        if kind == "wait" and not what.done:
            return push and what.stream != name and self._step(what.stream)
        queue.popleft()
        if kind == "record":
            what.done = True
        elif kind == "run":
            what()
        return True
