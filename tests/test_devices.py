"""What a block had on CUDA devices: a fake torch.cuda stands in for the GPU, except where there is one."""

from __future__ import annotations

import json
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from lowmem import _devices, memory
from lowmem.sizes import MIB

THREAD = "lowmem-devices"


class FakeCuda:
    """As much of `torch.cuda` as is asked."""

    def __init__(self) -> None:
        self.in_use, self.count = True, 1
        self.now = self.peak = 0
        self.seen: list[int] = []  # what the thread was told
        self.looked = threading.Condition()

    def allocate(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def wait_for_looks(self, looks: int = 1) -> None:
        """Until the thread has looked that often from now on."""
        with self.looked:
            wanted = len(self.seen) + looks
            assert self.looked.wait_for(lambda: len(self.seen) >= wanted, timeout=60)

    def is_initialized(self) -> bool:
        if threading.current_thread().name == THREAD and not self.in_use:
            self._note(-1)
        return self.in_use

    def device_count(self) -> int:
        return self.count

    def memory_allocated(self, index: int) -> int:
        size = self.now * (index + 1)
        if threading.current_thread().name == THREAD and index == self.count - 1:
            self._note(size)
        return size

    def max_memory_allocated(self, index: int) -> int:
        return self.peak * (index + 1)

    def reset_peak_memory_stats(self, index: int) -> None:
        self.peak = self.now

    def _note(self, size: int) -> None:
        with self.looked:
            self.seen.append(size)
            self.looked.notify_all()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    backends = SimpleNamespace(cuda=SimpleNamespace(is_built=lambda: True))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=fake, backends=backends))
    return fake


def watchers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == THREAD]


@pytest.mark.gpu
def test_device_memory_of_a_real_gpu():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.zeros(1, device="cuda")
    assert memory.device_memory()["cuda:0"] > 0
    before = torch.cuda.memory_allocated(0)
    with memory.measure() as measured:
        held = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
    assert 64 * MIB <= measured.devices["cuda:0"] - before <= 72 * MIB
    sizes = [size for _, size in measured.device_samples["cuda:0"]]
    assert sizes[0] == before
    assert sizes[-1] == before + held.numel()


def test_nested_measures_do_not_lose_device_peaks(cuda):
    with memory.measure() as outer:
        cuda.allocate(50)
        cuda.allocate(-40)
        with memory.measure() as inner:
            cuda.allocate(20)
            cuda.allocate(-20)
    assert inner.devices == {"cuda:0": 30}
    assert outer.devices == {"cuda:0": 50}


def test_devices_are_left_alone_until_cuda_is_in_use(cuda):
    cuda.in_use = False
    cuda.allocate(5)
    with memory.measure() as measured:
        cuda.wait_for_looks()
    assert measured.devices == measured.device_samples == {}
    assert cuda.peak == 5
    assert set(cuda.seen) == {-1}


def test_the_timeline_of_a_device_spans_the_block(cuda):
    cuda.count = 2
    cuda.allocate(10)
    with memory.measure() as measured:
        cuda.wait_for_looks()
        cuda.allocate(90)
        cuda.wait_for_looks(2)
        cuda.allocate(-60)
    assert list(measured.device_samples) == ["cuda:0", "cuda:1"]
    for number, line in enumerate(measured.device_samples.values(), 1):
        times = [at for at, _ in line]
        assert times == sorted(times)
        assert times[0] == 0
        assert times[-1] == measured.seconds
        sizes = [size for _, size in line]
        assert sizes[0] == 10 * number
        assert max(sizes) == 100 * number
        assert sizes[-1] == 40 * number
    found = json.loads(json.dumps(measured.to_dict()))["device_samples"]
    assert found["cuda:0"] == [list(sample) for sample in measured.device_samples["cuda:0"]]


def test_a_device_that_comes_into_use_within_the_block_begins_at_nothing(cuda):
    cuda.in_use = False
    with memory.measure() as measured:
        cuda.wait_for_looks()
        cuda.now, cuda.in_use = 70, True
        cuda.wait_for_looks(2)
    sizes = [size for _, size in measured.device_samples["cuda:0"]]
    assert sizes[:2] == [0, 0]
    assert set(sizes[2:]) == {70}
    assert measured.device_samples["cuda:0"][0][0] == 0


def test_a_device_that_cannot_be_asked_does_not_disturb(cuda, monkeypatch):
    asked = threading.Event()

    def broken(index: int) -> int:
        asked.set()
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(cuda, "memory_allocated", broken)
    with memory.measure() as measured:
        cuda.allocate(5)
        assert asked.wait(60)
    assert measured.devices == {"cuda:0": 5}
    assert measured.device_samples == {}


def test_no_thread_is_left_and_none_is_started_where_torch_has_no_cuda(cuda, monkeypatch):
    with memory.measure():
        assert watchers() == [THREAD]
    assert watchers() == []
    with pytest.raises(ZeroDivisionError), memory.measure():
        _ = 1 // 0
    assert watchers() == []
    cuda.in_use = False
    monkeypatch.setattr(sys.modules["torch"].backends.cuda, "is_built", lambda: False)
    with memory.measure():
        assert watchers() == []
    monkeypatch.delitem(sys.modules, "torch")
    with memory.measure() as measured:
        assert watchers() == []
    assert measured.device_samples == {}


def test_a_machine_without_threads_left_still_knows_the_peaks(cuda, monkeypatch):
    def refuse(thread: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    watch = _devices.DeviceWatch(0.001)
    cuda.allocate(30)
    cuda.allocate(-10)
    peaks, timelines = watch.finish()
    assert peaks == {"cuda:0": 30}
    assert [size for _, size in timelines["cuda:0"]] == [0, 20]


def test_looking_takes_little_of_the_time(cuda, monkeypatch):
    """torch needs long to answer where there are many devices, and holds the interpreter meanwhile."""
    watch = _devices.DeviceWatch(0.001)
    watch.finish()
    clock, waits = [0.0], []

    def answer(index: int) -> int:
        clock[0] += 0.5
        return 7

    class Stop:
        def wait(self, seconds: float) -> bool:
            waits.append(seconds)
            return len(waits) > 2

    monkeypatch.setattr(_devices.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(cuda, "memory_allocated", answer)
    watch._stop = Stop()
    watch._watch()
    assert waits[0] == 0.005
    assert waits[1:] == [25.0, 25.0]
