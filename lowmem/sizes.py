"""Bytes at the edge: parse what people write, print what people read.

Inside the package a size is an integer of bytes. `GiB`, `MiB`, `KiB` are powers of 1024; `GB`, `MB`, `KB`
powers of 1000, as in IEC 80000-13.
"""

from __future__ import annotations

import re
import reprlib
from fractions import Fraction
from typing import Any

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
# No file and no memory is larger: offsets and sizes of the kernel are signed 64-bit numbers.
_MOST = 2**63 - 1
_SIZE = re.compile(r"(\d{1,30}(?:\.\d{1,30})?|\.\d{1,30})\s*([a-z]*)", re.ASCII)


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80
_LONGEST = 200


def shown(value: Any) -> str:
    """`repr(value)` for a message: bounded in length, and there is one whatever the object does."""
    try:
        text = _REPR.repr(value)
    except Exception:
        # Integers of more than 4,300 digits have no text since Python 3.11, and a __repr__ may raise.
        return f"{'an' if type(value) is int else 'a'} {type(value).__name__} that cannot be shown"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def parse_size(value: int | float | str, what: str = "size") -> int:
    """Bytes of `"8GiB"`, `"500 MB"`, `"1024"` or a number of bytes.

    Raises:
        OptionError: not a size, negative, or more than 2**63 - 1 bytes. `what` names the option in the message.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise OptionError(f"{what}: expected bytes or text such as '8GiB', found {shown(value)}")
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip().lower())
        if match is None or match[2] not in _UNITS:
            raise OptionError(
                f"{what}: expected a size such as '8GiB', '500MB' or a number of bytes, found {shown(value)}"
            )
        # A fraction, not a float: "4.7TiB" must not be off by a few bytes.
        size: Fraction | int | float = Fraction(match[1]) * _UNITS[match[2]]
    else:
        size = value
    # Written so that NaN fails too.
    if not 0 <= size <= _MOST:
        raise OptionError(f"{what}: expected a size from 0 to {_MOST} bytes, found {shown(value)}")
    return int(size)


def format_size(size: int) -> str:
    """`size` bytes for people, in powers of 1024: `'2.30 GiB'`, `'512 B'`."""
    if abs(size) < KIB:
        return f"{size} B"
    for unit, factor in (("KiB", KIB), ("MiB", MIB), ("GiB", GIB)):
        if round(abs(size) / factor, 2) < KIB:
            return f"{size / factor:.2f} {unit}"
    return f"{size / 1024**4:.2f} TiB"
