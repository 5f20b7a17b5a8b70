"""Bytes at the edge: parse what people write, print what people read.

Inside the package a size is an integer of bytes. `GiB`, `MiB`, `KiB` are powers of 1024; `GB`, `MB`, `KB`
powers of 1000, as in IEC 80000-13.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

from .errors import OptionError

KIB = 1024
MIB = 1024**2
GIB = 1024**3

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 1000,
    "mb": 1000**2,
    "gb": 1000**3,
    "tb": 1000**4,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 1024**4,
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([a-z]*)", re.ASCII)


def parse_size(value: int | float | str, what: str = "size") -> int:
    """Bytes of `"8GiB"`, `"500 MB"`, `"1024"` or a number of bytes.

    Raises:
        OptionError: not a size, or negative. `what` names the option in the message.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise OptionError(f"{what}: expected bytes or text such as '8GiB', found {value!r}")
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip().lower())
        if match is None or match[2] not in _UNITS:
            raise OptionError(f"{what}: expected a size such as '8GiB', '500MB' or a number of bytes, found {value!r}")
        # A fraction, not a float: "4.7TiB" must not be off by a few bytes.
        return int(Fraction(match[1]) * _UNITS[match[2]])
    if not math.isfinite(value) or value < 0:
        raise OptionError(f"{what}: expected a size of at least 0 bytes, found {value!r}")
    return int(value)


def format_size(size: int) -> str:
    """`size` bytes for people, in powers of 1024: `'2.30 GiB'`, `'512 B'`."""
    if abs(size) < KIB:
        return f"{size} B"
    for unit, factor in (("KiB", KIB), ("MiB", MIB), ("GiB", GIB)):
        if abs(size) < factor * KIB:
            return f"{size / factor:.2f} {unit}"
    return f"{size / 1024**4:.2f} TiB"
