"""The smallest kernel memory limit under which a load still passes, by bisection.

Each try is a fork of a process that has imported everything, put into a memory cgroup of its own: the group pays for
what the load adds, for the interpreter's pages that it writes to, and for the kernel's page tables. What the imports
hold already stays with the parent. The figure is the group's limit, so it is comparable between loaders.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
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
    found = bisect(lambda size: _try(loader, job, kind, size), first)
    if found is None:
        return {"status": "cannot", "reason": "it passes under no limit that was tried"}
    return {"status": "ok", "least": found}


def bisect(passes: Callable[[int], bool], first: int) -> int | None:
    """The smallest size that `passes`, to 5 % or 4 MiB; None when even many times `first` does not."""
    low, high = 0, max(first, 2 * _SMALLEST)
    most = 16 * max(first, 256 * MIB)
    while not passes(high):
        low, high = high, 2 * high
        if high > most:
            return None
    while high - low > max(_PRECISION * high, 4 * MIB) and high > _SMALLEST:
        middle = (low + high) // 2
        if passes(middle):
            high = middle
        else:
            low = middle
    return high


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
