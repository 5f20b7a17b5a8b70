"""Which members of a load share this host, and so its memory."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

from .control import Together
from .exchange import gather

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Neighbours:
    """The members of a load on this rank's host, itself among them.

    Attributes:
        ranks: their global ranks, sorted.
        index: this rank's place among them.
    """

    ranks: tuple[int, ...]
    index: int

    @property
    def count(self) -> int:
        """How many share the host."""
        return len(self.ranks)


def find_neighbours(together: Together) -> Neighbours:
    """Ask all members which host they are on; every member must call it.

    Raises:
        RankError: another member has failed, or is gone.
    """
    hosts = gather(together, name_host(), "hosts")
    mine = hosts[together.members.index(together.rank)]
    ranks = tuple(rank for rank, host in zip(together.members, hosts, strict=True) if host == mine)
    return Neighbours(ranks, ranks.index(together.rank))


def name_host() -> str:
    """A name that differs from host to host: containers of many machines may share a hostname, and those of one
    machine, which have a memory limit each, its kernel.
    """
    try:
        boot = _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()}/{boot}"
