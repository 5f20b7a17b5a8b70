"""Memory that is refused, at any allocation: a right result, or an error, and a process that goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import failing
import pytest
from fault_shim import under_shim

_ALL = failing.is_full()
_NAMES = [
    "mapped",
    "cast",
    "direct",
    "by maps",
    "zip, cast",
    "legacy",
    "packed",
    "given",
    "filter",
    "stream",
    "convert",
]


def test_any_large_allocation_may_be_refused(tmp_path: Path) -> None:
    names = _NAMES if _ALL else ["cast", "packed", "filter", "convert"]
    least, most = (1 << 12, 10**6) if _ALL else (1 << 16, 5)
    root = str(tmp_path / "root")
    made: Any = under_shim(failing.fresh_sweep, "sweep_memory", root, names, least, most, timeout=3000)
    assert made.refused
    assert not made.problems, "\n".join(made.problems[:20])


@pytest.mark.parametrize("name", _NAMES if _ALL else ["cast", "stream"])
def test_a_limit_on_memory_is_met_without_harm(tmp_path: Path, name: str) -> None:
    ends = under_shim(failing.under_data_limits, str(tmp_path / "root"), name, 64 if _ALL else 4)
    assert set(ends) == {"worked", "refused"}, ends
