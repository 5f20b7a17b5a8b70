"""What torch has allocated on CUDA devices while something runs: the peak of each, and a timeline.

torch's own account is asked, and only once CUDA is in use, which asking never changes.
"""

from __future__ import annotations

import sys
import threading
import time
import weakref
from typing import Any, ClassVar

from ._sampler import Timeline
from ._shared import Stop, lasting_lock, start

__all__ = ["DeviceWatch"]

# torch gathers all its statistics to answer, holding the interpreter: some 0.1 ms a device.
_SHORTEST_INTERVAL = 0.005
_SHARE_OF_TIME = 0.02


class DeviceWatch:
    """Peak bytes per CUDA device since the start, and how many there were over time.

    torch keeps one peak for everybody, and a start resets it: what it was is first handed to those who run. A thread
    keeps the timeline; there is none where torch cannot use CUDA or was not imported at the start.
    """

    _lock = lasting_lock()
    _running: ClassVar[weakref.WeakSet[DeviceWatch]] = weakref.WeakSet()

    def __init__(self, interval: float) -> None:
        self._peaks: dict[str, int] = {}
        with self._lock:
            peaks = _cuda_peaks()
            for other in self._running:
                other._include(peaks)
            for index in range(len(peaks)):
                sys.modules["torch"].cuda.reset_peak_memory_stats(index)
            self._running.add(self)
        self._started = time.monotonic()
        self._unused: float | None = None
        self._timelines: dict[str, Timeline] = {}
        self._interval = max(interval, _SHORTEST_INTERVAL)
        self._stop = Stop()
        self._thread: threading.Thread | None = None
        self._look()
        if _may_use_cuda():
            self._thread = threading.Thread(target=self._watch, name="lowmem-devices", daemon=True)
            try:
                start(self._thread)
            except RuntimeError:
                self._thread = None  # no threads left: the peaks are known without it

    def give_up(self) -> None:
        """Let its thread end, which would keep it among those that run."""
        self._stop.say()

    def finish(self) -> tuple[dict[str, int], dict[str, list[tuple[float, int]]]]:
        """End it: (device → peak bytes, device → (`time.monotonic` seconds, bytes) in order of time)."""
        self._stop.say()
        if self._thread is not None:
            self._thread.join()
        self._look()
        with self._lock:
            self._running.discard(self)
            self._include(_cuda_peaks())
        return self._peaks, {
            device: [(seconds, int(size)) for seconds, size, _ in timeline.points]
            for device, timeline in self._timelines.items()
        }

    def _include(self, peaks: dict[str, int]) -> None:
        for device, peak in peaks.items():
            self._peaks[device] = max(peak, self._peaks.get(device, 0))

    def _watch(self) -> None:
        wait = self._interval
        while not self._stop.wait(wait):
            begun = time.monotonic()
            self._look()
            wait = max(self._interval, (time.monotonic() - begun) / _SHARE_OF_TIME)

    def _look(self) -> None:
        now = time.monotonic()
        try:
            sizes = _cuda_sizes()
        except Exception:
            # A context that just begins, or one that an error has broken: the block will say so itself.
            return
        if not sizes:
            self._unused = now
        for device, size in sizes.items():
            if device not in self._timelines:
                self._timelines[device] = timeline = Timeline()
                if self._unused is not None:
                    # Nothing was there until CUDA was in use.
                    timeline.add(self._started, 0, 0)
                    timeline.add(self._unused, 0, 0)
            self._timelines[device].add(now, size, size)


def _cuda() -> Any:
    """`torch.cuda`, if it is in use."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    return cuda if cuda is not None and cuda.is_initialized() else None


def _may_use_cuda() -> bool:
    """Whether CUDA is in use, or may be before long: torch is here and made for it (or for ROCm)."""
    built = getattr(getattr(sys.modules.get("torch"), "backends", None), "cuda", None)
    return _cuda() is not None or (built is not None and bool(built.is_built()))


def _cuda_peaks() -> dict[str, int]:
    """torch's peak per device."""
    cuda = _cuda()
    if cuda is None:
        return {}
    return {f"cuda:{index}": int(cuda.max_memory_allocated(index)) for index in range(cuda.device_count())}


def _cuda_sizes() -> dict[str, int]:
    """Bytes that torch has allocated now, per device."""
    cuda = _cuda()
    if cuda is None:
        return {}
    return {f"cuda:{index}": int(cuda.memory_allocated(index)) for index in range(cuda.device_count())}
