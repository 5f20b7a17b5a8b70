"""Key → target region: renames, ties, and the difference between checkpoint and model."""

from .cover import cover_of
from .diff import KeyDiff, KeyGroup, diff_of
from .int8 import check_stays_int8, choose_layers
from .match import match, refuse
from .records import NO_RULES, Computation, KeyMapping, KeyRules, Link, Mismatch, Region, whole

__all__ = [
    "NO_RULES",
    "Computation",
    "KeyDiff",
    "KeyGroup",
    "KeyMapping",
    "KeyRules",
    "Link",
    "Mismatch",
    "Region",
    "check_stays_int8",
    "choose_layers",
    "cover_of",
    "diff_of",
    "match",
    "refuse",
    "whole",
]
