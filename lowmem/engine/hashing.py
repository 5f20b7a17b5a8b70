"""Hash whole files, in small buffers and by a few threads; pages that were not in memory before are given back."""

from __future__ import annotations

import functools
import hashlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from .._files import open_regular
from .._page_cache import give_back, look
from .._shared import Stop
from ..planner import Progress, ProgressCallback
from ..sizes import MIB
from .helpers import begin

_BUFFER = MIB
_WORKERS = 4
_PROGRESS_EVERY = 0.1
# Files that are asked for; each takes a kilobyte.
_AT_ONCE = 512


def hash_all(
    wanted: list[tuple[Path, str]], progress: ProgressCallback | None
) -> tuple[dict[tuple[Path, str], str | OSError], int]:
    """The hash of each file, or why there is none; and the bytes that were read.

    Args:
        wanted: files, and for each `"sha256"` or `"blob"`, as git names the content of a file.
        progress: called from the calling thread.
    """
    meter = _Meter(sum(_size(file) for file, _ in wanted), progress)
    stop = Stop()
    with ThreadPoolExecutor(_WORKERS, thread_name_prefix="lowmem-check") as pool:
        try:
            found = {}
            for first in range(0, len(wanted), _AT_ONCE):
                keys = wanted[first : first + _AT_ONCE]
                # One at a time: to wait for all at once is to look at all of them for each that ends.
                for key, task in [
                    (key, begin(pool, functools.partial(_hash, *key, stop, meter.moved))) for key in keys
                ]:
                    while wait([task], timeout=_PROGRESS_EVERY).not_done:
                        meter.report()
                    meter.report()
                    found[key] = task.result()
            return found, meter.done
        except BaseException:
            stop.say()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _hash(file: Path, kind: str, stop: Stop, moved: Callable[[Path, int], None]) -> str | OSError:
    """By reading it once, in a small buffer; pages that were not in memory before are given back."""
    try:
        # A manifest may name a fifo, which would hang, or a device, which would never end.
        with open_regular(file) as opened:
            buffer = memoryview(bytearray(_BUFFER))
            fd = opened.fileno()
            size = os.fstat(fd).st_size
            cached = look(fd, size)
            state = hashlib.sha256() if kind == "sha256" else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
            at = 0
            while (got := opened.readinto(buffer)) and not stop.wait():
                state.update(buffer[:got])
                for begin, length in cached.absent(at, got):
                    give_back(fd, begin, length)
                at += got
                moved(file, got)
            return state.hexdigest()
    except OSError as error:
        # Its traceback would hold the buffer.
        return error.with_traceback(None)


class _Meter:
    """Counts what the threads have read, and tells the caller in his own."""

    def __init__(self, total: int, progress: ProgressCallback | None) -> None:
        self.done = 0
        self._total = total
        self._progress = progress
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._file = ""

    def moved(self, file: Path, nbytes: int) -> None:
        """A thread has read this."""
        with self._lock:
            self.done += nbytes
            self._file = file.name

    def report(self) -> None:
        """Tell how far it is."""
        if self._progress is None:
            return
        rate = self.done / max(time.monotonic() - self._started, 1e-9)
        left = (self._total - self.done) / rate if rate else None
        self._progress(Progress(self.done, self._total, rate, left, self._file))
