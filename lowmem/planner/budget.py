"""Host memory: what a load may use, how much of it the readers' buffers get, and the refusal."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import BudgetError
from ..sizes import KIB, MIB, format_size
from .moves import ALIGNMENT, BLOCK, Placement
from .records import IO, Staging, may_read_directly

MIN_STAGING = MIB
MAX_STAGING = 64 * MIB
MAX_WORKERS = 8
# While they wait for a disk. Measured on two processors: eight direct readers were faster than four, four than two.
COLD_WORKERS = 8
# As fast with so many of them, and half the memory.
_COLD_BUFFER = 2 * MIB + BLOCK + 2 * ALIGNMENT
# Less is there before the threads are.
_WORTH_MORE_READERS = 64 * MIB
# A buffer below this spends more time on the calls than on the bytes.
_MIN_BUFFER = 512 * KIB
# A buffer that small tensors share.
_RUN = MIB
# Direct reads gain nothing from a larger one, and little from one below the least.
_BOUNCE = MIB
_LEAST_BOUNCE = 64 * KIB
# What glibc gives a thread when RLIMIT_STACK says nothing.
_DEFAULT_STACK = 2 * MIB


def workers_here() -> int:
    """Reader threads for what is in memory: the processors that this process may use, at most eight."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(MAX_WORKERS, count))


@dataclass(frozen=True)
class Need:
    """What the readers of a plan could use.

    Attributes:
        each: bytes of one reader's buffer at full size; 0 when every byte is read straight into its place.
        direct: whether files may be read past the page cache, which takes a buffer more where there is room.
        workers: readers.
        in_place: see `Reading`.
    """

    each: int
    direct: bool
    workers: int
    in_place: bool = False


def fit_staging(room: int, wanted: int | None, need: Need) -> Staging:
    """The largest staging that fits.

    Args:
        room: bytes that the limit leaves for buffers.
        wanted: the user's bound in bytes, or None; less is taken when less fits.
        need: what would be best.
    """
    workers = need.workers
    most = MAX_STAGING if wanted is None else wanted
    total = max(0, min(room, most))
    if need.each:
        total = max(MIN_STAGING, total)
        workers = max(1, min(workers, total // min(need.each, _MIN_BUFFER)))
    elif need.direct:
        # Fewer readers rather than none that can read directly.
        workers = max(1, min(workers, total // _LEAST_BOUNCE))
    share = total // workers
    # Set aside first: a cast takes all that it is given, and direct reads would be lost to it.
    aside = min(_BOUNCE, share // 8) if need.direct and share // 8 >= _LEAST_BOUNCE else 0
    each = min(need.each, share - aside)
    each -= each % ALIGNMENT
    bounce = min(_BOUNCE, share - each) // BLOCK * BLOCK if need.direct else 0
    return Staging(workers, each, bounce if bounce >= _LEAST_BOUNCE else 0)


def needs_of(moved: Sequence[Placement], io: IO, cached: Callable[[Path], float], *, free_address_space: bool) -> Need:
    """What is needed for what will be moved.

    While most of it is not in the page cache, readers wait for the disk, which is at its best with several requests.

    Args:
        moved: the placements.
        io: how the user wants files read.
        cached: how much of a file is in the page cache, 0 to 1.
        free_address_space: whether no rlimit counts the stacks of more threads, or memory that is never touched.
    """
    moved = [p for p in moved if p.is_fed]
    sizes = [size + 2 * ALIGNMENT for p in moved if (size := p.buffer_size())]
    # Small ones share a buffer, so that their neighbours are read with them.
    each = max(max(sizes) + BLOCK, min(_RUN, sum(sizes))) if sizes else 0
    files: dict[Path, int] = {}
    for placement in moved:
        for link in placement.links:
            files[link.entry.file] = files.get(link.entry.file, 0) + link.entry.nbytes
    total = sum(files.values())
    direct = any(may_read_directly(io, file) for file in files)
    workers = workers_here()
    cold = free_address_space and 2 * sum(nbytes * cached(file) for file, nbytes in files.items()) < total
    if cold and total >= _WORTH_MORE_READERS and workers < COLD_WORKERS:
        workers, each = COLD_WORKERS, min(each, _COLD_BUFFER)
    return Need(each, direct, workers, direct and free_address_space and (cold or io == "direct"))


def thread_stacks(count: int) -> int:
    """Bytes of address space that the stacks of `count` threads take, touched or not; 0 where there are no rlimits."""
    if sys.platform == "win32":
        return 0
    import resource

    soft = resource.getrlimit(resource.RLIMIT_STACK)[0]
    return count * (threading.stack_size() or (_DEFAULT_STACK if soft == resource.RLIM_INFINITY else soft))


def refuse(required: int, limit: int, bound_by: str, remedies: list[str], what: str = "load") -> None:
    """Raise the refusal of a load, or of `what` else needs the memory.

    Raises:
        BudgetError: always.
    """
    advice = "; or ".join(remedies) if remedies else "free memory on this machine, or raise its limit"
    raise BudgetError(
        f"the {what} needs at least {format_size(required)} of host memory ({required} bytes), "
        f"and {bound_by} allows {format_size(limit)}. What helps: {advice}",
        required=required,
        limit=limit,
    )
