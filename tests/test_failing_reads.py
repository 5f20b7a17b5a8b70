"""Disks that fail, give a part, or change their files while lowmem reads: a right result, or an error that says which
file and why, and nothing left behind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import failing
import pytest
from fault_shim import under_shim

_ALL = failing.is_full()
_MOST = 10**6 if _ALL else 2
_SHARD = "sharded/model-00002-of-00002.safetensors"


def _try(function: str, root: Path, *args: Any) -> failing.Sweep:
    made: failing.Sweep = under_shim(failing.fresh_sweep, function, str(root / "root"), *args, timeout=3000)
    assert made.tried
    assert not made.problems, f"{len(made.problems)} of {made.tried}:\n" + "\n".join(made.problems[:20])
    return made


@pytest.mark.parametrize("names", [[n] for n in failing.WAYS] if _ALL else [["inspect a zip", "mapped", "stream"]])
def test_a_call_that_fails_is_an_error_that_says_why(tmp_path: Path, names: list[str]) -> None:
    kinds = failing.READING if _ALL else [(kind, errors[:1]) for kind, errors in failing.READING]
    made = _try("sweep", tmp_path, names, kinds, _MOST)
    assert made.refused


def test_reads_that_are_short_or_interrupted_go_on(tmp_path: Path) -> None:
    names = list(failing.WAYS) if _ALL else ["inspect", "cast", "packed"]
    made = _try("sweep_actions", tmp_path, names, ["read"], ["short", "fail"], 10**6 if _ALL else 2)
    assert made.succeeded == made.tried


@pytest.mark.parametrize(
    ("way", "file"),
    [("cast", _SHARD), ("packed", "packed.pth")]
    + ([("direct", _SHARD), ("stream", _SHARD), ("given", _SHARD), ("legacy", "legacy.pth")] if _ALL else [])
    + ([("filter", _SHARD), ("convert", _SHARD), ("zip, cast", "zip.pth")] if _ALL else []),
)
def test_a_file_that_changes_gives_old_or_new_values_or_an_error(tmp_path: Path, way: str, file: str) -> None:
    made = _try("sweep_changes", tmp_path, [way], file, list(failing.CHANGES), 10**6 if _ALL else 2)
    assert made.refused


def test_a_mapped_file_that_shrinks_during_the_load_ends_it(tmp_path: Path) -> None:
    made = _try("sweep_changes", tmp_path, ["mapped, untouched"], _SHARD, ["truncated", "grown"], _MOST * 4)
    # All but none: at whatever call it happened, the load did not give the model away.
    assert made.refused == made.tried


def test_few_open_files_are_enough_or_refused_by_name(tmp_path: Path) -> None:
    assert under_shim(failing.descriptors, str(tmp_path / "root"), "cast", 8 if _ALL else 6) == []
