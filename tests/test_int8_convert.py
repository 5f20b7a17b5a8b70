"""int8 in `lowmem convert`: what transformers loads with bitsandbytes as its own, and floats again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import Saved, model_class, outputs_of

import lowmem
from lowmem.errors import CheckpointError, KeysError, ModelError, OptionError, UnsupportedError

bnb = pytest.importorskip("bitsandbytes", reason="compares with bitsandbytes")
transformers = pytest.importorskip("transformers")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key


def saved_by_transformers(folder: Path, out: Path, skip: list[str] | None = None) -> Any:
    """The model that transformers made int8; `out` is what it saves of it."""
    config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    model = model_class(folder).from_pretrained(folder, quantization_config=config)
    model.save_pretrained(out)
    return model


def quantization_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text()).get("quantization_config")


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, "bfloat16") for kind in ("llama", "llama-tied", "bert-mlm", "vit")),
        *(("gpt2", dtype) for dtype in ("float32", "float16")),
        *(("t5", dtype) for dtype in ("float32", "float16")),
    ],
)
def test_writes_what_transformers_saves(kind: str, dtype: str, saved: Saved, tmp_path: Path) -> None:
    folder = saved(kind, dtype)
    saved_by_transformers(folder, tmp_path / "theirs")
    lowmem.convert(folder, tmp_path / "ours", quantize="int8")
    found = tensors_of(tmp_path / "ours")
    assert_same_tensors(found, tensors_of(tmp_path / "theirs"))
    assert quantization_of(tmp_path / "ours") == quantization_of(tmp_path / "theirs")
    theirs = outputs_of(model_class(folder).from_pretrained(tmp_path / "theirs"))
    assert torch.equal(outputs_of(model_class(folder).from_pretrained(tmp_path / "ours")), theirs)
    assert torch.equal(outputs_of(lowmem.load(tmp_path / "ours").model), theirs)


def test_layers_that_stay_floats_are_named_in_the_config(saved: Saved, tmp_path: Path) -> None:
    folder = saved("llama", "bfloat16")
    theirs = saved_by_transformers(folder, tmp_path / "theirs", skip=["down_proj", "lm_head"])
    lowmem.convert(folder, tmp_path / "ours", quantize="int8", skip_modules=["down_proj", "lm_head"])
    assert_same_tensors(tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "theirs"))
    again = model_class(folder).from_pretrained(tmp_path / "ours")
    assert torch.equal(outputs_of(again), outputs_of(theirs))


def test_a_weight_is_in_the_file_of_its_scales(saved: Saved, tmp_path: Path) -> None:
    report = lowmem.convert(saved("llama", "bfloat16"), tmp_path / "out", quantize="int8", max_shard_size="4kB")
    assert len(report.files) > 5
    for file in (tmp_path / "out").glob("*.safetensors"):
        keys = load_file(file).keys()
        weights = {key.removesuffix("SCB") + "weight" for key in keys if key.endswith("SCB")}
        assert weights <= keys
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(outputs_of(model), outputs_of(lowmem.load(tmp_path / "out").model))


def test_an_interrupted_run_goes_on(saved: Saved, tmp_path: Path) -> None:
    folder, out = saved("gpt2", "float32"), tmp_path / "out"

    class StopError(Exception):
        pass

    def stop(progress: lowmem.Progress) -> None:
        if progress.done > progress.total // 2:
            raise StopError

    with pytest.raises(StopError):
        lowmem.convert(folder, out, quantize="int8", max_shard_size="8kB", progress=stop)
    assert lowmem.convert(folder, out, quantize="int8", max_shard_size="8kB").kept
    lowmem.convert(folder, tmp_path / "whole", quantize="int8")
    assert_same_tensors(tensors_of(out), tensors_of(tmp_path / "whole"))


def test_int8_keeps_its_scales_whatever_the_dtype(saved: Saved, tmp_path: Path) -> None:
    saved_by_transformers(saved("llama", "bfloat16"), tmp_path / "int8")
    lowmem.convert(tmp_path / "int8", tmp_path / "out", dtype="float16")
    found, before = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "int8")
    for key, value in before.items():
        kept = key.endswith(("SCB", "weight_format")) or value.dtype == torch.int8
        assert torch.equal(found[key], value if kept else value.to(torch.float16)), key


@pytest.mark.parametrize(
    ("kind", "dtype", "expected"),
    [("llama", "auto", "bfloat16"), ("llama", "float32", "float32"), ("gpt2", "auto", "bfloat16")],
)
def test_floats_again(kind: str, dtype: str, expected: str, saved: Saved, tmp_path: Path) -> None:
    folder = saved(kind, "bfloat16")
    saved_by_transformers(folder, tmp_path / "int8")
    lowmem.convert(tmp_path / "int8", tmp_path / "out", dequantize=True, dtype=dtype)
    found, before = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "int8")
    assert not any(key.endswith(("SCB", "weight_format")) for key in found)
    for key, value in found.items():
        scales = before.get(f"{key[: -len('weight')]}SCB")
        if scales is None:
            floats = before[key]
        else:
            floats = bnb.functional.int8_vectorwise_dequant(before[key], scales)
            # Of GPT-2 the floats are the transpose of what is int8.
            floats = floats.T if kind == "gpt2" else floats
        assert torch.equal(value, floats.to(getattr(torch, expected))), key
    assert quantization_of(tmp_path / "out") is None
    loaded = model_class(folder).from_pretrained(tmp_path / "out", dtype="auto" if dtype == "auto" else dtype)
    state = loaded.state_dict()
    assert_same_tensors({key: state[key] for key in found}, found)
    assert torch.equal(
        outputs_of(loaded), outputs_of(lowmem.load(tmp_path / "int8", dequantize=True, dtype=dtype).model)
    )


def test_a_pickled_source(saved: Saved, tmp_path: Path) -> None:
    folder = saved("gpt2", "float32")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save(tensors_of(folder), pickled / "pytorch_model.bin")
    (pickled / "config.json").write_bytes((folder / "config.json").read_bytes())
    lowmem.convert(pickled, tmp_path / "out", quantize="int8")
    saved_by_transformers(folder, tmp_path / "theirs")
    assert_same_tensors(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "theirs"))


def test_quantising_needs_the_model(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"config\.json"):
        lowmem.convert(tmp_path, tmp_path / "out", quantize="int8")
    assert not (tmp_path / "out").exists()


def test_floats_need_something_that_is_int8(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="SCB"):
        lowmem.convert(saved("llama", "bfloat16"), tmp_path / "out", dequantize=True)


def test_both_ways_at_once_are_refused(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="dequantize"):
        lowmem.convert(saved("llama"), tmp_path / "out", dequantize=True, quantize="int8")


def test_a_value_that_has_no_int8_is_named_and_nothing_is_left(saved: Saved, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    folder = saved("llama", "float32")
    tensors = tensors_of(folder)
    key = "model.layers.1.mlp.up_proj.weight"
    tensors[key] = tensors[key].clone()
    tensors[key][5, 3] = 70000.0
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    (source / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(UnsupportedError, match=r"up_proj\.weight.*row 5.*65504.*skip_modules"):
        lowmem.convert(source, tmp_path / "out", quantize="int8")
    assert not (tmp_path / "out").exists()
    lowmem.convert(source, tmp_path / "out", quantize="int8", skip_modules=["layers.1.mlp.up_proj", "lm_head"])
    assert tensors_of(tmp_path / "out")[key].dtype == torch.float32


def test_scales_beside_floats_are_refused(saved: Saved, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    folder = saved("llama", "float32")
    tensors = tensors_of(folder)
    tensors["model.layers.0.mlp.up_proj.SCB"] = torch.ones(48)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    (source / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises((CheckpointError, KeysError), match="SCB"):
        lowmem.convert(source, tmp_path / "out", quantize="int8")
