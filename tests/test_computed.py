"""Targets that an operation computes: on whole tensors, one group after the other, counted before they are read."""

from __future__ import annotations

import gc
import io
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_budget import check_prediction
from test_engine import check_nothing_is_left, linux, some, threads_of_lowmem
from test_fused import load, plan_of, values_of
from tiny_models import same
from torch import nn

from lowmem import loader
from lowmem.checkpoint import Checkpoint, inspect
from lowmem.errors import BudgetError, KeysError, LowmemError, ModelError, OutOfMemoryError, PlacementError
from lowmem.mapping import KeyMapping, Link, whole
from lowmem.mapping.records import Computation
from lowmem.modeling.conversions import Cost
from lowmem.planner import LoadPlan
from lowmem.sizes import MIB

Tensors = list[torch.Tensor]


class Op:
    """An operation made of a function."""

    def __init__(
        self,
        function: Callable[[Tensors], Any],
        shapes: list[tuple[int, ...]],
        dtype: str | None = None,
        scratch: int = 0,
    ) -> None:
        self.function, self.shapes, self.dtype, self.scratch = function, shapes, dtype, scratch
        self.calls: list[str] = []

    def cost(self, dtype: str) -> Cost:
        self.calls.append(dtype)
        return Cost(tuple((shape, self.dtype or dtype) for shape in self.shapes), self.scratch)

    def __call__(self, sources: Tensors) -> Tensors:
        assert not torch.is_grad_enabled()
        made: Tensors = self.function(sources)
        return made


def both(sources: Tensors) -> Tensors:
    """A sum, and a difference that is turned."""
    a, b = sources
    return [a + b, (a - b).t().contiguous()]


class Two(nn.Module):
    """A plain layer, and one whose weights are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(6, 6, bias=False)
        self.made = nn.ModuleDict({"sum": nn.Linear(6, 8, bias=False), "turned": nn.Linear(8, 6, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.made["turned"](self.made["sum"](self.plain(x)))
        return hidden


TARGETS = ("made.sum.weight", "made.turned.weight")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("computed")
    tensors = {"a": some("float32", (8, 6), 1), "b": some("bfloat16", (8, 6), 2), "plain": some("float32", (6, 6), 3)}
    save_file(tensors, folder / "m.safetensors")
    return folder


def computed(checkpoint: Checkpoint, operation: Any, tied: dict[str, str] | None = None) -> KeyMapping:
    links = (Link(checkpoint["plain"], "plain.weight", whole((6, 6))),)
    computation = Computation("Both", (checkpoint["a"], checkpoint["b"]), TARGETS, operation)
    return KeyMapping(links, tied or {}, {}, (), (), (), (), (), computed=(computation,))


def usual() -> Op:
    return Op(both, [(8, 6), (6, 8)])


def wanted(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    a, b = some("float32", (8, 6), 1).to(dtype), some("bfloat16", (8, 6), 2).to(dtype)
    plain = some("float32", (6, 6), 3).to(dtype)
    return {"plain.weight": plain, TARGETS[0]: a + b, TARGETS[1]: (a - b).t().contiguous()}


def names_of(plan: LoadPlan) -> dict[str, str]:
    return {p.target: p.residency for p in plan.placements}


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float64"])
def test_what_is_computed_is_what_the_operation_gives_for_sources_that_are_cast(source: Path, dtype: str) -> None:
    checkpoint, operation = inspect(source), usual()
    model, plan = load(checkpoint, Two, computed(checkpoint, operation), dtype=dtype)
    final = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    for name, tensor in wanted(final).items():
        assert same(model.state_dict()[name], tensor), name
    assert set(operation.calls) == {str(final).removeprefix("torch.")}
    assert plan.bytes_read == 8 * 6 * (4 + 2) + (6 * 6 * 4 if final != torch.float32 else 0)
    assert all(p.requires_grad for p in model.parameters())
    assert sum("are computed (Both)" in text and text.startswith("2 tensors") for text in plan.warnings) == 1
    (row,) = plan.to_dict()["computed"]
    assert (row["what"], row["keys"], row["tensors"]) == ("Both", ["a", "b"], list(TARGETS))
    assert not threads_of_lowmem()


def test_the_dtype_is_that_of_the_result(source: Path) -> None:
    checkpoint = inspect(source)
    operation = Op(lambda s: [t.double() for t in both(s)], [(8, 6), (6, 8)], "float64")
    model, plan = load(checkpoint, Two, computed(checkpoint, operation), dtype="bfloat16")
    for name in TARGETS:
        assert same(model.state_dict()[name], wanted(torch.bfloat16)[name].double())
    assert {p.dtype for p in plan.placements if p.target in TARGETS} == {"float64"}
    assert plan.placements[-1].nbytes == 8 * 6 * 8


def test_a_tie_follows_what_is_computed(source: Path) -> None:
    class Tied(Two):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 8, bias=False)
            self.head.weight = self.made["sum"].weight

    checkpoint = inspect(source)
    operation = Op(lambda s: [t.double() for t in both(s)], [(8, 6), (6, 8)], "float64")
    mapping = computed(checkpoint, operation, {"head.weight": TARGETS[0]})
    model, _ = load(checkpoint, Tied, mapping)
    assert model.head.weight is model.made["sum"].weight
    assert same(model.head.weight, wanted(torch.float32)[TARGETS[0]].double())


def test_views_of_sources_and_of_each_other_become_tensors_of_their_own(source: Path) -> None:
    held = []

    def views(sources: Tensors) -> Tensors:
        held.extend(weakref.ref(s) for s in sources)
        stacked = torch.stack(sources)
        return [stacked[0], stacked[1].t()]

    checkpoint = inspect(source)
    model, _ = load(checkpoint, Two, computed(checkpoint, Op(views, [(8, 6), (6, 8)])))
    first, second = (model.get_parameter(name) for name in TARGETS)
    assert same(first, some("float32", (8, 6), 1))
    assert same(second, some("bfloat16", (8, 6), 2).float().t().contiguous())
    for weight in (first, second):
        assert weight.is_contiguous()
        assert weight.untyped_storage().nbytes() == weight.nbytes
    gc.collect()
    assert not any(ref() is not None for ref in held)


def test_one_tensor_given_twice_becomes_two(source: Path) -> None:
    checkpoint = inspect(source)
    mapping = computed(checkpoint, Op(lambda s: [s[0]] * 2, [(8, 6), (8, 6)]))

    class Alike(Two):
        def __init__(self) -> None:
            super().__init__()
            self.made["turned"] = nn.Linear(6, 8, bias=False)

    model, _ = load(checkpoint, Alike, mapping)
    first, second = (model.get_parameter(name) for name in TARGETS)
    assert same(first, second)
    with torch.no_grad():
        first.zero_()
    assert second.any()


@linux
def test_operations_may_free_sources_early_and_nothing_keeps_them(source: Path) -> None:
    seen = []

    def early(sources: Tensors) -> Tensors:
        refs = [weakref.ref(s) for s in sources]
        made = both(sources)
        sources.clear()
        gc.collect()
        seen.extend(ref() for ref in refs)
        return made

    checkpoint = inspect(source)
    load(checkpoint, Two, computed(checkpoint, Op(early, [(8, 6), (6, 8)])))
    assert seen == [None, None]


# -- on disk


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_on_disk_it_is_written_once_and_used_again(source: Path, tmp_path: Path, dtype: str) -> None:
    checkpoint = inspect(source)
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": "cpu", "made": "disk"}}
    options["offload_folder"] = tmp_path / "off"
    final = torch.float32 if dtype == "auto" else torch.bfloat16
    reference = Two().to(final)
    reference.load_state_dict(wanted(final))
    x = torch.randn(3, 6).to(final)
    for again in (False, True):
        operation = usual()
        model, plan = load(checkpoint, Two, computed(checkpoint, operation), **options)
        assert plan.offload is not None
        assert plan.offload.reused == again
        assert (not plan.groups) == again
        assert {names_of(plan)[name] for name in TARGETS} == {"write"}
        for name in TARGETS:
            assert same(values_of(model, plan)[name], wanted(final)[name])
        with torch.no_grad():
            assert same(model(x), reference(x))
    computation = computed(checkpoint, usual())
    other = replace(computation, computed=(replace(computation.computed[0], what="Other"),))
    _, plan = plan_of(checkpoint, Two, other, **options)
    assert plan.offload is not None
    assert not plan.offload.reused


def test_half_on_disk_and_half_in_memory(source: Path, tmp_path: Path) -> None:
    checkpoint = inspect(source)
    options: dict[str, Any] = {"device_map": {"": "cpu", "made.sum": "disk"}, "offload_folder": tmp_path / "off"}
    for again in (False, True):
        model, plan = load(checkpoint, Two, computed(checkpoint, usual()), **options)
        assert names_of(plan) == {"plain.weight": "map", TARGETS[0]: "write", TARGETS[1]: "copy"}
        assert plan.offload is not None
        assert plan.offload.reused == again
        assert len(plan.groups) == 1
        found = values_of(model, plan)
        assert all(same(found[name], tensor) for name, tensor in wanted(torch.float32).items())


def test_on_disk_without_a_folder_is_refused(source: Path) -> None:
    checkpoint = inspect(source)
    with pytest.raises(PlacementError, match=r"'made\.sum\.weight'.*offload_folder="):
        plan_of(checkpoint, Two, computed(checkpoint, usual()), device_map={"": "cpu", "made": "disk"})


def test_a_config_that_differs_gets_a_folder_of_its_own(source: Path, tmp_path: Path) -> None:
    """An operation may work by the config, which no file of weights tells."""

    class Config:
        def __init__(self, heads: int) -> None:
            self.heads = heads

        def to_json_string(self) -> str:
            return f"heads: {self.heads}"

    def build(heads: int) -> nn.Module:
        model: Any = Two()
        model.config = Config(heads)
        return model

    checkpoint = inspect(source)
    options: dict[str, Any] = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "off"}
    plans = [plan_of(checkpoint, lambda n=n: build(n), computed(checkpoint, usual()), **options)[1] for n in (1, 2, 1)]
    folders = [plan.offload.folder for plan in plans if plan.offload is not None]
    assert folders[0] == folders[2] != folders[1]


# -- what goes wrong


def fails(sources: Tensors) -> Tensors:
    raise RuntimeError("no such permutation")


def starves(sources: Tensors) -> Tensors:
    raise MemoryError


WRONG: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "fails": (fails, "failed: RuntimeError: no such permutation"),
    "shape": (lambda s: [s[0], s[1]], r"expected 'made.turned.weight' as float32 of shape \(6, 8\).*found .*\(8, 6\)"),
    "dtype": (lambda s: [t.half() for t in both(s)], "expected 'made.sum.weight' as float32.*found float16"),
    "count": (lambda s: both(s)[:1], "expected 2 tensors, found 1"),
    "no tensors": (lambda s: [1, 2], "found int"),
    "nothing": (lambda s: None, "failed: TypeError"),
    "meta": (lambda s: [t.to("meta") for t in both(s)], "found float32 of shape .* on meta"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("folder", [False, True])
def test_an_operation_that_fails_or_lies_is_an_error_that_leaves_nothing(
    source: Path, tmp_path: Path, case: str, folder: bool
) -> None:
    # What is mapped keeps its file open.
    copied = shutil.copytree(source, tmp_path / "c")
    checkpoint = inspect(copied)
    function, text = WRONG[case]
    mapping = computed(checkpoint, Op(function, [(8, 6), (6, 8)]))
    model = Two()
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    options: dict[str, Any] = {"residency": "copy"}
    if folder:
        options |= {"device_map": {"": "cpu", "made": "disk"}, "offload_folder": tmp_path / "off"}
    skeleton, plan = plan_of(checkpoint, model, mapping, **options)
    with pytest.raises(ModelError, match=text) as failed:
        loader._execute(skeleton, plan, None, lambda file: None)
    named = ("Both", "'a'", "'b'", *map(repr, TARGETS), str(copied))
    assert all(name in str(failed.value) for name in named)
    assert all(p is before[name][0] and torch.equal(p, before[name][1]) for name, p in model.named_parameters())
    check_nothing_is_left(copied)
    assert not folder or list((tmp_path / "off").iterdir()) == []


def test_no_memory_for_an_operation_is_an_error_of_its_own(source: Path) -> None:
    checkpoint = inspect(source)
    with pytest.raises(OutOfMemoryError, match="Both"):
        load(checkpoint, Two, computed(checkpoint, Op(starves, [(8, 6), (6, 8)])))


def test_an_error_keeps_no_sources(source: Path) -> None:
    held: list[Any] = []

    def keep(sources: Tensors) -> Tensors:
        held.extend(weakref.ref(s) for s in sources)
        raise ValueError("no")

    checkpoint = inspect(source)
    with pytest.raises(ModelError) as failed:
        load(checkpoint, Two, computed(checkpoint, Op(keep, [(8, 6), (6, 8)])))
    gc.collect()
    assert held
    assert all(ref() is None for ref in held), failed


def test_another_shape_than_the_models_is_refused_before_the_first_byte(source: Path) -> None:
    checkpoint = inspect(source)
    with pytest.raises(KeysError, match=r"Both makes 'made.turned.weight' of shape \(8, 6\); expected \(6, 8\)"):
        plan_of(checkpoint, Two, computed(checkpoint, Op(both, [(8, 6), (8, 6)])))
    with pytest.raises(ModelError, match="Both gives 1 tensors"):
        plan_of(checkpoint, Two, computed(checkpoint, Op(both, [(8, 6)])))
    with pytest.raises(LowmemError, match=r"which torch .* does not have"):
        plan_of(checkpoint, Two, computed(checkpoint, Op(both, [(8, 6), (6, 8)], "float6_e2m3")))


# -- memory


def groups_of(checkpoint: Checkpoint, count: int, shape: tuple[int, ...]) -> KeyMapping:
    """Sums of two tensors each, with as much scratch as the result."""
    nbytes = 4 * shape[0] * shape[1]
    made = []
    for n in range(count):
        sources = (checkpoint[f"{n}.a"], checkpoint[f"{n}.b"])
        operation = Op(lambda s: [(s[0] + s[1]) * 2], [shape], scratch=nbytes)
        made.append(Computation("Double", sources, (f"{n}.weight",), operation))
    return KeyMapping((), {}, {}, (), (), (), (), (), computed=tuple(made))


def stack_of(count: int, shape: tuple[int, ...]) -> nn.Module:
    return nn.Sequential(*(nn.Linear(shape[1], shape[0], bias=False) for _ in range(count)))


def write_pairs(folder: Path, count: int, shape: tuple[int, ...]) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    tensors = {f"{n}.{k}": some("bfloat16", shape, n) for n in range(count) for k in "ab"}
    save_file(tensors, folder / "m.safetensors")
    return inspect(folder)


def test_the_largest_group_is_counted_and_the_refusal_names_it(tmp_path: Path) -> None:
    checkpoint = write_pairs(tmp_path / "c", 3, (512, 1024))
    mapping = groups_of(checkpoint, 3, (512, 1024))
    options: dict[str, Any] = {"dtype": "float32", "staging": MIB}
    _, plan = plan_of(checkpoint, lambda: stack_of(3, (512, 1024)), mapping, **options)
    assert plan.host.resident == 3 * 2 * MIB
    assert plan.host.computing == 3 * 2 * MIB
    assert plan.host.peak == plan.host.resident + plan.host.staging + plan.host.overhead + plan.host.computing
    named = r"6\.00 MiB of it for Double, which makes '0\.weight' of '0\.a', '0\.b'"
    with pytest.raises(BudgetError, match=named) as error:
        plan_of(checkpoint, lambda: stack_of(3, (512, 1024)), mapping, **options, ram=MIB)
    need = error.value.required
    model, plan = load(checkpoint, lambda: stack_of(3, (512, 1024)), mapping, **options, ram=need)
    assert plan.host.peak == need
    for n in range(3):
        value = some("bfloat16", (512, 1024), n).float()
        assert same(model[n].weight, (value + value) * 2)
    on_disk = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "off"}
    _, plan = plan_of(checkpoint, lambda: stack_of(3, (512, 1024)), mapping, **options, **on_disk)
    assert (plan.host.resident, plan.host.computing) == (0, 4 * 2 * MIB)


_MEASURE = """
from pathlib import Path
import test_computed as made
import test_fused as fused
from lowmem.memory import measure
from lowmem.checkpoint import inspect
shape = tuple(args["shape"])
with measure() as memory:
    checkpoint = inspect(Path(args["source"]))
    mapping = made.groups_of(checkpoint, args["count"], shape)
    options = dict(args["options"])
    if "offload_folder" in options:
        options["offload_folder"] = Path(options["offload_folder"])
    model, plan = fused.load(checkpoint, lambda: made.stack_of(args["count"], shape), mapping, **options)
result = {"measured": memory.peak, "predicted": plan.host.peak}
"""


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_the_predicted_peak_of_groups_is_the_measured_one(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, count = (2048, 2048), 6
    write_pairs(tmp_path / "c", count, shape)
    options: dict[str, Any] = {"dtype": "float32", "staging": MIB}
    if where == "disk":
        options |= {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "off")}
    monkeypatch.setattr("test_budget._MEASURE", _MEASURE)
    check_prediction(options, source=str(tmp_path / "c"), shape=shape, count=count)


def test_a_plan_for_people_says_what_is_computed(source: Path) -> None:
    from rich.console import Console

    from lowmem.report import plan_tables

    checkpoint = inspect(source)
    _, plan = plan_of(checkpoint, Two, computed(checkpoint, usual()))
    text = io.StringIO()
    for table in plan_tables(plan):
        Console(width=120, file=text).print(table)
    assert "computing, one group at a time" in text.getvalue()


def test_a_group_that_is_read_twice_marks_its_shard_once(source: Path) -> None:
    checkpoint = inspect(source)
    skeleton, plan = plan_of(checkpoint, Two, computed(checkpoint, usual()), residency="copy")
    seen: list[str] = []
    read = loader._execute(skeleton, plan, None, lambda file: seen.append(file.name))
    assert seen == ["m.safetensors"]
    assert sum(read.values()) == plan.bytes_read
