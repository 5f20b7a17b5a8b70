"""int8 where it was wrong once: odd models, odd configs, weights in another order, and what fails late."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("bitsandbytes", reason="compares with bitsandbytes")
pytest.importorskip("transformers")

import bitsandbytes as bnb
import transformers
from int8_models import assert_same_int8, expected_of, int8_of, theirs_of
from safetensors.torch import load_file, save_file
from tiny_models import Saved, change_config, model_class, outputs_of, same
from transformers import conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    ConversionOps,
    PermuteForRope,
    Transpose,
    WeightConverter,
    WeightRenaming,
)

import lowmem

pytestmark = [pytest.mark.usefixtures("one_thread", "quiet"), pytest.mark.filterwarnings("ignore")]

Q = "model.layers.1.self_attn.q_proj"
Register = Callable[..., None]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Register:
    """Conversions of every Llama, until the test ends."""
    conversion_mapping.get_checkpoint_conversion_mapping("llama")
    known = dict(conversion_mapping._checkpoint_conversion_mapping_cache)
    monkeypatch.setattr(conversion_mapping, "_checkpoint_conversion_mapping_cache", known)

    def registered(*transforms: Any) -> None:
        conversion_mapping.register_checkpoint_conversion_mapping("LlamaForCausalLM", list(transforms), overwrite=True)

    return registered


def rewritten(folder: Path, into: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """The same checkpoint in one file, with other tensors."""
    into.mkdir()
    tensors = {key: t for file in sorted(folder.glob("*.safetensors")) for key, t in load_file(file).items()}
    tensors = {key: t.contiguous() for key, t in change(tensors).items()}
    save_file(tensors, into / "model.safetensors", {"format": "pt"})
    shutil.copy(folder / "config.json", into)
    return into


def int8_folder(saved: Saved, into: Path, **options: Any) -> Path:
    theirs_of(saved("llama", "bfloat16"), **options).save_pretrained(into)
    return into


# ---- weights in another order than that of the model ----


def renamed(new: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], Any]:
    return lambda tensors: {
        key.replace("q_proj", new): change(t) if key.endswith("q_proj.weight") else t for key, t in tensors.items()
    }


def test_int8_that_is_turned_on_the_way_is_refused_and_becomes_floats_rightly(
    saved: Saved, tmp_path: Path, register: Register
) -> None:
    """q_proj is square, so that shapes tell nothing."""
    folder = int8_folder(saved, tmp_path / "int8")
    turned = rewritten(folder, tmp_path / "turned", renamed("wq", lambda t: t))
    expected = lowmem.load(folder, dequantize=True).model.state_dict()
    register(
        WeightRenaming(r"self_attn\.wq\.SCB", "self_attn.q_proj.SCB"),
        WeightConverter(r"self_attn\.wq\.weight", "self_attn.q_proj.weight", operations=[Transpose(0, 1)]),
    )
    with pytest.raises(lowmem.UnsupportedError, match=r"wq\.weight.*int8.*in another order"):
        lowmem.load(turned)
    found = lowmem.load(turned, dequantize=True).model.state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        # The scales are of the rows that the file has.
        assert same(found[key], tensor.T.contiguous() if key.endswith("q_proj.weight") else tensor), key


@pytest.mark.parametrize("how", ["transpose", "rope"])
def test_floats_that_change_their_order_of_rows_stay_floats_in_conversions(
    saved: Saved, tmp_path: Path, register: Register, how: str
) -> None:
    operation, back = {"transpose": (Transpose(0, 1), lambda t: t.T), "rope": (PermuteForRope(), lambda t: t)}[how]
    folder = rewritten(saved("llama", "float32"), tmp_path / "floats", renamed("wq", back))
    register(WeightConverter(r"self_attn\.wq\.weight", "self_attn.q_proj.weight", operations=[operation]))
    report = lowmem.convert(folder, tmp_path / "out", quantize="int8")
    assert any("stay floats" in text for text in report.warnings)
    loaded = lowmem.load(tmp_path / "out").model
    floats = lowmem.load(folder).model
    assert type(loaded.get_submodule(Q)) is nn.Linear
    assert same(loaded.get_submodule(Q).weight.data, floats.get_submodule(Q).weight.data)
    assert int8_of(loaded)


def test_rows_in_another_order_stay_floats_with_a_word(saved: Saved, tmp_path: Path, register: Register) -> None:
    folder = rewritten(saved("llama", "float32"), tmp_path / "floats", renamed("wq", lambda t: t))
    register(WeightConverter(r"self_attn\.wq\.weight", "self_attn.q_proj.weight", operations=[PermuteForRope()]))
    result = lowmem.load(folder, quantize="int8")
    assert any("stay floats, because their rows" in text for text in result.plan.warnings)
    assert type(result.model.get_submodule(Q)) is nn.Linear
    assert same(result.model.get_submodule(Q).weight.data, lowmem.load(folder).model.get_submodule(Q).weight.data)
    assert len(int8_of(result.model)) == 18


class Doubled(ConversionOps):
    """An operation that computes, so that nobody can write it down as moves."""

    def convert(self, input_dict: Any, source_patterns: list[str], target_patterns: list[str], **_: Any) -> Any:
        (tensors,) = input_dict.values()
        return {target_patterns[0]: (tensors[0] if isinstance(tensors, list) else tensors) * 2 + 1}

    @property
    def reverse_op(self) -> ConversionOps:
        return self


def test_int8_that_an_operation_would_compute_with_is_refused(saved: Saved, tmp_path: Path, register: Register) -> None:
    """Its integers alone are other numbers."""
    folder = rewritten(int8_folder(saved, tmp_path / "int8"), tmp_path / "wq", renamed("wq", lambda t: t))
    register(WeightConverter(r"self_attn\.wq\.weight", "self_attn.q_proj.weight", operations=[Doubled()]))
    for options in ({}, {"dequantize": True}):
        with pytest.raises(lowmem.UnsupportedError, match=r"wq\.weight.*int8.*operation Doubled.*without its scales"):
            lowmem.load(folder, **options)


def test_chunks_of_a_fused_weight_become_int8_as_transformers_makes_them(
    saved: Saved, tmp_path: Path, register: Register
) -> None:
    def fuse(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        made = {key: t for key, t in tensors.items() if "gate_proj" not in key and "up_proj" not in key}
        for i in range(3):
            stem = f"model.layers.{i}.mlp"
            made[f"{stem}.both.weight"] = torch.cat([tensors[f"{stem}.{part}_proj.weight"] for part in ("gate", "up")])
        return made

    folder = rewritten(saved("llama", "bfloat16"), tmp_path / "fused", fuse)
    register(
        WeightConverter("mlp.both.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], operations=[Chunk(dim=0)])
    )
    ours = lowmem.load(folder, quantize="int8").model
    plain = lowmem.load(saved("llama", "bfloat16"), quantize="int8").model
    assert len(int8_of(ours)) == 21
    for name, (weight, scales) in int8_of(plain).items():
        assert same(int8_of(ours)[name][0], weight)
        assert same(int8_of(ours)[name][1], scales)


# ---- what a model says of itself ----


def test_a_list_that_no_longer_tells_the_layers_is_written_anew(saved: Saved, tmp_path: Path) -> None:
    part = int8_folder(saved, tmp_path / "part", skip_modules=["model.layers.0", "lm_head"])
    model = lowmem.load(part, quantize="int8").model
    assert len(int8_of(model)) == 21
    model.save_pretrained(tmp_path / "again")
    again = model_class(part).from_pretrained(tmp_path / "again")
    assert same(outputs_of(again), outputs_of(model))


def test_what_is_partly_int8_is_converted(saved: Saved, tmp_path: Path) -> None:
    part = int8_folder(saved, tmp_path / "part", skip_modules=["model.layers.0", "lm_head"])
    lowmem.convert(part, tmp_path / "out", quantize="int8")
    theirs = model_class(part).from_pretrained(tmp_path / "out")
    assert len(int8_of(theirs)) == 21
    assert same(outputs_of(lowmem.load(tmp_path / "out").model), outputs_of(theirs))
    with pytest.raises(lowmem.ModelError, match="int8 already"):
        lowmem.convert(tmp_path / "out", tmp_path / "none", quantize="int8")


def test_a_conversion_keeps_the_threshold_of_its_source(saved: Saved, tmp_path: Path) -> None:
    part = int8_folder(saved, tmp_path / "part", skip_modules=["model.layers.0", "lm_head"])
    table = json.loads((part / "config.json").read_text())["quantization_config"]
    change_config(part, quantization_config={**table, "llm_int8_threshold": 2.5})
    lowmem.convert(part, tmp_path / "out", quantize="int8")
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert said["llm_int8_threshold"] == 2.5


def test_the_threshold_of_a_config_counts(saved: Saved, tmp_path: Path) -> None:
    folder = int8_folder(saved, tmp_path / "int8")
    table = json.loads((folder / "config.json").read_text())["quantization_config"]
    change_config(folder, quantization_config={**table, "llm_int8_threshold": 2.5, "quant_method": None})
    model = lowmem.load(folder).model
    assert model.get_submodule(Q).state.threshold == 2.5
    assert model.config.quantization_config.llm_int8_threshold == 2.5
    assert lowmem.load(folder, int8_threshold=1.0).model.get_submodule(Q).state.threshold == 1.0


def test_a_config_that_calls_floats_int8_is_a_warning_and_is_mended(saved: Saved, own: Saved, tmp_path: Path) -> None:
    folder = own("llama", "bfloat16")
    change_config(folder, quantization_config={"load_in_8bit": True, "quant_method": "bitsandbytes"})
    result = lowmem.load(folder)
    assert any("none is: they are floats" in text for text in result.plan.warnings)
    assert getattr(result.model.config, "quantization_config", None) is None
    assert same(outputs_of(result.model), outputs_of(lowmem.load(saved("llama", "bfloat16")).model))


@pytest.mark.parametrize(
    "odd",
    [
        {"bnb_4bit_compute_dtype": "bloat16"},
        {"llm_int8_enable_fp32_cpu_offload": "x"},
        {"llm_int8_threshold": "six"},
        {"llm_int8_skip_modules": "lm_head"},
    ],
    ids=str,
)
def test_odd_words_in_a_config_are_refused_before_anything_is_read(saved: Saved, tmp_path: Path, odd: Any) -> None:
    folder = int8_folder(saved, tmp_path / "int8")
    table = json.loads((folder / "config.json").read_text())["quantization_config"]
    change_config(folder, quantization_config={**table, **odd})
    with pytest.raises(lowmem.ModelError, match=r"config\.json: quantization_config"):
        lowmem.plan(folder)


def test_options_without_effect_are_said(saved: Saved) -> None:
    folder = saved("llama", "bfloat16")
    for options, text in (({"int8_threshold": 3.0}, "int8_threshold"), ({"dequantize": True}, "dequantize")):
        assert any(warning.startswith(f"{text}: no") for warning in lowmem.plan(folder, **options).warnings)
    assert any(
        "'layers.0' names no linear" in w
        for w in lowmem.plan(folder, quantize="int8", skip_modules=["layers.0"]).warnings
    )


# ---- modules ----


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def file_of(model: nn.Module, folder: Path) -> Path:
    save_file({name: t.detach().clone() for name, t in model.state_dict().items()}, folder / "model.safetensors")
    return folder / "model.safetensors"


def test_a_layer_that_computes_in_its_own_way_stays_as_it_is(tmp_path: Path) -> None:
    file, model = file_of(Two(), tmp_path), Two()
    plain = model.first.forward
    model.first.forward = lambda x: plain(x) * 0 + 7
    model.second.scale = 5.0
    lowmem.load(file, model=model, quantize="int8")
    assert type(model.first) is nn.Linear
    assert isinstance(model.second, bnb.nn.Linear8bitLt)
    assert model.second.scale == 5.0
    assert bool((model.first(torch.ones(1, 6)) == 7).all())


def test_layers_of_bitsandbytes_do_not_become_floats(tmp_path: Path) -> None:
    file, model = file_of(Two(), tmp_path), Two()
    lowmem.load(file, model=model, quantize="int8")
    with pytest.raises(lowmem.UnsupportedError, match=r"dequantize.*'first'.*Linear8bitLt.*nn\.Linear"):
        lowmem.load(file, model=model, dequantize=True)
    assert isinstance(model.first, bnb.nn.Linear8bitLt)


def test_what_fails_last_leaves_no_mark(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved("llama", "bfloat16")
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(config)
    before, modules = model.config.to_dict(), list(model.modules())

    def fail(*_: Any) -> None:
        raise RuntimeError("no more")

    monkeypatch.setattr("lowmem.loader.attach", fail)
    with pytest.raises(RuntimeError, match="no more"):
        lowmem.load(folder, model=model, quantize="int8")
    assert model.config.to_dict() == before
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert not getattr(model, "is_quantized", False)


def test_dequantised_weights_have_the_dtype_of_the_rest(tmp_path: Path) -> None:
    values, scales = expected_of(torch.randn(8, 6))
    tensors = {"first.weight": values, "first.SCB": scales, "first.bias": torch.ones(8, dtype=torch.float16)}
    save_file(tensors, tmp_path / "model.safetensors")

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 8)

    model = lowmem.load(tmp_path / "model.safetensors", model=One, dequantize=True).model
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert same(model.first.weight.data, bnb.functional.int8_vectorwise_dequant(values, scales).half())


def test_models_of_the_same_kind_still_load_alike(saved: Saved) -> None:
    """The pairing is the same whether anything odd was registered before or not."""
    folder = saved("qwen3-moe", "bfloat16")
    assert_same_int8(lowmem.load(folder, quantize="int8").model, theirs_of(folder, dtype="auto"))


def test_int8_experts_of_older_checkpoints_become_floats(saved: Saved, tmp_path: Path) -> None:
    """Each was a linear layer once; now they are parts of one tensor, which cannot be int8."""
    folder = saved("qwen3-moe", "bfloat16")

    def quantised(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        made = dict(tensors)
        for key in [key for key in tensors if ".experts." in key]:
            made[key], made[f"{key.removesuffix('weight')}SCB"] = expected_of(tensors[key])
        return made

    def floats(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        made = dict(tensors)
        for key in [key for key in tensors if ".experts." in key]:
            made[key] = bnb.functional.int8_vectorwise_dequant(*expected_of(tensors[key])).to(tensors[key].dtype)
        return made

    old = rewritten(folder, tmp_path / "old", quantised)
    expected = lowmem.load(rewritten(folder, tmp_path / "floats", floats)).model.state_dict()
    found = lowmem.load(old, dequantize=True).model.state_dict()
    assert any(".experts." in key for key in expected)
    assert found.keys() == expected.keys()
    assert all(same(found[key], tensor) for key, tensor in expected.items())
    with pytest.raises(lowmem.UnsupportedError, match=r"experts.*belongs to no linear layer.*dequantize=True"):
        lowmem.load(old)
