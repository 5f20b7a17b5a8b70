"""Key → target region: renames, ties, and the difference between checkpoint and model."""

from .cover import cover_of
from .match import match, refuse
from .records import KeyMapping, Link, Mismatch, Region, whole

__all__ = ["KeyMapping", "Link", "Mismatch", "Region", "cover_of", "match", "refuse", "whole"]
