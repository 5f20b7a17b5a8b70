"""What running the model takes: memory for weights that do not stay where they compute."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ..checkpoint import TensorEntry
from ..dtypes import itemsize
from ..errors import BudgetError
from ..mapping import Link, whole
from ..modeling.targets import Uses
from ..sizes import MIB, format_size
from .moves import Placement, is_one

Dispatch = Literal["lowmem", "accelerate"]

# Rows of a layer that does not fit are worked out in blocks of at least these bytes.
LEAST_BLOCK = 2 * MIB
# Buffers where nobody said how much memory there may be: enough to be ahead of the layer that computes.
_ENOUGH = 256 * MIB


# Pieces of pinned host memory: one is filled by each of two threads, and one is copied from.
PIECES = 3
# A copy of this size takes as long as the bus needs for its bytes; of a smaller one, what begins it takes time too.
_LARGEST_PIECE = 16 * MIB
_LEAST_PIECE = MIB


@dataclass(frozen=True, slots=True)
class Running:
    """Memory of the forward, in bytes, for weights that are on disk, or wait in host memory for a GPU.

    Attributes:
        dispatch: who brings weights to where they compute.
        mapped: those that are used where they lie: file pages.
        made: those that are made at use: cast, put together from parts, turned from int8 into floats, or brought to
            another device.
        largest: the most that must be in a buffer at once: one such weight, one of its experts, or a block of rows.
        buffers: bound on all buffers for them; what is more than `largest` holds what comes next, and what stays. Where
            an accelerator computes, they are memory of that.
        pages: bound on the file pages of `mapped` that are kept between two uses; more than `mapped` when all are.
        piece: of host memory for copies to an accelerator; there are `PIECES` of them.
        pinned: all host memory for such copies: the pieces, and another for what comes only as a whole.
    """

    dispatch: Dispatch = "lowmem"
    mapped: int = 0
    made: int = 0
    largest: int = 0
    buffers: int = 0
    pages: int = 0
    piece: int = 0
    pinned: int = 0

    def to_dict(self) -> dict[str, int | str]:
        """As plain values."""
        return {name: getattr(self, name) for name in self.__slots__}


NOT_OFFLOADED = Running()


def lies_ready(placement: Placement) -> bool:
    """Whether a weight on disk can be used on the CPU where it lies: a parameter that is pages of the file."""
    if placement.device != "disk" or not placement.nbytes:
        return False
    if placement.residency == "write":
        return True
    links = placement.links
    if not is_one(links, placement.shape, placement.dtype) or links[0].scales is not None:
        return False
    # torch reads a tensor only at a multiple of its element size.
    return links[0].entry.offset % itemsize(placement.dtype) == 0


def is_away(placement: Placement, main_device: str) -> bool:
    """Whether a weight is elsewhere than where it computes."""
    return placement.device == "disk" or (placement.device == "cpu" and main_device != "cpu")


def is_made(placement: Placement, main_device: str) -> bool:
    """Whether a weight that is elsewhere must be made, or copied, whenever it is used."""
    if not is_away(placement, main_device) or not placement.nbytes:
        return False
    return main_device != "cpu" or not lies_ready(placement)


def in_one_piece(placement: Placement) -> Placement:
    """The same weight, fed from a tensor of its shape and dtype, wherever that is."""
    entry = TensorEntry(placement.target, placement.dtype, placement.shape, Path(), 0, placement.nbytes)
    return replace(placement, links=(Link(entry, placement.target, whole(placement.shape)),))


def in_use(placement: Placement) -> Placement:
    """Fed as it is when the model runs: what was copied into memory, or written, lies there in one piece."""
    lies = placement.device == "cpu" or placement.residency == "write"
    return in_one_piece(placement) if lies and placement.nbytes else placement


def parts_of(placement: Placement, uses: Uses) -> int:
    """How many parts of a weight can be brought each for itself: experts, along its first dimension; 1 for none."""
    shape = placement.shape
    if len(shape) != 3 or shape[0] < 2 or not uses.in_parts.issuperset(placement.names):
        return 1
    step = placement.nbytes // itemsize(placement.dtype) // shape[0]
    for link in placement.links:
        region = link.region
        last = region.offset + sum((n - 1) * stride for n, stride in zip(region.shape, region.strides, strict=True))
        inside = region.offset // step == last // step
        if not inside and not is_one(placement.links, shape):
            return 1
        if link.scales is not None:
            return 1
    return shape[0]


def comes_by_rows(placement: Placement) -> bool:
    """Whether some rows of a matrix can be made without the others."""
    if len(placement.shape) != 2:
        return False
    row = placement.shape[1]
    for link in placement.links:
        region = link.region
        if not region.dense or link.entry.strides is not None:
            return False
        if link.scales is not None and (region.offset % row or region.count != link.scales.shape[0] * row):
            return False
    return bool(placement.links)


def needed_at_once(
    placements: Sequence[Placement], main_device: str, dispatch: Dispatch, uses_of: Callable[[], Uses]
) -> tuple[int, str]:
    """Bytes of buffers without which the model cannot run, and the largest weight that needs them; 0 for no buffers.

    Args:
        placements: all of the load.
        main_device: where weights that are elsewhere compute.
        dispatch: who brings them there.
        uses_of: says how the model uses its weights.
    """
    made = [p for p in placements if is_made(p, main_device)] if dispatch == "lowmem" else []
    if not made:
        return 0, ""
    at_once: dict[str, int] = defaultdict(int)
    uses = uses_of()
    for placement in made:
        # What one module has is used at once, or nearly so.
        at_once[placement.target.rpartition(".")[0]] += _least(placement, uses)
    worst = max(at_once, key=lambda module: at_once[module])
    inside = [p for p in made if p.target.rpartition(".")[0] == worst]
    return at_once[worst], max(inside, key=lambda p: p.nbytes).target


def plan_running(
    placements: Sequence[Placement], main_device: str, dispatch: Dispatch, largest: int, room: int, said: bool
) -> Running:
    """The memory of the forward.

    Args:
        placements: all of the load.
        main_device: where weights that are elsewhere compute.
        dispatch: who brings them there.
        largest: bytes that `needed_at_once` says; they have their place where `room`, a bound of what stays, is less.
        room: bytes that the limit leaves beside what stays in memory.
        said: whether the user stated the limit; otherwise no more is taken than helps to be ahead.
    """
    if dispatch == "accelerate":
        return Running(dispatch)
    mapped = sum(p.nbytes for p in placements if main_device == "cpu" and lies_ready(p))
    made = sum(p.nbytes for p in placements if is_made(p, main_device))
    wanted = made if said else min(made, max(2 * largest, _ENOUGH))
    buffers = max(largest, min(wanted, room))
    return Running(dispatch, mapped, made, largest, buffers, max(0, room - buffers))


def _least(placement: Placement, uses: Uses) -> int:
    """Bytes of buffer without which it cannot be used."""
    size = placement.nbytes // parts_of(placement, uses)
    if comes_by_rows(placement) and uses.by_rows.issuperset(placement.names):
        return min(size, max(LEAST_BLOCK, 64 * placement.nbytes // max(1, placement.shape[0])))
    return size


def plan_pinned(placements: Sequence[Placement], main_device: str, host: int, uses: Uses) -> tuple[int, int]:
    """Bytes of a piece of host memory for copies to an accelerator, and of all of it.

    Args:
        placements: of the load, `in_use`; some of them are brought to the accelerator.
        main_device: it.
        host: bytes of host memory that its limit leaves beside what stays there.
        uses: how the model uses its weights.

    Raises:
        BudgetError: not even small pieces fit.
    """
    made = [p for p in placements if is_made(p, main_device)]
    size = max(_taken(p.nbytes) for p in made)
    piece = min(_LARGEST_PIECE, max(_LEAST_PIECE, size))
    while True:
        largest = max((_at_once(p, piece, uses) for p in made), key=lambda pair: pair[0])
        pinned = PIECES * piece + _taken(largest[0])
        if pinned <= host:
            return piece, pinned
        if piece <= _LEAST_PIECE:
            whole_one = f", {largest[1]!r} as a whole" if largest[0] else ""
            raise BudgetError(
                f"running the model needs {format_size(pinned)} ({pinned} bytes) of host memory through which weights "
                f"go to the device{whole_one}, and what stays in memory leaves "
                f"{format_size(max(0, host))}; raise ram (--ram), or keep fewer weights in host memory (device_map=)",
                required=pinned,
                limit=max(0, host),
            )
        piece //= 2


def _at_once(placement: Placement, piece: int, uses: Uses) -> tuple[int, str]:
    """Bytes that do not go through pieces, because they come only as a whole."""
    parts = parts_of(placement, uses)
    size = placement.nbytes // parts
    rows = placement.shape[0] if comes_by_rows(placement) else 1
    if parts > 1 and is_one(placement.links, placement.shape):
        rows = placement.shape[1]
    return (size if size > piece and size // max(1, rows) > piece else 0), placement.target


def _taken(nbytes: int) -> int:
    """Bytes that torch takes for so many of pinned memory: a power of two (`CachingHostAllocatorImpl::allocate`)."""
    return 1 << (nbytes - 1).bit_length() if nbytes else 0
