"""Memory of this process, looked at from a thread of it: where no other process can be started."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Literal

from ._processes import look
from ._sampler import Timeline
from ._shared import Stop, start


class ThreadSampler:
    """Looks at us from a thread, which only looks when the interpreter lets it."""

    method: Literal["thread"] = "thread"

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._timeline = Timeline()
        self._stop = Stop()
        self._thread = threading.Thread(target=self._watch, name="lowmem-sampler", daemon=True)
        # No threads left: there are the looks at start and end, and `gap` says so.
        with contextlib.suppress(RuntimeError):
            start(self._thread)

    def give_up(self) -> None:
        """Let its thread end."""
        self._stop.say()

    def finish(self) -> Timeline:
        """End it: what was seen."""
        self._stop.say()
        if self._thread.ident is not None:
            self._thread.join()
        return self._timeline

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self._timeline.add(time.monotonic(), *look())
