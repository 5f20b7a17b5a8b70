"""Which way bytes are read: through the page cache, past it, or through a mapping; found out while reading."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from ..planner.moves import LEAST_DIRECT
from ..planner.records import IO

Way = Literal["buffered", "direct", "mmap"]

# Bytes that each way gets in a trial, and how much a file must hold for a trial of its own: what is faster changes
# with the disk and with the minute.
_TRIAL = 32 * 1024 * 1024
_WORTH_A_TRIAL = 1024 * 1024 * 1024
# Below this share of a trial's bytes the other readers' requests tell more about the time than our own.
_ENOUGH = 0.5
# Direct reads leave everyone else's pages alone and the processors free, and a trial this short errs by a third at
# times, so the page cache must be faster by more than that.
_MARGIN = 0.75


@dataclass
class _Trial:
    """Both ways on the cold bytes of one device, one after the other: bytes handed out, and bytes and seconds seen."""

    given: dict[Way, int] = field(default_factory=lambda: {"direct": 0, "buffered": 0})
    seen: dict[Way, int] = field(default_factory=lambda: {"direct": 0, "buffered": 0})
    seconds: dict[Way, float] = field(default_factory=lambda: {"direct": 0.0, "buffered": 0.0})

    def next(self, nbytes: int) -> Way | None:
        """The way of the next read of the trial, None when it is over."""
        for way in self.given:
            if self.given[way] < _TRIAL:
                self.given[way] += nbytes
                return way
        return None

    def record(self, way: Way, nbytes: int, seconds: float) -> None:
        self.seen[way] += nbytes
        self.seconds[way] += seconds

    @property
    def winner(self) -> Way:
        """What is faster by what was seen; direct while too little was."""
        if min(self.seen.values()) < _ENOUGH * _TRIAL:
            return "direct"
        rate = {way: self.seen[way] / max(self.seconds[way], 1e-9) for way in self.seen}
        return "buffered" if rate["direct"] < _MARGIN * rate["buffered"] else "direct"


class Ways:
    """Chooses for each read of a load, and counts. Used by several threads.

    Args:
        io: what the user asked for; `auto` chooses.
    """

    def __init__(self, io: IO = "auto") -> None:
        self._io = io
        self._lock = threading.Lock()
        self._trials: dict[int, _Trial] = {}
        self._refused: set[int] = set()
        self._read: Counter[str] = Counter()

    @property
    def always_direct(self) -> bool:
        """Whether the user asked for direct reads, of cached files too."""
        return self._io == "direct"

    def open(self, device: int, size: int) -> None:
        """A file of `size` bytes on `device` (st_dev) begins; a large one is tried anew."""
        with self._lock:
            if device not in self._trials or size >= _WORTH_A_TRIAL:
                self._trials[device] = _Trial()

    def choose(self, device: int, nbytes: int, *, cached: bool, direct: bool) -> Way:
        """The way for the next read of `nbytes` from a file on `device`.

        Args:
            cached: the bytes are in the page cache.
            direct: whether this file can be read directly, as far as is known.
        """
        if self._io == "mmap":
            return "mmap"
        if self._io == "buffered" or not direct or nbytes < LEAST_DIRECT:
            return "buffered"
        with self._lock:
            if device in self._refused:
                return "buffered"
            if self._io == "direct":
                return "direct"
            if cached:
                return "buffered"
            trial = self._trials[device]
            return trial.next(nbytes) or trial.winner

    def record(self, device: int, way: Way, nbytes: int, seconds: float, *, cached: bool) -> None:
        """A read has ended; what came out of the page cache says nothing about the disk."""
        with self._lock:
            self._read[way] += nbytes
            if not cached and way != "mmap" and nbytes >= LEAST_DIRECT and device in self._trials:
                self._trials[device].record(way, nbytes, seconds)

    def refuse_direct(self, device: int) -> None:
        """The system refused a direct read there, so no other is tried."""
        with self._lock:
            self._refused.add(device)

    @property
    def read(self) -> dict[str, int]:
        """Way → bytes."""
        with self._lock:
            return dict(self._read)
