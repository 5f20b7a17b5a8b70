"""Records of loads by several ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

# Every rank reads what it holds; or what several ranks of a host hold is read by one of them.
ReadBy = Literal["each", "once"]


@dataclass(frozen=True, slots=True)
class RankShare:
    """What one rank has of a load, and the ranks of its host together. Bytes.

    Attributes:
        rank: its global number.
        members: how many ranks load together.
        beside: the ranks of its host, itself included.
        read: whether each rank reads what it holds, or one what several hold.
        shared: what others of the host hold too and is read once.
        mapped: file pages that the ranks of the host map, each once.
        reads: what the ranks of the host read.
        peak: the sum of the peaks of their anonymous memory.
    """

    rank: int
    members: int
    beside: tuple[int, ...]
    read: ReadBy
    shared: int
    mapped: int
    reads: int
    peak: int

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {name: getattr(self, name) for name in self.__slots__} | {"beside": list(self.beside)}


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
