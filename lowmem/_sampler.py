"""Looks at the memory of one process from another: `python -I -S _sampler.py PID SECONDS`.

Run by path, as a process of its own, so that a busy interpreter cannot keep it from looking. It says it is up
with an empty line, looks until its standard input has a byte or ends (so it never outlives its parent), and
answers with one JSON object. Only modules that start fast are imported; `json` is not one of them.
"""

import os
import select
import sys
import time

LIMIT = 3_000  # points of a timeline; even, so that halving leaves whole buckets


class Timeline:
    """A bounded list of `[seconds, anonymous, rss]` that never loses a peak.

    When it is full, neighbours are merged: the time of the higher anonymous figure, the highest of both
    figures. `first` and `last` are the times of the first and last look, `gap` the longest between two.
    """

    def __init__(self) -> None:
        self.points: list[list[float]] = []
        self.first = self.last = self.gap = 0.0
        self._looks = 0
        self._stride = 1

    def add(self, seconds: float, anonymous: int, rss: int) -> None:
        """Record one look, which is not earlier than the last."""
        if not self._looks:
            self.first = self.last = seconds
        self.gap = max(self.gap, seconds - self.last)
        self.last = seconds
        point = [seconds, anonymous, rss]
        if self._looks % self._stride:
            self.points[-1] = _higher(self.points[-1], point)
        else:
            if len(self.points) == LIMIT:
                self.points = [_higher(*self.points[at : at + 2]) for at in range(0, LIMIT, 2)]
                self._stride *= 2
            # The stride may just have doubled, but then the looks so far are a multiple of it.
            self.points.append(point)
        self._looks += 1

    def longest_gap(self, started: float, ended: float) -> float:
        """Longest time without a look, also before the first and after the last."""
        return max(self.first - started, self.gap, ended - self.last) if self.points else ended - started


def _higher(one: list[float], other: list[float]) -> list[float]:
    return [(one if one[1] >= other[1] else other)[0], max(one[1], other[1]), max(one[2], other[2])]


def parse_statm(line: bytes) -> tuple[int, int]:
    """(anonymous, rss) bytes of a line of `/proc/PID/statm`; see proc(5). Zeros for a zombie."""
    _, resident, shared, _ = line.split(None, 3)
    page = os.sysconf("SC_PAGE_SIZE")
    return (int(resident) - int(shared)) * page, int(resident) * page


def _let_go() -> None:
    """Close what the measured process lets its children have. Not up to a limit, which may be a thousand million."""
    # pathlib and contextlib take longer to import than all the rest.
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        if int(name) > 2:
            try:  # noqa: SIM105
                os.close(int(name))
            except OSError:
                pass  # by which the folder was read


def _main(pid: str, interval: float) -> None:
    statm = os.open(f"/proc/{pid}/statm", os.O_RDONLY)
    os.write(1, b"\n")
    timeline, wait = Timeline(), 0.0
    while not select.select([0], [], [], wait)[0]:
        anonymous, rss = parse_statm(os.pread(statm, 128, 0))
        if not rss:
            return
        timeline.add(time.monotonic(), anonymous, rss)
        wait = interval
    numbers = f'"first": {timeline.first}, "last": {timeline.last}, "gap": {timeline.gap}'
    sys.stdout.write(f'{{{numbers}, "points": {timeline.points}}}')
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        _let_go()
        _main(sys.argv[1], float(sys.argv[2]))
    except (BrokenPipeError, ProcessLookupError):
        pass  # the measured process is gone, and nobody is left to tell
    except BaseException:
        os._exit(1)
    # Without the interpreter's tidying up, for which the measured process would wait.
    os._exit(0)
