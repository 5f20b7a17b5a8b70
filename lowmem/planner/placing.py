"""Where each tensor of the model goes: on which device, and whether it is mapped, copied, referred to or written."""

from __future__ import annotations

import functools
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from .._page_cache import cached_share
from ..checkpoint import Checkpoint
from ..dtypes import itemsize
from ..errors import PlacementError, UnsupportedError
from ..limits import HostMemory
from ..mapping import KeyMapping, Link
from ..modeling.conversions import Cost
from ..modeling.skeleton import Skeleton
from ..sizes import format_size
from .computed import group_of
from .devices import DeviceMap
from .final_dtypes import nbytes_of
from .moves import Placement, Residency, has_parts_of_rows, has_whole_rows, is_one, rounds_through
from .records import Group, LoadRequest


@dataclass(frozen=True)
class Draft:
    """What is settled before devices are."""

    checkpoint: Checkpoint
    skeleton: Skeleton
    mapping: KeyMapping
    request: LoadRequest
    final: Mapping[str, str]
    warnings: tuple[str, ...]
    memory: HostMemory
    no_split: tuple[str, ...]
    # Of each computation, and what its sources are cast to.
    costs: tuple[tuple[Cost, str], ...] = ()
    # How much of a file is in the page cache: looked at once, however many maps are tried.
    cached: Callable[[Path], float] = field(default_factory=lambda: functools.cache(cached_share))


def to_initialise(skeleton: Skeleton, mapping: KeyMapping) -> list[list[str]]:
    """Targets that nothing feeds and that have no values yet: the names of each tie group."""
    groups: dict[str, list[str]] = {}
    for name in (*mapping.missing, *mapping.excused, *(m.target for m in mapping.mismatched)):
        target = skeleton.targets[name]
        # A key of another shape under a tied name leaves the tie as it is.
        if not target.real and name not in mapping.tied:
            groups.setdefault(target.tie, []).append(name)
    return list(groups.values())


def kept_as_built(skeleton: Skeleton, mapping: KeyMapping) -> list[str]:
    """Targets that nothing feeds and that keep the values which the model was built with."""
    names = (*mapping.missing, *mapping.excused, *(m.target for m in mapping.mismatched))
    return [name for name in names if skeleton.targets[name].real and name not in mapping.tied]


def place(draft: Draft, devices: DeviceMap) -> tuple[list[Placement], list[Group], list[str]]:
    """A placement per tensor and device, in file order, then what is computed, and what the model initialises."""
    followers: dict[str, list[str]] = defaultdict(list)
    for name, leader in draft.mapping.tied.items():
        followers[leader].append(name)
    targets, final = draft.skeleton.targets, draft.final
    placements: list[Placement] = []
    warnings: list[str] = []

    def add(names: tuple[str, ...], device: str, residency: Residency, links: tuple[Link, ...]) -> None:
        name = names[0]
        shape, dtype = targets[name].shape, final[name]
        scales, through = None, ""
        if targets[name].scales in draft.mapping.made:
            through = rounds_through(links[0].entry.dtype, _floats_of(draft, name))
            other = targets[name].scales
            size = nbytes_of(targets[other].shape, final[other])
            scales = Placement(other, (other,), targets[other].shape, final[other], size, device, residency, ())
        nbytes = nbytes_of(shape, dtype)
        placements.append(
            Placement(name, names, shape, dtype, nbytes, device, residency, links, scales, through=through)
        )
        if scales is not None:
            placements.append(scales)

    def add_all(name: str, links: tuple[Link, ...]) -> None:
        device = _device_of(draft, devices, name)
        if name not in followers:
            add((name,), device, _residency(draft, device, name, links), links)
            return
        by_device = {device: [name]}
        for follower in followers[name]:
            by_device.setdefault(_device_of(draft, devices, follower), []).append(follower)
        if draft.request.dispatch == "lowmem":
            _join_away(by_device, devices.main_device)
        if len(by_device) > 1:
            warnings.append(f"{name!r} is tied across {', '.join(by_device)}: one copy on each")
        for device, names in by_device.items():
            add(tuple(names), device, _residency(draft, device, names[0], links), links)

    for name, links in _by_target(draft.mapping).items():
        add_all(name, links)
    warnings += _part(placements)
    groups = []
    for computation, (cost, dtype) in zip(draft.mapping.computed, draft.costs, strict=True):
        results = []
        for name in computation.targets:
            begin = len(placements)
            add_all(name, ())
            results.append(tuple(placements[begin:]))
        groups.append(group_of(computation, cost, dtype, results))
    for names in to_initialise(draft.skeleton, draft.mapping):
        device = _device_of(draft, devices, names[0])
        # What has no file yet cannot stay on disk.
        add(tuple(names), "cpu" if device == "disk" else device, "init", ())
    return placements, groups, warnings


def _join_away(by_device: dict[str, list[str]], main_device: str) -> None:
    """What is tied and computes on one device is one, wherever the map has its names: in memory if any of them is."""
    away = [device for device in ("cpu", "disk") if device in by_device and device != main_device]
    if not away:
        return
    to = main_device if main_device in by_device else away[0]
    names = [name for device in (to, *away) if device in by_device for name in by_device.pop(device)]
    by_device[to] = names


def _floats_of(draft: Draft, name: str) -> str:
    """The dtype that a weight would have, were it not int8; empty for that of the checkpoint."""
    if draft.skeleton.rules.owns_dtypes:
        return draft.skeleton.targets[name].floats
    return "" if draft.request.dtype == "auto" else draft.request.dtype


def _by_target(mapping: KeyMapping) -> dict[str, tuple[Link, ...]]:
    """Every link of each target, in the order of their first ones."""
    found: dict[str, tuple[Link, ...]] = {}
    several: dict[str, list[Link]] = {}
    for link in mapping.links:
        name = link.target
        if name not in found:
            found[name] = (link,)
        elif name in several:
            several[name].append(link)
        else:
            several[name] = [*found[name], link]
    for name, links in several.items():
        found[name] = tuple(links)
    return found


def _part(placements: list[Placement]) -> list[str]:
    """Let tensors that lie over each other in the checkpoint, and are not tied, have memory of their own: in place;
    returns warnings. Whoever changes one that is mapped would change the other.
    """
    mapped = [(p.links[0].entry.offset, i, p) for i, p in enumerate(placements) if p.residency == "map" and p.nbytes]
    # The parts of a tensor are in the order in which the model takes them.
    mapped.sort()
    reached: dict[Path, tuple[int, Placement]] = {}
    apart = []
    for _, i, placement in mapped:
        entry = placement.links[0].entry
        behind = entry.end
        end, other = reached.get(entry.file, (0, placement))
        if entry.offset < end:
            placements[i] = replace(placement, residency="copy")
            apart.append(f"{placement.target!r} and {other.target!r}")
        if behind > end:
            reached[entry.file] = behind, placement
    if not apart:
        return []
    return [
        f"{len(apart)} tensors share bytes in the checkpoint that the model does not tie ({apart[0]}"
        f"{', …' if len(apart) > 1 else ''}): each is copied but one"
    ]


def _device_of(draft: Draft, devices: DeviceMap, name: str) -> str:
    """Where it lies. Buffers of layers that are elsewhere stay where they compute.

    By accelerate's hooks only weights of a module that the map names can wait elsewhere.
    """
    if devices.only == "cpu":
        return "cpu"
    device = devices.of(name)
    assert device is not None
    waits = device == "disk" or (device == "cpu" and devices.main_device != "cpu")
    stays = draft.request.dispatch == "accelerate" and name in devices.table
    if waits and (stays or draft.skeleton.targets[name].kind == "buffer"):
        return devices.main_device
    return device


def check_reachable(placements: Sequence[Placement]) -> None:
    """Weights that stay on disk are mapped when they are used; safetensors, which does so, takes only names in UTF-8.

    Raises:
        PlacementError: a shard's path that could not be opened at run time, or a tensor that cannot be mapped.
    """
    for placement in placements:
        if placement.residency != "refer":
            continue
        odd = [link.entry for link in placement.links if link.entry.packed or link.entry.swapped]
        if odd:
            how = "packed" if odd[0].packed else "big-endian"
            raise PlacementError(
                f"{odd[0].file}: tensor {odd[0].key!r}: expected one that can stay on disk as it lies, found it {how}; "
                "give offload_folder= (--offload-folder DIR), where it is written once"
            )
    for file in {link.entry.file for p in placements if p.residency == "refer" for link in p.links}:
        try:
            os.fspath(file).encode("utf-8")
        except UnicodeEncodeError:
            raise PlacementError(
                f"{os.fsencode(file)!r}: weights that stay on disk need a path in UTF-8; rename the folder"
            ) from None


def layers_not_by_rows(skeleton: Skeleton, mapping: KeyMapping) -> list[str]:
    """Names of layers that are to become int8, and whose rows are not told apart in what feeds them."""
    odd: dict[str, None] = {}
    for link in mapping.links:
        target = skeleton.targets[link.target]
        if target.scales in mapping.made and target.scales:
            row = target.shape[1]
            if not has_whole_rows(link, row) and not has_parts_of_rows(link, row):
                odd[link.target.removesuffix(".weight")] = None
    return list(odd)


def check_rows(placements: Sequence[Placement]) -> None:
    """What becomes int8 or floats by rows must come in rows, or in parts of rows that are told apart.

    Raises:
        UnsupportedError: it does not.
    """
    for placement in placements:
        for link in placement.links if placement.residency in ("copy", "write") else ():
            row = placement.row_of(link)
            if not row or has_whole_rows(link, row) or (link.scales is None and has_parts_of_rows(link, row)):
                continue
            remedy = "leave its module out by skip_modules= (--skip-modules)"
            if link.scales is not None:
                remedy = "load it with the library that wrote it, and save it as floats"
            raise UnsupportedError(
                f"{link.entry.file}: tensor {link.entry.key!r}: expected rows of {placement.target!r} that are taken "
                f"as they lie, found them spread over more dimensions, or larger than a chunk; {remedy}"
            )


def passing_scales(placements: Sequence[Placement]) -> int:
    """Bytes of scales that are in memory during the load and no longer."""
    moved = [p for p in placements if p.residency in ("copy", "write")]
    entries = {link.scales for p in moved for link in p.links if link.scales is not None}
    made = [p.scales for p in moved if p.scales is not None and p.is_measured]
    return sum(4 * entry.shape[0] for entry in entries) + sum(p.nbytes for p in made)


def _residency(draft: Draft, device: str, name: str, links: tuple[Link, ...]) -> Residency:
    if not links:
        if device == "disk" and draft.request.offload_folder is None:
            raise PlacementError(
                f"{draft.checkpoint.source}: {name!r} would be on disk, and it is computed while loading: expected a "
                "file to write it into; give offload_folder= (--offload-folder DIR), or another device"
            )
        return "write" if device == "disk" else "copy"
    final, made = draft.final[name], draft.mapping.made
    if device == "disk" and draft.request.offload_folder is None and draft.skeleton.targets[name].scales in made:
        raise PlacementError(
            f"{draft.checkpoint.source}: {name!r} would be on disk, and it becomes int8 while loading: expected a file "
            "to write it into; give offload_folder= (--offload-folder DIR), or another device"
        )
    lies = is_one(links, draft.skeleton.targets[name].shape, final)
    if device == "disk":
        # Without a folder to write to, it is put together and cast whenever it is used.
        return "refer" if lies or draft.request.offload_folder is None else "write"
    # torch reads a tensor only at a multiple of its element size; odd headers and old files break that.
    mappable = lies and device == "cpu" and draft.request.residency == "map"
    return "map" if mappable and links[0].entry.offset % itemsize(final) == 0 else "copy"


def made_at_use(placements: Sequence[Placement]) -> list[str]:
    """What has to be done to weights on disk whenever they are used: warnings."""
    cast, parts = [], []
    for placement in placements:
        if placement.residency != "refer":
            continue
        if not is_one(placement.links, placement.shape):
            parts.append(placement)
        elif placement.links[0].entry.dtype != placement.dtype:
            cast.append(placement)
    texts = (
        (cast, "change dtype: each is cast whenever it is used"),
        (parts, "are not in one piece in the checkpoint: each is put together whenever it is used"),
    )
    return [
        f"{len(found)} tensors on disk ({found[0].target!r}, …; {format_size(sum(p.nbytes for p in found))}) {text}; "
        "offload_folder= (--offload-folder DIR) writes them once instead"
        for found, text in texts
        if found
    ]
