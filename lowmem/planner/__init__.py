"""Placement, dtypes and budget: everything decided before a byte moves."""

from .moves import Move, Placement
from .plan import make_plan
from .records import LoadPlan, LoadRequest, Progress, ProgressCallback, StreamRequest
from .stream import make_stream_plan

__all__ = [
    "LoadPlan",
    "LoadRequest",
    "Move",
    "Placement",
    "Progress",
    "ProgressCallback",
    "StreamRequest",
    "make_plan",
    "make_stream_plan",
]
