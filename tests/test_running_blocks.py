"""Products and lookups in blocks of rows give what the whole weight gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lowmem.errors import OptionError
from lowmem.offload.blocks import embedding_by_rows, linear_in_blocks, rows_at_once

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of the largest result: how far another order of sums may lead, as `linear_in_blocks` promises.
CLOSE = {torch.float64: 2.0**-48, torch.float32: 2.0**-20, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


class Weight:
    """Rows of a weight that are made in a buffer; what was made before is spoiled, as it is in a ring."""

    def __init__(self, weight: torch.Tensor, at_once: int) -> None:
        self.weight = weight
        self.buffer = torch.empty(max(1, at_once) * weight.shape[1] * weight.itemsize + 5, dtype=torch.uint8)
        self.made: list[tuple[int, int]] = []

    def rows(self, begin: int, end: int, buffer: torch.Tensor) -> torch.Tensor:
        assert buffer is self.buffer
        self.made.append((begin, end))
        buffer.fill_(0xFF)
        nbytes = (end - begin) * self.weight.shape[1] * self.weight.itemsize
        made = buffer[:nbytes].view(self.weight.dtype).view(end - begin, -1)
        return made.copy_(self.weight[begin:end])

    def times(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return linear_in_blocks(x, self.rows, *self.weight.shape, self.weight.dtype, bias, self.buffer)


def assert_close(found: torch.Tensor, expected: torch.Tensor, magnitudes: torch.Tensor | None = None) -> None:
    """`magnitudes`: what was summed, without signs, where the results may cancel out."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.is_contiguous() == expected.is_contiguous()
    if expected.numel():
        largest = (expected if magnitudes is None else magnitudes).double().abs().max()
        assert (found.double() - expected.double()).abs().max() <= CLOSE[expected.dtype] * largest


@pytest.fixture(params=[1, 2], ids="threads {}".format)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Of how many threads share the rows, the order of the sums depends too."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


# -- products


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at_once", [32, 80, 1100])
@pytest.mark.parametrize("bias", [False, True])
def test_a_token_gives_the_bits_of_the_whole_weight(dtype: torch.dtype, at_once: int, bias: bool) -> None:
    for out_features, in_features in [(2048, 256), (1504, 200)]:
        weight = Weight(drawn(out_features, in_features, seed=1, dtype=dtype, scale=0.02), at_once)
        x = drawn(1, 1, in_features, seed=2, dtype=dtype)
        b = drawn(out_features, seed=3, dtype=dtype) if bias else None
        assert torch.equal(weight.times(x, b), functional.linear(x, weight.weight, b))
        assert len(weight.made) > 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [2, 16, 70])
@pytest.mark.parametrize("at_once", [7, 100, 1024])
def test_many_tokens_are_within_one_rounding_of_the_whole_weight(dtype: torch.dtype, count: int, at_once: int) -> None:
    weight = Weight(drawn(1500, 300, seed=1, dtype=dtype, scale=0.02), at_once)
    x, bias = drawn(count, 300, seed=2, dtype=dtype), drawn(1500, seed=3, dtype=dtype)
    assert_close(weight.times(x, bias), functional.linear(x, weight.weight, bias))
    assert_close(weight.times(x), functional.linear(x, weight.weight))


@settings(max_examples=100, deadline=None)
@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    out_features=st.integers(0, 70),
    in_features=st.integers(1, 40),
    at_once=st.integers(1, 80),
    dtype=st.sampled_from([torch.float64, *DTYPES]),
    bias=st.booleans(),
    grad=st.booleans(),
)
def test_any_shape_is_close_to_torchs_own_there_and_back(
    shape: list[int],
    out_features: int,
    in_features: int,
    at_once: int,
    dtype: torch.dtype,
    bias: bool,
    grad: bool,
) -> None:
    weight = Weight(drawn(out_features, in_features, seed=1, dtype=dtype), at_once)
    x = drawn(*shape, in_features, seed=2, dtype=dtype).requires_grad_(grad)
    b = drawn(out_features, seed=3, dtype=dtype).requires_grad_(grad) if bias else None
    expected = functional.linear(x, weight.weight, b)
    found = weight.times(x, b)
    unsigned = weight.weight.double().abs()
    summed = functional.linear(x.detach().double().abs(), unsigned, None if b is None else b.detach().double().abs())
    assert_close(found.detach(), expected.detach(), summed)
    assert found.requires_grad == expected.requires_grad
    for begin, end in weight.made:
        assert (end - begin) * in_features * dtype.itemsize <= weight.buffer.numel()
    if grad:
        upstream = drawn(*shape, out_features, seed=4, dtype=dtype)
        wanted = [x] if b is None else [x, b]
        ways = [torch.autograd.grad(result, wanted, upstream) for result in (found, expected)]
        assert_close(ways[0][0], ways[1][0], upstream.double().abs() @ unsigned)
        if b is not None:
            assert_close(ways[0][1], ways[1][1], upstream.abs().reshape(math.prod(shape), out_features).sum(0))


def test_blocks_are_whole_multiples_and_the_last_is_what_is_left() -> None:
    weight = Weight(drawn(1000, 8), 300)
    weight.times(drawn(1, 8))
    assert weight.made == [(0, 256), (256, 512), (512, 768), (768, 1000)]


@pytest.mark.parametrize(
    ("fitting", "expected"),
    [(0, 0), (1, 1), (15, 15), (17, 16), (100, 64), (255, 192), (700, 512), (1023, 768), (1025, 1024), (5000, 4096)],
)
def test_how_many_rows_fit(fitting: int, expected: int) -> None:
    assert rows_at_once(fitting * 6 + 5, 3, torch.bfloat16) == expected


def test_a_buffer_that_holds_no_row_is_an_error_that_says_so() -> None:
    weight = Weight(drawn(20, 8), 1)
    with pytest.raises(OptionError, match=r"20 rows of 8 torch.float32: expected a buffer of at least one row \(32 B"):
        linear_in_blocks(drawn(1, 8), weight.rows, 20, 8, torch.float32, None, weight.buffer[:31])


def test_what_torch_refuses_is_refused_in_its_words() -> None:
    weight = Weight(drawn(20, 8), 4)
    for x in (drawn(3, 7), drawn(3, 8, dtype=torch.float64)):
        with pytest.raises(RuntimeError) as expected:
            functional.linear(x, weight.weight[:4])
        with pytest.raises(RuntimeError) as found:
            weight.times(x)
        assert str(found.value) == str(expected.value)


def test_autocast_decides_the_dtype() -> None:
    weight, x = Weight(drawn(100, 64), 30), drawn(5, 64, seed=2).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = weight.times(x), functional.linear(x, weight.weight)
    assert_close(found.detach(), expected.detach())
    upstream = drawn(5, 100, dtype=torch.bfloat16)
    (back,) = torch.autograd.grad(found, x, upstream)
    (wanted,) = torch.autograd.grad(expected, x, upstream)
    assert back.dtype == wanted.dtype == torch.float32
    assert (back - wanted).abs().max() <= CLOSE[torch.bfloat16] * wanted.abs().max()


# -- gradients


def test_the_way_back_makes_the_rows_again_and_keeps_none() -> None:
    weight, x = Weight(drawn(100, 8), 32), drawn(3, 8).requires_grad_()
    result = weight.times(x)
    there = list(weight.made)
    weight.buffer.fill_(0xFF)
    result.sum().backward()
    assert weight.made == there * 2
    assert_close(x.grad, torch.ones(3, 100) @ weight.weight)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_where_no_gradient_is_asked_none_is_prepared(mode: Callable[[], torch.no_grad]) -> None:
    weight, x = Weight(drawn(100, 8), 32), drawn(3, 8).requires_grad_()
    with mode():
        assert not weight.times(x).requires_grad
    assert not weight.times(x.detach()).requires_grad


def test_gradients_are_those_of_finite_differences() -> None:
    weight = Weight(drawn(21, 5, dtype=torch.float64), 4)
    x, bias = drawn(2, 3, 5, dtype=torch.float64), drawn(21, dtype=torch.float64)
    assert torch.autograd.gradcheck(weight.times, (x.requires_grad_(), bias.requires_grad_()))
    assert torch.autograd.gradcheck(weight.times, (x.detach(), bias))


def test_a_frozen_bias_gets_none_and_a_trained_one_alone_makes_no_rows() -> None:
    weight, x = Weight(drawn(40, 8), 16), drawn(3, 8)
    bias = drawn(40).requires_grad_()
    result = weight.times(x, bias)
    count = len(weight.made)
    result.sum().backward()
    assert len(weight.made) == count
    assert torch.equal(bias.grad, torch.full((40,), 3.0))


# -- lookups

SOURCES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn]


@settings(max_examples=100, deadline=None)
@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    source=st.sampled_from(SOURCES),
    dtype=st.sampled_from(DTYPES),
    ids=st.sampled_from([torch.int32, torch.int64]),
    padding_idx=st.none() | st.integers(-30, 29),
    seed=st.integers(0, 1000),
)
def test_a_lookup_gives_the_bits_of_the_cast_table(
    shape: list[int],
    source: torch.dtype,
    dtype: torch.dtype,
    ids: torch.dtype,
    padding_idx: int | None,
    seed: int,
) -> None:
    table = drawn(30, 7, seed=seed).to(source)
    wanted = torch.randint(30, shape, generator=torch.Generator().manual_seed(seed)).to(ids)
    found = embedding_by_rows(wanted, table, dtype, padding_idx)
    expected = functional.embedding(wanted, table.to(dtype), padding_idx)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    assert found.is_contiguous()


def test_an_id_that_is_no_row_is_refused_as_torch_does() -> None:
    for ids in (torch.tensor([3]), torch.tensor([-1])):
        with pytest.raises(IndexError):
            embedding_by_rows(ids, drawn(3, 4), torch.bfloat16)


def test_a_lookup_is_never_the_table_itself() -> None:
    table = drawn(3, 4)
    embedding_by_rows(torch.arange(3), table, torch.float32).zero_()
    assert torch.equal(table, drawn(3, 4))
