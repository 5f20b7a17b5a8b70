"""What a block used."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from lowmem import memory
from lowmem.errors import MeasureError, OptionError, PeakExceededError
from lowmem.sizes import MIB

# What the heap gives back meanwhile of what it held before.
PAGES = 64 * 1024

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
REPOSITORY = Path(__file__).parents[1]


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=REPOSITORY)


@pytest.fixture(autouse=True)
def _no_garbage() -> None:
    """What earlier tests left must not be freed in the middle of a measurement, nor be used again as fresh memory."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def wait_for_sampler(context: memory.measure) -> None:
    """A block that must be looked at from its first line on begins here."""
    sampler = context._run._sampler
    while isinstance(sampler, memory.ProcessSampler) and not sampler._is_up():
        time.sleep(0.001)


@linux
def test_anonymous_memory_is_what_the_kernel_calls_rss_anon():
    held = bytearray(32 * MIB)
    status = Path("/proc/self/status").read_text()
    rss_anon = int(status.split("RssAnon:")[1].split()[0]) * 1024
    assert abs(memory.anonymous_memory() - rss_anon) <= 2 * MIB
    assert memory.anonymous_memory(os.getpid()) >= len(held)


def test_anonymous_memory_of_no_process_is_an_error():
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    with pytest.raises(MeasureError, match=f"process {done.pid}"):
        memory.anonymous_memory(done.pid)


def test_touched_bytes_are_the_peak():
    with memory.measure() as measured:
        held = bytearray(64 * MIB)
    assert 64 * MIB - PAGES <= measured.peak <= 72 * MIB, measured
    assert measured.peak == measured.peak_anonymous - measured.baseline
    assert measured.peak_rss >= measured.peak_anonymous
    assert len(held) == 64 * MIB


@linux
def test_mapped_file_pages_are_resident_but_not_anonymous(tmp_path):
    import mmap

    path = tmp_path / "weights"
    path.write_bytes(bytes(32 * MIB))
    with path.open("rb") as file, memory.measure() as measured:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        assert sum(mapped[:: mmap.PAGESIZE]) == 0
    assert measured.peak < 8 * MIB
    assert measured.peak_rss >= 32 * MIB + measured.baseline
    mapped.close()


@linux
def test_a_short_spike_is_seen():
    for _ in range(20):
        context = memory.measure()
        with context as measured:
            wait_for_sampler(context)
            spike = bytearray(64 * MIB)
            time.sleep(0.02)
            del spike
        # A machine that is too busy to look says so.
        if measured.gap < 0.02:
            assert 64 * MIB - PAGES <= measured.peak <= 72 * MIB, measured
            return
    pytest.skip("the machine is too busy")


@linux
def test_a_busy_interpreter_hides_nothing():
    before = sys.getswitchinterval()
    sys.setswitchinterval(3600)  # no other thread gets a turn
    try:
        for _ in range(20):
            context = memory.measure()
            with context as measured:
                wait_for_sampler(context)
                spike = bytearray(64 * MIB)
                begun = time.monotonic()
                while time.monotonic() < begun + 0.05:
                    pass
                del spike
            if measured.gap < 0.05:
                assert 64 * MIB - PAGES <= measured.peak <= 72 * MIB, measured
                return
    finally:
        sys.setswitchinterval(before)
    pytest.skip("the machine is too busy")


def test_results_are_refused_before_the_end():
    with memory.measure() as measured:
        assert measured.baseline > 0
        assert "not finished" in repr(measured)
        with pytest.raises(MeasureError, match="peak_anonymous: not measured yet"):
            _ = measured.peak
    assert measured.seconds >= 0
    assert "peak=" in repr(measured)
    assert not hasattr(measured, "nonsense")


def test_results_are_complete_when_the_block_raised():
    held = []

    @memory.measure(below=0)
    def fail() -> None:
        held.append(bytearray(64 * MIB))
        raise ValueError("from the block")

    with pytest.raises(ValueError, match="from the block"):
        fail()
    assert fail.measurement.peak >= 64 * MIB - PAGES


def test_exceeding_below_says_how_much_was_added():
    text = r"^peak anonymous memory: limited to 8.00 MiB but 3\d.\d\d MiB was added$"
    with pytest.raises(PeakExceededError, match=text), memory.measure(below="8MiB"):
        held = bytearray(32 * MIB)
    assert held


def test_staying_below_raises_nothing():
    with memory.measure(below="64MiB") as measured:
        pass
    measured.assert_peak_below("64MiB")
    measured.assert_peak_below(measured.peak)


@pytest.mark.parametrize(
    "options", [{"interval": 0}, {"interval": -1}, {"interval": float("nan")}, {"interval": "1"}, {"below": "much"}]
)
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(OptionError):
        memory.measure(**options)


def test_marks_name_moments_of_the_timeline():
    with memory.measure() as measured:
        measured.mark("first")
        measured.mark("second")
    (first, one), (second, two) = measured.marks
    assert (one, two) == ("first", "second")
    assert 0 <= first <= second <= measured.seconds


def test_the_timeline_begins_and_ends_with_the_block():
    with memory.measure() as measured:
        time.sleep(0.05)
    times = [seconds for seconds, _, _ in measured.samples]
    assert times == sorted(times)
    assert times[0] == 0
    assert times[-1] == measured.seconds
    assert max(anonymous for _, anonymous, _ in measured.samples) == measured.peak_anonymous


def test_a_measurement_is_plain_enough_for_json():
    with memory.measure() as measured:
        measured.mark("x")
    found = json.loads(json.dumps(measured.to_dict()))
    assert found["peak"] == measured.peak
    assert found["marks"][0][1] == "x"
    assert len(found["samples"]) == len(measured.samples)
    assert found["device_samples"] == {name: [list(s) for s in line] for name, line in measured.device_samples.items()}


def test_a_decorated_function_is_measured_at_every_call():
    @memory.measure()
    def allocate(size: int) -> bytearray:
        """Allocate."""
        return bytearray(size)

    assert len(allocate(32 * MIB)) == 32 * MIB
    large = allocate.measurement
    allocate(MIB)
    assert allocate.measurement is not large
    assert allocate.measurement.peak < 16 * MIB < large.peak
    assert allocate.__doc__ == "Allocate."


def test_a_decorated_function_may_recurse_and_run_in_threads():
    seen = []

    @memory.measure()
    def count_down(depth: int) -> int:
        return 0 if depth == 0 else 1 + count_down(depth - 1)

    assert count_down(3) == 3
    threads = [threading.Thread(target=lambda: seen.append(count_down(1))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1, 1, 1, 1]
    assert count_down.measurement.seconds >= 0


def test_a_decorated_function_that_exceeds_below_raises_and_keeps_its_measurement():
    @memory.measure(below="1MiB")
    def allocate() -> bytearray:
        return bytearray(32 * MIB)

    with pytest.raises(PeakExceededError):
        allocate()
    assert allocate.measurement.peak >= 32 * MIB - PAGES


def test_functions_that_work_after_they_return_cannot_be_decorated():
    async def coroutine() -> None: ...

    def generator():  # type: ignore[no-untyped-def]
        yield

    for function in (coroutine, generator):
        with pytest.raises(OptionError, match=rf"{function.__name__}.*with measure\(\)"):
            memory.measure()(function)


def test_nested_measures_each_see_their_own_part():
    with memory.measure() as outer:
        first = bytearray(64 * MIB)
        with memory.measure() as inner:
            second = bytearray(48 * MIB)
    assert 48 * MIB - PAGES <= inner.peak <= 56 * MIB
    assert 112 * MIB - PAGES <= outer.peak <= 120 * MIB
    assert len(first) > len(second)


def test_one_measure_cannot_run_twice_at_once_but_again():
    context = memory.measure()
    with context, pytest.raises(MeasureError, match="already running"):
        context.__enter__()
    with context as measured:
        pass
    assert measured.peak >= 0
    with pytest.raises(MeasureError, match="not running"):
        context.__exit__(None, None, None)


@pytest.mark.parametrize(("before", "after", "said"), [(10, 20, 20), (10, 10, None), (None, 5, None), (5, None, None)])
def test_the_peak_of_the_cgroup_is_said_only_if_the_block_raised_it(monkeypatch, before, after, said):
    peaks = iter([before, after])
    monkeypatch.setattr(memory, "group_peak", lambda: next(peaks))
    with memory.measure() as measured:
        pass
    assert measured.cgroup_peak == said


@pytest.mark.parametrize("obstacle", ["no /proc", "no processes left", "frozen"])
def test_a_thread_looks_where_a_process_cannot(monkeypatch, obstacle):
    def refuse(*args: object, **options: object) -> None:
        raise BlockingIOError("no more processes")

    if obstacle == "no /proc":
        monkeypatch.setattr("lowmem._processes.has_statm", lambda: False)
        monkeypatch.setattr(memory, "has_statm", lambda: False)
    elif obstacle == "frozen":
        monkeypatch.setattr(sys, "frozen", True, raising=False)
    else:
        monkeypatch.setattr(os, "posix_spawn", refuse)
    with memory.measure() as measured:
        held = bytearray(32 * MIB)
    assert measured.method == "thread"
    # Without another process the looks are our own, and what they need comes and goes.
    assert 31 * MIB - PAGES <= measured.peak <= 40 * MIB
    assert len(held) == 32 * MIB
    assert not any(thread.name == "lowmem-sampler" for thread in threading.enumerate())


def test_importing_imports_no_torch_and_starts_nothing():
    done = python(
        """
        import sys, threading
        import lowmem.memory
        print("torch" in sys.modules, "psutil" in sys.modules, threading.active_count())
        """
    )
    assert done.stdout.split() == ["False", "False", "1"], done.stderr


def test_all_is_complete_and_documented():
    for name in memory.__all__:
        assert getattr(memory, name).__doc__, name
