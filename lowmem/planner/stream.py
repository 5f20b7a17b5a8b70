"""The plan of a stream: every chosen tensor of a checkpoint into memory of its own, one after the other."""

from __future__ import annotations

from .._page_cache import cached_share
from ..checkpoint import Checkpoint, TensorEntry
from ..dtypes import is_floating
from ..limits import HostMemory, host_memory
from ..mapping import KeyMapping, Link, whole
from ..mapping.names import named_entries
from ..sizes import KIB, MIB, format_size
from . import budget
from .accelerators import chunks_on
from .final_dtypes import check_cast, nbytes_of
from .moves import Placement
from .records import DevicePlan, HostPlan, LoadPlan, Reading, Staging, StreamRequest

# Python objects, measured with 30,000 small tensors: in all, and for each.
_OVERHEAD = 2 * MIB
_PER_ENTRY = 2 * KIB


def make_stream_plan(checkpoint: Checkpoint, request: StreamRequest) -> tuple[LoadPlan, int]:
    """Decide a stream.

    Returns:
        The plan, and its window: bytes of tensors that may be ahead of the caller. Buffers and window together are no
        more than the staging where the largest tensor and the least of buffers are; one tensor may always be made.

    Raises:
        KeysError: `only` names nothing.
        UnsupportedError: a dtype that torch does not have, or a cast that would change the meaning.
        BudgetError: staging or the largest tensor is more than the machine has.
    """
    named = named_entries(checkpoint, request.keys)
    placements = tuple(_place(name, entry, request) for name, entry in named.items())
    memory = host_memory()
    wanted = request.staging
    if wanted is None:
        spare = memory.available - _overhead(checkpoint)
        wanted = max(budget.MIN_STAGING, min(budget.MAX_STAGING, spare))
    need = budget.needs_of(placements, request.io, cached_share, free_address_space=not memory.rlimits)
    # The other half is for what is read ahead, or more where it takes more to hold the largest tensor.
    largest = max(placements, key=lambda p: p.nbytes, default=None)
    beside = wanted if largest is None or largest.nbytes >= wanted else wanted - largest.nbytes
    staging = budget.fit_staging(wanted, max(budget.MIN_STAGING, min(wanted // 2, beside)), need)
    window = max(0, wanted - staging.total)
    host = _host(checkpoint, placements, staging, window, memory)
    if host.peak > host.available:
        remedies = [f"a smaller staging (now {format_size(wanted)})"]
        if largest is not None and largest.nbytes > window:
            remedies.append(f"leave out {largest.target!r} ({format_size(largest.nbytes)}) by only=")
        budget.refuse(host.peak, host.available, host.bound_by, remedies, what="stream")
    links = tuple(link for p in placements for link in p.links)
    plan = LoadPlan(
        checkpoint=checkpoint,
        mapping=KeyMapping(links, {}, {}, (), (), (), (), ()),
        device_map={"": request.device},
        placements=placements,
        offload=None,
        staging=staging,
        devices={request.device: _device(placements, staging, window, host, request.device)},
        host=host,
        main_device=request.device,
        warnings=checkpoint.warnings,
        reading=Reading(request.io, request.keep_cache, in_place=need.in_place),
    )
    return plan, window


def _place(name: str, entry: TensorEntry, request: StreamRequest) -> Placement:
    dtype = request.dtype if request.dtype != "auto" and is_floating(entry.dtype) else entry.dtype
    check_cast(entry.key, entry.dtype, dtype)
    links = (Link(entry, name, whole(entry.shape)),)
    return Placement(name, (name,), entry.shape, dtype, nbytes_of(entry.shape, dtype), request.device, "copy", links)


def _overhead(checkpoint: Checkpoint) -> int:
    return _OVERHEAD + _PER_ENTRY * len(checkpoint) + checkpoint.described


def _host(
    checkpoint: Checkpoint, placements: tuple[Placement, ...], staging: Staging, window: int, memory: HostMemory
) -> HostPlan:
    """Nothing is resident: what was given out is the caller's."""
    sizes = [p.nbytes for p in placements if p.device == "cpu"]
    held = staging.total + _ahead(sizes, window) if placements else 0
    overhead = _overhead(checkpoint)
    return HostPlan(
        resident=0,
        mapped=0,
        staging=held,
        overhead=overhead,
        peak=held + overhead,
        available=memory.available,
        bound_by=memory.bound_by,
        limit=memory.available,
    )


def _ahead(sizes: list[int], window: int) -> int:
    """Bytes of tensors that are begun and not yet given out: as many as the window holds, and always one."""
    return max(min(window, sum(sizes)), max(sizes, default=0))


def _device(
    placements: tuple[Placement, ...], staging: Staging, window: int, host: HostPlan, device: str
) -> DevicePlan:
    sizes = [p.nbytes for p in placements]
    weights = sum(sizes)
    if device == "cpu":
        return DevicePlan(weights, 0, 0, host.staging, host.peak)
    chunks = chunks_on(device, placements, staging)
    return DevicePlan(weights, 0, 0, chunks, _ahead(sizes, window) + chunks)
