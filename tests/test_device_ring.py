"""Weights that readers send to accelerators: right, however late and in whatever order streams do their work.

No accelerator is needed: `fake_device` stands for some whose copies read pinned memory at a random later time.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_device import FakeDevice, FakeStreams
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_models import same
from torch import nn

import lowmem
from bench.gpu import loaders
from bench.gpu.__main__ import as_markdown, goals
from bench.gpu.__main__ import main as bench_main
from lowmem import limits
from lowmem.checkpoint import inspect
from lowmem.engine import accelerator, crew, iterate
from lowmem.engine.accelerator import Slot, narrowed
from lowmem.engine.install import Installer
from lowmem.engine.run import run
from lowmem.engine.streams import StreamBackend
from lowmem.errors import BudgetError, LowmemError
from lowmem.mapping import KeyMapping, Link, Region
from lowmem.planner import LoadPlan, Placement, accelerators, budget, make_stream_plan, moves
from lowmem.planner.budget import Need
from lowmem.planner.moves import ALIGNMENT, CHUNK
from lowmem.planner.records import HostPlan, Staging, StreamRequest
from lowmem.sizes import KIB, MIB

SEEDS = range(6)
DTYPES = ["auto", "float32", "bfloat16", "float16"]


def make(count: int = 24) -> dict[str, torch.Tensor]:
    """Tensors of several dtypes, small and of several chunks."""
    torch.manual_seed(0)
    kinds = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    sizes = [7, 300, 5000, 9001]
    return {f"t{n:02d}": torch.randn(sizes[n // 2 % 4]).to(kinds[n % 4]) for n in range(count)}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ring") / "m.safetensors"
    save_file(make(), path)
    return path


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves, "CHUNK", 4 * KIB)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeDevice]:
    def install(*args: Any, **options: Any) -> FakeDevice:
        device = FakeDevice(*args, **options)
        monkeypatch.setattr(accelerator, "open_backend", device.open)
        return device

    return install


def stream_plan(file: Path, dtype: str = "auto", workers: int = 2, slots: int = 3, device: str = "cuda:0") -> LoadPlan:
    plan, _ = make_stream_plan(inspect(file), StreamRequest(dtype=dtype, device=device))
    return replace(plan, staging=Staging(workers, 16 * KIB, slots=slots))


def cast(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    return tensor if dtype == "auto" else tensor.to(getattr(torch, dtype))


def check_over(device: FakeDevice, pending: int = 0) -> None:
    """Nothing is left of a load."""
    assert device.faults == []
    assert device.pinned == {}
    assert not [t for t in threading.enumerate() if t.name.startswith("lowmem-")]
    left = {name: queue for name, queue in device.streams.items() if queue and not name.endswith("/home")}
    assert len(left) == pending


def read_through(plan: LoadPlan, expected: dict[str, torch.Tensor], dtype: str, window: int = 60_000) -> bool:
    """Whether all values are right at the time at which they are given out."""
    return all(same(tensor, cast(expected[key], dtype)) for key, tensor in iterate(plan, window))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_a_stream_have_their_values_when_they_are_given_out(
    file: Path, fake: Callable[..., FakeDevice], dtype: str, seed: int
) -> None:
    device = fake(seed)
    plan = stream_plan(file, dtype, workers=1 + seed % 4, slots=1 + seed % 3)
    assert read_through(plan, make(), dtype)
    assert device.most_pinned <= plan.staging.total
    check_over(device)
    gc.collect()
    assert device.held == 0


def test_each_of_the_orders_is_needed(
    file: Path, fake: Callable[..., FakeDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the tests around this one would see nothing."""
    with monkeypatch.context() as patch:
        patch.setattr(Slot, "wait", lambda self: self.pending.clear())
        assert not all(read_through(stream_plan(file), make(), "auto") for seed in SEEDS if fake(seed))
    with monkeypatch.context() as patch:
        patch.setattr(accelerator.AcceleratorDestination, "finish", lambda self: None)
        assert not all(read_through(stream_plan(file), make(), "auto") for seed in SEEDS if fake(seed))
    with monkeypatch.context() as patch:
        patch.setattr(accelerator.Lane, "finish", lambda self: None)
        device = fake(1)
        patch.setattr(device, "random", SimpleNamespace(random=lambda: 1.0))
        patch.setattr(accelerator.Lane, "close", lambda self: self._backend.unpin(self._memory))
        # One reader: of two, one may have read it all.
        run(*loading(stream_plan(file, workers=1)))
        check_over(device, pending=1)


def loading(plan: LoadPlan) -> tuple[LoadPlan, Installer]:
    """The tensors of a plan as those of a model."""
    model = nn.Module()
    for p in plan.placements:
        dtype = getattr(torch, p.dtype)
        model.register_buffer(p.target, torch.empty(p.shape, dtype=dtype, device="meta"))
    installer = Installer(model)
    plan.__dict__["model"] = model
    return plan, installer


@pytest.mark.parametrize("pins", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_load_of_several_devices_is_whole_when_it_returns(
    file: Path, fake: Callable[..., FakeDevice], dtype: str, seed: int, pins: bool
) -> None:
    device = fake(seed, pins=pins)
    plan = stream_plan(file, dtype, workers=1 + seed % 3, slots=2)
    names = ["cuda:0", "cuda:1", "cpu"]
    placements = tuple(replace(p, device=names[n % 3]) for n, p in enumerate(plan.placements))
    plan, installer = loading(replace(plan, placements=placements))
    run(plan, installer)
    check_over(device)
    for key, tensor in make().items():
        assert same(plan.__dict__["model"].get_buffer(key), cast(tensor, dtype))
    assert {name.partition("/")[0] for name in device.streams} == {"cuda:0", "cuda:1"}


def test_memory_that_the_callers_stream_still_uses_is_written_to_after_that(
    file: Path, fake: Callable[..., FakeDevice]
) -> None:
    """Work that was asked for before, on memory that was let go of since."""
    device = fake(5)
    sizes = [t.nbytes for t in make().values()]
    old = [device.allocate(size) for size in sizes for _ in range(2)]
    home = device.open("cuda:0")
    for one in old:
        address, nbytes = ctypes.addressof(one), len(one)
        home.submit(home.user, lambda address=address, nbytes=nbytes: ctypes.memset(address, 0xEE, nbytes))
    del one
    old.clear()
    plan, installer = loading(stream_plan(file))
    run(plan, installer)
    home.drain()
    for key, tensor in make().items():
        assert same(plan.__dict__["model"].get_buffer(key), tensor)


def test_what_the_caller_asks_for_when_a_tensor_is_installed_finds_its_values(
    file: Path, fake: Callable[..., FakeDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the order of his stream: nothing else has made the device do its copies by then."""
    device = fake()
    monkeypatch.setattr(device, "random", SimpleNamespace(random=lambda: 1.0, choice=device.random.choice))
    monkeypatch.setattr(crew, "_AT_LEAST_EVERY", 0.0)
    expected = make()
    home = device.open("cuda:0")
    saw: dict[str, bytes] = {}
    installed = threading.Event()
    kept = []

    def install(placement: Placement, tensor: torch.Tensor) -> None:
        name, address, nbytes = placement.target, tensor.data_ptr(), tensor.nbytes
        kept.append(tensor)
        home.submit(home.user, lambda: saw.__setitem__(name, ctypes.string_at(address, nbytes)))
        home.hurry(home.user)
        if len(kept) == len(expected):
            installed.set()

    finish = accelerator.Lane.finish

    def late(self: accelerator.Lane) -> None:
        assert installed.wait(30)
        finish(self)

    monkeypatch.setattr(accelerator.Lane, "finish", late)
    plan = replace(stream_plan(file), staging=Staging(1, 16 * KIB, slots=200))
    keeper: Any = SimpleNamespace(install=install)
    run(plan, keeper)
    home.drain()
    assert saw == {key: tensor.view(torch.uint8).numpy().tobytes() for key, tensor in expected.items()}
    check_over(device)


def test_chunks_in_memory_that_the_callers_stream_still_uses_are_written_to_after_that(
    tmp_path: Path, fake: Callable[..., FakeDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that the caller let go of after the tensor was allocated, whose event says nothing about it."""
    tensor = torch.randn(60_000).half()
    save_file({"whole": tensor}, tmp_path / "m.safetensors")
    device = fake()
    home = device.open("cuda:0")
    plan, installer = loading(stream_plan(tmp_path / "m.safetensors", "float32"))
    size = plan.staging.workers * plan.staging.each
    chunk, left = accelerator.Accelerator.chunk, []

    def after_others(self: accelerator.Accelerator) -> tuple[torch.Tensor, Any]:
        if not left:
            old = device.allocate(size)
            left.append(ctypes.addressof(old))
            for _ in range(100):
                home.submit(home.user, lambda: ctypes.memset(left[0], 0xEE, size))
            del old
        return chunk(self)

    copy = FakeStreams.copy

    def by_turns(self: FakeStreams, into: torch.Tensor, source: torch.Tensor) -> None:
        """The reader's stream is as fast as it can be, and the caller's does one thing meanwhile."""
        copy(self, into, source)
        self.hurry(self.side)
        self.hurry(home.user, 1)

    monkeypatch.setattr(FakeStreams, "copy", by_turns)
    monkeypatch.setattr(accelerator.Accelerator, "chunk", after_others)
    run(plan, installer)
    home.drain()
    assert len(device.free[size]) == 1
    assert same(plan.__dict__["model"].whole, tensor.float())


def test_a_device_holds_nothing_but_the_tensors_when_a_load_is_over(
    file: Path, fake: Callable[..., FakeDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever keeps what the load was done with, as a traceback does, keeps no chunk."""
    kept = []
    made = accelerator.AcceleratorDestination.__init__

    def keep(self: accelerator.AcceleratorDestination, *args: Any) -> None:
        made(self, *args)
        kept.append(self)

    monkeypatch.setattr(accelerator.AcceleratorDestination, "__init__", keep)
    device = fake(1)
    plan, installer = loading(stream_plan(file, "float64"))
    run(plan, installer)
    resident = sum(p.nbytes for p in plan.placements)
    assert len(kept) == len(plan.placements)
    assert device.peak > resident
    assert device.held == resident


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parts_that_do_not_lie_one_behind_the_other_are_put_in_place_on_the_device(
    tmp_path: Path, fake: Callable[..., FakeDevice], dtype: str, seed: int
) -> None:
    """Experts, transposed, each half beside the other; and a view of a pickled file."""
    device = fake(seed)
    hidden, inner = 24, 40
    reference = torch.empty((3, hidden, 2 * inner), dtype=getattr(torch, dtype))
    tensors, feeds = {}, {}
    for number in range(6):
        half = number % 2
        tensors[str(number)] = torch.randn(inner, hidden)
        part = reference[number // 2, :, half * inner : (half + 1) * inner].mT
        part.copy_(tensors[str(number)])
        feeds[str(number)] = Region(part.storage_offset(), tuple(part.shape), tuple(part.stride()))
    save_file(tensors, tmp_path / "m.safetensors")
    torch.save({"v": torch.randn(50, 64)[:, ::2].t()}, tmp_path / "v.bin")
    checkpoint = inspect(tmp_path / "m.safetensors")
    links = tuple(Link(checkpoint[key], "e", feeds[key]) for key in checkpoint)
    placement = Placement("e", ("e",), tuple(reference.shape), dtype, reference.nbytes, "cuda:0", "copy", links)
    host = HostPlan(0, 0, 0, 0, 0, 1 << 40, "test", 1 << 40)
    mapping = KeyMapping(links, {}, {}, (), (), (), (), ())
    staging = Staging(2, 8 * KIB, slots=2)
    plan = LoadPlan(checkpoint, mapping, {"": "cuda:0"}, (placement,), None, staging, {}, host, "cuda:0")
    plan, installer = loading(plan)
    run(plan, installer)
    assert same(plan.__dict__["model"].e, reference)
    view = torch.load(tmp_path / "v.bin")["v"]
    assert read_through(stream_plan(tmp_path / "v.bin", dtype), {"v": view.contiguous()}, dtype)
    check_over(device)


@pytest.mark.parametrize(("dtype", "chunks"), [("auto", 0), ("bfloat16", 0), ("float64", 2)])
def test_the_device_holds_what_is_planned(
    tmp_path: Path, fake: Callable[..., FakeDevice], dtype: str, chunks: int
) -> None:
    """What becomes smaller is cast on the way there, and what stays as it is goes right into its place."""
    # No multiple of what torch's cache rounds to.
    staging = Staging(2, 16 * KIB + ALIGNMENT, slots=3)
    tensors = {str(n): torch.randn(5000) for n in range(12)}
    save_file(tensors, tmp_path / "m.safetensors")
    for seed in SEEDS:
        device = fake(seed)
        plan, installer = loading(replace(stream_plan(tmp_path / "m.safetensors", dtype), staging=staging))
        planned = accelerators.chunks_on("cuda:0", plan.placements, plan.staging)
        assert planned == chunks * plan.staging.each
        run(plan, installer)
        assert device.peak == sum(p.nbytes for p in plan.placements) + planned


def int8_plan(tmp_path: Path, seed: int) -> tuple[LoadPlan, dict[str, torch.Tensor]]:
    """A load as int8 into a device, and what it gives."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(256, 1500), nn.Linear(1500, 64))
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    options: dict[str, Any] = {"model": lambda: nn.Sequential(nn.Linear(256, 1500), nn.Linear(1500, 64))}
    expected = lowmem.load(tmp_path / "m.safetensors", quantize="int8", **options)
    plan = expected.plan
    there = []
    for p in plan.placements:
        scales = None if p.scales is None else replace(p.scales, device="cuda:0")
        there.append(replace(p, device="cuda:0", scales=scales, residency="copy"))
    moved = replace(plan, placements=tuple(there), staging=Staging(2, 600 * KIB, 0, 128 * KIB, 2))
    return moved, expected.model.state_dict()


@pytest.mark.parametrize("seed", SEEDS)
def test_int8_that_readers_make_arrives_with_its_scales(
    tmp_path: Path, fake: Callable[..., FakeDevice], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(moves, "CHUNK", CHUNK)
    plan, state = int8_plan(tmp_path, seed)
    device = fake(seed)
    found: dict[str, torch.Tensor] = {}
    keeper: Any = SimpleNamespace(install=lambda p, tensor: found.__setitem__(p.target, tensor))
    run(plan, keeper)
    check_over(device)
    assert sum(tensor.dtype == torch.int8 for tensor in found.values()) == 2
    for name, tensor in found.items():
        assert same(tensor, state[name]), name


def test_scales_in_memory_that_the_callers_stream_still_uses_are_written_to_after_that(
    tmp_path: Path, fake: Callable[..., FakeDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moves, "CHUNK", CHUNK)
    plan, state = int8_plan(tmp_path, 0)
    device = fake()
    # Nothing is done before somebody waits for it.
    monkeypatch.setattr(device, "random", SimpleNamespace(random=lambda: 1.0, choice=device.random.choice))
    scales = [p.scales for p in plan.placements if p.scales is not None]
    assert len(scales) == 2
    home = device.open("cuda:0")
    # The biases are as large.
    old = [device.allocate(p.nbytes) for p in scales for _ in range(2)]
    for one in old:
        address, nbytes = ctypes.addressof(one), len(one)
        home.submit(home.user, lambda address=address, nbytes=nbytes: ctypes.memset(address, 0xEE, nbytes))
    del one
    old.clear()
    found: dict[str, torch.Tensor] = {}
    keeper: Any = SimpleNamespace(install=lambda p, tensor: found.__setitem__(p.target, tensor))
    run(plan, keeper)
    home.drain()
    assert not any(device.free.get(p.nbytes) for p in scales)
    for p in scales:
        assert same(found[p.target], state[p.target]), p.target


def test_a_stream_that_is_given_up_leaves_nothing(file: Path, fake: Callable[..., FakeDevice]) -> None:
    for seed in SEEDS:
        device = fake(seed)
        tensors = iterate(stream_plan(file, "float32"), 60_000)
        kept = [next(tensors) for _ in range(seed)]
        tensors.close()
        check_over(device)
        assert all(same(tensor, make()[key].float()) for key, tensor in kept)
        del kept, tensors
        gc.collect()
        assert device.held == 0


@pytest.mark.parametrize("copies", [1, 5, 30])
def test_a_device_that_fails_is_named_with_a_tensor_and_leaves_nothing(
    file: Path, fake: Callable[..., FakeDevice], copies: int
) -> None:
    device = fake(2)
    device.fails_at = copies
    with pytest.raises(LowmemError, match=r"tensor 't\d\d', or one before it: copying to cuda:0 .* illegal memory"):
        run(*loading(stream_plan(file, "float32")))
    device.fails_at = None
    assert device.pinned == {}
    assert not [t for t in threading.enumerate() if t.name.startswith("lowmem-")]


def test_a_device_that_fails_when_memory_is_wanted_is_not_called_full(
    file: Path, fake: Callable[..., FakeDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = fake(2)

    def fail(nbytes: int) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(device, "allocate", fail)
    with pytest.raises(LowmemError, match=r"tensor 't\d\d', or one before it: .* cuda:0 .* illegal memory") as told:
        run(*loading(stream_plan(file)))
    assert not isinstance(told.value, BudgetError)
    check_over(device)


@pytest.mark.parametrize("where", ["enter", "pin"])
@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (RuntimeError("CUDA error: no kernel image"), LowmemError, "cuda:0: a reader cannot .* no kernel image"),
        (torch.OutOfMemoryError("out of memory"), BudgetError, "cuda:0 refused .* out of memory"),
        (MemoryError("out of memory"), BudgetError, "the system refused .*out of memory"),
    ],
)
def test_a_device_that_a_reader_cannot_use_is_named(
    file: Path,
    fake: Callable[..., FakeDevice],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    error: Exception,
    kind: type[LowmemError],
    message: str,
) -> None:
    def fail(*args: Any) -> Any:
        raise error

    device = fake()
    monkeypatch.setattr(FakeStreams, where, fail)
    with pytest.raises(LowmemError, match=message) as told:
        run(*loading(stream_plan(file)))
    assert type(told.value) is kind
    check_over(device)


def test_a_device_without_room_is_told_of(file: Path, tmp_path: Path, fake: Callable[..., FakeDevice]) -> None:
    device = fake(2, room=30_000)
    with pytest.raises(BudgetError, match=r"tensor 't\d\d': cuda:0 refused .* out of memory"):
        run(*loading(stream_plan(file)))
    check_over(device)
    save_file({"whole": torch.ones(1000).half()}, tmp_path / "m.safetensors")
    device = fake(2, room=10_000)
    with pytest.raises(BudgetError, match=r"tensor 'whole': cuda:0 refused a reader's chunk"):
        run(*loading(stream_plan(tmp_path / "m.safetensors", "float32")))
    check_over(device)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 70_000),
    pair=st.sampled_from(
        [("float32", "bfloat16"), ("float32", "float16"), ("float64", "float16"), ("float32", "float8_e4m3fn")]
    ),
)
def test_a_cast_in_place_is_the_cast(count: int, pair: tuple[str, str]) -> None:
    source, final = (getattr(torch, name) for name in pair)
    values = torch.randn(count).mul(300).to(source)
    expected = values.to(final)
    assert same(narrowed(values, final), expected)
    assert narrowed(values, final).data_ptr() == values.data_ptr()


# The plan.


@settings(max_examples=200, deadline=None)
@given(
    room=st.integers(0, 400 * MIB),
    wanted=st.one_of(st.none(), st.integers(MIB, 400 * MIB)),
    each=st.integers(1, 20 * MIB),
    direct=st.booleans(),
    workers=st.integers(1, 8),
    slots=st.integers(2, 4),
)
def test_pinned_buffers_stay_within_what_there_is(
    room: int, wanted: int | None, each: int, direct: bool, workers: int, slots: int
) -> None:
    need = Need(each, direct, workers, slots=slots, most=accelerators.MOST_PINNED)
    staging = budget.fit_staging(room, wanted, need)
    assert 1 <= staging.workers <= workers
    assert 1 <= staging.slots <= slots
    assert staging.total <= max(MIB, min(room, wanted or 256 * MIB))
    assert staging.workers * staging.each <= max(64 * MIB, staging.each)
    assert staging.each % ALIGNMENT == 0
    assert staging.each >= min(each, 448 * KIB) - ALIGNMENT
    alone = budget.fit_staging(room, wanted, replace(need, slots=1, most=64 * MIB))
    assert staging.workers == alone.workers or wanted is None


def test_eight_readers_have_four_buffers_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves, "CHUNK", CHUNK)
    monkeypatch.setattr(budget, "workers_here", lambda: 8)
    with (tmp_path / "m.safetensors").open("wb") as out:
        head = b'{"a":{"dtype":"BF16","shape":[1024,524288],"data_offsets":[0,1073741824]}}'
        out.write(len(head).to_bytes(8, "little") + head)
        out.truncate(8 + len(head) + (1 << 30))

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.empty(1024, 524288, dtype=torch.bfloat16, device="meta"))

    def plan(**options: Any) -> LoadPlan:
        return lowmem.plan(tmp_path / "m.safetensors", model=One, device_map="cuda:0", **options)

    same_dtype, wider, narrower = plan(), plan(dtype="float32"), plan(dtype="float8_e4m3fn")
    assert same_dtype.staging.slots == 4
    assert 100 * MIB < same_dtype.staging.total == same_dtype.host.staging <= 256 * MIB
    assert same_dtype.devices["cuda:0"].peak == same_dtype.devices["cuda:0"].resident == 1 << 30
    assert narrower.devices["cuda:0"].staging == 0
    assert 0 < wider.devices["cuda:0"].staging <= 64 * MIB
    assert plan(staging="16MiB").staging.total <= 16 * MIB
    assert plan(staging="16MiB").staging.slots >= 2
    least = plan(ram=same_dtype.host.overhead + MIB)
    assert least.staging.total <= MIB
    monkeypatch.setattr(accelerators, "shares_memory", lambda device: True)
    assert plan().staging.total <= 16 * MIB
    on_host = lowmem.plan(tmp_path / "m.safetensors", model=One, residency="copy", dtype="float32")
    assert on_host.staging.slots == 1


@pytest.mark.parametrize("dtype", ["auto", "float64"])
def test_a_stream_plans_for_all_tensors_that_are_ahead_of_the_caller(
    tmp_path: Path, fake: Callable[..., FakeDevice], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(moves, "CHUNK", CHUNK)
    save_file({f"{n:02d}": torch.ones(40_000) for n in range(40)}, tmp_path / "m.safetensors")
    for wanted in (MIB, 3 * MIB, 64 * MIB):
        request = StreamRequest(dtype=dtype, device="cuda:0", staging=wanted)
        plan, window = make_stream_plan(inspect(tmp_path / "m.safetensors"), request)
        planned, sizes = plan.devices["cuda:0"], [p.nbytes for p in plan.placements]
        assert planned.staging == accelerators.chunks_on("cuda:0", plan.placements, plan.staging)
        assert planned.peak == max(min(window, sum(sizes)), sizes[0]) + planned.staging
        device = fake(1)
        for _, tensor in iterate(plan, window):
            time.sleep(0.005)
            del tensor
        # And what the caller has.
        assert device.peak <= planned.peak + sizes[0]


def test_a_device_in_host_memory_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert limits.shares_memory("mps")
    assert not limits.shares_memory("xpu:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for answer in (True, False):
        found = SimpleNamespace(is_integrated=answer)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index, found=found: found)
        monkeypatch.setattr(limits.platform, "machine", lambda: "aarch64")
        assert limits.shares_memory("cuda:0") is answer
        assert not limits.shares_memory("cuda:1")
        monkeypatch.setattr(limits.platform, "machine", lambda: "x86_64")
        assert not limits.shares_memory("cuda:0")


# What torch is asked for.


@pytest.fixture
def asked() -> Iterator[tuple[StreamBackend, list[Any]]]:
    log: list[Any] = []

    class Context:
        def __init__(self, *what: Any) -> None:
            self.what = what

        def __enter__(self) -> None:
            log.append(("in", *self.what))

        def __exit__(self, *_: object) -> None:
            log.append(("out", *self.what))

    api = SimpleNamespace(
        refused=0,
        Stream=lambda device: "side",
        Event=lambda **kind: SimpleNamespace(record=lambda stream: log.append(("record", stream, kind))),
        stream=lambda stream: Context(stream),
        device=lambda device: Context(str(device)),
        set_device=lambda device: log.append(("current", str(device))),
    )
    api.cudart = lambda: SimpleNamespace(
        cudaHostRegister=lambda address, nbytes, flags: log.append(("pin", address, nbytes, flags)) or api.refused,
        cudaHostUnregister=lambda address: log.append(("unpin", address)),
    )
    backend: Any = StreamBackend(torch.device("cuda:1"), api, patient=True)
    backend.api = api
    return backend, log


def test_memory_is_pinned_for_all_devices_on_the_one_that_is_used(
    asked: tuple[Any, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, log = asked
    memory = torch.empty(100, dtype=torch.uint8)
    backend.enter()
    assert backend.pin(memory)
    backend.unpin(memory)
    backend.record(None)
    at = memory.data_ptr()
    assert log == [
        ("current", "cuda:1"),
        ("in", "cuda:1"),
        ("pin", at, 100, 1),
        ("out", "cuda:1"),
        ("in", "cuda:1"),
        ("unpin", at),
        ("out", "cuda:1"),
        ("record", "side", {"blocking": True}),
    ]
    backend.api.refused = 2
    swallowed: list[Any] = []

    def blamed(*args: Any, **named: Any) -> Any:
        swallowed.append(named["device"])
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty", blamed)
    assert not backend.pin(memory)
    assert swallowed == [torch.device("cuda:1")]


def test_the_bench_says_that_it_cannot_measure_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("it can")
    assert bench_main(["--folder", str(tmp_path)]) == 0
    assert "no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_bench_tells_what_part_of_the_bus_a_load_uses() -> None:
    row = {"loader": "lowmem", "dtype": "auto", "warm": [0.5, 0.25], "cold": [1.0], "bytes": 10**10, "pinned": 5e10}
    told = as_markdown("auto", [row | {"peak": 3 * MIB, "resident": MIB}, row | {"warm": [], "reason": "no such"}])
    assert "| lowmem | 0.250 | 40.0 | 80% | 1.000 | 10.0 | 2 |  |" in told
    assert "| lowmem | - | - | - | 1.000 | 10.0 | - | no such |" in told
    # Memory that torch's allocator knows nothing of.
    assert "| 10.0 | - |  |" in as_markdown("auto", [row | {"peak": 0, "resident": MIB}])


def test_the_bench_tells_which_goals_are_met() -> None:
    row = {"loader": "lowmem", "dtype": "auto", "warm": [0.5, 0.25], "cold": [], "bytes": 10**10, "pinned": 5e10}
    row |= {"peak": 65 * MIB, "resident": MIB}
    told = goals("auto", [row, row | {"loader": "transformers", "warm": [1.0, 2.0]}])
    assert told.splitlines() == [
        "- at least 80% of the bus: 80.0%, met",
        "- at least 5x transformers: 4.00x, not met",
        "- at least 2x fastsafetensors: not measured",
        "- at most 64 MiB above resident: 64.0 MiB, met",
    ]
    assert goals("auto", [row | {"status": "differs"}]).count("not measured") == 4


def test_the_bench_takes_only_versions_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = next(one for one in loaders.LOADERS if one.needs is not None)
    monkeypatch.setattr("safetensors.safe_open", SimpleNamespace())
    assert not ahead.is_here
    monkeypatch.setattr("safetensors.safe_open", SimpleNamespace(prefetch=None))
    assert ahead.is_here
    assert not replace(ahead, package="there_is_no_such").is_here


def test_the_bench_takes_all_that_safetensors_fetches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with what 0.9.0rc1 has."""

    class Opened(contextlib.AbstractContextManager["Opened"]):
        def __init__(self, file: Path, framework: str, device: str) -> None:
            assert (framework, device) == ("pt", "cuda:0")
            self.file = file

        def __exit__(self, *error: object) -> None:
            pass

        def prefetch(self) -> Any:
            return contextlib.nullcontext(iter([(self.file.stem, torch.ones(3))]))

    monkeypatch.setattr("safetensors.safe_open", Opened)
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").touch()
    ahead = next(one for one in loaders.LOADERS if one.needs is not None)
    state = ahead.load(tmp_path, "float16", "cuda:0")
    assert {key: tensor.dtype for key, tensor in state.items()} == {"a": torch.float16, "b": torch.float16}
