"""The offload folder: written once, whole or not at all, trusted only when it is what the plan says."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh import JobError, server
from safetensors import safe_open
from test_engine import Net, check_nothing_is_left, linux, net_copy, net_folder, second, state_of  # noqa: F401
from tiny_models import same

import lowmem
from lowmem import loader
from lowmem._mounts import memory_file_system
from lowmem.engine import offload_writer
from lowmem.engine.locks import hold, release
from lowmem.errors import OffloadError
from lowmem.planner import offload
from lowmem.planner.offload import INDEX

DISK: dict[str, Any] = {"device_map": "disk", "dtype": "bfloat16"}


def load(source: Path, off: Path, **options: Any) -> lowmem.LoadResult:
    return lowmem.load(source, model=Net, offload_folder=off, **{**DISK, **options})


def folders(off: Path) -> list[Path]:
    return sorted(p for p in off.iterdir())


def written(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            found.update({key: f.get_tensor(key) for key in f.keys()})  # noqa: SIM118
    return found


def check_folder(folder: Path, source: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    expected = state_of(source)
    found = written(folder)
    assert found.keys() == expected.keys()
    assert all(same(found[key], tensor.to(dtype)) for key, tensor in expected.items())


def times(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}


def test_cast_layers_are_written_as_safetensors_with_an_index(net_copy: Path, tmp_path: Path) -> None:  # noqa: F811
    result = load(net_copy, tmp_path / "off")
    (folder,) = folders(tmp_path / "off")
    check_folder(folder, net_copy)
    index = json.loads((folder / INDEX).read_text())
    assert index["source"] == str(net_copy)
    assert index["fingerprint"].startswith(folder.name)
    assert index["files"] == {p.name: p.stat().st_size for p in folder.glob("*.safetensors")}
    assert set(index["tensors"]) == set(state_of(net_copy))
    assert result.plan.bytes_written == sum(index["files"].values())
    x = torch.randn(3, 256)
    reference = lowmem.load(net_copy, model=Net, dtype="bfloat16").model
    assert torch.equal(result.model(x.bfloat16()), reference(x.bfloat16()))


def test_the_second_load_reads_and_writes_nothing(
    net_copy: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load(net_copy, tmp_path / "off")
    (folder,) = folders(tmp_path / "off")
    before = times(folder)

    def none(*_: Any) -> int:
        raise AssertionError("a byte was read")

    monkeypatch.setattr(os, "preadv", none)
    plan = load(net_copy, tmp_path / "off").plan
    assert (plan.bytes_read, plan.bytes_written) == (0, 0)
    assert plan.offload is not None
    assert plan.offload.reused
    assert times(folder) == before


def other_time(source: Path) -> dict[str, Any]:
    os.utime(second(source), ns=(7, 7))
    return {}


def other_content(source: Path) -> dict[str, Any]:
    raw = bytearray(second(source).read_bytes())
    raw[-1] ^= 1
    second(source).write_bytes(raw)
    return {}


CHANGES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "dtype": lambda _: {"dtype": "float16"},
    "keep_fp32": lambda _: {"keep_fp32": ["layers.3"], "dtype": "bfloat16"},
    "layers": lambda _: {"device_map": {"": "cpu", "layers.2": "disk"}},
    "time of the source": other_time,
    "content of the source": other_content,
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_gets_a_folder_of_its_own(net_copy: Path, tmp_path: Path, change: str) -> None:  # noqa: F811
    load(net_copy, tmp_path / "off")
    (old,) = folders(tmp_path / "off")
    before = times(old)
    plan = load(net_copy, tmp_path / "off", **CHANGES[change](net_copy)).plan
    assert plan.bytes_written > 0
    assert len(folders(tmp_path / "off")) == 2
    assert times(old) == before


def shorten(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    os.truncate(file, file.stat().st_size - 1)


def lose(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()


def spoil_header(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    with file.open("r+b") as f:
        f.seek(12)
        f.write(b"?")


def spoil_index(text: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / INDEX).write_text(text)

    return spoil


def put_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("?")


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGE: dict[str, Callable[[Path], None]] = {
    "truncated file": shorten,
    "missing file": lose,
    "wrong header": spoil_header,
    "no index": lambda folder: (folder / INDEX).unlink(),
    "index cut short": spoil_index('{"format"'),
    "index of another kind": spoil_index("[1]"),
    "index too deep": spoil_index("[" * 100_000),
    "other fingerprint": spoil_index('{"format": "lowmem-offload/1", "fingerprint": "0"}'),
    "a file in its place": put_a_file,
    "empty": empty,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_not_trusted_but_rewritten(net_copy: Path, tmp_path: Path, damage: str) -> None:  # noqa: F811
    load(net_copy, tmp_path / "off")
    (folder,) = folders(tmp_path / "off")
    DAMAGE[damage](folder)
    assert load(net_copy, tmp_path / "off").plan.bytes_written > 0
    assert folders(tmp_path / "off") == [folder]
    check_folder(folder, net_copy)
    assert load(net_copy, tmp_path / "off").plan.bytes_written == 0


# -- disks that fail


def test_a_disk_too_small_is_refused_before_any_read(
    net_copy: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(offload_writer.shutil, "disk_usage", lambda _: usage(1 << 20, 0, 1 << 19))
    reads: list[int] = []
    monkeypatch.setattr(os, "preadv", lambda *_: reads.append(1) or 0)
    with pytest.raises(OffloadError, match=r"the disk has 512\.00 KiB free; give offload_folder on another disk"):
        load(net_copy, tmp_path / "off")
    assert reads == []
    assert folders(tmp_path / "off") == []


def full(*_: Any, **__: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@linux
@pytest.mark.parametrize("function", ["pwrite", "posix_fallocate", "fsync", "mkdir"])
def test_a_disk_that_is_full_leaves_nothing(
    net_copy: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
) -> None:
    (tmp_path / "off").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, function, full)
        if function == "mkdir":
            # Of Python 3.10, which took it from os when it began.
            patch.setattr(Path, function, full)
        # As on a network's, whose files are synced at once.
        patch.setattr(offload_writer, "is_on_local_disk", lambda path: False)
        with pytest.raises(OffloadError, match="No space left"):
            load(net_copy, tmp_path / "off")
    check_nothing_is_left(tmp_path)
    assert folders(tmp_path / "off") == []


def on_this_machines_disk(patch: pytest.MonkeyPatch, boot: str) -> None:
    patch.setattr(offload_writer, "is_on_local_disk", lambda path: True)
    for module in (offload_writer, offload):
        patch.setattr(module, "boot_id", lambda: boot)


def test_what_may_not_have_reached_the_disk_is_not_believed_after_the_next_start(
    net_copy: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    off = tmp_path / "off"
    on_this_machines_disk(monkeypatch, "first")
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    assert not load(net_copy, off).plan.offload.reused
    assert load(net_copy, off).plan.offload.reused
    assert synced == []
    on_this_machines_disk(monkeypatch, "second")
    assert not load(net_copy, off).plan.offload.reused
    assert load(net_copy, off).plan.offload.reused
    (folder,) = folders(off)
    check_folder(folder, net_copy)


def test_a_folder_that_is_used_again_later_is_believed_for_good(
    net_copy: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    off = tmp_path / "off"
    on_this_machines_disk(monkeypatch, "first")
    load(net_copy, off)
    (folder,) = folders(off)
    before = {name: at for name, at in times(folder).items() if name != INDEX}
    index = json.loads((folder / INDEX).read_text())
    assert index["boot"] == "first"
    # Written long ago.
    os.utime(folder / INDEX, ns=(1, 1))
    load(net_copy, off)
    assert json.loads((folder / INDEX).read_text()) == {**index, "boot": None}
    on_this_machines_disk(monkeypatch, "second")
    assert load(net_copy, off).plan.offload.reused
    assert {name: at for name, at in times(folder).items() if name != INDEX} == before
    assert {p.name for p in folder.iterdir()} == {*before, INDEX}


def test_a_folder_that_is_removed_after_planning_is_missed_before_the_model_is_made(
    net_copy: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load(net_copy, tmp_path / "off")
    original = loader.check_present

    def late(plan: Any) -> None:
        original(plan)
        shutil.rmtree(tmp_path / "off")

    monkeypatch.setattr(loader, "check_present", late)
    with pytest.raises(OffloadError, match="removed or changed since it was planned"):
        load(net_copy, tmp_path / "off")


@linux
@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_that_cannot_reserve_is_written_all_the_same(
    net_copy: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
) -> None:
    def cannot(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", cannot)
    load(net_copy, tmp_path / "off")
    check_folder(folders(tmp_path / "off")[0], net_copy)


@linux
def test_short_writes_are_continued(net_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    original = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, view, at: original(fd, view[: max(1, len(view) // 2)], at))
    load(net_copy, tmp_path / "off")
    check_folder(folders(tmp_path / "off")[0], net_copy)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 1 MiB."""
    point = tmp_path / "small"
    point.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "lowmem-test", str(point)], check=False, capture_output=True
    )
    if done.returncode:
        pytest.skip("this process may not mount a tmpfs")
    yield point
    subprocess.run(["umount", str(point)], check=True)


@linux
@pytest.mark.parametrize("honest", [True, False], ids=["free space known", "found while reserving"])
def test_a_real_disk_that_is_full_leaves_nothing(
    net_copy: Path,  # noqa: F811
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    honest: bool,
) -> None:
    # float64: 3 MiB into 1 MiB.
    if not honest:
        monkeypatch.setattr(offload_writer, "_check_free", lambda *_: None)
    with pytest.raises(OffloadError, match="the disk has" if honest else "No space left"):
        load(net_copy, small_disk / "off", dtype="float64")
    check_nothing_is_left(small_disk)
    assert folders(small_disk / "off") == []


def test_a_file_in_the_place_of_the_folder_is_an_offload_error(net_copy: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "off").write_text("mine")
    with pytest.raises(OffloadError, match="expected a folder, found a file"):
        load(net_copy, tmp_path / "off")
    assert (tmp_path / "off").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_folder_is_an_offload_error(net_copy: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "off").mkdir(mode=0o555)
    with pytest.raises(OffloadError, match="cannot be written"):
        load(net_copy, tmp_path / "off")


@linux
def test_a_folder_in_memory_is_warned_about(net_copy: Path, small_disk: Path, tmp_path: Path) -> None:  # noqa: F811
    options = {**DISK, "model": Net}
    warnings = lowmem.plan(net_copy, offload_folder=small_disk / "not" / "yet", **options).warnings
    assert any("tmpfs" in w and "memory" in w for w in warnings)
    if memory_file_system(tmp_path) is None:
        assert lowmem.plan(net_copy, offload_folder=tmp_path / "off", **options).warnings == ()


def test_the_file_system_is_that_of_the_deepest_mount(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(
        "1 0 0:1 / / rw - ext4 /dev/a rw\n"
        "2 1 0:2 / /a\\040b rw shared:1 - tmpfs none rw\n"
        "3 2 0:3 / /a\\040b/disk rw - xfs /dev/b rw\n"
        "4 1 0:4 / /over rw - xfs /dev/c rw\n"
        "5 4 0:5 / /over rw - ramfs none rw\n"
    )
    assert memory_file_system(Path("/a b/x"), table) == "tmpfs"
    assert memory_file_system(Path("/a b/disk/x"), table) is None
    assert memory_file_system(Path("/a"), table) is None
    assert memory_file_system(Path("/over/x"), table) == "ramfs"
    assert memory_file_system(Path("/x"), tmp_path / "none") is None


# -- other processes

_AT_ONCE = """
import os, time
from pathlib import Path
import lowmem
from test_engine import Net
gate = time.time() + 0.3
children = []
for _ in range(args["processes"]):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            while time.time() < gate:
                pass
            lowmem.load(args["source"], model=Net, device_map="disk", dtype="bfloat16", offload_folder=args["off"])
            code = 0
        finally:
            os._exit(code)
    children.append(child)
result = [os.waitpid(child, 0)[1] for child in children]
"""


@linux
@pytest.mark.parametrize("state", ["new", "damaged"])
def test_processes_that_write_the_same_folder_at_once_all_succeed(
    net_copy: Path,  # noqa: F811
    tmp_path: Path,
    state: str,
) -> None:
    off = tmp_path / "off"
    if state == "damaged":
        load(net_copy, off)
        shorten(folders(off)[0])
    assert server().run(_AT_ONCE, source=str(net_copy), off=str(off), processes=3) == [0, 0, 0]
    (folder,) = folders(off)
    check_folder(folder, net_copy)


_KILLED = """
import os, signal
import lowmem
import lowmem.planner.records as records
from test_engine import Net
records.CHUNK = 4096
def kill(progress):
    os.kill(os.getpid(), signal.SIGKILL)
lowmem.load(args["source"], model=Net, device_map="disk", dtype="bfloat16", offload_folder=args["off"], progress=kill)
"""


@linux
def test_what_a_killed_writer_left_is_removed_by_the_next(net_copy: Path, tmp_path: Path) -> None:  # noqa: F811
    off = tmp_path / "off"
    load(net_copy, off, dtype="float16")
    (stale,) = folders(off)
    before = times(stale)
    with pytest.raises(JobError) as killed:
        server().run(_KILLED, source=str(net_copy), off=str(off))
    assert killed.value.status == -9
    (left,) = [p for p in folders(off) if p != stale]
    assert left.name.startswith(".")
    assert left.name.endswith(".tmp")
    mine = off / ".notes.tmp"
    mine.mkdir()
    assert load(net_copy, off).plan.bytes_written > 0
    assert not left.exists()
    # Neither what others made nor another fingerprint is touched.
    assert mine.exists()
    assert times(stale) == before
    assert len(folders(off)) == 3


@linux
def test_the_folder_of_a_live_writer_is_left_alone(net_copy: Path, tmp_path: Path) -> None:  # noqa: F811
    off = tmp_path / "off"
    live = off / ".0123456789abcdef-1-01234567.tmp"
    live.mkdir(parents=True)
    held: list[int] = []
    assert hold(held, live)
    load(net_copy, off)
    assert live.exists()
    release(held)
    load(net_copy, off, dtype="float16")
    assert not live.exists()


def test_cast_layers_without_a_folder_are_cast_at_use(net_copy: Path, tmp_path: Path) -> None:  # noqa: F811
    x = torch.ones(2, 256)
    written, used = load(net_copy, tmp_path / "off").model, lowmem.load(net_copy, model=Net, **DISK).model
    assert torch.equal(written(x.bfloat16()), used(x.bfloat16()))
