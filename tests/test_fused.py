"""Targets that are fed from several places, and places that feed parts of several targets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_budget import check_prediction
from test_engine import Bag, some
from tiny_models import same
from torch import nn

from lowmem import loader
from lowmem.checkpoint import Checkpoint, TensorEntry, inspect
from lowmem.errors import PlacementError
from lowmem.mapping import KeyMapping, Link, Region, whole
from lowmem.modeling.skeleton import Origin, Skeleton, make_skeleton
from lowmem.offload import MappedWeights, offload_index
from lowmem.planner import LoadPlan, LoadRequest, Progress, make_plan, moves
from lowmem.sizes import MIB


def span_of(view: torch.Tensor) -> int:
    """Bytes from the first element of a view to behind its last."""
    if not view.numel():
        return 0
    return (1 + sum((n - 1) * step for n, step in zip(view.shape, view.stride(), strict=True))) * view.itemsize


def part_of(entry: TensorEntry, view: torch.Tensor) -> TensorEntry:
    """The entry of a part of a tensor: `view` is that part of a dense tensor like the entry's."""
    strides = None if view.is_contiguous() else tuple(view.stride())
    offset = entry.offset + view.storage_offset() * view.itemsize
    return replace(entry, shape=tuple(view.shape), offset=offset, nbytes=span_of(view), strides=strides)


def region_of(view: torch.Tensor) -> Region:
    return Region(view.storage_offset(), tuple(view.shape), tuple(view.stride()))


def like(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A dense tensor without values, whose views tell where they lie."""
    return torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device="meta")


def mapping_of(links: Iterable[Link], tied: Mapping[str, str] | None = None) -> KeyMapping:
    ordered = sorted(links, key=lambda link: (link.entry.file, link.entry.offset))
    return KeyMapping(tuple(ordered), tied or {}, {}, (), (), (), (), ())


def plan_of(checkpoint: Checkpoint, model: Any, mapping: KeyMapping, **options: Any) -> tuple[Skeleton, LoadPlan]:
    skeleton = make_skeleton(Origin(model), checkpoint, options.get("dtype", "auto"))
    return skeleton, make_plan(checkpoint, skeleton, mapping, LoadRequest(**options))


def load(checkpoint: Checkpoint, model: Any, mapping: KeyMapping, **options: Any) -> tuple[Any, LoadPlan]:
    """What the loader does after the keys are matched."""
    skeleton, plan = plan_of(checkpoint, model, mapping, **options)
    seen: list[Progress] = []
    loader._execute(skeleton, plan, seen.append, lambda file: None)
    assert seen[-1].done == seen[-1].total == plan.bytes_read
    return skeleton.model, plan


# -- any view into any view


@st.composite
def turned(draw: st.DrawFn, shape: Sequence[int]) -> torch.Tensor:
    """A view of `shape` inside of a larger dense tensor without values, its dimensions in any order there."""
    order = draw(st.permutations(range(len(shape))))
    margins = [(draw(st.integers(0, 1)), draw(st.integers(0, 1)), draw(st.sampled_from([1, 1, 2]))) for _ in shape]
    sizes = [before + shape[i] * step + behind for i, (before, behind, step) in zip(order, margins, strict=True)]
    view = torch.empty(sizes, dtype=torch.uint8, device="meta")
    for dim, (i, (before, _, step)) in enumerate(zip(order, margins, strict=True)):
        view = view.narrow(dim, before, shape[i] * step)
        index = [slice(None)] * view.dim()
        index[dim] = slice(None, None, step)
        view = view[tuple(index)]
    return view.permute([list(order).index(i) for i in range(len(shape))])


@st.composite
def parts(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    kind = draw(st.sampled_from(["dense, strided", "strided, dense", "strided, strided", "dense, dense"]))
    plain = torch.empty(shape, device="meta")
    source = plain if kind.startswith("dense") else draw(turned(shape))
    return source, plain if kind.endswith(", dense") else draw(turned(shape))


def flat(view: torch.Tensor) -> int:
    """Elements of the tensor in which a view lies."""
    return view._base.numel() if view._base is not None else view.numel()


def strided(base: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
    return base.as_strided(view.shape, view.stride(), view.storage_offset())


DTYPES = ["float32", "bfloat16", "float64", "uint8", "complex64"]


def one_by_one(part: torch.Tensor, base: torch.Tensor) -> list[torch.Tensor]:
    """Regions for all of `base` that `part` leaves: an element each."""
    left = torch.ones(base.numel(), dtype=torch.bool)
    strided(left, part).fill_(False)
    numbers = left.nonzero().flatten().tolist()
    return [torch.empty(base.numel(), device="meta")[n : n + 1] for n in numbers]


@settings(max_examples=80, deadline=None)
@given(
    made=st.lists(parts(), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    final=st.sampled_from(["auto", "float32", "bfloat16"]),
    disk=st.sampled_from(["", "written", "at use"]),
    chunk=st.sampled_from([16, 100, 1024, 4 * MIB]),
    pad=st.integers(0, 3),
)
def test_any_part_of_a_file_goes_into_any_part_of_a_target(
    tmp_path_factory: pytest.TempPathFactory,
    made: list[tuple[torch.Tensor, torch.Tensor]],
    dtype: str,
    final: str,
    disk: str,
    chunk: int,
    pad: int,
) -> None:
    """Each target is fed by one view of the file, and by single numbers where the view leaves it empty."""
    folder = tmp_path_factory.mktemp("parts")
    size = max(flat(view) for pair in made for view in pair) + 1
    numbers = some(dtype, (size,), 5)
    # Names of odd lengths move the data to odd offsets.
    save_file({"x" * pad: torch.zeros(pad, dtype=torch.uint8), "y": numbers}, folder / "a.safetensors")
    checkpoint = inspect(folder / "a.safetensors")
    entry, links, wanted = checkpoint["y"], [], {}
    for number, (source, into) in enumerate(made):
        name = f"t{number}"
        target = numbers[: flat(into)].clone()
        strided(target, into).copy_(strided(numbers, source))
        view = torch.empty(size, dtype=numbers.dtype, device="meta").as_strided(
            source.shape, source.stride(), source.storage_offset()
        )
        region = whole(tuple(into.shape)) if into.is_contiguous() and not into.storage_offset() else region_of(into)
        links.append(Link(part_of(entry, view), name, region, whole=False))
        for one in one_by_one(into, target):
            place = torch.empty(size, dtype=numbers.dtype, device="meta")[one.storage_offset() :][:1]
            links.append(Link(part_of(entry, place), name, region_of(one), whole=False))
        cast = final != "auto" and numbers.is_floating_point()
        wanted[name] = target.to(getattr(torch, final)) if cast else target
    options: dict[str, Any] = {"dtype": final}
    if disk:
        options["device_map"] = {"": "cpu", "inner": "disk"}
    if disk == "written":
        options["offload_folder"] = folder / "off"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moves, "CHUNK", chunk)
        patch.setattr("lowmem.planner.views._LEAST_GAP", 64)
        # Buffers are not on disk: each is a parameter here.
        model = nn.Module()
        model.inner = nn.Module()
        for name, tensor in wanted.items():
            empty = torch.empty(tensor.shape, dtype=numbers.dtype, device="meta")
            floats = numbers.is_floating_point() or numbers.is_complex()
            model.inner.register_parameter(name, nn.Parameter(empty, requires_grad=floats))
        named = [replace(link, target=f"inner.{link.target}") for link in links]
        found = values_of(*load(checkpoint, model, mapping_of(named), **options))
    for name, tensor in wanted.items():
        assert same(found[f"inner.{name}"], tensor), name


def values_of(model: nn.Module, plan: LoadPlan) -> dict[str, torch.Tensor]:
    """What a forward would see of each placement."""
    lying = {name: p for p in plan.placements if p.residency == "refer" for name in p.names}
    mapped = MappedWeights({}, lying, plan)
    found = dict(model.state_dict())
    for placement in plan.placements:
        for name in placement.names:
            if placement.residency == "refer":
                found[name] = mapped[name]
            elif placement.residency == "write":
                assert plan.offload is not None
                file = plan.offload.find(placement.target)
                found[name] = _read(file, placement.target)
    return found


def _read(file: Path, key: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(file, "pt") as f:
        tensor: torch.Tensor = f.get_tensor(key)
        return tensor


def test_a_transposed_part_is_moved_in_chunks_and_not_by_elements(tmp_path: Path) -> None:
    """Rows of the one are columns of the other: a move is a chunk, and one strided copy."""
    weight = some("float32", (1024, 2048), 1)
    save_file({"w": weight}, tmp_path / "a.safetensors")
    checkpoint = inspect(tmp_path / "a.safetensors")
    entry, turned = checkpoint["w"], like(weight).t()
    as_region = Link(entry, "t", region_of(torch.empty(2048, 1024, device="meta").t()))
    as_source = Link(part_of(entry, turned), "t", whole((2048, 1024)), whole=False)
    for link in (as_region, as_source):
        model, plan = load(checkpoint, lambda: Bag({"t": weight.t()}), mapping_of([link]))
        assert same(model.t, weight.t().contiguous())
        assert len(list(plan.moves())) <= math.ceil(8 * MIB / plan.staging.each) + 2
        assert plan.bytes_read == 8 * MIB


# -- experts


def experts(count: int, inner: int, hidden: int, dtype: str = "bfloat16") -> dict[str, torch.Tensor]:
    """As they lie in files: a gate, an up and a down projection each."""
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    return {
        f"{expert}.{kind}": some(dtype, shape, 10 * expert + number)
        for expert in range(count)
        for number, (kind, shape) in enumerate(shapes.items())
    }


class Experts(nn.Module):
    """As transformers 5 has them: all gates and ups in one tensor, all downs in another."""

    def __init__(self, count: int, inner: int, hidden: int, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(count, 2 * inner, hidden, dtype=dtype))
        self.down = nn.Parameter(torch.empty(count, hidden, inner, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for gate_up, down in zip(self.gate_up, self.down, strict=True):
            gate, up = (x @ gate_up.t()).chunk(2, -1)
            x = x + torch.tanh(gate * up) @ down.t()
        return x


def fused_links(checkpoint: Checkpoint, count: int, inner: int, hidden: int, prefix: str = "") -> list[Link]:
    gate_up = torch.empty(count, 2 * inner, hidden, device="meta")
    down = torch.empty(count, hidden, inner, device="meta")
    views = {"gate": lambda n: gate_up[n, :inner], "up": lambda n: gate_up[n, inner:], "down": lambda n: down[n]}
    return [
        Link(checkpoint[f"{n}.{kind}"], prefix + ("down" if kind == "down" else "gate_up"), region_of(view(n)))
        for n in range(count)
        for kind, view in views.items()
    ]


def stacked(tensors: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    halves = [torch.cat([tensors[f"{n}.gate"], tensors[f"{n}.up"]]) for n in range(count)]
    return {"gate_up": torch.stack(halves), "down": torch.stack([tensors[f"{n}.down"] for n in range(count)])}


class Holder(nn.Module):
    """Experts in a module of its own, which can be on disk."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16, bias=False, dtype=torch.bfloat16)
        self.inner = Experts(4, 8, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.first(x))


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In two shards, with the parts of the experts in both."""
    folder = tmp_path_factory.mktemp("experts")
    tensors = {**experts(4, 8, 16), "first": some("bfloat16", (16, 16), 99)}
    names = sorted(tensors)
    for number, keys in enumerate((names[::2], names[1::2]), 1):
        save_file({key: tensors[key] for key in keys}, folder / f"model-{number:05d}-of-00002.safetensors")
    return folder


def links_of(checkpoint: Checkpoint) -> list[Link]:
    first = Link(checkpoint["first"], "first.weight", whole((16, 16)))
    return [first, *fused_links(checkpoint, 4, 8, 16, "inner.")]


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("where", ["cpu", "written", "at use"])
def test_experts_of_two_shards_become_one_tensor_wherever_it_is(
    held: Path, tmp_path: Path, where: str, dtype: str
) -> None:
    checkpoint = inspect(held)
    options: dict[str, Any] = {"dtype": dtype}
    if where != "cpu":
        options["device_map"] = {"": "cpu", "inner": "disk"}
    if where == "written":
        options["offload_folder"] = tmp_path / "off"
    model, plan = load(checkpoint, Holder, mapping_of(links_of(checkpoint)), **options)
    final = torch.bfloat16 if dtype == "auto" else torch.float32
    wanted = stacked({**experts(4, 8, 16)}, 4)
    found = values_of(model, plan)
    for name, tensor in wanted.items():
        assert same(found[f"inner.{name}"], tensor.to(final))
    reference = Holder().to(final)
    reference.load_state_dict(
        {"first.weight": some("bfloat16", (16, 16), 99), **{f"inner.{name}": t for name, t in wanted.items()}}
    )
    x = torch.randn(3, 16).to(final)
    with torch.no_grad():
        assert same(model(x), reference(x))
    placements = {p.target: p for p in plan.placements}
    assert len(placements) == len(plan.placements) == 3
    assert len(placements["inner.gate_up"].links) == 8
    assert placements["inner.down"].residency == {"cpu": "copy", "written": "write", "at use": "refer"}[where]
    at_use = [text for text in plan.warnings if "each is put together whenever it is used" in text]
    assert len(at_use) == (where == "at use")
    assert all("2 tensors on disk ('inner." in text and "offload_folder=" in text for text in at_use)
    assert not {"inner.down", "inner.gate_up"} & (offload_index(plan).keys() if where == "at use" else set())
    row = next(row for row in plan.to_dict()["tensors"] if row["name"] == "inner.down")
    assert sorted(row["keys"]) == [f"{n}.down" for n in range(4)]


def test_an_offload_folder_is_used_again_only_for_the_same_parts_in_the_same_places(held: Path, tmp_path: Path) -> None:
    checkpoint = inspect(held)
    options: dict[str, Any] = {"device_map": {"": "cpu", "inner": "disk"}, "offload_folder": tmp_path / "off"}
    links = links_of(checkpoint)
    load(checkpoint, Holder, mapping_of(links), **options)
    _, again = load(checkpoint, Holder, mapping_of(links), **options)
    assert again.offload is not None
    assert again.offload.reused
    assert again.bytes_read == 0
    swapped = [
        replace(link, region=replace(link.region, offset=link.region.offset ^ 128))
        if link.target == "inner.gate_up"
        else link
        for link in links
    ]
    model, other = load(checkpoint, Holder, mapping_of(swapped), **options)
    assert other.offload is not None
    assert not other.offload.reused
    wanted = stacked(experts(4, 8, 16), 4)["gate_up"]
    assert same(values_of(model, other)["inner.gate_up"], wanted.roll(8, 1))


def test_dense_parts_of_the_same_dtype_need_no_buffer_though_others_do(held: Path) -> None:
    checkpoint = inspect(held)
    links = links_of(checkpoint)
    _, plan = plan_of(checkpoint, Holder, mapping_of(links))
    assert not any(move.scratch for move in plan.moves())
    assert plan.staging.each == 0
    odd = links[1]
    turned = torch.empty(16, 8, device="meta").t()
    links[1] = replace(odd, region=replace(region_of(turned), offset=odd.region.offset))
    _, plan = plan_of(checkpoint, Holder, mapping_of(links))
    assert [move.placement.target for move in plan.moves() if move.scratch] == [odd.target]
    assert plan.staging.each > 0


def test_parts_of_several_dtypes_are_cast_each_for_itself(tmp_path: Path) -> None:
    tensors = {"0.down": some("float32", (6, 300), 1), "1.down": some("bfloat16", (6, 300), 2)}
    tensors |= {"2.down": some("float64", (6, 300), 3)}
    save_file(tensors, tmp_path / "a.safetensors")
    checkpoint = inspect(tmp_path / "a.safetensors")
    base = torch.empty(3, 6, 300, device="meta")
    links = [Link(checkpoint[f"{n}.down"], "t", region_of(base[n])) for n in range(3)]
    for staging in (None, MIB):
        empty = {"t": torch.empty(3, 6, 300)}
        model, plan = load(checkpoint, lambda e=empty: Bag(e), mapping_of(links), dtype="bfloat16", staging=staging)
        assert same(model.t, torch.stack([t.bfloat16() for t in tensors.values()]))
        assert {bool(m.scratch) for m in plan.moves() if m.dtype == "bfloat16"} == {False}


_MEASURE = """
from pathlib import Path
import test_fused as fused
import torch
from lowmem.checkpoint import inspect
from lowmem.memory import measure
count, inner, hidden = args["shape"]
with measure() as memory:
    checkpoint = inspect(Path(args["source"]))
    mapping = fused.mapping_of(fused.fused_links(checkpoint, count, inner, hidden))
    model, plan = fused.load(checkpoint, lambda: fused.Experts(count, inner, hidden), mapping, **args["options"])
result = {"measured": memory.peak, "predicted": plan.host.peak}
"""


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_the_predicted_peak_of_fused_tensors_is_the_measured_one(
    tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No list of experts beside the fused tensor."""
    count, inner, hidden = 16, 512, 1024
    save_file(experts(count, inner, hidden), tmp_path / "a.safetensors")
    monkeypatch.setattr("test_budget._MEASURE", _MEASURE)
    check_prediction({"dtype": dtype, "staging": MIB}, source=str(tmp_path), shape=[count, inner, hidden])


def test_each_part_is_looked_at_a_few_times_however_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = [0]

    def dense(self: Region) -> bool:
        looked[0] += 1
        return True

    monkeypatch.setattr(Region, "dense", property(dense))
    counts = []
    for count in (20, 200):
        tensors = {f"{n}": torch.full((4,), n, dtype=torch.bfloat16) for n in range(count)}
        save_file(tensors, tmp_path / "a.safetensors")
        checkpoint = inspect(tmp_path / "a.safetensors")
        links = [Link(checkpoint[f"{n}"], "t", Region(4 * n, (4,), (1,))) for n in range(count)]
        looked[0] = 0
        empty = torch.empty(count, 4, dtype=torch.bfloat16, device="meta")
        model, plan = load(checkpoint, lambda e=empty: Bag({"t": e}), mapping_of(links))
        assert len(list(plan.reads())) == 1
        assert same(model.t, torch.stack([tensors[f"{n}"] for n in range(count)]))
        counts.append(looked[0])
    assert counts[1] <= 11 * counts[0]


# -- one tensor for several targets


def qkv(tmp_path: Path) -> tuple[torch.Tensor, Checkpoint, dict[str, Link]]:
    fused = some("float32", (96, 32), 4)
    save_file({"qkv": fused}, tmp_path / "a.safetensors")
    checkpoint = inspect(tmp_path / "a.safetensors")
    base = like(fused)
    thirds = dict(zip("qkv", base.chunk(3), strict=True))
    links = {
        n: Link(part_of(checkpoint["qkv"], part), f"{n}.weight", whole((32, 32)), False) for n, part in thirds.items()
    }
    return fused, checkpoint, links


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


def test_plain_thirds_of_a_tensor_are_mapped_in_any_order(tmp_path: Path) -> None:
    fused, checkpoint, links = qkv(tmp_path)
    backwards = KeyMapping((links["v"], links["q"], links["k"]), {}, {}, (), (), (), (), ())
    model, plan = load(checkpoint, Three, backwards)
    assert {p.residency for p in plan.placements} == {"map"}
    assert not plan.warnings
    assert plan.bytes_read == 0
    for name, third in zip("qkv", fused.chunk(3), strict=True):
        assert same(getattr(model, name).weight, third)
        assert getattr(model, name).weight.untyped_storage().nbytes() == third.nbytes


def test_thirds_that_lie_over_each_other_have_memory_of_their_own(tmp_path: Path) -> None:
    fused, checkpoint, links = qkv(tmp_path)
    entry = checkpoint["qkv"]
    links["k"] = replace(links["k"], entry=part_of(entry, like(fused)[20:52]))
    model, plan = load(checkpoint, Three, mapping_of(links.values()))
    assert {p.target: p.residency for p in plan.placements} == {
        "q.weight": "map",
        "k.weight": "copy",
        "v.weight": "map",
    }
    assert any("share bytes" in text for text in plan.warnings)
    assert same(model.k.weight, fused[20:52])


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("folder", [False, True])
def test_thirds_on_disk_are_mapped_at_use_and_written_only_where_they_change(
    tmp_path: Path, dtype: str, folder: bool
) -> None:
    fused, checkpoint, links = qkv(tmp_path)
    options: dict[str, Any] = {"device_map": {"": "disk"}, "dtype": dtype}
    if folder:
        options["offload_folder"] = tmp_path / "off"
    model, plan = load(checkpoint, Three, mapping_of(links.values()), **options)
    expected = "write" if folder and dtype != "auto" else "refer"
    assert {p.residency for p in plan.placements} == {expected}
    final = torch.float32 if dtype == "auto" else torch.bfloat16
    x = torch.randn(2, 32).to(final)
    with torch.no_grad():
        wanted = torch.cat([x @ third.to(final).t() for third in fused.chunk(3)], -1)
        assert same(model(x), wanted)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_interleaved_columns_of_one_tensor_feed_two_targets(tmp_path: Path, dtype: str) -> None:
    fused = some("float32", (40, 70), 3)
    save_file({"both": fused}, tmp_path / "a.safetensors")
    checkpoint = inspect(tmp_path / "a.safetensors")
    base = like(fused)
    views = {"gate": base[:, ::2].t(), "up": base[:, 1::2].t()}
    links = [Link(part_of(checkpoint["both"], v), n, whole((35, 40)), False) for n, v in views.items()]
    bag = {name: torch.empty(35, 40) for name in views}
    model, plan = load(checkpoint, lambda: Bag(bag), mapping_of(links), dtype=dtype)
    final = torch.float32 if dtype == "auto" else torch.bfloat16
    assert same(model.gate, fused[:, ::2].t().to(final).contiguous())
    assert same(model.up, fused[:, 1::2].t().to(final).contiguous())
    assert plan.bytes_read == sum(move.nbytes for move in plan.moves())


@pytest.mark.parametrize("how", ["packed", "swapped"])
def test_parts_that_only_the_engine_can_read_are_not_left_on_disk(tmp_path: Path, how: str) -> None:
    _, checkpoint, links = qkv(tmp_path)
    odd: Any = {how: True}
    links["q"] = replace(links["q"], entry=replace(links["q"].entry, **odd))
    with pytest.raises(PlacementError, match=r"'qkv'.*offload_folder="):
        plan_of(checkpoint, Three, mapping_of(links.values()), device_map={"": "disk"})


def test_a_tie_of_a_fused_target_is_one_tensor(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8, bias=False), nn.Linear(6, 8, bias=False)
            self.b.weight = self.a.weight

    halves = {"x": some("float32", (4, 6), 1), "y": some("float32", (4, 6), 2)}
    save_file(halves, tmp_path / "a.safetensors")
    checkpoint = inspect(tmp_path / "a.safetensors")
    links = [Link(checkpoint[key], "a.weight", Region(24 * n, (4, 6), (6, 1))) for n, key in enumerate("xy")]
    model, plan = load(checkpoint, Twice, mapping_of(links, {"b.weight": "a.weight"}))
    assert model.a.weight is model.b.weight
    assert same(model.a.weight, torch.cat(list(halves.values())))
    assert plan.placements[0].names == ("a.weight", "b.weight")
