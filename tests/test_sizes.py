"""Sizes as people write and read them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem import OptionError
from lowmem.sizes import GIB, KIB, MIB, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1024", 1024),
        ("12b", 12),
        ("8GiB", 8 * GIB),
        ("8gib", 8 * GIB),
        (" 8 GiB ", 8 * GIB),
        ("1.5MiB", 1536 * KIB),
        (".5KiB", 512),
        ("500 MB", 500_000_000),
        ("2kb", 2000),
        ("3GB", 3 * 10**9),
        ("1TB", 10**12),
        ("1TiB", 1024**4),
        ("4.7TiB", 47 * 1024**4 // 10),
        ("0.1B", 0),
    ],
)
def test_text_is_bytes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(("value", "size"), [(0, 0), (7, 7), (7.9, 7), (2**62, 2**62)])
def test_numbers_are_bytes(value: float, size: int) -> None:
    found = parse_size(value)
    assert found == size
    assert type(found) is int


@pytest.mark.parametrize(
    "value",
    [
        *("", "GiB", "-1", "-1GiB", "+1", "1e9", "1_000", "8 GiBs", "8G", "1..5", "٣GiB", "8GiB 1", "9" * 5000),
        *("9999999TiB", "inf", "nan", -1, -0.5, 2**63, 10**400, math.nan, math.inf, -math.inf),
        *(True, None, [1], b"8GiB"),
    ],
)
def test_anything_else_is_refused_and_the_option_named(value: object) -> None:
    with pytest.raises(OptionError, match=r"^ram: expected .*found") as caught:
        parse_size(value, "ram")  # type: ignore[arg-type]
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (MIB - 1, "1.00 MiB"),
        (MIB, "1.00 MiB"),
        (GIB - 1, "1.00 GiB"),
        (int(2.3 * GIB), "2.30 GiB"),
        (1024**4 - 1, "1.00 TiB"),
        (5000 * 1024**4, "5000.00 TiB"),
        (-1, "-1 B"),
        (-3 * MIB, "-3.00 MiB"),
    ],
)
def test_bytes_are_text(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, 2**62))
def test_text_reads_back_within_its_two_decimals(size: int) -> None:
    text = format_size(size)
    assert abs(parse_size(text) - size) <= max(size * 0.0055, 0.5)
    assert text.endswith("TiB") or float(text.split()[0]) < 1024


@given(st.integers(0, 2**63 - 1))
def test_digits_read_back_exactly(size: int) -> None:
    assert parse_size(str(size)) == parse_size(size) == size
