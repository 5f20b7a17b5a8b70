"""A stopwatch with names, for the phases of a load."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Phases:
    """Seconds by phase; `weights` is all of the load that is not `build`."""

    def __init__(self) -> None:
        self.build = 0.0
        self._started = time.perf_counter()
        self._whole = 0.0

    @contextmanager
    def building(self) -> Iterator[None]:
        """Count the block as making the model."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.build += time.perf_counter() - started

    def start(self) -> None:
        """The load begins now."""
        self._started = time.perf_counter()

    def stop(self) -> None:
        """The load has ended."""
        self._whole = time.perf_counter() - self._started

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._started

    def to_dict(self) -> dict[str, float]:
        """Seconds of each phase."""
        return {"build": self.build, "weights": max(0.0, self._whole - self.build)}
