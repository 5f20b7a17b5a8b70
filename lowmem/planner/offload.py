"""The offload folder, planned: what will be written, under which fingerprint, and whether it is there already."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._files import check_weight, open_regular, read_small
from ..checkpoint import Checkpoint, Shard
from ..checkpoint.records import origin_of
from ..checkpoint.safetensors import layout
from ..dtypes import itemsize
from ..mapping import Link
from ..sizes import MIB
from .moves import Placement
from .records import Group, OffloadFile, OffloadPlan

FORMAT = "lowmem-offload/2"
INDEX = "lowmem-offload.json"
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def plan_offload(
    checkpoint: Checkpoint, placements: Sequence[Placement], root: Path, groups: Sequence[Group] = (), maker: str = ""
) -> OffloadPlan | None:
    """The files for every placement that must be written; None when there is none.

    One file per shard that feeds it, so that the load stays in file order. The folder inside `root` is named after
    the fingerprint: another model, dtype or source never meets these files.

    Args:
        checkpoint: what they are made of.
        placements: all of the load.
        root: the user's folder.
        groups: what is computed.
        maker: what tells the computing model from another.
    """
    made = {place: group.sources for group in groups for places in group.results for place in places}
    made.update({p.scales: (p,) for p in placements if p.scales is not None})
    written = [p for p in placements if p.residency == "write"]
    if not written:
        return None
    by_shard: dict[Path, list[Placement]] = {}
    for placement in written:
        links = _links_of(placement, made)
        by_shard.setdefault(links[0].entry.file, []).append(placement)
    names = {place: group.what for group in groups for places in group.results for place in places}
    fingerprint = _fingerprint(checkpoint, written, made, names, maker)
    files = []
    for number, held in enumerate(by_shard.values(), start=1):
        if any(p.scales is not None for p in held):
            # Behind rows of int8 the scales might begin where torch cannot read them.
            held.sort(key=lambda p: -itemsize(p.dtype))
        head, spans, size = layout([(p.target, p.dtype, p.shape) for p in held], {"format": "pt"})
        files.append(OffloadFile(f"offload-{number:05d}-of-{len(by_shard):05d}.safetensors", head, size, spans))
    folder = root / fingerprint[:16]
    plan = OffloadPlan(folder, fingerprint, tuple(files), reused=False)
    return OffloadPlan(folder, fingerprint, tuple(files), reused=True) if is_finished(plan) else plan


def _links_of(placement: Placement, made: Mapping[Placement, Sequence[Placement]]) -> tuple[Link, ...]:
    """What feeds it, or what feeds those that it is made of."""
    if placement.links:
        return placement.links
    return tuple(link for source in made[placement] for link in source.links)


def _fingerprint(
    checkpoint: Checkpoint,
    written: Sequence[Placement],
    made: Mapping[Placement, Sequence[Placement]],
    names: Mapping[Placement, str],
    maker: str,
) -> str:
    """SHA-256 over the source files (name, size, time, header end) and every tensor made from them."""
    links = [link for p in written for link in _links_of(p, made)]
    used = {link.entry.file for link in links} | {link.scales.file for link in links if link.scales is not None}
    shards = {shard.file: shard for shard in checkpoint.shards}
    table: Any = {
        "format": FORMAT,
        "shards": [
            [str(s.file.resolve()), s.size, s.mtime_ns, s.data_offset] for s in checkpoint.shards if s.file in used
        ],
        "tensors": [
            [
                p.target,
                [p.dtype, p.through] if p.through else p.dtype,
                p.shape,
                [_link_row(link, shards[link.entry.file]) for link in _links_of(p, made)],
            ]
            for p in written
        ],
    }
    computed = [[p.target, names[p], [source.dtype for source in made[p]]] for p in written if p in names]
    if computed:
        table["computed"] = [maker, computed]
    return hashlib.sha256(json.dumps(table, separators=(",", ":")).encode()).hexdigest()


def _link_row(link: Link, shard: Shard) -> list[Any]:
    entry, region = link.entry, link.region
    source: list[Any] = [entry.key, entry.dtype, origin_of(entry, shard), entry.shape, entry.strides, entry.swapped]
    if link.scales is not None:
        source += [link.scales.key, link.scales.dtype, link.scales.file.name, link.scales.offset]
    return [*source, region.offset, region.shape, region.strides]


def boot_id() -> str | None:
    """What names the time since the machine started; None where that is not told."""
    try:
        return _BOOT.read_text(encoding="ascii").strip() or None
    except (OSError, ValueError):
        return None


def index_of(plan: OffloadPlan, source: str, folder: Path, boot: str | None) -> dict[str, Any]:
    """The index that makes a folder a finished one; written last, when the files in `folder` are whole.

    `boot` is the `boot_id` of a folder whose bytes may still be on their way to the disk: after the machine has
    started anew they may be lost, so the folder then counts as unfinished. None when they are on the disk.
    """
    return {
        "format": FORMAT,
        "boot": boot,
        "source": source,
        "fingerprint": plan.fingerprint,
        "files": {file.name: file.size for file in plan.files},
        "mtimes": {file.name: (folder / file.name).stat().st_mtime_ns for file in plan.files},
        "tensors": {target: file.name for file in plan.files for target in file.spans},
    }


def is_finished(plan: OffloadPlan) -> bool:
    """Whether the folder holds exactly these files, whole. Reads the index and the headers only."""
    return not isinstance(read_finished(plan), str)


def read_finished(plan: OffloadPlan) -> Mapping[str, Any] | str:
    """The index of a folder that holds exactly these files, whole, and in itself; of another in a few words why not.

    What is a link may be anybody's, and may lead to anything.
    """
    try:
        if plan.folder.is_symlink():
            return "it is a link"
        # An index has for each tensor less than its header, but for the escapes of JSON, and the source's path.
        raw = read_small(plan.folder / INDEX, MIB + 4 * sum(len(file.head) for file in plan.files), links=False)
        check_weight(raw, plan.nbytes)
        index: dict[str, Any] = json.loads(raw)
        if index.get("format") != FORMAT or index.get("fingerprint") != plan.fingerprint:
            return "of another load"
        if index["boot"] is not None and index["boot"] != boot_id():
            return "the machine was started anew before its bytes were on the disk"
        for file in plan.files:
            with open_regular(plan.folder / file.name, links=False) as opened:
                info = os.fstat(opened.fileno())
                if (info.st_size, info.st_mtime_ns) != (file.size, index["mtimes"].get(file.name)):
                    return f"{file.name} was written to"
                if opened.read(len(file.head)) != file.head:
                    return f"{file.name} begins otherwise"
    except OSError as error:
        return f"{error.filename or INDEX}: {error.strerror or error}"
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return f"{INDEX} is damaged"
    return index
