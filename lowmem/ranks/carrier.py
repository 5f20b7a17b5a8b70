"""Bytes from one rank to others, by torch.distributed: a broadcast that ends when another rank has failed."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from ..errors import RankError, UnsupportedError
from .links import CONNECTING, SILENCE

if TYPE_CHECKING:
    from .control import Together

# Seconds between two looks at whether a message has arrived, and at the other ranks.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.0001, 0.05
# Seconds in which a rank that failed says why.
_EXPLAINING = 3.0


class Carrier:
    """Broadcasts among some of the ranks that load together, in the order in which they are put.

    Every rank of a broadcast must put it, and in the same order as all others that both are in.

    Args:
        together: the ranks.
        ahead: messages under way: enough that no connection waits for the interpreter.
    """

    def __init__(self, together: Together, ahead: int) -> None:
        self._together = together
        self._ahead = ahead
        self._groups: dict[tuple[tuple[int, ...], str], Any] = {}
        self._met: set[tuple[int, ...]] = set()
        self._under_way: deque[tuple[Any, int, Callable[[], None]]] = deque()

    @property
    def rank(self) -> int:
        """This rank."""
        return self._together.rank

    def put(self, data: torch.Tensor, reader: int, ranks: tuple[int, ...], done: Callable[[], None]) -> None:
        """Begin to bring the bytes of a dense tensor from `reader` into those of the others.

        Args:
            data: of the same size on each.
            reader: the global rank that has them.
            ranks: all that take part, sorted.
            done: called, by this or a later call, when they are there.

        Raises:
            RankError: another rank has failed, or is gone.
        """
        while len(self._under_way) >= self._ahead:
            self._take()
        try:
            work = self._broadcast(data, reader, ranks)
        except RuntimeError as error:
            raise self._lost(error, reader) from error
        self._under_way.append((work, reader, done))

    def finish(self) -> None:
        """Wait for all that are under way.

        Raises:
            RankError: another rank has failed, or is gone.
        """
        while self._under_way:
            self._take()

    def close(self) -> None:
        """End the connections: who waits for this rank, because it failed, then waits no more."""
        is_broken = bool(self._under_way)
        self._under_way.clear()
        for (_, device), group in self._groups.items():
            if device != "cpu":
                # What an accelerator still waits for it would wait for until torch's own limit.
                with suppress(RuntimeError):
                    (group.abort if is_broken else group.shutdown)()
        self._groups.clear()

    def _take(self) -> None:
        """Wait for the first of those under way."""
        work, reader, done = self._under_way[0]
        pause = _SHORTEST_PAUSE
        while not work.is_completed():
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            if pause == _LONGEST_PAUSE:
                self._together.check()
        try:
            work.wait()
        except RuntimeError as error:
            raise self._lost(error, reader) from error
        self._under_way.popleft()
        done()

    def _lost(self, error: Exception, reader: int) -> RankError:
        """A connection broke. Whoever failed says so himself, which is the better message."""
        until = time.monotonic() + _EXPLAINING
        while time.monotonic() < until:
            self._together.check()
            time.sleep(_LONGEST_PAUSE)
        return RankError(
            f"bytes that rank {reader} has read could not be given on: {error}; read='each' lets every rank read "
            "what it holds",
            rank=reader,
        )

    def _broadcast(self, data: torch.Tensor, reader: int, ranks: tuple[int, ...]) -> Any:
        import torch.distributed as dist

        self._meet(ranks)
        options = dist.BroadcastOptions()
        options.rootRank = ranks.index(reader)
        options.rootTensor = 0
        # Long enough for a rank that reads; news of one that failed comes by other ways.
        options.timeout = SILENCE
        return self._group(ranks, data.device.type).broadcast([data], options)

    def _meet(self, ranks: tuple[int, ...]) -> None:
        """Wait for all of these ranks before the first broadcast among them.

        Who makes a group waits for the others in torch, where nothing ends it, with torch's store locked, so that even
        news of a failure waits. So only those make one who are all there.

        Raises:
            RankError: another rank has failed, or is gone.
        """
        if ranks in self._met:
            return
        store, pause = self._space(ranks), _SHORTEST_PAUSE
        count = store.add("met", 1)
        while count < len(ranks):
            self._together.check()
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            count = store.add("met", 0)
        self._met.add(ranks)

    def _space(self, ranks: tuple[int, ...]) -> Any:
        name = hashlib.sha1(repr(ranks).encode(), usedforsecurity=False).hexdigest()
        return self._together.name_space(f"carrier/{name}")

    def _group(self, ranks: tuple[int, ...], device: str) -> Any:
        """A context of these ranks alone, made for this load: of gloo for host memory, of NCCL for CUDA devices.

        torch's own groups have names that depend on what else each rank has made (see links.py), and are split off the
        default one, which takes all of its ranks.
        """
        if (ranks, device) not in self._groups:
            import torch.distributed as dist

            at, store = ranks.index(self._together.rank), self._space(ranks)
            if device == "cpu":
                self._groups[ranks, device] = dist.ProcessGroupGloo(store, at, len(ranks), CONNECTING)
            elif device == "cuda" and dist.is_nccl_available():
                self._groups[ranks, device] = dist.ProcessGroupNCCL(
                    store, at, len(ranks), dist.ProcessGroupNCCL.Options()
                )
            else:
                raise UnsupportedError(
                    f"read='once': {device} devices of this torch have no NCCL to give tensors to each other: expected "
                    "host memory or CUDA; read='each' lets every rank read what it holds"
                )
        return self._groups[ranks, device]
