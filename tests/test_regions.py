"""A region cut into pieces is the region: once each, in row-major order, no piece too large."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem.mapping.records import Region, whole


@st.composite
def views(draw: st.DrawFn) -> torch.Tensor:
    """A view of a dense tensor that holds 0, 1, 2, …, by permuting, narrowing and selecting."""
    shape = draw(st.lists(st.integers(1, 6), max_size=4))
    view = torch.arange(math.prod(shape)).view(shape)
    for _ in range(draw(st.integers(0, 4))):
        if view.dim() == 0:
            break
        dim = draw(st.integers(0, view.dim() - 1))
        kind = draw(st.sampled_from(["permute", "narrow", "select"]))
        if kind == "permute":
            view = view.permute(draw(st.permutations(range(view.dim()))))
        elif kind == "narrow":
            start = draw(st.integers(0, view.shape[dim]))
            view = view.narrow(dim, start, draw(st.integers(0, view.shape[dim] - start)))
        elif view.shape[dim]:
            view = view.select(dim, draw(st.integers(0, view.shape[dim] - 1)))
    return view


def region_of(view: torch.Tensor) -> Region:
    return Region(view.storage_offset(), tuple(view.shape), view.stride())


def part(base: torch.Tensor, region: Region) -> torch.Tensor:
    return base.as_strided(region.shape, region.strides, region.offset)


def flat(view: torch.Tensor) -> torch.Tensor:
    """All that lies under the view, in one dimension."""
    return torch.empty(0, dtype=view.dtype).set_(view.untyped_storage())


@given(view=views(), most=st.integers(1, 50))
def test_pieces_cover_the_region_once_in_row_major_order(view: torch.Tensor, most: int) -> None:
    base, seen = flat(view), []
    for before, piece in region_of(view).pieces(most):
        assert before == len(seen)
        assert 1 <= piece.count <= most
        seen += part(base, piece).flatten().tolist()
    assert seen == view.flatten().tolist()


@given(view=views(), most=st.integers(1, 50))
def test_writing_through_the_pieces_is_copying_into_the_view(view: torch.Tensor, most: int) -> None:
    region, source = region_of(view), torch.randn(view.shape)
    expected = torch.zeros(len(flat(view)))
    found = expected.clone()
    part(expected, region).copy_(source)
    for before, piece in region.pieces(most):
        part(found, piece).copy_(source.flatten()[before : before + piece.count].view(piece.shape))
    assert torch.equal(found, expected)


@given(view=views())
def test_dense_means_contiguous(view: torch.Tensor) -> None:
    region = region_of(view)
    assert region.count == view.numel()
    if region.count:
        assert region.dense == view.is_contiguous()


@given(shape=st.lists(st.integers(1, 9), max_size=4), most=st.integers(1, 50))
def test_a_dense_region_is_cut_into_the_fewest_pieces(shape: list[int], most: int) -> None:
    region = whole(tuple(shape))
    pieces = [piece for _, piece in region.pieces(most)]
    assert len(pieces) == math.ceil(math.prod(shape) / most)
    assert all(len(piece.shape) == 1 and piece.dense for piece in pieces)


def test_rows_that_fit_are_taken_together() -> None:
    """A transposed part is cut along its rows, as many at a time as fit."""
    region = Region(2, (5, 3), (1, 10))
    assert list(region.pieces(7)) == [
        (0, Region(2, (2, 3), (1, 10))),
        (6, Region(4, (2, 3), (1, 10))),
        (12, Region(6, (1, 3), (1, 10))),
    ]


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3, 2)])
def test_an_empty_region_has_no_pieces(shape: tuple[int, ...]) -> None:
    assert list(Region(0, shape, tuple(1 for _ in shape)).pieces(4)) == []
    assert list(whole(shape).pieces(4)) == []


def test_a_scalar_is_one_piece() -> None:
    assert list(Region(7, (), ()).pieces(1)) == [(0, Region(7, (1,), (1,)))]
