"""The memory of a process, or of a process and its descendants, at one moment."""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from ._sampler import parse_statm
from .errors import MeasureError

_LINE = 128  # bytes; seven numbers of pages are shorter
# Looking for children costs more than looking at memory: it may take this share of the time.
_SEARCH_SHARE = 0.1


def has_statm() -> bool:
    """Whether `/proc` says what a process has in memory: on Linux, where it is mounted."""
    try:
        return Path("/proc/self/statm").exists()
    except OSError:
        return False


def look(pid: int | None = None) -> tuple[int, int]:
    """(anonymous, rss) bytes of process `pid`, or of this one.

    Raises:
        MeasureError: there is no such process, or it cannot be looked at.
    """
    if not has_statm():
        return _look_with_psutil(pid)
    try:
        return parse_statm(Path(f"/proc/{'self' if pid is None else pid}/statm").read_bytes())
    except (FileNotFoundError, ProcessLookupError) as error:
        raise MeasureError(f"process {pid}: there is none; give the id of a running process") from error
    except OSError as error:
        raise MeasureError(
            f"/proc/{'self' if pid is None else pid}/statm: the memory of a process cannot be read: "
            f"{error.strerror or error}; where too many files are open, close some, or raise the limit (ulimit -n)"
        ) from error


def high_water() -> int:
    """Highest resident size this process ever had (`VmHWM`), in bytes; 0 where the kernel does not say."""
    try:
        status = Path("/proc/self/status").read_bytes()
    except OSError:
        return 0
    _, found, after = status.partition(b"\nVmHWM:")
    return int(after.split(None, 1)[0]) * 1024 if found else 0


class Tree(Protocol):
    """A process and its descendants."""

    def look(self) -> tuple[int, int]:
        """(anonymous, rss) bytes, added up over those that live; zeros when none does."""

    def close(self) -> None:
        """Let go of the files that were kept open."""


def process_tree(pid: int) -> Tree:
    """The tree below `pid`, read in the best way that this system has."""
    return _ProcTree(pid) if has_statm() else _PortableTree(pid)


class _ProcTree:
    """Linux. A process once found stays in the tree, also when its parent ends and it is given another."""

    def __init__(self, pid: int) -> None:
        self._members: dict[int, tuple[int, int]] = {}  # pid → (open statm, parent)
        self._search_at = 0.0
        self._add(pid, 0)

    def look(self) -> tuple[int, int]:
        now = time.monotonic()
        if now >= self._search_at:
            self._search()
            self._search_at = now + (time.monotonic() - now) / _SEARCH_SHARE
        # Between vfork and exec a child shows its parent's memory as its own. Counted twice, that would be a peak.
        # Asked before statm is read: what execs in between then shows its own.
        own = [pid for pid, (_, parent) in self._members.items() if not parent or not _share_memory(pid, parent)]
        sizes = [parse_statm(line) for pid in own if (line := self._line(pid)) is not None]
        return sum(anonymous for anonymous, _ in sizes), sum(rss for _, rss in sizes)

    def close(self) -> None:
        for statm, _ in self._members.values():
            os.close(statm)
        self._members.clear()

    def _line(self, pid: int) -> bytes | None:
        """What statm says of a member, which is forgotten when it has ended."""
        statm, _ = self._members[pid]
        try:
            return os.pread(statm, _LINE, 0)
        except ProcessLookupError:
            os.close(statm)
            del self._members[pid]
            return None

    def _search(self) -> None:
        unasked = list(self._members)
        while unasked:
            parent = unasked.pop()
            for child in _children(parent):
                if child not in self._members and self._add(child, parent):
                    unasked.append(child)

    def _add(self, pid: int, parent: int) -> bool:
        try:
            self._members[pid] = os.open(f"/proc/{pid}/statm", os.O_RDONLY), parent
        except (FileNotFoundError, ProcessLookupError):
            return False
        return True


@functools.cache
def _kcmp() -> Callable[[int, int], int] | None:
    """kcmp(2) for KCMP_VM: 0 when two processes run in one address space. None where the call is unknown."""
    number = {"x86_64": 312, "aarch64": 272}.get(platform.machine())
    if number is None:
        return None
    import ctypes

    syscall = ctypes.CDLL(None, use_errno=True).syscall
    return lambda one, other: int(syscall(number, one, other, 1, 0, 0))


def _share_memory(pid: int, parent: int) -> bool:
    kcmp = _kcmp()
    return kcmp is not None and kcmp(pid, parent) == 0


class _PortableTree:
    """Other systems, with psutil."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def look(self) -> tuple[int, int]:
        sizes = []
        for pid in (self._pid, *_children_with_psutil(self._pid)):
            try:
                sizes.append(_look_with_psutil(pid))
            except MeasureError:
                continue  # ended in between
        return sum(anonymous for anonymous, _ in sizes), sum(rss for _, rss in sizes)

    def close(self) -> None:
        pass


def _children(pid: int) -> list[int]:
    """Children of every thread of `pid`; of deeper descendants too where the kernel keeps no such list."""
    found: list[int] = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_bytes().split())
    except (FileNotFoundError, ProcessLookupError):
        # Either the process has ended, or the kernel was built without CONFIG_PROC_CHILDREN.
        if not Path("/proc/thread-self/children").exists():
            return _children_with_psutil(pid)
    return found


def _children_with_psutil(pid: int) -> list[int]:
    import psutil

    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return []


def _look_with_psutil(pid: int | None) -> tuple[int, int]:
    import psutil

    try:
        process = psutil.Process(pid)
        rss = int(process.memory_info().rss)
        try:
            return int(getattr(process.memory_full_info(), "uss", rss)), rss
        except psutil.AccessDenied:
            return rss, rss
    except psutil.Error as error:
        raise MeasureError(f"process {pid}: its memory cannot be read ({error})") from error
