"""`quantization_config` of `from_pretrained`: the models that transformers makes, with bitsandbytes and without it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from tiny_models import assert_same_model, every_tensor, outputs_of, same
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import lowmem
from lowmem import drop_in
from lowmem.errors import OptionError, UnsupportedError
from lowmem.int8 import Int8Linear
from lowmem.modeling import int8 as layers
from lowmem.modeling import quantization_config

pytestmark = pytest.mark.usefixtures("one_thread")

Folder = Callable[..., Path]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity_warning()


@pytest.fixture
def bitsandbytes() -> Any:
    return pytest.importorskip("bitsandbytes")


@pytest.fixture
def without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(layers, "bitsandbytes_here", lambda: False)


def in_8bit(**more: Any) -> Any:
    make: Any = BitsAndBytesConfig
    return make(load_in_8bit=True, **more)


def names_of_int8(model: Any) -> list[str]:
    return [n for n, m in model.named_modules() if type(m).__name__ in ("Linear8bitLt", "Int8Linear")]


def assert_same_int8(ours: Any, theirs: Any) -> None:
    """Tensors, state dicts, what the models compute, and what they say of themselves."""
    assert_same_model(ours, theirs)
    assert names_of_int8(ours) == names_of_int8(theirs)
    found, expected = ours.state_dict(), theirs.state_dict()
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        assert same(found[key], tensor), key
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert type(ours.config.quantization_config) is type(theirs.config.quantization_config)
    for name in ("is_quantized", "quantization_method", "is_loaded_in_8bit"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.hf_quantizer.pre_quantized == theirs.hf_quantizer.pre_quantized
    # There it is made before heads are tied, so the last parameter of all may be another.
    assert set(theirs.hf_quantizer.modules_to_not_convert) <= set(ours.hf_quantizer.modules_to_not_convert)
    assert type(ours.hf_quantizer) is type(theirs.hf_quantizer)
    assert (ours.hf_quantizer.quantization_config is ours.config.quantization_config) == (
        theirs.hf_quantizer.quantization_config is theirs.config.quantization_config
    )


CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("defaults", {}),
    ("threshold", {"llm_int8_threshold": 0.0}),
    ("skip", {"llm_int8_skip_modules": ["lm_head", "mlp"]}),
    ("nothing-skipped", {"llm_int8_skip_modules": []}),
    ("of-4-bit", {"bnb_4bit_quant_type": "nf4"}),
]


@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize("more", [more for _, more in CONFIGS], ids=[name for name, _ in CONFIGS])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_quantised_on_load_as_transformers_does(
    kind: str, more: dict[str, Any], dtype: str | None, saved: Folder, bitsandbytes: Any
) -> None:
    if kind == "gpt2" and more.get("llm_int8_skip_modules") == []:
        pytest.skip("the head of gpt2 is tied, and lowmem leaves tied layers floats")
    given = in_8bit(**more)
    theirs = AutoModelForCausalLM.from_pretrained(saved(kind), dtype=dtype, quantization_config=in_8bit(**more))
    ours = lowmem.from_pretrained(AutoModelForCausalLM, saved(kind), dtype=dtype, quantization_config=given)
    assert_same_int8(ours, theirs)
    assert ours.config.quantization_config is given
    table = {"load_in_8bit": True, **more}
    assert_same_int8(
        lowmem.from_pretrained(type(theirs), saved(kind), torch_dtype=dtype, quantization_config=table),
        type(theirs).from_pretrained(saved(kind), torch_dtype=dtype, quantization_config=dict(table)),
    )


def test_a_checkpoint_in_bf16(own: Folder, bitsandbytes: Any) -> None:
    folder = own("llama", "bfloat16")
    for dtype in (None, "float32", torch.bfloat16):
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=in_8bit())
        ours = lowmem.from_pretrained(AutoModelForCausalLM, folder, dtype=dtype, quantization_config=in_8bit())
        assert_same_int8(ours, theirs)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_checkpoint_that_is_int8_already(kind: str, saved: Folder, tmp_path: Path, bitsandbytes: Any) -> None:
    if bitsandbytes.__version__ < "0.50":
        pytest.skip("transformers' own model has other scales in its first forward with this bitsandbytes")
    make = AutoModelForCausalLM.from_pretrained
    make(saved(kind), quantization_config=in_8bit(llm_int8_threshold=3.0)).save_pretrained(tmp_path)
    theirs = make(tmp_path)
    ours = lowmem.from_pretrained(AutoModelForCausalLM, tmp_path)
    assert_same_int8(ours, theirs)
    # What the checkpoint says counts, whatever is given.
    other = {"llm_int8_threshold": 0.0, "llm_int8_skip_modules": ["mlp", "h"]}
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        theirs = make(tmp_path, quantization_config=in_8bit(**other))
    with pytest.warns(UserWarning, match="^quantization_config: the checkpoint is int8 already"):
        ours = lowmem.from_pretrained(AutoModelForCausalLM, tmp_path, quantization_config=in_8bit(**other))
    assert_same_int8(ours, theirs)
    assert ours.config.quantization_config.llm_int8_threshold == 3.0


def test_what_is_saved_is_what_was_loaded(saved: Folder, tmp_path: Path, bitsandbytes: Any) -> None:
    ours = lowmem.from_pretrained(AutoModelForCausalLM, saved("llama"), quantization_config=in_8bit())
    ours.save_pretrained(tmp_path)
    found, expected = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict(), ours.state_dict()
    assert list(found) == list(expected)
    assert all(same(found[key], tensor) for key, tensor in expected.items())


def test_without_bitsandbytes_the_same_numbers(saved: Folder, without_bitsandbytes: None) -> None:
    ours = lowmem.from_pretrained(AutoModelForCausalLM, saved("llama"), quantization_config=in_8bit())
    assert len(names_of_int8(ours)) == 21
    assert type(ours.model.layers[0].mlp.up_proj) is Int8Linear
    assert ours.is_quantized
    assert ours.config.quantization_config.load_in_8bit
    result = lowmem.load(saved("llama"), quantize="int8")
    assert list(every_tensor(ours)) == list(every_tensor(result.model))
    floats = lowmem.from_pretrained(AutoModelForCausalLM, saved("llama"))
    torch.testing.assert_close(outputs_of(ours), outputs_of(floats), atol=0.05, rtol=0.05)


def test_parts_on_the_cpu_stay_floats_only_if_that_is_asked_for(saved: Folder, tmp_path: Path) -> None:
    """transformers refuses the first; of the second it makes floats, for it cannot compute with int8 there."""
    table = {"": "cpu", "model.layers.1": "disk"}
    options = {"device_map": table, "offload_folder": tmp_path}
    plain = lowmem.from_pretrained(AutoModelForCausalLM, saved("llama"), quantization_config=in_8bit(), **options)
    assert len(names_of_int8(plain)) == 21
    asked = in_8bit(llm_int8_enable_fp32_cpu_offload=True)
    rest = {f"model.{name}": "cuda:0" for name in ("embed_tokens", "layers.0", "layers.2", "norm", "rotary_emb")}
    kept = quantization_config.kept_off_the_gpu(asked, {**rest, "model.layers.1": "disk", "lm_head": "cpu"})
    assert kept == ["model.layers.1", "lm_head"]
    assert quantization_config.kept_off_the_gpu(in_8bit(), table) == []
    assert quantization_config.kept_off_the_gpu(asked, "auto") == []
    # The whole model is on the CPU or the disk.
    ours = lowmem.from_pretrained(AutoModelForCausalLM, saved("llama"), quantization_config=asked, **options)
    assert names_of_int8(ours) == []


def test_with_parts_kept_as_floats_the_rest_is_int8_and_the_config_says_which(saved: Folder, tmp_path: Path) -> None:
    table = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.layers.2", "model.norm"), "cuda:0")
    table |= {"model.rotary_emb": "cuda:0", "model.layers.1": "cpu", "lm_head": "cpu"}
    asked = in_8bit(llm_int8_enable_fp32_cpu_offload=True)
    seen: list[dict[str, Any]] = []

    def load(source: Any, **options: Any) -> Any:
        seen.append(options)
        return lowmem.load(source, **{**options, "device_map": None})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drop_in, "load", load)
        ours = lowmem.from_pretrained(
            AutoModelForCausalLM, saved("llama"), device_map=table, quantization_config=asked, quantize=None
        )
    assert seen[0]["device_map"] == table
    assert names_of_int8(ours) == [n for n in names_of_int8(ours) if not n.startswith(("model.layers.1", "lm_head"))]
    assert len(names_of_int8(ours)) == 14
    said = ours.config.quantization_config
    assert said.llm_int8_enable_fp32_cpu_offload
    assert asked.llm_int8_skip_modules is None
    assert "model.layers.1" in said.llm_int8_skip_modules


def test_an_int8_model_without_a_device_map_goes_to_the_gpu(
    saved: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bitsandbytes: Any
) -> None:
    """As `update_device_map` of transformers' quantiser has it, and nothing else does."""
    model = lowmem.from_pretrained(AutoModelForCausalLM, saved("llama"), quantization_config=in_8bit())
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(drop_in, "accelerator", lambda: "cuda")
    monkeypatch.setattr(drop_in, "device_in_use", lambda kind: f"{kind}:7")
    there = pytest.raises(lowmem.PlacementError, match="cuda:7 is not on this machine")
    for folder, options in (
        (saved("llama"), {"quantization_config": in_8bit()}),
        (saved("llama"), {"quantize": "int8"}),
        (tmp_path, {}),
    ):
        with there:
            lowmem.from_pretrained(AutoModelForCausalLM, folder, **options)
        assert lowmem.from_pretrained(AutoModelForCausalLM, folder, device_map="cpu", **options)
    assert lowmem.from_pretrained(AutoModelForCausalLM, saved("llama"))
    assert not names_of_int8(lowmem.from_pretrained(AutoModelForCausalLM, tmp_path, dequantize=True))


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        (BitsAndBytesConfig(load_in_4bit=True), UnsupportedError, "load_in_4bit"),
        ({"load_in_4bit": True}, UnsupportedError, "load_in_4bit"),
        (in_8bit(llm_int8_has_fp16_weight=True), UnsupportedError, "llm_int8_has_fp16_weight"),
        ({"quant_method": "gptq", "bits": 4}, UnsupportedError, "'gptq'"),
        (transformers.EetqConfig(), UnsupportedError, r"EetqConfig \('eetq'\)"),
        (BitsAndBytesConfig(), OptionError, "load_in_8bit=False"),
        ({}, OptionError, "expected BitsAndBytesConfig"),
        ({"quant_method": "bitsandbytes"}, OptionError, "expected BitsAndBytesConfig"),
        ({"load_in_8bit": True, "llm_int8_threshold": 6}, OptionError, "must be a float"),
        ({"load_in_8bit": True, "load_in_4bit": True}, OptionError, "only one can be used"),
        ("int8", OptionError, "found 'int8'"),
        (8, OptionError, "found 8"),
    ],
)
def test_what_is_not_int8_is_refused_by_name(given: Any, kind: type[Exception], said: str, saved: Folder) -> None:
    with pytest.raises(kind, match=f"^quantization_config: .*{said}"):
        lowmem.from_pretrained(AutoModelForCausalLM, saved("llama"), quantization_config=given)


@pytest.mark.parametrize(
    "own", [{"quantize": "int8"}, {"skip_modules": ["mlp"]}, {"dequantize": True}, {"int8_threshold": 0.0}]
)
def test_a_config_and_options_of_int8_exclude_each_other(own: dict[str, Any], saved: Folder) -> None:
    with pytest.raises(OptionError, match=f"^quantization_config: {next(iter(own))}= is about int8"):
        lowmem.from_pretrained(AutoModelForCausalLM, saved("llama"), quantization_config=in_8bit(), **own)
    assert lowmem.from_pretrained(AutoModelForCausalLM, saved("llama"), quantization_config=None, quantize="int8")


def test_a_config_must_not_call_floats_int8(saved: Folder, own: Folder) -> None:
    """transformers 5.23 cannot load so; what was saved with such a config could not be loaded either."""
    config = transformers.AutoConfig.from_pretrained(saved("llama"))
    config.quantization_config = in_8bit().to_dict()
    for load in (
        lowmem.load,
        lowmem.plan,
        lambda s, config: lowmem.from_pretrained(AutoModelForCausalLM, s, config=config),
    ):
        with pytest.raises(UnsupportedError, match=r"^config=: quantization_config says .* give quantize='int8'"):
            load(saved("llama"), config=config)
    with pytest.raises(OptionError, match=r"^model_kwargs: 'quantization_config' .* give quantize='int8'"):
        lowmem.load(saved("llama"), model_kwargs={"quantization_config": in_8bit()})


def test_nothing_is_warned_of_where_all_is_as_asked(saved: Folder) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        lowmem.from_pretrained(AutoModelForCausalLM, saved("llama"), quantization_config=in_8bit())
