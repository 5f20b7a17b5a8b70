"""Bytes at the edge: parse what people write, print what people read.

Inside the package a size is an integer of bytes. `GiB`, `MiB`, `KiB` are powers of 1024; `GB`, `MB`, `KB`
powers of 1000, as in IEC 80000-13.
"""

from __future__ import annotations

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
# No file and no memory is larger: offsets and sizes of the kernel are signed 64-bit numbers.
_MOST = 2**63 - 1
_SIZE = re.compile(r"(\d{1,30}(?:\.\d{1,30})?|\.\d{1,30})\s*([a-z]*)", re.ASCII)


def parse_size(value: int | float | str, what: str = "size") -> int:
    """Bytes of `"8GiB"`, `"500 MB"`, `"1024"` or a number of bytes.

    Raises:
        OptionError: not a size, negative, or more than 2**63 - 1 bytes. `what` names the option in the message.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise OptionError(f"{what}: expected bytes or text such as '8GiB', found {value!r}")
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip().lower())
        if match is None or match[2] not in _UNITS:
            raise OptionError(f"{what}: expected a size such as '8GiB', '500MB' or a number of bytes, found {value!r}")
        # A fraction, not a float: "4.7TiB" must not be off by a few bytes.
        size: Fraction | int | float = Fraction(match[1]) * _UNITS[match[2]]
    else:
        size = value
    # Written so that NaN fails too.
    if not 0 <= size <= _MOST:
        raise OptionError(f"{what}: expected a size from 0 to {_MOST} bytes, found {value!r}")
    return int(size)


def format_size(size: int) -> str:
    """`size` bytes for people, in powers of 1024: `'2.30 GiB'`, `'512 B'`."""
    if abs(size) < KIB:
        return f"{size} B"
    for unit, factor in (("KiB", KIB), ("MiB", MIB), ("GiB", GIB)):
        if round(abs(size) / factor, 2) < KIB:
            return f"{size / factor:.2f} {unit}"
    return f"{size / 1024**4:.2f} TiB"
