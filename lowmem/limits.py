"""How much memory there is: physical, cgroups v1 and v2, rlimits, CUDA devices.

A load may be stopped by any of these, so the least of them is what counts. The files are described in the
kernel's `Documentation/admin-guide/cgroup-v1/memory.rst`, `.../cgroup-v2.rst` and in `proc(5)`.
"""

from __future__ import annotations

import importlib
import platform
import posixpath
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import MeasureError

_PROC = Path("/proc")
# "No limit" in v1 is the greatest signed number rounded down to a page, so it depends on the page size.
_UNLIMITED = 1 << 62


@dataclass(frozen=True, slots=True)
class HostMemory:
    """What this process may still allocate on the host.

    Attributes:
        available: bytes, the least of `limits`, never negative.
        bound_by: name of the limit that is the least, such as `'physical memory'` or `'RLIMIT_DATA'`.
        limits: every limit that applies: name → bytes left under it.
    """

    available: int
    bound_by: str
    limits: Mapping[str, int]

    @property
    def rlimits(self) -> dict[str, int]:
        """Those of `limits` that count address space: mapped files and the stacks of threads too."""
        return {name: left for name, left in self.limits.items() if name.startswith("RLIMIT_")}


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """A memory cgroup: its version (1 or 2), its path as the kernel names it, and its directory."""

    version: int
    path: str
    directory: Path


@dataclass(frozen=True, slots=True)
class _Mount:
    version: int
    root: str
    point: Path


def host_memory() -> HostMemory:
    """Bytes that this process may still allocate: the least of physical memory, cgroups and rlimits.

    File pages that the kernel can drop count as free, in cgroups (their inactive file pages) as in the machine.
    macOS and Windows have only the physical limit.

    Raises:
        MeasureError: the system does not say.
    """
    # Here, not above: importing lowmem should not pay for psutil.
    import psutil

    try:
        available = psutil.virtual_memory().available
    except OSError as error:
        raise MeasureError(
            f"the machine's free memory cannot be read: {error.filename or '/proc/meminfo'}: "
            f"{error.strerror or error}; where too many files are open, close some, or raise the limit (ulimit -n)"
        ) from error
    return _host_memory(_PROC, available)


def device_memory() -> dict[str, int]:
    """Free bytes of every CUDA device, `{'cuda:0': ...}`; empty without torch or without CUDA.

    Asks `torch.cuda.mem_get_info`, which makes a CUDA context on each device.

    Raises:
        MeasureError: a device is visible but does not answer.
    """
    try:
        torch = sys.modules.get("torch") or importlib.import_module("torch")
    except ImportError:
        return {}
    if not torch.cuda.is_available():
        return {}
    free = {}
    for index in range(torch.cuda.device_count()):
        try:
            free[f"cuda:{index}"] = int(torch.cuda.mem_get_info(index)[0])
        except RuntimeError as error:
            raise MeasureError(
                f"cuda:{index}: its free memory cannot be read ({error}); leave the device out of CUDA_VISIBLE_DEVICES"
            ) from error
    return free


def shares_memory(device: str) -> bool:
    """Whether a device such as `"cuda:0"` has no memory of its own and computes in the host's."""
    torch = importlib.import_module("torch")
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return kind == "mps"
    # To ask initialises CUDA, after which a process cannot fork: not where there are no such devices of NVIDIA.
    if torch.version.hip is None and platform.machine() not in ("aarch64", "arm64"):
        return False
    number = int(index or 0)
    if not torch.cuda.is_available() or number >= torch.cuda.device_count():
        return False
    # Where host and device reach each other's memory but have each their own, it is not set.
    return bool(getattr(torch.cuda.get_device_properties(number), "is_integrated", False))


def accelerators_here() -> set[str]:
    """Every accelerator that torch can use here."""
    torch = importlib.import_module("torch")
    found = {"mps"} if torch.backends.mps.is_available() else set()
    for kind in ("cuda", "xpu", "npu"):
        # torch.npu is there only after torch_npu was imported.
        module = getattr(torch, kind, None)
        if module is not None and module.is_available():
            found.update(f"{kind}:{index}" for index in range(module.device_count()))
    return found


def memory_groups(proc: Path = _PROC) -> list[MemoryGroup]:
    """Memory cgroups of this process, own group first, then up to the root of each mounted hierarchy.

    In a container the path in `/proc/self/cgroup` may not exist below the mount: then the deepest of its
    ancestors that does is taken for our own, at least the root of the mount.
    """
    mounts = list(_mounts(_read(proc / "self/mountinfo")))
    groups: list[MemoryGroup] = []
    for version, path in _own_paths(_read(proc / "self/cgroup")):
        mount = _mount_for(path, [mount for mount in mounts if mount.version == version])
        if mount is not None:
            groups += _ancestry(mount, path)
    return groups


def group_peak(proc: Path = _PROC) -> int | None:
    """Highest charge in bytes that our own memory cgroup has had since it was made, page cache included."""
    names = {1: "memory.max_usage_in_bytes", 2: "memory.peak"}
    peaks = (_number(group.directory / names[group.version]) for group in memory_groups(proc))
    return next((peak for peak in peaks if peak is not None), None)


def _host_memory(proc: Path, physical: int) -> HostMemory:
    found = {"physical memory": physical, **_group_limits(proc), **_rlimits(proc)}
    limits = {name: max(0, available) for name, available in found.items()}
    bound_by = min(limits, key=lambda name: limits[name])
    return HostMemory(available=limits[bound_by], bound_by=bound_by, limits=limits)


def _group_limits(proc: Path) -> dict[str, int]:
    left = {f"cgroup {group.path} (v{group.version})": _left_in(group) for group in memory_groups(proc)}
    return {name: available for name, available in left.items() if available is not None}


def _left_in(group: MemoryGroup) -> int | None:
    at = group.directory
    if group.version == 2:
        stated = [_number(at / "memory.max"), _number(at / "memory.high")]
        used, reclaimable = _number(at / "memory.current"), "inactive_file"
    else:
        stated = [_number(at / "memory.limit_in_bytes")]
        # `total_` covers the groups below, as the usage does.
        used, reclaimable = _number(at / "memory.usage_in_bytes"), "total_inactive_file"
    limits = [limit for limit in stated if limit is not None and limit < _UNLIMITED]
    if not limits or used is None:
        return None
    cache = _fields(_read(at / "memory.stat"), " ").get(reclaimable, 0)
    return min(limits) - max(0, used - cache)


def _rlimits(proc: Path) -> dict[str, int]:
    """What is left under RLIMIT_AS and RLIMIT_DATA, which the kernel compares with VmSize and VmData."""
    used = _fields(_read(proc / "self/status"), ":")
    if "VmSize" not in used:
        return {}
    import resource  # absent on Windows

    left = {}
    for name, limit, counter in (
        ("RLIMIT_AS", resource.RLIMIT_AS, "VmSize"),
        ("RLIMIT_DATA", resource.RLIMIT_DATA, "VmData"),
    ):
        soft = resource.getrlimit(limit)[0]
        if soft != resource.RLIM_INFINITY:
            left[name] = soft - used[counter] * 1024
    return left


def _own_paths(text: str) -> Iterator[tuple[int, str]]:
    """(version, path) of `/proc/self/cgroup`, whose lines are `id:controllers:path`."""
    for line in text.splitlines():
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            yield 1, path
        elif number == "0" and not controllers:
            yield 2, path


def _mounts(text: str) -> Iterator[_Mount]:
    """Mounts of `mountinfo` that can hold memory cgroups; both versions exist at once on hybrid systems."""
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        place, (kind, _, options) = before.split(" "), after.split(" ", 2)
        root, point = (re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), field) for field in place[3:5])
        if kind == "cgroup2":
            yield _Mount(2, root, Path(point))
        elif kind == "cgroup" and "memory" in options.split(","):
            yield _Mount(1, root, Path(point))


def _mount_for(path: str, mounts: list[_Mount]) -> _Mount | None:
    """The mount that shows `path`; else any, because a namespace may have renamed what it shows."""
    showing = [mount for mount in mounts if posixpath.join(path, "").startswith(posixpath.join(mount.root, ""))]
    return next(iter(showing + mounts), None)


def _ancestry(mount: _Mount, path: str) -> Iterator[MemoryGroup]:
    """The groups from `path` up to the root of `mount`, those that can be seen."""
    below = posixpath.relpath(path, mount.root).split("/")
    # A path outside of what is mounted begins with "..": only the mount's root is known to be above us.
    parts = [] if ".." in below or below == ["."] else below
    for depth in range(len(parts), -1, -1):
        directory = mount.point.joinpath(*parts[:depth])
        if _is_folder(directory):
            yield MemoryGroup(mount.version, posixpath.join(mount.root, *parts[:depth]), directory)


def _is_folder(path: Path) -> bool:
    """Whether a folder is there, and can be told to be."""
    try:
        return path.is_dir()
    except OSError:
        return False


def _fields(text: str, separator: str) -> dict[str, int]:
    """Numbers of `name 1` or `Name:   1 kB` lines, by name."""
    found = re.findall(rf"^(\w+){separator}\s*(\d+)", text, re.MULTILINE)
    return {name: int(number) for name, number in found}


def _number(path: Path) -> int | None:
    """The number that a file of one line holds; None for `max`, and where it cannot be read."""
    text = _read(path).strip()
    return int(text) if text.isdecimal() else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
