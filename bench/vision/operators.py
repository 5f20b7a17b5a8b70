"""The import of torchvision beside torch's CPU build.

torchvision's builds for PyPI are for CUDA. Beside torch's CPU build its library of operators does not load, and its
import fails on their missing schemas. To declare these is enough: no model here calls them. It must happen before
anything imports timm; where the library loads, nothing is declared.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

# Those that torchvision describes by `torch.library`, which needs a schema. The others it leaves alone when its library
# did not load.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_DECLARED: list[Any] = []


def has_timm() -> bool:
    """Whether timm is installed."""
    return importlib.util.find_spec("timm") is not None


def declare() -> None:
    """Declare what torchvision needs to be imported, where its own library does not."""
    import torch

    # These are untyped.
    operators: Any = torch.ops
    make_library: Any = torch.library.Library
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or hasattr(operators.torchvision, "nms"):
        return
    try:
        # What torchvision itself tries first; without importing it.
        for library in Path(spec.origin).parent.glob("_C.*"):
            operators.load_library(str(library))
    except OSError:
        pass
    if not hasattr(operators.torchvision, "nms"):
        declared = make_library("torchvision", "DEF")
        for schema in _SCHEMAS:
            declared.define(schema)
        _DECLARED.append(declared)
