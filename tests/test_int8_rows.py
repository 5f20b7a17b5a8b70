"""Floats to int8 and back, beside bitsandbytes: the same bits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem.int8 import dequantise, measure, quantise, quantise_by, rows, work_size

bnb = pytest.importorskip("bitsandbytes")

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(1, 1), (1, 7), (7, 1), (5, 33), (64, 64), (3, 4096), (2, 140_000), (1500, 3), (300, 1000)]


def work(columns: int) -> torch.Tensor:
    return torch.full((work_size(columns),), 0xFF, dtype=torch.uint8)


def ours(source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.full(source.shape, 99, dtype=torch.int8)
    scales = torch.full(source.shape[:1], -1.0)
    quantise(source, values, scales, work(source.shape[1]))
    return values, scales


def theirs(source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    quantised = bnb.nn.Int8Params(source.clone(), requires_grad=False).to("cpu")
    return quantised.data, quantised.SCB


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Of zeros the sign counts."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = kinds[first.element_size()]
    return first.dtype == second.dtype and torch.equal(first.contiguous().view(kind), second.contiguous().view(kind))


def check(source: torch.Tensor) -> None:
    """`quantise` of all, and `measure` and `quantise_by` of the same, are bitsandbytes' bits."""
    values, scales = ours(source)
    expected, expected_scales = theirs(source)
    assert same_bits(scales, expected_scales)
    assert same_bits(values, expected)
    measured, again = torch.zeros_like(scales), torch.full_like(values, 99)
    scratch = work(source.shape[1])
    measure(source, measured, scratch)
    assert same_bits(measured, expected_scales)
    quantise_by(source, measured, again, scratch)
    assert same_bits(again, expected)


def some(shape: tuple[int, int], dtype: torch.dtype, size: float = 0.02) -> torch.Tensor:
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * size).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_those_of_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check(some(shape, dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [1e-9, 1e-7, 1e-6, 1e-4, 1.0, 1e4])
def test_rows_of_any_magnitude_are_those_of_bitsandbytes(size: float, dtype: torch.dtype) -> None:
    """Down to where fp16 has no bits left, and up to where it ends."""
    check(some((40, 250), dtype, size).clamp(-65504, 65504))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_around_the_bound_of_what_needs_no_rounding_are_those_of_bitsandbytes(dtype: torch.dtype) -> None:
    """bfloat16 is not rounded to fp16 where that makes no difference; here it just does, or just does not."""
    tiny = torch.tensor([2.0**-14 * (1 + step / 128) for step in range(-128, 129)], dtype=torch.float64)
    for exponent in range(-12, 0):
        for factor in (1.0, 1 - 2**-8, 1 + 2**-7):
            largest = torch.tensor([2.0**exponent * factor], dtype=torch.float64)
            check(torch.cat([tiny, -tiny, largest]).to(dtype).reshape(1, -1))


SPECIAL = {
    "zeros": [0.0, 0.0, 0.0],
    "zeros with signs": [-0.0, -0.0, -0.0],
    "one zero with a sign": [-0.0, 1.0, -1.0],
    "least of fp16": [2.0**-24, -(2.0**-24), 0.0],
    "half of the least of fp16": [2.0**-25, -(2.0**-25), 0.0],
    "just above it": [2.0**-25 * 1.01, 0.0, -0.0],
    "denormals of fp16": [2.0**-15, 3 * 2.0**-24, -5 * 2.0**-20],
    "denormals of fp32": [2.0**-130, -(2.0**-149), 2.0**-127],
    "denormals beside a one": [2.0**-15, 2.0**-149, 1.0],
    "most of fp16": [65504.0, -65504.0, 1.0],
    "only the negative": [-65504.0, 257.0, 0.5],
    "halves": [0.5, 1.5, 127.0],
    "more halves": [2.5, -3.5, 127.0],
    "halves that are even": [-0.5, -126.5, 127.0],
    "halves at another scale": [0.5 / 128, 1.5 / 128, 127.0 / 128],
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("row", SPECIAL.values(), ids=SPECIAL)
def test_special_rows_are_those_of_bitsandbytes_alone_and_beside_others(row: list[float], dtype: torch.dtype) -> None:
    check(torch.tensor([row], dtype=dtype))
    check(torch.tensor([[0.1, -0.2, 0.3], row, [3.0, -2.0, 1.0]], dtype=dtype))


def test_all_special_rows_together_are_those_of_bitsandbytes() -> None:
    check(torch.tensor(list(SPECIAL.values()), dtype=torch.float32))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 65536.0, -65536.0, 1e30])
def test_what_is_infinite_in_fp16_gives_a_scale_that_is_not_finite(bad: float, dtype: torch.dtype) -> None:
    """And no other row is touched by it."""
    source = some((4, 50), dtype)
    expected, expected_scales = theirs(source)
    source[2, 17] = bad
    values, scales = ours(source)
    measured, again = torch.zeros_like(scales), torch.empty_like(values)
    measure(source[:, :20], measured, work(20))
    measure(source[:, 20:], measured, work(30))
    quantise_by(source, measured, again, work(50))
    others = torch.tensor([0, 1, 3])
    for found, found_scales in ((values, scales), (again, measured)):
        assert torch.isfinite(found_scales).tolist() == [True, True, False, True]
        assert torch.equal(found[others], expected[others])
        assert torch.equal(found_scales[others], expected_scales[others])
        assert found[2, 17] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_rounds_to_the_most_of_fp16_is_finite(dtype: torch.dtype) -> None:
    below = np.nextafter(np.float32(65520.0), np.float32(0))
    check(torch.tensor([[float(below), 1.0]], dtype=dtype))
    _, scales = ours(torch.tensor([[65520.0, 1.0]], dtype=dtype))
    assert scales.item() == math.inf


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_strides_will_do(dtype: torch.dtype) -> None:
    wide = some((120, 90), dtype)
    for source in (wide.t(), wide[::2], wide[:, ::3], wide[:, 7:40], wide[:1].expand(5, 90), wide.t()[3::4, 1::2]):
        check(source)


def test_values_and_scales_may_be_parts_of_larger_tensors() -> None:
    source = some((300, 1000), torch.bfloat16)
    expected, expected_scales = theirs(source)
    values, scales = torch.zeros(300, 1100, dtype=torch.int8), torch.zeros(300, 2)
    quantise(source, values[:, 50:1050], scales[:, 1], work(1000))
    assert torch.equal(values[:, 50:1050], expected)
    assert torch.equal(scales[:, 1], expected_scales)
    assert not values[:, :50].any()
    assert not values[:, 1050:].any()
    assert not scales[:, 0].any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("cuts", [[1000], [1, 999], [300, 300, 400], [999, 1]], ids=str)
def test_parts_of_rows_are_what_whole_rows_are(cuts: list[int], dtype: torch.dtype) -> None:
    source = some((200, 1000), dtype)
    source[3] = 0
    expected, expected_scales = ours(source)
    values, scales = torch.empty_like(expected), torch.zeros(200)
    for part in source.split(cuts, 1):
        measure(part, scales, work(part.shape[1]))
    for part, into in zip(source.split(cuts, 1), values.split(cuts, 1), strict=True):
        quantise_by(part, scales, into, work(part.shape[1]))
    assert same_bits(scales, expected_scales)
    assert torch.equal(values, expected)


@pytest.mark.parametrize("shape", [(0, 5), (0, 0), (5, 0)])
def test_nothing_is_quantised_to_nothing(shape: tuple[int, int]) -> None:
    values, _ = ours(torch.empty(shape))
    assert values.shape == shape


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_bits_of_fp16_and_bfloat16_are_quantised_as_by_bitsandbytes(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 12)))
    count = shape[0] * shape[1]
    bits = data.draw(st.lists(st.integers(0, 0xFFFF), min_size=count, max_size=count))
    kind = data.draw(st.sampled_from([torch.float16, torch.bfloat16]))
    source = torch.from_numpy(np.array(bits, dtype=np.uint16).view(np.int16)).view(kind).reshape(shape)
    fits = torch.isfinite(source.to(torch.float16))
    check(torch.where(fits, source, torch.zeros_like(source)))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_floats_are_quantised_as_by_bitsandbytes(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 12)))
    count = shape[0] * shape[1]
    most = 2.0 ** data.draw(st.sampled_from([-20, -7, -6, 0, 15]))
    numbers = data.draw(st.lists(st.floats(-most, most, width=32), min_size=count, max_size=count))
    dtype = data.draw(st.sampled_from(FLOATS))
    check(torch.tensor(numbers, dtype=torch.float32).to(dtype).reshape(shape))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_come_back_as_from_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    values, scales = theirs(some(shape, torch.float32))
    expected = bnb.functional.int8_vectorwise_dequant(values, scales).to(dtype)
    into = torch.empty(shape, dtype=dtype)
    dequantise(values, scales, into, work(shape[1]))
    assert same_bits(into, expected)
    wide = torch.zeros(shape[1], shape[0] + 2, dtype=dtype)
    dequantise(values, scales, wide.t()[1:-1], work(shape[1]))
    assert same_bits(wide.t()[1:-1], expected)


@pytest.mark.parametrize("scale", [0.0, 2.0**-24, 1e-3, 65504.0, 3e38, math.inf, math.nan])
def test_every_value_comes_back_as_from_bitsandbytes_at_any_scale(scale: float) -> None:
    values = torch.arange(-128, 128, dtype=torch.int8).reshape(1, -1)
    for dtype in FLOATS:
        into = torch.empty(values.shape, dtype=dtype)
        dequantise(values, torch.tensor([scale]), into, work(256))
        expected = bnb.functional.int8_vectorwise_dequant(values, torch.tensor([scale])).to(dtype)
        torch.testing.assert_close(into, expected, rtol=0, atol=0, equal_nan=True)


def test_values_of_any_strides_come_back() -> None:
    values, _ = theirs(some((40, 30), torch.float32))
    into = torch.empty(30, 20)
    dequantise(values.t()[:, ::2], torch.ones(30), into, work(20))
    assert torch.equal(into, bnb.functional.int8_vectorwise_dequant(values.t()[:, ::2].contiguous(), torch.ones(30)))


@pytest.mark.parametrize("columns", [1, 1000, 131_072, 131_073, 1_000_000])
def test_scratch_is_a_few_bytes_an_element_of_a_block_or_of_a_row(columns: int) -> None:
    assert work_size(columns) <= 12 * max(columns, 128 * 1024)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nothing_large_is_allocated(dtype: torch.dtype) -> None:
    """Fresh memory costs more than the arithmetic: rows are worked on in what is handed in."""
    source = some((2000, 1000), dtype)
    values, scales = torch.empty(source.shape, dtype=torch.int8), torch.zeros(2000)
    into, scratch = torch.empty_like(source), work(1000)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        quantise(source, values, scales, scratch)
        measure(source, scales, scratch)
        quantise_by(source, scales, values, scratch)
        dequantise(values, scales, into, scratch)
    sizes = [event.cpu_memory_usage for event in profile.events()]
    assert max(sizes) <= 4 * rows._ROWS_AT_ONCE
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        source.abs()
    assert max(event.cpu_memory_usage for event in profile.events()) >= source.nbytes, "the profiler sees nothing"
