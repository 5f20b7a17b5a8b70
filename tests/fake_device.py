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
        self.side = _SIDE
        self.streams: dict[str, deque[tuple[str, Any]]] = {self.side: deque()}
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
            name = stream or self.side
            if self.immediate and name != self.side:
                return Event(name, done=True)
            event = Event(name)
            self.streams.setdefault(name, deque()).append(("record", event))
            return event

    def wait(self, stream: str | None, event: Event) -> None:
        """Where users compute at once, they wait at once."""
        with self.lock:
            name = stream or self.side
            if self.immediate and name != self.side:
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
            self.streams.setdefault(stream or self.side, deque()).append(("run", work))

    def hurry(self, stream: str, most: int = 1 << 30) -> None:
        """A stream does all that it can without the others, or as many things."""
        with self.lock:
            while most and self._step(stream, push=False):
                most -= 1

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


class FakeDevice:
    """What the fake streams of several readers have in common: their queues, the device's memory, and pinned memory.

    Memory is given out again as soon as it is let go of, to the stream that it belonged to. What a stream does with
    memory that was let go of, or is not pinned any more, is told in `faults`.

    Args:
        seed: of what is done when.
        pins: whether host memory can be pinned.
        room: bytes of device memory; None for no bound.
    """

    def __init__(self, seed: int = 0, *, pins: bool = True, room: int | None = None) -> None:
        self.lock = threading.RLock()
        self.random = random.Random(seed)
        self.streams: dict[str, deque[tuple[str, Any]]] = {}
        self.pins = pins
        self.room = room
        self.pinned: dict[int, int] = {}
        self.most_pinned = self.held = self.peak = self.copies = 0
        self.faults: list[str] = []
        self.fails_at: int | None = None
        self.blocks: dict[int, tuple[Any, int, list[int]]] = {}
        self.free: dict[int, list[int]] = {}

    def open(self, name: str) -> FakeStreams:
        """In place of `lowmem.engine.accelerator.open_backend`."""
        return FakeStreams(self, name)

    def allocate(self, nbytes: int) -> Any:
        """Memory with an owner, at whose end it is free."""
        with self.lock:
            if self.room is not None and self.held + nbytes > self.room:
                raise torch.OutOfMemoryError("out of memory")
            if self.free.get(nbytes):
                address = self.free[nbytes].pop()
            else:
                memory = ctypes.create_string_buffer(b"\xaa" * nbytes, nbytes)
                address = ctypes.addressof(memory)
                self.blocks[address] = (memory, nbytes, [0])
            self.held += nbytes
            self.peak = max(self.peak, self.held)
        owner = (ctypes.c_char * nbytes).from_address(address)
        weakref.finalize(owner, self._let_go, address).atexit = False
        return owner

    def _let_go(self, address: int) -> None:
        with self.lock:
            _, nbytes, generation = self.blocks[address]
            generation[0] += 1
            self.held -= nbytes
            self.free.setdefault(nbytes, []).append(address)

    def state_of(self, address: int) -> tuple[str, int]:
        """What memory there is at an address, and whose it is."""
        for begin, (_, nbytes, generation) in self.blocks.items():
            if begin <= address < begin + nbytes:
                return "device", generation[0]
        pinned = any(begin <= address < begin + nbytes for begin, nbytes in self.pinned.items())
        return ("pinned", 0) if pinned else ("host", 0)


class FakeStreams(FakeBackend):
    """A stream of its own on a `FakeDevice`."""

    def __init__(self, shared: FakeDevice, name: str) -> None:
        super().__init__(immediate=False)
        self.shared, self.lock, self.random, self.streams = shared, shared.lock, shared.random, shared.streams
        with self.lock:
            self.side = f"{name}/{len(self.streams)}"
            self.streams[self.side] = deque()
            self.user = f"{name}/home"
            self.streams.setdefault(self.user, deque())

    def enter(self) -> None:
        """There is only one."""

    def empty(self, stream: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Of a device whose memory all belongs to the streams of the caller."""
        assert stream.endswith("/home")
        count = torch.Size(shape).numel()
        return torch.frombuffer(self.shared.allocate(count * dtype.itemsize), dtype=dtype).view(shape)

    def pin(self, memory: torch.Tensor) -> bool:
        """Noted."""
        with self.lock:
            if self.shared.pins:
                self.shared.pinned[memory.data_ptr()] = memory.nbytes
                self.shared.most_pinned = max(self.shared.most_pinned, sum(self.shared.pinned.values()))
            return self.shared.pins

    def unpin(self, memory: torch.Tensor) -> None:
        """Noted."""
        with self.lock:
            del self.shared.pinned[memory.data_ptr()]

    def finish(self, event: Event) -> None:
        """Or fail, as a device does that failed before."""
        with self.lock:
            if self.shared.fails_at is not None and self.shared.copies >= self.shared.fails_at:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
        super().finish(event)

    def copy(self, into: torch.Tensor, source: torch.Tensor) -> None:
        """By address, later, with a cast where the device has both."""
        assert into.shape == source.shape
        ends = [_Lies(into), _Lies(source)]
        with self.lock:
            self.shared.copies += 1
            states = [self.shared.state_of(one.address) for one in ends]
            assert states[0][0] == "device"
            if states[1][0] != "device":
                # Else torch would make temporary memory, and wait.
                assert into.is_contiguous()
                assert source.is_contiguous()
                assert into.dtype == source.dtype

            def work() -> None:
                if [self.shared.state_of(one.address) for one in ends] != states:
                    self.shared.faults.append("memory was let go of before its use")
                    return
                ends[0].tensor().copy_(ends[1].tensor())

            self.submit(None, work)
            self.stir()


class _Lies:
    """Where a tensor lies, and no hold on it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.address, self.dtype = tensor.data_ptr(), tensor.dtype
        self.shape, self.strides = tuple(tensor.shape), tensor.stride()
        self.span = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))

    def tensor(self) -> torch.Tensor:
        memory = (ctypes.c_char * (self.span * self.dtype.itemsize)).from_address(self.address)
        return torch.frombuffer(memory, dtype=self.dtype).as_strided(self.shape, self.strides)
