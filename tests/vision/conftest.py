"""Tests that need timm: in an environment without it they skip themselves.

Beside torch's CPU build torchvision can be imported only after what `bench.vision.operators` does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from bench.vision.operators import declare, has_timm

# As in tests/conftest.py, which is not read when only this folder is asked for from elsewhere.
os.environ["HF_HUB_OFFLINE"] = "1"

if has_timm():
    declare()


@pytest.fixture(autouse=True)
def few_threads() -> Iterator[None]:
    """Results are compared bit for bit, and tiny tensors are slower with more threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
