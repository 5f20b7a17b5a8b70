"""Weights that are not in their files as the model has them: cast, put together, or turned from int8 into floats."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from ..engine.destinations import fill
from ..int8 import dequantise, work_size
from ..mapping import Link, Region
from ..planner import Placement
from ..planner.moves import is_one

# Gives the tensor of an entry, of another shape if one is given.
View = Callable[..., torch.Tensor]


def make(placement: Placement, view: View, into: torch.Tensor) -> None:
    """Write the whole weight into a dense tensor of its shape and final dtype.

    Args:
        placement: says what feeds it.
        view: gives the pages of an entry's file as a tensor.
        into: where it goes.
    """
    if is_whole(placement):
        into.copy_(view(placement.links[0].entry, placement.shape))
    else:
        _fill(into, placement.links, view)


def make_part(placement: Placement, index: int, links: Iterable[Link], view: View, into: torch.Tensor) -> None:
    """As `make`, of `weight[index]` alone: what feeds it must lie in no other part (`planner.running.parts_of`).

    Args:
        placement: says what feeds it.
        index: of the part.
        links: those of it that feed the part (`links_of_parts`).
        view: gives the pages of an entry's file as a tensor.
        into: where it goes.
    """
    if is_whole(placement):
        into.copy_(view(placement.links[0].entry, placement.shape)[index])
        return
    begin = index * into.numel()
    _fill(into, [replace(link, region=_moved(link.region, begin)) for link in links], view)


def links_of_parts(placement: Placement) -> list[list[Link]]:
    """What feeds each `weight[index]`, where they are not in one piece together."""
    step = math.prod(placement.shape[1:])
    found: list[list[Link]] = [[] for _ in range(placement.shape[0])]
    for link in placement.links:
        found[link.region.offset // step].append(link)
    return found


def make_rows(placement: Placement, begin: int, end: int, view: View, into: torch.Tensor) -> None:
    """As `make`, of `weight[begin:end]` alone, where `planner.running.comes_by_rows`."""
    if is_whole(placement):
        into.copy_(view(placement.links[0].entry, placement.shape)[begin:end])
        return
    for link in placement.links:
        _fill_rows(link, begin, end, view, into)


def is_whole(placement: Placement) -> bool:
    """Whether all of it lies in one place, though perhaps in another dtype."""
    return is_one(placement.links, placement.shape) and not placement.links[0].scales


def _moved(region: Region, by: int) -> Region:
    return replace(region, offset=region.offset - by)


def _fill(tensor: torch.Tensor, links: Iterable[Link], view: View) -> None:
    for link in links:
        source = view(link.entry)
        if link.scales is None:
            fill(tensor, link.region, source)
        else:
            _fill_from_int8(tensor, link.region, source, view(link.scales))


def _fill_rows(link: Link, begin: int, end: int, view: View, into: torch.Tensor) -> None:
    """Those elements of a link's dense region that lie in some rows of the weight."""
    region = link.region
    row = into.shape[1]
    first = max(0, begin * row - region.offset)
    behind = min(region.count, end * row - region.offset)
    if first >= behind:
        return
    source = view(link.entry).view(-1)[first:behind]
    place = into.view(-1)[region.offset + first - begin * row :][: behind - first]
    if link.scales is None:
        place.copy_(source)
        return
    wide = region.count // link.scales.shape[0]
    scales = view(link.scales)[first // wide : behind // wide]
    work = torch.empty(work_size(wide), dtype=torch.uint8)
    dequantise(source.view(-1, wide), scales, place.view(-1, wide), work)


def _fill_from_int8(tensor: torch.Tensor, region: Region, source: torch.Tensor, scales: torch.Tensor) -> None:
    """As `fill`, of int8 rows and their scales. Where rows are no rows of the region, by way of a copy in floats."""
    if not source.numel():
        return
    rows = scales.numel()
    values = source.view(rows, -1) if source.is_contiguous() else source
    work = torch.empty(work_size(values.shape[1]), dtype=torch.uint8)
    offset = tensor.storage_offset() + region.offset
    if region.shape == values.shape:
        dequantise(values, scales, tensor.as_strided(region.shape, region.strides, offset), work)
    elif region.dense:
        dequantise(values, scales, tensor.as_strided((region.count,), (1,), offset).view(values.shape), work)
    else:
        floats = torch.empty(values.shape, dtype=tensor.dtype)
        dequantise(values, scales, floats, work)
        fill(tensor, region, floats)
