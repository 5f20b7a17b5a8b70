"""Tensors that one rank has read, given to the others of its host that hold them: chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping

import torch

from ..planner import Placement
from ..planner.moves import CHUNK
from ..planner.ranks import SHARED_TOGETHER
from ..planner.records import Shared
from ..ranks.carrier import Carrier
from .destinations import allocate

# Smaller tensors go together: a message costs as much as some hundred KiB of one.
_SMALL = SHARED_TOGETHER // 4

Take = Callable[[Placement, torch.Tensor], None]


def share(
    shared: Iterable[Shared], read: MutableMapping[Placement, torch.Tensor], take: Take, carrier: Carrier
) -> None:
    """Give on what this rank has read, and take what others have.

    All ranks of a host go through the same tensors in the same order. Bytes go as they are, whatever they are of: large
    tensors from their own memory into that of the others, small ones by way of a buffer of at most a chunk.

    Args:
        shared: all that this rank holds of what is read once.
        read: what it has read, and tensors that are there to be filled; taken out.
        take: called with what others have read.
        carrier: brings the bytes.

    Raises:
        RankError: another rank has failed, or is gone.
        BudgetError: the memory of a tensor is refused.
    """
    rank = carrier.rank
    for batch in _batches(shared):
        mine = batch[0].reader == rank
        tensors = [read.pop(one.placement) if one.placement in read else allocate(one.placement) for one in batch]
        done = _nothing if mine else _taker(batch, tensors, take)
        if len(batch) == 1:
            chunks = torch.split(_bytes_of(tensors[0]), CHUNK)
            for i, chunk in enumerate(chunks):
                carrier.put(chunk, batch[0].reader, batch[0].ranks, done if i == len(chunks) - 1 else _nothing)
        else:
            _share_small(batch, tensors, mine, done, carrier)
    carrier.finish()


def _share_small(
    batch: list[Shared], tensors: list[torch.Tensor], mine: bool, done: Callable[[], None], carrier: Carrier
) -> None:
    flat = [_bytes_of(tensor) for tensor in tensors]
    sizes = [part.numel() for part in flat]
    packed = torch.empty(sum(sizes), dtype=torch.uint8, device=flat[0].device)
    if mine:
        torch.cat(flat, out=packed)

    def unpack() -> None:
        for part, into in zip(torch.split(packed, sizes), flat, strict=True):
            into.copy_(part)
        done()

    carrier.put(packed, batch[0].reader, batch[0].ranks, _nothing if mine else unpack)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(-1).view(torch.uint8)


def _taker(batch: list[Shared], tensors: list[torch.Tensor], take: Take) -> Callable[[], None]:
    def taken() -> None:
        for one, tensor in zip(batch, tensors, strict=True):
            take(one.placement, tensor)

    return taken


def _nothing() -> None:
    """Whoever has read a tensor has it."""


def _batches(shared: Iterable[Shared]) -> Iterator[list[Shared]]:
    """Small tensors of one reader, for the same ranks and on the same device, together.

    Which go together, and when, depends on nothing but tensors that all of these ranks have.
    """
    batches: dict[tuple[int, tuple[int, ...], str], list[Shared]] = {}
    sizes: dict[tuple[int, tuple[int, ...], str], int] = {}
    for one in shared:
        nbytes = one.placement.nbytes
        if nbytes >= _SMALL:
            yield [one]
            continue
        key = one.reader, one.ranks, one.placement.device
        if sizes.get(key, 0) + nbytes > SHARED_TOGETHER:
            yield batches.pop(key)
            sizes[key] = 0
        batches.setdefault(key, []).append(one)
        sizes[key] = sizes.get(key, 0) + nbytes
    yield from batches.values()
