"""Bytes from one rank to others, by torch.distributed: a broadcast that ends when another rank has failed."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from ..errors import RankError
from .links import SILENCE

if TYPE_CHECKING:
    from .control import Together

# Messages under way: enough that no connection waits for the interpreter.
_AHEAD = 4
# Seconds between two looks at whether a message has arrived, and at the other ranks.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.0001, 0.05
# Seconds in which a rank that failed says why.
_EXPLAINING = 3.0


class Carrier:
    """Broadcasts among some of the ranks that load together, in the order in which they are put.

    Every rank of a broadcast must put it, and in the same order as all others that both are in.

    Args:
        together: the ranks.
    """

    def __init__(self, together: Together) -> None:
        self._together = together
        self._groups: dict[tuple[int, ...], Any] = {}
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
        while len(self._under_way) >= _AHEAD:
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
        """End the connections of host memory: who waits for this rank, because it failed, then waits no more."""
        self._under_way.clear()
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
        if data.device.type != "cpu":
            return dist.broadcast(data, reader, group=device_group(ranks), async_op=True)
        options = dist.BroadcastOptions()
        options.rootRank = ranks.index(reader)
        options.rootTensor = 0
        return self._host_group(ranks).broadcast([data], options)

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

    def _host_group(self, ranks: tuple[int, ...]) -> Any:
        """A gloo context of these ranks alone, made for this load (see links.py: torch's own groups have names that
        depend on what else each rank has made).
        """
        if ranks not in self._groups:
            import torch.distributed as dist

            at = ranks.index(self._together.rank)
            self._groups[ranks] = dist.ProcessGroupGloo(self._space(ranks), at, len(ranks), SILENCE)
        return self._groups[ranks]


# Of accelerators: communicators take memory there and seconds to make, so that they are made once for a process.
_DEVICE_GROUPS: dict[tuple[Any, tuple[int, ...]], Any] = {}


def device_group(ranks: tuple[int, ...]) -> Any:
    """A group of the backend that the program runs with, for tensors on its devices."""
    import torch.distributed as dist

    key = dist.group.WORLD, ranks
    if key not in _DEVICE_GROUPS:
        stale = [known for known in _DEVICE_GROUPS if known[0] is not key[0]]
        for known in stale:
            with suppress(KeyError):
                del _DEVICE_GROUPS[known]
        _DEVICE_GROUPS[key] = dist.new_group(list(ranks), use_local_synchronization=True, timeout=timedelta(minutes=30))
    return _DEVICE_GROUPS[key]
