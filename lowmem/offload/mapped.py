"""Weights that accelerate cannot open, from their files at use."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from ..checkpoint import TensorEntry
from ..engine.destinations import fill
from ..engine.mapping import map_shard, view_of
from ..int8 import dequantise, work_size
from ..mapping import Region
from ..planner import LoadPlan, Placement
from ..planner.moves import is_one


class MappedWeights(Mapping[str, torch.Tensor]):
    """Weights that stay in their files, mapped when they are first used, beside others that are in memory.

    Args:
        kept: name → tensor in memory.
        lying: name → where it lies.
        plan: gives the files.
    """

    def __init__(self, kept: Mapping[str, torch.Tensor], lying: Mapping[str, Placement], plan: LoadPlan) -> None:
        self._kept = kept
        self._lying = lying
        self._shards = {shard.file: shard for shard in plan.checkpoint.shards}
        self._pages: dict[Path, mmap.mmap] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor at its final dtype: pages of the file where nothing changes, else put together from its parts.

        Raises:
            CheckpointError: the file changed since the load.
        """
        if name in self._kept:
            return self._kept[name]
        placement = self._lying[name]
        dtype: torch.dtype = getattr(torch, placement.dtype)
        if is_one(placement.links, placement.shape) and not placement.links[0].scales:
            entry = placement.links[0].entry
            return view_of(self._mapped(entry), entry, placement.shape).to(dtype)
        tensor = torch.empty(placement.shape, dtype=dtype)
        for link in placement.links:
            source = view_of(self._mapped(link.entry), link.entry)
            scales = link.scales
            if scales is None:
                fill(tensor, link.region, source)
            else:
                _fill_from_int8(tensor, link.region, source, view_of(self._mapped(scales), scales))
        return tensor

    def _mapped(self, entry: TensorEntry) -> mmap.mmap:
        pages = self._pages.get(entry.file)
        if pages is None:
            pages = self._pages[entry.file] = map_shard(self._shards[entry.file])
        return pages

    def __contains__(self, name: object) -> bool:
        return name in self._kept or name in self._lying

    def __iter__(self) -> Iterator[str]:
        yield from self._kept
        yield from self._lying

    def __len__(self) -> int:
        return len(self._kept) + len(self._lying)


def _fill_from_int8(tensor: torch.Tensor, region: Region, source: torch.Tensor, scales: torch.Tensor) -> None:
    """As `fill`, of int8 rows and their scales. Where rows are no rows of the region, by way of a copy in floats."""
    if not source.numel():
        return
    rows = scales.numel()
    values = source.view(rows, -1) if source.is_contiguous() else source
    work = torch.empty(work_size(values.shape[1]), dtype=torch.uint8)
    if region.shape == values.shape:
        dequantise(values, scales, tensor.as_strided(region.shape, region.strides, region.offset), work)
    elif region.dense:
        dequantise(values, scales, tensor.as_strided((region.count,), (1,), region.offset).view(values.shape), work)
    else:
        floats = torch.empty(values.shape, dtype=tensor.dtype)
        dequantise(values, scales, floats, work)
        fill(tensor, region, floats)
