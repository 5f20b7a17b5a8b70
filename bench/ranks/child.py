"""A rank: a process that loads with others, in one way after the other."""

from __future__ import annotations

import logging
import os
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

import lowmem
from bench.child import release
from lowmem.memory import anonymous_memory

from .cases import Member, Order
from .checks import check
from .ways import WAYS


def join(member: Member) -> None:
    """Be a rank, in the environment that torchrun makes: one thread for each process."""
    logging.disable(logging.WARNING)
    rank, count = str(member.rank), str(member.count)
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(member.port)}
    torch.set_num_threads(1)
    limit = timedelta(seconds=member.seconds)
    store = TCPStore("127.0.0.1", member.port, is_master=False, wait_for_workers=False, timeout=limit)
    dist.init_process_group("gloo", store=store, rank=member.rank, world_size=member.count, timeout=limit)
    # Connections are made at the first use.
    dist.barrier()


class Runner:
    """Every method takes one argument and answers with plain values, as `bench.forward.child.serve` wants it."""

    def __init__(self, member: Member) -> None:
        self._member = member

    def join(self, _: None) -> dict[str, Any]:
        """Returns when all ranks are there."""
        join(self._member)
        return {}

    def turn(self, order: Order) -> dict[str, Any]:
        """One load: its `seconds` from a barrier on, and what the loader tells. The model is dropped."""
        release()
        dist.barrier()
        started = time.perf_counter()
        loaded = WAYS[order.way](order)
        seconds = time.perf_counter() - started
        dist.barrier()
        told = loaded.told
        del loaded
        release()
        return {"seconds": seconds, **told}

    def look(self, order: Order) -> dict[str, Any]:
        """One load under a measure: `seconds`, its anonymous `peak` above what was there, and what `check` finds."""
        release()
        dist.barrier()
        with lowmem.measure() as memory:
            started = time.perf_counter()
            loaded = WAYS[order.way](order)
            seconds = time.perf_counter() - started
        # Nobody may end while another is still given something.
        dist.barrier()
        release()
        kept = max(0, anonymous_memory() - memory.baseline)
        found = {"seconds": seconds, "peak": memory.peak, "kept": kept}
        return {**found, **check(loaded.model, order.folder, order.dtype)}
