"""Which way a read goes: what the user said, else the faster one by a trial on cold bytes, told by a clock."""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Callable
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from cold_files import drop, needs_cold, needs_direct, patched, shard_of, warm
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import lowmem
from lowmem import _mounts
from lowmem.engine import reading, ways
from lowmem.engine.ways import Ways
from lowmem.limits import HostMemory
from lowmem.planner import budget, records
from lowmem.planner import plan as planning
from lowmem.planner.moves import BLOCK, LEAST_DIRECT
from lowmem.planner.records import may_read_directly
from lowmem.sizes import GIB, MIB

pytestmark = pytest.mark.timeout(180)
DISK, OTHER = 7, 8
TRIAL = 32 * MIB
counted = contextmanager(patched)


def cold_reads(ways: Ways, nbytes: int, seconds: Callable[[str], float], size: int = 4 * MIB) -> list[str]:
    """Read so many cold bytes, one read after the other, each taking `seconds(way)`: the ways."""
    taken = []
    for _ in range(nbytes // size):
        way = ways.choose(DISK, size, cached=False, direct=True)
        taken.append(way)
        ways.record(DISK, way, size, seconds(way), cached=False)
    return taken


def opened(io: Any = "auto", size: int = MIB) -> Ways:
    made = Ways(io)
    made.open(DISK, size)
    return made


@pytest.mark.parametrize(
    ("direct", "buffered", "winner"),
    [
        (1.0, 2.0, "direct"),
        (2.0, 1.0, "buffered"),
        (1.0, 1.0, "direct"),
        # Direct reads leave the page cache alone, so a little slower is still better.
        (1.3, 1.0, "direct"),
        (1.4, 1.0, "buffered"),
        (0.0, 0.0, "direct"),
    ],
)
def test_direct_is_tried_first_then_buffered_and_then_the_faster_one_is_taken(
    direct: float, buffered: float, winner: str
) -> None:
    taken = cold_reads(opened(), 3 * TRIAL, lambda way: direct if way == "direct" else buffered)
    each = TRIAL // (4 * MIB)
    assert taken == ["direct"] * each + ["buffered"] * each + [winner] * each


def test_what_turns_slow_later_is_left() -> None:
    """Reads after the trial are counted too."""
    made = opened()
    cold_reads(made, 2 * TRIAL, lambda way: 1.0 if way == "direct" else 2.0)
    taken = cold_reads(made, 8 * TRIAL, lambda way: 9.0 if way == "direct" else 2.0)
    assert taken[0] == "direct"
    assert taken[-1] == "buffered"


def test_reads_that_have_not_ended_tell_nothing() -> None:
    """All of the trial in flight at once: direct until enough was seen of both."""
    made = opened()
    begun = [made.choose(DISK, 4 * MIB, cached=False, direct=True) for _ in range(20)]
    assert begun[-4:] == ["direct"] * 4
    for way in begun[:16]:
        made.record(DISK, way, 4 * MIB, 9.0 if way == "direct" else 1.0, cached=False)
    assert made.choose(DISK, 4 * MIB, cached=False, direct=True) == "buffered"


def test_cached_ranges_are_buffered_and_never_count() -> None:
    made = opened()
    for _ in range(100):
        way = made.choose(DISK, 4 * MIB, cached=True, direct=True)
        assert way == "buffered"
        made.record(DISK, way, 4 * MIB, 1e-6, cached=True)
    # As if nothing had been read: the page cache seems fast only where the bytes were there.
    taken = cold_reads(made, 3 * TRIAL, lambda way: 1.0 if way == "direct" else 2.0)
    assert taken[0] == taken[-1] == "direct"
    assert "buffered" in taken


def test_small_reads_are_buffered_and_never_count() -> None:
    made = opened()
    for _ in range(1000):
        assert made.choose(DISK, LEAST_DIRECT - 1, cached=False, direct=True) == "buffered"
        made.record(DISK, "buffered", LEAST_DIRECT - 1, 9.0, cached=False)
    assert Ways("direct").choose(DISK, LEAST_DIRECT - 1, cached=False, direct=True) == "buffered"
    taken = cold_reads(made, 3 * TRIAL, lambda way: 1.0 if way == "buffered" else 2.0)
    assert taken[-1] == "buffered"


@pytest.mark.parametrize("io", ["auto", "direct"])
def test_a_device_that_refused_is_not_asked_again_and_others_are(io: Any) -> None:
    made = opened(io)
    made.open(OTHER, MIB)
    assert made.choose(DISK, MIB, cached=False, direct=True) == "direct"
    made.refuse_direct(DISK)
    assert {made.choose(DISK, MIB, cached=False, direct=True) for _ in range(50)} == {"buffered"}
    made.open(DISK, 2 * GIB)
    assert made.choose(DISK, MIB, cached=False, direct=True) == "buffered"
    assert made.choose(OTHER, MIB, cached=False, direct=True) == "direct"


@settings(max_examples=60, deadline=None)
@given(nbytes=st.integers(1, 8 * MIB), cached=st.booleans(), direct=st.booleans())
def test_what_the_user_says_goes(nbytes: int, cached: bool, direct: bool) -> None:
    def taken(io: Any) -> str:
        return opened(io).choose(DISK, nbytes, cached=cached, direct=direct)

    assert taken("mmap") == "mmap"
    assert taken("buffered") == "buffered"
    assert taken("direct") == ("direct" if direct and nbytes >= LEAST_DIRECT else "buffered")
    assert taken("auto") == ("direct" if direct and nbytes >= LEAST_DIRECT and not cached else "buffered")


def test_a_large_file_is_tried_anew_and_a_small_one_is_not() -> None:
    made = opened()
    cold_reads(made, 2 * TRIAL, lambda way: 1.0 if way == "buffered" else 2.0)
    made.open(DISK, GIB - 1)
    assert cold_reads(made, TRIAL, lambda _: 1.0)[0] == "buffered"
    made.open(OTHER, 5 * GIB)
    assert cold_reads(made, TRIAL, lambda _: 1.0)[0] == "buffered"
    made.open(DISK, GIB)
    assert cold_reads(made, TRIAL, lambda _: 1.0)[0] == "direct"


def test_bytes_by_way_add_up_over_threads() -> None:
    made = opened()

    def work() -> None:
        for n in range(300):
            way = made.choose(DISK, MIB, cached=n % 3 == 0, direct=True)
            made.record(DISK, way, MIB, 1.0 if way == "direct" else 2.0, cached=n % 3 == 0)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(made.read.values()) == 1200 * MIB
    assert set(made.read) == {"direct", "buffered"}
    assert made.read["direct"] >= (800 - 64) * MIB


# -- which file systems


def table(folder: Path, *mounts: tuple[str, str]) -> Path:
    path = folder / "mountinfo"
    lines = [f"{n} 1 8:1 / {point} rw,relatime shared:1 - {kind} source rw" for n, (point, kind) in enumerate(mounts)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "f2fs", "overlay"])
def test_disks_of_this_machine_may_be_read_directly(tmp_path: Path, kind: str) -> None:
    mounts = table(tmp_path, ("/", kind))
    assert _mounts.is_on_local_disk(tmp_path / "shard", mounts)
    assert _mounts.memory_file_system(tmp_path, mounts) is None


NOT_DISKS = ["nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "9p", "virtiofs", "fuse.sshfs", "fuse.gcsfuse", "afs"]


@pytest.mark.parametrize("kind", [*NOT_DISKS, "tmpfs", "ramfs", "squashfs", "a-file-system-to-come"])
def test_network_memory_and_unknown_file_systems_are_no_disks(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "a b"  # a space, which mountinfo escapes
    folder.mkdir()
    mounts = table(tmp_path, ("/", "ext4"), (str(folder).replace(" ", r"\040"), kind))
    assert not _mounts.is_on_local_disk(folder / "shard", mounts)
    assert _mounts.is_on_local_disk(tmp_path / "a", mounts)


def test_of_several_mounts_at_one_point_the_last_is_seen(tmp_path: Path) -> None:
    assert not _mounts.is_on_local_disk(tmp_path, table(tmp_path, ("/", "ext4"), ("/", "nfs")))
    assert _mounts.is_on_local_disk(tmp_path, table(tmp_path, ("/", "nfs"), ("/", "ext4")))


def test_where_nothing_is_known_nothing_is_a_disk(tmp_path: Path) -> None:
    assert not _mounts.is_on_local_disk(tmp_path, tmp_path / "no such table")


def test_a_link_is_where_it_leads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard in a folder on a disk may be a link to a network file system."""
    far, near = tmp_path / "far", tmp_path / "near"
    far.mkdir()
    near.mkdir()
    (far / "shard").write_bytes(b"x")
    (near / "shard").symlink_to(far / "shard")
    mounts = table(tmp_path, ("/", "ext4"), (str(far), "nfs"))
    monkeypatch.setattr(records, "is_on_local_disk", lambda path: _mounts.is_on_local_disk(path, mounts))
    assert may_read_directly("auto", near / "plain") is hasattr(os, "O_DIRECT")
    assert not may_read_directly("auto", near / "shard")
    assert not may_read_directly("auto", far / "shard")
    assert not may_read_directly("buffered", near / "plain")
    assert may_read_directly("direct", far / "shard") is hasattr(os, "O_DIRECT")


# -- in a load


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(8 * MIB // 4, device="meta"))


@pytest.fixture
def one(tmp_path: Path) -> Path:
    path = tmp_path / "disk" / "one.safetensors"
    path.parent.mkdir()
    save_file({"w": torch.arange(8 * MIB // 4, dtype=torch.float32)}, path)
    drop(path)
    return path


@needs_direct
@needs_cold
def test_a_cold_file_on_a_disk_is_read_directly_and_leaves_the_page_cache_alone(one: Path) -> None:
    if not _mounts.is_on_local_disk(one):
        pytest.skip(f"the temporary folder is on {_mounts.file_system(one)}, not known as a disk")
    result = lowmem.load(one, model=One, residency="copy")
    assert result.report.read["direct"] >= 7 * MIB
    drop(one)
    warm(one)
    assert lowmem.load(one, model=One, residency="copy").report.read == {"buffered": 8 * MIB}


@needs_direct
@needs_cold
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_large_direct_reads_are_one_request_each(one: Path, dtype: str) -> None:
    """Tensors begin in a block of memory where their bytes do in the file; so do those in buffers for a cast."""
    with counted() as seen:
        result = lowmem.load(one, model=One, residency="copy", dtype=dtype, io="direct")
    entry = result.plan.checkpoint["w"]
    assert entry.offset % BLOCK
    # What is left is too small to be read directly.
    assert [got for _, direct, _, got in seen.calls if direct] == [4 * MIB, 4 * MIB]
    if dtype == "float32":
        assert result.model.w.data_ptr() % BLOCK == entry.offset % BLOCK


@needs_cold
def test_memory_lies_as_the_file_does_only_where_that_is_of_use(one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a page more, and huge pages begin where memory does."""

    def begin(**options: Any) -> int:
        model = lowmem.load(one, model=One, residency="copy", **options).model
        return int(model.w.data_ptr()) % BLOCK

    begin_in_file = lowmem.inspect(one)["w"].offset % BLOCK
    if _mounts.is_on_local_disk(one):
        assert begin() == begin_in_file
    drop(one)
    assert begin(io="buffered") == begin(io="mmap") == 0
    limited = HostMemory(1 << 40, "physical memory", {"physical memory": 1 << 40, "RLIMIT_AS": 1 << 41})
    with monkeypatch.context() as patch:
        patch.setattr(planning, "host_memory", lambda: limited)
        assert begin(io="direct") == 0
    warm(one)
    assert begin() == 0
    assert begin(io="direct") == begin_in_file


@needs_cold
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_more_threads_than_processors_read_what_is_not_cached(
    one: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Only then, only where it is worth a thread, and not under limits that count the stacks of threads."""

    def readers() -> int:
        return lowmem.plan(one, model=One, residency="copy", dtype=dtype).staging.workers

    monkeypatch.setattr(budget, "workers_here", lambda: 2)
    assert readers() == 2
    monkeypatch.setattr(budget, "_WORTH_MORE_READERS", 8 * MIB)
    assert readers() == budget.COLD_WORKERS
    limited = HostMemory(1 << 40, "physical memory", {"physical memory": 1 << 40, "RLIMIT_AS": 1 << 41})
    with monkeypatch.context() as patch:
        patch.setattr(planning, "host_memory", lambda: limited)
        assert readers() == 2
    warm(one)
    assert readers() == 2
    drop(one, 0, 3 * MIB)
    assert readers() == 2
    drop(one, 0, 6 * MIB)
    assert readers() == budget.COLD_WORKERS


@needs_cold
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_cold_file_elsewhere_is_never_read_directly_by_itself(
    one: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(records, "is_on_local_disk", lambda path: False)
    with counted() as seen:
        result = lowmem.load(one, model=One, residency="copy", dtype=dtype)
    assert result.plan.staging.bounce == 0
    assert result.report.read == {"buffered": 8 * MIB}
    assert seen.calls
    assert not seen.direct


@needs_cold
def test_a_link_to_a_file_system_that_is_no_disk_is_never_read_directly_by_itself(
    one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "links" / one.name
    link.parent.mkdir()
    link.symlink_to(one)
    mounts = table(tmp_path, ("/", "ext4"), (str(one.parent), "nfs4"))
    monkeypatch.setattr(records, "is_on_local_disk", lambda path: _mounts.is_on_local_disk(path, mounts))
    with counted() as seen:
        assert lowmem.load(link, model=One, residency="copy").report.read == {"buffered": 8 * MIB}
    assert not seen.direct


@needs_direct
@needs_cold
def test_of_two_shards_only_the_one_on_a_disk_is_read_directly(
    one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, store = tmp_path / "both", tmp_path / "both" / "store"
    store.mkdir(parents=True)
    one.rename(store / one.name)
    save_file({"v": torch.zeros(8 * MIB // 4)}, folder / "near.safetensors")
    drop(folder / "near.safetensors")
    (folder / "far.safetensors").symlink_to(store / one.name)
    index = {"weight_map": {"v": "near.safetensors", "w": "far.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    mounts = table(tmp_path, ("/", "ext4"), (str(store), "nfs4"))
    monkeypatch.setattr(records, "is_on_local_disk", lambda path: _mounts.is_on_local_disk(path, mounts))
    with counted() as seen:
        assert {key for key, _ in lowmem.stream(folder)} == {"v", "w"}
    assert {Path(name).name for name, *_ in seen.direct} == {"near.safetensors"}


@needs_direct
def test_who_asks_for_direct_reads_gets_them_whatever_is_cached(one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "is_on_local_disk", lambda path: False)
    warm(one)
    assert lowmem.load(one, model=One, residency="copy", io="direct").report.read["direct"] >= 7 * MIB


@needs_direct
@needs_cold
def test_a_reader_asks_the_trial_and_times_what_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a clock in which direct reads are slow, a cold file is soon read through the page cache."""
    path = tmp_path / "shard"
    path.write_bytes(random.Random(3).randbytes(8 * MIB))
    drop(path)
    monkeypatch.setattr(ways, "_TRIAL", MIB)
    now = 0.0

    def slow(real: Any, fd: int, views: Any, offset: int, direct: bool) -> int:
        nonlocal now
        now += 10.0 if direct else 1.0
        return int(real(fd, views, offset))

    monkeypatch.setattr(reading.time, "perf_counter", lambda: now)
    made = Ways()
    with counted(slow), closing(reading.ShardReader(shard_of(path), made, direct=True)) as reader:
        import mmap

        bounce, into = memoryview(mmap.mmap(-1, MIB)), memoryview(mmap.mmap(-1, MIB))
        for at in range(0, 8 * MIB, MIB):
            reader.fill([into], at, bounce)
    assert made.read == {"direct": MIB, "buffered": 7 * MIB}
