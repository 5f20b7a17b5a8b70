"""SECURITY.md: what it promises is held by tests that exist, and its numbers are the code's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fuzz.targets import all_targets

from lowmem import _files, checker
from lowmem.modeling import demands

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
# The rows of the tables under this title, and what stands in their last column.
PROMISES = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.split("## What is promised")[1].split("## What is not promised")[0].splitlines()
    if line.startswith("|") and not line.startswith(("|---", "| promise"))
]


@pytest.mark.parametrize("row", PROMISES, ids=lambda row: row[0][:40])
def test_every_promise_is_held_by_tests_that_exist(row: list[str]) -> None:
    held = re.findall(r"`(tests/[\w./]+)(?:::(\w+))?`", row[-1])
    assert held
    for file, test in held:
        assert (ROOT / file).exists(), file
        if test:
            assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), test


def test_the_limits_are_the_codes() -> None:
    said = " ".join(TEXT.split("## Limits")[1].split("## Dependencies")[0].split())
    for limit in (
        f"{_files.MOST // 10**6} MB",
        f"{_files.ROOM >> 20} MiB more",
        f"{checker.MOST_OF_A_MANIFEST >> 20} MiB",
        f"{_files.LONGEST_NAME:,} characters",
        f"{_files.MOST_SIZES} sizes",
        f"{demands.MOST:,} layers",
    ):
        assert limit in said


def test_the_bounds_are_those_of_the_project() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+)[^|]*\| (>=[\d.]+), (<\d+) \|", TEXT.split("## Dependencies")[1], flags=re.MULTILINE)
    assert len(rows) >= 10
    for name, lowest, highest in rows:
        assert f'"{name}{lowest},{highest}"' in project, name


def test_the_targets_are_those_that_there_are() -> None:
    said = re.search(r"The\s+targets are (.*?)\. Every", TEXT, flags=re.DOTALL)
    assert said is not None
    assert re.findall(r"`([\w-]+)`", said[1])
    assert set(re.findall(r"`([\w-]+)`", said[1])) == set(all_targets())
