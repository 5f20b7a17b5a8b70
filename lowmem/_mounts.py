"""Which file system a path lies on. Linux says so in `mountinfo`, proc(5); elsewhere it is not known."""

from __future__ import annotations

import functools
import re
from pathlib import Path

_MOUNTS = Path("/proc/self/mountinfo")
_MEMORY = frozenset({"tmpfs", "ramfs"})
# On disks of this machine. Of others it is not known where their bytes are, or whether they can be read directly.
_LOCAL = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "bcachefs", "overlay"})


def memory_file_system(path: Path, mounts: Path = _MOUNTS) -> str | None:
    """The type of the file system that `path` is or would be on when its files are memory (tmpfs, ramfs), else None."""
    kind = file_system(path, mounts)
    return kind if kind in _MEMORY else None


def is_on_local_disk(path: Path, mounts: Path = _MOUNTS) -> bool:
    """Whether `path` is known to lie on a disk of this machine: no network, no memory, nothing unknown."""
    return file_system(path, mounts) in _LOCAL


def file_system(path: Path, mounts: Path = _MOUNTS) -> str | None:
    """The type of the file system that `path` is on, or would be on: it need not exist yet. None if not known."""
    try:
        text = mounts.read_text(encoding="utf-8", errors="surrogateescape")
        path = path.resolve()
    except (OSError, RuntimeError, ValueError):
        return None  # no /proc, a loop of links, no current folder, or no path at all: whoever uses it will say so
    best, kind = Path(), None
    for point, name in _points(text):
        # The deepest mount, and of several at one point the last, is the one that is seen.
        if len(point.parts) >= len(best.parts) and path.is_relative_to(point):
            best, kind = point, name
    return kind


@functools.lru_cache(maxsize=4)
def _points(text: str) -> list[tuple[Path, str]]:
    """(mount point, type of file system) of each line; asked for every shard, and the same until something mounts."""
    points = []
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), before.split(" ")[4])
        points.append((Path(point), after.split(" ", 1)[0]))
    return points
