"""What is read ahead: pages that the kernel took back, and of experts those that a router chose and no others."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import inputs_of, new_model

import lowmem
from lowmem.offload import attaching, bringing, runtime
from lowmem.offload.observing import ExpertsObserver, _numbers
from lowmem.offload.pages import Pages, joined_ranges
from lowmem.sizes import MIB

pytest.importorskip("transformers")

# How the experts of a bf16 checkpoint lie, what they are loaded as, and whether they are cast once into a folder.
CASES = {
    "where they lie": ("fused", "bfloat16", False),
    "in one piece, cast at use": ("fused", "float32", False),
    "put together at use": ("separate", "bfloat16", False),
    "put together and cast at use": ("separate", "float32", False),
    "where they were written": ("separate", "float32", True),
}
Ranges = Sequence[tuple[int, int]]


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Loads a mixture in one of the cases, with all of it on disk."""
    loaded = []

    def made(case: str, **options: Any) -> Any:
        layout, dtype, is_written = CASES[case]
        source = tmp_path / layout
        if not source.exists():
            new_model("qwen3-moe", "bfloat16").save_pretrained(source, save_original_format=layout == "separate")
        if is_written:
            options["offload_folder"] = tmp_path / "offload"
        loaded.append(lowmem.load(source, dtype=dtype, device_map={"": "disk"}, **options).model.eval())
        return loaded[-1]

    yield made
    for model in loaded:
        lowmem.release(model)


def experts_of(model: Any) -> list[torch.nn.Module]:
    return [layer.mlp.experts for layer in model.model.layers]


def runtime_of(model: Any) -> runtime.Runtime:
    known = attaching._loaded[model]
    found = None if known is None else known()
    assert found is not None
    return found


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Ranges]:
    """What the runtime was told to expect, module by module."""
    found: list[Ranges] = []
    expect = runtime.Runtime.expect

    def expected(self: runtime.Runtime, ranges: Ranges) -> None:
        found.append(list(ranges))
        expect(self, ranges)

    monkeypatch.setattr(runtime.Runtime, "expect", expected)
    return found


def chosen_by(model: Any) -> list[list[int]]:
    """The numbers that the routers give, module by module, filled as the model runs."""
    found: list[list[int]] = []

    def look(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        found.append(sorted(set(inputs[1].flatten().tolist())))

    for module in experts_of(model):
        module.register_forward_pre_hook(look)
    return found


def values_at(ranges: Ranges, dtype: torch.dtype) -> torch.Tensor:
    content = b"".join(ctypes.string_at(address, nbytes) for address, nbytes in ranges)
    return torch.frombuffer(bytearray(content), dtype=dtype).float()


@pytest.mark.parametrize("case", CASES)
def test_the_experts_that_a_router_chose_are_told_ahead(
    case: str, load: Callable[..., Any], told: list[Ranges]
) -> None:
    model = load(case)
    chosen = chosen_by(model)
    with torch.no_grad():
        model(**inputs_of(model))
    assert len(told) == len(chosen) == len(experts_of(model))
    count = model.config.num_experts
    assert any(len(numbers) < count for numbers in chosen)
    stored = torch.float32 if case == "where they were written" else torch.bfloat16
    for module, numbers, ranges in zip(experts_of(model), chosen, told, strict=True):
        weights = [parameter.detach() for parameter in module._parameters.values() if parameter is not None]
        expected = [weight[n].float().flatten() for n in numbers for weight in weights]
        assert torch.equal(values_at(ranges, stored), torch.cat(expected))


def test_experts_are_told_to_modules_that_are_called_by_keyword(load: Callable[..., Any], told: list[Ranges]) -> None:
    module: Any = experts_of(load("where they lie"))[0]
    x = torch.ones(1, module.down_proj.shape[1], dtype=torch.bfloat16)
    index = torch.tensor([[1, 0]])
    with torch.no_grad():
        found = module(hidden_states=x, top_k_index=index, top_k_weights=torch.ones(1, 2, dtype=torch.bfloat16))
    assert found.shape == x.shape
    assert [address for address, _ in told[0]] == [
        weight[n].data_ptr() for n in (0, 1) for weight in (module.gate_up_proj, module.down_proj)
    ]


@pytest.mark.parametrize("case", CASES)
def test_readers_help_to_bring_what_is_not_in_memory(
    case: str, load: Callable[..., Any], told: list[Ranges], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(case)
    runtime_of(model).reads_exactly = False  # so that experts are known by how they are read
    brought: dict[tuple[int, int], str] = {}
    came = threading.Condition()

    def bring(address: int, nbytes: int, *, exactly: bool) -> None:
        if not exactly:
            return
        name = threading.current_thread().name
        with came:
            brought[address, nbytes] = name
            came.notify_all()
            # Whoever computes leaves something to the others.
            assert name == "lowmem-ahead" or came.wait_for(lambda: "lowmem-ahead" in brought.values(), timeout=60)

    monkeypatch.setattr(runtime, "bring_range", bring)
    monkeypatch.setattr(bringing, "bring_range", lambda *_, exactly: None)
    monkeypatch.setattr(runtime, "holds", lambda *_: False)
    with torch.no_grad():
        model(**inputs_of(model))
    with came:
        assert came.wait_for(lambda: brought.keys() >= {one for ranges in told for one in ranges}, timeout=60)


def test_what_is_in_memory_is_not_read_ahead(
    load: Callable[..., Any], told: list[Ranges], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("where they lie")
    with torch.no_grad():
        model(**inputs_of(model))
    running = runtime_of(model)
    calls: list[None] = []
    monkeypatch.setattr(running, "_call", lambda: calls.append(None))
    asked: list[tuple[int, int]] = []

    def holds(address: int, nbytes: int, samples: int) -> bool:
        asked.append((address, nbytes))
        return True

    monkeypatch.setattr(runtime, "holds", holds)
    running.expect(told[-1])
    assert asked == list(told[-1])
    assert not calls
    assert not running._expected


@pytest.mark.parametrize(("is_tight", "most"), [(False, 512 * MIB), (True, 16 * MIB)])
def test_no_more_is_expected_than_memory_allows(
    is_tight: bool, most: int, load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = runtime_of(load("put together at use"))
    monkeypatch.setattr(runtime, "holds", lambda *_: False)
    monkeypatch.setattr(running, "_call", lambda: None)
    running.is_tight = is_tight
    running._allowed = 64 * MIB if is_tight else 700 * MIB
    brought: list[tuple[int, int]] = []
    monkeypatch.setattr(runtime, "bring_range", lambda *piece, exactly: brought.append(piece))
    running.expect([(0, 600 * MIB), (2**40, MIB)])
    assert sum(nbytes for _, nbytes in brought) == most
    assert [address for address, _ in brought] == list(range(0, most, 4 * MIB))


def test_experts_that_are_in_a_buffer_are_not_read(load: Callable[..., Any], told: list[Ranges]) -> None:
    model = load("put together and cast at use")
    with torch.no_grad():
        model(**inputs_of(model))
        model(**inputs_of(model))
    half = len(experts_of(model))
    assert all(told[:half])
    # All of them fit, and stay.
    assert not any(told[half:])


@pytest.mark.parametrize("case", ["in one piece, cast at use", "put together at use"])
def test_of_a_part_just_its_pages_are_brought_and_given_back(
    case: str, load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(case)
    brought: list[tuple[int, int]] = []
    left: list[tuple[int, int]] = []
    monkeypatch.setattr(bringing, "_WORTH_READING", 1)
    monkeypatch.setattr(bringing, "bring_range", lambda *one, exactly: brought.append(one) if exactly else None)
    monkeypatch.setattr(bringing, "let_go", lambda *one: left.append(one))
    runtime_of(model).is_tight = True
    parameter: Any = next(iter(experts_of(model)[0].parameters()))
    expected = parameter.weight.part_ranges(2)
    parameter.weight.make_part(2, torch.empty(parameter.shape[1:], dtype=parameter.dtype))
    assert brought == left == list(expected)
    assert sum(nbytes for _, nbytes in expected) == 2 * parameter[2].numel()


def test_values_that_do_not_lie_as_torch_reads_them_have_no_pages_to_expect(tmp_path: Path) -> None:
    """Each is read by way of a copy, whose address means nothing afterwards."""
    model = new_model("qwen3-moe", "bfloat16")
    model.save_pretrained(tmp_path, save_original_format=False)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip() + b" "
    header += b" " * (len(header) % 2 == 0)
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    ours: Any = lowmem.load(tmp_path, device_map={"": "disk"}).model
    parameter: Any = next(iter(experts_of(ours)[0].parameters()))
    assert not parameter.weight.part_ranges(1)
    with torch.no_grad():
        loaded: Any = lowmem.load(tmp_path).model
        assert torch.equal(ours(**inputs_of(ours)).logits, loaded(**inputs_of(model)).logits)
    lowmem.release(ours)


def test_ranges_that_follow_one_another_are_one() -> None:
    assert joined_ranges([(0, 4), (4, 2), None, (6, 1), (9, 1), (10, 0), (10, 5)]) == [(0, 7), (9, 6)]


@pytest.mark.parametrize("calm", [True, False])
def test_pages_that_the_kernel_took_back_are_brought_again(
    calm: bool, load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not it was noticed before that all of them had come."""
    model = load("where they lie")
    with torch.no_grad():
        model(**inputs_of(model))
        running = runtime_of(model)
        units = [unit for unit in running.units if unit.pages is not None and not unit.by_need]
        assert units
        assert all(unit.pages.are_here for unit in units if unit.pages is not None)
        running._calm = calm
        brought: set[int] = set()
        monkeypatch.setattr(runtime, "bring_range", lambda address, nbytes, *, exactly: brought.add(address))
        monkeypatch.setattr(Pages, "seem_cached", lambda self: False)
        model(**inputs_of(model))
    assert brought.issuperset(address for unit in units if unit.pages for _, address, _, _ in unit.pages.spans)


def test_a_released_model_has_no_observers(load: Callable[..., Any]) -> None:
    model = load("where they lie")
    module = experts_of(model)[0]
    assert any(isinstance(hook, ExpertsObserver) for hook in module._forward_pre_hooks.values())
    apart = model.model.layers
    model.model.layers = apart[:1]  # what was taken out is not forgotten
    lowmem.release(model)
    for one in (*model.modules(), *apart.modules()):
        assert not one._forward_pre_hooks
        assert not one._forward_pre_hooks_with_kwargs


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor([[3, 1], [1, 0]]), [0, 1, 3]),
        (torch.tensor([2, 4], dtype=torch.int32), [2]),  # 4 of 4: for no expert
        (torch.tensor([4]), []),
        (torch.tensor([5]), []),
        (torch.tensor([-1, 2]), []),
        (torch.tensor([], dtype=torch.int64), []),
        (torch.tensor([1.0, 2.0]), []),
        (torch.tensor([True, False]), []),
        (torch.zeros(2, dtype=torch.int64, device="meta"), []),
        (torch.nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False), []),
        (torch.arange(600) % 3, [0, 1, 2]),
        (3, []),
        (None, []),
    ],
)
def test_numbers_of_experts_are_told_from_other_inputs(value: Any, expected: list[int]) -> None:
    assert _numbers(value, 4) == expected


def test_tensors_without_values_of_their_own_are_no_numbers() -> None:
    found: list[list[int]] = []

    def look(index: torch.Tensor) -> torch.Tensor:
        found.append(_numbers(index, 4))
        return index

    torch.func.vmap(look)(torch.tensor([[3, 1], [1, 0]]))
    assert found == [[]]
