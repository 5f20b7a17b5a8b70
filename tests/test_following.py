"""Tensors that know where their elements come from, against torch on tensors whose values say it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem.modeling.following import Followed, NotFollowedError, follow

Function = Callable[..., Any]


def assembled(result: Followed, sources: Sequence[torch.Tensor]) -> torch.Tensor:
    """The result that the pieces say."""
    made = torch.full((result.numel(),), -1, dtype=torch.int64)
    for piece in result.pieces:
        shape = [n for n, _, _ in piece.dimensions]
        into = made.as_strided(shape, [step for _, step, _ in piece.dimensions], piece.into)
        assert (into == -1).all(), "two pieces lie over each other"
        source = sources[piece.source].flatten()
        into.copy_(source.as_strided(shape, [there for _, _, there in piece.dimensions], piece.offset))
    return made.view(result.shape)


def numbered(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.arange(math.prod(s)).view(s) + 1_000_000 * i for i, s in enumerate(shapes)]


def assert_followed(function: Function, *shapes: tuple[int, ...]) -> list[Followed]:
    """What the function does to followed tensors is what torch does to the values."""
    sources = numbered(*shapes)
    expected = function(*sources)
    found = function(*(follow(i, shape, torch.int64) for i, shape in enumerate(shapes)))
    if isinstance(expected, torch.Tensor):
        expected, found = [expected], [found]
    assert len(expected) == len(found)
    for a, b in zip(expected, found, strict=True):
        assert tuple(a.shape) == tuple(b.shape)
        assert torch.equal(assembled(b, sources), a)
    return list(found)


def interleaved(tensor: torch.Tensor, dim: int, back: bool) -> torch.Tensor:
    shape = list(tensor.shape)
    shape[dim : dim + 1] = [2, shape[dim] // 2] if back else [shape[dim] // 2, 2]
    return tensor.reshape(shape).transpose(dim, dim + 1).reshape(tensor.shape).contiguous()


def rotary(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    rows = tensor.shape[0]
    return tensor.view(heads, rows // heads // 2, 2, -1).transpose(1, 2).reshape(rows, -1)


@pytest.mark.parametrize(
    ("function", "shapes", "pieces"),
    [
        (lambda *t: torch.stack(t), [(3, 4)] * 5, 5),
        (lambda *t: torch.stack(t, dim=1), [(3, 4)] * 2, 2),
        (lambda *t: torch.stack(t, dim=-1), [(3, 4)] * 2, 2),
        (lambda a, b, c, d: torch.cat([torch.stack([a, b]), torch.stack([c, d])], dim=1), [(3, 4)] * 4, 4),
        (lambda a: torch.chunk(a, 3), [(9, 4)], 3),
        (lambda a: torch.chunk(a, 3, dim=1), [(4, 7)], 3),
        (lambda a: torch.split(a, [1, 5, 3], dim=0), [(9, 4)], 3),
        (lambda a: a.transpose(0, 1).contiguous(), [(4, 7)], 1),
        (lambda a: a.T.reshape(2, 14), [(4, 7)], 1),
        (lambda a: interleaved(a, 0, False), [(4, 6, 8)], 1),
        (lambda a: interleaved(a, 1, False), [(4, 6, 8)], 1),
        (lambda a: interleaved(a, 1, True), [(4, 6, 8)], 1),
        (lambda a: torch.chunk(interleaved(a, 1, False), 2, 1), [(4, 6, 8)], 2),
        (lambda a: rotary(a, 3), [(12, 5)], 1),
        (lambda a: [rotary(t, 3) for t in torch.chunk(a, 3)], [(36, 5)], 3),
        (lambda a, b: torch.cat([rotary(a, 3), rotary(b, 3)]), [(12, 5)] * 2, 2),
        (lambda a: torch.stack([t.T for t in a.unbind(0)]), [(3, 4, 5)], 3),
        (lambda a: [t.squeeze(0) for t in torch.chunk(a, 3, 0)], [(3, 1, 5)], 3),
        (lambda a: a.reshape(a.shape[0], -1).contiguous(), [(3, 2, 2, 2, 2)], 1),
        (lambda a: a[:, 1:3].permute(2, 0, 1).flatten(), [(3, 4, 5)], 1),
        (lambda a: a.unsqueeze(0).squeeze().clone().detach(), [(3, 1, 5)], 1),
        (lambda a, b: torch.cat([a, b], dim=1), [(3, 0), (3, 2)], 1),
        (lambda a: a.movedim(0, 2).swapaxes(0, 1).unflatten(0, (2, 2)), [(3, 4, 4)], 1),
        (lambda a: a.narrow(1, 2, 2).select(0, -1), [(3, 4)], 1),
        (lambda a: a, [()], 1),
    ],
)
def test_what_moves_elements_is_followed_in_few_pieces(
    function: Function, shapes: list[tuple[int, ...]], pieces: int
) -> None:
    found = assert_followed(function, *shapes)
    assert sum(len(result.pieces) for result in found) == pieces


@pytest.mark.parametrize(
    "function",
    [
        lambda a: a + 1,
        lambda a: a.flip(0),
        lambda a: a[torch.tensor([1, 0])],
        lambda a: a.to(torch.float32),
        lambda a: a.view(torch.float64),
        lambda a: a[::2],
        lambda a: torch.cat([a, torch.zeros(1, 4, dtype=torch.int64)]),
        lambda a: torch.empty(3, 4, dtype=torch.int64).copy_(a),
        lambda a: a.sum().item(),
        lambda a: a.zero_(),
        lambda a: a.repeat(2, 1),
    ],
)
def test_what_does_more_is_not_followed(function: Function) -> None:
    with pytest.raises(NotFollowedError):
        function(follow(0, (3, 4), torch.int64))


def test_a_wrong_shape_is_an_error_and_nothing_to_compute() -> None:
    """transformers' conversion would fail with values too."""
    a, b = follow(0, (3, 4), torch.int64), follow(1, (3, 5), torch.int64)
    for function in (lambda: torch.stack([a, b]), lambda: torch.cat([a, b]), lambda: a.view(5, 2)):
        with pytest.raises((ValueError, RuntimeError)):
            function()


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], Function]:
    """A few random steps from the tensors of one shape to one tensor."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    count = draw(st.integers(1, 3))
    steps = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["permute", "slice", "split", "flatten", "unflatten", "double"]), st.integers(0, 10**6)
            ),
            max_size=6,
        )
    )
    first = draw(st.sampled_from(["cat", "stack"]))
    dim = draw(st.integers(0, len(shape) - 1))

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        tensor = torch.cat(tensors, dim) if first == "cat" else torch.stack(tensors, dim)
        for step, seed in steps:
            tensor = apply(tensor, step, seed)
        return tensor

    return [shape] * count, function


def apply(tensor: torch.Tensor, step: str, seed: int) -> torch.Tensor:
    dim = seed % tensor.ndim
    length = tensor.shape[dim]
    if step == "permute":
        order = sorted(range(tensor.ndim), key=lambda d: (seed * (d + 3)) % 7)
        return tensor.permute(order).contiguous()
    if step == "slice":
        begin = (seed // 7) % length
        return tensor.narrow(dim, begin, 1 + (seed // 49) % (length - begin))
    if step == "split":
        return torch.cat(torch.split(tensor, 1 + seed % 3, dim)[::-1], dim)
    if step == "flatten":
        return tensor.reshape(-1, *tensor.shape[2:]) if tensor.ndim > 1 else tensor
    if step == "unflatten":
        return (
            tensor.reshape(*tensor.shape[:dim], 2, length // 2, *tensor.shape[dim + 1 :]) if length % 2 == 0 else tensor
        )
    return torch.stack([tensor, tensor], dim) if tensor.numel() < 500 else tensor


@given(chains())
@settings(max_examples=400, deadline=None)
def test_random_chains_are_followed_or_refused(chain: tuple[list[tuple[int, ...]], Function]) -> None:
    shapes, function = chain
    try:
        assert_followed(function, *shapes)
    except NotFollowedError:
        # A reshape may cut across rows that lie apart.
        return
