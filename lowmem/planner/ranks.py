"""What several ranks hold and read, each and together on a host."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from .._strides import Shape
from ..modeling.sharding import Sharding
from ..modeling.targets import Target
from .records import LoadPlan


@dataclass(frozen=True, slots=True)
class RankPlan:
    """One rank's part of a load, in bytes.

    Attributes:
        rank: its global number.
        at: where it is in the mesh, by the names of the dimensions.
        host: number of its host.
        weights: what it holds of the model, mapped or not.
        mapped: of this, file pages, which ranks of one host share.
        resident: what stays as its own, in host memory, on a device or, of weights on disk, in files.
        reads: what it reads into these; mapped pages are read when they are used.
        staging: buffers in flight.
        peak: of its anonymous host memory.
    """

    rank: int
    at: Mapping[str, int]
    host: int
    weights: int
    mapped: int
    resident: int
    reads: int
    staging: int
    peak: int

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {name: getattr(self, name) for name in self.__slots__} | {"at": dict(self.at)}


@dataclass(frozen=True, slots=True)
class HostShare:
    """The ranks of one host together, in bytes.

    Attributes:
        host: its number.
        ranks: those that are there.
        mapped: file pages that these ranks map, each once: processes share one page cache.
        reads: what they read, each for itself.
        peak: the sum of their anonymous peaks.
    """

    host: int
    ranks: tuple[int, ...]
    mapped: int
    reads: int
    peak: int

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {name: getattr(self, name) for name in self.__slots__} | {"ranks": list(self.ranks)}


@dataclass(frozen=True, slots=True)
class RanksPlan:
    """A load by several ranks, planned without them.

    Attributes:
        source: what is loaded.
        mesh: ranks along each dimension, by name, the outermost first.
        weights: bytes of the whole model.
        ranks: each of them.
        hosts: what each host has.
        warnings: what the user should know, of any rank's plan.
    """

    source: str
    mesh: Mapping[str, int]
    weights: int
    ranks: tuple[RankPlan, ...]
    hosts: tuple[HostShare, ...]
    warnings: tuple[str, ...] = ()

    @property
    def amplification(self) -> float:
        """How often the whole model is read: what all ranks read, and what they map, once on each host."""
        return sum(host.reads + host.mapped for host in self.hosts) / max(self.weights, 1)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, as `lowmem plan --ranks --json` prints it. Sizes in bytes."""
        return {
            "source": self.source,
            "mesh": dict(self.mesh),
            "weights": self.weights,
            "amplification": self.amplification,
            "ranks": [rank.to_dict() for rank in self.ranks],
            "hosts": [host.to_dict() for host in self.hosts],
            "warnings": list(self.warnings),
        }


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
            total += Fraction(placement.nbytes, sharers(target.sharding, target.shape, rank, here))
    return total


@functools.lru_cache(maxsize=4096)
def sharers(sharding: Sharding | None, shape: Shape, rank: int, ranks: tuple[int, ...]) -> int:
    """How many of `ranks`, with `rank` among them, hold the same part of a tensor."""
    if sharding is None:
        return len(ranks)
    mine = sharding.part(shape, rank)
    return sum(sharding.part(shape, other) == mine for other in ranks)
