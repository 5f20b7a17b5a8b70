"""What several ranks hold and read, each and together on a host."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

from .._strides import Shape
from ..modeling.sharding import Sharding
from ..modeling.targets import Target
from ..sizes import KIB
from .moves import Placement
from .rank_records import HostShare, RankPlan
from .records import LoadPlan, Shared


def rank_plan(plan: LoadPlan, rank: int, at: Mapping[str, int], host: int) -> RankPlan:
    """The part of one rank, of its plan."""
    return RankPlan(
        rank=rank,
        at=at,
        host=host,
        weights=sum(device.weights for device in plan.devices.values()),
        mapped=plan.host.mapped,
        resident=sum(device.resident for device in plan.devices.values()),
        reads=plan.bytes_read,
        staging=plan.staging.total,
        peak=plan.host.peak,
    )


def host_shares(ranks: Sequence[RankPlan], mapped_once: Mapping[int, Fraction]) -> tuple[HostShare, ...]:
    """Each host's total; `mapped_once` is what `mapped_share` says of each rank."""
    found = []
    for host in sorted({rank.host for rank in ranks}):
        here = [rank for rank in ranks if rank.host == host]
        mapped = sum((mapped_once[rank.rank] for rank in here), Fraction(0))
        reads, peak = sum(rank.reads for rank in here), sum(rank.peak for rank in here)
        found.append(HostShare(host, tuple(rank.rank for rank in here), round(mapped), reads, peak))
    return tuple(found)


def mapped_share(plan: LoadPlan, targets: Mapping[str, Target], rank: int, beside: Iterable[int]) -> Fraction:
    """Bytes of mapped weights, each divided by the ranks of this host that map the same.

    Args:
        plan: of the rank.
        targets: of the whole model.
        rank: whose share.
        beside: the ranks of its host, itself included.
    """
    here = tuple(beside)
    total = Fraction(0)
    for placement in plan.placements:
        if placement.residency == "map":
            target = targets[placement.target]
            total += Fraction(placement.nbytes, len(holders(target.sharding, target.shape, rank, here)))
    return total


@functools.lru_cache(maxsize=4096)
def holders(sharding: Sharding | None, shape: Shape, rank: int, ranks: tuple[int, ...]) -> tuple[int, ...]:
    """Those of `ranks` that hold the same part of a tensor as `rank`, which is among them."""
    if sharding is None:
        return ranks
    mine = sharding.part(shape, rank)
    return tuple(other for other in ranks if sharding.part(shape, other) == mine)


def held_alike(
    placements: Iterable[Placement], targets: Mapping[str, Target], rank: int, ranks: tuple[int, ...]
) -> Iterator[Shared]:
    """Those that other ranks hold too, by name; the first that holds one gives it to the others."""
    for placement in sorted(placements, key=lambda p: p.target):
        target = targets[placement.target]
        alike = holders(target.sharding, target.shape, rank, ranks)
        if len(alike) > 1:
            yield Shared(placement, alike[0], alike)


# Bytes of small tensors that are given on together, and how many such messages are under way at once.
SHARED_TOGETHER = 512 * KIB
SHARED_AHEAD = 4


def share_out(plan: LoadPlan, targets: Mapping[str, Target], rank: int, beside: Iterable[int]) -> LoadPlan:
    """The plan of one rank when what ranks of its host hold alike is read by one of them.

    All that hold a tensor come to the same, without a word: they go through the names in order, and give each to
    whoever of them has the least to read so far.

    Args:
        plan: in which each rank reads what it holds.
        targets: of the whole model.
        rank: whose plan.
        beside: the ranks of its host, itself included.
    """
    here = tuple(sorted(beside))
    loads: dict[tuple[int, ...], dict[int, int]] = {}
    shared: list[Shared] = []
    given: dict[Placement, Placement] = {}
    for placement in sorted(plan.placements, key=lambda p: p.target):
        if placement.residency != "copy" or not placement.is_fed:
            continue
        target = targets[placement.target]
        ranks = holders(target.sharding, target.shape, rank, here)
        if len(ranks) < 2:
            continue
        load = loads.setdefault(ranks, dict.fromkeys(ranks, 0))
        reader = min(ranks, key=lambda r: (load[r], r))
        load[reader] += placement.source_bytes
        if reader != rank:
            given[placement] = replace(placement, links=(), scales=None)
        for one in (placement, placement.scales):
            if one is not None:
                shared.append(Shared(given.get(one, one), reader, ranks))
    placements = tuple(given.get(p, p) for p in plan.placements)
    host = plan.host
    if shared:
        # The readers' buffers are gone by then.
        extra = max(0, (SHARED_AHEAD + 1) * SHARED_TOGETHER - host.staging)
        host = replace(host, computing=host.computing + extra, peak=host.peak + extra)
    return replace(plan, placements=placements, shared=tuple(shared), host=host)


def shared_digests(shared: Iterable[Shared]) -> dict[str, str]:
    """What must be the same for all ranks that share tensors: those ranks → a digest of what goes among them."""
    found: dict[tuple[int, ...], list[tuple[str, int, str, int]]] = {}
    for one in shared:
        placement = one.placement
        row = (placement.target, placement.nbytes, placement.device.partition(":")[0], one.reader)
        found.setdefault(one.ranks, []).append(row)
    return {",".join(map(str, ranks)): hashlib.sha256(repr(rows).encode()).hexdigest() for ranks, rows in found.items()}
