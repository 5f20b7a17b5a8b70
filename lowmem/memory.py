"""What a run used: the peak of anonymous memory, its timeline, and the marks on it.

    with lowmem.measure() as memory:
        model = lowmem.load(...)
        memory.mark("loaded")
    memory.assert_peak_below("8GiB")

Anonymous memory is what cannot be dropped and read again: heap, tensors, stacks; not mapped files. On Linux it is
`resident - shared` of `/proc/PID/statm`, which is `RssAnon` of `/proc/PID/status` and cheaper to read. Pages in
swap and in shared memory (`/dev/shm`) are not part of it.

The kernel keeps these counters per CPU. Linux 6.2 to 6.15 show them without adding up the CPUs' remainders, which
may be off by some pages per CPU; all other versions show them exactly or nearly so.

How much memory there is, which is the other half of this subject, is in `limits`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, ParamSpec, Protocol, TypeVar, cast

from . import _sampler, plots
from ._devices import DeviceWatch
from ._process_sampler import ProcessSampler
from ._processes import has_statm, high_water, look, process_tree
from ._sampler import Timeline
from ._thread_sampler import ThreadSampler
from .errors import MeasureError, OptionError, PeakExceededError
from .limits import HostMemory, device_memory, group_peak, host_memory
from .sizes import format_size, parse_size, shown

__all__ = [
    "HostMemory",
    "MeasuredFunction",
    "Measurement",
    "anonymous_memory",
    "device_memory",
    "host_memory",
    "measure",
    "measure_command",
]

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

_LONGEST_INTERVAL = 3600.0


def anonymous_memory(pid: int | None = None) -> int:
    """Anonymous bytes that process `pid` (this one if None) has in memory now.

    Without `/proc` it is the unique set size, or where that is denied the resident size.

    Raises:
        MeasureError: there is no such process.
    """
    return look(pid)[0]


@dataclass(eq=False, repr=False)
class Measurement:
    """What a measured block or command used. Sizes are bytes, times are seconds since its start.

    While the block runs only `baseline`, `method`, `marks` and `mark` can be used; anything else raises
    `MeasureError`.

    Attributes:
        baseline: anonymous memory at the start; 0 for a command.
        method: `'process'` when another process looked on; `'thread'` when only a thread of this process could,
            which a busy interpreter delays.
        peak_anonymous: highest anonymous memory seen, absolute.
        peak_rss: highest resident memory, absolute, mapped files included. Where the kernel's own high-water mark
            (`VmHWM`) rose during the block it is that mark. The kernel keeps none for anonymous memory, so
            `peak_anonymous` is what looks have seen.
        cgroup_peak: peak charge of our memory cgroup, page cache and other processes included; None unless the
            block raised it, because else it tells of something earlier.
        devices: peak bytes that torch allocated per CUDA device, `{'cuda:0': ...}`; empty without CUDA. Starting a
            measure resets torch's own peak; code in the block that does so hides what came before.
        seconds: duration.
        gap: longest time that nobody looked; a spike shorter than this may be missing. The sampler needs some
            15 ms to start, which is the gap of most blocks.
        samples: timeline of (seconds, anonymous, rss), at most some 3,000 points. Each is the highest of its
            stretch of time, so that peaks are never thinned out.
        device_samples: timeline of (seconds, bytes) per CUDA device, by the same rule: what torch had allocated there.
            A thread of this process looks, every 5 ms or less often, so a short spike is in `devices` only. Empty
            without CUDA, and for a command.
    """

    baseline: int
    method: Literal["process", "thread"]
    peak_anonymous: int = field(init=False)
    peak_rss: int = field(init=False)
    cgroup_peak: int | None = field(init=False)
    devices: dict[str, int] = field(init=False)
    seconds: float = field(init=False)
    gap: float = field(init=False)
    samples: tuple[tuple[float, int, int], ...] = field(init=False)
    device_samples: dict[str, tuple[tuple[float, int], ...]] = field(init=False)
    _started: float = field(init=False, default_factory=time.monotonic)
    _marks: list[tuple[float, str]] = field(init=False, default_factory=list)

    # Only reached for attributes without a value: those that the end of the block will set.
    def __getattr__(self, name: str) -> Any:
        if name in type(self).__dataclass_fields__:
            raise MeasureError(f"{name}: not measured yet; read it after the with block has ended without an error")
        raise AttributeError(name)

    def __repr__(self) -> str:
        if "samples" not in vars(self):
            return "Measurement(not finished)"
        sizes = f"peak={format_size(self.peak)}, peak_rss={format_size(self.peak_rss)}"
        return f"Measurement({sizes}, seconds={self.seconds:.3f}, method={self.method!r})"

    @property
    def peak(self) -> int:
        """Bytes of anonymous memory that were added at the worst moment, never negative."""
        return max(0, self.peak_anonymous - self.baseline)

    @property
    def marks(self) -> tuple[tuple[float, str], ...]:
        """(seconds, name) of every `mark`, in order."""
        return tuple(self._marks)

    def mark(self, name: str) -> None:
        """Give this moment of the timeline a name, such as `'shard 2'`. Any thread may do so."""
        self._marks.append((time.monotonic() - self._started, name))

    def assert_peak_below(self, limit: int | str) -> None:
        """Raise if `peak` is above `limit`, bytes or text such as `'100MiB'`.

        Raises:
            PeakExceededError: it is.
            OptionError: `limit` is not a size.
        """
        most = parse_size(limit, "limit")
        if self.peak > most:
            raise PeakExceededError(
                f"peak anonymous memory: limited to {format_size(most)} but {format_size(self.peak)} was added"
            )

    def plot(self, path: str | os.PathLike[str], *, title: str | None = None) -> None:
        """Draw memory over time, with the marks, into a .png, .svg or .pdf file. Needs `pip install 'lowmem[plot]'`.

        Raises:
            OptionError: `path` is not that of a picture, or cannot be written.
            PlotError: matplotlib is not here, or the disk is full.
            MeasureError: the block has not ended.
        """
        target = plots.parse_target(path)
        plots.save(plots.draw(self, title=title or f"memory over {self.seconds:.2f} s"), target)

    def to_dict(self) -> dict[str, object]:
        """Every figure as plain values, ready for JSON."""
        names = ("baseline", "peak_anonymous", "peak", "peak_rss", "cgroup_peak", "seconds", "gap", "method")
        return {
            **{name: getattr(self, name) for name in names},
            "devices": dict(self.devices),
            "marks": [list(mark) for mark in self._marks],
            "samples": [list(sample) for sample in self.samples],
            "device_samples": {name: [list(sample) for sample in line] for name, line in self.device_samples.items()},
        }

    def complete(
        self,
        looks: Iterable[Sequence[float]],
        *,
        ended: float,
        gap: float,
        rss_floor: int = 0,
        cgroup_peak: int | None = None,
        devices: Mapping[str, int] | None = None,
        device_looks: Mapping[str, Iterable[tuple[float, int]]] | None = None,
    ) -> None:
        """Fill in the results; not for users. Times are of `time.monotonic`, `looks` are (time, anonymous, rss)."""
        samples = tuple((at - self._started, int(anonymous), int(rss)) for at, anonymous, rss in looks)
        self.seconds = ended - self._started
        self.gap = gap
        self.peak_anonymous = max(anonymous for _, anonymous, _ in samples)
        self.peak_rss = max(rss_floor, *(rss for _, _, rss in samples))
        self.cgroup_peak = cgroup_peak
        self.devices = dict(devices or {})
        self.device_samples = {
            # Devices are looked at a moment before the block begins and after it ends.
            name: tuple((min(max(at, self._started), ended) - self._started, size) for at, size in line)
            for name, line in (device_looks or {}).items()
        }
        self.samples = samples


class MeasuredFunction(Protocol[P, R_co]):
    """A function decorated with `measure()`; `measurement` is that of the last call to end, from the first on."""

    measurement: Measurement

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Call the function and measure it."""
        ...

    def __get__(self, instance: object, owner: type | None = None) -> Callable[..., R_co]:
        """Bind as a function does, so that methods can be measured."""
        ...


class measure:  # noqa: N801 - a context manager that reads as a verb, as in contextlib
    """Measure the memory of this process while a block or a function runs.

    Yields a `Measurement` that is complete when the block has ended, also when by an error. Another process looks
    on every `interval` seconds, so a busy interpreter hides nothing; where it cannot be had, a thread does. Blocks
    may be nested and may run in several threads: each sees the whole process. The sampler has some 6 MiB of its
    own, which our cgroup pays for but no figure of the `Measurement` except `cgroup_peak` contains.

    As a decorator, `@measure(below="8GiB")`, every call is measured afresh and the last to end is
    `function.measurement`.

    Args:
        interval: seconds between looks. A look costs the sampler some 20 µs.
        below: limit on `Measurement.peak`, checked at the end unless the block raised.

    Raises:
        OptionError: an option has a value that means nothing.
        PeakExceededError: at the end, if `peak` is above `below`.
        MeasureError: at the end, if the sampler was killed, so that the peak is not known.
    """

    def __init__(self, *, interval: float = 0.001, below: int | str | None = None) -> None:
        self._interval = _checked_interval(interval)
        self._below = None if below is None else parse_size(below, "below")
        self._run: _Run | None = None
        self._last: Measurement | None = None

    def __enter__(self) -> Measurement:
        if self._run is not None:
            raise MeasureError("this measure() is already running; make another one for every block")
        self._run = _Run(self._interval)
        self._last = self._run.measurement
        return self._last

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        run, self._run = self._run, None
        if run is None:
            raise MeasureError("this measure() is not running; use it in a with statement")
        try:
            run.finish()
        except MeasureError:
            # What the block itself raised is the greater news.
            if error is None:
                raise
        if error is None and self._below is not None:
            run.measurement.assert_peak_below(self._below)

    def __call__(self, function: Callable[P, R]) -> MeasuredFunction[P, R]:
        """Decorate `function`, which must do its work before it returns."""
        if (
            inspect.iscoroutinefunction(function)
            or inspect.isgeneratorfunction(function)
            or inspect.isasyncgenfunction(function)
        ):
            name = getattr(function, "__qualname__", repr(function))
            raise OptionError(f"{name}: its work is done after the call returns; use `with measure()` inside it")

        @functools.wraps(function)
        def measured(*args: P.args, **kwargs: P.kwargs) -> R:
            # A fresh one per call, so that recursion and threads do not share state.
            call = measure(interval=self._interval, below=self._below)
            try:
                with call:
                    return function(*args, **kwargs)
            finally:
                if call._last is not None:
                    decorated.measurement = call._last

        decorated = cast("MeasuredFunction[P, R]", measured)
        return decorated


def measure_command(command: Sequence[str], interval: float = 0.001) -> tuple[int, Measurement]:
    """Run a program to its end and measure it and its descendants: (exit code, measurement).

    Figures are sums over the live processes of the tree, from a baseline of 0. Pages that processes share after a
    fork count once per process. Processes that live only some milliseconds may be missed, and so may one whose
    parent did not live longer. `devices` is empty: what other processes have on a GPU is not asked.

    The program has our terminal, files and environment. Ctrl-C reaches it from the terminal and is left to it: we
    wait for its end. A program that a signal ended has exit code 128 + signal, as in a shell.

    Raises:
        MeasureError: the command cannot be started.
        OptionError: `command` is not a list of words, or `interval` is not a time.
    """
    words = list(command) if isinstance(command, Sequence) and not isinstance(command, (str, bytes)) else []
    if not words or not all(isinstance(word, (str, bytes, os.PathLike)) for word in words):
        raise OptionError(f"command: expected a program and its arguments as a list, found {shown(command)}")
    interval = _checked_interval(interval)
    highest_before = group_peak()
    try:
        process = subprocess.Popen(words)
    except (OSError, ValueError) as error:
        raise MeasureError(
            f"{words[0] or shown(words[0])}: cannot be started ({error}); "
            "check that it is spelled right, executable and on PATH"
        ) from error
    measurement = Measurement(baseline=0, method="process")
    timeline = _watch_to_the_end(process, interval)
    ended = time.monotonic()
    measurement.complete(
        timeline.points,
        ended=ended,
        gap=timeline.longest_gap(measurement._started, ended),
        cgroup_peak=_raised_group_peak(highest_before),
    )
    code = process.returncode
    return (code if code >= 0 else 128 - code), measurement


def _watch_to_the_end(process: subprocess.Popen[bytes], interval: float) -> Timeline:
    timeline = Timeline()
    tree = process_tree(process.pid)
    try:
        while True:
            try:
                # Looks before it asks, so that there is always one.
                timeline.add(time.monotonic(), *tree.look())
                if process.poll() is not None:
                    return timeline
                # Not a sleep: the end of the program ends it too.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(interval)
            except KeyboardInterrupt:
                continue  # the program got it too, and decides
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        tree.close()


def _checked_interval(interval: float) -> float:
    if isinstance(interval, bool) or not isinstance(interval, (int, float)):
        raise OptionError(f"interval: expected seconds, found {shown(interval)}")
    # Written so that NaN fails too.
    if not 0 < interval <= _LONGEST_INTERVAL:
        raise OptionError(
            f"interval: expected seconds above 0 and at most {_LONGEST_INTERVAL:.0f}, found {shown(interval)}"
        )
    return float(interval)


def _raised_group_peak(before: int | None) -> int | None:
    """The cgroup's peak now, if it is higher than `before`; a lower one tells of an earlier time."""
    now = group_peak()
    return now if now is not None and before is not None and now > before else None


class _Run:
    """One block that is being measured."""

    def __init__(self, interval: float) -> None:
        self._process = os.getpid()
        # Popen returns long before the child looks; until then there are only our own looks at start and end.
        self._sampler = _start_sampler(interval)
        self._devices = DeviceWatch(interval)
        self._group_peak = group_peak()
        self._high_water = high_water()
        # Last of all, so that starting is not measured.
        anonymous, rss = look()
        self.measurement = Measurement(baseline=anonymous, method=self._sampler.method)
        self._first = [self.measurement._started, anonymous, rss]

    def __del__(self) -> None:
        # A Ctrl-C may come between any two steps of a beginning and its end.
        for begun in ("_sampler", "_devices"):
            if begun in vars(self):
                vars(self)[begun].give_up()

    def finish(self) -> None:
        if os.getpid() != self._process:
            raise MeasureError("a measure() ends at a fork in the new process; begin another there")
        last = [time.monotonic(), *look()]
        highest = high_water()
        devices, device_looks = self._devices.finish()
        timeline = self._sampler.finish()
        started, ended = self._first[0], last[0]
        # The child may have looked before the block began or after it ended.
        inside = [point for point in timeline.points if started < point[0] < ended]
        self.measurement.complete(
            [self._first, *inside, last],
            ended=ended,
            gap=timeline.longest_gap(started, ended),
            # A mark that did not move may be from before the block; one that did is exact.
            rss_floor=highest if highest > self._high_water else 0,
            cgroup_peak=_raised_group_peak(self._group_peak),
            devices=devices,
            device_looks=device_looks,
        )


def _start_sampler(interval: float) -> ProcessSampler | ThreadSampler:
    script = Path(_sampler.__file__)
    # In a frozen application sys.executable is the application, which would start itself.
    if has_statm() and sys.executable and script.is_file() and not getattr(sys, "frozen", False):
        try:
            return ProcessSampler(script, interval)
        except OSError:
            pass  # no processes left: a thread sees nearly as much
    return ThreadSampler(interval)
