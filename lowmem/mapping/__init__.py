"""Key → target region: renames, ties, and the difference between checkpoint and model."""

from .match import match, refuse
from .records import KeyMapping, Link, Mismatch, Region, whole

__all__ = ["KeyMapping", "Link", "Mismatch", "Region", "match", "refuse", "whole"]
