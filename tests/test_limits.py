"""What memory there is: physical, cgroups, rlimits, devices."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

from lowmem import limits, memory
from lowmem.errors import MeasureError
from lowmem.sizes import MIB

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
REPOSITORY = Path(__file__).parents[1]
UNLIMITED_V1 = "9223372036854771712"


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=REPOSITORY)


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("memory_", "memory.", 1)).write_text(f"{content}\n")


class FakeMachine:
    """A `/proc` and cgroup mounts in a temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.proc = folder / "proc"
        self.v1 = folder / "sys fs" / "memory"  # a space, which mountinfo escapes
        self.v2 = folder / "unified"
        write(self.proc / "self", status="Name:\tx\nVmSize:\t100 kB\nVmData:\t50 kB", cgroup="", mountinfo="")
        for mount in (self.v1, self.v2):
            mount.mkdir(parents=True)

    def mounts(self, *lines: str) -> None:
        (self.proc / "self/mountinfo").write_text("25 1 0:22 / /proc rw - proc proc rw\n" + "\n".join(lines) + "\n")

    def mount_v1(self, root: str = "/") -> str:
        point = str(self.v1).replace(" ", "\\040")
        return f"35 31 0:32 {root} {point} rw shared:9 - cgroup cgroup rw,memory"

    def mount_v2(self, root: str = "/") -> str:
        return f"41 31 0:38 {root} {self.v2} rw - cgroup2 cgroup2 rw,nsdelegate"

    def groups(self, text: str) -> None:
        (self.proc / "self/cgroup").write_text(text)

    def memory(self, physical: int = 1_000_000) -> limits.HostMemory:
        return limits._host_memory(self.proc, physical)


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    return FakeMachine(tmp_path)


def test_without_proc_only_physical_memory_binds(tmp_path):
    found = limits._host_memory(tmp_path / "none", 77)
    assert (found.available, found.bound_by, found.limits) == (77, "physical memory", {"physical memory": 77})


def test_host_memory_of_this_machine_is_the_least_of_its_limits():
    found = memory.host_memory()
    assert found.available == found.limits[found.bound_by] == min(found.limits.values())
    assert found.available >= 0


def test_v2_limit_counts_inactive_file_pages_as_free(machine):
    machine.mounts(machine.mount_v2())
    machine.groups("0::/pod/app\n")
    write(machine.v2 / "pod/app", memory_max=1000, memory_current=600, memory_high="max")
    write(machine.v2 / "pod/app", memory_stat="anon 300\ninactive_file 250\nactive_file 7")
    assert machine.memory().limits["cgroup /pod/app (v2)"] == 1000 - (600 - 250)
    assert machine.memory().bound_by == "cgroup /pod/app (v2)"


def test_v2_high_binds_where_it_is_lower_than_max(machine):
    machine.mounts(machine.mount_v2())
    machine.groups("0::/app\n")
    write(machine.v2 / "app", memory_max=1000, memory_high=500, memory_current=100, memory_stat="inactive_file 0")
    assert machine.memory().available == 400


def test_an_ancestor_may_be_the_tightest(machine):
    machine.mounts(machine.mount_v2())
    machine.groups("0::/pod/app\n")
    write(machine.v2 / "pod", memory_max=500, memory_high="max", memory_current=450, memory_stat="inactive_file 10")
    write(machine.v2 / "pod/app", memory_max=9000, memory_high="max", memory_current=1, memory_stat="inactive_file 0")
    assert machine.memory().bound_by == "cgroup /pod (v2)"
    assert machine.memory().available == 60


def test_unlimited_groups_do_not_bind(machine):
    machine.mounts(machine.mount_v1(), machine.mount_v2())
    machine.groups("4:memory:/a\n0::/b\n")
    write(machine.v1 / "a", memory_limit_in_bytes=UNLIMITED_V1, memory_usage_in_bytes=5, memory_stat="")
    write(machine.v2 / "b", memory_max="max", memory_high="max", memory_current=5, memory_stat="")
    assert list(machine.memory().limits) == ["physical memory"]


def test_v1_limit_counts_inactive_file_pages_of_the_whole_subtree_as_free(machine):
    machine.mounts(machine.mount_v1())
    machine.groups("9:name=systemd:/\n4:cpu,memory:/a/b\n")
    write(machine.v1 / "a/b", memory_limit_in_bytes=1000, memory_usage_in_bytes=900)
    write(machine.v1 / "a/b", memory_stat="inactive_file 1\ntotal_inactive_file 300")
    write(machine.v1 / "a", memory_limit_in_bytes=UNLIMITED_V1, memory_usage_in_bytes=900, memory_stat="")
    write(machine.v1, memory_limit_in_bytes=2000, memory_usage_in_bytes=950, memory_stat="total_inactive_file 0")
    assert machine.memory().limits == {
        "physical memory": 1_000_000,
        "cgroup /a/b (v1)": 400,
        "cgroup / (v1)": 1050,
    }


def test_hybrid_systems_are_bound_by_the_least_of_both_versions(machine):
    machine.mounts(machine.mount_v1(), machine.mount_v2())
    machine.groups("4:memory:/a\n0::/b\n")
    write(machine.v1 / "a", memory_limit_in_bytes=700, memory_usage_in_bytes=100, memory_stat="")
    write(machine.v2 / "b", memory_max=900, memory_high="max", memory_current=400, memory_stat="")
    assert machine.memory().limits == {"physical memory": 1_000_000, "cgroup /a (v1)": 600, "cgroup /b (v2)": 500}


@pytest.mark.parametrize("path", ["/docker/abc", "/../outside", "/"])
def test_a_path_that_is_not_below_the_mount_falls_back_to_what_exists(machine, path):
    machine.mounts(machine.mount_v1())
    machine.groups(f"4:memory:{path}\n")
    write(machine.v1, memory_limit_in_bytes=300, memory_usage_in_bytes=100, memory_stat="")
    assert machine.memory().limits == {"physical memory": 1_000_000, "cgroup / (v1)": 200}


def test_the_deepest_ancestor_that_exists_is_used(machine):
    machine.mounts(machine.mount_v2())
    machine.groups("0::/pod/gone/deeper\n")
    write(machine.v2 / "pod", memory_max=300, memory_current=100, memory_stat="")
    assert machine.memory().limits == {"physical memory": 1_000_000, "cgroup /pod (v2)": 200}


@pytest.mark.parametrize("path", ["/docker/abc", "/docker/abc/inner", "/elsewhere"])
def test_a_mount_of_a_part_of_the_tree_is_understood(machine, path):
    machine.mounts(machine.mount_v1(root="/docker/abc"))
    machine.groups(f"4:memory:{path}\n")
    write(machine.v1, memory_limit_in_bytes=300, memory_usage_in_bytes=100, memory_stat="")
    write(machine.v1 / "inner", memory_limit_in_bytes=250, memory_usage_in_bytes=100, memory_stat="")
    expected = {"physical memory": 1_000_000, "cgroup /docker/abc (v1)": 200}
    if path.endswith("inner"):
        expected["cgroup /docker/abc/inner (v1)"] = 150
    assert machine.memory().limits == expected


def test_an_exceeded_limit_leaves_nothing_not_less(machine):
    machine.mounts(machine.mount_v2())
    machine.groups("0::/app\n")
    write(machine.v2 / "app", memory_max=100, memory_current=150, memory_stat="inactive_file 0")
    assert machine.memory().available == 0


def test_the_peak_of_our_own_group_is_read_in_either_version(machine):
    machine.mounts(machine.mount_v1(), machine.mount_v2())
    machine.groups("0::/b\n")
    write(machine.v2 / "b", memory_peak=11)
    assert limits.group_peak(machine.proc) == 11
    machine.groups("4:memory:/a\n")
    write(machine.v1 / "a", memory_max_usage_in_bytes=22)
    assert limits.group_peak(machine.proc) == 22
    machine.groups("")
    assert limits.group_peak(machine.proc) is None


@linux
@pytest.mark.parametrize(("limit", "counter"), [("RLIMIT_DATA", "VmData"), ("RLIMIT_AS", "VmSize")])
def test_rlimits_bind_by_what_the_kernel_counts(limit, counter):
    done = python(
        """
        import mmap, resource, sys
        from lowmem import memory
        memory.host_memory()  # import psutil before the limit
        limit, counter = getattr(resource, sys.argv[1]), sys.argv[2]
        status = open("/proc/self/status").read()
        used = int(status.split(counter + ":")[1].split()[0]) * 1024
        resource.setrlimit(limit, (used + (256 << 20), resource.RLIM_INFINITY))
        found = memory.host_memory()
        print(found.bound_by)
        assert (250 << 20) < found.available <= (256 << 20), found
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        mmap.mmap(-1, found.available - (4 << 20), flags).close()
        try:
            mmap.mmap(-1, found.available + (4 << 20), flags)
        except OSError:
            print("refused")
        """,
        limit,
        counter,
    )
    assert done.stdout.split() == [limit, "refused"], done.stderr


@linux
@pytest.mark.cgroup
def test_a_real_cgroup_binds():
    groups = limits.memory_groups()
    if not groups:
        pytest.skip("no memory cgroup")
    own = groups[0]
    folder = own.directory / f"lowmem-test-{os.getpid()}"
    limit = folder / ("memory.max" if own.version == 2 else "memory.limit_in_bytes")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("cannot make a cgroup")
    try:
        if not limit.exists():
            pytest.skip("the memory controller is not delegated to us")
        limit.write_text(str(200 * MIB))
        done = python(
            """
            import os, pathlib, sys
            pathlib.Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
            from lowmem import memory
            found = memory.host_memory()
            print(found.bound_by.endswith(sys.argv[2]), (100 << 20) < found.available <= (200 << 20))
            """,
            str(folder),
            f"{folder.name} (v{own.version})",
        )
        assert done.stdout.split() == ["True", "True"], done.stderr
    finally:
        folder.rmdir()


def test_device_memory_is_empty_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert memory.device_memory() == {}


def fake_torch(monkeypatch: pytest.MonkeyPatch, **answers: object) -> None:
    cuda = SimpleNamespace(is_available=lambda: True, device_count=lambda: 1, **answers)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))


def test_device_memory_is_what_torch_says_is_free(monkeypatch):
    fake_torch(monkeypatch, mem_get_info=lambda index: (70, 100))
    assert memory.device_memory() == {"cuda:0": 70}


def test_a_device_that_does_not_answer_is_named(monkeypatch):
    def fail(index: int) -> None:
        raise RuntimeError("busy")

    fake_torch(monkeypatch, mem_get_info=fail)
    with pytest.raises(MeasureError, match=r"cuda:0: .*busy.*CUDA_VISIBLE_DEVICES"):
        memory.device_memory()
