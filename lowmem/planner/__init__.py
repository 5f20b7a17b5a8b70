"""Placement, dtypes and budget: everything decided before a byte moves."""

from .plan import make_plan
from .records import LoadPlan, LoadRequest, Move, Placement, Progress, ProgressCallback

__all__ = ["LoadPlan", "LoadRequest", "Move", "Placement", "Progress", "ProgressCallback", "make_plan"]
