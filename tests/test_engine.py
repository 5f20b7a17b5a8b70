"""Every byte arrives where the plan says; a load that fails leaves nothing behind."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh import server
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import same
from torch import nn

import lowmem
from lowmem import loader
from lowmem.checkpoint import inspect
from lowmem.dtypes import itemsize
from lowmem.engine import Installer, crew, destinations, run
from lowmem.errors import BudgetError, CheckpointError
from lowmem.mapping import KeyMapping, Link, Region
from lowmem.memory import anonymous_memory
from lowmem.planner import LoadPlan, Move, Placement, Progress, budget, moves
from lowmem.planner.records import HostPlan, Staging
from lowmem.sizes import MIB

# The package shows the function of the same name.
engine_run: Any = sys.modules["lowmem.engine.run"]
linux = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")

FLOATS = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
OTHERS = ["int8", "uint8", "int16", "int32", "int64", "bool", "complex64"]


class Bag(nn.Module):
    """Tensors by name: floats as parameters, the rest as buffers."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            if tensor.is_floating_point():
                self.register_parameter(name, nn.Parameter(empty))
            else:
                self.register_buffer(name, empty)


class Net(nn.Module):
    """Six layers whose weights take some 1.5 MiB as fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(6))
        self.layers[0].weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def some(dtype: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-100, 100, shape, generator=generator)
    return (values / 7 if dtype in FLOATS else values.abs() % 2 if dtype == "bool" else values).to(
        getattr(torch, dtype)
    )


@pytest.fixture(scope="module")
def net_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Net in two shards without an index of their own making: three layers each."""
    folder = tmp_path_factory.mktemp("net")
    torch.manual_seed(0)
    state = Net().state_dict()
    names = list(state)
    for number, part in enumerate((names[:6], names[6:]), 1):
        save_file({name: state[name] for name in part}, folder / f"model-{number:05d}-of-00002.safetensors")
    table = {name: f"model-{1 if i < 6 else 2:05d}-of-00002.safetensors" for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    return folder


@pytest.fixture
def net_copy(net_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "net"
    shutil.copytree(net_folder, folder)
    return folder


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def threads_of_lowmem() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("lowmem")]


def open_files(below: Path) -> list[str]:
    found = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = str(link.readlink())
        except OSError:
            continue
        if target.startswith(str(below.resolve())):
            found.append(target)
    return found


def tuned(chunk: int, workers: int) -> pytest.MonkeyPatch:
    patch = pytest.MonkeyPatch()
    patch.setattr(moves, "CHUNK", chunk)
    patch.setattr(budget, "workers_here", lambda: workers)
    return patch


# -- every move arrives


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    tensors=st.lists(
        st.tuples(
            st.sampled_from(FLOATS + OTHERS), st.lists(st.integers(0, 23), max_size=4).map(tuple), st.integers(0, 99)
        ),
        min_size=1,
        max_size=8,
    ),
    dtype=st.sampled_from(["auto", "float32", "bfloat16", "float16"]),
    residency=st.sampled_from(["map", "copy"]),
    staging=st.sampled_from([None, MIB, 3 * MIB]),
    chunk=st.sampled_from([16, 48, 256, 4096, 4 * MIB]),
    workers=st.integers(1, 4),
)
def test_every_move_arrives(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: list[Any],
    dtype: str,
    residency: str,
    staging: int | None,
    chunk: int,
    workers: int,
) -> None:
    made = {f"t{i}": some(*spec) for i, spec in enumerate(tensors)}
    path = tmp_path_factory.mktemp("moves") / "model.safetensors"
    save_file(made, path)
    patch = tuned(chunk, workers)
    try:
        result = lowmem.load(path, model=Bag(made), dtype=dtype, residency=residency, staging=staging)
    finally:
        patch.undo()
    found = result.model.state_dict()
    for name, tensor in load_file(path).items():
        cast = dtype != "auto" and tensor.is_floating_point()
        expected = tensor.to(getattr(torch, dtype)) if cast else tensor
        assert same(found[name], expected), name
    assert result.plan.staging.total <= max(MIB, staging or 16 * MIB)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_tensor_larger_than_the_staging_arrives(tmp_path: Path, workers: int) -> None:
    made = {"wide": some("bfloat16", (3, 700_001), 1), "tall": some("float16", (900_001, 2), 2)}
    save_file(made, tmp_path / "m.safetensors")
    patch = tuned(4 * MIB, workers)
    try:
        result = lowmem.load(tmp_path / "m.safetensors", model=Bag(made), dtype="float32", staging=MIB)
    finally:
        patch.undo()
    assert result.plan.staging.total <= MIB
    assert all(same(result.model.state_dict()[name], tensor.float()) for name, tensor in made.items())


def test_a_destination_that_cannot_be_read_into_is_filled_through_staging(
    net_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator, simulated."""
    original = destinations.MemoryDestination.__init__

    def closed(self: Any, placement: Placement, **options: Any) -> None:
        original(self, placement, **options)
        self._bytes = None

    monkeypatch.setattr(destinations.MemoryDestination, "__init__", closed)
    staged = Placement.staged_element

    def always(self: Placement, link: Link) -> int:
        return staged(self, link) or (itemsize(link.entry.dtype) if self.residency == "copy" else 0)

    monkeypatch.setattr(Placement, "staged_element", always)
    for dtype in ("auto", "bfloat16"):
        result = lowmem.load(net_folder, model=Net, residency="copy", dtype=dtype)
        assert result.plan.staging.total > 0
        for name, tensor in state_of(net_folder).items():
            expected = tensor if dtype == "auto" else tensor.bfloat16()
            assert same(result.model.state_dict()[name], expected)


# -- one destination fed from several places


def fused(path: Path, shape: tuple[int, ...], feeds: dict[str, Region], dtype: str, each: int) -> LoadPlan:
    """A plan made by hand: one parameter `experts`, each key of the file into its own region."""
    checkpoint = inspect(path)
    links = tuple(Link(checkpoint[key], "experts", feeds[key]) for key in checkpoint)
    nbytes = torch.empty(shape, dtype=getattr(torch, dtype), device="meta").nbytes
    placement = Placement("experts", ("experts",), shape, dtype, nbytes, "cpu", "copy", links)
    host = HostPlan(nbytes, 0, each * 2, 0, nbytes + each * 2, 1 << 40, "test", 1 << 40)
    mapping = KeyMapping(links, {}, {}, (), (), (), (), ())
    return LoadPlan(checkpoint, mapping, {"": "cpu"}, (placement,), None, Staging(2, each), {}, host, "cpu")


@pytest.mark.parametrize("chunk", [64, 1024, 4 * MIB])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_slices_and_transposed_parts_of_one_tensor_are_fed_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, dtype: str
) -> None:
    """Three experts, gate and up beside each other, transposed: (3, hidden, 2 * inner) from (inner, hidden) each."""
    hidden, inner = 24, 10
    shape = (3, hidden, 2 * inner)
    reference = torch.empty(shape, dtype=getattr(torch, dtype))
    tensors, feeds = {}, {}
    for expert in range(3):
        for half, kind in enumerate(("gate", "up")):
            key = f"{expert}.{kind}"
            tensors[key] = some("float32", (inner, hidden), expert * 2 + half)
            part = reference[expert, :, half * inner : (half + 1) * inner].mT
            part.copy_(tensors[key])
            feeds[key] = Region(part.storage_offset(), tuple(part.shape), tuple(part.stride()))
    save_file(tensors, tmp_path / "m.safetensors")
    monkeypatch.setattr(moves, "CHUNK", chunk)
    model = nn.Module()
    model.register_parameter("experts", nn.Parameter(torch.empty(shape, device="meta")))
    plan = fused(tmp_path / "m.safetensors", shape, feeds, dtype, max(chunk, 64) + 128)
    seen: list[Progress] = []
    run(plan, Installer(model), seen.append)
    assert same(model.experts, reference)
    assert seen[-1].done == seen[-1].total == 6 * hidden * inner * 4


def test_dense_slices_are_read_straight_into_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stacked experts of the same dtype need no buffer at all."""
    tensors = {str(i): some("bfloat16", (6, 8), i) for i in range(4)}
    save_file(tensors, tmp_path / "m.safetensors")
    feeds = {str(i): Region(i * 48, (48,), (1,)) for i in range(4)}
    monkeypatch.setattr(moves, "CHUNK", 32)
    model = nn.Module()
    model.register_parameter("experts", nn.Parameter(torch.empty(4, 6, 8, device="meta")))
    run(fused(tmp_path / "m.safetensors", (4, 6, 8), feeds, "bfloat16", 0), Installer(model))
    assert same(model.experts, torch.stack(list(tensors.values())))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 6), min_size=1, max_size=4).map(tuple),
    order=st.randoms(use_true_random=False),
    most=st.integers(1, 50),
)
def test_the_pieces_of_a_region_cover_it_once_and_in_order(shape: tuple[int, ...], order: Any, most: int) -> None:
    axes = list(range(len(shape)))
    order.shuffle(axes)
    whole = torch.arange(int(torch.tensor(shape).prod()) * 2).reshape(2, *shape)[1].permute(axes)
    region = Region(whole.storage_offset(), tuple(whole.shape), tuple(whole.stride()))
    base = torch.arange(whole.numel() * 2)
    found = []
    for before, piece in region.pieces(most):
        assert before == sum(len(part) for part in found)
        assert 0 < piece.count <= most
        found.append(base.as_strided(piece.shape, piece.strides, piece.offset).reshape(-1))
    assert torch.equal(torch.cat([torch.empty(0, dtype=torch.int64), *found]), whole.reshape(-1))


# -- mapping


@linux
def test_a_mapped_tensor_is_pages_of_the_file_and_writing_to_it_leaves_the_file(net_copy: Path) -> None:
    before = {file: file.read_bytes() for file in net_copy.glob("*.safetensors")}
    model: Any = lowmem.load(net_copy, model=Net).model
    assert {p.residency for p in lowmem.plan(net_copy, model=Net).placements} == {"map"}
    maps = Path("/proc/self/maps").read_text()
    assert all(str(file) in maps for file in before)
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(1))
    reference = Net()
    reference.load_state_dict(state_of(net_copy))
    assert torch.equal(model(x), reference(x))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(not p.any() for p in model.parameters())
    assert all(file.read_bytes() == content for file, content in before.items())
    del model, parameter
    gc.collect()
    assert not any(str(file) in Path("/proc/self/maps").read_text() for file in before)


@linux
def test_mapping_adds_no_anonymous_memory(tmp_path: Path) -> None:
    tensor = {"w": torch.ones(32 * MIB, dtype=torch.bfloat16)}
    save_file(tensor, tmp_path / "m.safetensors")
    lowmem.load(tmp_path / "m.safetensors", model=Bag(tensor))
    del tensor["w"]
    tensor["w"] = torch.empty(32 * MIB, dtype=torch.bfloat16, device="meta")
    gc.collect()
    before = anonymous_memory()
    model: Any = lowmem.load(tmp_path / "m.safetensors", model=Bag(tensor)).model
    assert model.w.float().min() == 1
    gc.collect()
    assert anonymous_memory() - before < 4 * MIB


def test_a_tensor_at_an_odd_offset_is_copied(tmp_path: Path) -> None:
    """Writers that do not pad their header put tensors where torch cannot address them."""
    tensors = {"a": some("float32", (5, 3), 1), "b": some("uint8", (7,), 2)}
    save_file(tensors, tmp_path / "m.safetensors")
    raw = (tmp_path / "m.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    head = raw[8 : 8 + size].rstrip() + b" "
    head += b" " * (1 - (len(head) + 8) % 2)
    (tmp_path / "m.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + raw[8 + size :])
    result = lowmem.load(tmp_path / "m.safetensors", model=Bag(tensors))
    assert {p.target: p.residency for p in result.plan.placements} == {"a": "copy", "b": "map"}
    assert all(same(result.model.state_dict()[k], v) for k, v in tensors.items())


# -- failures


def path_of(fd: int) -> Path:
    return Path(f"/proc/self/fd/{fd}").readlink()


Spoil = Callable[[Path, pytest.MonkeyPatch], None]


def second(folder: Path) -> Path:
    return folder / "model-00002-of-00002.safetensors"


def touched(folder: Path, patch: pytest.MonkeyPatch) -> None:
    os.utime(second(folder), ns=(1, 1))


def truncated(folder: Path, patch: pytest.MonkeyPatch) -> None:
    os.truncate(second(folder), 5000)


def deleted(folder: Path, patch: pytest.MonkeyPatch) -> None:
    second(folder).unlink()


def after_planning(spoil: Spoil) -> Spoil:
    def between(folder: Path, patch: pytest.MonkeyPatch) -> None:
        original = engine_run._Run.run

        def late(self: Any) -> None:
            spoil(folder, patch)
            original(self)

        patch.setattr(engine_run._Run, "run", late)

    return between


def reading(answer: Callable[..., int]) -> Spoil:
    """`os.preadv` works, until the second shard is read."""

    def during(folder: Path, patch: pytest.MonkeyPatch) -> None:
        original = os.preadv

        def preadv(fd: int, buffers: Any, offset: int) -> int:
            if path_of(fd).name.removesuffix(" (deleted)") == second(folder).name:
                return answer(original, fd, buffers, offset)
            return original(fd, buffers, offset)

        patch.setattr(os, "preadv", preadv)

    return during


def failing(*_: Any) -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def truncating(original: Any, fd: int, buffers: Any, offset: int) -> int:
    os.truncate(path_of(fd), 4096)
    return original(fd, buffers, offset)


def rewriting(original: Any, fd: int, buffers: Any, offset: int) -> int:
    os.utime(path_of(fd), ns=(5, 5))
    return original(fd, buffers, offset)


SPOILS: dict[str, Spoil] = {
    "changed before": after_planning(touched),
    "truncated before": after_planning(truncated),
    "deleted before": after_planning(deleted),
    "ends while read": reading(lambda *_: 0),
    "truncated while read": reading(truncating),
    "rewritten while read": reading(rewriting),
    "disk fails": reading(failing),
}


class Before:
    """Everything that a user can see of a borrowed module."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors = {k: v for m in model.modules() for k, v in self._of(m)}
        self.objects = {k: (id(v), v.requires_grad, v.device, dict(vars(v))) for k, v in self.tensors.items()}
        self.values = {k: v.detach().clone() for k, v in self.tensors.items()}
        self.modes = [m.training for m in model.modules()]
        self.attributes = [set(vars(m)) for m in model.modules()]

    @staticmethod
    def _of(module: nn.Module) -> Iterator[tuple[Any, torch.Tensor]]:
        for table in (module._parameters, module._buffers):
            for leaf, tensor in table.items():
                if tensor is not None:
                    yield (id(module), leaf), tensor

    def check(self) -> None:
        now = {k: v for m in self.model.modules() for k, v in self._of(m)}
        assert {k: (id(v), v.requires_grad, v.device, dict(vars(v))) for k, v in now.items()} == self.objects
        assert all(v.is_meta or same(v, self.values[k]) for k, v in now.items())
        assert [m.training for m in self.model.modules()] == self.modes
        assert [set(vars(m)) for m in self.model.modules()] == self.attributes


def borrowed(meta: bool) -> Net:
    torch.manual_seed(9)
    with torch.device("meta" if meta else "cpu"):
        net = Net()
    net.layers[2].eval()
    net.layers[1].weight._is_hf_initialized = True  # type: ignore[attr-defined]
    return net


def check_nothing_is_left(folder: Path) -> None:
    assert threads_of_lowmem() == []
    assert open_files(folder) == []
    assert not [p for p in folder.rglob("*") if p.name.startswith(".")]


CASES: dict[str, dict[str, Any]] = {
    "copied": {"residency": "copy"},
    "cast": {"dtype": "bfloat16"},
    "to disk": {"dtype": "bfloat16", "device_map": "disk"},
    "mixed": {"dtype": "bfloat16", "device_map": {"": "cpu", "layers.1": "disk", "layers.4": "disk"}},
}


@linux
@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("case", CASES)
def test_a_shard_that_fails_is_named_and_nothing_is_left(
    net_copy: Path, monkeypatch: pytest.MonkeyPatch, spoil: str, case: str
) -> None:
    # A module on meta and a real one, by turns.
    model = borrowed((list(SPOILS).index(spoil) + list(CASES).index(case)) % 2 == 0)
    before = Before(model)
    SPOILS[spoil](net_copy, monkeypatch)
    with pytest.raises(CheckpointError, match=second(net_copy).name):
        lowmem.load(net_copy, model=model, offload_folder=net_copy / "off", **CASES[case])
    before.check()
    check_nothing_is_left(net_copy)
    assert not list(net_copy.glob("off/*"))


@linux
@pytest.mark.parametrize("spoil", ["changed before", "truncated before", "deleted before"])
def test_a_shard_that_cannot_be_mapped_is_named_and_nothing_is_left(
    net_copy: Path, monkeypatch: pytest.MonkeyPatch, spoil: str
) -> None:
    model = borrowed(False)
    before = Before(model)
    SPOILS[spoil](net_copy, monkeypatch)
    with pytest.raises(CheckpointError, match=second(net_copy).name) as caught:
        lowmem.load(net_copy, model=model)
    before.check()
    del caught
    gc.collect()
    check_nothing_is_left(net_copy)


def test_short_reads_are_continued(net_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: original(fd, [views[0][: max(1, len(views[0]) // 3)]], at))
    model = lowmem.load(net_folder, model=Net, residency="copy").model
    assert all(same(model.state_dict()[k], v) for k, v in state_of(net_folder).items())


@linux
def test_a_shard_that_is_deleted_while_it_is_read_does_no_harm(net_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = state_of(net_copy)

    def gone(original: Any, fd: int, buffers: Any, offset: int) -> int:
        second(net_copy).unlink(missing_ok=True)
        return original(fd, buffers, offset)

    reading(gone)(net_copy, monkeypatch)
    model = lowmem.load(net_copy, model=Net, dtype="float64").model
    assert all(same(model.state_dict()[k], v.double()) for k, v in expected.items())


@linux
@pytest.mark.parametrize(("error", "meta"), [(KeyboardInterrupt, False), (ZeroDivisionError, True)])
@pytest.mark.parametrize("case", CASES)
def test_an_error_from_the_callback_comes_through_and_nothing_is_left(
    net_copy: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], case: str, meta: bool
) -> None:
    monkeypatch.setattr(engine_run, "_PROGRESS_EVERY", 0.0)
    monkeypatch.setattr(crew, "_AT_LEAST_EVERY", 0.0)
    # Many reads, so that the second error comes in the midst of them.
    monkeypatch.setattr(moves, "CHUNK", 64 * 1024)
    model = borrowed(meta)
    before = Before(model)
    for calls in (1, 9):
        left = [calls]

        def callback(progress: Progress, left: list[int] = left) -> None:
            left[0] -= 1
            if not left[0]:
                raise error

        with pytest.raises(error):
            lowmem.load(net_copy, model=model, offload_folder=net_copy / "off", progress=callback, **CASES[case])
        before.check()
        check_nothing_is_left(net_copy)
        assert not list(net_copy.glob("off/*"))


@pytest.mark.parametrize(("seconds", "some"), [(0.0, False), (3600.0, True)])
def test_readers_report_several_reads_together(
    net_folder: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, some: bool
) -> None:
    monkeypatch.setattr(crew, "_AT_LEAST_EVERY", seconds)
    monkeypatch.setattr(moves, "CHUNK", 64 * 1024)
    together: list[int] = []
    take = engine_run._Run._take

    def watched(self: Any, feed: Any, finished: list[Any], keep: Any) -> None:
        together.append(len(finished))
        take(self, feed, finished, keep)

    monkeypatch.setattr(engine_run._Run, "_take", watched)
    result = lowmem.load(net_folder, model=Net, residency="copy")
    assert sum(together) == len(list(result.plan.reads())) > 8
    assert (len(together) <= result.plan.staging.workers) is some


@linux
def test_an_error_that_is_kept_keeps_no_weights(net_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Notebooks keep the last error with its frames."""
    SPOILS["disk fails"](net_copy, monkeypatch)
    with pytest.raises(CheckpointError) as kept:
        lowmem.load(net_copy, model=Net, dtype="float64")
    frames, error = [], kept.value
    while error is not None:
        frames += [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        error = error.__cause__
    names = ("_read_all", "_carry_out", "fill", "_fill_buffered")
    workers = [frame for frame in frames if frame.f_code.co_name in names]
    assert {frame.f_code.co_name for frame in workers} == set(names)
    assert not any(frame.f_locals for frame in workers)


def test_memory_that_is_refused_is_a_budget_error(net_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    model = borrowed(False)
    before = Before(model)
    with monkeypatch.context() as patch:
        patch.setattr(destinations.torch, "empty", refuse)
        with pytest.raises(BudgetError, match=r"layers\.0"):
            lowmem.load(net_folder, model=model, dtype="bfloat16", staging=MIB)
    before.check()
    check_nothing_is_left(net_folder)


@pytest.mark.parametrize("granted", [0, 1])
def test_threads_that_are_refused_are_done_without(
    net_folder: Path, monkeypatch: pytest.MonkeyPatch, granted: int
) -> None:
    original, left = threading.Thread.start, [granted]

    def start(self: threading.Thread) -> None:
        if self.name.startswith("lowmem"):
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError("can't start new thread")
        original(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    monkeypatch.setattr(budget, "workers_here", lambda: 3)
    if granted:
        model = lowmem.load(net_folder, model=Net, dtype="float64").model
        assert all(same(model.state_dict()[k], v.double()) for k, v in state_of(net_folder).items())
    else:
        with pytest.raises(BudgetError, match="refused a thread"):
            lowmem.load(net_folder, model=Net, dtype="float64")
    assert threads_of_lowmem() == []


def test_hooks_that_were_attached_before_an_error_are_gone(net_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = loader.attach

    def late(*args: Any) -> None:
        original(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(loader, "attach", late)
    model = borrowed(False)
    before = Before(model)
    with pytest.raises(KeyboardInterrupt):
        lowmem.load(net_folder, model=model, device_map={"": "cpu", "layers.1": "disk"})
    before.check()


_INTERRUPTED = """
import gc, os, signal, sys, threading, time
from pathlib import Path
import torch
import lowmem
from test_engine import Before, CASES, borrowed, check_nothing_is_left, state_of, Net
folder, case = Path(args["folder"]), args["case"]
started = time.perf_counter()
for _ in range(2):
    loaded = lowmem.load(folder, model=borrowed(False), offload_folder=folder / "warm", **CASES[case]).model
    took, started = time.perf_counter() - started, time.perf_counter()
    expected = {p.dtype for p in loaded.parameters()}, {p.device for p in loaded.parameters()}
    # What is on disk is mapped, and a mapping keeps its file open.
    lowmem.release(loaded)
result = {"interrupted": 0, "finished": 0}
for turn in range(args["turns"]):
    model = borrowed(turn % 2 == 0)
    before = Before(model)
    off = folder / f"off{turn}"
    thread = threading.Timer(took * turn / args["turns"], lambda: os.kill(os.getpid(), signal.SIGINT))
    done = False
    try:
        thread.start()
        lowmem.load(folder, model=model, offload_folder=off, **CASES[case])
        done = True
        thread.join()
        time.sleep(1)
    except KeyboardInterrupt:
        pass
    thread.join()
    # The model is as it was, or complete: an interrupt between the last step and the return finds it complete.
    changed = Before(model).objects != before.objects
    assert changed or not done
    if changed:
        assert ({p.dtype for p in model.parameters()}, {p.device for p in model.parameters()}) == expected
        lowmem.release(model)
        result["finished"] += 1
    else:
        before.check()
        result["interrupted"] += 1
    gc.collect()
    check_nothing_is_left(folder)
    assert all(not p.name.startswith(".") for p in off.glob("*")), list(off.glob("*"))
"""


@linux
@pytest.mark.parametrize("case", ["copied", "mixed"])
def test_ctrl_c_at_any_moment_leaves_nothing(net_copy: Path, case: str) -> None:
    found = server().run(_INTERRUPTED, folder=str(net_copy), case=case, turns=16)
    assert found["interrupted"] + found["finished"] == 16


# -- bounds


@pytest.mark.parametrize(("staging", "workers"), [(MIB, 1), (MIB, 4), (2 * MIB, 3), (None, 4)])
def test_bytes_in_flight_never_exceed_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, staging: int | None, workers: int
) -> None:
    tensors = {f"t{i}": some("bfloat16", (700, 1000), i) for i in range(6)}
    save_file(tensors, tmp_path / "m.safetensors")
    monkeypatch.setattr(budget, "workers_here", lambda: workers)
    made: list[int] = []
    reads: list[int] = []
    original = crew.Scratch
    monkeypatch.setattr(crew, "Scratch", lambda *sizes: made.append(sum(sizes)) or original(*sizes))
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: reads.append(sum(map(len, views))) or read(fd, views, at))
    options = {"dtype": "float32", "device_map": "disk", "offload_folder": tmp_path / "off"}
    for given_options in ({"dtype": "float32"}, options):
        made.clear()
        reads.clear()
        plan = lowmem.load(tmp_path / "m.safetensors", model=Bag(tensors), staging=staging, **given_options).plan
        assert 0 < sum(made) <= plan.staging.total == plan.host.staging
        assert len(made) <= 2 * plan.staging.workers <= 2 * workers
        assert max(reads) <= plan.staging.each
        assert sum(reads) == plan.bytes_read
        if staging is not None:
            assert plan.staging.total <= staging


@linux
def test_fifty_loads_leave_no_growth(net_folder: Path, tmp_path: Path) -> None:
    def load(number: int) -> None:
        case = list(CASES.values())[number % 4] if number % 5 else {}
        lowmem.load(net_folder, model=Net, offload_folder=tmp_path / f"off{number % 8}", **case)

    def counts() -> tuple[int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), len(list(Path("/proc/self/task").iterdir()))

    for number in range(20):
        load(number)
    gc.collect()
    before, memory = counts(), anonymous_memory()
    for number in range(50):
        load(number)
    gc.collect()
    after = counts()
    assert after[0] <= before[0]
    assert after[1] <= before[1]
    assert anonymous_memory() - memory < 4 * MIB


def test_progress_rises_to_the_total_in_the_calling_thread(net_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "_AT_LEAST_EVERY", 0.0)
    monkeypatch.setattr(engine_run, "_PROGRESS_EVERY", 0.0)
    monkeypatch.setattr(moves, "CHUNK", 4096)
    seen: list[tuple[Progress, int]] = []
    result = lowmem.load(
        net_folder, model=Net, dtype="bfloat16", progress=lambda p: seen.append((p, threading.get_ident()))
    )
    done = [p.done for p, _ in seen]
    assert len(seen) > 100
    assert done == sorted(set(done))
    assert done[-1] == result.plan.bytes_read
    for progress, thread in seen:
        assert thread == threading.get_ident()
        assert progress.total == result.plan.bytes_read
        assert progress.rate > 0
        assert progress.seconds_left is not None
        assert progress.seconds_left >= 0
        assert progress.file.endswith(".safetensors")
    assert seen[-1][0].seconds_left == 0


def test_progress_says_the_end_however_seldom_it_speaks(net_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_run, "_PROGRESS_EVERY", 1e9)
    seen: list[Progress] = []
    lowmem.load(net_folder, model=Net, dtype="bfloat16", progress=seen.append)
    assert seen[-1].done == seen[-1].total
    assert len(seen) <= 2


def test_loads_from_two_threads_at_once_are_right(net_folder: Path, tmp_path: Path) -> None:
    expected = state_of(net_folder)
    wrong: list[str] = []

    def check(found: dict[str, torch.Tensor]) -> None:
        wrong.extend(k for k, v in found.items() if not v.is_meta and not same(v, expected[k].to(v.dtype)))

    def work(number: int) -> None:
        for turn in range(6):
            case = list(CASES.values())[(number + turn) % 4]
            off = tmp_path / f"{number}-{turn}"
            check(lowmem.load(net_folder, model=borrowed(True), offload_folder=off, **case).model.state_dict())
            for file in off.glob("*/*.safetensors"):
                check(load_file(file))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert threads_of_lowmem() == []


def test_models_that_two_threads_build_at_once_are_right(net_folder: Path) -> None:
    """Building on meta must neither leak into the other thread nor outlast the load."""
    expected = state_of(net_folder)
    register = nn.Module.register_parameter
    inside, leave = threading.Event(), threading.Event()
    found: list[bool] = []

    def slow() -> Net:
        net = Net()
        inside.set()
        leave.wait(5)
        return net

    def first() -> None:
        model = lowmem.load(net_folder, model=slow, residency="copy").model
        found.append(all(same(model.state_dict()[k], v) for k, v in expected.items()))

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(5)
    other = nn.Linear(2, 2)
    leave.set()
    thread.join()
    assert found == [True]
    assert nn.Module.register_parameter is register
    assert not other.weight.is_meta


def test_moves_never_exceed_a_chunk_and_cover_every_byte(net_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves, "CHUNK", 1000)
    plan = lowmem.plan(net_folder, model=Net, dtype="bfloat16")
    cuts: list[Move] = list(plan.moves())
    assert max(move.nbytes for move in cuts) <= 1000
    assert sum(move.nbytes for move in cuts) == plan.bytes_read
    assert [(m.file, m.offset) for m in cuts] == sorted((m.file, m.offset) for m in cuts)


@pytest.mark.parametrize(("rows", "alone"), [(64, True), (44_000, False), (400_000, False)])
def test_readers_take_turns_for_small_tensors_only(rows: int, alone: bool, tmp_path: Path) -> None:
    """Five experts of 700 KiB in one read are cast side by side; thousands of norms are the interpreter's work."""
    save_file({f"w{i}": torch.zeros(rows, 4) for i in range(6)}, tmp_path / "model.safetensors")
    model = nn.ParameterDict({f"w{i}": nn.Parameter(torch.empty(rows, 4)) for i in range(6)})
    plan = lowmem.plan(tmp_path / "model.safetensors", model=model, dtype="bfloat16")
    reads = list(plan.reads())
    assert (len(reads) == 1) is alone
    assert [crew.is_for_one(read) for read in reads] == [alone] * len(reads)
