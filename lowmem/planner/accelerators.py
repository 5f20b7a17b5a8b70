"""What a load takes to fill accelerators: pinned buffers on the host, and chunks on the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..dtypes import itemsize
from ..limits import shares_memory
from ..mapping import Link
from ..sizes import MIB
from .moves import Placement, has_whole_rows
from .records import Staging

# Of each reader: one is filled, one is copied from, and two more wait while the other readers' are copied.
MOST_SLOTS = 4
# Pinned memory of all readers.
MOST_PINNED = 256 * MIB
# Where the device computes in the host's own memory. Its copies still go on beside the reads, so there are two slots,
# but each byte of them is taken from the weights.
MOST_SHARED = 16 * MIB
_SHARED_SLOTS = 2


def is_streamed(device: str) -> bool:
    """Whether a device has streams that the engine uses; others take each chunk when they are given it."""
    return device.partition(":")[0] == "cuda"


def is_cast_before(source: str, final: str) -> bool:
    """Whether elements are cast by the reader and not on the device: what becomes smaller is fewer bytes on the bus.

    What does not is cast there, where memory is faster than here.
    """
    return itemsize(source) > itemsize(final)


def slots_for(moved: Sequence[Placement], workers: int, each: int) -> tuple[int, int]:
    """How many buffers of `each` bytes a reader may use, and how many bytes all readers may; (1, 0) for one as ever."""
    there = [p for p in moved if is_streamed(p.device) and p.residency == "copy"]
    if not there or not each:
        return 1, 0
    shared = all(map(shares_memory, {p.device for p in there}))
    most, limit = (_SHARED_SLOTS, MOST_SHARED) if shared else (MOST_SLOTS, MOST_PINNED)
    # No more than is ever filled.
    total = sum(p.nbytes for p in there)
    return max(1, min(most, -(-total // (workers * each)))), limit


def chunks_on(device: str, placements: Iterable[Placement], staging: Staging) -> int:
    """Bytes of a device on which what is not yet in its place lies: a chunk for the stream of each reader."""
    there = (p for p in placements if p.device == device and p.residency == "copy")
    return staging.workers * staging.each if any(map(_passes, there)) else 0


def _passes(placement: Placement) -> bool:
    """Whether any of its bytes cannot be copied right into their place."""
    if not is_streamed(placement.device):
        return bool(placement.links)
    return not all(_is_straight(placement, link) for link in placement.links)


def _is_straight(placement: Placement, link: Link) -> bool:
    if link.entry.strides is not None or not link.region.dense:
        return False
    row = placement.row_of(link)
    if row:
        # Worked out by the reader, some rows at a time.
        return has_whole_rows(link, row)
    return link.entry.dtype == placement.dtype or is_cast_before(link.entry.dtype, placement.dtype)
