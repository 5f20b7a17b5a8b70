"""Work for threads that the system may refuse to start."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Generic, TypeVar

T = TypeVar("T")


def begin(pool: Executor, work: Callable[[], T]) -> Future[T]:
    """Let a thread of `pool` do this; where the system refuses it one, the caller does it here and now.

    What `work` raises is the future's. A future of work that the pool gives up never comes.
    """
    once = _Once(work)
    try:
        pool.submit(once)
    except RuntimeError:
        # It is in the pool's queue nevertheless, and a thread that was started before may have it already.
        once()
    return once.made


class _Once(Generic[T]):
    """Done by whoever calls it first."""

    def __init__(self, work: Callable[[], T]) -> None:
        self.made: Future[T] = Future()
        self._work: Callable[[], T] | None = work
        self._begun = threading.Lock()

    def __call__(self) -> None:
        if not self._begun.acquire(blocking=False):
            return
        made, work = self.made, self._work
        self._work = None
        assert work is not None
        try:
            made.set_result(work())
        except BaseException as error:  # handed to whoever asks for the result
            made.set_exception(error)
            # Its traceback holds this frame, which is to hold nothing of it.
            del self, made
            if not isinstance(error, Exception):
                raise
