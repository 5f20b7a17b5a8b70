"""Each architecture of the bench's parity matrix loads as `from_pretrained` loads it, at three dtypes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import transformers

import lowmem
from bench import parity
from bench.architectures import ARCHITECTURES, KNOWN_FAILURES, Architecture, find_architectures, known_failure
from bench.comparison import differences_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


def case(architecture: Architecture) -> object:
    reason = known_failure(architecture.model_type)
    marks = [pytest.mark.xfail(strict=True, raises=AssertionError, reason=reason)] if reason else []
    return pytest.param(architecture, id=architecture.model_type, marks=marks)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", [case(one) for one in ARCHITECTURES])
def test_loads_as_from_pretrained_does(architecture: Architecture, tmp_path: Path) -> None:
    """Every tensor, tie, flag and config value, and what the model returns; from several shards."""
    row = parity.check(architecture, tmp_path)
    assert row["files"] > 1
    assert not row["problems"], row["problems"]
