"""What all threads of a process share and a load changes for a while: it is as it was when the last one has left.

A fork takes along only the thread that forks. What the others held or had changed is undone in the child.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

from .errors import LowmemError

# Made once each, at import or for one of few names, and there to the end.
_locks: list[Any] = []
_changes: list[Shared] = []


# Seconds; it takes a thousandth of one.
_BEGINS_WITHIN = 20.0


def lasting_lock() -> Any:
    """A lock for a module: an `RLock` that no child finds held by a thread that it does not have."""
    lock = threading.RLock()
    _locks.append(lock)
    return lock


def interrupt_behind(error: BaseException, outside: BaseException | None) -> KeyboardInterrupt | None:
    """The Ctrl-C that has led to an error of other code; None where none has, or where a user's code made it another.

    Args:
        error: that came out.
        outside: what was being handled before.
    """
    if type(error).__module__ != "builtins" and not isinstance(error, LowmemError):
        return None
    while (before := error.__context__) is not None and before is not outside:
        if error.__suppress_context__ and error.__cause__ is None:
            break  # Whoever said `from None` meant it.
        if isinstance(before, KeyboardInterrupt):
            return before
        error = before
    return None


@contextmanager
def interrupts_first() -> Iterator[None]:
    """An error of other code that a Ctrl-C has led to comes out as that Ctrl-C."""
    outside = sys.exc_info()[1]
    try:
        yield
    except Exception as error:
        interrupt = interrupt_behind(error, outside)
        if interrupt is not None:
            raise interrupt from None
        raise


def start(thread: threading.Thread) -> None:
    """Start a thread.

    Raises:
        RuntimeError: the system has none, or no memory for one. As Python says it, which says the same of a lock of its
            own where a second Ctrl-C came: that one comes out as what it is.
    """
    # One that finds no memory ends before it says that it runs, and Python waits for that without end.
    began: Any = getattr(thread, "_started", None)
    if began is not None:
        began.wait = functools.partial(began.wait, _BEGINS_WITHIN)
    with interrupts_first():
        thread.start()
    if began is not None and not began.is_set():
        getattr(threading, "_limbo", {}).pop(thread, None)
        raise RuntimeError("can't start new thread: it ended before it began")


class Stop:
    """A word to threads that they shall end.

    Not `threading.Event`, which takes a lock in Python's code: a Ctrl-C there leaves it taken, and whoever says the
    word again while tidying up would wait for ever.
    """

    def __init__(self) -> None:
        self._said = False
        self._gate = threading.Lock()
        self._gate.acquire()

    def say(self) -> None:
        """Say it. May be said again."""
        self._said = True
        # One that waits goes on; the others look when their time is up.
        with suppress(RuntimeError):
            self._gate.release()

    def wait(self, seconds: float = 0.0) -> bool:
        """Wait for it, so long at most; whether it was said."""
        return self._said or (seconds > 0 and self._gate.acquire(timeout=seconds)) or self._said


# `warnings.catch_warnings` is for one thread at a time: it changes the filters of all, and puts back what it found.
catching_warnings = lasting_lock()


class Shared:
    """Something of the whole process that is otherwise while anyone is inside.

    Args:
        begin: changes it; called by the first.
        end: changes it back; called behind the last, also where `begin` was interrupted, and must bear to be called
            again.
    """

    def __init__(self, begin: Callable[[], object], end: Callable[[], object]) -> None:
        self._begin, self._end = begin, end
        self._lock = lasting_lock()
        # Each who is inside, and in which thread.
        self._users: dict[object, int] = {}
        self._begun = False
        _changes.append(self)

    @contextmanager
    def changed(self) -> Iterator[None]:
        """Inside, it is changed. A Ctrl-C at any moment leaves nothing changed."""
        me = object()
        try:
            with self._lock:
                self._users[me] = threading.get_ident()
                if not self._begun:
                    self._begun = True
                    self._begin()
            yield
        finally:
            interrupt = None
            while me in self._users:
                try:
                    with self._lock:
                        if len(self._users) == 1:
                            self._end()
                            self._begun = False
                        self._users.pop(me, None)
                except KeyboardInterrupt as error:
                    interrupt = error
            if interrupt is not None:
                raise interrupt

    def forget_others(self) -> None:
        """In a child: whoever was inside in another thread is not there."""
        here = threading.get_ident()
        self._users = {user: thread for user, thread in self._users.items() if thread == here}
        if self._begun and not self._users:
            self._end()
            self._begun = False


@functools.cache
def _silence(name: str) -> Shared:
    log = logging.getLogger(name)
    before: list[bool] = []

    def begin() -> None:
        before.append(log.disabled)
        log.disabled = True

    def end() -> None:
        if before:
            log.disabled = before[0]
            before.clear()

    return Shared(begin, end)


def silent(name: str) -> AbstractContextManager[None]:
    """The log of this name is off while any thread is inside."""
    return _silence(name).changed()


@functools.cache
def _ignorance(message: str) -> Shared:
    def ours() -> list[Any]:
        return [one for one in warnings.filters if getattr(one[1], "pattern", None) == message]

    def end() -> None:
        for one in ours():
            warnings.filters.remove(one)  # type: ignore[attr-defined]

    return Shared(lambda: warnings.filterwarnings("ignore", message, UserWarning), end)


def ignoring(message: str) -> AbstractContextManager[None]:
    """A `UserWarning` that begins so is not said while any thread is inside.

    Not by `warnings.catch_warnings`: a child that is forked meanwhile would have these filters for ever.
    """
    return _ignorance(message).changed()


def _forked() -> None:
    for lock in _locks:
        if not lock._is_owned():
            lock._at_fork_reinit()
    for change in _changes:
        change.forget_others()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
