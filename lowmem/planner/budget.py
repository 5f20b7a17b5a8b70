"""Host memory: what a load may use, how much of it the readers' buffers get, and the refusal."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import Checkpoint
from ..errors import BudgetError
from ..int8 import least_work, work_size
from ..sizes import KIB, MIB, format_size
from .accelerators import slots_for
from .moves import ALIGNMENT, BLOCK, MOST_ROWS, Placement
from .records import IO, OffloadPlan, Staging, may_read_directly

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
    """Reader threads for what is in memory: the processors that this process may use, at most eight.

    Those of a host are divided among the processes that torchrun has started there.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    beside = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, min(MAX_WORKERS, count // max(1, int(beside) if beside.isdecimal() else 1)))


@dataclass(frozen=True)
class Need:
    """What the readers of a plan could use.

    Attributes:
        each: bytes of one reader's buffer at full size; 0 when every byte is read straight into its place.
        direct: whether files may be read past the page cache, which takes a buffer more where there is room.
        workers: readers.
        in_place: see `Reading`.
        work: bytes that the arithmetic of int8 takes in each reader.
        least: bytes of a reader's buffer without which it cannot work, because a row of int8 must come whole.
        least_work: bytes for its arithmetic without which it cannot work.
        slots: buffers of that size that one reader could use in turn.
        most: bytes of all buffers, unless the user bounds them.
    """

    each: int
    direct: bool
    workers: int
    in_place: bool = False
    work: int = 0
    least: int = 0
    least_work: int = 0
    slots: int = 1
    most: int = MAX_STAGING


def fit_staging(room: int, wanted: int | None, need: Need) -> Staging:
    """The largest staging that fits.

    Args:
        room: bytes that the limit leaves for buffers.
        wanted: the user's bound in bytes, or None; less is taken when less fits.
        need: what would be best.

    Raises:
        BudgetError: the user's bound is less than a row of int8 needs.
    """
    workers = need.workers
    most = need.most if wanted is None else wanted
    fewest = need.least + need.least_work
    if wanted is not None and fewest > wanted:
        raise BudgetError(
            f"staging allows {format_size(wanted)}, and a row of int8 needs {format_size(fewest)} ({fewest} bytes) of "
            "buffers to come whole; give staging as much (--staging), or leave the widest layers out by skip_modules= "
            "(--skip-modules)",
            required=fewest,
            limit=wanted,
        )
    total = max(0, min(room, most))
    if need.each:
        total = max(MIN_STAGING, total, fewest)
        enough = max(fewest, min(need.each, _MIN_BUFFER) + need.least_work)
        workers = max(1, min(workers, total // enough))
    elif need.direct:
        # Fewer readers rather than none that can read directly.
        workers = max(1, min(workers, total // _LEAST_BOUNCE))
    share = total // workers
    # Half of it at most, so that reads are not too small.
    work = max(need.least_work, min(need.work, (share - need.least) // 2))
    work -= work % ALIGNMENT if work > need.least_work else 0
    share -= work
    # Set aside first: a cast takes all that it is given, and direct reads would be lost to it.
    aside = min(_BOUNCE, share // 8) if need.direct and share // 8 >= _LEAST_BOUNCE else 0
    slots = _slots(share - aside, need)
    # Each reader has as much on an accelerator, which is not what `wanted` bounds.
    fits = (share - aside) // slots if slots == 1 else min((share - aside) // slots, MAX_STAGING // workers)
    each = max(need.least, min(need.each, fits) // ALIGNMENT * ALIGNMENT)
    bounce = min(_BOUNCE, max(0, share - slots * each)) // BLOCK * BLOCK if need.direct else 0
    return Staging(workers, each, bounce if bounce >= _LEAST_BOUNCE else 0, work, slots)


def _slots(share: int, need: Need) -> int:
    """How many buffers a reader has: rather two smaller ones than one, and more only of full size."""
    if need.slots == 1:
        return 1
    two = 2 if share >= 2 * max(need.least, min(need.each, _MIN_BUFFER)) else 1
    return min(need.slots, max(two, share // max(need.least, need.each)))


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
    rows = [row for p in moved for link in p.links if (row := p.row_of(link))]
    least = max((p.least_buffer() for p in moved), default=0) if rows else 0
    least += -least % ALIGNMENT
    files: dict[Path, int] = {}
    for placement in moved:
        for link in placement.links:
            files[link.entry.file] = files.get(link.entry.file, 0) + link.entry.nbytes
    total = sum(files.values())
    direct = any(may_read_directly(io, file) for file in files)
    workers = workers_here()
    cold = free_address_space and 2 * sum(nbytes * cached(file) for file, nbytes in files.items()) < total
    if cold and total >= _WORTH_MORE_READERS and workers < COLD_WORKERS:
        workers, each = COLD_WORKERS, max(least, min(each, _COLD_BUFFER))
    # And 4 bytes for each row of a move.
    measured = [p.shape[0] for p in moved if p.measures or p.is_measured]
    kept = 4 * max([MOST_ROWS, *measured])
    work, fewest = (work_size(max(rows)) + kept, least_work(max(rows)) + kept) if rows else (0, 0)
    in_place = direct and free_address_space and (cold or io == "direct")
    slots, most = slots_for(moved, workers, each)
    return Need(each, direct, workers, in_place, work, least, fewest, slots, most or MAX_STAGING)


def mapped_files(
    placements: Sequence[Placement], checkpoint: Checkpoint, offload: OffloadPlan | None, dispatch: str
) -> int:
    """Bytes of files that stay mapped when a load is done; one that is mapped for memory and for the disk counts twice.

    Args:
        placements: all of the load.
        checkpoint: what they come from.
        offload: the files that are written.
        dispatch: accelerate's hooks map nothing ahead of their use.
    """
    ways = [{p.links[0].entry.file for p in placements if p.residency == "map"}]
    if dispatch == "lowmem":
        links = [link for p in placements if p.residency == "refer" for link in p.links]
        ways.append({e.file for link in links for e in (link.entry, link.scales) if e is not None})
    size = sum(shard.size for files in ways for shard in checkpoint.shards if shard.file in files)
    written = dispatch == "lowmem" and any(p.residency == "write" for p in placements)
    return size + (offload.nbytes if offload is not None and written else 0)


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
