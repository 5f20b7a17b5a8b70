"""What is planned for int8, and what a load leaves when it fails: budgets, devices, files, borrowed models."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

import bitsandbytes as bnb
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_models import assert_bytes_as_planned, expected_of, int8_of, theirs_of
from safetensors.torch import load_file, save_file
from tiny_models import Saved, outputs_of, same
from torch import nn

import lowmem
from lowmem.planner.moves import CHUNK

pytestmark = [pytest.mark.usefixtures("one_thread", "quiet"), pytest.mark.filterwarnings("ignore")]


class Two(nn.Module):
    """Two layers and what is no layer."""

    def __init__(self, inner: int = 40, outer: int = 30) -> None:
        super().__init__()
        self.first = nn.Linear(inner, outer)
        self.second = nn.Linear(outer, inner)
        self.norm = nn.LayerNorm(inner)


def file_of(model: nn.Module, folder: Path) -> Path:
    save_file({name: t.detach().clone() for name, t in model.state_dict().items()}, folder / "model.safetensors")
    return folder / "model.safetensors"


def state_of(model: nn.Module) -> Any:
    """All that a caller could have taken hold of."""
    modules = [(name, id(module), module.training) for name, module in model.named_modules(remove_duplicate=False)]
    tables = [(list(m._parameters.items()), list(m._buffers.items())) for m in model.modules()]
    kept = [(name, id(t), t.requires_grad) for p, b in tables for name, t in (*p, *b) if t is not None]
    values = [t.detach().clone() for t in model.state_dict().values()]
    return modules, kept, values


def assert_unchanged(model: nn.Module, before: Any) -> None:
    after = state_of(model)
    assert after[:2] == before[:2]
    assert all(same(a, b) for a, b in zip(after[2], before[2], strict=True))


# ---- borrowed models ----


def test_a_plan_leaves_a_model_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(1)
    file = file_of(Two(), tmp_path)
    model = Two()
    before = state_of(model)
    plan = lowmem.plan(file, model=model, quantize="int8")
    assert_unchanged(model, before)
    assert plan.devices["cpu"].weights == 2 * 1200 + 4 * (30 + 40) + 4 * (30 + 40 + 80)
    for options in ({}, {"quantize": "int8"}):
        lowmem.diff(file, model=model)
        assert_unchanged(model, before)
        assert lowmem.plan(file, model=model, **options).to_dict()


@pytest.mark.parametrize(
    "how", ["missing", "not finite", "budget", "progress", "changed", "shape", "placement", "interrupt"]
)
def test_a_failed_load_leaves_a_model_as_it_was(tmp_path: Path, how: str) -> None:
    torch.manual_seed(1)
    source = Two()
    options: dict[str, Any] = {}
    error: Any = lowmem.LowmemError
    if how == "not finite":
        source.second.weight.data[3, 3] = float("nan")
    file = file_of(source, tmp_path)
    if how == "missing":
        save_file({k: t for k, t in load_file(file).items() if k != "second.bias"}, file)
    elif how == "shape":
        save_file({**load_file(file), "second.weight": torch.ones(3, 3)}, file)
    elif how == "budget":
        options["ram"] = "64KiB"
    elif how == "placement":
        options["device_map"] = {"first": "cpu", "second": "disk", "norm": "cpu"}
    elif how in ("progress", "interrupt"):
        error = ZeroDivisionError if how == "progress" else KeyboardInterrupt

        def progress(_: lowmem.Progress) -> None:
            raise error

        options["progress"] = progress
    elif how == "changed":

        def progress(_: lowmem.Progress) -> None:
            file.write_bytes(file.read_bytes()[:-1] + b"x")
            raise lowmem.CheckpointError("changed")

        options["progress"] = progress
    model = Two().train()
    before = state_of(model)
    with pytest.raises(error):
        lowmem.load(file, model=model, quantize="int8", **options)
    assert_unchanged(model, before)


def test_a_borrowed_model_gets_new_layers(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = Two()
    model = Two()
    inner, norm = model.first, model.norm
    result = lowmem.load(file_of(source, tmp_path), model=model, quantize="int8")
    assert result.model is model
    assert model.norm is norm
    assert model.first is not inner
    assert same(model.first.weight.data, expected_of(source.first.weight.data)[0])
    assert same(model.first.bias.data, source.first.bias.data)
    assert_bytes_as_planned(result)


# ---- budgets ----


def test_too_little_memory_is_refused_with_remedies(saved: Saved, tmp_path: Path) -> None:
    folder = saved("llama", "bfloat16", "1GB")
    with pytest.raises(lowmem.BudgetError) as caught:
        lowmem.load(folder, quantize="int8", ram="64KiB")
    text = str(caught.value)
    assert "raise ram" in text
    assert "dtype='auto'" not in text
    assert "--dequantize" not in text
    needed = caught.value.required
    assert lowmem.load(folder, quantize="int8", ram=needed).report.to_dict()
    with pytest.raises(lowmem.BudgetError):
        lowmem.load(folder, quantize="int8", ram=needed - 1)
    theirs_of(folder, dtype="auto").save_pretrained(tmp_path)
    with pytest.raises(lowmem.BudgetError, match=r"leave int8 as it is \(without dequantize, --dequantize: "):
        lowmem.load(tmp_path, dequantize=True, ram="64KiB")


def test_one_row_is_what_a_reader_needs(tmp_path: Path) -> None:
    """A row larger than a reader's share of the staging: fewer readers, and a refusal where not even one has room."""
    weight = torch.randn(9, CHUNK // 4, generator=torch.Generator().manual_seed(1))
    model = nn.Module()
    model.layer = nn.Linear(CHUNK // 4, 9, bias=False, device="meta")
    save_file({"layer.weight": weight}, tmp_path / "model.safetensors")
    with pytest.raises(lowmem.BudgetError, match=r"staging allows 1\.00 MiB, and a row of int8 needs") as caught:
        lowmem.plan(tmp_path / "model.safetensors", model=model, quantize="int8", staging="1MiB")
    least = caught.value.required
    plan = lowmem.plan(tmp_path / "model.safetensors", model=model, quantize="int8", staging=least)
    assert plan.staging.workers == 1
    assert plan.staging.each >= CHUNK
    assert plan.staging.total <= least
    assert plan.host.peak >= plan.host.resident + plan.staging.total


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 3000),
    columns=st.integers(1, 70_000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    staging=st.sampled_from(["1MiB", "3MiB", "64MiB"]),
    turned=st.booleans(),
)
def test_moves_are_whole_rows_and_fit_the_buffer(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, dtype: torch.dtype, staging: str, turned: bool
) -> None:
    """Every element once, no move larger than a chunk or than the buffer."""
    rows = min(rows, max(1, 2_000_000 // columns))
    folder = tmp_path_factory.mktemp("plan")
    weight = torch.zeros(columns, rows, dtype=dtype).t() if turned else torch.zeros(rows, columns, dtype=dtype)
    torch.save({"layer.weight": weight}, folder / "model.bin")
    model = nn.Module()
    model.layer = nn.Linear(columns, rows, bias=False, device="meta")
    plan = lowmem.plan(folder / "model.bin", model=model, quantize="int8", staging=staging)
    (folder / "model.bin").unlink()
    placement = next(p for p in plan.placements if p.target == "layer.weight")
    assert placement.scales is not None
    moves = list(plan.moves())
    assert sum(move.region.count for move in moves) == rows * columns
    seen = torch.zeros(rows * columns, dtype=torch.uint8)
    for move in moves:
        assert move.row == columns
        assert move.nbytes <= CHUNK
        assert move.scratch <= plan.staging.each
        seen.as_strided(move.region.shape, move.region.strides, move.region.offset).add_(1)
        if not placement.is_measured:
            assert move.region.offset % columns == 0
            assert move.region.count % columns == 0
    assert bool((seen == 1).all())
    before = sum(move.region.count for move in plan.scales_plan().moves())
    assert before == (rows * columns if placement.is_measured else 0)
    assert plan.bytes_read == weight.nbytes * (2 if placement.is_measured else 1)


# ---- devices ----


def test_auto_places_by_the_sizes_of_int8(saved: Saved, tmp_path: Path) -> None:
    folder = saved("llama", "float32")
    options: dict[str, Any] = {"device_map": "auto", "offload_folder": tmp_path / "off"}
    floats = lowmem.plan(folder, max_memory={"cpu": 90_000}, **options)
    plan = lowmem.plan(folder, max_memory={"cpu": 90_000}, quantize="int8", **options)
    everything = lowmem.plan(folder, quantize="int8")
    size = everything.devices["cpu"].weights
    assert sum(device.weights for device in plan.devices.values()) == size
    assert plan.devices["cpu"].weights <= 90_000
    on_disk = [sum(p.device == "disk" for p in one.placements) for one in (floats, plan)]
    assert on_disk[1] < on_disk[0]
    all_here = lowmem.plan(folder, max_memory={"cpu": 2 * size}, quantize="int8", **options)
    assert set(all_here.devices) == {"cpu"}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("how", ["quantise", "dequantise", "int8", "int8 to folder"])
def test_layers_on_disk(saved: Saved, tmp_path: Path, kind: str, how: str) -> None:
    folder = saved(kind, "bfloat16")
    layer = {"llama": "model.layers.1", "gpt2": "transformer.h.1"}[kind]
    table = {"": "cpu", layer: "disk"}
    if how != "quantise":
        theirs_of(folder, dtype="auto").save_pretrained(tmp_path / "int8")
        folder = tmp_path / "int8"
    options: dict[str, Any] = {"quantise": {"quantize": "int8"}, "dequantise": {"dequantize": True}}.get(how, {})
    here = lowmem.load(folder, **options).model
    expected = {**dict(here.state_dict())}
    options["device_map"] = table
    if how == "quantise":
        text = rf"'{re.escape(layer)}\..*it becomes int8 while loading.*offload_folder"
        with pytest.raises(lowmem.PlacementError, match=text):
            lowmem.load(folder, **options)
    if how == "dequantise":
        # Whenever it is used.
        assert same(outputs_of(lowmem.load(folder, **options).model), outputs_of(here))
    if how != "int8":
        options["offload_folder"] = tmp_path / "off"
    result = lowmem.load(folder, **options)
    planned = sum(device.weights for device in result.plan.devices.values())
    sizes = {id(t): t.nbytes for k, t in here.state_dict(keep_vars=True).items() if t.dtype != torch.uint8}
    assert planned == sum(sizes.values())
    if how in ("int8", "int8 to folder"):
        assert result.plan.bytes_written == 0
        return
    assert result.plan.bytes_written > 0
    files = list((tmp_path / "off").rglob("*.safetensors"))
    written = {key: t for file in files for key, t in load_file(file).items()}
    assert any(key.startswith(layer) for key in written)
    if how == "quantise":
        assert any(t.dtype == torch.int8 for t in written.values())
        assert any(key.endswith("SCB") for key in written)
    for key, tensor in written.items():
        assert same(tensor, expected[key]), key
    times = [file.stat().st_mtime_ns for file in files]
    again = lowmem.load(folder, **options)
    assert again.plan.offload is not None
    assert again.plan.offload.reused
    assert again.plan.bytes_written == 0
    assert [file.stat().st_mtime_ns for file in files] == times


# ---- ties, shared modules, models that are layers, what is missing ----


def test_a_module_at_two_places(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 8)
            self.b = self.a

    weight = torch.randn(8, 6)
    values, scales = expected_of(weight)
    floats = {f"{at}.{leaf}": t.clone() for at in "ab" for leaf, t in (("weight", weight), ("bias", torch.ones(8)))}
    int8 = {f"{at}.{leaf}": t.clone() for at in "ab" for leaf, t in (("weight", values), ("SCB", scales))}
    int8.update({key: floats[key] for key in ("a.bias", "b.bias")})
    for state, options in ((floats, {"quantize": "int8"}), (int8, {})):
        for part in (
            state,
            {k: t for k, t in state.items() if k[0] == "a"},
            {k: t for k, t in state.items() if k[0] == "b"},
        ):
            save_file(part, tmp_path / "model.safetensors")
            result = lowmem.load(tmp_path / "model.safetensors", model=Twice, **options)
            model: Any = result.model
            assert model.a is model.b
            assert isinstance(model.a, bnb.nn.Linear8bitLt)
            assert same(model.a.weight.data, values)
            assert same(model.a.weight.SCB, scales)
            assert result.plan.devices["cpu"].weights == 48 + 32 + 32


def test_layers_that_share_a_weight_stay_floats(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8)
            self.b.weight = self.a.weight

    torch.manual_seed(1)
    source = Tied()
    model: Any = lowmem.load(file_of(source, tmp_path), model=Tied, quantize="int8").model
    assert model.a.weight is model.b.weight
    assert same(model.a.weight.data, source.a.weight.data)
    assert list(int8_of(model)) == ["c"]


def test_layers_that_share_a_weight_and_are_int8_in_the_checkpoint(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8, bias=False), nn.Linear(6, 8, bias=False)
            self.b.weight = self.a.weight

    values, scales = expected_of(torch.randn(8, 6))
    both = {f"{at}.{leaf}": t.clone() for at in "ab" for leaf, t in (("weight", values), ("SCB", scales))}
    save_file(both, tmp_path / "model.safetensors")
    model: Any = lowmem.load(tmp_path / "model.safetensors", model=Tied).model
    for layer in (model.a, model.b):
        assert same(layer.weight.data, values)
        assert same(layer.weight.SCB, scales)
    floats: Any = lowmem.load(tmp_path / "model.safetensors", model=Tied, dequantize=True).model
    assert floats.a.weight is floats.b.weight
    assert same(floats.a.weight.data, bnb.functional.int8_vectorwise_dequant(values, scales))


def test_a_model_that_is_a_layer(tmp_path: Path) -> None:
    values, scales = expected_of(torch.randn(8, 6))
    save_file({"weight": torch.randn(8, 6)}, tmp_path / "floats.safetensors")
    save_file({"weight": values, "SCB": scales}, tmp_path / "int8.safetensors")
    for file, options in (("floats", {"quantize": "int8"}), ("int8", {})):
        with pytest.raises(lowmem.ModelError, match=r"the model itself is a Linear.*nn\.Sequential"):
            lowmem.load(tmp_path / f"{file}.safetensors", model=lambda: nn.Linear(6, 8, bias=False), **options)
    floats: Any = lowmem.load(
        tmp_path / "int8.safetensors", model=lambda: nn.Linear(6, 8, bias=False), dequantize=True
    ).model
    assert same(floats.weight.data, bnb.functional.int8_vectorwise_dequant(values, scales))


@pytest.mark.parametrize("how", ["missing", "shape"])
def test_layers_that_the_checkpoint_does_not_have_stay_floats(saved: Saved, tmp_path: Path, how: str) -> None:
    folder = saved("llama", "bfloat16", "1GB")
    state = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    state.pop(name)
    options: dict[str, Any] = {"strict": False}
    if how == "shape":
        state[name] = torch.ones(3, 32, dtype=torch.bfloat16)
        options = {"ignore_mismatched_sizes": True}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    result = lowmem.load(tmp_path, quantize="int8", **options)
    model: Any = result.model
    layer = model.model.layers[1].mlp.up_proj
    assert type(layer) is nn.Linear
    assert layer.weight.dtype == torch.bfloat16
    assert 0 < layer.weight.float().std() < 0.1
    assert "model.layers.0.mlp.up_proj" in int8_of(model)
    assert_bytes_as_planned(result)
    assert outputs_of(model).isfinite().all()
    assert not any("model.layers.1.mlp.up_proj.SCB" in str(p.target) for p in result.plan.placements)


def test_a_plan_and_a_report_in_words(saved: Saved, tmp_path: Path) -> None:
    result = lowmem.load(saved("gpt2", "bfloat16"), quantize="int8")
    table = json.loads(json.dumps(result.plan.to_dict()))
    rows = {row["name"]: row for row in table["tensors"]}
    weight = rows["transformer.h.0.attn.c_attn.weight"]
    assert (weight["from"], weight["dtype"], weight["bytes"]) == ("bfloat16", "int8", 96 * 32)
    scales = rows["transformer.h.0.attn.c_attn.SCB"]
    assert (scales["dtype"], scales["shape"], scales["bytes"]) == ("float32", [96], 384)
    assert sum(row["bytes"] for row in table["tensors"]) == table["devices"]["cpu"]["weights"]
    assert table["missing"] == []
    assert result.report.to_dict()
    assert lowmem.plan(saved("gpt2", "bfloat16"), quantize="int8").to_dict()["tensors"] == table["tensors"]


@pytest.mark.parametrize(("rows", "columns"), [(0, 6), (6, 0), (1, 1)])
def test_layers_without_elements(tmp_path: Path, rows: int, columns: int) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(columns, rows, bias=False)
            self.norm = nn.LayerNorm(4)

    file = file_of(Odd(), tmp_path)
    model: Any = lowmem.load(file, model=Odd, quantize="int8").model
    assert model.layer.weight.shape == (rows, columns)
    assert not model.layer.weight.is_meta
    if isinstance(model.layer, bnb.nn.Linear8bitLt):
        assert model.layer.weight.SCB.shape == (rows,)
        assert not model.layer.weight.SCB.is_meta
