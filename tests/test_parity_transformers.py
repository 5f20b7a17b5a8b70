"""A loaded transformers model is the one that `from_pretrained` gives, bit for bit; what differs is refused by text."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

import transformers
from tiny_models import (
    KINDS,
    assert_same_model,
    change_config,
    every_tensor,
    model_class,
    new_model,
    outputs_of,
    same,
    ties_of,
)

import lowmem
from lowmem.errors import KeysError, LowmemError, ModelError, UnsupportedError

pytestmark = pytest.mark.usefixtures("one_thread")

Folder = Callable[..., Path]
ONE_FILE = "1GB"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity_warning()


def reference(folder: Path, **options: Any) -> Any:
    return model_class(folder).from_pretrained(folder, **options)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a checkpoint of one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({k: v.clone() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


# ---- the same model ----


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("source", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_from_pretrained(kind: str, source: str, dtype: str, saved: Folder) -> None:
    """Every tensor, dtype, tie, flag and config value, and what the model computes."""
    folder = saved(kind, source)
    assert len(list(folder.glob("*.safetensors"))) > 2
    result = lowmem.load(folder, dtype=dtype)
    assert_same_model(result.model, reference(folder, dtype=dtype))
    assert not result.plan.warnings


@pytest.mark.parametrize("kind", KINDS)
def test_one_file_or_many_shards_give_the_same(kind: str, saved: Folder) -> None:
    one, many = (lowmem.load(saved(kind, "float32", shard)).model for shard in (ONE_FILE, "20KB"))
    many.config.name_or_path = one.config.name_or_path
    many.name_or_path = one.name_or_path
    assert_same_model(one, many)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "vit"])
@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_a_copied_model_outlives_its_files(kind: str, dtype: str, own: Folder) -> None:
    folder = own(kind)
    theirs = reference(folder, dtype=dtype)
    ours = lowmem.load(folder, dtype=dtype, residency="copy").model
    shutil.rmtree(folder)
    assert_same_model(ours, theirs)


def test_t5_keeps_its_wo_in_fp32_where_the_rest_is_fp16(saved: Folder) -> None:
    model = lowmem.load(saved("t5"), dtype="float16").model
    wo = {name for name, tensor in every_tensor(model).items() if tensor.dtype == torch.float32}
    assert wo == {name for name in every_tensor(model) if ".wo." in name}
    assert wo
    assert model.dtype == model.config.dtype == torch.float16


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2", "t5", "gemma", "bert-mlm"])
def test_tied_weights_are_one_object(kind: str, saved: Folder) -> None:
    """Neither a cast nor a copy makes two of one."""
    for options in ({}, {"dtype": "bfloat16"}, {"residency": "copy"}):
        model = lowmem.load(saved(kind), **options).model
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert ties_of(model)


def test_an_untied_head_stays_a_parameter_of_its_own(saved: Folder) -> None:
    model = lowmem.load(saved("llama")).model
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not ties_of(model)


def test_the_loaded_model_saves_what_it_was_loaded_from(saved: Folder, tmp_path: Path) -> None:
    """The keys and values of `save_pretrained` are those of the source."""
    for kind in KINDS:
        source = saved(kind, "float32", ONE_FILE)
        lowmem.load(source).model.save_pretrained(tmp_path / kind)
        ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / kind, source))
        assert ours.keys() == theirs.keys(), kind
        assert all(same(ours[key], theirs[key]) for key in theirs), kind
        assert (tmp_path / kind / "config.json").read_text() == (source / "config.json").read_text()


def test_the_loaded_model_trains(saved: Folder) -> None:
    """Mapped parameters take gradients and steps, and the file keeps its bytes."""
    folder = saved("llama", "float32", ONE_FILE)
    before = (folder / "model.safetensors").read_bytes()
    model = lowmem.load(folder).model
    ids = torch.arange(3, 10)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert (folder / "model.safetensors").read_bytes() == before
    assert not same(model.lm_head.weight, lowmem.load(folder).model.lm_head.weight)


def test_the_old_torch_dtype_key_is_the_dtype(own: Folder) -> None:
    folder = own("llama", "bfloat16")
    change_config(folder, dtype=None, torch_dtype="float16")
    ours = lowmem.load(folder).model
    assert ours.dtype == torch.float16
    assert_same_model(ours, reference(folder))


@pytest.mark.parametrize("source", ["float32", "bfloat16"])
def test_without_a_dtype_in_the_config_the_checkpoint_decides(source: str, own: Folder) -> None:
    folder = own("llama", source)
    change_config(folder, dtype=None)
    ours = lowmem.load(folder).model
    assert ours.dtype == getattr(torch, source)
    assert_same_model(ours, reference(folder))


def test_without_architectures_the_headless_model_is_loaded(own: Folder) -> None:
    folder = own("bert")
    change_config(folder, architectures=None)
    ours = lowmem.load(folder).model
    assert_same_model(ours, transformers.AutoModel.from_pretrained(folder))


def test_without_a_generation_config_one_is_made_from_the_config(own: Folder) -> None:
    folder = own("gpt2")
    (folder / "generation_config.json").unlink()
    change_config(folder, max_length=17)
    assert_same_model(lowmem.load(folder).model, reference(folder))


def test_mixed_dtypes_in_one_checkpoint_become_the_one_that_is_asked_for(own: Folder) -> None:
    folder = own("llama", "float32", ONE_FILE)

    def mix(tensors: dict[str, torch.Tensor]) -> None:
        for i, key in enumerate(sorted(tensors)):
            tensors[key] = tensors[key].to((torch.float32, torch.bfloat16, torch.float16, torch.float64)[i % 4])

    rewrite(folder, mix)
    for dtype in ("auto", "bfloat16"):
        assert_same_model(lowmem.load(folder, dtype=dtype).model, reference(folder, dtype=dtype))


# ---- ties that the checkpoint holds twice ----


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2", "t5", "gemma", "bert-mlm"])
@pytest.mark.parametrize("equal", [True, False], ids=["equal", "different"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_tied_tensors_in_the_checkpoint(kind: str, equal: bool, dtype: str, own: Folder) -> None:
    """Equal ones are tied, different ones are kept apart, as transformers does."""
    folder = own(kind, "float32", ONE_FILE)
    declared = new_model(kind).all_tied_weights_keys
    head, source = next((t, s) for t, s in declared.items() if t.endswith("weight"))

    def double(tensors: dict[str, torch.Tensor]) -> None:
        tensors[head] = tensors[source].clone()
        if not equal:
            tensors[head][0] += 1

    rewrite(folder, double)
    ours = lowmem.load(folder, dtype=dtype).model
    assert_same_model(ours, reference(folder, dtype=dtype))
    found = every_tensor(ours)
    assert (found[head] is found[source]) is equal


def test_a_head_in_the_checkpoint_feeds_the_embedding_that_is_not(own: Folder) -> None:
    """Ties work both ways."""
    folder = own("llama-tied", "float32", ONE_FILE)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    assert_same_model(lowmem.load(folder).model, reference(folder))


# ---- keys that differ ----


def without(*keys: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for key in keys:
            del tensors[key]

    return drop


def both_seeded(folder: Path, **options: Any) -> tuple[Any, Any, Any]:
    torch.manual_seed(11)
    result = lowmem.load(folder, strict=False, **options)
    torch.manual_seed(11)
    options.pop("residency", None)
    return result.model, reference(folder, **options), result.plan


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("llama", ["lm_head.weight"]),
        ("llama", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"]),
        ("llama-tied", ["model.embed_tokens.weight"]),
        ("gpt2", ["transformer.h.1.mlp.c_fc.weight", "transformer.h.1.mlp.c_fc.bias", "transformer.ln_f.bias"]),
        ("t5", ["encoder.block.0.layer.0.SelfAttention.q.weight"]),
        ("vit", ["classifier.weight", "vit.embeddings.cls_token"]),
    ],
)
def test_missing_tensors_get_the_values_that_from_pretrained_would_give(
    kind: str, keys: list[str], dtype: str, own: Folder
) -> None:
    """Same seed, same values; the plan names them."""
    folder = own(kind, "float32", ONE_FILE)
    rewrite(folder, without(*keys))
    ours, theirs, plan = both_seeded(folder, dtype=dtype)
    assert_same_model(ours, theirs)
    assert set(keys) <= set(plan.to_dict()["missing"])
    assert any(repr(key) in warning for key in keys for warning in plan.warnings)


def test_a_missing_head_is_refused_when_strict(own: Folder) -> None:
    folder = own("llama", "float32", ONE_FILE)
    rewrite(folder, without("lm_head.weight"))
    with pytest.raises(KeysError, match=r"1 of the model's tensors are not in the checkpoint: 'lm_head.weight'"):
        lowmem.load(folder)
    with pytest.raises(KeysError, match="strict=False"):
        lowmem.plan(folder)


def test_keys_that_the_model_lacks_are_named_and_not_read(own: Folder) -> None:
    folder = own("llama", "float32", ONE_FILE)
    rewrite(folder, lambda t: t.update({"value_head.weight": torch.ones(4, 4)}))
    result = lowmem.load(folder, residency="copy")
    assert_same_model(result.model, reference(folder))
    assert result.plan.mapping.unexpected == ("value_head.weight",)
    assert any("'value_head.weight'" in warning for warning in result.plan.warnings)
    assert result.plan.bytes_read == lowmem.inspect(folder).nbytes - 64


def test_keys_of_old_checkpoints_that_became_transient_are_nothing_to_report(own: Folder) -> None:
    folder = own("llama", "float32", ONE_FILE)
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    result = lowmem.load(folder)
    assert not result.plan.mapping.unexpected
    assert not result.plan.warnings
    assert_same_model(result.model, reference(folder))


def test_another_shape_is_refused_with_both_shapes(own: Folder) -> None:
    folder = own("llama")
    change_config(folder, vocab_size=90)
    with pytest.raises(KeysError) as caught:
        lowmem.load(folder)
    text = str(caught.value)
    assert str(folder) in text
    assert "'lm_head.weight': expected [90, 32], found [96, 32]" in text
    assert "2 tensors have another shape" in text


def test_another_shape_is_initialised_when_not_strict(own: Folder) -> None:
    folder = own("llama")
    change_config(folder, vocab_size=90)
    torch.manual_seed(11)
    ours = lowmem.load(folder, strict=False).model
    torch.manual_seed(11)
    assert_same_model(ours, reference(folder, ignore_mismatched_sizes=True))


def test_names_without_the_usual_prefix_are_found(own: Folder) -> None:
    """A checkpoint of the headless model into the model with a head."""
    folder = own("bert", "float32", ONE_FILE)
    change_config(folder, architectures=["BertForMaskedLM"])
    with pytest.raises(KeysError, match=r"cls\.predictions"):
        lowmem.load(folder)
    ours, theirs, plan = both_seeded(folder)
    assert_same_model(ours, theirs)
    assert all(name.startswith("cls.") for name in plan.mapping.missing)
    assert list(plan.mapping.unexpected) == ["pooler.dense.bias", "pooler.dense.weight"]


def test_names_with_a_prefix_too_many_are_found(own: Folder) -> None:
    """A checkpoint of the model with a head into the headless one."""
    folder = own("bert-mlm", "float32", ONE_FILE)
    change_config(folder, architectures=["BertModel"])
    with pytest.raises(KeysError, match=r"pooler\.dense"):
        lowmem.load(folder)
    ours, theirs, plan = both_seeded(folder)
    assert_same_model(ours, theirs)
    assert set(plan.mapping.missing) == {"pooler.dense.bias", "pooler.dense.weight"}
    assert plan.mapping.unexpected
    assert all(key.startswith("cls.") for key in plan.mapping.unexpected)


def test_old_layer_norm_names_are_found(own: Folder) -> None:
    """`gamma` and `beta`, as TensorFlow's BERT had them."""
    folder = own("bert", "float32", ONE_FILE)

    def age(tensors: dict[str, torch.Tensor]) -> None:
        for key in [k for k in tensors if "LayerNorm" in k]:
            old = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[old] = tensors.pop(key)

    rewrite(folder, age)
    assert_same_model(lowmem.load(folder).model, reference(folder))


# ---- a model that the caller has ----


def llama_config(folder: Path) -> Any:
    return transformers.AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_a_callable_makes_the_model(dtype: str, saved: Folder) -> None:
    """Its parameters take the checkpoint's dtype or the requested one."""
    folder = saved("llama", "bfloat16")
    ours = lowmem.load(folder, model=lambda: transformers.LlamaForCausalLM(llama_config(folder)), dtype=dtype).model
    theirs = every_tensor(reference(folder, dtype=dtype))
    for name, tensor in every_tensor(ours).items():
        assert same(tensor, theirs[name]), name
    assert not ours.training


def test_a_module_on_meta_is_filled(saved: Folder) -> None:
    folder = saved("gemma")
    with torch.device("meta"):
        model = transformers.GemmaForCausalLM(llama_config(folder))
    result = lowmem.load(folder, model=model)
    assert result.model is model
    theirs = reference(folder)
    for name, tensor in every_tensor(theirs).items():
        assert same(every_tensor(model)[name], tensor), name
    assert ties_of(model) == ties_of(theirs)
    assert same(outputs_of(model), outputs_of(theirs))


def test_a_real_module_is_filled_in_place(saved: Folder) -> None:
    folder = saved("llama-tied")
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(llama_config(folder))
    assert lowmem.load(folder, model=model).model is model
    assert same(outputs_of(model), outputs_of(reference(folder)))


def changed_during_load(folder: Path) -> None:
    """Halve the last shard: it is found out when it is read."""
    shard = sorted(folder.glob("*.safetensors"))[-1]
    os.truncate(shard, shard.stat().st_size // 2)


@pytest.mark.parametrize("where", ["meta", "cpu"])
def test_a_failed_load_leaves_the_callers_module_as_it_was(where: str, own: Folder) -> None:
    """Same objects, same values, same flags."""
    folder = own("llama-tied")
    with torch.device(where):
        model = transformers.LlamaForCausalLM(llama_config(folder))
    model.train()
    model.lm_head.eval()
    objects = {name: (id(t), t.requires_grad) for name, t in every_tensor(model).items()}
    values = copy.deepcopy(every_tensor(model))
    modes = [m.training for m in model.modules()]

    def spoil(progress: Any) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        lowmem.load(folder, model=model, dtype="bfloat16", progress=spoil)
    changed_during_load(folder)
    with pytest.raises(LowmemError):
        lowmem.load(folder, model=model, dtype="bfloat16")
    assert {name: (id(t), t.requires_grad) for name, t in every_tensor(model).items()} == objects
    assert [m.training for m in model.modules()] == modes
    if where == "cpu":
        assert all(same(tensor, values[name]) for name, tensor in every_tensor(model).items())


def test_a_load_that_fails_in_the_models_own_rule_leaves_the_callers_module_as_it_was(
    own: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = own("llama-tied")
    model = transformers.LlamaForCausalLM(llama_config(folder))
    before = {name: id(t) for name, t in every_tensor(model).items()}

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken rule")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "tie_weights", broken)
    with pytest.raises(RuntimeError, match="broken rule"):
        lowmem.load(folder, model=model)
    assert {name: id(t) for name, t in every_tensor(model).items()} == before
    assert model.training


# ---- what is refused ----


def test_a_quantised_checkpoint_is_refused(own: Folder) -> None:
    folder = own("llama")
    change_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(
        UnsupportedError, match=r"config\.json: the weights are quantised \('bitsandbytes', load_in_4bit\)"
    ):
        lowmem.load(folder)


def test_an_unknown_class_is_refused_by_name(own: Folder) -> None:
    folder = own("llama")
    change_config(folder, architectures=["LlamaForTelepathy"])
    with pytest.raises(ModelError, match=r"has no class 'LlamaForTelepathy'; update transformers, or give model="):
        lowmem.load(folder)


@pytest.mark.parametrize("name", ["AutoModel", "pipeline", "torch", "PreTrainedModel", "__name__", 7])
def test_an_architecture_that_is_no_model_is_refused(name: Any, own: Folder) -> None:
    folder = own("llama")
    change_config(folder, architectures=[name])
    with pytest.raises(ModelError):
        lowmem.load(folder)
    # What transformers remembers of the base class counts for every other.
    assert "_can_set_experts_implementation_cached_value" not in vars(transformers.PreTrainedModel)


def test_an_unknown_model_type_is_refused(own: Folder) -> None:
    folder = own("llama")
    change_config(folder, model_type="telepathic")
    with pytest.raises(ModelError, match=r"config\.json: transformers cannot read it"):
        lowmem.load(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"llama"', "\x00", "[" * 100_000, '{"model_type": 3}'])
def test_a_damaged_config_is_refused(text: str, own: Folder) -> None:
    folder = own("llama")
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        lowmem.load(folder)


@pytest.mark.parametrize(
    "changes", [{"hidden_size": -1}, {"num_attention_heads": 0}, {"hidden_size": "many"}, {"dtype": "int8"}]
)
def test_a_config_that_no_model_can_be_built_from_is_refused(changes: dict[str, Any], own: Folder) -> None:
    folder = own("llama")
    change_config(folder, **changes)
    with pytest.raises(LowmemError, match=r"config\.json|dtype"):
        lowmem.load(folder)


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM
class MyConfig(LlamaConfig):
    model_type = "my-llama"
class MyModel(LlamaForCausalLM):
    config_class = MyConfig
    mine = True
"""


@pytest.mark.parametrize("model_type", ["llama", "my-llama"])
def test_code_beside_the_checkpoint_runs_only_when_allowed(
    model_type: str, own: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = own("llama")
    (folder / "mine.py").write_text(REMOTE)
    auto_map = {"AutoModelForCausalLM": "mine.MyModel"}
    if model_type == "my-llama":
        auto_map["AutoConfig"] = "mine.MyConfig"
    change_config(folder, architectures=["MyModel"], model_type=model_type, auto_map=auto_map)
    with pytest.raises((UnsupportedError, ModelError), match="trust_remote_code=True"):
        lowmem.load(folder)
    model = lowmem.load(folder, trust_remote_code=True).model
    assert model.mine  # type: ignore[attr-defined]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert_same_model(model, theirs)


def test_weights_that_the_model_does_not_have_at_all_are_refused(own: Folder) -> None:
    """Another architecture's checkpoint: every tensor is missing, and that is said once."""
    folder = own("gpt2", "float32", ONE_FILE)
    other = new_model("llama")
    other.config.save_pretrained(folder)
    with pytest.raises(KeysError, match="does not fit the model"):
        lowmem.load(folder)


def test_without_a_config_the_model_must_be_given(own: Folder) -> None:
    folder = own("llama")
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json beside the weights.*give model="):
        lowmem.load(folder)


@pytest.mark.parametrize("model", [3, "llama", object()])
def test_something_that_makes_no_module_is_refused(model: Any, saved: Folder) -> None:
    with pytest.raises(ModelError, match=r"expected a torch\.nn\.Module or a callable"):
        lowmem.load(saved("llama"), model=model)
    with pytest.raises(ModelError, match=r"the callable gave int"):
        lowmem.load(saved("llama"), model=lambda: 3)


def test_planning_reads_no_weights_and_changes_no_module(own: Folder) -> None:
    """A plan needs the headers only: with the data cut off it is the same."""
    folder = own("llama", "float32", ONE_FILE)
    shard = folder / "model.safetensors"
    whole = lowmem.plan(folder, dtype="bfloat16").placements
    data = shard.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    # Same size, but a hole where the weights were.
    with shard.open("r+b") as f:
        f.truncate(header)
        f.truncate(len(data))
    hollow = lowmem.plan(folder, dtype="bfloat16").placements
    assert [(p.target, p.nbytes, p.residency) for p in hollow] == [(p.target, p.nbytes, p.residency) for p in whole]
    model = transformers.LlamaForCausalLM(llama_config(folder))
    before = {name: id(t) for name, t in every_tensor(model).items()}
    plan = lowmem.plan(folder, model=model, dtype="bfloat16")
    assert {name: id(t) for name, t in every_tensor(model).items()} == before
    json.dumps(plan.to_dict())
