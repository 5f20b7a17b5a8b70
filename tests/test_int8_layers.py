"""Which layers become int8 and how their modules are exchanged, beside transformers with bitsandbytes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

pytest.importorskip("transformers")

import transformers
from tiny_models import KINDS, inputs_of, new_model, outputs_of, same
from transformers import BitsAndBytesConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from bench.architectures import find_architectures
from lowmem.checkpoint import inspect
from lowmem.errors import ModelError, UnsupportedError
from lowmem.int8 import Int8Linear, quantise, work_size
from lowmem.modeling import hf, int8, int8_choice
from lowmem.modeling.hf_rules import TransformersRules
from lowmem.modeling.int8 import mark_quantised, swap, unmark
from lowmem.modeling.int8_choice import Int8Request, existing_int8, layers_to_quantise
from lowmem.modeling.quantised import int8_config, refuse_quantised
from lowmem.modeling.request import ModelRequest
from lowmem.offload.hooked_int8 import exchange_hooks

QUANTISE = Int8Request(quantize=True)


@pytest.fixture
def bnb() -> Any:
    return pytest.importorskip("bitsandbytes")


@pytest.fixture
def without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "bitsandbytes_here", lambda: False)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


def fill(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Give every int8 layer of a model the values that its float weight, [out, in], makes."""
    for name, weight in weights.items():
        layer: Any = model.get_submodule(name)
        values = torch.empty(weight.shape, dtype=torch.int8)
        scales = torch.empty(weight.shape[0])
        quantise(weight, values, scales, torch.empty(work_size(weight.shape[1]), dtype=torch.uint8))
        layer.weight = nn.Parameter(values, requires_grad=False)
        layer.SCB = nn.Parameter(scales, requires_grad=False)


def floats_of(model: nn.Module, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The weights of these layers as [out, in]."""
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    return {
        name: layer.weight.data.t() if type(layer).__name__ == "Conv1D" else layer.weight.data
        for name, layer in layers.items()
    }


def quantised(model: nn.Module, request: Int8Request = QUANTISE, threshold: float = 6.0) -> nn.Module:
    """The same model, its layers int8, as a load leaves it."""
    names = layers_to_quantise(model, request, ()).names
    weights = floats_of(model, names)
    layers = swap(model, names)
    fill(model, weights)
    layers.finish(threshold)
    return model


def by_transformers(folder: Path, dtype: Any = torch.float32, **settings: Any) -> Any:
    """The model in `folder` as `from_pretrained` makes it int8, or loads it so."""
    if settings:
        settings = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, **settings)}
    cls = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, cls).from_pretrained(folder, dtype=dtype, **settings)


def plain() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4, bias=False)))


# ---- which layers ----


ARCHITECTURES = (
    *("llama", "gpt2", "bert", "t5", "opt", "mixtral", "qwen3_moe", "vit", "whisper", "clip", "gpt_neox", "bart"),
    *("gemma3_text", "wav2vec2", "llava", "mamba", "blip-2", "deberta-v2"),
)
LISTS = (None, (), ("fc1", "q_proj"), ("layer.*", "model.layers.0", "h.1"), ("encoder", "model.*mlp", "lm_head"))


@pytest.mark.parametrize("architecture", find_architectures(ARCHITECTURES), ids=lambda one: one.model_type)
def test_the_layers_are_those_that_transformers_exchanges(architecture: Any, bnb: Any) -> None:
    from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

    with torch.device("meta"):
        model = architecture.build()
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    for skipped in LISTS:
        with torch.device("meta"):
            theirs = architecture.build()
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=None if skipped is None else [*skipped])
        Bnb8BitHfQuantizer(config, pre_quantized=False).preprocess_model(theirs, device_map=None)
        expected = [name for name in existing_int8(theirs) if f"{name}.weight" not in tied]
        if skipped is None:
            assert expected == existing_int8(theirs)
        ours = layers_to_quantise(model, Int8Request(True, skipped), ()).names
        missed = {name for name in expected if name not in ours}
        # What matches nothing there is a pattern of lowmem's, where it has a star.
        assert all(name in expected for name in ours)
        names = [name for name, _ in model.named_modules() if name]
        stars = [p for p in skipped or () if "*" in p and all(should_convert_module(name, [p]) for name in names)]
        assert not missed or stars


def test_some_layers_are_left_out_of_each_kind_and_some_are_not() -> None:
    assert len(layers_to_quantise(new_model("llama"), QUANTISE, ()).names) == 21
    assert len(layers_to_quantise(new_model("gpt2"), QUANTISE, ()).names) == 12
    assert "lm_head" in layers_to_quantise(new_model("llama"), Int8Request(True, ()), ()).names
    assert "lm_head" not in layers_to_quantise(new_model("llama-tied"), Int8Request(True, ()), ()).names
    assert not any(
        name.endswith(".wo") for name in layers_to_quantise(new_model("t5"), Int8Request(True, ()), ()).names
    )


def test_layers_that_keep_fp32_names_stay_floats() -> None:
    model = new_model("llama")
    every = layers_to_quantise(model, QUANTISE, ()).names
    kept = layers_to_quantise(model, QUANTISE, ("layers.0.mlp", "*_proj.bias", "k_proj.weight")).names
    assert set(every) - set(kept) == {name for name in every if "0.mlp" in name or name.endswith("k_proj")}


def test_patterns_of_lowmem_name_layers_where_those_of_transformers_name_none() -> None:
    model = new_model("llama")
    choice = layers_to_quantise(model, Int8Request(True, ("*down_proj", "layers.*.self_attn", "[", "nothing")), ())
    assert {name.rpartition(".")[2] for name in choice.names} == {"gate_proj", "up_proj", "lm_head"}
    assert choice.warnings == (
        *(
            f"skip_modules: {name!r} names no linear layer of the model: expected the beginning of a name up to a dot, "
            "or its end"
            for name in ("[", "nothing")
        ),
    )


_NAMES = st.lists(st.sampled_from(["a", "b", "layers", "10", "1", "mlp", "mlp2"]), min_size=1, max_size=4).map(".".join)
_PATTERNS = st.one_of(_NAMES, st.text(alphabet="ab1.*$^|[]()layersmp2", max_size=8))


@given(name=_NAMES, pattern=_PATTERNS)
@settings(max_examples=300, deadline=None)
def test_names_match_as_in_transformers(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
        re.compile(f"(?:{pattern})")
    except re.error:
        assert (
            int8_choice._named(name, pattern)
            == int8_choice.named_by_transformers(name, pattern)
            == name.endswith(pattern)
        )
        return
    assert int8_choice._named(name, pattern) == (not should_convert_module(name, [pattern]))
    assert int8_choice.named_by_transformers(name, pattern) == (not should_convert_module(name, [pattern]))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.out = nn.Linear(4, 8, bias=False)
        self.out.weight = self.embed.weight
        self.inner = nn.ModuleDict({"lm_head": nn.Linear(4, 8), "norm": nn.LayerNorm(4)})
        self.special = nn.Bilinear(4, 4, 4)
        self.buffered = nn.Linear(4, 4)
        self.buffered.register_buffer("mask", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.again(self.first(x))
        return made


def test_of_a_plain_module_heads_and_tied_layers_stay_floats() -> None:
    model = Tied()
    assert layers_to_quantise(model, QUANTISE, ()).names == ("first", "again")
    assert layers_to_quantise(model, Int8Request(True, ()), ()).names == ("first", "again", "inner.lm_head")
    # One name of a shared module is enough.
    assert layers_to_quantise(model, Int8Request(True, ("again",)), ()).names == ("inner.lm_head",)
    assert layers_to_quantise(model, Int8Request(True, ("inner.*",)), ()).names == ("first", "again")


def test_layers_whose_weights_another_module_computes_with_stay_floats() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.ModuleList([nn.TransformerEncoder(layer, 2), nn.Linear(8, 8)]).eval()
    choice = layers_to_quantise(model, Int8Request(True, ()), ())
    assert choice.names == ("1",)
    assert len(choice.warnings) == 1
    assert "'0.layers.0' and 1 others" in choice.warnings[0]


# ---- the exchange ----


def test_a_swap_puts_empty_int8_layers_in_every_place_and_undo_puts_the_old_ones_back() -> None:
    model = Tied().eval()
    before = dict(model.named_modules(remove_duplicate=False))
    state = {name: id(tensor) for name, tensor in model.named_parameters(remove_duplicate=False)}
    layers = swap(model, ["again"])
    assert layers.names == ("first", "again")
    made: Any = model.first
    assert isinstance(made, Int8Linear)
    assert model.again is made
    assert (made.weight.shape, made.weight.dtype, made.SCB.shape) == ((4, 4), torch.int8, (4,))
    assert made.weight.is_meta
    assert made.SCB.is_meta
    assert made.bias is before["first"].bias
    assert not made.weight.requires_grad
    assert not made.SCB.requires_grad
    assert not made.training
    assert [name for name, _ in model.named_modules(remove_duplicate=False)] == list(before)
    for _ in range(2):
        layers.undo()
        assert dict(model.named_modules(remove_duplicate=False)) == before
        assert {name: id(t) for name, t in model.named_parameters(remove_duplicate=False)} == state


def test_undo_after_finish_gives_the_old_modules_back() -> None:
    model = plain()
    before = dict(model.named_modules())
    layers = swap(model, ["0", "2.1"])
    fill(model, {"0": before["0"].weight.data, "2.1": before["2.1"].weight.data})
    layers.finish(6.0)
    layers.undo()
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize("finish", [False, True])
def test_hooks_stay_and_their_handles_remove_them(finish: bool) -> None:
    model, called = plain(), []
    handles = [
        model[0].register_forward_hook(lambda *_: called.append("after")),
        model[0].register_forward_pre_hook(lambda *_: called.append("before")),
        model[0].register_forward_hook(lambda *_, **__: called.append("named"), with_kwargs=True),
    ]
    weights = floats_of(model, ("0",))
    layers = swap(model, ["0"])
    fill(model, weights)
    if finish:
        layers.finish(0.0)
    model(torch.ones(1, 4))
    assert called == ["before", "after", "named"]
    for handle in handles:
        handle.remove()
    model(torch.ones(1, 4))
    assert len(called) == 3


def test_what_cannot_be_exchanged_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"the model itself is a Linear.*wrap it in a module"):
        swap(nn.Linear(2, 2), layers_to_quantise(nn.Linear(2, 2), QUANTISE, ()).names)
    model = Tied()
    for name in ("special", "buffered", "inner"):
        with pytest.raises(ModelError, match=rf"module '{name}': expected torch's own nn.Linear"):
            swap(model, ["first", name])
    with pytest.raises(ModelError, match="'nowhere'"):
        swap(model, ["first", "nowhere"])
    assert type(model.first) is nn.Linear


def test_without_bitsandbytes_the_layers_stay_and_compute(without_bitsandbytes: None) -> None:
    model = plain()
    x = torch.randn(3, 4)
    expected = model(x)
    quantised(model)
    assert type(model[0]) is Int8Linear
    assert type(model[2][1]) is Int8Linear
    torch.testing.assert_close(model(x), expected, atol=0.05, rtol=0.05)


def test_bitsandbytes_that_cannot_be_imported_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise OSError("libcudart.so: cannot open shared object file")

    monkeypatch.setattr(int8.importlib, "import_module", broken)
    int8.bitsandbytes_here.cache_clear()
    try:
        assert not int8.bitsandbytes_here()
    finally:
        int8.bitsandbytes_here.cache_clear()


def test_bitsandbytes_is_here_on_any_default_device(bnb: Any) -> None:
    assert int8.bitsandbytes_here()
    with torch.device("meta"):
        int8.bitsandbytes_here.cache_clear()
        assert int8.bitsandbytes_here()


# ---- beside transformers ----


def attributes_of(module: Any) -> dict[str, Any]:
    """What a `Linear8bitLt` holds besides tensors, and how its tensors are."""
    held = {k: v for k, v in module.__dict__.items() if not k.startswith("_") and k != "state"}
    held |= {k: bool(v) for k, v in module.__dict__.items() if k.endswith("_hooks")}
    held["_is_hf_initialized"] = module.__dict__.get("_is_hf_initialized")
    held["state"] = dict(module.state.__dict__)
    for leaf, parameter in module._parameters.items():
        if parameter is None:
            held[leaf] = None
            continue
        told = {k: (type(v), v.dtype, v.shape) if torch.is_tensor(v) else v for k, v in parameter.__dict__.items()}
        held[leaf] = (type(parameter), parameter.requires_grad, parameter.dtype, parameter.shape, told)
    return held


@pytest.mark.parametrize(("kind", "threshold"), [*((kind, 6.0) for kind in KINDS), ("gpt2", 0.0)])
def test_the_finished_model_is_that_of_from_pretrained(kind: str, threshold: float, tmp_path: Path, bnb: Any) -> None:
    model = new_model(kind).eval()
    model.save_pretrained(tmp_path / "floats")
    theirs = by_transformers(tmp_path / "floats", llm_int8_threshold=threshold)
    ours: Any = quantised(model, threshold=threshold)
    rules = TransformersRules(ours, built=True)
    rules.finish(())
    mark_quantised(ours, None, threshold)
    for name in existing_int8(theirs):
        assert attributes_of(ours.get_submodule(name)) == attributes_of(theirs.get_submodule(name)), name
        layer = ours.get_submodule(name)
        assert layer.weight.data_ptr() == layer.weight.CB.data_ptr()
    assert marks_of(ours) == marks_of(theirs)
    flags = {name: p.requires_grad for name, p in theirs.named_parameters()}
    assert {name: p.requires_grad for name, p in ours.named_parameters()} == flags
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    assert all(same(tensor, state[name]) for name, tensor in ours.state_dict().items())
    # A load knows by which renames it came to the model's names.
    ours._weight_conversions = theirs._weight_conversions
    for one, where in ((ours, "ours"), (theirs, "theirs")):
        one.save_pretrained(tmp_path / where)
    assert (tmp_path / "ours" / "config.json").read_text() == (tmp_path / "theirs" / "config.json").read_text()
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")
    assert_same_outputs(ours, theirs)


def assert_same_tensors(ours: Path, theirs: Path) -> None:
    a, b = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    assert a.keys() == b.keys()
    assert all(same(tensor, b[key]) for key, tensor in a.items())


def assert_same_outputs(ours: Any, theirs: Any) -> None:
    for a, b in zip(outputs_of(ours), outputs_of(theirs), strict=True):
        assert same(a, b) if torch.is_tensor(a) else a == b


def marks_of(model: Any) -> dict[str, Any]:
    """Everything by which transformers sees that a model is quantised."""
    keys = ("is_quantized", "quantization_method", "is_loaded_in_8bit", "is_loaded_in_4bit")
    marks: dict[str, Any] = {key: getattr(model, key, "missing") for key in keys}
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        held = {**quantizer.__dict__, "modules_to_not_convert": set(quantizer.modules_to_not_convert)}
        assert held.pop("quantization_config") is model.config.quantization_config
        marks["hf_quantizer"] = (type(quantizer), held)
    marks["config"] = model.config.to_dict().get("quantization_config")
    marks["type"] = type(getattr(model.config, "quantization_config", None))
    inner = [m for m in model.modules() if isinstance(m, transformers.PreTrainedModel)]
    marks["marked"] = [getattr(m.config, "_is_quantized", "missing") for m in inner]
    return marks


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_a_model_loaded_as_int8_keeps_its_own_words(kind: str, tmp_path: Path, bnb: Any) -> None:
    new_model(kind).save_pretrained(tmp_path / "floats")
    skipped = ["lm_head", "layers.1", "h.1", "k"]
    by_transformers(tmp_path / "floats", llm_int8_skip_modules=skipped, llm_int8_threshold=4.5).save_pretrained(
        tmp_path / "int8"
    )
    theirs = by_transformers(tmp_path / "int8")
    table = json.loads((tmp_path / "int8" / "config.json").read_text())
    said = int8_config(table)
    assert said == {"llm_int8_threshold": 4.5, "llm_int8_skip_modules": skipped}
    checkpoint = inspect(tmp_path / "int8")
    ours: Any = hf.build(hf.read_blueprint(checkpoint, ModelRequest()), checkpoint, "auto").eval()
    assert isinstance(ours.config.quantization_config, dict)
    assert not existing_int8(ours)
    assert all(parameter.is_floating_point() for parameter in ours.parameters())
    stored = load_file(tmp_path / "int8" / "model.safetensors")
    names = [name for name, _ in ours.named_modules() if f"{name}.SCB" in stored]
    layers = swap(ours, names)
    for name in names:
        layer = ours.get_submodule(name)
        layer.weight = nn.Parameter(stored[f"{name}.weight"], requires_grad=False)
        layer.SCB = nn.Parameter(stored[f"{name}.SCB"], requires_grad=False)
    layers.finish(4.5)
    assert names == existing_int8(theirs)
    for _ in range(2):
        mark_quantised(ours, None, 4.5)
        assert marks_of(ours) == marks_of(theirs)
    assert ours.hf_quantizer.pre_quantized


def test_what_transformers_would_not_find_by_itself_is_written_down(tmp_path: Path, bnb: Any) -> None:
    """Layers kept as floats, and patterns that only lowmem knows: the list in the config names the same layers."""
    model = new_model("llama").eval()
    names = layers_to_quantise(model, Int8Request(True, ("*mlp", "self_attn.k_proj")), ("layers.0",)).names
    weights = floats_of(model, names)
    layers = swap(model, names)
    fill(model, weights)
    layers.finish(6.0)
    mark_quantised(model, ["*mlp", "self_attn.k_proj"], 6.0)
    model.save_pretrained(tmp_path)
    theirs = by_transformers(tmp_path)
    assert existing_int8(theirs) == list(names)
    assert_same_outputs(model, theirs)


def test_layers_are_told_apart_where_one_name_is_the_end_of_another(bnb: Any) -> None:
    model = new_model("llama").eval()
    quantised(model, Int8Request(True, ("lm_head", "model.layers.1.mlp", "model.layers.2.mlp.up_proj$")))
    mark_quantised(model, ["up_proj"], 6.0)
    skipped = model.config.quantization_config.llm_int8_skip_modules
    left = {n for n, m in model.named_modules() if type(m) is nn.Linear}
    assert {n for n in [*left, *existing_int8(model)] if not should_convert_module(n, skipped)} == left


def test_without_bitsandbytes_the_model_moves_and_saves_what_transformers_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bnb: Any
) -> None:
    model = new_model("gpt2").eval()
    with monkeypatch.context() as patch:
        patch.setattr(int8, "bitsandbytes_here", lambda: False)
        patch.setattr(transformers.modeling_utils, "is_bitsandbytes_available", lambda *_: False)
        quantised(model)
        for _ in range(2):
            mark_quantised(model, None, 6.0)
        assert not existing_int8(model)
        assert model.is_quantized
        assert not hasattr(model, "hf_quantizer")
        assert not hasattr(model, "is_loaded_in_8bit")
        assert model.to("cpu") is model
        patch.setattr(nn.Module, "cuda", lambda self: self)
        assert model.cuda() is model
        for cast in (model.half, model.float, lambda: model.to(torch.float16)):
            with pytest.raises(ValueError, match=r"not supported|cannot cast"):
                cast()
        model.save_pretrained(tmp_path)
    theirs = by_transformers(tmp_path)
    assert len(existing_int8(theirs)) == 12
    with torch.no_grad():
        ours = model(**inputs_of(model)).logits
        torch.testing.assert_close(theirs(**inputs_of(theirs)).logits, ours, atol=0.1, rtol=0.1)


def test_unmark_leaves_a_model_of_floats(tmp_path: Path, bnb: Any) -> None:
    model = new_model("llama").eval()
    quantised(model)
    mark_quantised(model, None, 6.0)
    floats = new_model("llama")
    unmark(model)
    assert marks_of(model) == {**marks_of(floats), "is_quantized": False}
    assert model.config.to_dict() == floats.config.to_dict()


# ---- modules of bitsandbytes that the user has built ----


def test_a_linear8bitlt_of_the_users_own_comes_back_with_the_loaded_tensors(bnb: Any) -> None:
    model = nn.Sequential(bnb.nn.Linear8bitLt(4, 6, has_fp16_weights=False, threshold=3.0), nn.Linear(6, 6))
    own, weight, bias = model[0], model[0].weight, model[0].bias
    fp16 = bnb.nn.Linear8bitLt(4, 4)
    assert existing_int8(nn.Sequential(fp16, *model)) == ["1"]
    assert layers_to_quantise(model, QUANTISE, ()).names == ("1",)
    values = torch.randn(6, 4)
    layers = swap(model, ["0"])
    assert type(model[0]) is Int8Linear
    assert model[0].weight.is_meta
    assert model[0].bias is bias
    fill(model, {"0": values})
    loaded: Any = model[0]
    layers.finish(6.0)
    assert model[0] is own
    assert own.state.threshold == 3.0
    assert own.weight.data_ptr() == loaded.weight.data_ptr()
    assert own.weight.SCB.data_ptr() == loaded.SCB.data_ptr()
    x = torch.randn(2, 4)
    torch.testing.assert_close(own(x), nn.functional.linear(x, values, bias), atol=0.1, rtol=0.1)
    layers.undo()
    assert model[0] is own
    assert own.weight is weight
    assert own.bias is bias
    assert own.state.CB is None


def test_layers_on_meta_stay_there_and_hooks_load_them(bnb: Any, tmp_path: Path) -> None:
    from accelerate import dispatch_model

    model, reference = plain(), quantised(plain())
    x = torch.randn(2, 4)
    state = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    layers = swap(model, ["0", "2.0"])
    fill(model, {"2.0": model[2][0].bias.new_ones(6, 6)})
    layers.finish(6.0)
    layer: Any = model[0]
    assert type(layer) is bnb.nn.Linear8bitLt
    assert layer.weight.is_meta
    assert layer.weight.dtype == torch.int8
    quantised(model)
    where = {"safetensors_file": str(tmp_path / "model.safetensors")}
    index = {f"0.{leaf}": {**where, "weight_name": f"0.{leaf}"} for leaf in ("weight", "SCB", "bias")}
    dispatch_model(model, {"0": "disk", "1": "cpu", "2": "cpu"}, main_device="cpu", offload_index=index)
    exchange_hooks(model)
    for _ in range(2):
        assert same(model[0](x), reference[0](x))
        assert layer.weight.is_meta
        assert layer.state.CB is None
        assert layer.state.SCB is None
    model(x)


# ---- what rules of models do with int8 layers ----


def test_the_scales_take_no_gradient_and_the_bias_does(without_bitsandbytes: None) -> None:
    model = quantised(new_model("gpt2"))
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dim() == 1 and parameter.requires_grad:
            parameter.requires_grad_(False)
    TransformersRules(model, built=True).finish(())
    for module in model.modules():
        if isinstance(module, Int8Linear):
            flags = {leaf: p.requires_grad for leaf, p in module.named_parameters()}
            assert flags == {"weight": False, "SCB": False, "bias": True}


def test_initialising_other_tensors_leaves_int8_layers_alone(without_bitsandbytes: None) -> None:
    model: Any = quantised(new_model("bert"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    TransformersRules(model, built=True).initialise(["pooler.dense.bias", "encoder.layer.0.output.LayerNorm.bias"])
    after = model.state_dict()
    changed = {name for name, tensor in before.items() if not same(tensor, after[name])}
    assert changed <= {"pooler.dense.bias", "encoder.layer.0.output.LayerNorm.bias"}


# ---- what configs and keys say ----


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({}, None),
        ({"quantization_config": {"load_in_8bit": True}}, (6.0, None)),
        ({"quantization_config": {"load_in_8bit": True, "llm_int8_threshold": 5}}, (5.0, None)),
        (
            {"quantization_config": {"load_in_8bit": True, "llm_int8_skip_modules": ["a"], "load_in_4bit": False}},
            (6.0, ["a"]),
        ),
        ({"text_config": {"quantization_config": {"load_in_8bit": True, "llm_int8_threshold": 2.0}}}, (2.0, None)),
        ({"quantization_config": {"load_in_8bit": False, "load_in_4bit": True}}, None),
        ({"quantization_config": {"load_in_8bit": True, "llm_int8_has_fp16_weight": True}}, None),
        ({"quantization_config": {"quant_method": "gptq"}}, None),
    ],
)
def test_what_a_config_says_of_int8(table: dict[str, Any], said: tuple[float, Any] | None) -> None:
    keys = ("llm_int8_threshold", "llm_int8_skip_modules")
    assert int8_config(table) == (None if said is None else dict(zip(keys, said, strict=True)))


@pytest.mark.parametrize("value", ["6", True, -1, float("nan"), None])
def test_a_threshold_that_is_none_is_an_error(value: Any) -> None:
    with pytest.raises(ModelError, match="x: quantization_config: 'llm_int8_threshold'"):
        int8_config({"quantization_config": {"load_in_8bit": True, "llm_int8_threshold": value}}, "x")


@pytest.mark.parametrize("value", ["lm_head", [1], {"a": 1}])
def test_a_skip_list_that_is_none_is_an_error(value: Any) -> None:
    with pytest.raises(ModelError, match="'llm_int8_skip_modules': expected a list"):
        int8_config({"quantization_config": {"load_in_8bit": True, "llm_int8_skip_modules": value}})


def test_int8_with_scales_is_not_refused_and_what_lies_beside_it_is(tmp_path: Path) -> None:
    weight = torch.ones(4, 4, dtype=torch.int8)
    tensors = {"a.weight": weight, "a.SCB": torch.ones(4), "a.weight_format": torch.tensor(0, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "model.safetensors")
    said = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    (tmp_path / "quant_config.json").write_text("{}")
    for table in ({}, said):
        refuse_quantised(inspect(tmp_path), "config.json", table)
    four = {"b.weight": weight.to(torch.uint8), "b.weight.absmax": torch.ones(4)}
    (tmp_path / "quant_config.json").unlink()
    save_file({**tensors, **four}, tmp_path / "model.safetensors")
    for table in ({}, said):
        with pytest.raises(UnsupportedError, match="bitsandbytes 4 bit"):
            refuse_quantised(inspect(tmp_path), "config.json", table)
    with pytest.raises(ModelError, match="llm_int8_threshold"):
        refuse_quantised(
            inspect(tmp_path), "c", {"quantization_config": {"load_in_8bit": True, "llm_int8_threshold": ""}}
        )
