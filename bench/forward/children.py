"""The bench's end of its child processes: forks of one server that has imported everything and run nothing."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from .child import serve

_ROOT = Path(__file__).parent.parent.parent
# Seconds for a child to end, once nobody asks it anything.
_PATIENCE = 10.0


class Child:
    """A process with a runner, or one that says why not: see `status` and `reason` of each answer."""

    def __init__(self, context: ForkServerContext, make: Callable[[Any], object], order: Any, seconds: float) -> None:
        self._seconds = seconds
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, make, order))
        self._process.start()
        theirs.close()
        self.loaded = self._receive()

    def ask(self, what: str, argument: object = None) -> dict[str, Any]:
        """The answer of a method of the runner; `failed` when the process was killed, raised or took too long."""
        try:
            self._ours.send((what, argument))
        except OSError:
            return {"status": "failed", "reason": "it has ended"}
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        try:
            if not self._ours.poll(self._seconds):
                self.close()
                return {"status": "failed", "reason": f"it took more than {self._seconds:.0f} s"}
            answer: dict[str, Any] = self._ours.recv()
        except (EOFError, OSError):
            self._process.join(_PATIENCE)
            return {"status": "failed", "reason": f"killed (exit {self._process.exitcode})"}
        return answer

    def close(self) -> None:
        """End it: by itself, or else by force."""
        self._ours.close()
        self._process.join(_PATIENCE)
        if self._process.is_alive():
            self._process.kill()
        self._process.join()


@contextlib.contextmanager
def server(preload: str = "bench.forward.preload") -> Iterator[ForkServerContext]:
    """What makes children: the server imports `preload`, once."""
    changed = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(_ROOT)}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    try:
        yield context
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
