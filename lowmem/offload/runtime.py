"""The forward of a model whose weights are elsewhere: what comes next is brought ahead, what is past is given back."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from .._mapped_pages import holds
from .._shared import start
from ..engine.cleanup import join, undisturbed
from ..engine.crew import compute_alone
from ..errors import RunningError
from ..memory import anonymous_memory
from ..planner.running import Running
from ..sizes import MIB
from .files import Files
from .order import Order
from .pages import PIECE, Pages, bring_range, pieces
from .places import Place, Recipe
from .ring import Entry, Ring
from .units import Unit

# More of them are no faster: two read what one disk gives, and two cast what two processors can.
_WORKERS = 2
# Bytes that are used before the readers are woken: more often costs more than it brings.
_STRIDE = 4 * MIB
# Ahead of the layer that computes: from here on more does not help.
_MOST_AHEAD = 512 * MIB
# Seconds that a thread may take for a piece, or to see that it has nothing left to do.
_PATIENCE = 1.0
# Seconds for which files that were looked at are taken for unchanged, where a part of the model is run by itself.
_FRESH = 0.1
# Memory that others took since is looked at in steps of this.
_GRAIN = 32 * MIB


@dataclass(eq=False)
class Runtime:
    """Everything about one model's weights that are elsewhere. Its threads do not keep it alive.

    Args:
        source: the checkpoint, for messages.
        running: what it may take.
        files: where its weights lie.
        place: the device that computes.
        available: host memory that there was for the load, in bytes.

    Attributes:
        hooks: what tells it of the forward, to be removed when the model is released.
    """

    source: str
    running: Running
    files: Files
    place: Place
    available: int
    units: list[Unit] = field(default_factory=list)
    hooks: list[RemovableHandle] = field(default_factory=list)

    def __post_init__(self) -> None:
        running = self.running
        ahead = max(0, min(running.buffers - running.largest, _MOST_AHEAD, max(running.largest, running.buffers // 4)))
        # The one that is used and what comes next are not among those that stay.
        self.ring = Ring(
            running.buffers,
            0 if running.made <= running.buffers else min(running.buffers, running.largest + ahead),
            self.place.allocate,
            self.place.stamp,
        )
        self._ahead = max(ahead, min(_MOST_AHEAD, max(8 * MIB, running.pages // 4)) if running.mapped else 0)
        self._from_cache = running.mapped > self.available
        # Pages that weights are made of are given back then.
        self.is_tight = running.made + running.mapped > running.pages
        # Where the kernel reads far ahead, what is used one after the other comes best as it reads.
        self.reads_exactly = self.files.read_ahead < PIECE
        self._resting = anonymous_memory()
        self._allowed = running.pages
        self.closed = False
        self._begin()
        _living.add(self)

    @property
    def _all_fit(self) -> bool:
        return self.running.mapped <= self._allowed

    def _begin(self) -> None:
        """As it is at first, and after a fork in the new process, where no thread is and locks are as they were."""
        self._lock = threading.RLock()
        self._made = threading.Condition(self._lock)
        self.order = Order()
        self._threads: list[threading.Thread] = []
        self._wake = threading.Condition(self._lock)
        self._past: list[Pages] = []
        self._expected: deque[tuple[int, int]] = deque()
        self._watched: list[Pages] | None = None
        self._kept = 0
        self._since = 0
        self._last: Unit | None = None
        self._first: Unit | None = None
        self._calm = self._learned = self._started = False
        self._checked = 0.0
        # The parameter whose address was asked for last.
        self.pointed_at: torch.Tensor | None = None
        for unit in self.units:
            unit.failed = False
            unit.keeps = None
            if unit.pages is not None:
                unit.pages = Pages(unit.pages.spans)
        self.ring.clear()

    def add(
        self,
        nbytes: int,
        pages: Pages | None = None,
        make: Callable[[], Callable[[], bool] | None] | None = None,
        *,
        by_need: bool = False,
    ) -> Unit:
        """A unit more."""
        unit = Unit(len(self.units), nbytes, pages, make, by_need=by_need)
        self.units.append(unit)
        return unit

    def start(self) -> None:
        """A forward of the whole model begins.

        Raises:
            CheckpointError: a file changed since the load.
            OffloadError: the same, of one that was written.
            RunningError: the model was released.
        """
        self.refuse_if_closed()
        self.check()
        with self._lock:
            self.order.begin()
            self._learned = self._learned or self._first is not None
            last, self._last = self._last, None
            if last is not None and not last.keeps and not self._calm:
                self._unmap(last)
            self._adapt()
            if not self._still_here():
                self._calm = False
                for unit in self.units:
                    if unit.pages is not None:
                        unit.pages.forget()
            if not self._calm:
                self._call()

    def check(self) -> None:
        """Look whether files changed.

        Raises:
            CheckpointError: a file changed since the load.
            OffloadError: the same, of one that was written.
        """
        self.files.check()
        self._checked = time.monotonic()

    def refuse_if_closed(self) -> None:
        """Refuse what was released.

        Raises:
            RunningError: it was.
        """
        if self.closed:
            raise RunningError(
                f"{self.source}: the model was released (lowmem.release), and its weights on disk with it; load it "
                "again"
            )

    def use(self, unit: Unit) -> None:
        """A unit is used now: see that what comes after it is brought.

        Raises:
            CheckpointError: a file changed since the load, where the model as a whole was not called.
            RunningError: the model was released.
        """
        if time.monotonic() - self._checked > _FRESH:
            # Whoever runs a part of the model does not pass its beginning.
            self.check()
        with self._lock:
            self.refuse_if_closed()
            self._learned = self._learned or unit is self._first
            if self._first is None:
                self._first = unit
            self.order.use(unit.number)
            if self._calm:
                return
            last, self._last = self._last, unit
            if unit.pages is not None and unit.keeps is None:
                unit.keeps = self._all_fit or self._kept + unit.nbytes <= self._allowed - self._ahead
                self._kept += unit.nbytes if unit.keeps else 0
            if last is not None and last is not unit and not last.keeps:
                self._unmap(last)
            self._since += unit.nbytes
            if self._since >= _STRIDE or last is None:
                self._since = 0
                self._call()
        if unit.pages is not None and not unit.by_need:
            self._bring_now(unit.pages)

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Bring file pages, by address and bytes, that are used now: experts that were chosen. Others help."""
        absent = [(address, nbytes) for address, nbytes in ranges if not holds(address, nbytes, 2)]
        with self._lock:
            if self.closed:
                return
            # One weight's pages are there anyway while it is made.
            share = self._allowed // 4 if self.is_tight else self._allowed
            room = min(_MOST_AHEAD, max(share, self.running.largest))
            # What was expected before is past.
            self._expected.clear()
            for piece in pieces(absent):
                room -= piece[1]
                if room < 0:
                    break
                self._expected.append(piece)
            if self._expected:
                self._call()
        # Whoever touched them before they were asked for would have their neighbours read too.
        while True:
            with self._lock:
                if not self._expected:
                    return
                piece = self._expected.popleft()
            bring_range(*piece, exactly=True)

    def get(self, key: Hashable, recipe: Recipe, *, is_part: bool = False) -> torch.Tensor:
        """A weight that is made: from its buffer, or made now. Who drops the tensor gives the buffer back.

        Raises:
            RunningError: the model was released.
        """
        user = self.place.user()
        with self._lock:
            self.refuse_if_closed()
            while (entry := self.ring.find(key)) is not None and not entry.ready:
                if entry.maker == threading.get_ident():
                    # This thread was interrupted before it was made.
                    self.ring.drop(key)
                    continue
                self._made.wait()
                self.refuse_if_closed()
            if entry is not None:
                self.place.wait(entry.ticket)
                return self.ring.take(entry, key, user, recipe.name)
            found = self._admit(key, recipe, is_part=is_part, needed=True)
            assert found is not None
            entry, writable = found
            entry.maker = threading.get_ident()
            # Held from now on, or others might have the buffer as soon as it is filled.
            taken = self.ring.take(entry, key, user, recipe.name)
        self._fill(entry, key, recipe, writable)
        self.place.wait(entry.ticket)
        return taken

    def forget(self, key: Hashable) -> None:
        """What is in a buffer under this key is no good."""
        with self._lock:
            self.ring.drop(key)

    def get_ahead(self, key: Hashable, recipe: Recipe) -> bool:
        """Make a weight before it is used; whether there was room, or it was there."""
        with self._lock:
            if self.closed or self.ring.find(key) is not None:
                return True
            found = self._admit(key, recipe, is_part=False, needed=False)
        if found is None:
            return False
        self._fill(found[0], key, recipe, found[1])
        return True

    def _admit(self, key: Hashable, recipe: Recipe, *, is_part: bool, needed: bool) -> tuple[Entry, Any] | None:
        # What is made in inference mode could not be used outside of it.
        with torch.inference_mode(False):
            return self.ring.admit(key, recipe.shape, recipe.dtype, is_part=is_part, needed=needed)

    def _fill(self, entry: Entry, key: Hashable, recipe: Recipe, writable: Any) -> None:
        try:
            with torch.no_grad():
                entry.ticket = self.place.bring(recipe, entry.tensor, writable)
            entry.version = None if recipe.is_scratch else entry.tensor._version
        except BaseException:
            with self._lock:
                self.ring.drop(key)
                self._made.notify_all()
                self.refuse_if_closed()
            raise
        with self._lock:
            entry.ready = True
            self._made.notify_all()

    def _call(self) -> None:
        """Let the readers look for work. With the lock."""
        if not self._started and not self.closed:
            self._started = True
            for _ in range(_WORKERS):
                thread = threading.Thread(
                    target=_work, args=(weakref.ref(self), self._wake), name="lowmem-ahead", daemon=True
                )
                # Before it runs: a Ctrl-C inside start() must not lose it.
                self._threads.append(thread)
                try:
                    start(thread)
                except RuntimeError:
                    self._threads.pop()
                    break  # No more threads here: fewer are slower, not wrong.
        self._wake.notify(_WORKERS)

    def next_task(self, *, is_full: bool = False) -> Callable[[], object] | None:
        """What is to be done now, nearest first, in buffers that are full too; None: nothing. With the lock."""
        if self._past:
            return functools.partial(self._past.pop().give_back, self.files)
        if self._expected:
            return functools.partial(bring_range, *self._expected.popleft(), exactly=True)
        if is_full:
            return None
        ahead = 0
        for number in self._upcoming():
            unit = self.units[number]
            if unit.failed or unit.by_need or not unit.nbytes:
                continue
            ahead += unit.nbytes
            if ahead > self._ahead and unit.nbytes < ahead:
                break
            if unit.make is not None:
                bring = unit.make()
                if bring is not None and self.ring.find(unit.number) is None:
                    return self._guarded(unit, bring)
            elif unit.pages is not None and (piece := unit.pages.take()) is not None:
                return functools.partial(self._bring, unit.pages, piece)
        if self._all_fit and self._learned and not self.running.made:
            # From now on there is nothing to do, unless the kernel takes pages.
            known = (unit for unit in self.units if unit.number in self.order and not unit.by_need)
            self._calm = all(unit.pages is None or unit.pages.are_here for unit in known)
        return None

    def _upcoming(self) -> Iterator[int]:
        """What is used next: at first as the modules are in the model, then as it was."""
        if self._learned:
            return self.order.upcoming()
        return iter(range(0 if self._last is None else self._last.number + 1, len(self.units)))

    def _guarded(self, unit: Unit, task: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            try:
                return task()
            except Exception:
                # Whoever uses it meets the error, and can be told.
                unit.failed = True
                return True

        return run

    def _bring(self, pages: Pages, piece: tuple[int, int]) -> None:
        try:
            bring_range(*piece, exactly=self.reads_exactly)
        finally:
            with self._lock:
                if pages.finish():
                    self._made.notify_all()

    def _bring_now(self, pages: Pages) -> None:
        """What is computed with now: together with whoever is at it, instead of page by page as it is touched."""
        while True:
            with self._lock:
                piece = pages.take()
                # Not for ever: who took a piece may have been interrupted, and pages come when they are touched.
                if piece is None and (pages.are_here or self.closed or not self._made.wait(_PATIENCE)):
                    return
            if piece is not None:
                self._bring(pages, piece)

    def _unmap(self, unit: Unit) -> None:
        """With the lock."""
        if unit.pages is None:
            return
        unit.pages.unmap()
        if self._from_cache:
            self._past.append(unit.pages)

    def _still_here(self) -> bool:
        """Whether the kernel left a few of the pages that were brought."""
        if self._watched is None:
            found = [unit.pages for unit in self.units if unit.pages is not None and not unit.by_need]
            self._watched = found[:: max(1, len(found) // 8)]
        return all(pages.seem_cached() for pages in self._watched if pages.are_here)

    def _adapt(self) -> None:
        """What others took since, such as a cache of keys and values, is not there for pages."""
        grown = max(0, anonymous_memory() - self._resting - self.ring.held) // _GRAIN * _GRAIN
        allowed = max(0, self.running.pages - grown)
        if allowed == self._allowed:
            return
        self._allowed, self._kept = allowed, 0
        self._calm = self._calm and self._all_fit
        for unit in self.units:
            if unit.pages is not None and unit.keeps is not None:
                kept = unit.keeps
                unit.keeps = self._all_fit or self._kept + unit.nbytes <= allowed - self._ahead
                self._kept += unit.nbytes if unit.keeps else 0
                if kept and not unit.keeps:
                    self._unmap(unit)

    def close(self) -> None:
        """End the threads, and let go of buffers and mappings. Those that someone uses end with their last use."""
        undisturbed(self._close)

    def _close(self) -> None:
        self._dismiss()
        self._join(None)
        with self._lock:
            self._threads.clear()
            self.ring.clear()
            self.pointed_at = None
            self.files.close()
            self._made.notify_all()
        _living.discard(self)

    def _dismiss(self) -> None:
        """Tell the threads that it is over. They may still get at it."""
        with self._lock:
            self.closed = True
            self._expected.clear()
            self._wake.notify_all()
            self._made.notify_all()

    def _join(self, patience: float | None) -> None:
        for thread in list(self._threads):
            if thread is not threading.current_thread():
                join(thread, patience)

    def __del__(self) -> None:
        # The threads see that it is gone. None of them is at work, or it would not be.
        if sys.is_finalizing():
            return
        with contextlib.suppress(Exception):
            if threading.current_thread() in self._threads:
                self._dismiss()
            else:
                undisturbed(self._dismiss, functools.partial(self._join, _PATIENCE))


def _work(of: weakref.ref[Runtime], wake: threading.Condition) -> None:
    """A reader: does what is next, and waits while there is nothing."""
    compute_alone()
    is_full = False
    while True:
        with wake:
            runtime = of()
            task = None if runtime is None or runtime.closed else runtime.next_task(is_full=is_full)
            if task is None:
                gone = runtime is None or runtime.closed
                # Perhaps the last one that held it.
                del runtime
                if gone or of() is None:
                    return
                wake.wait()
                is_full = False
                continue
        # Where there was no room, there is none before something is used.
        is_full = task() is False
        del task, runtime


_living: weakref.WeakSet[Runtime] = weakref.WeakSet()


@atexit.register
def _end() -> None:
    """The end of the interpreter would unwind a thread that computes, which ends the process by a signal."""
    for runtime in list(_living):
        runtime.close()


def _forked() -> None:
    for runtime in list(_living):
        runtime._begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
