"""Tensors that one rank has read, given to the others that hold them: by torch.distributed, chunk by chunk."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch

from ..errors import LowmemError, RankError
from ..planner import Placement
from ..planner.moves import CHUNK
from ..planner.records import Shared
from .destinations import allocate

# Smaller tensors go together: each message costs as much as some hundred KiB of one.
_SMALL = 256 * 1024
# Messages under way: enough that no link waits for the interpreter.
_AHEAD = 4
# Seconds between two looks at whether the other ranks are still there.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.0001, 0.05


class Giving:
    """Gives on what was read, and takes what others have read. All ranks of a host go through it in the same order.

    Bytes go as they are, whatever they are of: large tensors from their own memory into that of the others, small ones
    by way of a buffer of at most a chunk.

    Args:
        rank: this one.
        origin: what is loaded, for messages.
        watch: raises when another rank has failed.
    """

    def __init__(self, rank: int, origin: str, watch: Callable[[], None]) -> None:
        self._rank = rank
        self._origin = origin
        self._watch = watch
        self._groups: dict[tuple[tuple[int, ...], str], Any] = {}
        self._under_way: deque[tuple[Any, Callable[[], None]]] = deque()

    def run(
        self,
        shared: Iterable[Shared],
        read: dict[Placement, torch.Tensor],
        take: Callable[[Placement, torch.Tensor], None],
    ) -> None:
        """Give what is in `read`, and hand what comes to `take`.

        Raises:
            RankError: another rank has failed, or a connection to it.
            BudgetError: the memory of a tensor is refused.
        """
        try:
            for batch in _batches(shared):
                self._give(batch, read, take)
            while self._under_way:
                self._wait()
        finally:
            self._end()

    def _give(
        self, batch: list[Shared], read: dict[Placement, torch.Tensor], take: Callable[[Placement, torch.Tensor], None]
    ) -> None:
        mine = batch[0].reader == self._rank
        tensors = [read.pop(one.placement) if mine else allocate(one.placement) for one in batch]
        flat = [tensor.view(-1).view(torch.uint8) for tensor in tensors]

        def taken() -> None:
            for one, tensor in zip(batch, tensors, strict=True):
                take(one.placement, tensor)

        if len(batch) == 1:
            chunks = flat[0].split(CHUNK)
            for i, chunk in enumerate(chunks):
                last = i == len(chunks) - 1
                self._send(chunk, batch[0], taken if last and not mine else _nothing)
            return
        packed = torch.cat(flat) if mine else torch.empty(sum(map(len, flat)), dtype=torch.uint8, device=flat[0].device)

        def unpack() -> None:
            for part, into in zip(packed.split([len(one) for one in flat]), flat, strict=True):
                into.copy_(part)
            taken()

        self._send(packed, batch[0], _nothing if mine else unpack)

    def _send(self, data: torch.Tensor, like: Shared, done: Callable[[], None]) -> None:
        import torch.distributed as dist

        while len(self._under_way) >= _AHEAD:
            self._wait()
        group = self._group(like.ranks, data.device.type)
        try:
            work = dist.broadcast(data, like.reader, group=group, async_op=True)
        except RuntimeError as error:
            raise self._lost(error) from error
        self._under_way.append((work, done))

    def _wait(self) -> None:
        """Until the first of those under way is there, unless a rank is gone."""
        work, done = self._under_way[0]
        pause = _SHORTEST_PAUSE
        while not work.is_completed():
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            if pause == _LONGEST_PAUSE:
                self._watch()
        try:
            work.wait()
        except RuntimeError as error:
            raise self._lost(error) from error
        self._under_way.popleft()
        done()

    def _lost(self, error: Exception) -> LowmemError:
        # Whoever failed says so himself, and that is the better message.
        until = time.monotonic() + 2.0
        while time.monotonic() < until:
            self._watch()
            time.sleep(_LONGEST_PAUSE)
        return RankError(
            f"{self._origin}: a tensor could not be given to other ranks, or taken from one: {error}; read='each' lets "
            "every rank read what it holds"
        )

    def _group(self, ranks: tuple[int, ...], device: str) -> Any:
        import torch.distributed as dist

        key = ranks, device
        if key not in self._groups:
            # gloo for what is in host memory, which others do not carry; for devices what the program runs with.
            backend = "gloo" if device == "cpu" else None
            self._groups[key] = dist.new_group(list(ranks), backend=backend, use_local_synchronization=True)
        return self._groups[key]

    def _end(self) -> None:
        """Close the connections: who still waits for this rank, because it failed, waits no more."""
        import torch.distributed as dist

        for group in self._groups.values():
            with suppress(Exception):
                dist.destroy_process_group(group)
        self._groups.clear()


def _nothing() -> None:
    """Whoever has read a tensor has it."""


def _batches(shared: Iterable[Shared]) -> Iterator[list[Shared]]:
    """Small neighbours of one reader, for the same ranks and on the same device, together."""
    batches: dict[tuple[int, tuple[int, ...], str], list[Shared]] = {}
    sizes: dict[tuple[int, tuple[int, ...], str], int] = {}
    for one in shared:
        nbytes = one.placement.nbytes
        if nbytes >= _SMALL:
            yield [one]
            continue
        key = one.reader, one.ranks, one.placement.device
        if sizes.get(key, 0) + nbytes > CHUNK:
            yield batches.pop(key)
            sizes[key] = 0
        batches.setdefault(key, []).append(one)
        sizes[key] = sizes.get(key, 0) + nbytes
    yield from batches.values()
