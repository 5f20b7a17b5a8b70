"""Key → target region: renames, ties, and the difference between checkpoint and model."""

from .diff import KeyDiff, KeyGroup, diff_of
from .match import match, refuse
from .records import NO_RULES, KeyMapping, KeyRules, Link, Mismatch, Region, whole

__all__ = [
    "NO_RULES",
    "KeyDiff",
    "KeyGroup",
    "KeyMapping",
    "KeyRules",
    "Link",
    "Mismatch",
    "Region",
    "diff_of",
    "match",
    "refuse",
    "whole",
]
