"""Processes of torch.distributed for tests: one for each rank, each calling one function."""

from __future__ import annotations

import faulthandler
import multiprocessing
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Raised:
    """The function raised; its error as `Type: text`."""

    text: str
    trace: str = ""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Died:
    """The process ended without an answer, with this exit code: minus a signal's number."""

    code: int


@dataclass(frozen=True)
class Hung:
    """The process had not ended in time, and was killed."""


def run_ranks(
    count: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 120,
    backend: str = "gloo",
    store_at: int | None = None,
) -> list[Any]:
    """Call `function(rank, *args)` in `count` new processes with a default process group.

    Args:
        count: number of processes.
        function: of a module that can be imported; what it gives must be picklable.
        args: given to each.
        timeout: seconds for all of it. Where a process still is then is written to stderr.
        backend: of the default process group.
        store_at: the rank that holds the store, as without torchrun; None for this process, as with torchrun.

    Returns:
        For each rank what the function gave, or `Raised`, `Died` or `Hung`. No process is left.
    """
    own = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if store_at is None else None
    port = _free_port() if own is None else own.port
    context = multiprocessing.get_context("spawn")
    ends: list[Connection] = []
    processes = []
    try:
        for rank in range(count):
            here, there = context.Pipe(duplex=False)
            job = (there, rank, count, port, store_at, backend, timeout, function, args)
            process = context.Process(target=_serve, args=job, name=f"rank {rank}", daemon=True)
            process.start()
            there.close()
            ends.append(here)
            processes.append(process)
        until = time.monotonic() + timeout
        answers = _collect(ends, until)
        for rank, process in enumerate(processes):
            process.join(max(0.0, until - time.monotonic()))
            if process.exitcode is None:
                # Also when it has answered: a process that does not end is a fault.
                answers[rank] = Hung()
            elif rank not in answers or (process.exitcode and not isinstance(answers[rank], Raised)):
                answers[rank] = Died(process.exitcode)
        return [answers[rank] for rank in range(count)]
    finally:
        for process in processes:
            process.kill()
            process.join()
        for end in ends:
            end.close()


def _collect(ends: list[Connection], until: float) -> dict[int, Any]:
    """What came before `until`, by rank; a process that ends closes its pipe."""
    answers: dict[int, Any] = {}
    waiting = dict(enumerate(ends))
    while waiting and (left := until - time.monotonic()) > 0:
        for end in wait(list(waiting.values()), left):
            rank = next(rank for rank, other in waiting.items() if other is end)
            del waiting[rank]
            try:
                answers[rank] = ends[rank].recv()
            except EOFError:
                continue
    return answers


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _serve(
    answer: Connection,
    rank: int,
    count: int,
    port: int,
    store_at: int | None,
    backend: str,
    timeout: float,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """A rank's process."""
    faulthandler.dump_traceback_later(max(1.0, timeout - 5))
    torch.set_num_threads(1)
    limit = timedelta(seconds=timeout)
    store = dist.TCPStore("127.0.0.1", port, is_master=rank == store_at, wait_for_workers=False, timeout=limit)
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=limit)
    try:
        result = function(rank, *args)
    except BaseException as error:
        result = Raised(f"{type(error).__name__}: {error}", traceback.format_exc())
    answer.send(result)
    answer.close()
    faulthandler.cancel_dump_traceback_later()
    if store_at is None:
        dist.destroy_process_group()
