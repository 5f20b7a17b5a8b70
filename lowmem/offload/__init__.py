"""Weights on disk, or on other devices, at run time."""

from .attaching import attach, bring_weights, comes_at_use, give_up, release
from .hooks import offload_index
from .mapped_weights import MappedWeights

__all__ = ["MappedWeights", "attach", "bring_weights", "comes_at_use", "give_up", "offload_index", "release"]
