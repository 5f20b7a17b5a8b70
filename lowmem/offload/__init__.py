"""Weights on disk, or on other devices, at run time."""

from .attaching import attach, bring_weights, comes_at_use, give_up, release
from .hooked_weights import MappedWeights
from .hooks import offload_index

__all__ = ["MappedWeights", "attach", "bring_weights", "comes_at_use", "give_up", "offload_index", "release"]
