"""Ranks of torch.distributed that load together: what one must tell the others, and an end for all when one ends.

Importing this room imports no torch; making a link between two ranks does.
"""

from __future__ import annotations

from .control import Together
from .exchange import gather
from .hosts import Neighbours, find_neighbours

__all__ = ["Neighbours", "Together", "find_neighbours", "gather"]
