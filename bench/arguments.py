"""What the benches' command lines have in common: lists of names, and counts."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """A whole number of at least 1.

    Raises:
        argparse.ArgumentTypeError: it is less.
        ValueError: it is no number.
    """
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, found {text}")
    return number


def names(text: str | None) -> tuple[str, ...]:
    """`A,B` as its names; none of nothing."""
    return tuple(name.strip() for name in text.split(",") if name.strip()) if text else ()
