"""Make the kernel confirm a budget: a memory cgroup where one can be made, else RLIMIT_DATA. Tests use it too."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# Page tables, and the process that samples memory: a cgroup charges them, no measure of our process shows them.
_KERNEL_SHARE = 24 * 1024 * 1024


@dataclass(frozen=True)
class Limit:
    """A bound of `size` bytes, enforced by `kind`: `cgroup v1`, `cgroup v2` or `RLIMIT_DATA`."""

    kind: str
    size: int


def find_limit(anonymous: int, interpreter: int, mapped: int = 0) -> Limit:
    """The strictest limit that this machine offers for a load that adds `anonymous` bytes.

    Both get what the `interpreter` holds already (bytes) on top: a cgroup is entered by a fork, and is charged for
    each page of it that is written. RLIMIT_DATA counts private writable mappings too, touched or not: the files that
    a load maps, the stacks of threads.
    """
    kind = cgroup_kind()
    if kind is not None:
        return Limit(kind, anonymous + interpreter + _KERNEL_SHARE)
    return Limit("RLIMIT_DATA", anonymous + interpreter + mapped + 64 * 1024 * 1024)


def cgroup_kind() -> str | None:
    """Which memory cgroup this process may make, None when it may make none."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return None
    for kind, root in (("cgroup v1", Path("/sys/fs/cgroup/memory")), ("cgroup v2", Path("/sys/fs/cgroup"))):
        if kind == "cgroup v2" and not _has_v2_memory(root):
            continue
        if kind == "cgroup v1" and not (root / "memory.limit_in_bytes").exists():
            continue
        probe = root / f"lowmem-probe-{os.getpid()}"
        try:
            probe.mkdir()
            probe.rmdir()
        except OSError:
            continue
        return kind
    return None


def _has_v2_memory(root: Path) -> bool:
    try:
        return "memory" in (root / "cgroup.subtree_control").read_text(encoding="utf-8").split()
    except OSError:
        return False


def enter(size: int) -> None:
    """Put this process, which is about to end, under the limit that LOWMEM_BENCH_LIMIT names; removed at its end.

    Memory that the process has already stays charged where it was, so a cgroup is entered by a fork: the child's
    pages that it shares with us stay ours, what it adds is charged to it.
    """
    kind = os.environ["LOWMEM_BENCH_LIMIT"]
    if kind == "RLIMIT_DATA":
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (size, size))
        return
    _enter_cgroup(kind, size)


def enter_above(kind: str, size: int, counted: int = 0) -> None:
    """Put this process under a limit of `size` bytes more than it has now; as `enter`, and for the same processes.

    Args:
        kind: `cgroup v1`, `cgroup v2`, `RLIMIT_DATA` or `RLIMIT_AS`.
        size: bytes on top.
        counted: what only the rlimits count: the files that will be mapped, the stacks of threads.
    """
    if kind.startswith("cgroup"):
        # After the fork each of our pages that is written to is charged to the group as well.
        _enter_cgroup(kind, size + _field("RssAnon") + _KERNEL_SHARE)
        return
    import resource

    which, used = {"RLIMIT_DATA": (resource.RLIMIT_DATA, "VmData"), "RLIMIT_AS": (resource.RLIMIT_AS, "VmSize")}[kind]
    limit = _field(used) + size + counted
    resource.setrlimit(which, (limit, limit))


def _field(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status: no {name}")


def _enter_cgroup(kind: str, size: int) -> None:
    v1 = kind == "cgroup v1"
    root = Path("/sys/fs/cgroup/memory") if v1 else Path("/sys/fs/cgroup")
    group = root / f"lowmem-{os.getpid()}"
    group.mkdir()
    (group / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(size), encoding="utf-8")
    (group / ("memory.swappiness" if v1 else "memory.swap.max")).write_text("0", encoding="utf-8")
    sys.stdout.flush()
    try:
        child = os.fork()
    except OSError:
        _remove(group)
        raise
    if child == 0:
        (group / "cgroup.procs").write_text(str(os.getpid()), encoding="utf-8")
        return
    # The parent only waits, removes the group and passes the result on.
    status = os.waitpid(child, 0)[1]
    _remove(group)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def _remove(group: Path) -> None:
    """A group is busy for a moment after its last process, and as long as a process lives that this one started."""
    for _ in range(500):
        try:
            group.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.01)
    print(f"{group}: cannot be removed", file=sys.stderr)
