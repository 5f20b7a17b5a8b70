"""The planner: checkpoint, mapping and request become a `LoadPlan`, or a refusal. No tensor byte is read."""

from __future__ import annotations

import functools
import mmap
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .._mounts import memory_file_system
from ..checkpoint import Checkpoint
from ..dtypes import itemsize
from ..errors import BudgetError, PlacementError
from ..limits import HostMemory, device_memory, host_memory
from ..mapping import KeyMapping
from ..modeling.skeleton import Skeleton
from ..modeling.targets import uses_of
from ..sizes import KIB, MIB, format_size
from . import budget
from .accelerators import chunks_on
from .computed import about, maker_of, price
from .devices import OFFLOADED, STRATEGIES, DeviceMap, check_complete, default_max_memory, disjoint, infer, pinned
from .final_dtypes import final_dtypes, nbytes_of
from .moves import Placement, is_one
from .offload import plan_offload
from .placing import (
    Draft,
    check_reachable,
    check_rows,
    kept_as_built,
    made_at_use,
    passing_scales,
    place,
    to_initialise,
)
from .records import DevicePlan, Group, HostPlan, LoadPlan, LoadRequest, OffloadPlan, Reading, Staging
from .running import Running, in_use, is_made, needed_at_once, plan_pinned, plan_running

# Measured with 5,000 to 30,000 small tensors: Python objects, in all and for each of these.
_OVERHEAD = 4 * MIB
_PER_ENTRY = KIB
_PER_TARGET = KIB
# lowmem builds the model, so its modules and empty parameters are the load's.
_PER_TARGET_BUILT = 3 * KIB
_PER_COPY = KIB
# Of an accelerator's free memory, what is left to activations and the cache of keys and values, unless max_memory says
# what weights may take. The largest weight is brought there even where that leaves less.
_FOR_OTHERS = 0.1
# Halvings of the CPU's share until an inferred map fits the budget; the step is then below 0.1 %.
_TRIALS = 10


def make_plan(
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    mapping: KeyMapping,
    request: LoadRequest,
    memory: HostMemory | None = None,
) -> LoadPlan:
    """Decide everything.

    Args:
        checkpoint: what is read.
        skeleton: the model.
        mapping: which key feeds what.
        request: what the user asked for.
        memory: of the host, if it is not this one.

    Raises:
        BudgetError: the host or a device would need more than it may use.
        PlacementError: a tensor without a device.
        UnsupportedError: a dtype that cannot be loaded.
        ModelError: something is missing that the model cannot initialise, or an operation cannot say what it gives.
        KeysError: an operation would give another shape than the model's.
    """
    final, warnings = final_dtypes(skeleton, mapping, request.dtype, request.keep_fp32)
    costs, dtypes = price(skeleton, mapping, final)
    casts = [final[computation.targets[0]] for computation in mapping.computed]
    final.update(dtypes)
    absent = [names[0] for names in to_initialise(skeleton, mapping)]
    skeleton.rules.check_initialisable(absent)
    draft = Draft(
        checkpoint,
        skeleton,
        mapping,
        request,
        final,
        (
            *checkpoint.warnings,
            *warnings,
            *_mapping_warnings(checkpoint, mapping, absent, kept_as_built(skeleton, mapping)),
            *_unknown_classes(skeleton, request),
            *_about_dtypes(request),
        ),
        host_memory() if memory is None else memory,
        tuple(skeleton.rules.no_split) if request.no_split is None else request.no_split,
        tuple(zip(costs, casts, strict=True)),
    )
    if isinstance(request.device_map, str) and request.device_map in STRATEGIES:
        return _inferred(draft, request.device_map)
    table = dict(request.device_map) if isinstance(request.device_map, Mapping) else {"": "cpu"}
    return _checked(draft, table)


def _mapping_warnings(
    checkpoint: Checkpoint, mapping: KeyMapping, absent: Sequence[str], kept: Sequence[str]
) -> list[str]:
    warnings = list(mapping.steps)
    if mapping.unexpected:
        warnings.append(
            f"{len(mapping.unexpected)} keys of the checkpoint are not in the model and are not read "
            f"({mapping.unexpected[0]!r}{', …' if len(mapping.unexpected) > 1 else ''})"
        )
    if absent:
        warnings.append(f"{len(absent)} tensors are initialised by the model's own rule ({absent[0]!r}, …)")
    if kept:
        warnings.append(
            f"{len(kept)} tensors are not in the checkpoint and keep the values that the model was built with "
            f"({kept[0]!r}{', …' if len(kept) > 1 else ''})"
        )
    for name, leader in mapping.doubled.items():
        a, b = (checkpoint[mapping.sources[n]] for n in (name, leader))
        if (a.file, a.offset, a.strides) == (b.file, b.offset, b.strides):
            continue  # one tensor of a pickle, under two names
        warnings.append(f"{name!r} and {leader!r} are tied and both in the checkpoint: compared when loaded, read once")
    warnings.extend(mapping.suggestions)
    return warnings


def _unknown_classes(skeleton: Skeleton, request: LoadRequest) -> list[str]:
    if not request.no_split:
        return []
    known = {type(module).__name__ for module in skeleton.model.modules()}
    return [
        f"no_split: {name!r} is the class of no module of this model" for name in request.no_split if name not in known
    ]


def _about_dtypes(request: LoadRequest) -> list[str]:
    if not request.unused_dtypes:
        return []
    return [
        f"dtype: as in transformers, that of the whole ('') counts for every part: {request.dtype}; those given for "
        f"{', '.join(map(repr, request.unused_dtypes))} do nothing (keep_fp32= keeps parts in fp32)"
    ]


def _inferred(draft: Draft, strategy: str) -> LoadPlan:
    """A strategy's map; when it would break the RAM budget, the same with less of the CPU."""
    memory = dict(draft.request.max_memory or default_max_memory(draft.memory.available))

    def attempt(share: int | None) -> LoadPlan:
        given = memory if share is None else {**memory, "cpu": share}
        return _checked(draft, infer(draft.skeleton, draft.final, strategy, given, draft.no_split))

    try:
        return attempt(None)
    except BudgetError as error:
        refusal = error
    # accelerate does not know which weights cost memory (mapped ones do not), so the share is found by halving.
    best: LoadPlan | None = None
    size = sum(nbytes_of(target.shape, draft.final[name]) for name, target in draft.skeleton.targets.items())
    low, high = 0, min(memory.get("cpu", 0), size)
    for _ in range(_TRIALS):
        middle = (low + high) // 2
        try:
            best, low = attempt(middle), middle
        except BudgetError as error:
            high, refusal = middle, min(refusal, error, key=lambda e: e.required)
        except PlacementError:
            # A share that accelerate cannot divide.
            high = middle
    if best is None:
        raise refusal
    return best


def _checked(draft: Draft, table: Mapping[str, str]) -> LoadPlan:
    warnings = check_complete(table, draft.skeleton, draft.mapping)
    if draft.request.dispatch == "accelerate":
        stay = pinned(table, draft.skeleton)
        if stay:
            first = next(iter(stay))
            warnings.append(
                f"{len(stay)} tensors ({first!r}, …) stay on {stay[first]}: their modules cannot fetch them"
            )
        table = disjoint({**table, **stay}, draft.skeleton)
    elif len(set(table.values()) - set(OFFLOADED)) > 1:
        # accelerate's hooks move the inputs of modules from one accelerator to the next.
        table = disjoint(table, draft.skeleton)
    devices = DeviceMap(table)
    placements, groups, split = place(draft, devices)
    warnings += split
    check_reachable(placements)
    check_rows(placements)
    folder = draft.request.offload_folder
    offload = None if folder is None else _offload(draft, placements, groups, folder)
    if offload is not None and offload.reused:
        groups = [g for g in groups if any(p.residency == "copy" for places in g.results for p in places)]
    warnings += [*made_at_use(placements), *about(groups), *_offload_warnings(offload)]
    bound = min(_bounds(draft, placements, offload), key=lambda b: b.room)
    need = _need(draft, placements, groups, offload)
    # As large as the budget leaves.
    bare = _host(draft, placements, groups, Staging(1, 0))
    staging = budget.fit_staging(bound.room - bare.peak, draft.request.staging, need)
    host = _host(draft, placements, groups, staging)
    model, main_device = draft.skeleton.model, devices.main_device
    # One pass for the common case, in which nothing is elsewhere.
    on_disk = [p for p in placements if p.device == "disk"]
    as_used = on_disk if main_device == "cpu" else [in_use(p) for p in placements]
    uses = functools.partial(uses_of, model)
    largest, widest = needed_at_once(as_used, main_device, draft.request.dispatch, uses)
    stays = host.resident + host.overhead
    peak = max(host.peak, stays + largest if main_device == "cpu" else 0)
    if peak > bound.room:
        what = _what(groups) if peak == host.peak else _at_each_use(largest, widest)
        remedies = _remedies(draft, placements, bound)
        budget.refuse(peak + bound.extra, bound.room + bound.extra, bound.name, remedies, what)
    running = _running(draft, as_used, main_device, (largest, widest), bound.room - stays)
    reading, about_reading = _read_how(draft, placements, need.in_place)
    plan = LoadPlan(
        checkpoint=draft.checkpoint,
        mapping=draft.mapping,
        device_map=dict(table),
        placements=tuple(placements),
        offload=offload,
        staging=staging,
        devices=_devices(placements, staging, host),
        host=host,
        main_device=main_device,
        no_split=draft.no_split,
        warnings=(*draft.warnings, *warnings, *about_reading),
        reading=reading,
        groups=tuple(groups),
        running=running,
    )
    _check_devices(draft, plan)
    return plan


def _offload_warnings(offload: OffloadPlan | None) -> list[str]:
    kind = memory_file_system(offload.folder) if offload is not None else None
    if offload is None or kind is None:
        return []
    return [
        f"offload_folder: {offload.folder.parent} is a {kind}, so the {format_size(offload.nbytes)} of its files are "
        "memory, which ram does not bound; give a folder on a disk"
    ]


@dataclass(frozen=True)
class _Bound:
    """A limit on the load: the `room` it leaves for the peak, after the `extra` bytes that only this one counts."""

    name: str
    room: int
    extra: int = 0


def _bounds(draft: Draft, placements: Sequence[Placement], offload: OffloadPlan | None) -> list[_Bound]:
    """`ram`, what the machine leaves, and the rlimits, which count mapped files and the stacks of threads too."""
    memory, ram = draft.memory, draft.request.ram
    bounds = [] if ram is None else [_Bound("ram", ram)]
    bounds.append(_Bound(memory.bound_by, memory.available))
    if not memory.rlimits:
        return bounds
    extra = budget.mapped_files(placements, draft.checkpoint, offload, draft.request.dispatch)
    if any(p.residency in ("copy", "write") for p in placements):
        extra += budget.thread_stacks(budget.workers_here())
    bounds += [_Bound(name, left - extra, extra) for name, left in memory.rlimits.items()]
    return bounds


def _offload(
    draft: Draft, placements: Sequence[Placement], groups: Sequence[Group], folder: Path
) -> OffloadPlan | None:
    return plan_offload(
        draft.checkpoint, placements, folder, groups, maker_of(draft.skeleton, draft.mapping) if groups else ""
    )


def _running(
    draft: Draft, placements: Sequence[Placement], main_device: str, worst: tuple[int, str], room: int
) -> Running:
    """What is left for the forward when the load is done: of the host, `room`.

    Raises:
        BudgetError: an accelerator has no room for the largest weight that is brought to it, or the host for copies.
            A stated max_memory bounds the weights that stay there, and is passed by one that is brought, as in
            accelerate, where it leaves no room.
    """
    dispatch, request, (largest, widest) = draft.request.dispatch, draft.request, worst
    if main_device == "cpu":
        return plan_running(placements, main_device, dispatch, largest, room, request.ram is not None)
    if not largest:
        return Running(dispatch)
    # Where weights are brought to a device, that is where their buffers are.
    limits = request.max_memory or {}
    said = main_device in limits
    total = limits[main_device] if said else device_memory().get(main_device)
    stays = sum(p.nbytes for p in placements if p.device == main_device)
    left = sys.maxsize if total is None else total - stays
    if largest > left and not said:
        raise BudgetError(
            f"device {main_device} would hold {format_size(stays)} and must have room for {widest!r} and what its "
            f"module uses with it ({format_size(largest)}), brought there at each use, and it has "
            f"{format_size(total or 0)}; give it fewer modules (device_map=, --device-map)",
            required=stays + largest,
            limit=total or 0,
        )
    spare = 0 if said or total is None else int(total * _FOR_OTHERS)
    running = plan_running(placements, main_device, dispatch, largest, left - spare, total is not None)
    piece, pinned = plan_pinned(placements, main_device, room, uses_of(draft.skeleton.model))
    return replace(running, pages=0, piece=piece, pinned=pinned)


def _at_each_use(largest: int, name: str) -> str:
    return f"forward ({format_size(largest)} of it for {name!r} and what its module uses with it, made at each use)"


def _what(groups: Sequence[Group]) -> str:
    """What needs the memory, for the refusal."""
    if not groups:
        return "load"
    largest = max(groups, key=lambda group: group.nbytes)
    return f"load ({format_size(largest.nbytes)} of it for {largest.name})"


def _need(
    draft: Draft, placements: Sequence[Placement], groups: Sequence[Group], offload: OffloadPlan | None
) -> budget.Need:
    """What the readers could use."""
    written = offload is not None and not offload.reused
    moving = ("copy", "write") if written else ("copy",)
    moved = [p for p in placements if p.residency in moving]
    moved += [source for group in groups for source in group.sources]
    return budget.needs_of(moved, draft.request.io, draft.cached, free_address_space=not draft.memory.rlimits)


def _read_how(draft: Draft, placements: Sequence[Placement], in_place: bool) -> tuple[Reading, list[str]]:
    """How files are read, and what may surprise about reading ahead."""
    request = draft.request
    if not request.prefetch:
        return Reading(request.io, request.keep_cache, in_place=in_place), []
    mapped = sum(p.nbytes for p in placements if p.residency == "map")
    # What is read ahead of more would push out what was read before it.
    ahead = min(mapped, draft.memory.available)
    warnings = []
    if not mapped:
        warnings.append("prefetch: no weight is mapped on the CPU, so there is nothing to read ahead")
    elif ahead < mapped:
        warnings.append(
            f"prefetch: {format_size(mapped)} are mapped and {format_size(ahead)} are free "
            f"({draft.memory.bound_by}): only the first {format_size(ahead)} are read ahead"
        )
    return Reading(request.io, request.keep_cache, ahead, in_place), warnings


def _host(draft: Draft, placements: Sequence[Placement], groups: Sequence[Group], staging: Staging) -> HostPlan:
    on_cpu = [p for p in placements if p.device == "cpu"]
    resident = sum(p.nbytes for p in on_cpu if p.residency != "map")
    if not draft.skeleton.borrowed:
        transient = [t for t in draft.skeleton.targets.values() if not t.persistent]
        resident += sum(nbytes_of(t.shape, t.dtype) for t in transient)
    copies = [p for p in on_cpu if p.residency == "copy"]
    entries = max(len(draft.checkpoint), len(draft.mapping.links))
    overhead = _OVERHEAD + _PER_ENTRY * entries + _PER_COPY * len(copies)
    overhead += draft.checkpoint.described
    # Those that begin behind the beginning of a page end in one more.
    overhead += mmap.PAGESIZE * sum(p.is_apart for p in copies)
    overhead += len(draft.skeleton.targets) * (_PER_TARGET if draft.skeleton.borrowed else _PER_TARGET_BUILT)
    computing = max((group.nbytes for group in groups), default=0) + passing_scales(placements)
    available = draft.memory.available
    ram = draft.request.ram
    return HostPlan(
        resident=resident,
        mapped=sum(p.nbytes for p in on_cpu if p.residency == "map"),
        staging=staging.total,
        overhead=overhead,
        peak=resident + staging.total + overhead + computing,
        available=available,
        bound_by=draft.memory.bound_by,
        limit=available if ram is None else min(ram, available),
        computing=computing,
    )


def _devices(placements: Sequence[Placement], staging: Staging, host: HostPlan) -> dict[str, DevicePlan]:
    weights: dict[str, int] = defaultdict(int)
    for placement in placements:
        weights[placement.device] += placement.nbytes
    devices = {}
    for name, size in weights.items():
        if name == "cpu":
            devices[name] = DevicePlan(size, host.mapped, host.resident, host.staging, host.peak)
        elif name == "disk":
            devices[name] = DevicePlan(size, 0, size, 0, size)
        else:
            chunks = chunks_on(name, placements, staging)
            devices[name] = DevicePlan(size, 0, size, chunks, size + chunks)
    return devices


def _check_devices(draft: Draft, plan: LoadPlan) -> None:
    """What the user gave as a device's memory bounds its weights in explicit maps too, as accelerate does inferred.

    Raises:
        BudgetError: a device would hold more than it may.
    """
    limits = draft.request.max_memory or {}
    for name, device in plan.devices.items():
        used = device.weights
        if name in limits and name != "disk" and used > limits[name]:
            raise BudgetError(
                f"device {name} would hold {format_size(used)} ({used} bytes), and max_memory allows "
                f"{format_size(limits[name])}; give it fewer modules, or use device_map='auto'",
                required=used,
                limit=limits[name],
            )


def _saved_without_cast(placement: Placement) -> int:
    """Bytes of memory less in the checkpoint's own dtype: what lies there in one piece is mapped then."""
    links = placement.links
    if placement.scales is not None or any(link.scales is not None for link in links):
        # Not by another dtype; see what helps against int8 and floats.
        return 0
    if is_one(links, placement.shape):
        return 0 if links[0].entry.dtype == placement.dtype else placement.nbytes
    return max(0, placement.nbytes - sum(link.region.count * itemsize(link.entry.dtype) for link in links))


def _remedies(draft: Draft, placements: Sequence[Placement], bound: _Bound) -> list[str]:
    """What would lower the peak of this plan, the largest gain first."""
    # What a limit counts besides includes mapped weights.
    counted = ("copy", "map") if bound.extra else ("copy",)
    on_cpu = [p for p in placements if p.device == "cpu" and p.residency in counted and p.links]
    cast = sum(_saved_without_cast(p) for p in on_cpu)
    plain = sum(p.nbytes for p in on_cpu if p.residency == "copy" and is_one(p.links, p.shape, p.dtype))
    floats = sum(p.nbytes - sum(link.region.count for link in p.links) for p in on_cpu if p.links[0].scales is not None)
    remedies = []
    if floats:
        remedies.append(f"leave int8 as it is (without dequantize, --dequantize: {format_size(floats)} less)")
    if any(is_made(p, "cpu") for p in placements) and draft.request.dispatch == "lowmem":
        remedies.append("give offload_folder= (--offload-folder), so that weights on disk are used where they lie")
    if cast:
        remedies.append(f"keep the checkpoint's own dtype (dtype='auto', --dtype auto: {format_size(cast)} less)")
    if plain and draft.request.residency == "copy":
        remedies.append(f"map instead of copying (residency='map', --residency map: {format_size(plain)} less)")
    divided = any(target.sharding is not None for target in draft.skeleton.targets.values())
    if divided:
        remedies.append("divide the model among more ranks")
    elif on_cpu and draft.request.device_map not in STRATEGIES:
        remedies.append("put layers on disk (device_map='auto'; --device-map auto)")
    if bound.name == "ram":
        remedies.append("raise ram (--ram)")
    if bound.extra:
        remedies.append(f"raise {bound.name}, which counts mapped files and the stacks of threads too (ulimit -d, -v)")
    return remedies
