"""Weights that accelerate cannot open, from their files at use."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from ..checkpoint import TensorEntry
from ..engine.mapping import map_shard, view_of
from ..planner import LoadPlan, Placement
from .making import is_whole, make


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
        if is_whole(placement):
            return self._view(placement.links[0].entry, placement.shape).to(dtype)
        tensor = torch.empty(placement.shape, dtype=dtype)
        make(placement, self._view, tensor)
        return tensor

    def _view(self, entry: TensorEntry, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        return view_of(self._mapped(entry), entry, shape)

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
