"""What is on disk: a source becomes a `Checkpoint`. Imports no torch."""

from .index import inspect
from .records import Checkpoint, Shard, TensorEntry

__all__ = ["Checkpoint", "Shard", "TensorEntry", "inspect"]
