"""Tests that need timm: in an environment without it they skip themselves.

torchvision's builds for PyPI are for CUDA. Beside torch's CPU build its library of operators does not load, and its
import fails on their missing schemas. To declare these is enough: no model here calls them. It must happen before
anything imports timm; where the library loads, nothing is declared.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# As in tests/conftest.py, which is not read when only this folder is asked for from elsewhere.
os.environ["HF_HUB_OFFLINE"] = "1"

# Those that torchvision describes by `torch.library`, which needs a schema. The others it leaves alone when its library
# did not load.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_DECLARED: list[Any] = []


def _declare() -> None:
    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or hasattr(torch.ops.torchvision, "nms"):
        return
    try:
        # What torchvision itself tries first; without importing it.
        for library in Path(spec.origin).parent.glob("_C.*"):
            torch.ops.load_library(str(library))
    except OSError:
        pass
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            library.define(schema)
        _DECLARED.append(library)


if importlib.util.find_spec("timm") is not None:
    _declare()


@pytest.fixture(autouse=True)
def few_threads() -> Iterator[None]:
    """Results are compared bit for bit, and tiny tensors are slower with more threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
