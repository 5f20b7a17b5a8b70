"""Links narrowed to a rank's part feed just what torch's own slicing of the whole tensor gives."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem.checkpoint import TensorEntry
from lowmem.errors import UnsupportedError
from lowmem.mapping.narrowing import Cutter, narrow
from lowmem.mapping.records import KeyMapping, Link, Region, whole
from lowmem.modeling.sharding import Mesh, Sharding, Split
from lowmem.modeling.targets import Target

pytest.importorskip("torch.distributed.tensor")


@st.composite
def shardings(draw: st.DrawFn, dims: int) -> Sharding:
    """Of up to three dimensions of a mesh, each dividing any dimension of the tensor, evenly or not."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    splits = tuple(
        draw(st.none() | st.builds(Split, st.integers(0, dims - 1), st.integers(1, 3)) if dims else st.none())
        for _ in shape
    )
    return Sharding(Mesh(shape, tuple(range(math.prod(shape)))), splits)


def torch_says(sharding: Sharding, shape: tuple[int, ...], rank: int) -> list[torch.Tensor]:
    """The indices of each dimension that torch's placements leave to a rank."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    at = sharding.mesh.coordinate(rank)
    assert at is not None
    indices = [torch.arange(n) for n in shape]
    for split, count, index in zip(sharding.splits, sharding.mesh.shape, at, strict=True):
        if split is not None:
            kind = Shard(0) if split.groups == 1 else _StridedShard(0, split_factor=split.groups)
            shards, _ = kind._split_tensor(indices[split.dim], count, with_padding=False, contiguous=False)
            indices[split.dim] = shards[index]
    return indices


def taken(whole_tensor: torch.Tensor, indices: list[torch.Tensor]) -> torch.Tensor:
    for dim, index in enumerate(indices):
        whole_tensor = whole_tensor.index_select(dim, index)
    return whole_tensor


@given(data=st.data(), shape=st.lists(st.integers(0, 7), min_size=1, max_size=3).map(tuple))
def test_parts_are_those_of_torch_and_hold_everything(data: st.DataObject, shape: tuple[int, ...]) -> None:
    sharding = data.draw(shardings(len(shape)))
    seen = torch.zeros(shape, dtype=torch.int64)
    for rank in sharding.mesh.ranks:
        part = sharding.part(shape, rank)
        expected = torch_says(sharding, shape, rank)
        found = [torch.tensor([i for b, e in runs for i in range(b, e)], dtype=torch.int64) for runs in part.runs]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert part.shape == tuple(map(len, expected))
        seen[torch.meshgrid(*found, indexing="ij")] += 1
    # Every element is somewhere, as often as another.
    assert not seen.numel() or (int(seen.min()) > 0 and int(seen.min()) == int(seen.max()))


@st.composite
def divided(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Link], int]:
    """A target's shape, links that feed it, and elements of the file: whole, as transposed, of one value repeated, or
    fused of several entries along any dimension, every one of them maybe a view.
    """
    shape = draw(st.lists(st.integers(0, 6), min_size=1, max_size=3).map(tuple))
    cuts = {0, (length := shape[(dim := draw(st.integers(0, len(shape) - 1)))])}
    cuts |= set(draw(st.lists(st.integers(0, length), max_size=2)))
    links, at = [], 0
    for begin, end in itertools.pairwise(sorted(cuts)):
        place = torch.empty(shape, device="meta").narrow(dim, begin, end - begin)
        link, held = draw(_fed(place, math.prod(shape), at))
        links.append(link)
        at += held
    return shape, links, at


@st.composite
def _fed(draw: st.DrawFn, place: torch.Tensor, elements: int, at: int) -> tuple[Link, int]:
    """A link that feeds what `place` is a view of, from element `at` of a file on, and how many elements it reads."""
    order = draw(st.permutations(range(place.dim())))
    kind = draw(st.sampled_from(["dense", "view", "repeated"]))
    into = place.permute(order)
    if kind == "repeated":
        # As pickles may have it: one step of a dimension is no step in the file.
        once = draw(st.integers(0, place.dim() - 1))
        source = torch.empty([1 if i == once else n for i, n in enumerate(place.shape)], device="meta")
        source, into = source.expand(place.shape), place
        held = math.prod(place.shape[:once]) * math.prod(place.shape[once + 1 :]) if place.numel() else 0
    elif kind == "view":
        # Dense in another order of the dimensions, told in that of the target.
        source, held = torch.empty(into.shape, device="meta").permute([order.index(i) for i in range(len(order))]), 0
        into, held = place, place.numel()
    else:
        source, held = torch.empty(into.shape, device="meta"), place.numel()
    region = Region(int(into.storage_offset()), tuple(into.shape), into.stride())
    strides = None if kind == "dense" else source.stride()
    entry = TensorEntry("k", "int64", tuple(source.shape), Path("f"), 8 * at, 8 * held, strides)
    if region.dense and region.count == elements:
        region = whole(tuple(place.shape))
    return Link(entry, "t", region), held


@st.composite
def experts(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Link], int]:
    """As transformers fuses them: links of one geometry, each in a row of its own, or in a half of one."""
    count, rows, width = (draw(st.integers(1, 5)) for _ in range(3))
    halves, turned = draw(st.integers(1, 2)), draw(st.booleans())
    links: list[Link] = []
    for i in range(count * halves):
        offset = i * rows * width
        stored = (width, rows) if turned else (rows, width)
        # Whatever is between them in the file.
        entry = TensorEntry("k", "int64", stored, Path("f"), 8 * (offset + i), 8 * rows * width)
        region = Region(offset, stored, (1, width)) if turned else Region(offset, (rows * width,), (1,))
        links.append(Link(entry, "t", region))
    return (count, halves * rows, width), links, count * halves * (rows * width + 1)


def fed(links: Iterable[Link], shape: tuple[int, ...], file: torch.Tensor) -> torch.Tensor:
    """A tensor with all that links bring there, each element once."""
    found = torch.full(shape, -1, dtype=torch.int64)
    times = torch.zeros(shape, dtype=torch.int64)
    for link in links:
        entry, region = link.entry, link.region
        strides = entry.strides or torch.empty(entry.shape, device="meta").stride()
        assert entry.offset % 8 == 0
        source = file.as_strided(entry.shape, strides, entry.offset // 8)
        assert source.numel() == region.count
        assert region.dense or entry.strides is None or region.shape == entry.shape
        found.view(-1).as_strided(region.shape, region.strides, region.offset).copy_(source.reshape(region.shape))
        times.view(-1).as_strided(region.shape, region.strides, region.offset).add_(1)
    assert bool((times == 1).all())
    return found


@given(case=divided() | experts(), data=st.data())
def test_narrowed_links_feed_what_slicing_gives(
    case: tuple[tuple[int, ...], list[Link], int], data: st.DataObject
) -> None:
    shape, links, elements = case
    file = torch.arange(elements, dtype=torch.int64)
    expected = fed(links, shape, file)
    sharding = data.draw(shardings(len(shape)))
    for rank in sharding.mesh.ranks:
        part = sharding.part(shape, rank)
        cutter, found = Cutter(shape, part), []
        for link in links:
            for one in cutter.cut(link):
                entry = one.entry
                strides = entry.strides or torch.empty(entry.shape, device="meta").stride()
                spanned = 1 + sum((n - 1) * s for n, s in zip(entry.shape, strides, strict=True))
                assert entry.nbytes == (8 * spanned if 0 not in entry.shape else 0)
                assert link.entry.offset <= entry.offset
                assert entry.end <= link.entry.end
                found.append(one)
        assert torch.equal(fed(found, part.shape, file), taken(expected, torch_says(sharding, shape, rank)))


@given(data=st.data(), parts=st.lists(st.integers(1, 6), min_size=1, max_size=3), width=st.integers(1, 5))
def test_rows_of_int8_keep_their_scales(data: st.DataObject, parts: list[int], width: int) -> None:
    """A link of int8 that becomes floats: the rows that a rank has come with the scales of just these rows."""
    shape, links, at = (sum(parts), width), [], 0
    for rows in parts:
        entry = TensorEntry("k", "int8", (rows, width), Path("f"), at * width, rows * width)
        scales = TensorEntry("s", "float32", (rows,), Path("g"), 4 * at, 4 * rows)
        links.append(Link(entry, "t", Region(at * width, (rows * width,), (1,)), True, scales))
        at += rows
    sharding = data.draw(shardings(1))
    for rank in sharding.mesh.ranks:
        part = sharding.part(shape, rank)
        found = []
        for link in links:
            for one in Cutter(shape, part).cut(link):
                assert one.scales is not None
                rows = one.region.count // width
                assert one.scales.shape == (rows,)
                assert (one.entry.nbytes, one.scales.nbytes) == (rows * width, 4 * rows)
                assert one.entry.offset * 4 == one.scales.offset * width
                begin = one.scales.offset // 4
                found += zip(range(one.region.offset // width, shape[0]), range(begin, begin + rows), strict=False)
        indices = torch_says(sharding, shape, rank)[0].tolist()
        assert sorted(found) == list(enumerate(indices))


def test_columns_of_int8_that_becomes_floats_are_refused() -> None:
    entry = TensorEntry("k", "int8", (4, 6), Path("f"), 0, 24)
    link = Link(entry, "t", whole((4, 6)), True, TensorEntry("s", "float32", (4,), Path("f"), 24, 16))
    part = Sharding(Mesh((2,), (0, 1)), (Split(1),)).part((4, 6), 1)
    with pytest.raises(UnsupportedError, match="divided across its rows"):
        Cutter((4, 6), part).cut(link)


def test_a_tied_name_of_which_a_rank_has_nothing_is_fed() -> None:
    """Two names of one tensor, divided in different ways: they are not tied here, and one of them is empty."""
    mesh = Mesh((4,), (0, 1, 2, 3))
    target = Target("a", (3, 8), "float32", "parameter", True, "a", False, sharding=Sharding(mesh, (Split(1),)))
    other = replace(target, name="b", sharding=Sharding(mesh, (Split(0),)))
    entry = TensorEntry("a", "float32", (3, 8), Path("f"), 0, 96)
    mapping = KeyMapping((Link(entry, "a", whole((3, 8))),), {"b": "a"}, {}, (), (), (), (), ())
    local, targets = narrow(mapping, {"a": target, "b": other}, 3)
    assert not local.tied
    assert {link.target: link.region.count for link in local.links} == {"a": 6, "b": 0}
    assert (targets["a"].shape, targets["b"].shape) == ((3, 2), (0, 8))
