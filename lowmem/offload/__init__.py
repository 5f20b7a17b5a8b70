"""Weights on disk, or on other devices, at run time."""

from .attaching import attach, bring_weights, release
from .hooks import offload_index
from .mapped_weights import MappedWeights

__all__ = ["MappedWeights", "attach", "bring_weights", "offload_index", "release"]
