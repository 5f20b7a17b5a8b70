"""Checkpoints that are int8 already: paired wherever weights and scales lie, refused by name where they do not fit."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

import bitsandbytes as bnb
from int8_models import (
    Holder,
    assert_bytes_as_planned,
    assert_same_int8,
    expected_of,
    int8_of,
    theirs_of,
    write_shards,
)
from safetensors.torch import load_file, save_file
from tiny_models import Saved, change_config, every_tensor, outputs_of, same
from torch import nn

import lowmem
from lowmem.int8 import Int8Linear

pytestmark = [pytest.mark.usefixtures("one_thread", "quiet"), pytest.mark.filterwarnings("ignore")]

KINDS = ("llama", "llama-tied", "gpt2", "bert-mlm", "t5", "qwen3-moe", "vit")


@pytest.fixture(scope="session")
def eight(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`eight("llama", "bfloat16")`: a folder of int8 that transformers wrote. Read it, do not change it."""
    made: dict[tuple[str, str], Path] = {}

    def save(kind: str, dtype: str = "bfloat16") -> Path:
        if (kind, dtype) not in made:
            folder = tmp_path_factory.mktemp(f"{kind}-int8")
            theirs_of(saved(kind, dtype), dtype="auto").save_pretrained(folder)
            made[kind, dtype] = folder
        return made[kind, dtype]

    return save


@pytest.fixture
def mine(eight: Callable[..., Path], tmp_path: Path) -> Path:
    """A llama of int8 in one file that the test may change."""
    shutil.copytree(eight("llama"), tmp_path / "int8")
    return tmp_path / "int8"


def change(folder: Path, **changes: torch.Tensor | None) -> None:
    """Tensors of `model.safetensors` put in, or taken out by None; `__` in names stands for a dot."""
    file = folder / "model.safetensors"
    state = load_file(file)
    for name, tensor in changes.items():
        key = name.replace("__", ".")
        state.pop(key, None)
        if tensor is not None:
            state[key] = tensor
    save_file(state, file, {"format": "pt"})


@pytest.mark.parametrize("kind", KINDS)
def test_int8_of_transformers_is_loaded_as_by_transformers(eight: Callable[..., Path], kind: str) -> None:
    folder = eight(kind)
    ours = lowmem.load(folder)
    assert_bytes_as_planned(ours)
    assert not ours.plan.mapping.unexpected
    assert not ours.plan.mapping.missing
    assert_same_int8(ours.model, theirs_of(folder, quantise=False), ignore=())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_dtype_acts_on_the_rest(eight: Callable[..., Path], kind: str, dtype: str) -> None:
    folder = eight(kind)
    theirs = theirs_of(folder, quantise=False, dtype=getattr(torch, dtype))
    ours = lowmem.load(folder, dtype=dtype, keep_fp32=["q_proj", "c_attn", "SelfAttention.q"])
    kept = [name for name, _ in ours.model.named_parameters() if re.search("q_proj|c_attn|SelfAttention.q", name)]
    assert {t.dtype for name, t in ours.model.named_parameters() if name in kept and "weight" in name} == {torch.int8}
    for name, (weight, scales) in int8_of(theirs).items():
        assert same(int8_of(ours.model)[name][0], weight)
        assert same(int8_of(ours.model)[name][1], scales)
    # transformers leaves the rest of such a checkpoint as it is, whatever dtype is given.
    for name, tensor in theirs.named_parameters():
        if tensor.is_floating_point():
            final = torch.float32 if name in kept else getattr(torch, dtype)
            final = torch.float32 if "wo.weight" in name else final
            assert same(ours.model.get_parameter(name).data, tensor.data.to(final)), name


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [2, 5])
def test_weights_and_scales_in_different_shards(
    eight: Callable[..., Path], tmp_path: Path, shards: int, ending: str
) -> None:
    state = load_file(eight("llama") / "model.safetensors")
    for name in ("config.json", "generation_config.json"):
        shutil.copy(eight("llama") / name, tmp_path)
    # All weights first: no weight is beside its scales.
    order = sorted(state, key=lambda key: (key.endswith("SCB"), key))
    write_shards({key: state[key].clone() for key in order}, tmp_path, shards, ending)
    table = json.loads(next(tmp_path.glob("*.index.json")).read_text())["weight_map"]
    apart = [key for key in table if key.endswith("SCB") and table[key] != table[key[:-3] + "weight"]]
    assert apart
    theirs = theirs_of(eight("llama"), quantise=False)
    assert_same_int8(lowmem.load(tmp_path).model, theirs, ignore=("name_or_path",))
    floats = lowmem.load(tmp_path, dequantize=True).model
    other = lowmem.load(eight("llama"), dequantize=True).model
    for name, tensor in every_tensor(other).items():
        assert same(every_tensor(floats)[name], tensor)


def test_int8_is_file_pages_or_a_copy(eight: Callable[..., Path]) -> None:
    folder = eight("llama")
    mapped = lowmem.load(folder)
    pages = mapping_addresses(folder / "model.safetensors")
    for name, (weight, scales) in int8_of(mapped.model).items():
        for tensor in (weight, scales):
            assert any(begin <= tensor.data_ptr() < end for begin, end in pages), name
    size = sum(t.nbytes for t in mapped.model.state_dict().values() if t.dtype != torch.uint8)
    assert mapped.plan.host.mapped == size
    assert mapped.plan.bytes_read == 0
    copied = lowmem.load(folder, residency="copy")
    pages = mapping_addresses(folder / "model.safetensors")
    for weight, scales in int8_of(copied.model).values():
        assert not any(begin <= t.data_ptr() < end for t in (weight, scales) for begin, end in pages)
    assert copied.plan.host.mapped == 0
    assert copied.plan.bytes_read == size
    assert_same_int8(copied.model, mapped.model, ignore=())


def mapping_addresses(file: Path) -> list[tuple[int, int]]:
    """Where this process has pages of a file."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(file)):
            begin, end = line.split()[0].split("-")
            found.append((int(begin, 16), int(end, 16)))
    return found


def test_without_a_word_in_the_config(mine: Path) -> None:
    """The keys say so."""
    theirs = theirs_of(mine, quantise=False)
    change_config(mine, quantization_config=None)
    ours = lowmem.load(mine).model
    assert ours.is_loaded_in_8bit
    assert ours.config.quantization_config.load_in_8bit
    assert_same_int8(ours, theirs, ignore=("quantization_config",))


def test_what_lowmem_made_int8_is_saved_and_loaded_as_any(saved: Saved, tmp_path: Path) -> None:
    for kind in ("llama-tied", "gpt2"):
        model = lowmem.load(saved(kind, "bfloat16"), quantize="int8").model
        model.save_pretrained(tmp_path / kind)
        theirs = theirs_of(tmp_path / kind, quantise=False)
        assert_same_int8(lowmem.load(tmp_path / kind).model, theirs, ignore=())
        assert same(outputs_of(model), outputs_of(theirs))


# ---- scales and formats that do not fit ----

LAYER = "model__layers__1__mlp__up_proj__"
KEY = re.escape("model.layers.1.mlp.up_proj.")


@pytest.mark.parametrize("options", [{}, {"dequantize": True}, {"quantize": "int8"}], ids=str)
def test_scales_that_do_not_fit_are_refused_by_name(mine: Path, options: dict[str, Any]) -> None:
    good = load_file(mine / "model.safetensors")["model.layers.1.mlp.up_proj.SCB"]
    file = re.escape(str(mine / "model.safetensors"))
    change(mine, **{LAYER + "SCB": None})
    with pytest.raises(lowmem.LowmemError, match=rf"{file}.*'{KEY}weight'.*'{KEY}SCB'.*bring all shards"):
        lowmem.load(mine, **options)
    for bad in (good[:-1], good.view(-1, 1), good.to(torch.int32), torch.ones(())):
        change(mine, **{LAYER + "SCB": bad.clone()})
        with pytest.raises(
            lowmem.CheckpointError, match=rf"{file}: tensor '{KEY}SCB'.*expected float32.*found.*download"
        ):
            lowmem.load(mine, **options)


def test_scales_in_fp16_are_cast(mine: Path) -> None:
    good = load_file(mine / "model.safetensors")["model.layers.1.mlp.up_proj.SCB"]
    change(mine, **{LAYER + "SCB": good.half()})
    result = lowmem.load(mine)
    assert_bytes_as_planned(result)
    assert same(int8_of(result.model)["model.layers.1.mlp.up_proj"][1], good.half().float())
    floats = lowmem.load(mine, dequantize=True).model.model.layers[1].mlp.up_proj.weight
    weight = int8_of(result.model)["model.layers.1.mlp.up_proj"][0]
    assert same(floats, bnb.functional.int8_vectorwise_dequant(weight, good.half().float()).bfloat16())


def test_scales_beside_floats(mine: Path) -> None:
    floats = torch.randn(48, 32, dtype=torch.bfloat16)
    change(mine, **{LAYER + "weight": floats, LAYER + "weight_format": None})
    text = rf"tensor '{KEY}weight' is bfloat16, and '{KEY}SCB' beside it.*skip=\['{KEY}SCB'\]"
    for options in ({}, {"dequantize": True}, {"quantize": "int8"}):
        with pytest.raises(lowmem.CheckpointError, match=text):
            lowmem.load(mine, **options)
    skip = ["model.layers.1.mlp.up_proj.SCB"]
    layer = lowmem.load(mine, skip=skip).model.model.layers[1].mlp.up_proj
    assert same(layer.weight, floats)
    assert "model.layers.1.mlp.up_proj" in int8_of(lowmem.load(mine, skip=skip, quantize="int8").model)


@pytest.mark.parametrize("options", [{}, {"dequantize": True}], ids=str)
def test_the_order_of_the_elements(mine: Path, options: dict[str, Any]) -> None:
    text = rf"tensor '{KEY}weight_format'.*of '{KEY}weight': expected 0 \(row\), found {{}}.*; save the model anew"
    for number, name in ((1, r"1 \(col32\)"), (2, r"2 \(col_turing\)"), (3, r"3 \(col_ampere\)"), (77, "77")):
        change(mine, **{LAYER + "weight_format": torch.tensor(number, dtype=torch.uint8)})
        with pytest.raises(lowmem.UnsupportedError, match=text.format(name)):
            lowmem.load(mine, **options)
    for odd in (torch.zeros(2, dtype=torch.uint8), torch.tensor(0.0)):
        change(mine, **{LAYER + "weight_format": odd})
        with pytest.raises(lowmem.UnsupportedError, match=text.format("(uint8|float32) of shape")):
            lowmem.load(mine, **options)
    for fine in (torch.zeros(1, dtype=torch.uint8), None):
        change(mine, **{LAYER + "weight_format": fine})
        assert not lowmem.load(mine, **options).plan.mapping.unexpected


def test_scales_of_layers_that_the_model_does_not_have(mine: Path) -> None:
    extra = {"other__layer__weight": torch.ones(3, 4, dtype=torch.int8), "other__layer__SCB": torch.ones(3)}
    change(mine, **extra)
    assert set(lowmem.load(mine).plan.mapping.unexpected) == {"other.layer.weight", "other.layer.SCB"}


def test_int8_that_feeds_no_linear_layer(mine: Path) -> None:
    values, scales = torch.full((96, 32), 5, dtype=torch.int8), torch.arange(96.0)
    change(mine, model__embed_tokens__weight=values, model__embed_tokens__SCB=scales)
    with pytest.raises(
        lowmem.UnsupportedError, match=r"'model\.embed_tokens\.weight'.*no linear layer.*dequantize=True"
    ):
        lowmem.load(mine)
    floats = lowmem.load(mine, dequantize=True).model.model.embed_tokens.weight
    assert same(floats, bnb.functional.int8_vectorwise_dequant(values, scales).bfloat16())


# ---- rules for keys ----


def test_weights_without_their_scales_by_only_and_skip(mine: Path) -> None:
    with pytest.raises(lowmem.CheckpointError, match=r"row scales of .*leave it out; take it too"):
        lowmem.load(mine, skip=["*.SCB"])
    with pytest.raises(lowmem.CheckpointError, match=r"leave it out; take it too"):
        lowmem.load(mine, only=lambda key: not key.endswith("SCB"))


def test_scales_without_their_weight(mine: Path) -> None:
    """The layer stays what the model's own rule makes of it."""
    name = "model.layers.1.mlp.up_proj"
    result = lowmem.load(mine, skip=[f"{name}.weight"])
    layer = result.model.get_submodule(name)
    assert layer.weight.is_floating_point()
    assert layer.weight.isfinite().all()
    assert len(int8_of(result.model)) == len(int8_of(lowmem.load(mine).model)) - 1
    outputs_of(result.model)


def test_a_whole_layer_that_is_skipped(mine: Path) -> None:
    name = "model.layers.1.mlp.up_proj"
    for options in ({"skip": [name]}, {"skip": [f"{name}.*"]}):
        result = lowmem.load(mine, **options)
        assert result.model.get_submodule(name).weight.is_floating_point()
        assert name not in int8_of(result.model)
        assert not result.plan.mapping.unexpected


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 8)


def small_state(prefix: str = "") -> dict[str, torch.Tensor]:
    values, scales = expected_of(torch.randn(8, 6, generator=torch.Generator().manual_seed(2)))
    return {
        f"{prefix}layer.weight": values,
        f"{prefix}layer.SCB": scales,
        f"{prefix}layer.weight_format": torch.tensor(0, dtype=torch.uint8),
        f"{prefix}layer.bias": torch.arange(8.0),
    }


def assert_small(model: Any) -> None:
    state = small_state()
    layer = model.layer
    assert same(layer.weight.data, state["layer.weight"])
    assert same(layer.weight.SCB, state["layer.SCB"])
    assert same(layer.bias.data, state["layer.bias"])
    assert isinstance(layer, bnb.nn.Linear8bitLt)
    assert not layer.weight.requires_grad


@pytest.mark.parametrize("options", [{"prefix": "a.b"}, {"rename": {r"^a\.b\.": ""}}, {}], ids=str)
def test_plain_modules_and_keys_that_are_renamed(tmp_path: Path, options: dict[str, Any]) -> None:
    file = tmp_path / "model.safetensors"
    save_file(small_state("a.b."), file)
    for model in (Inner, Inner()):
        result = lowmem.load(file, model=model, **options)
        assert_bytes_as_planned(result)
        assert not result.plan.mapping.unexpected
        assert_small(result.model)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_of_a_state_dict_of_bitsandbytes(tmp_path: Path, legacy: bool) -> None:
    theirs = nn.Module()
    theirs.layer = bnb.nn.Linear8bitLt(6, 8, has_fp16_weights=False)
    state = small_state()
    theirs.layer.weight = bnb.nn.Int8Params(
        state["layer.weight"], requires_grad=False, CB=state["layer.weight"], SCB=state["layer.SCB"]
    )
    theirs.layer.bias.data = state["layer.bias"]
    written = theirs.state_dict()
    assert set(written) == set(state)
    torch.save(written, tmp_path / "model.bin", _use_new_zipfile_serialization=not legacy)
    result = lowmem.load(tmp_path / "model.bin", model=Inner)
    assert not result.plan.mapping.unexpected
    assert_small(result.model)


@pytest.mark.parametrize("place", ["cpu", "meta"])
@pytest.mark.parametrize("floats", [False, True])
def test_a_model_with_layers_of_bitsandbytes_already(tmp_path: Path, place: str, floats: bool) -> None:
    file = tmp_path / "model.safetensors"
    source = torch.randn(8, 6, generator=torch.Generator().manual_seed(2))
    save_file({"layer.weight": source, "layer.bias": torch.arange(8.0)} if floats else small_state(), file)
    model = Inner()
    with torch.device(place):
        model.layer = bnb.nn.Linear8bitLt(6, 8, has_fp16_weights=False, threshold=3.5)
    layer = model.layer
    result = lowmem.load(file, model=model)
    assert result.model is model
    assert model.layer is layer
    assert layer.state.threshold == 3.5
    assert_small(model)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(4))
    expected = x @ bnb.functional.int8_vectorwise_dequant(small_state()["layer.weight"], small_state()["layer.SCB"]).T
    assert torch.allclose(model.layer(x), expected + torch.arange(8.0), atol=0.1)


def test_a_layer_of_bitsandbytes_is_back_after_a_failure(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({**small_state(), "layer.SCB": torch.ones(7)}, file)
    model = Inner()
    model.layer = bnb.nn.Linear8bitLt(6, 8, has_fp16_weights=False)
    layer, weight = model.layer, model.layer.weight
    with pytest.raises(lowmem.CheckpointError, match="row scales"):
        lowmem.load(file, model=model)
    assert model.layer is layer
    assert layer.weight is weight


# ---- floats again ----


@pytest.mark.parametrize("dtype", ["auto", "float32", "float16"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert-mlm"])
def test_int8_becomes_floats(eight: Callable[..., Path], kind: str, dtype: str) -> None:
    folder = eight(kind)
    stored = {key: t for file in folder.glob("*.safetensors") for key, t in load_file(file).items()}
    result = lowmem.load(folder, dequantize=True, dtype=dtype)
    assert_bytes_as_planned(result)
    model = result.model
    assert not int8_of(model)
    assert not any(isinstance(module, Int8Linear) for module in model.modules())
    assert not hasattr(model.config, "quantization_config")
    final = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    layers = [key.removesuffix(".SCB") for key in stored if key.endswith(".SCB")]
    for name in layers:
        values = bnb.functional.int8_vectorwise_dequant(stored[f"{name}.weight"], stored[f"{name}.SCB"]).to(final)
        found = model.get_parameter(f"{name}.weight")
        wanted = values.t() if type(model.get_submodule(name)).__name__ == "Conv1D" else values
        assert same(found.data, wanted)
        assert found.is_contiguous()
        assert found.requires_grad
    outputs_of(model)


def test_floats_of_int8_are_saved_as_floats(eight: Callable[..., Path], tmp_path: Path) -> None:
    model = lowmem.load(eight("gpt2"), dequantize=True).model
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    theirs = theirs_of(tmp_path, quantise=False, dtype="auto")
    assert same(outputs_of(model), outputs_of(theirs))
    again = lowmem.load(tmp_path).model
    for name, tensor in every_tensor(theirs).items():
        assert same(every_tensor(again)[name], tensor)


# ---- a module of lowmem's own ----


def test_without_bitsandbytes(saved: Saved, eight: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = theirs_of(saved("gpt2", "bfloat16"), dtype="auto")
    expected, logits = int8_of(theirs), None
    expected = {name: (w.clone(), s.clone()) for name, (w, s) in expected.items()}
    logits = outputs_of(theirs)
    monkeypatch.setattr("lowmem.modeling.int8.bitsandbytes_here", lambda: False)
    for folder, options in ((saved("gpt2", "bfloat16"), {"quantize": "int8"}), (eight("gpt2"), {})):
        model = lowmem.load(folder, **options).model
        found = {name: m for name, m in model.named_modules() if isinstance(m, Int8Linear)}
        assert not int8_of(model)
        assert list(found) == list(expected)
        for name, (weight, scales) in expected.items():
            assert same(found[name].weight.data, weight)
            assert same(found[name].SCB.data, scales)
        assert (outputs_of(model) - logits).abs().max() < 0.1 * logits.abs().max()


def test_the_holder_is_what_its_file_says(tmp_path: Path) -> None:
    """One file of int8 that belongs to no config."""
    values, scales = expected_of(torch.randn(5, 7))
    save_file({"layer.weight": values, "layer.SCB": scales}, tmp_path / "a.safetensors")
    model = lowmem.load(tmp_path / "a.safetensors", model=lambda: Holder(5, 7), strict=False).model
    assert same(model.layer.weight.data, values)
