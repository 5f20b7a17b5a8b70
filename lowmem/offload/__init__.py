"""Weights on disk, or on other devices, at run time."""

from .attaching import attach, bring_weights, comes_at_use, release
from .hooks import dispatch_by_hooks, offload_index
from .mapped_weights import MappedWeights

__all__ = ["MappedWeights", "attach", "bring_weights", "comes_at_use", "dispatch_by_hooks", "offload_index", "release"]
