"""Disks that are full, closed or gone while lowmem writes: what was there before, or all of the new, and an error that
says why.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import failing
import pytest
import torch
from fault_shim import under_shim

import lowmem

_ALL = failing.is_full()
_WRITERS = [name for name, way in failing.WAYS.items() if way.writes]


def _try(function: str, root: Path, *args: Any) -> failing.Sweep:
    made: failing.Sweep = under_shim(failing.fresh_sweep, function, str(root / "root"), *args, timeout=3000)
    assert made.tried
    assert not made.problems, f"{len(made.problems)} of {made.tried}:\n" + "\n".join(made.problems[:20])
    return made


@pytest.mark.parametrize(
    "names", [[name] for name in _WRITERS] if _ALL else [["offload, computed", "convert", "synthetic"]]
)
def test_a_call_that_fails_leaves_no_half(tmp_path: Path, names: list[str]) -> None:
    kinds = failing.WRITING if _ALL else [(kind, errors[:1]) for kind, errors in failing.WRITING]
    made = _try("sweep", tmp_path, names, kinds, 10**6 if _ALL else 2, "out")
    assert made.refused


def test_a_folder_that_cannot_be_looked_at_is_not_said_to_be_removed(tmp_path: Path) -> None:
    made = _try("sweep", tmp_path, ["convert"], [("stat", (errno.EIO,))], 10**6 if _ALL else 8, "out")
    assert made.refused


def test_writes_that_are_short_or_interrupted_go_on(tmp_path: Path) -> None:
    names = _WRITERS if _ALL else ["offload, computed", "convert", "synthetic"]
    made = _try("sweep_actions", tmp_path, names, ["write"], ["short", "fail"], 10**6 if _ALL else 2)
    assert made.succeeded == made.tried


def test_a_folder_that_vanishes_while_it_is_written_is_an_error_or_made_anew(tmp_path: Path) -> None:
    names = _WRITERS if _ALL else ["offload, computed", "convert"]
    made = _try("sweep_vanishing", tmp_path, names, 10**6 if _ALL else 4)
    assert made.refused


def test_a_disk_that_is_mounted_for_reading_is_named(tmp_path: Path) -> None:
    names = [n for n in _WRITERS if n != "write a manifest" and not failing.WAYS[n].into] if _ALL else ["convert"]
    problems = under_shim(failing.read_only_disk, str(tmp_path / "root"), names)
    if problems is None:
        pytest.skip("needs the right to mount a disk")
    assert problems == []


def test_a_folder_that_cannot_be_listed_makes_no_empty_manifest(tmp_path: Path) -> None:
    made = _try("sweep", tmp_path, ["write a manifest"], [("list", (13,))], 10**6, "in")
    assert made.refused


def test_an_offload_folder_that_is_gone_is_made_anew_or_named(tmp_path: Path) -> None:
    failing.write_inputs(tmp_path / "in")
    options: Any = {"model": failing.plain, "device_map": "disk", "dtype": "bfloat16", "offload_folder": tmp_path / "o"}
    first = lowmem.load(tmp_path / "in" / "sharded", **options)
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = first.model(x)
        # The pages of what was removed are there as long as they are mapped.
        shutil.rmtree(tmp_path / "o")
        assert torch.equal(first.model(x), expected)
    second = lowmem.load(tmp_path / "in" / "sharded", **options)
    with torch.no_grad():
        assert torch.equal(second.model(x), expected)
    for result in (first, second):
        lowmem.release(result.model)


@pytest.mark.parametrize("stamp", [-(10**9), 0, 1, 2**31 + 5, 2**32 + 5])
def test_files_of_any_time_are_loaded_and_their_folder_is_used_again(tmp_path: Path, stamp: int) -> None:
    failing.write_inputs(tmp_path / "in")
    for file in (tmp_path / "in").rglob("*"):
        os.utime(file, (stamp, stamp))
    options: Any = {"model": failing.plain, "device_map": "disk", "dtype": "bfloat16", "offload_folder": tmp_path / "o"}
    states = []
    for turn in range(3):
        result = lowmem.load(tmp_path / "in" / "sharded", **options)
        assert result.plan.offload is not None
        assert result.plan.offload.reused == (turn > 0)
        states.append(failing.digest(result.model.state_dict()))
        lowmem.release(result.model)
        for index in (tmp_path / "o").rglob("index.json"):
            os.utime(index, (stamp, stamp))
    assert states[0] == states[1] == states[2]


@pytest.mark.parametrize("jump", [-(10**6), 10**6])
def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: int) -> None:
    import time

    failing.write_inputs(tmp_path / "in")
    real, calls = time.time, iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: real() + jump * (next(calls) % 2))
    options: Any = {"model": failing.plain, "device_map": "disk", "dtype": "bfloat16", "offload_folder": tmp_path / "o"}
    states = []
    for _ in range(3):
        result = lowmem.load(tmp_path / "in" / "sharded", **options)
        states.append(failing.digest(result.model.state_dict()))
        lowmem.release(result.model)
    assert states[0] == states[1] == states[2]
