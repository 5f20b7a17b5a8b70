"""The reader threads: each takes a read, fills what it feeds, and reports it."""

from __future__ import annotations

import ctypes
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from .._shared import start
from ..errors import BudgetError, LowmemError
from ..planner import LoadPlan, Placement
from ..planner.moves import Read
from ..planner.records import Staging
from ..sizes import KIB, format_size
from .accelerator import Accelerator, Lane
from .cleanup import join, let_go, undisturbed
from .destinations import Destination, Scratch
from .feed import Feed, Job

# More moves than these in one read, and smaller ones, are the interpreter's work more than the kernel's.
_A_FEW = 4
_SMALL = 128 * KIB


@dataclass(eq=False, slots=True)
class Done:
    """A read that is in place, and the tensors that are whole with it."""

    read: Read
    whole: list[tuple[Placement, Destination]]


# What a thread reports: reads, an error, or None when it found no more reads.
_Event = list[Done] | BaseException | None

# Seconds that a thread keeps a report to itself at most, when nobody waits for the tensors.
_AT_LEAST_EVERY = 0.02
# Seconds between looks at what else may end the load.
_WATCH_EVERY = 0.2


class Crew:
    """The threads of one load.

    Args:
        plan: what is read.
        feed: gives the reads.
        watch: called by `next` before and during its waits; what it raises ends the load. None for no such looks.
        at_once: report every read when it is in place. Otherwise several together: each report wakes the caller's
            thread, for which a reader must make room on a machine that has no processor left.
    """

    def __init__(self, plan: LoadPlan, feed: Feed, watch: Callable[[], None] | None = None, *, at_once: bool) -> None:
        self._plan = plan
        self._feed = feed
        self._watch = watch
        self._patience = 0.0 if at_once else _AT_LEAST_EVERY
        self._threads: list[threading.Thread] = []
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._working = 0
        self._process = os.getpid()

    def start(self) -> None:
        """Start the plan's number of threads, or fewer where the system has no more.

        Raises:
            BudgetError: the system has none.
        """
        for i in range(self._plan.staging.workers if self._plan.bytes_read else 0):
            thread = threading.Thread(target=self._work, name=f"lowmem-{i}", daemon=True)
            # Before it runs: a Ctrl-C inside start() must not lose it.
            self._threads.append(thread)
            try:
                start(thread)
            except RuntimeError as error:
                self._threads.pop()
                if self._threads:
                    # Fewer readers are slower, not wrong.
                    break
                raise BudgetError(
                    f"the system refused a thread ({error}); a limit on memory or processes may be the reason "
                    "(ulimit -d, -v, -u): raise it",
                    required=self._plan.host.peak,
                    limit=0,
                ) from error
        self._working = len(self._threads)

    def next(self) -> list[Done] | None:
        """Wait for the next reads that are in place; None after the last.

        Raises:
            BaseException: whatever ended a thread, or `watch` raises.
            LowmemError: the process was forked meanwhile, and this is the new one.
        """
        while self._working:
            self._refuse_after_fork()
            event = self._events.get() if self._watch is None else self._get_watching(self._watch)
            if event is None:
                self._working -= 1
            elif isinstance(event, BaseException):
                let_go(event)
                raise event
            else:
                return event
        return None

    def _refuse_after_fork(self) -> None:
        if os.getpid() != self._process:
            raise LowmemError(
                f"{self._plan.checkpoint.source}: a load ends at a fork in the new process, which has no threads of "
                "it; begin another there"
            )

    def _get_watching(self, watch: Callable[[], None]) -> _Event:
        while True:
            watch()
            try:
                return self._events.get(timeout=_WATCH_EVERY)
            except queue.Empty:
                continue

    def end(self) -> None:
        """Wait for the threads, which take no more reads, and close what they had open. May be called again."""
        if os.getpid() != self._process:
            # A fork takes no threads along, and locks as they were.
            return
        self._feed.stop()
        for thread in self._threads:
            join(thread)
        self._feed.close()

    def _work(self) -> None:
        """A reader thread."""
        try:
            compute_alone()
            self._read_all()
            self._events.put(None)
        except BaseException as error:  # handed to the caller's thread, which raises it
            self._events.put(error)

    def _read_all(self) -> None:
        """Read after read, through buffers that end with this call."""
        buffers, bounce = self._make_buffers()
        try:
            self._read_through(buffers, bounce)
        finally:
            if isinstance(buffers, Lane):
                buffers.close()

    def _read_through(self, buffers: Scratch | Lane, bounce: memoryview | None) -> None:
        finished: list[Done] = []
        reported = time.monotonic()
        while (job := self._feed.take()) is not None:
            try:
                if isinstance(buffers, Lane):
                    slot = buffers.take()
                    self._carry_out(job, slot, bounce)
                    buffers.sent(slot)
                else:
                    self._carry_out(job, buffers, bounce)
                finished.append(Done(job.read, self._feed.done(job)))
            finally:
                self._feed.give_back(job)
            # While this thread waits for more it must hold nothing that the caller has given up.
            del job
            if time.monotonic() - reported >= self._patience:
                self._events.put(finished)
                finished, reported = [], time.monotonic()
        if isinstance(buffers, Lane):
            buffers.finish()
        if finished:
            self._events.put(finished)

    def _make_buffers(self) -> tuple[Scratch | Lane, memoryview | None]:
        staging, accelerators = self._plan.staging, self._feed.accelerators
        try:
            bounce = Scratch(staging.bounce).memory if staging.bounce else None
            if accelerators:
                return make_lane(accelerators, staging), bounce
            return Scratch(staging.each, staging.work), bounce
        except (OSError, MemoryError) as error:
            raise BudgetError(
                f"the system refused {format_size(staging.total // staging.workers)} for a reader's buffer ({error}); "
                "others took memory since the plan was made; lower staging, or free memory",
                required=self._plan.host.peak,
                limit=0,
            ) from error

    def _carry_out(self, job: Job, scratch: Scratch, bounce: memoryview | None) -> None:
        """One read into all its places, and what has to be done to the bytes after that."""
        turn = self._feed.turn if is_for_one(job.read) else nullcontext()
        steps, at = [], 0
        with turn:
            for move, destination in zip(job.read.moves, job.destinations, strict=True):
                steps.append((move, destination, at))
                at += move.scratch
            views = [destination.begin(move, scratch, at) for move, destination, at in steps]
        job.reader.fill(views, job.read.offset, bounce, job.ticket, job.read.moves[0].spread)
        with turn:
            for move, destination, at in steps:
                destination.end(move, scratch, at)


def carry_out(
    plan: LoadPlan,
    feed: Feed,
    take: Callable[[list[Done]], None],
    meanwhile: Callable[[], None] = lambda: None,
    watch: Callable[[], None] | None = None,
) -> None:
    """All reads of a plan, by threads that have ended when this ends, however it does.

    Args:
        plan: what is read.
        feed: of this plan.
        take: called from the calling thread with reads that are in place.
        meanwhile: called once when the threads have started.
        watch: called from the calling thread again and again, to raise what ends the load from outside.

    Raises:
        BaseException: whatever ended a thread, or `take` or `watch` raises.
    """
    crew = Crew(plan, feed, watch, at_once=False)
    try:
        crew.start()
        meanwhile()
        while (finished := crew.next()) is not None:
            take(finished)
        feed.finish()
    finally:
        # Twice: a Ctrl-C may be raised where `undisturbed` is entered, before it can do anything.
        try:
            undisturbed(crew.end)
        finally:
            undisturbed(crew.end)


def make_lane(accelerators: Mapping[str, Accelerator], staging: Staging) -> Lane:
    """The streams and buffers of the calling thread.

    Raises:
        BudgetError: a device has no memory for them.
        LowmemError: it failed.
        OSError, MemoryError: the host has none.
    """
    # The one that pins for all of them.
    name = next(iter(accelerators))
    try:
        return Lane(accelerators, staging)
    except torch.OutOfMemoryError as error:
        raise BudgetError(
            f"{name} refused what a reader's stream takes: {error}; others took memory since the plan was made; "
            "free memory of the device",
            required=0,
            limit=0,
        ) from error
    except RuntimeError as error:
        raise LowmemError(
            f"{name}: a reader cannot use the device: {error}; it may have failed for the whole process: load again "
            "in a new one"
        ) from error


def is_for_one(read: Read) -> bool:
    """Whether threads do such reads faster one at a time: of many moves that are small."""
    count = len(read.moves)
    return count > _A_FEW and read.nbytes < count * _SMALL


def compute_alone() -> None:
    """Let torch start no helpers of this thread: the readers are the parallel part, and OpenMP ends the process where
    it may not start a thread. `torch.set_num_threads` would do it for the caller's threads to come as well.
    """
    if sys.platform != "linux":
        return
    # torch sets the number when it is first asked in a thread.
    torch.get_num_threads()
    # In the global scope, where torch puts the runtime that it was built with.
    limit = getattr(ctypes.CDLL(None), "omp_set_num_threads", None)
    if limit is not None:
        limit(1)
