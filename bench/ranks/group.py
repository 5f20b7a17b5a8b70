"""A memory cgroup for several processes, which `bench.kernel_limits` makes for one."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def group(kind: str, size: int) -> Iterator[Path]:
    """The folder of a group that may use `size` bytes; removed when all of its processes have ended.

    Args:
        kind: `cgroup v1` or `cgroup v2`.
        size: bytes of all processes together.
    """
    v1 = kind == "cgroup v1"
    folder = Path("/sys/fs/cgroup/memory" if v1 else "/sys/fs/cgroup") / f"lowmem-ranks-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(size), encoding="utf-8")
        (folder / ("memory.swappiness" if v1 else "memory.swap.max")).write_text("0", encoding="utf-8")
        yield folder
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    """A group is busy for a moment after its last process."""
    for _ in range(500):
        try:
            folder.rmdir()
            return
        except OSError:
            time.sleep(0.01)
    print(f"{folder}: cannot be removed", file=sys.stderr)
