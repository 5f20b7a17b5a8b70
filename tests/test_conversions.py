"""transformers' conversions, written down as moves or computed, against `from_pretrained` with the same description."""

from __future__ import annotations

import copy
import gc
import json
import math
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

import transformers
from packaging.version import Version
from tiny_models import assert_same_model, every_tensor, same
from torch._subclasses.fake_tensor import FakeTensor
from transformers import conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Conv3dToLinear,
    ConversionOps,
    ErnieFuseAndSplitTextVisionExperts,
    GroupWeightRename,
    Interleave,
    MergeModulelist,
    PermuteForRope,
    Split,
    SplitModulelist,
    Transpose,
    WeightConverter,
)

import lowmem
from lowmem.checkpoint import TensorEntry
from lowmem.errors import KeysError, ModelError
from lowmem.loader import LoadResult
from lowmem.modeling import hf_conversions

pytestmark = pytest.mark.usefixtures("one_thread")

Saved = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
MOE = "qwen3-moe"
ONE_FILE = "1GB"
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity_warning()


@pytest.fixture
def describe(monkeypatch: pytest.MonkeyPatch, saved: Saved) -> Callable[..., None]:
    """Give LlamaForCausalLM a description of its own, which both loaders read; saving would revert it."""
    for shard in ("20KB", ONE_FILE):
        saved("llama", shard=shard)
    saved("llama-tied", shard=ONE_FILE)
    conversion_mapping.get_checkpoint_conversion_mapping("llama")
    known = dict(conversion_mapping._checkpoint_conversion_mapping_cache)
    monkeypatch.setattr(conversion_mapping, "_checkpoint_conversion_mapping_cache", known)

    def register(*transforms: Any) -> None:
        conversion_mapping.register_checkpoint_conversion_mapping("LlamaForCausalLM", list(transforms), overwrite=True)

    return register


def rewritten(folder: Path, to: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """A copy of a checkpoint of one file with other tensors."""
    shutil.copytree(folder, to)
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({k: v.contiguous() for k, v in tensors.items()}, to / "model.safetensors", {"format": "pt"})
    return to


def assert_loads_as_transformers(folder: Path, **options: Any) -> LoadResult:
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    result = lowmem.load(folder, **options)
    assert_same_model(result.model, getattr(transformers, name).from_pretrained(folder, **options))
    return result


# ---- fused experts ----


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_experts_are_fused(stored: str, dtype: str, saved: Saved) -> None:
    result = assert_loads_as_transformers(saved(MOE, stored), dtype=dtype)
    fused = next(p for p in result.plan.placements if p.target.endswith("layers.0.mlp.experts.gate_up_proj"))
    assert len(fused.links) == 2 * 4
    assert fused.residency == "copy"
    assert not result.plan.mapping.computed
    assert not result.plan.warnings


def test_experts_already_fused_are_loaded_as_they_are(saved: Saved, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(saved(MOE))
    model.save_pretrained(tmp_path, save_original_format=False)
    assert any(key.endswith("gate_up_proj") for key in lowmem.inspect(tmp_path))
    result = assert_loads_as_transformers(tmp_path)
    assert {p.residency for p in result.plan.placements} == {"map"}


def test_saving_gives_the_original_keys_again(saved: Saved, tmp_path: Path) -> None:
    folder = saved(MOE)
    lowmem.load(folder).model.save_pretrained(tmp_path)
    again, before = lowmem.inspect(tmp_path), lowmem.inspect(folder)
    assert {key: (e.shape, e.dtype) for key, e in again.items()} == {k: (e.shape, e.dtype) for k, e in before.items()}
    assert_loads_as_transformers(tmp_path)


def test_a_pickled_checkpoint_and_one_behind_a_wrapper_are_fused_too(saved: Saved, tmp_path: Path) -> None:
    folder = saved(MOE)
    state = {f"module.{k}": v for shard in sorted(folder.glob("*.safetensors")) for k, v in load_file(shard).items()}
    shutil.copy(folder / "config.json", tmp_path)
    torch.save({"state_dict": state, "step": 3}, tmp_path / "pytorch_model.bin")
    ours = lowmem.load(tmp_path).model
    theirs = lowmem.load(folder).model
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


def test_a_transposed_view_in_a_pickle_becomes_an_expert(saved: Saved, tmp_path: Path) -> None:
    folder = saved(MOE)
    state = {k: v for shard in sorted(folder.glob("*.safetensors")) for k, v in load_file(shard).items()}
    state = {k: v.T.contiguous().T if ".experts." in k else v for k, v in state.items()}
    shutil.copy(folder / "config.json", tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert not lowmem.inspect(tmp_path)[EXPERT].is_plain
    result = lowmem.load(tmp_path)
    assert not result.plan.mapping.computed
    assert torch.equal(
        result.model.model.layers[1].mlp.experts.gate_up_proj,
        lowmem.load(folder).model.model.layers[1].mlp.experts.gate_up_proj,
    )


@pytest.mark.parametrize("strict", [True, False])
def test_a_missing_expert_is_refused_by_shapes(strict: bool, own: Saved) -> None:
    folder = own(MOE, shard=ONE_FILE)
    tensors = load_file(folder / "model.safetensors")
    del tensors[EXPERT]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(KeysError, match=r"MergeModulelist\+Concatenate|another shape"):
        lowmem.load(folder, strict=strict)


def test_an_expert_of_another_shape_is_refused_by_the_operation(own: Saved) -> None:
    folder = own(MOE, shard=ONE_FILE)
    tensors = load_file(folder / "model.safetensors")
    tensors[EXPERT] = torch.zeros(3, 5)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(KeysError, match=r"model\.safetensors.*gate_up_proj.*MergeModulelist\+Concatenate.*shapes"):
        lowmem.load(folder)


def test_what_is_left_out_is_initialised(saved: Saved) -> None:
    folder = saved(MOE)
    torch.manual_seed(0)
    result = lowmem.load(folder, skip="*.layers.1.mlp.experts.*")
    assert list(result.plan.mapping.excused) == [
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
    ]


def test_a_diff_counts_targets_and_not_keys(saved: Saved) -> None:
    diff = lowmem.diff(saved(MOE))
    assert diff.is_empty
    assert diff.matched == len(lowmem.load(saved(MOE)).model.state_dict())


# ---- every kind of description ----


def test_a_fused_projection_is_split_and_its_parts_are_mapped(
    saved: Saved, tmp_path: Path, describe: Callable[..., None]
) -> None:
    def fuse(tensors: Tensors) -> Tensors:
        for i in range(3):
            names = [f"model.layers.{i}.self_attn.{n}_proj.weight" for n in "qkv"]
            tensors[f"model.layers.{i}.self_attn.qkv.weight"] = torch.cat([tensors.pop(n) for n in names])
        return tensors

    parts = [f"self_attn.{n}_proj.weight" for n in "qkv"]
    describe(WeightConverter(r"self_attn\.qkv\.weight", parts, [Split(dim=0)]))
    folder = rewritten(saved("llama", shard=ONE_FILE), tmp_path / "fused", fuse)
    result = assert_loads_as_transformers(folder)
    assert {p.residency for p in result.plan.placements} == {"map"}
    assert result.plan.bytes_read == 0
    assert_loads_as_transformers(folder, dtype="bfloat16")


def interleaved(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(2, -1, tensor.shape[1]).transpose(0, 1).reshape(tensor.shape)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_interleaved_rows_are_chunked(dtype: str, saved: Saved, tmp_path: Path, describe: Callable[..., None]) -> None:
    def fuse(tensors: Tensors) -> Tensors:
        for i in range(3):
            names = [f"model.layers.{i}.mlp.{n}_proj.weight" for n in ("gate", "up")]
            joined = torch.cat([tensors.pop(n) for n in names])
            tensors[f"model.layers.{i}.mlp.w13.weight"] = interleaved(joined)
        return tensors

    targets = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    describe(WeightConverter(r"mlp\.w13\.weight", targets, [Interleave(dim=0), Chunk(dim=0)]))
    folder = rewritten(saved("llama", shard=ONE_FILE), tmp_path / "fused", fuse)
    before = transformers.LlamaForCausalLM.from_pretrained(saved("llama", shard=ONE_FILE), dtype=dtype)
    result = assert_loads_as_transformers(folder, dtype=dtype)
    assert not result.plan.mapping.computed
    assert torch.equal(result.model.model.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight)


def test_rotary_rows_and_transposed_weights_are_moves(
    saved: Saved, tmp_path: Path, describe: Callable[..., None]
) -> None:
    def change(tensors: Tensors) -> Tensors:
        for i in range(3):
            name = f"model.layers.{i}.mlp.down_proj.weight"
            tensors[name] = tensors[name].T.contiguous()
        return tensors

    describe(
        WeightConverter(r"mlp\.down_proj\.weight", r"mlp.down_proj.weight", [Transpose(0, 1, check_dims=True)]),
        # One operation of 5.20 gives its tensors the names that it was given, not those of the targets.
        WeightConverter(
            "self_attn.q_proj.weight", "self_attn.q_proj.weight", [PermuteForRope(permute_layer_names=["q_proj"])]
        ),
        WeightConverter(
            [r"self_attn\.o_proj\.weight"], [r"self_attn.o_proj.weight"], [Transpose(0, 1), Transpose(1, 0)]
        ),
    )
    folder = rewritten(saved("llama", shard=ONE_FILE), tmp_path / "changed", change)
    result = assert_loads_as_transformers(folder)
    assert not result.plan.mapping.computed
    residency = {p.target: p.residency for p in result.plan.placements}
    assert residency["model.layers.0.mlp.down_proj.weight"] == "copy"
    assert residency["model.layers.0.self_attn.o_proj.weight"] == "map"


class Doubled(ConversionOps):
    """An operation of a release to come that computes."""

    def convert(self, input_dict: Any, source_patterns: list[str], target_patterns: list[str], **_: Any) -> Any:
        (tensors,) = input_dict.values()
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        return {target_patterns[0]: tensor * 2 + 1}

    @property
    def reverse_op(self) -> ConversionOps:
        return self


class Rolled(Doubled):
    """One that only moves, by means of its own."""

    def convert(self, input_dict: Any, source_patterns: list[str], target_patterns: list[str], **_: Any) -> Any:
        (tensors,) = input_dict.values()
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        first, rest = tensor.split([3, tensor.shape[0] - 3])
        return {target_patterns[0]: torch.cat([rest, first]).movedim(0, 1).contiguous().movedim(1, 0).contiguous()}


class Broken(Doubled):
    """One that fails."""

    def convert(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("out of sorts")


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_operations_are_run_outside_of_inference_mode(saved: Saved, describe: Callable[..., None], dtype: str) -> None:
    describe(WeightConverter(r"mlp\.up_proj\.weight", r"mlp.up_proj.weight", [Doubled()]))
    folder = saved("llama", shard=ONE_FILE)
    with torch.inference_mode():
        model = lowmem.load(folder, dtype=dtype).model
    assert_same_model(model, transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype))


def catches(tensor: torch.Tensor, **_: Any) -> torch.Tensor:
    try:
        return tensor * 2
    except Exception:
        return tensor


def put_into_another(tensor: torch.Tensor, **_: Any) -> torch.Tensor:
    made = torch.zeros(tensor.shape, dtype=tensor.dtype)
    made[:3], made[3:] = tensor[-3:], tensor[:-3]
    return made


def given_a_place(tensor: torch.Tensor, **_: Any) -> torch.Tensor:
    return torch.cat([tensor[3:], tensor[:3]], out=torch.empty(tensor.shape, dtype=tensor.dtype))


def asks_how_it_lies(tensor: torch.Tensor, **_: Any) -> torch.Tensor:
    turned = tensor.t()
    return tensor if turned.is_contiguous() or turned.stride(0) != 1 else tensor.roll(1, 0)


def brings_what_is_missing(tensor: torch.Tensor, missing_keys: set[str], **_: Any) -> torch.Tensor:
    missing_keys.discard("what.nobody.has")
    return tensor


def moved_to_the_cpu(tensor: torch.Tensor, **_: Any) -> torch.Tensor:
    return tensor.to(device="cpu", dtype=torch.float64).to(tensor.dtype)


ODD = [
    catches, put_into_another, given_a_place, asks_how_it_lies, brings_what_is_missing, moved_to_the_cpu,
]  # fmt: skip


def operating(function: Callable[..., Any]) -> WeightConverter:
    """The up projection through a function."""

    class Odd(Doubled):
        def convert(self, input_dict: Any, target_patterns: list[str], **more: Any) -> Any:
            ((tensor,),) = input_dict.values()
            return {target_patterns[0]: function(tensor, **more)}

    return WeightConverter(r"mlp\.up_proj\.weight", r"mlp.up_proj.weight", [Odd()])


@pytest.mark.parametrize("function", ODD)
def test_whatever_an_operation_does_is_done(
    function: Callable[..., Any], saved: Saved, describe: Callable[..., None]
) -> None:
    describe(operating(function))
    assert_loads_as_transformers(saved("llama"))


def test_planning_an_operation_allocates_nothing_and_keeps_nothing(saved: Saved, describe: Callable[..., None]) -> None:
    made = []

    def fills(tensor: torch.Tensor, **_: Any) -> torch.Tensor:
        place = torch.zeros(tensor.shape, dtype=tensor.dtype)
        made.append((weakref.ref(place), place.is_meta or isinstance(place, FakeTensor)))
        place[:] = tensor
        return place

    describe(operating(fills))
    gc.disable()
    try:
        lowmem.plan(saved("llama"))
        assert made
        assert [empty for _, empty in made] == [True] * len(made)
        assert [known() for known, _ in made] == [None] * len(made)
    finally:
        gc.enable()


WRONG: dict[str, tuple[Callable[..., Any], str]] = {
    "cat": (lambda t, **_: torch.cat([t[:3], t[3:]], dim=2), "Dimension out of range"),
    "select": (lambda t, **_: torch.stack([torch.select(t, 0, i + 1) for i in range(len(t))]), "index 48 out of range"),
    "permute": (lambda t, **_: t.permute(2, 3), "Dimension out of range"),
    "view": (lambda t, **_: t.t().view(t.shape), "view size is not compatible"),
    "nothing": (lambda t, **_: None, "NoneType"),
    "tuple": (lambda t, **_: (t,), "tuple"),
    "value": (lambda t, **_: t * t.sum().item(), "item.*cannot be planned"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_an_operation_cannot_do_is_refused(kind: str, saved: Saved, describe: Callable[..., None]) -> None:
    """Where torch would not do it either, or cannot without values."""
    function, text = WRONG[kind]
    describe(operating(function))
    # The meta tensors of torch before 2.13 select what is not there, so that it is found only on values.
    late = kind == "select" and Version(torch.__version__) < Version("2.13")
    error, names = (ModelError, r"Odd.*up_proj\.weight") if late else (KeysError, r"up_proj\.weight.*Odd")
    with pytest.raises(error, match=f"{names}.*{text}"):
        lowmem.load(saved("llama"))


class Scaled(Split):
    """A split that computes, and gives the last first."""

    def convert(self, *args: Any, **more: Any) -> Any:
        return {name: tensor * 3 + 1 for name, tensor in reversed(super().convert(*args, **more).items())}


@pytest.mark.parametrize("kept", ["q_proj", "k_proj"])
@pytest.mark.parametrize("operation", [Split(dim=0), Scaled(dim=0)])
def test_parts_of_one_tensor_get_the_dtype_of_the_first(
    operation: Any,
    kept: str,
    saved: Saved,
    tmp_path: Path,
    describe: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fuse(tensors: Tensors) -> Tensors:
        for i in range(3):
            names = [f"model.layers.{i}.self_attn.{n}_proj.weight" for n in "qkv"]
            tensors[f"model.layers.{i}.self_attn.qkv.weight"] = torch.cat([tensors.pop(n) for n in names])
        return tensors

    describe(WeightConverter(r"self_attn\.qkv\.weight", [f"self_attn.{n}_proj.weight" for n in "qkv"], [operation]))
    monkeypatch.setattr(transformers.LlamaPreTrainedModel, "_keep_in_fp32_modules_strict", {kept})
    folder = rewritten(saved("llama", shard=ONE_FILE), tmp_path / "fused", fuse)
    found = every_tensor(lowmem.load(folder, dtype="bfloat16").model)
    expected = every_tensor(transformers.LlamaForCausalLM.from_pretrained(folder, dtype="bfloat16"))
    assert {name for name, tensor in expected.items() if not same(found[name], tensor)} == set()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_operation_of_a_release_to_come_is_computed(dtype: str, saved: Saved, describe: Callable[..., None]) -> None:
    describe(WeightConverter(r"mlp\.up_proj\.weight", r"mlp.up_proj.weight", [Doubled()]))
    result = assert_loads_as_transformers(saved("llama"), dtype=dtype)
    assert [c.what for c in result.plan.mapping.computed] == ["Doubled"] * 3


def test_an_operation_of_a_release_to_come_that_only_moves_is_written_down(
    saved: Saved, describe: Callable[..., None]
) -> None:
    describe(WeightConverter(r"mlp\.up_proj\.weight", r"mlp.up_proj.weight", [Rolled()]))
    result = assert_loads_as_transformers(saved("llama"))
    assert not result.plan.mapping.computed


def test_computing_follows_moving_in_one_chain(saved: Saved, describe: Callable[..., None]) -> None:
    targets = ["mlp.up_proj.weight"]
    describe(WeightConverter(r"mlp\.up_proj\.weight", targets, [Rolled(), Doubled(), Transpose(0, 1), Transpose(0, 1)]))
    result = assert_loads_as_transformers(saved("llama"))
    assert [c.what for c in result.plan.mapping.computed] == ["Rolled+Doubled+Transpose+Transpose"] * 3


def test_an_operation_that_fails_is_named(saved: Saved, describe: Callable[..., None]) -> None:
    describe(WeightConverter(r"mlp\.up_proj\.weight", r"mlp.up_proj.weight", [Broken()]))
    with pytest.raises(KeysError, match=r"up_proj\.weight.*Broken.*out of sorts"):
        lowmem.load(saved("llama"))


def test_what_a_computation_costs_is_what_torch_would_allocate(saved: Saved, describe: Callable[..., None]) -> None:
    describe(WeightConverter(r"mlp\.up_proj\.weight", r"mlp.up_proj.weight", [Doubled()]))
    plan = lowmem.plan(saved("llama"), dtype="float32")
    cost = plan.mapping.computed[0].operation.cost("float32")
    assert cost.results == (((48, 32), "float32"),)
    # The product lives until the sum is there.
    assert cost.scratch == 48 * 32 * 4


def test_a_tensor_that_becomes_the_same_twice_is_refused(
    saved: Saved, tmp_path: Path, describe: Callable[..., None]
) -> None:
    def double(tensors: Tensors) -> Tensors:
        return {**tensors, "model.layers.0.mlp.w13.weight": torch.zeros(96, 32)}

    targets = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    describe(WeightConverter(r"mlp\.w13\.weight", targets, [Chunk(dim=0)]))
    folder = rewritten(saved("llama", shard=ONE_FILE), tmp_path / "double", double)
    with pytest.raises(KeysError, match=r"w13.*gate_proj|gate_proj.*w13"):
        lowmem.load(folder)


def test_renamings_that_look_at_other_keys_see_them_in_order(
    saved: Saved, tmp_path: Path, describe: Callable[..., None]
) -> None:
    """The second of the pair is renamed only after the first was seen, and the file has them the other way round."""
    new = ["input_layernorm", "post_attention_layernorm"]
    old = ["aaa_layernorm", "input_layernorm"]

    def shift(tensors: Tensors) -> Tensors:
        for i in range(3):
            for a, b in zip(new, old, strict=True):
                tensors[f"model.layers.{i}.{b}.weight"] = tensors.pop(f"model.layers.{i}.{a}.weight")
        return tensors

    describe(GroupWeightRename([f"{name}" for name in old], new))
    folder = rewritten(saved("llama", shard=ONE_FILE), tmp_path / "shifted", shift)
    save = load_file(folder / "model.safetensors")
    save_file(dict(sorted(save.items(), reverse=True)), folder / "model.safetensors", {"format": "pt"})
    assert_loads_as_transformers(folder)


def test_stacked_and_concatenated_from_two_dtypes(saved: Saved, own: Saved) -> None:
    """Each source is cast before it is put in its place."""
    folder = own(MOE, shard=ONE_FILE)
    tensors = load_file(folder / "model.safetensors")
    tensors[EXPERT] = tensors[EXPERT].to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert_loads_as_transformers(folder, dtype="float32")
    assert_loads_as_transformers(folder, dtype="float16")


# ---- devices and budgets ----


def test_half_of_the_experts_on_disk_compute_the_same(saved: Saved, tmp_path: Path) -> None:
    folder = saved(MOE, "bfloat16")
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(7)[None]
    for options in ({}, {"offload_folder": tmp_path / "offload"}):
        model = lowmem.load(folder, device_map={"": "cpu", "model.layers.1": "disk"}, **options).model
        with torch.no_grad():
            assert torch.equal(model(ids).logits, expected(ids).logits)


def test_the_budget_counts_fused_experts_once(saved: Saved) -> None:
    plan = lowmem.plan(saved(MOE), dtype="float32")
    copied = [p for p in plan.placements if p.residency == "copy"]
    assert plan.host.resident >= sum(p.nbytes for p in copied)
    with pytest.raises(lowmem.BudgetError):
        lowmem.plan(saved(MOE), dtype="float32", ram=plan.host.resident)


def test_merged_lists_have_an_order_of_numbers_and_not_of_letters(tmp_path: Path) -> None:
    """Expert 10 comes behind expert 9."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        num_experts=12, moe_intermediate_size=8, intermediate_size=16, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(1)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    assert_loads_as_transformers(tmp_path)


def test_unknown_converters_of_a_list_are_named_in_the_plan(saved: Saved, describe: Callable[..., None]) -> None:
    describe(WeightConverter(r"mlp\.up_proj\.weight", r"mlp.up_proj.weight", [Doubled()]))
    plan = lowmem.plan(saved("llama"))
    assert any("Doubled" in warning for warning in plan.warnings)


class Times(Doubled):
    """One that has a setting."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def convert(self, input_dict: Any, target_patterns: list[str], **_: Any) -> Any:
        ((tensor,),) = input_dict.values()
        return {target_patterns[0]: tensor * self.factor}


def test_an_offload_folder_knows_the_settings_of_operations(
    saved: Saved, tmp_path: Path, describe: Callable[..., None]
) -> None:
    ids = torch.arange(7)[None]
    for factor, again in ((2.0, False), (3.0, False), (3.0, True)):
        describe(WeightConverter(r"mlp\.up_proj\.weight", r"mlp.up_proj.weight", [Times(factor)]))
        devices = {"": "cpu", "model.layers.1": "disk"}
        result = lowmem.load(saved("llama"), device_map=devices, offload_folder=tmp_path)
        assert result.plan.offload.reused == again
        expected = transformers.LlamaForCausalLM.from_pretrained(saved("llama")).eval()
        with torch.no_grad():
            assert torch.equal(result.model(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("operation", ["followed", "computed"])
@pytest.mark.parametrize("kind", ["converted and plain", "two halves"])
def test_ties_are_settled_by_what_conversions_make(
    kind: str, operation: str, saved: Saved, tmp_path: Path, describe: Callable[..., None]
) -> None:
    """What was the same in the checkpoint is not the same any more, or the other way round."""
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    computes = operation == "computed"

    def change(tensors: Tensors) -> Tensors:
        values = tensors.pop(embedding)
        if kind == "two halves":
            return {**tensors, "both.weight": torch.cat([values, values + 1])}
        return {**tensors, embedding: values, head: values.clone()}

    operations: list[Any]
    if kind == "two halves":
        operations = [Scaled(dim=0)] if computes else [Chunk(dim=0)]
        describe(WeightConverter(r"both\.weight", [embedding, head], operations))
    else:
        operations = [Doubled()] if computes else [Interleave(dim=0)]
        describe(WeightConverter(r"model\.embed_tokens\.weight", embedding, operations))
    folder = rewritten(saved("llama-tied", shard=ONE_FILE), tmp_path / "twice", change)
    result = assert_loads_as_transformers(folder)
    assert result.model.lm_head.weight is not result.model.model.embed_tokens.weight
    assert bool(result.plan.mapping.computed) == computes


class Shapes:
    """What operations may ask of a model."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.config = SimpleNamespace(
            num_attention_heads=2,
            count=3,
            sub=SimpleNamespace(num_attention_heads=1),
            get_text_config=lambda: self.config,
        )

    def get_parameter(self, name: str) -> torch.Tensor:
        return torch.empty(self.shapes[name], device="meta")


def drawn_operation(draw: st.DrawFn) -> ConversionOps:
    dim, other, yes = draw(st.integers(-2, 2)), draw(st.integers(-2, 2)), draw(st.booleans())
    count = draw(st.sampled_from([None, "count"]))
    made: list[Callable[[], ConversionOps]] = [
        lambda: Chunk(dim, count), lambda: Split(dim), lambda: Concatenate(dim, count), lambda: MergeModulelist(dim),
        lambda: Interleave(abs(dim), yes), lambda: SplitModulelist(dim), lambda: Transpose(dim, other, yes),
        lambda: Conv3dToLinear(2, (2, 1, 2)), lambda: PermuteForRope(draw(st.sampled_from([None, "sub"])), None, yes),
        lambda: ErnieFuseAndSplitTextVisionExperts(dim % 2, other % 2),
    ]  # fmt: skip
    operation = draw(st.sampled_from(made))()
    return operation.reverse_op if draw(st.integers(0, 3)) == 0 else operation


def takes_many_to_many(operation: ConversionOps) -> bool:
    """As `WeightConverter` asks it: of the operation since transformers 5.22, of its kind before."""
    kinds = (ErnieFuseAndSplitTextVisionExperts, ErnieFuseAndSplitTextVisionExperts(0, 0).reverse_op.__class__)
    return bool(getattr(operation, "supports_many_to_many", isinstance(operation, kinds)))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_chain_of_operations_gives_what_it_gives_on_values(data: st.DataObject) -> None:
    draw = data.draw
    listed, several, split = draw(st.booleans()), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    sources = [f"{c}.*.w" if listed else f"{c}.w" for c in "ab"[:several]]
    targets = [f"{c}.v" for c in "xyz"[:split]]
    operations = [drawn_operation(draw) for _ in range(draw(st.integers(1, 3)))]
    assume(several == 1 or split == 1 or any(map(takes_many_to_many, operations)))
    converter = WeightConverter(list(sources), list(targets), operations)
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 4, 6]), min_size=1, max_size=3)))
    model = Shapes({f"m.{t}": (max(1, shape[0] // split), *shape[1:]) for t in targets})
    rows = [(f"m.{s.replace('*', str(i))}", s) for s in sources for i in range(3 if listed else 1)]
    values = {key: torch.arange(math.prod(shape)).view(shape) + 1000.0 * i for i, (key, _) in enumerate(rows)}
    name = f"m.{targets[0]}"
    run = copy.deepcopy(converter)
    for key, pattern in rows:
        run.add_tensor(name, key, pattern, values[key].clone())
    entries = {key: TensorEntry(key, "float32", shape, Path("f"), 0, v.nbytes) for key, v in values.items()}
    matches = tuple(hf_conversions._Match(converter, pattern) for _, pattern in rows)
    group = hf_conversions._Group(model, name, tuple(values), matches, entries, set())
    target: Any = SimpleNamespace(shape=model.shapes[name], dtype="float32")
    try:
        made = run.convert(name, model=model, config=model.config)
    except Exception:
        with pytest.raises(KeysError):
            group.convert(target, {})
        return
    expected = {k: v[0] if isinstance(v, list) else v for k, v in made.items()}
    found = group.convert(target, {})
    assert set(found.targets) == set(expected)
    if found.parts is None:
        results = dict(zip(found.targets, found.operation(list(values.values())), strict=True))
    else:
        results = {n: torch.full(s, -1.0) for n, s in zip(found.targets, found.shapes, strict=True)}
        for part in found.parts:
            source = values[part.key].as_strided(part.shape, part.strides, part.offset)
            results[part.target].as_strided(part.shape, part.into_strides, part.into).copy_(source)
    assert all(torch.equal(results[n], tensor) for n, tensor in expected.items())


class Halved(Doubled):
    """One that computes two tensors of one, the second of another shape than the model's."""

    def convert(self, input_dict: Any, source_patterns: list[str], target_patterns: list[str], **_: Any) -> Any:
        (tensors,) = input_dict.values()
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        half = tensor.shape[0] // 2
        return {target_patterns[0]: tensor[:half] * 2, target_patterns[1]: tensor[half + 1 :] * 2}


def test_what_is_computed_beside_a_tensor_of_another_shape_is_never_left_without_values(
    saved: Saved, tmp_path: Path, describe: Callable[..., None]
) -> None:
    def fuse(tensors: Tensors) -> Tensors:
        for i in range(3):
            names = [f"model.layers.{i}.mlp.{n}_proj.weight" for n in ("gate", "up")]
            tensors[f"model.layers.{i}.mlp.w13.weight"] = torch.cat([tensors.pop(n) for n in names])
        return tensors

    targets = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    describe(WeightConverter(r"mlp\.w13\.weight", targets, [Halved()]))
    folder = rewritten(saved("llama", shard=ONE_FILE), tmp_path / "fused", fuse)
    with pytest.raises(KeysError, match=r"gate_proj"):
        lowmem.load(folder, ignore_mismatched_sizes=True)
    result = lowmem.load(folder, ignore_mismatched_sizes=True, strict=False)
    assert "model.layers.0.mlp.gate_proj.weight" in result.plan.mapping.missing
    assert not any(p.is_meta for p in result.model.parameters())
