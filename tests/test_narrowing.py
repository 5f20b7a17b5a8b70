"""Links narrowed to a rank's part feed just what torch's own slicing of the whole tensor gives."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem.checkpoint import TensorEntry
from lowmem.mapping.narrowing import Cutter
from lowmem.mapping.records import Link, Region, whole
from lowmem.modeling.sharding import Mesh, Sharding, Split

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
def divided(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[Link, torch.Tensor]]]:
    """A target's shape, and links that feed it, each with the elements (bytes of a file) of its entry: whole, as
    transposed, or fused of several entries along any dimension, every one of them maybe a view.
    """
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple))
    cuts = {0, (length := shape[(dim := draw(st.integers(0, len(shape) - 1)))])}
    cuts |= set(draw(st.lists(st.integers(0, length), max_size=2)))
    numbers = torch.arange(math.prod(shape), dtype=torch.int64).view(shape)
    links, at = [], 0
    ends = sorted(cuts)
    for begin, end in itertools.pairwise(ends):
        view = numbers.narrow(dim, begin, end - begin)
        order = draw(st.permutations(range(len(shape))))
        # What lies in the file is dense in another order of the dimensions.
        stored = view.permute(order).contiguous()
        into = torch.empty(shape, device="meta").narrow(dim, begin, end - begin).permute(order)
        region = Region(int(into.storage_offset()), tuple(into.shape), into.stride())
        if draw(st.booleans()):
            # The same, told the other way: a view of the file's bytes in the order of the target.
            inverse = [order.index(i) for i in range(len(shape))]
            back = stored.permute(inverse)
            place = torch.empty(shape, device="meta").narrow(dim, begin, end - begin)
            region = Region(int(place.storage_offset()), tuple(place.shape), place.stride())
            entry = TensorEntry("k", "int64", tuple(back.shape), Path("f"), 8 * at, stored.nbytes, back.stride())
        else:
            entry = TensorEntry("k", "int64", tuple(stored.shape), Path("f"), 8 * at, stored.nbytes)
        if region.dense and region.count == numbers.numel():
            region = whole(shape)
        links.append((Link(entry, "t", region), stored.flatten()))
        at += stored.numel()
    return shape, links


@given(case=divided(), data=st.data())
def test_narrowed_links_feed_what_slicing_gives(
    case: tuple[tuple[int, ...], list[tuple[Link, torch.Tensor]]], data: st.DataObject
) -> None:
    shape, links = case
    file = torch.cat([stored for _, stored in links])
    expected = torch.arange(math.prod(shape), dtype=torch.int64).view(shape)
    sharding = data.draw(shardings(len(shape)))
    for rank in sharding.mesh.ranks:
        part = sharding.part(shape, rank)
        cutter = Cutter(shape, part)
        found = torch.full(part.shape, -1, dtype=torch.int64)
        elements = 0
        for link, _ in links:
            for narrow in cutter.cut(link):
                entry, region = narrow.entry, narrow.region
                strides = entry.strides or torch.empty(entry.shape, device="meta").stride()
                source = file.as_strided(entry.shape, strides, entry.offset // 8)
                assert entry.offset % 8 == 0
                spanned = 1 + sum((n - 1) * s for n, s in zip(entry.shape, strides, strict=True))
                assert entry.nbytes == 8 * spanned
                assert link.entry.offset <= entry.offset
                assert entry.end <= link.entry.end
                assert source.numel() == region.count
                into = found.view(-1).as_strided(region.shape, region.strides, region.offset)
                assert region.dense or entry.strides is None or region.shape == entry.shape
                into.copy_(source.reshape(region.shape))
                elements += region.count
        assert torch.equal(found, taken(expected, torch_says(sharding, shape, rank)))
        assert elements == found.numel()
