"""Load large PyTorch checkpoints within a memory budget that you state.

    result = lowmem.load("path/to/model", dtype="bfloat16", ram="8GiB")
    result.model, result.plan, result.report

Importing this package imports no torch; what needs it imports it when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import (
    BudgetError,
    CheckpointError,
    KeysError,
    LowmemError,
    MeasureError,
    ModelError,
    OffloadError,
    OptionError,
    OutOfMemoryError,
    OutputError,
    PeakExceededError,
    PlacementError,
    PlotError,
    RankError,
    RunningError,
    SourceError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from .checker import CheckReport, check
    from .checkpoint import Checkpoint, TensorEntry, inspect
    from .checkpoint.schemes import register_scheme
    from .converter import ConvertReport, convert
    from .drop_in import from_pretrained
    from .int8 import Int8Linear
    from .loader import LoadResult, diff, load, plan
    from .mapping import KeyDiff
    from .mapping.transforms import Transform, interpolate, pad_rows, permute, reshape_to, slice_rows, transpose
    from .memory import Measurement, measure
    from .offload import release
    from .planner import LoadPlan, Progress
    from .planner.rank_records import RanksPlan
    from .rank_planning import plan_ranks
    from .report import LoadReport
    from .sources import Source
    from .streaming import stream

__version__ = "0.1.0"

_HOMES = {
    "CheckReport": "checker",
    "check": "checker",
    "Checkpoint": "checkpoint",
    "TensorEntry": "checkpoint",
    "inspect": "checkpoint",
    "register_scheme": "checkpoint.schemes",
    "diff": "loader",
    "KeyDiff": "mapping",
    "Transform": "mapping.transforms",
    "interpolate": "mapping.transforms",
    "pad_rows": "mapping.transforms",
    "permute": "mapping.transforms",
    "reshape_to": "mapping.transforms",
    "slice_rows": "mapping.transforms",
    "transpose": "mapping.transforms",
    "ConvertReport": "converter",
    "convert": "converter",
    "from_pretrained": "drop_in",
    "Int8Linear": "int8",
    "LoadResult": "loader",
    "load": "loader",
    "plan": "loader",
    "plan_ranks": "rank_planning",
    "Measurement": "memory",
    "measure": "memory",
    "LoadPlan": "planner",
    "Progress": "planner",
    "RanksPlan": "planner.rank_records",
    "release": "offload",
    "LoadReport": "report",
    "Source": "sources",
    "stream": "streaming",
}

__all__ = [
    "BudgetError",
    "CheckReport",
    "Checkpoint",
    "CheckpointError",
    "ConvertReport",
    "Int8Linear",
    "KeyDiff",
    "KeysError",
    "LoadPlan",
    "LoadReport",
    "LoadResult",
    "LowmemError",
    "MeasureError",
    "Measurement",
    "ModelError",
    "OffloadError",
    "OptionError",
    "OutOfMemoryError",
    "OutputError",
    "PeakExceededError",
    "PlacementError",
    "PlotError",
    "Progress",
    "RankError",
    "RanksPlan",
    "RunningError",
    "Source",
    "SourceError",
    "TensorEntry",
    "Transform",
    "UnsupportedError",
    "__version__",
    "check",
    "convert",
    "diff",
    "from_pretrained",
    "inspect",
    "interpolate",
    "load",
    "measure",
    "pad_rows",
    "permute",
    "plan",
    "plan_ranks",
    "register_scheme",
    "release",
    "reshape_to",
    "slice_rows",
    "stream",
    "transpose",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
