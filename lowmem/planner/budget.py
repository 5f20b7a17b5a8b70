"""Host memory: what a load may use, how much of it the readers' buffers get, and the refusal."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence

from ..errors import BudgetError
from ..sizes import KIB, MIB, format_size
from .records import ALIGNMENT, BLOCK, IO, Placement, Staging, may_read_directly

MIN_STAGING = MIB
MAX_STAGING = 64 * MIB
MAX_WORKERS = 8
# A buffer below this spends more time on the calls than on the bytes.
_MIN_BUFFER = 512 * KIB
# A buffer that small tensors share.
_RUN = MIB
# Direct reads gain nothing from a larger one, and little from one below the least.
_BOUNCE = 2 * MIB
_LEAST_BOUNCE = 64 * KIB
# What glibc gives a thread when RLIMIT_STACK says nothing.
_DEFAULT_STACK = 2 * MIB


def workers_here() -> int:
    """Reader threads on this machine: the processors that this process may use, at most eight."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(MAX_WORKERS, count))


def fit_staging(room: int, wanted: int | None, need: int, direct: bool = False) -> Staging:
    """The largest staging that fits.

    Args:
        room: bytes that the limit leaves for buffers.
        wanted: the user's bound in bytes, or None; less is taken when less fits.
        need: bytes of one worker's buffer at full size; 0 when every byte is read straight into its place.
        direct: whether files may be read past the page cache, which takes a buffer more where there is room.
    """
    workers = workers_here()
    most = MAX_STAGING if wanted is None else wanted
    total = max(0, min(room, most))
    if need:
        total = max(MIN_STAGING, total)
        workers = max(1, min(workers, total // min(need, _MIN_BUFFER)))
    share = total // workers
    # Set aside first: a cast takes all that it is given, and direct reads would be lost to it.
    aside = min(_BOUNCE, share // 8) if direct and share // 8 >= _LEAST_BOUNCE else 0
    each = min(need, share - aside)
    each -= each % ALIGNMENT
    bounce = min(_BOUNCE, share - each) // BLOCK * BLOCK if direct else 0
    return Staging(workers, each, bounce if bounce >= _LEAST_BOUNCE else 0)


def buffers_for(moved: Sequence[Placement], io: IO) -> tuple[int, bool]:
    """(bytes of one reader's buffer at full size, whether direct reads may happen) for what will be moved."""
    moved = [p for p in moved if p.source_bytes]
    sizes = [p.buffer_size() + 2 * ALIGNMENT for p in moved if p.is_staged]
    # Small ones share a buffer, so that their neighbours are read with them.
    need = max(max(sizes) + BLOCK, min(_RUN, sum(sizes))) if sizes else 0
    files = {link.entry.file for p in moved for link in p.links}
    return need, any(may_read_directly(io, file) for file in files)


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
