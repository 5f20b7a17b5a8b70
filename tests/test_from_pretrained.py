"""What `from_pretrained` decides about a model, decided alike; and the drop-in that takes its arguments."""

from __future__ import annotations

import inspect
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import repository
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

import transformers
from tiny_models import (
    assert_same_model,
    change_config,
    every_tensor,
    is_on_disk,
    model_class,
    new_model,
    same,
    ties_of,
)

import lowmem
from lowmem.drop_in import _OF_THE_HUB, _OWN, _REFUSED, _RETIRED
from lowmem.errors import KeysError, LowmemError, ModelError, OptionError, SourceError, UnsupportedError

pytestmark = pytest.mark.usefixtures("one_thread")

Folder = Callable[..., Path]
ONE_FILE = "1GB"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity_warning()


def dtypes_of(config: Any) -> dict[str, Any]:
    """`dtype` of a config and of all its sub-configs."""
    found = {"": config.dtype}
    for name in config.sub_configs:
        sub = getattr(config, name, None)
        if sub is not None:
            found.update({f"{name}.{path}": dtype for path, dtype in dtypes_of(sub).items()})
    return found


def attention_of(config: Any) -> dict[str, Any]:
    """How a config and all its sub-configs compute attention."""
    found = {"": config._attn_implementation}
    for name in config.sub_configs:
        sub = getattr(config, name, None)
        if sub is not None:
            found.update({f"{name}.{path}": way for path, way in attention_of(sub).items()})
    return found


def assert_same(ours: Any, theirs: Any) -> None:
    """As `assert_same_model`, but for what the model computes: for models whose inputs are not simply made."""
    assert type(ours) is type(theirs)
    found, expected = every_tensor(ours), every_tensor(theirs)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert same(found[name], tensor), f"{name}: expected {tensor}, found {found[name]}"
    assert ties_of(ours) == ties_of(theirs)
    assert dtypes_of(ours.config) == dtypes_of(theirs.config)
    assert attention_of(ours.config) == attention_of(theirs.config)
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.name_or_path == theirs.name_or_path
    for module, other in zip(ours.modules(), theirs.modules(), strict=True):
        # torch makes a new class for each module whose weight is computed.
        assert type(module) is type(other) or type(other).__name__.startswith("Parametrized")
        assert module.training is other.training
        assert getattr(module, "name_or_path", None) == getattr(other, "name_or_path", None)
        if getattr(other, "generation_config", None) is not None:
            assert module.generation_config.to_dict() == other.generation_config.to_dict()


def both(cls: Any, folder: Path, **options: Any) -> tuple[Any, Any]:
    """The model by the drop-in and by transformers, with the same seed."""
    torch.manual_seed(11)
    ours = lowmem.from_pretrained(cls, folder, **options)
    torch.manual_seed(11)
    return ours, cls.from_pretrained(folder, **options)


def auto(name: str) -> Any:
    return getattr(transformers, name)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({k: v.clone() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


# ---- the class, and what of the checkpoint it takes ----

CLASSES = [
    ("llama", "AutoModel", {}),
    ("llama", "AutoModelForCausalLM", {}),
    ("llama", "AutoModelForSequenceClassification", {"num_labels": 3, "pad_token_id": 0}),
    ("llama", "LlamaModel", {}),
    (
        "llama",
        "LlamaForTokenClassification",
        {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}},
    ),
    ("llama-tied", "AutoModel", {}),
    ("bert", "AutoModelForMaskedLM", {}),
    ("bert", "BertForMaskedLM", {}),
    ("bert", "AutoModelForQuestionAnswering", {}),
    ("bert-mlm", "AutoModel", {}),
    ("bert-mlm", "AutoModelForTokenClassification", {"num_labels": 4}),
    ("gpt2", "AutoModel", {}),
    ("t5", "AutoModel", {}),
    ("t5", "AutoModelForSeq2SeqLM", {}),
    ("t5", "T5EncoderModel", {}),
    ("t5", "AutoModelForTextEncoding", {}),
    ("vit", "AutoModel", {}),
    ("vit", "ViTForMaskedImageModeling", {}),
]


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize(("kind", "name", "changes"), CLASSES, ids=[f"{kind}-{name}" for kind, name, _ in CLASSES])
def test_the_class_asked_for_is_what_from_pretrained_gives(
    kind: str, name: str, changes: dict[str, Any], dtype: str, saved: Folder
) -> None:
    """Its class, its new head by the model's rule with the seed, and what of the checkpoint it has no use for."""
    folder, cls = saved(kind), auto(name)
    torch.manual_seed(11)
    theirs, info = cls.from_pretrained(folder, dtype=dtype, output_loading_info=True, **changes)
    torch.manual_seed(11)
    result = lowmem.load(folder, auto_class=name, dtype=dtype, model_kwargs=changes, strict=False)
    assert_same(result.model, theirs)
    assert set(result.plan.mapping.missing) == info["missing_keys"]
    torch.manual_seed(11)
    ours, ours_info = lowmem.from_pretrained(cls, folder, dtype=dtype, output_loading_info=True, **changes)
    assert_same(ours, theirs)
    assert ours_info == info


def test_a_missing_head_is_refused_where_load_is_strict(saved: Folder) -> None:
    with pytest.raises(KeysError, match=r"score\.weight"):
        lowmem.load(saved("llama"), auto_class="AutoModelForSequenceClassification")
    difference = lowmem.diff(saved("llama"), auto_class="AutoModelForSequenceClassification")
    assert difference.missing == ("score.weight",)
    assert lowmem.plan(saved("llama"), auto_class="AutoModel").mapping.unexpected == ("lm_head.weight",)


def test_shapes_alone_may_be_refused(own: Folder) -> None:
    """As `from_pretrained` has it: what is missing is initialised, what has another shape is an error."""
    folder = own("vit", "float32", ONE_FILE)
    rewrite(folder, lambda t: t.pop("vit.embeddings.cls_token"))
    torch.manual_seed(11)
    ours = lowmem.load(folder, strict="shapes").model
    torch.manual_seed(11)
    assert_same_model(ours, transformers.ViTForImageClassification.from_pretrained(folder))
    with pytest.raises(KeysError, match=r"ignore_mismatched_sizes=True these are initialised"):
        lowmem.load(folder, strict="shapes", model_kwargs={"num_labels": 3})
    assert lowmem.plan(
        folder, strict="shapes", model_kwargs={"num_labels": 3}, ignore_mismatched_sizes=True
    ).mapping.mismatched
    with pytest.raises(OptionError, match=r"^strict: expected True or False, or 'shapes', found 'yes'"):
        lowmem.load(folder, strict="yes")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("AutoModle", "did you mean 'AutoModel'"),
        ("LlamaForTelepathy", "found 'LlamaForTelepathy'"),
        ("pipeline", "found 'pipeline'"),
        ("AutoConfig", "makes models"),
        (torch.nn.Linear, "found 'Linear'"),
        (3, "found 3"),
    ],
)
def test_what_is_no_class_of_transformers_is_refused(asked: Any, said: str, saved: Folder) -> None:
    with pytest.raises(OptionError, match=f"^auto_class: .*{said}"):
        lowmem.load(saved("llama"), auto_class=asked)


def test_an_auto_class_without_a_model_for_the_config_is_refused(saved: Folder) -> None:
    with pytest.raises(ModelError, match=r"AutoModelForImageClassification has no model for LlamaConfig"):
        lowmem.load(saved("llama"), auto_class="AutoModelForImageClassification")


@pytest.mark.parametrize("option", ["auto_class", "config", "attn_implementation", "experts_implementation"])
def test_a_model_that_is_given_and_what_is_asked_of_another_contradict(option: str, saved: Folder) -> None:
    with pytest.raises(OptionError, match=f"^{option}: .*model= is given"):
        lowmem.load(saved("llama"), model=lambda: torch.nn.Linear(1, 1), **{option: "x"})


# ---- the config ----


def test_a_config_that_is_given_goes_before_the_one_beside_the_weights(saved: Folder, tmp_path: Path) -> None:
    folder = saved("llama")
    config = transformers.AutoConfig.from_pretrained(folder, rms_norm_eps=0.25)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, config=config)
    for given in (config, tmp_path, tmp_path / "config.json"):
        assert_same_model(lowmem.load(folder, config=given).model, theirs)
        assert_same_model(lowmem.from_pretrained(transformers.LlamaForCausalLM, folder, config=given), theirs)
    assert config.name_or_path == str(folder)
    assert lowmem.load(folder, config=config).model.config is not config


def test_a_config_stands_for_one_that_is_not_there(own: Folder) -> None:
    folder = own("llama")
    config = transformers.AutoConfig.from_pretrained(folder)
    (folder / "config.json").unlink()
    model = lowmem.load(folder, config=config).model
    assert isinstance(model, transformers.LlamaForCausalLM)


def test_a_config_that_names_no_class_takes_that_of_the_folder(saved: Folder) -> None:
    config = transformers.AutoConfig.from_pretrained(saved("llama"))
    config.architectures = None
    assert isinstance(lowmem.load(saved("llama"), config=config).model, transformers.LlamaForCausalLM)


@pytest.mark.parametrize("config", [3, {"model_type": "llama"}, "no/such/place"])
def test_what_is_no_config_is_refused(config: Any, saved: Folder) -> None:
    with pytest.raises((OptionError, ModelError), match=r"^config(='no/such/place')?=?: "):
        lowmem.load(saved("llama"), config=config)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "AutoModelForCausalLM"])
@pytest.mark.parametrize(
    "changes",
    [
        {"output_attentions": True, "attn_implementation": "eager"},
        {"output_hidden_states": True},
        {"rms_norm_eps": 0.5, "attention_dropout": 0.25},
        {"name_or_path": "elsewhere"},
        {"max_length": 9, "do_sample": True},
        {"use_cache": False},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_arguments_that_are_not_known_change_the_config(name: str, changes: dict[str, Any], saved: Folder) -> None:
    """Also those that are attributes of the generation config as well."""
    try:
        theirs = auto(name).from_pretrained(saved("llama"), **changes)
    except TypeError:
        with pytest.raises(ModelError, match="unexpected keyword"):
            lowmem.from_pretrained(auto(name), saved("llama"), **changes)
        return
    ours = lowmem.from_pretrained(auto(name), saved("llama"), **changes)
    assert_same(ours, theirs)
    assert ours.config.output_attentions == theirs.config.output_attentions


def test_what_neither_the_config_nor_the_model_knows_is_refused(saved: Folder) -> None:
    with pytest.raises(TypeError):
        transformers.LlamaForCausalLM.from_pretrained(saved("llama"), telepathy=True)
    with pytest.raises(ModelError, match=r"unexpected keyword argument 'telepathy'.*LlamaForCausalLM") as refused:
        lowmem.from_pretrained(transformers.LlamaForCausalLM, saved("llama"), telepathy=True)
    assert isinstance(refused.value, TypeError)
    with pytest.raises(ModelError, match=r"'stagin'.*\. Did you mean 'staging'\?"):
        lowmem.from_pretrained(transformers.LlamaForCausalLM, saved("llama"), stagin="1MiB")
    with pytest.raises(ModelError, match="telepathy"):
        lowmem.load(saved("llama"), model_kwargs={"telepathy": True})


@pytest.mark.parametrize("value", [3, {3: 4}, {"dtype": "float32"}, {"revision": "main"}])
def test_model_kwargs_are_about_the_model(value: Any, saved: Folder) -> None:
    with pytest.raises(OptionError, match=r"^model_kwargs: "):
        lowmem.load(saved("llama"), model_kwargs=value)


def test_arguments_of_the_models_own(saved: Folder) -> None:
    """Behind the config, by position and by name."""
    folder = saved("bert")
    assert lowmem.from_pretrained(transformers.BertModel, folder, False).pooler is None
    assert lowmem.from_pretrained(transformers.AutoModel, folder, add_pooling_layer=False).pooler is None
    ours, theirs = both(transformers.BertModel, folder, add_pooling_layer=False)
    assert_same_model(ours, theirs)
    with pytest.raises(OptionError, match=r"^model_args: BertModel takes 1 behind its config, found 2"):
        lowmem.from_pretrained(transformers.BertModel, folder, False, True)


# ---- dtypes ----


def test_the_dtype_of_a_checkpoint_without_one_in_the_config_is_that_of_the_first_key(own: Folder) -> None:
    """First by the alphabet, as safetensors opens files; not by place."""
    folder = own("llama", "float32", ONE_FILE)
    change_config(folder, dtype=None)
    for first, rest in (("float16", "bfloat16"), ("bfloat16", "float32")):

        def mix(tensors: dict[str, torch.Tensor], first: str = first, rest: str = rest) -> None:
            for key in tensors:
                tensors[key] = tensors[key].to(getattr(torch, first if key == min(tensors) else rest))

        rewrite(folder, mix)
        ours, theirs = both(transformers.LlamaForCausalLM, folder)
        assert ours.dtype == getattr(torch, first)
        assert_same_model(ours, theirs)


def test_the_first_shard_decides_and_what_the_index_says_goes_before(own: Folder) -> None:
    folder = own("llama", "bfloat16")
    change_config(folder, dtype=None)
    shards = sorted(folder.glob("*.safetensors"))
    save_file({k: v.half() for k, v in load_file(shards[0]).items()}, shards[0], {"format": "pt"})
    ours, theirs = both(transformers.LlamaForCausalLM, folder)
    assert ours.dtype == torch.float16
    assert_same_model(ours, theirs)
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["metadata"]["dtype"] = "float32"
    index.write_text(json.dumps(table))
    ours, theirs = both(transformers.LlamaForCausalLM, folder)
    assert ours.dtype == torch.float32
    assert_same_model(ours, theirs)


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2", "t5", "bert-mlm"])
def test_pickled_weights_without_a_dtype_in_the_config(kind: str, own: Folder) -> None:
    """Tied tensors are in it twice, and the first of the pickle decides."""
    folder, model = own(kind, "float32", ONE_FILE), new_model(kind)
    (folder / "model.safetensors").unlink()
    state = model.state_dict()
    torch.save(
        {k: v.half() if k == next(iter(state)) else v.bfloat16() for k, v in state.items()},
        folder / "pytorch_model.bin",
    )
    change_config(folder, dtype=None)
    for cls in (type(model), transformers.AutoModel):
        ours, theirs = both(cls, folder)
        assert ours.dtype == torch.float16
        assert_same(ours, theirs)


def test_keys_of_old_checkpoints(own: Folder) -> None:
    """`gamma` and `beta`, heads of another class, and buffers that were persistent: told as transformers tells them."""
    folder = own("bert-mlm", "float32", ONE_FILE)

    def age(tensors: dict[str, torch.Tensor]) -> None:
        for key in [k for k in tensors if "LayerNorm" in k]:
            tensors[key.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")] = tensors.pop(key)
        tensors["cls.seq_relationship.weight"] = torch.ones(2, 32)
        tensors["bert.embeddings.position_ids"] = torch.arange(40)[None]
        tensors["elsewhere.LayerNorm.gamma"] = torch.ones(3)

    rewrite(folder, age)
    for name in ("BertForMaskedLM", "BertModel", "BertForPreTraining", "AutoModelForTokenClassification"):
        (ours, info), (theirs, expected) = both(auto(name), folder, output_loading_info=True)
        assert_same(ours, theirs)
        assert info == expected


@pytest.mark.parametrize("given", [{"": "bfloat16"}, {"text_config": "float16"}, {"": torch.float16, "x": "bfloat16"}])
def test_a_dtype_for_each_part_counts_by_that_of_the_whole(given: dict[str, Any], own: Folder) -> None:
    folder = own("llama")
    assert_same_model(*both(transformers.LlamaForCausalLM, folder, dtype=given))
    change_config(folder, dtype={part: str(dtype).removeprefix("torch.") for part, dtype in given.items()})
    assert_same_model(*both(transformers.LlamaForCausalLM, folder))


@pytest.mark.parametrize("given", [{"": "auto"}, {"": "int8"}, {"": "bfloat16", "text_config": 3}])
def test_a_dtype_for_each_part_must_be_a_dtype(given: dict[str, Any], saved: Folder) -> None:
    with pytest.raises(OptionError, match=r"^dtype"):
        lowmem.load(saved("llama"), dtype=given)


def test_what_is_kept_in_fp32_and_missing_is_initialised_as_there(own: Folder) -> None:
    """At the dtype of the model: what is kept in fp32 is what the checkpoint has."""
    folder = own("t5", "float32", ONE_FILE)
    rewrite(folder, lambda t: t.pop("encoder.block.0.layer.1.DenseReluDense.wo.weight"))
    assert_same_model(*both(transformers.T5ForConditionalGeneration, folder, dtype="float16"))


def test_modules_kept_in_fp32_by_the_instance(own: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = own("llama")
    before = transformers.LlamaForCausalLM.__init__

    def init(self: Any, config: Any) -> None:
        before(self, config)
        self._keep_in_fp32_modules_strict = {"norm", "layers.1.mlp"}

    monkeypatch.setattr(transformers.LlamaForCausalLM, "__init__", init)
    for dtype in ("bfloat16", "float16", "float32"):
        ours, theirs = both(transformers.LlamaForCausalLM, folder, dtype=dtype)
        assert_same(ours, theirs)
    assert lowmem.load(folder, dtype="bfloat16").model.model.norm.weight.dtype == torch.float32  # type: ignore[union-attr]


# ---- how it computes ----


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "AutoModelForCausalLM"])
@pytest.mark.parametrize("way", ["eager", "sdpa", {"": "eager"}, None])
def test_attention_as_asked_for(name: str, way: Any, saved: Folder) -> None:
    ours, theirs = both(auto(name), saved("llama"), attn_implementation=way)
    assert_same_model(ours, theirs)
    loaded = lowmem.load(saved("llama"), auto_class=name, attn_implementation=way).model
    assert attention_of(loaded.config) == attention_of(theirs.config)


@pytest.mark.parametrize("way", ["telepathy", "flash_attention_2"])
def test_attention_that_is_not_there_is_refused_under_the_options_name(way: str, saved: Folder) -> None:
    try:
        transformers.LlamaForCausalLM.from_pretrained(saved("llama"), attn_implementation=way)
    except (ValueError, ImportError):
        with pytest.raises(OptionError, match=f"^attn_implementation: LlamaForCausalLM does not take '{way}'"):
            lowmem.load(saved("llama"), attn_implementation=way)
    else:
        pytest.skip("it is there on this machine")


def test_experts_that_are_not_there_are_refused_under_the_options_name(saved: Folder) -> None:
    with pytest.raises(OptionError, match=r"^experts_implementation: .*'telepathy'"):
        lowmem.load(saved("llama"), experts_implementation="telepathy")
    with pytest.raises(OptionError, match=r"^attn_implementation: expected a name"):
        lowmem.load(saved("llama"), attn_implementation=3)  # type: ignore[arg-type]


# ---- generation ----


def test_a_generation_config_that_is_given(saved: Folder) -> None:
    given = transformers.GenerationConfig(max_new_tokens=3, do_sample=True, temperature=0.5)
    ours, theirs = both(transformers.LlamaForCausalLM, saved("llama"), generation_config=given)
    assert_same_model(ours, theirs)
    assert ours.generation_config.max_new_tokens == 3


GENERATE = "def generate(model, *args, **kwargs):\n    return 'mine'\n"


def test_code_for_generate_runs_only_when_allowed(own: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = own("llama")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(GENERATE)
    left = lowmem.load(folder)
    assert any("custom_generate" in warning for warning in left.plan.warnings)
    assert torch.is_tensor(left.model.generate(torch.ones(1, 1, dtype=torch.long), max_new_tokens=1))  # type: ignore[operator]
    assert lowmem.load(folder, trust_remote_code=True).model.generate() == "mine"  # type: ignore[operator]


# ---- what lies beside the weights ----


def test_an_adapter_beside_the_weights_is_left_alone_with_a_word(own: Folder, caplog: pytest.LogCaptureFixture) -> None:
    folder = own("llama")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "x", "peft_type": "LORA"}')
    save_file({"base_model.model.x.lora_A.weight": torch.ones(1, 1)}, folder / "adapter_model.safetensors")
    result = lowmem.load(folder)
    assert any("adapter_model.safetensors" in w for w in result.plan.warnings)
    lowmem.from_pretrained(transformers.AutoModelForCausalLM, folder)
    assert "adapter_model.safetensors" in caplog.text
    assert_same_model(result.model, lowmem.load(folder).model)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantization_config": {"quant_method": method}}, f"'{method}'")
        for method in (
            *("bitsandbytes", "gptq", "awq", "aqlm", "vptq", "quanto", "eetq", "higgs", "hqq", "compressed-tensors"),
            *("fbgemm_fp8", "torchao", "bitnet", "spqr", "fp8", "quark", "fp_quant", "auto-round", "mxfp4", "modelopt"),
        )
    ]
    + [
        ({"quantization_config": {"load_in_4bit": True}}, "'unknown', load_in_4bit"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": True}},
            "'bitsandbytes', load_in_4bit",
        ),
        (
            {"quantization_config": {"load_in_8bit": True, "llm_int8_has_fp16_weight": True}},
            "'unknown', llm_int8_has_fp16_weight",
        ),
        ({"quantization_config": {"quant_method": "gptq", "load_in_8bit": True}}, "'gptq'"),
        (
            {"text_config": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}},
            "'bitsandbytes', load_in_4bit in text_config",
        ),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "'fp8' in text_config"),
        ({"compression_config": {"quant_method": "sparseml"}}, "'sparseml'"),
    ],
)
def test_quantised_weights_that_the_config_tells_of_are_refused(
    changes: dict[str, Any], said: str, own: Folder
) -> None:
    folder = own("llama")
    change_config(folder, **changes)
    for verb in (lowmem.plan, lowmem.load, lowmem.diff):
        with pytest.raises(UnsupportedError, match=rf"config\.json: the weights are quantised \({said}\)"):
            verb(folder)


_INT = torch.ones(4, 4, dtype=torch.int8)
_PACKED: list[tuple[Mapping[str, torch.Tensor], str]] = [
    ({"q_proj.weight": _INT.to(torch.uint8), "q_proj.weight.absmax": torch.ones(4)}, "4 bit"),
    ({"q_proj.qweight": _INT.to(torch.int32), "q_proj.scales": torch.ones(4, 4)}, "gptq"),
    ({"q_proj.weight": _INT.to(torch.float8_e4m3fn), "q_proj.weight_scale_inv": torch.ones(1, 1)}, "fp8"),
    ({"q_proj.weight_packed": _INT.to(torch.int32), "q_proj.weight_shape": torch.ones(2)}, "compressed-tensors"),
    ({"gate_blocks": _INT.to(torch.uint8), "gate_scales": _INT.to(torch.uint8)}, "mxfp4"),
]


@pytest.mark.parametrize(("tensors", "said"), _PACKED, ids=[said for _, said in _PACKED])
def test_quantised_weights_that_only_their_keys_tell_of_are_refused(
    tensors: Mapping[str, torch.Tensor], said: str, own: Folder
) -> None:
    folder = own("llama", "float32", ONE_FILE)
    rewrite(folder, lambda t: t.update({f"model.layers.0.self_attn.{key}": v for key, v in tensors.items()}))
    with pytest.raises(
        UnsupportedError, match=rf"model\.safetensors: the weights are quantised .*{said}.*does not say"
    ):
        lowmem.load(folder)


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"])
def test_quantised_weights_that_only_a_file_tells_of_are_refused(name: str, own: Folder) -> None:
    folder = own("llama", "float32", ONE_FILE)
    (folder / name).write_text("{}")
    # The file alone may be left from elsewhere: these weights are floats, and masks of old are no weights.
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.mask": torch.ones(4, 4, dtype=torch.uint8)}))
    lowmem.plan(folder)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}))
    with pytest.raises(UnsupportedError, match=rf"{name}: the weights are quantised"):
        lowmem.load(folder)


def test_a_vocabulary_that_differs_is_called_so(own: Folder) -> None:
    folder = own("llama")
    change_config(folder, vocab_size=90)
    with pytest.raises(KeysError, match=r"vocab_size=90; load with vocab_size=96 .*resize_token_embeddings\(90\)"):
        lowmem.load(folder)
    with pytest.raises(KeysError, match="with ignore_mismatched_sizes=True these are initialised"):
        lowmem.from_pretrained(transformers.LlamaForCausalLM, folder)
    assert any("vocabularies differ" in hint for hint in lowmem.diff(folder).suggestions)
    model: Any = lowmem.load(folder, model_kwargs={"vocab_size": 96}).model
    model.resize_token_embeddings(90)
    assert model.lm_head.weight.shape[0] == 90


# ---- code beside the checkpoint ----

REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
class MyConfig(LlamaConfig):
    model_type = "my-llama"
class MyModel(LlamaForCausalLM):
    config_class = MyConfig
class MyBase(LlamaModel):
    config_class = MyConfig
"""


@pytest.mark.parametrize("model_type", ["llama", "my-llama"])
@pytest.mark.parametrize("name", ["AutoModel", "AutoModelForCausalLM"])
def test_an_auto_class_takes_code_beside_the_checkpoint_only_when_allowed(
    name: str, model_type: str, own: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = own("llama")
    (folder / "mine.py").write_text(REMOTE)
    auto_map = {"AutoModelForCausalLM": "mine.MyModel", "AutoModel": "mine.MyBase"}
    if model_type == "my-llama":
        auto_map["AutoConfig"] = "mine.MyConfig"
    change_config(folder, architectures=["MyModel"], model_type=model_type, auto_map=auto_map)
    if model_type == "my-llama":
        with pytest.raises((UnsupportedError, ModelError), match="trust_remote_code=True"):
            lowmem.from_pretrained(auto(name), folder)
    else:
        assert_same_model(*both(auto(name), folder))
    torch.manual_seed(1)
    ours = lowmem.from_pretrained(auto(name), folder, trust_remote_code=True)
    theirs = auto(name).from_pretrained(folder, trust_remote_code=True)
    assert type(ours).__name__ in ("MyModel", "MyBase")
    assert_same_model(ours, theirs)


# ---- models of several models ----


def tiny(config: str, **more: Any) -> Any:
    text = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return getattr(transformers, config)(**{**text, "intermediate_size": 48, **more})


def llava() -> Any:
    vision = tiny("CLIPVisionConfig", image_size=16, patch_size=8, projection_dim=16, dtype="float32")
    text = tiny("LlamaConfig", num_key_value_heads=2, max_position_embeddings=64)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=95)
    return transformers.LlavaForConditionalGeneration(config)


def blip_2() -> Any:
    config = transformers.Blip2Config(
        vision_config=tiny("Blip2VisionConfig", image_size=16, patch_size=8).to_dict(),
        qformer_config=tiny("Blip2QFormerConfig", encoder_hidden_size=32, cross_attention_frequency=2).to_dict(),
        text_config=tiny("OPTConfig", ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32).to_dict(),
        num_query_tokens=4,
        image_token_index=95,
    )
    return transformers.Blip2ForConditionalGeneration(config)


def vision_encoder_decoder() -> Any:
    decoder = tiny("BertConfig", is_decoder=True, add_cross_attention=True, max_position_embeddings=40)
    encoder = tiny("ViTConfig", image_size=16, patch_size=8)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    return transformers.VisionEncoderDecoderModel(config)


def encoder_decoder() -> Any:
    decoder = tiny("BertConfig", is_decoder=True, add_cross_attention=True, max_position_embeddings=40)
    encoder = tiny("BertConfig", max_position_embeddings=40)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    return transformers.EncoderDecoderModel(config)


def speech_encoder_decoder() -> Any:
    decoder = tiny("BertConfig", is_decoder=True, add_cross_attention=True, max_position_embeddings=40)
    encoder = tiny("Wav2Vec2Config", conv_dim=(32,), conv_stride=(5,), conv_kernel=(10,), num_conv_pos_embeddings=16)
    encoder.num_feat_extract_layers = 1
    config = transformers.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    return transformers.SpeechEncoderDecoderModel(config)


COMPOSITES = [llava, blip_2, vision_encoder_decoder, encoder_decoder, speech_encoder_decoder]


@pytest.fixture(scope="module")
def composite(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[], Any]], Path]:
    """A folder with a composite model, in bf16, some of whose sub-configs say another dtype."""
    made: dict[Callable[[], Any], Path] = {}

    def save(make: Callable[[], Any]) -> Path:
        if make not in made:
            made[make] = tmp_path_factory.mktemp(make.__name__)
            torch.manual_seed(3)
            make().to(torch.bfloat16).save_pretrained(made[make], max_shard_size="60KB")
        return made[make]

    return save


@pytest.mark.parametrize("dtype", ["auto", "float32", "float16"])
@pytest.mark.parametrize("make", COMPOSITES, ids=lambda make: make.__name__)
def test_a_model_of_several_models(
    make: Callable[[], Any], dtype: str, composite: Callable[[Callable[[], Any]], Path]
) -> None:
    folder = composite(make)
    cls = auto(json.loads((folder / "config.json").read_text())["architectures"][0])
    torch.manual_seed(11)
    theirs = cls.from_pretrained(folder, dtype=dtype)
    torch.manual_seed(11)
    assert_same(lowmem.load(folder, dtype=dtype).model, theirs)
    torch.manual_seed(11)
    assert_same(lowmem.from_pretrained(cls, folder, dtype=dtype), theirs)


def test_a_part_of_a_model_of_several_models(composite: Callable[[Callable[[], Any]], Path]) -> None:
    """Attention may be said part by part; a part is found by its prefix, where transformers leaves it untrained."""
    folder = composite(llava)
    ways = {"text_config": "eager", "vision_config": "sdpa"}
    for cls in (transformers.LlavaForConditionalGeneration, transformers.AutoModelForImageTextToText):
        assert_same(*both(cls, folder, attn_implementation=ways))
        assert_same(*both(cls, folder, attn_implementation="eager"))
    assert_same(*both(transformers.AutoModel, folder))
    whole, part = lowmem.load(folder).model, lowmem.load(folder, auto_class="CLIPVisionModel").model
    theirs = transformers.CLIPVisionModel.from_pretrained(folder)
    assert dtypes_of(part.config) == dtypes_of(theirs.config)  # type: ignore[arg-type]
    held = [tensor for name, tensor in every_tensor(whole).items() if "vision_tower." in name]
    assert all(same(a, b.to(a.dtype)) for a, b in zip(every_tensor(part).values(), held, strict=True))


def test_the_part_of_a_composite_model_that_an_auto_class_means(tmp_path: Path) -> None:
    """AutoModelForCausalLM takes the text model of some, with the config of that part."""
    config = transformers.MllamaConfig(
        text_config=tiny(
            "MllamaTextConfig", num_hidden_layers=3, num_key_value_heads=2, cross_attention_layers=[1], pad_token_id=0
        ).to_dict(),
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_global_layers": 1,
            "attention_heads": 4,
            "intermediate_size": 48,
            "image_size": 16,
            "patch_size": 4,
            "vision_output_dim": 64,
            "intermediate_layers_indices": [0],
            "max_num_tiles": 2,
            "supported_aspect_ratios": [[1, 1], [1, 2]],
        },
    )
    torch.manual_seed(3)
    transformers.MllamaForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(tmp_path)
    for options in ({}, {"dtype": "float32"}, {"attn_implementation": "eager"}):
        ours, theirs = both(transformers.AutoModelForCausalLM, tmp_path, **options)
        assert type(ours).__name__ == "MllamaForCausalLM"
        assert_same(ours, theirs)


def test_sub_configs_with_a_dtype_of_their_own(tmp_path: Path, composite: Callable[[Callable[[], Any]], Path]) -> None:
    folder = tmp_path / "llava"
    shutil.copytree(composite(llava), folder)
    table = json.loads((folder / "config.json").read_text())
    for whole in ("bfloat16", None, {"": "float16", "text_config": "bfloat16"}):
        table["dtype"] = whole
        table["text_config"]["dtype"], table["vision_config"]["dtype"] = "float16", "float32"
        (folder / "config.json").write_text(json.dumps(table))
        for cls in (transformers.LlavaForConditionalGeneration, transformers.AutoModelForImageTextToText):
            for dtype in ("auto", "float32"):
                assert_same(*both(cls, folder, dtype=dtype))


# ---- the drop-in's arguments ----


def arguments_of_from_pretrained() -> set[str]:
    """Every name that transformers' own signature or body takes."""
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    source = inspect.getsource(transformers.PreTrainedModel.from_pretrained.__func__)  # type: ignore[attr-defined]
    source += inspect.getsource(_BaseAutoModelClass.from_pretrained.__func__)  # type: ignore[attr-defined]
    signature = inspect.signature(transformers.PreTrainedModel.from_pretrained).parameters
    named = {name for name, p in signature.items() if p.kind is p.KEYWORD_ONLY or p.default is not p.empty}
    for line in source.split("\n"):
        for opening in ('kwargs.pop("', 'kwargs.get("'):
            head, found, tail = line.partition(opening)
            if found and not head.rstrip().endswith(("model_", "adapter_", "hub_")):
                named.add(tail.partition('"')[0])
    return named


# What each argument of from_pretrained is to the drop-in.
SERVED = {
    *("config", "ignore_mismatched_sizes", "local_files_only", "token", "revision", "use_safetensors", "weights_only"),
    *("disable_mmap", "tqdm_class", "output_loading_info", "_from_pipeline", "_from_auto", "dtype", "torch_dtype"),
    *("device_map", "max_memory", "offload_folder", "subfolder", "variant", "generation_config", "trust_remote_code"),
    *("key_mapping", "attn_implementation", "experts_implementation", "quantization_config"),
    "distributed_config",
}


def test_every_argument_of_from_pretrained_is_served_or_refused_or_ignored_as_there() -> None:
    known = SERVED | set(_REFUSED) | set(_OF_THE_HUB) | set(_RETIRED)
    assert arguments_of_from_pretrained() <= known
    assert set(_OWN) <= set(inspect.signature(lowmem.load).parameters)
    assert not set(_OWN) & known


ASKS_FOR_SOMETHING: dict[str, Any] = {
    "state_dict": {},
    "gguf_file": "model.gguf",
    "tp_plan": "auto",
    "tp_size": 2,
    "device_mesh": object(),
    "fusion_config": {"patch_embeddings": True},
    "use_kernels": True,
    "kernel_config": object(),
    "allow_all_kernels": True,
    "adapter_kwargs": {"revision": "x"},
    "adapter_name": "mine",
    "offload_buffers": True,
}


def test_the_arguments_that_are_refused_are_all_tried() -> None:
    assert set(ASKS_FOR_SOMETHING) == set(_REFUSED)


@pytest.mark.parametrize("name", _REFUSED)
def test_an_argument_that_lowmem_cannot_serve_is_refused_by_name(name: str, saved: Folder) -> None:
    idle = _REFUSED[name][0]
    with pytest.raises(UnsupportedError, match=f"^{name}: lowmem does not take"):
        lowmem.from_pretrained(transformers.LlamaForCausalLM, saved("llama"), **{name: ASKS_FOR_SOMETHING[name]})
    for value in idle:
        assert lowmem.from_pretrained(transformers.LlamaForCausalLM, saved("llama"), **{name: value})


@pytest.mark.parametrize("name", _OF_THE_HUB)
def test_an_argument_about_fetching_matters_for_models_of_the_hub_only(name: str, saved: Folder) -> None:
    assert lowmem.from_pretrained(transformers.LlamaForCausalLM, saved("llama"), **{name: "x"})
    with pytest.raises(UnsupportedError, match=f"^{name}: "):
        lowmem.from_pretrained(transformers.LlamaForCausalLM, "org/none", **{name: "x"})


def test_arguments_that_transformers_ignores_are_ignored(saved: Folder) -> None:
    options: dict[str, Any] = dict.fromkeys(_RETIRED, True)
    options.update(weights_only=False, disable_mmap=True, local_files_only=True, revision="x", token="x")
    ours = lowmem.from_pretrained(transformers.LlamaForCausalLM, saved("llama"), **options)
    assert_same_model(ours, transformers.LlamaForCausalLM.from_pretrained(saved("llama")))


def test_options_of_load_are_taken_too(saved: Folder) -> None:
    seen: list[Any] = []
    model = lowmem.from_pretrained(
        transformers.AutoModelForCausalLM,
        saved("llama"),
        dtype="bfloat16",
        ram="1GiB",
        staging="1MiB",
        keep_fp32=["*norm*"],
        residency="copy",
        io="buffered",
        progress=seen.append,
    )
    assert model.model.norm.weight.dtype == torch.float32
    assert seen
    with pytest.raises(lowmem.BudgetError):
        lowmem.from_pretrained(transformers.AutoModelForCausalLM, saved("llama"), dtype="bfloat16", ram="2KiB")


@pytest.mark.parametrize("dtype", [None, "auto", "float16", torch.bfloat16])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_dtype_by_its_old_and_its_new_name(key: str, dtype: Any, saved: Folder) -> None:
    for cls in (transformers.LlamaForCausalLM, transformers.AutoModelForCausalLM):
        assert_same_model(*both(cls, saved("llama"), **{key: dtype}))


@pytest.mark.parametrize(
    "device_map",
    [
        "cpu",
        "auto",
        {"": "cpu"},
        torch.device("cpu"),
        {"model": "cpu", "lm_head": "disk"},
        {
            **{f"model.{name}": "cpu" for name in ("embed_tokens", "layers.0", "layers.2", "norm", "rotary_emb")},
            "model.layers.1": "disk",
            "lm_head": "cpu",
        },
    ],
    ids=["cpu", "auto", "all", "device", "head", "layer"],
)
def test_a_device_map_as_there(device_map: Any, saved: Folder, tmp_path: Path) -> None:
    options = {"device_map": device_map, "offload_folder": str(tmp_path)}
    ours, theirs = both(transformers.LlamaForCausalLM, saved("llama"), **options)
    if any(is_on_disk(parameter) for parameter in ours.parameters()):
        # Theirs are on meta and need hooks; ours are file pages on the CPU, and nothing says otherwise.
        assert not hasattr(ours, "hf_device_map")
        assert {str(t.device) for t in every_tensor(ours).values()} == {"cpu"}
        options["dispatch"] = "accelerate"
        ours = lowmem.from_pretrained(transformers.LlamaForCausalLM, saved("llama"), **options)
    assert getattr(ours, "hf_device_map", None) == getattr(theirs, "hf_device_map", None)
    assert [str(t.device) for t in every_tensor(ours).values()] == [
        str(t.device) for t in every_tensor(theirs).values()
    ]


def test_without_a_mapping_the_files_can_go(own: Folder) -> None:
    folder = own("llama")
    ours, theirs = both(transformers.LlamaForCausalLM, folder, disable_mmap=True)
    shutil.rmtree(folder)
    assert_same_model(ours, theirs)


def test_the_default_device_counts(saved: Folder) -> None:
    with pytest.raises(OptionError, match="meta"), torch.device("meta"):
        lowmem.from_pretrained(transformers.LlamaForCausalLM, saved("llama"))


def test_mismatched_tensors_are_refused_or_initialised_and_told(own: Folder, caplog: pytest.LogCaptureFixture) -> None:
    folder = own("vit")
    with pytest.raises(KeysError, match="another shape"):
        lowmem.from_pretrained(transformers.ViTForImageClassification, folder, num_labels=3)
    options: dict[str, Any] = {"num_labels": 3, "ignore_mismatched_sizes": True, "output_loading_info": True}
    (ours, info), (theirs, expected) = both(transformers.ViTForImageClassification, folder, **options)
    assert_same(ours, theirs)
    assert info == expected
    assert info["mismatched_keys"]


def test_what_is_missing_is_logged_by_transformers(own: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("transformers.modeling_utils")
    told: list[str] = []
    monkeypatch.setattr(logger, "warning", lambda text, *_: told.append(text))
    lowmem.from_pretrained(transformers.AutoModelForTokenClassification, own("bert"))
    assert len(told) == 1
    assert "classifier.weight" in told[0]
    assert "MISSING" in told[0]


def test_a_table_of_keys_is_undone_when_the_model_is_saved(own: Folder, tmp_path: Path) -> None:
    folder = own("llama", "float32", ONE_FILE)

    def other(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace("model.layers", "trunk.blocks")] = tensors.pop(key)

    rewrite(folder, other)
    table = {r"^trunk\.blocks": "model.layers"}
    ours, theirs = both(transformers.LlamaForCausalLM, folder, key_mapping=table)
    assert_same_model(ours, theirs)
    ours.save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved/model.safetensors").keys() == load_file(folder / "model.safetensors").keys()


def test_a_table_of_keys_goes_before_the_renames_of_the_model_and_gives_way_to_its_names(own: Folder) -> None:
    """What fits nothing is reported as renamed; a rule that leads away from a name of the model is not followed."""
    folder = own("qwen3-moe", "float32", ONE_FILE)

    def other(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace("model.layers", "trunk.blocks")] = tensors.pop(key)
        tensors["old.extra"] = torch.ones(2)

    rewrite(folder, other)
    table = {r"^trunk\.blocks": "model.layers", r"^old\.": "new.", r"^lm_head": "elsewhere"}
    options: dict[str, Any] = {"key_mapping": table, "output_loading_info": True}
    (ours, info), (theirs, expected) = both(transformers.Qwen3MoeForCausalLM, folder, **options)
    assert_same_model(ours, theirs)
    assert info == expected
    assert info["unexpected_keys"] == {"new.extra"}
    assert not info["missing_keys"]


@pytest.mark.parametrize("table", [["a"], {"a": 1}, {"(": "b"}])
def test_a_table_of_keys_that_means_nothing_is_refused(saved: Folder, table: Any) -> None:
    with pytest.raises(OptionError, match=r"^key_mapping: "):
        lowmem.from_pretrained(transformers.LlamaForCausalLM, saved("llama"), key_mapping=table)


def test_the_files_that_are_chosen_in_a_folder(own: Folder) -> None:
    """`variant`, `subfolder` and `use_safetensors`, each with weights of its own beside the others."""
    folder, cls = own("llama", "float32", ONE_FILE), transformers.LlamaForCausalLM
    state = {key: value + 1 for key, value in load_file(folder / "model.safetensors").items()}
    torch.save(state, folder / "pytorch_model.bin")
    save_file({key: value + 2 for key, value in state.items()}, folder / "model.fp16.safetensors", {"format": "pt"})
    shutil.copytree(folder, folder / "inner")
    rewrite(folder / "inner", lambda t: t.update({key: value + 3 for key, value in t.items()}))
    for options in (
        {"use_safetensors": True},
        {"use_safetensors": False},
        {"variant": "fp16"},
        {"subfolder": "inner"},
        {},
    ):
        assert_same_model(*both(cls, folder, **options))
    with pytest.raises(SourceError, match="no weights of the variant bf16"):
        lowmem.from_pretrained(cls, folder, variant="bf16")
    with pytest.raises(SourceError, match=r"expected model\.bf16\.safetensors or .*, found neither"):
        lowmem.from_pretrained(cls, folder, variant="bf16", use_safetensors=True)


def test_options_of_the_hub_are_ignored_for_what_is_on_disk(own: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whatever path: a folder, one below `~`, a file."""
    folder, cls = own("llama", "float32", ONE_FILE), transformers.LlamaForCausalLM
    monkeypatch.setenv("HOME", str(folder.parent))
    options: dict[str, Any] = {"cache_dir": "elsewhere", "revision": "v1", "force_download": True}
    theirs = cls.from_pretrained(folder, **options)
    for source in (folder, f"~/{folder.name}", folder / "model.safetensors"):
        ours, expected = every_tensor(lowmem.from_pretrained(cls, source, **options)), every_tensor(theirs)
        assert ours.keys() == expected.keys()
        assert all(same(ours[name], tensor) for name, tensor in expected.items())
    with pytest.raises(UnsupportedError, match=r"^use_safetensors: .* for a local folder only"):
        lowmem.from_pretrained(cls, folder / "model.safetensors", use_safetensors=True)


def test_a_model_of_the_hubs_cache(saved: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name, revision and subfolder; it is called by that name, whichever way it is loaded."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    files = {path.name: path.read_bytes() for path in saved("llama").iterdir()}
    other = {f"inner/{path.name}": path.read_bytes() for path in saved("llama-tied").iterdir()}
    repository(tmp_path, "org/tiny", files)
    repository(tmp_path, "org/tiny", {**files, **other}, commit="f" * 40, ref="v1")
    cls = transformers.LlamaForCausalLM
    choices: list[dict[str, Any]] = [{}, {"revision": "v1"}, {"revision": "v1", "subfolder": "inner"}]
    for options in choices:
        theirs = cls.from_pretrained("org/tiny", cache_dir=tmp_path, **options)
        assert_same_model(lowmem.from_pretrained(cls, "org/tiny", **options), theirs)
        assert_same_model(lowmem.load("org/tiny", **options).model, theirs)
    with pytest.raises(SourceError, match="org/other"):
        lowmem.from_pretrained(cls, "org/other")
    with pytest.raises(OptionError, match="contradicts local_files_only"):
        lowmem.from_pretrained(cls, "org/other", local_files_only=True, download=True)
    with pytest.raises(UnsupportedError, match=r"^use_safetensors: "):
        lowmem.from_pretrained(cls, "org/tiny", use_safetensors=False)


@pytest.mark.parametrize("source", ["str", "slash", "path"])
def test_the_model_is_called_what_the_caller_called_it(
    source: str, saved: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved("llama")
    monkeypatch.chdir(folder.parent)
    given: Any = {"str": folder.name, "slash": f"{folder.name}/", "path": Path(folder.name)}[source]
    ours, theirs = both(transformers.LlamaForCausalLM, given)
    assert ours.name_or_path == theirs.name_or_path
    assert ours.config._name_or_path == theirs.config._name_or_path


@pytest.mark.parametrize("cls", ["LlamaModel", 3, None, torch.nn.Linear])
def test_something_else_than_a_class_is_refused(cls: Any, saved: Folder) -> None:
    with pytest.raises(OptionError, match=r"^(cls|auto_class): expected a class of transformers"):
        lowmem.from_pretrained(cls, saved("llama"))


def test_without_a_path_there_are_no_weights() -> None:
    with pytest.raises(UnsupportedError, match=r"^pretrained_model_name_or_path"):
        lowmem.from_pretrained(transformers.LlamaForCausalLM, None)  # type: ignore[arg-type]
    with pytest.raises(LowmemError):
        lowmem.from_pretrained(transformers.LlamaForCausalLM, "no/such/model/here")


@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_a_larger_model_around_a_loaded_one_leaves_it_alone(kind: str, saved: Folder) -> None:
    """Its own `post_init` initialises what is not marked as loaded."""
    expected = every_tensor(model_class(saved(kind)).from_pretrained(saved(kind)))

    class Larger(transformers.PreTrainedModel):
        config_class = transformers.AutoConfig.from_pretrained(saved(kind)).__class__
        inner: Any

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.inner = lowmem.load(saved(kind)).model
            self.head = torch.nn.Linear(4, 4)
            self.post_init()

    found = every_tensor(Larger(transformers.AutoConfig.from_pretrained(saved(kind))).inner)
    assert all(same(found[name], tensor) for name, tensor in expected.items())


def test_buffers_of_every_kind(tmp_path: Path) -> None:
    """Integers stay, averages are cast with the rest."""
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    torch.manual_seed(3)
    model = transformers.ResNetForImageClassification(config)
    model(torch.randn(4, 3, 32, 32))
    model.save_pretrained(tmp_path)
    for dtype in ("auto", "bfloat16", "float16", "float64"):
        assert_same(*both(transformers.ResNetForImageClassification, tmp_path, dtype=dtype))


def test_fused_experts_computed_as_asked_for(tmp_path: Path) -> None:
    config = tiny("Qwen3MoeConfig", moe_intermediate_size=16, num_key_value_heads=2, head_dim=8, num_experts=4)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    for way in ("eager", "batched_mm"):
        for name in ("Qwen3MoeForCausalLM", "AutoModel", "AutoModelForSequenceClassification"):
            options = {"experts_implementation": way, "output_loading_info": True}
            (ours, info), (theirs, expected) = both(auto(name), tmp_path, **options)
            assert_same(ours, theirs)
            assert info == expected
            assert ours.config._experts_implementation == theirs.config._experts_implementation == way


def test_what_a_class_does_in_a_from_pretrained_of_its_own(own: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(transformers.LlamaForCausalLM):
        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            model = super().from_pretrained(*args, **kwargs)
            model.generation_config.max_length = model.generation_config.max_length or 7
            model.told = "told"
            return model

    ours, theirs = both(Own, own("llama"))
    assert_same_model(ours, theirs)
    assert ours.told == "told"
    assert type(ours) is Own


def test_the_shell_takes_a_class(saved: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    from lowmem.cli import main

    arguments = ["plan", str(saved("llama")), "--json", "--auto-class", "AutoModel", "--attn-implementation", "eager"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["unexpected"] == ["lm_head.weight"]
    assert main([*arguments[:2], "--auto-class", "AutoModle"]) == 2


def test_a_new_model_is_made_for_every_call(saved: Folder) -> None:
    one, other = (lowmem.from_pretrained(transformers.LlamaForCausalLM, saved("llama")) for _ in range(2))
    assert one is not other
    assert one.config is not other.config
    assert new_model("llama").config is not one.config


def test_what_is_tied_to_a_tensor_of_another_shape_is_not_missing(saved: Folder) -> None:
    options: dict[str, Any] = {"vocab_size": 64, "ignore_mismatched_sizes": True, "output_loading_info": True}
    expected = transformers.T5ForConditionalGeneration.from_pretrained(saved("t5"), **options)[1]
    found = lowmem.from_pretrained(transformers.T5ForConditionalGeneration, saved("t5"), **options)[1]
    assert expected["mismatched_keys"]
    assert not expected["missing_keys"]
    assert found == expected


def test_dtypes_of_parts_that_do_nothing_are_told(saved: Folder) -> None:
    plan = lowmem.plan(saved("llama"), dtype={"": "bfloat16", "vision_config": "float16"})
    assert any("'vision_config' do nothing" in warning for warning in plan.warnings)


def test_errors_are_of_the_kinds_that_callers_of_from_pretrained_catch(saved: Folder, tmp_path: Path) -> None:
    folder = saved("llama")
    calls: list[tuple[type[Exception], Path, dict[str, Any]]] = [
        (OSError, folder, {"variant": "fp16"}),
        (OSError, tmp_path / "nowhere", {}),
        (RuntimeError, folder, {"vocab_size": 64}),
        (TypeError, folder, {"max_memroy": {}}),
    ]
    for kind, path, options in calls:
        for function in (transformers.LlamaForCausalLM.from_pretrained, ours):
            with pytest.raises(kind):
                function(path, **options)
    with pytest.raises(TypeError, match="Did you mean 'max_memory'"):
        ours(folder, max_memroy={})


def ours(path: Path, **options: Any) -> Any:
    return lowmem.from_pretrained(transformers.LlamaForCausalLM, path, **options)
