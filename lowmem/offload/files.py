"""The files that a running model takes its weights from: mapped once, and looked at before each forward."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from .._mapped_pages import address_of
from .._page_cache import CachedPages, look, read_ahead
from ..checkpoint import Shard, TensorEntry
from ..dtypes import itemsize
from ..engine.mapping import map_shard, view_of
from ..errors import CheckpointError, OffloadError, RunningError
from ..mapping import Link, whole
from ..planner import LoadPlan, Placement
from ..planner.running import is_away
from .observing import Range


class Files:
    """The shards, and files of the offload folder, that hold weights on disk; each is mapped as long as this lives.

    Args:
        plan: of a load that is done.

    Raises:
        CheckpointError: a file is gone, changed, or cannot be mapped.
        OffloadError: the same, of a file that was written.
    """

    def __init__(self, plan: LoadPlan) -> None:
        self._shards: dict[Path, Shard] = {}
        self._pages: dict[Path, mmap.mmap] = {}
        self._addresses: dict[Path, int] = {}
        self._nodes: dict[Path, tuple[int, int]] = {}
        self._cached: dict[Path, CachedPages] = {}
        self._written = {file for placement in plan.placements if (file := _written(plan, placement))}
        known = {shard.file: shard for shard in plan.checkpoint.shards}
        for file in self._written:
            info = self._look_at(file)
            known[file] = Shard(file, info.st_size, info.st_mtime_ns, 0, {})
        used = self._written | {
            entry.file
            for placement in plan.placements
            if placement.residency == "refer"
            for link in placement.links
            for entry in (link.entry, link.scales)
            if entry is not None
        }
        for file in sorted(used):
            self._open(known[file])

    @property
    def read_ahead(self) -> int:
        """Bytes that the kernel itself reads around what is missing, of the file where they are fewest."""
        return min((read_ahead(file) for file in self._shards), default=0)

    def _open(self, shard: Shard) -> None:
        pages = map_shard(shard)
        info = self._look_at(shard.file)
        self._cached[shard.file] = CachedPages(True, 0)
        # What cannot be told is taken for cached: its pages are then left to the kernel.
        with contextlib.suppress(OSError), shard.file.open("rb", buffering=0) as opened:
            self._cached[shard.file] = look(opened.fileno(), shard.size)
        self._shards[shard.file] = shard
        self._pages[shard.file] = pages
        self._nodes[shard.file] = info.st_dev, info.st_ino
        if shard.size:
            self._addresses[shard.file] = address_of(pages)

    def _look_at(self, file: Path) -> os.stat_result:
        try:
            return file.stat()
        except OSError as error:
            kind = OffloadError if file in self._written else CheckpointError
            raise kind(
                f"{file}: gone, or cannot be looked at, before the model used it: {error.strerror or error}; load again"
            ) from error

    def view(self, entry: TensorEntry, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """The tensor of an entry: pages of its file.

        Raises:
            RunningError: the model was released.
        """
        pages = self._pages.get(entry.file)
        if pages is None:
            raise RunningError(f"{entry.file}: tensor {entry.key!r}: the model was released meanwhile; load it again")
        return view_of(pages, entry, shape)

    def range_of(self, entry: TensorEntry) -> Range | None:
        """Address and bytes of the pages of an entry; None of one that is read by way of a copy, or in no file here."""
        base = self._addresses.get(entry.file)
        if base is None or entry.offset % itemsize(entry.dtype):
            return None
        return base + entry.offset, entry.nbytes

    def cached(self, file: Path) -> CachedPages:
        """Which of its pages were in the page cache when it was mapped."""
        return self._cached[file]

    def check(self) -> None:
        """Refuse what was written to since the load. What was removed or replaced is as it was, to whoever maps it.

        Raises:
            CheckpointError: a shard has another size or time.
            OffloadError: the same, of a file that was written by the load.
        """
        for file, shard in self._shards.items():
            try:
                info = file.stat()
            except OSError:
                continue
            if (info.st_size, info.st_mtime_ns) == (shard.size, shard.mtime_ns):
                continue
            if (info.st_dev, info.st_ino) != self._nodes[file]:
                continue
            error, remedy = (
                (OffloadError, "remove it, and load again")
                if file in self._written
                else (CheckpointError, "bring it back, and load again")
            )
            raise error(
                f"{file}: changed while a model on disk uses it (expected {shard.size} bytes and time "
                f"{shard.mtime_ns} ns, found {info.st_size} and {info.st_mtime_ns}); its values can no longer be "
                f"trusted: {remedy}"
            )

    def close(self) -> None:
        """Let go of every mapping; each ends with the last tensor that lies in it."""
        self._pages.clear()
        self._addresses.clear()


def entry_of(placement: Placement, plan: LoadPlan) -> TensorEntry:
    """Where a weight lies that can be used as it lies."""
    file = _written(plan, placement)
    if file is None:
        return placement.links[0].entry
    assert plan.offload is not None
    spans = next(f.spans for f in plan.offload.files if plan.offload.folder / f.name == file)
    offset, nbytes = spans[placement.target]
    return TensorEntry(placement.target, placement.dtype, placement.shape, file, offset, nbytes)


def as_lying(placement: Placement, plan: LoadPlan) -> Placement:
    """The same, fed from where it was written."""
    if placement.residency != "write":
        return placement
    entry = entry_of(placement, plan)
    return replace(placement, residency="refer", links=(Link(entry, placement.target, whole(placement.shape)),))


def away(plan: LoadPlan) -> Iterable[Placement]:
    """Every weight that is elsewhere than where it computes."""
    return (p for p in plan.placements if is_away(p, plan.main_device) and p.residency != "init" and p.nbytes)


def _written(plan: LoadPlan, placement: Placement) -> Path | None:
    if placement.residency != "write" or plan.offload is None:
        return None
    return plan.offload.find(placement.target)
