"""Weights brought to a device that computes: right, however late and in whatever order copies are done.

No accelerator is needed: `fake_device` stands for one whose streams do their work at random.
"""

from __future__ import annotations

import ctypes
import gc
import pickle
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_device import FakeBackend
from torch import nn

import lowmem
from lowmem import loader
from lowmem.engine.streams import PlainBackend, StreamBackend
from lowmem.errors import BudgetError, PlacementError, RunningError
from lowmem.int8 import Int8Linear
from lowmem.offload import aligning, attaching
from lowmem.offload.accelerators import AcceleratorPlace
from lowmem.offload.runtime import Runtime
from lowmem.offload.weights import OffloadedParameter
from lowmem.planner import plan as planning
from lowmem.planner.running import PIECES, Running
from lowmem.sizes import MIB

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread", "quiet")


class Values:
    """A recipe of known values."""

    name = "values"

    is_scratch = False

    def __init__(self, seed: int, shape: tuple[int, ...], parts: int = 1, *, by_rows: bool = True) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.values = torch.randint(0, 255, shape, dtype=torch.uint8, generator=generator)
        self.shape, self.dtype, self.parts = shape, torch.uint8, parts
        self.by_rows = by_rows and len(shape) == 2

    def make(self, into: torch.Tensor) -> None:
        into.copy_(self.values)

    def make_rows(self, begin: int, end: int, into: torch.Tensor) -> None:
        into.copy_(self.values[begin:end])

    def part(self, index: int) -> Values:
        part = Values(0, (0,))
        part.values, part.shape = self.values[index], self.shape[1:]
        return part


SHAPES = [(40, 8), (320,), (80, 4), (24, 8), (48,), (3, 16, 8), (1, 400), (64,)]


def run_program(seed: int, change: Callable[[AcceleratorPlace, Runtime], None] = lambda place, runtime: None) -> bool:
    """Random uses of weights on two streams; whether every value that was read is right."""
    choose = random.Random(seed)
    backend = FakeBackend(seed, immediate=False)
    place = AcceleratorPlace(backend, 128, 2)
    recipes = [
        Values(n, SHAPES[n % len(SHAPES)], parts=3 if len(SHAPES[n % len(SHAPES)]) == 3 else 1) for n in range(16)
    ]
    running = Running(made=10**6, largest=512, buffers=1700)
    files: Any = SimpleNamespace(check=lambda: None, close=lambda: None, read_ahead=0, range_of=lambda entry: None)
    runtime = Runtime("fake", running, files, place, 0)
    change(place, runtime)
    read: list[tuple[bytes, bytes]] = []
    held: list[tuple[torch.Tensor, Values, str]] = []

    def look(weight: torch.Tensor, recipe: Values, stream: str) -> None:
        """As a device does: later, and by address."""
        address, wanted = weight.data_ptr(), recipe.values.numpy().tobytes()
        backend.submit(stream, lambda: read.append((ctypes.string_at(address, len(wanted)), wanted)))

    def let_go() -> None:
        for one in held:
            look(*one)
        held.clear()

    try:
        for _ in range(120):
            number = choose.randrange(len(recipes))
            recipe = recipes[number]
            if choose.random() < 0.4:
                runtime.get_ahead(number, recipe)
                continue
            backend.user = choose.choice(["user", "other"])
            weight = runtime.get(number, recipe, is_part=number % 5 == 0)

            look(weight, recipe, backend.user)
            if choose.random() < 0.2:
                held.append((weight, recipe, backend.user))
            if choose.random() < 0.3:
                let_go()
            del weight
        let_go()
        backend.drain()
    finally:
        runtime.close()
    assert len(read) > 40
    return all(found == wanted for found, wanted in read)


@pytest.mark.parametrize("seed", range(40))
def test_every_value_is_right_in_whatever_order_streams_work(seed: int) -> None:
    assert run_program(seed)


def _no_wait_for_users(place: Any, runtime: Runtime) -> None:
    bring = place.bring
    place.bring = lambda recipe, into, writable: bring(recipe, into, None)


def _no_wait_for_the_copy(place: Any, runtime: Runtime) -> None:
    place.wait = lambda ticket: place._backend.keep(ticket.into, place._backend.current())


def _pinned_memory_too_soon(place: Any, runtime: Runtime) -> None:
    place._backend.finish = lambda event: None


def _memory_given_away(place: Any, runtime: Runtime) -> None:
    place._backend.keep = lambda tensor, stream: None


def _only_the_last_user(place: Any, runtime: Any) -> None:
    stamps = runtime.ring._stamps

    def last(entry: Any) -> Any:
        found = stamps(entry)
        return found[-1] if isinstance(found, tuple) else found

    runtime.ring._stamps = last


@pytest.mark.parametrize(
    "change",
    [_no_wait_for_users, _no_wait_for_the_copy, _pinned_memory_too_soon, _memory_given_away, _only_the_last_user],
)
def test_the_test_above_sees_a_wait_that_is_missing(change: Callable[[AcceleratorPlace, Runtime], None]) -> None:
    assert not all(run_program(seed, change) for seed in range(40))


def test_a_weight_is_not_taken_away_between_its_making_and_its_use() -> None:
    backend = FakeBackend()
    place: Any = AcceleratorPlace(backend, 128)
    files: Any = SimpleNamespace(check=lambda: None, close=lambda: None, read_ahead=0, range_of=lambda entry: None)
    runtime = Runtime("fake", Running(made=1000, largest=64, buffers=64), files, place, 0)
    recipes = [Values(n, (64,)) for n in range(4)]
    wait, others = place.wait, iter(recipes[1:])

    def wait_while_others_compute(ticket: Any) -> None:
        for other in others:
            runtime.get(id(other), other)
        wait(ticket)

    place.wait = wait_while_others_compute
    assert torch.equal(runtime.get(id(recipes[0]), recipes[0]), recipes[0].values)


def test_pinned_memory_is_no_more_than_was_planned() -> None:
    backend = FakeBackend()
    place = AcceleratorPlace(backend, 256, 3, large=1024)
    for recipe in (Values(1, (100, 8)), Values(2, (3, 100)), Values(3, (700,)), Values(4, (10,)), Values(5, (1, 900))):
        into = place.allocate(recipe.values.numel()).view(recipe.shape)
        place.wait(place.bring(recipe, into, None))
        assert torch.equal(into, recipe.values)
    assert backend.pinned_bytes <= 3 * 256 + 1024


def test_small_weights_share_pinned_memory_without_waiting() -> None:
    backend = FakeBackend()
    place = AcceleratorPlace(backend, 4096, 1)
    finished: list[Any] = []
    finish, backend.finish = backend.finish, finished.append  # type: ignore[method-assign]
    intos = [place.allocate(64) for _ in range(8)]
    tickets = [place.bring(Values(n, (64,)), into, None) for n, into in enumerate(intos)]
    assert not finished
    assert backend.pinned_bytes == 4096
    finish(tickets[-1].event)
    assert all(torch.equal(into, Values(n, (64,)).values) for n, into in enumerate(intos))


def test_a_device_without_streams_gets_the_same_values() -> None:
    place = AcceleratorPlace(PlainBackend(torch.device("cpu")), 64, 1)
    for recipe in (Values(1, (100, 8)), Values(2, (3, 40), parts=3), Values(3, (700,)), Values(4, (0,))):
        into = place.allocate(recipe.values.numel()).view(recipe.shape)
        ticket = place.bring(recipe, into, place.stamp(place.user()))
        place.wait(ticket)
        assert torch.equal(into, recipe.values)


class Api:
    """A module such as `torch.cuda`, that writes down what is asked of it."""

    def __init__(self) -> None:
        self.log: list[tuple[str, ...]] = []
        self.now = "main"
        api = self

        class Stream:
            def __init__(self, device: torch.device) -> None:
                self.name = f"side of {device}"

            def wait_event(self, event: Any) -> None:
                api.log.append((self.name, "waits for", event.stream))

        class Event:
            def record(self, stream: Any) -> None:
                self.stream = stream.name

            def synchronize(self) -> None:
                api.log.append(("host", "waits for", self.stream))

        self.Stream, self.Event = Stream, Event

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.now = self.now, stream.name
        yield
        self.now = before

    def current_stream(self, device: torch.device) -> Any:
        return SimpleNamespace(name=self.now, wait_event=lambda e: self.log.append((self.now, "waits for", e.stream)))


def test_streams_of_torch_are_asked_for_what_the_fake_ones_are(monkeypatch: pytest.MonkeyPatch) -> None:
    api = Api()
    backend = StreamBackend(torch.device("cpu"), api)
    empty = torch.empty

    def counted(*args: Any, **named: Any) -> torch.Tensor:
        api.log.append((api.now, "allocates", str(args[0])))
        return empty(*args, **named)

    monkeypatch.setattr(torch, "empty", counted)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: api.log.append((stream.name, "keeps")))
    place = AcceleratorPlace(backend, 64, 1)
    into = place.allocate(48)
    assert api.log.pop() == ("side of cpu", "allocates", "48")
    users = place.stamp(place.user())
    ticket = place.bring(Values(1, (48,)), into, users)
    # This machine pins nothing, so that ordinary memory is taken.
    assert api.log[0] == ("side of cpu", "waits for", "main")
    assert {entry[1] for entry in api.log[1:]} == {"allocates"}
    api.log.clear()
    place.wait(ticket)
    assert api.log == [("main", "waits for", "side of cpu"), ("main", "keeps")]
    api.log.clear()
    place.bring(Values(2, (48,)), into, (users, users))
    assert api.log == [("side of cpu", "waits for", "main")] * 2 + [("host", "waits for", "side of cpu")]
    assert torch.equal(into, Values(2, (48,)).values)


def test_a_device_that_is_not_here_is_named_although_nothing_stays_there(saved: Callable[..., Path]) -> None:
    if torch.cuda.is_available():
        pytest.skip("it is here")
    with pytest.raises(PlacementError, match="cuda:0 is not on this machine"):
        lowmem.load(saved("llama"), device_map=spread("llama", "disk"), max_memory={0: "1GiB"})


def test_a_device_that_is_full_is_named_with_what_helps() -> None:
    place = AcceleratorPlace(FakeBackend(room=100), 64)
    with pytest.raises(BudgetError, match=r"cpu refused 101 B .* max_memory"):
        place.allocate(101)


# Whole models, their layers elsewhere, on a device whose copies are done late.


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeBackend]]:
    """`"cuda:0"` is a fake one, with 40 MiB that are free; gives those that were used."""
    made: list[FakeBackend] = []

    def place(name: str, running: Running) -> AcceleratorPlace:
        assert name == "cuda:0"
        made.append(FakeBackend(len(made)))
        # Smaller than those of any plan, so that weights of these sizes go through them in parts too.
        return AcceleratorPlace(made[-1], 1000, 2)

    monkeypatch.setattr(attaching, "accelerator_place", place)
    monkeypatch.setattr(loader, "check_present", lambda plan, option="": None)
    monkeypatch.setattr(planning, "device_memory", lambda: {"cuda:0": 40 * MIB})
    yield made
    gc.collect()


def spread(kind: str, where: str) -> dict[str, str]:
    """All weights elsewhere; what has none is on the device."""
    layers = 2 if kind == "qwen3-moe" else 3
    half = {f"model.layers.{n}": "cpu" for n in range(layers // 2, layers)} | {"lm_head": "cpu"}
    return {"": "cpu" if where == "cpu" else "disk", "model.rotary_emb": "cuda:0"} | (half if where == "half" else {})


def tokens_of(model: Any) -> torch.Tensor:
    ids = torch.tensor([[5, 9, 11, 4]])
    found: torch.Tensor = model.generate(ids, max_new_tokens=32, min_new_tokens=32, do_sample=False)
    return found


@pytest.mark.parametrize("room", ["60KiB", "32MiB", None])
@pytest.mark.parametrize("where", ["disk", "cpu", "half"])
@pytest.mark.parametrize(
    ("kind", "dtype"), [("llama", "bfloat16"), ("llama-tied", "float32"), ("qwen3-moe", "float32")]
)
def test_a_model_elsewhere_computes_as_the_whole_one(
    saved: Callable[..., Path], device: list[FakeBackend], kind: str, dtype: str, where: str, room: str | None
) -> None:
    folder = saved(kind, "float32", "20KB")
    limits = None if room is None else {"cuda:0": room}
    whole: Any = lowmem.load(folder, dtype=dtype, residency="copy").model
    result = lowmem.load(folder, dtype=dtype, device_map=spread(kind, where), max_memory=limits)
    model: Any = result.model
    ids = torch.tensor([[3, 8, 90, 41, 7], [1, 2, 3, 4, 5]])
    with torch.inference_mode():
        for _ in range(3):
            assert torch.equal(model(ids).logits, whole(ids).logits)
    assert torch.equal(tokens_of(model), tokens_of(whole))
    # A weight that is used whole although it has parts, such as experts that are multiplied at once, is over the plan.
    assert device[0].copies
    assert kind == "qwen3-moe" or device[0].peak <= result.plan.running.buffers
    lowmem.release(model)


def test_threads_that_compute_side_by_side_get_the_right_weights(
    saved: Callable[..., Path], device: list[FakeBackend]
) -> None:
    folder = saved("llama", "float32", "20KB")
    whole: Any = lowmem.load(folder, residency="copy").model
    model: Any = lowmem.load(folder, device_map=spread("llama", "disk"), max_memory={"cuda:0": "60KiB"}).model
    inputs = [torch.tensor([[n, 2 * n, 3 * n]]) for n in range(1, 5)]
    with torch.no_grad():
        wanted = [whole(ids).logits for ids in inputs]

    def run(number: int) -> bool:
        torch.set_num_threads(1)
        with torch.no_grad():
            return all(torch.equal(model(inputs[number]).logits, wanted[number]) for _ in range(6))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(4)))


def test_weights_that_wait_in_memory_are_parameters_with_values(
    saved: Callable[..., Path], device: list[FakeBackend], tmp_path: Path
) -> None:
    folder = saved("llama-tied", "float32", "20KB")
    whole: Any = lowmem.load(folder, residency="copy").model
    model: Any = lowmem.load(folder, device_map=spread("llama", "cpu")).model
    assert all(isinstance(p, OffloadedParameter) for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    wanted = whole.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor + 0, wanted[name]), name
    again = pickle.loads(pickle.dumps(model.model.norm.weight))
    assert type(again) is nn.Parameter
    assert torch.equal(again, whole.model.norm.weight)
    model.save_pretrained(tmp_path / "saved")
    saved_again: Any = lowmem.load(tmp_path / "saved", residency="copy").model
    assert all(torch.equal(t, wanted[name]) for name, t in saved_again.state_dict().items())


def test_inputs_travel_between_devices_and_no_weight_is_brought_for_that(
    saved: Callable[..., Path], device: list[FakeBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = lowmem.load(saved("llama"), device_map=spread("llama", "disk")).model
    before = dict(model.named_parameters())
    monkeypatch.setattr(aligning, "OFFLOADED", ("disk",))
    meta = {"model.layers.2": "meta", "model.norm": "meta", "lm_head": "meta"}
    table = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
    plan: Any = SimpleNamespace(device_map=table | meta, main_device="cpu")
    model.model.norm.register_buffer("kept_there", torch.ones(3), persistent=False)
    aligning.align(model, plan, torch.device("cpu"), ["past_key_values"])
    assert device[0].copies == 0
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}
    assert model.model.norm.kept_there.is_meta
    seen: dict[str, torch.device] = {}
    for name in ("model.layers.1.mlp", "model.layers.2.mlp", "lm_head"):
        module = model.get_submodule(name)
        inner = module._old_forward
        module._old_forward = lambda x, name=name, inner=inner: seen.__setitem__(name, x.device) or x
    with torch.no_grad():
        assert model.model.layers[2].mlp(torch.ones(1, 2, 32)).is_meta
        assert model.lm_head(torch.ones(1, 2, 32)).is_meta
        assert model.model.layers[1].mlp(torch.ones(1, 2, 32)).device.type == "cpu"
    assert {name: device.type for name, device in seen.items()} == {
        "model.layers.1.mlp": "cpu",
        "model.layers.2.mlp": "meta",
        "lm_head": "meta",
    }


def test_release_lets_go_of_what_waits_in_memory_and_of_the_device(
    saved: Callable[..., Path], device: list[FakeBackend]
) -> None:
    folder = saved("llama", "float32", "20KB")
    model: Any = lowmem.load(folder, device_map=spread("llama", "half"), residency="copy").model
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    lowmem.release(model)
    assert device[0].held == 0
    with pytest.raises(RunningError, match="released"):
        model(torch.tensor([[1, 2, 3]]))
    assert not hasattr(model, "_hf_hook")


def test_moves_of_a_model_whose_weights_wait_are_refused(saved: Callable[..., Path], device: list[FakeBackend]) -> None:
    model: Any = lowmem.load(saved("llama"), device_map=spread("llama", "cpu")).model
    with pytest.raises(RunningError, match="cannot be moved or cast"):
        model.to(torch.float16)


def test_what_no_file_holds_is_initialised_and_brought(own: Callable[..., Path], device: list[FakeBackend]) -> None:
    folder = own("llama", "float32", "20KB")
    for where in ("cpu", "disk"):
        torch.manual_seed(3)
        whole: Any = lowmem.load(folder, skip="lm_head", strict=False, residency="copy").model
        torch.manual_seed(3)
        model: Any = lowmem.load(folder, skip="lm_head", strict=False, device_map=spread("llama", where)).model
        ids = torch.tensor([[3, 8, 90]])
        with torch.no_grad():
            assert torch.equal(model(ids).logits, whole(ids).logits)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_int8_layers_that_are_brought_compute_as_int8_linear(
    saved: Callable[..., Path], device: list[FakeBackend], tmp_path: Path, where: str
) -> None:
    folder = saved("llama", "float32", "20KB")
    written = tmp_path / "int8"
    lowmem.load(folder, quantize="int8").model.save_pretrained(written)
    result = lowmem.load(written, device_map=spread("llama", where))
    model: Any = result.model
    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    assert len(layers) == 21
    brought: list[int] = []
    for layer in layers:
        made = layer.weight.weight
        assert isinstance(layer.weight, OffloadedParameter)
        whole = made.whole
        made.whole = lambda whole=whole: brought.append(1) or whole()
    whole_model: Any = lowmem.load(written).model
    x = torch.tensor([[3, 8, 90, 41, 7]])
    with torch.no_grad():
        found, wanted = model(x).logits, whole_model(x).logits
    assert len(brought) == len(layers)
    # bitsandbytes makes int8 of activations too.
    assert (found - wanted).abs().max() < 0.1 * wanted.abs().max()
    state = whole_model.state_dict()
    model.save_pretrained(tmp_path / "again")
    again: Any = lowmem.load(tmp_path / "again").model
    assert all(torch.equal(t, state[name]) for name, t in again.state_dict().items())


def test_plans_say_what_the_device_and_pinned_memory_take(
    saved: Callable[..., Path], device: list[FakeBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved("llama", "float32", "20KB")
    table = spread("llama", "disk")
    free = lowmem.plan(folder, device_map=table).running
    assert free.buffers == free.made
    assert free.pinned == PIECES * free.piece
    stated = lowmem.plan(folder, device_map=table, max_memory={"cuda:0": "60KiB"}).running
    assert stated.buffers == 60 * 1024
    narrow = lowmem.plan(folder, device_map=table, max_memory={"cuda:0": 2048}).running
    assert narrow.buffers == narrow.largest > 2048
    tight = lowmem.plan(folder, device_map=table)
    with pytest.raises(BudgetError, match="host memory through which"):
        lowmem.plan(folder, device_map=table, ram=tight.host.resident + tight.host.overhead + 2 * MIB)
    assert free.to_dict()["pinned"] == free.pinned
    monkeypatch.setattr(planning, "device_memory", lambda: {"cuda:0": 50000})
    left_to_others = lowmem.plan(folder, device_map=table).running
    assert left_to_others.largest < left_to_others.buffers == 45000
    monkeypatch.setattr(planning, "device_memory", lambda: {"cuda:0": 2048})
    with pytest.raises(BudgetError, match=r"device cuda:0 would hold 0 B and must have room for .* it has 2.00 KiB"):
        lowmem.plan(folder, device_map=table)
