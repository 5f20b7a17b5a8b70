"""Scales of rows that must be known before weights move: read, or measured."""

from __future__ import annotations

import torch

from ..checkpoint import TensorEntry
from ..planner import LoadPlan, Placement
from .cleanup import undisturbed
from .crew import Crew
from .destinations import MemoryDestination
from .feed import Feed
from .ways import Ways


def read_scales(plan: LoadPlan, ways: Ways | None = None) -> dict[TensorEntry | Placement, torch.Tensor]:
    """Those that the plan wants in memory first; see `LoadPlan.scales`.

    Raises:
        CheckpointError: a file changed, shrank or cannot be read.
        BudgetError: memory that the plan counted on was taken by others.
    """
    if not plan.scales:
        return {}
    before = plan.scales_plan()
    feed = Feed(before, ways=ways)
    crew = Crew(before, feed, at_once=False)
    found: dict[Placement, torch.Tensor] = {}
    try:
        crew.start()
        while (finished := crew.next()) is not None:
            for done in finished:
                for placement, destination in done.whole:
                    assert isinstance(destination, MemoryDestination)
                    found[placement] = destination.tensor
        feed.finish()
    finally:
        undisturbed(crew.end)
    return {key: found[placement] for key, placement in plan.scales.items()}
