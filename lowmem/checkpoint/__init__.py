"""What is on disk: a source becomes a `Checkpoint`. Imports no torch."""

from .records import Checkpoint, Shard, TensorEntry
from .survey import Survey, inspect, survey
from .wrappers import Cover, Wish, make_wish

__all__ = ["Checkpoint", "Cover", "Shard", "Survey", "TensorEntry", "Wish", "inspect", "make_wish", "survey"]
