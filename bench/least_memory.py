"""The smallest kernel memory limit under which a load still passes, by bisection.

Each try is a fork of a process that has imported everything, put into a memory cgroup of its own: the group pays for
what the load adds, for the interpreter's pages that it writes to, and for the kernel's page tables. What the imports
hold already stays with the parent. The figure is the group's limit, so it is comparable between loaders.
"""

from __future__ import annotations

import os
import shutil
import signal
from typing import TYPE_CHECKING, Any

from bench.kernel_limits import enter
from bench.phases import Phases
from lowmem.sizes import MIB

if TYPE_CHECKING:
    from bench.loaders import Job, Loader

_SECONDS = 60
_PRECISION = 0.05
_SMALLEST = 16 * MIB


def find_least(loader: Loader, job: Job, kind: str, first: int) -> dict[str, Any]:
    """Bisect between a limit that fails and one that passes.

    Args:
        loader: who loads.
        job: what.
        kind: `cgroup v1` or `cgroup v2`.
        first: bytes, a guess.
    """
    tries: list[tuple[int, bool]] = []

    def passes(size: int) -> bool:
        tries.append((size, _try(loader, job, kind, size)))
        return tries[-1][1]

    low, high = _SMALLEST, max(first, 2 * _SMALLEST)
    while not passes(high):
        low, high = high, 2 * high
        if high > 32 * max(first, 64 * MIB):
            return {"status": "cannot", "reason": f"it fails under {low} bytes", "tries": tries}
    while high - low > max(_PRECISION * high, 4 * MIB):
        middle = (low + high) // 2
        if passes(middle):
            high = middle
        else:
            low = middle
    return {"status": "ok", "least": high, "tries": tries}


def _try(loader: Loader, job: Job, kind: str, size: int) -> bool:
    """Whether one load passes under a limit of `size` bytes."""
    shutil.rmtree(job.offload, ignore_errors=True)
    job.offload.mkdir(parents=True)
    child = os.fork()
    if not child:
        code = 1
        try:
            os.environ["LOWMEM_BENCH_LIMIT"] = kind
            # Forks again: what comes back from it is inside the group.
            enter(size)
            # The kernel ends a load that only thrashes; its parent then removes the group.
            signal.alarm(_SECONDS)
            loader.load(job, Phases())
            code = 0
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    shutil.rmtree(job.offload, ignore_errors=True)
    return status == 0
