"""int8 layers whose weights are on disk: right, bit for bit, and nothing of them in memory behind a forward."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils.modeling import get_state_dict_offloaded_model
from fresh import server
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lowmem
from lowmem.checkpoint import inspect
from lowmem.errors import RunningError
from lowmem.int8 import Int8Linear, quantise, work_size
from lowmem.mapping import Link
from lowmem.mapping.records import whole
from lowmem.offload import MappedWeights, hooks
from lowmem.offload.hooks import dispatch_by_hooks as dispatch
from lowmem.planner import Placement
from lowmem.sizes import MIB

bitsandbytes = pytest.importorskip("bitsandbytes")

# It says so at every call that it casts activations.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

ALL: dict[str, str] = {"": "disk"}
ONE = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
ONE |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
PART = ONE | {"model.layers.1.self_attn": "cpu", "model.layers.1.mlp": "disk"}
PART |= {"model.layers.1.input_layernorm": "cpu", "model.layers.1.post_attention_layernorm": "cpu"}
del PART["model.layers.1"]
MAPS = {"all": ALL, "one layer": ONE, "parts of layers": PART}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """int8 products of this size take most of their time to share out, if a core is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def int8_of(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, scales = torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight))
    quantise(weight, values, scales, torch.empty(work_size(weight.shape[1]), dtype=torch.uint8))
    return values, scales


def as_bitsandbytes(linear: nn.Linear, threshold: float = 0.0) -> nn.Module:
    made = bitsandbytes.nn.Linear8bitLt(
        linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False, threshold=threshold
    )
    values, scales = int8_of(linear.weight.data)
    made.weight = bitsandbytes.nn.Int8Params(values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=scales)
    if linear.bias is not None:
        made.bias = linear.bias
    return made


def as_int8_linear(linear: nn.Linear) -> nn.Module:
    made = Int8Linear(linear.in_features, linear.out_features, linear.bias is not None)
    values, scales = int8_of(linear.weight.data)
    made.weight, made.SCB = nn.Parameter(values, requires_grad=False), nn.Parameter(scales, requires_grad=False)
    made.bias = linear.bias
    return made


def quantised(model: nn.Module, make: Callable[..., nn.Module] = as_bitsandbytes, **options: Any) -> nn.Module:
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "lm_head" not in name:
            model.set_submodule(name, make(module, **options))
    return model.eval()


def llama(
    dtype: torch.dtype = torch.float32, bias: bool = True, make: Callable[..., nn.Module] = as_bitsandbytes, **more: Any
) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=bias, mlp_bias=bias, tie_word_embeddings=False,
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return quantised(model.to(dtype), make, **more)


def is_int8(module: nn.Module) -> bool:
    return isinstance(module, bitsandbytes.nn.Linear8bitLt | Int8Linear)


def stored(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.contiguous() for name, t in model.state_dict().items() if not name.endswith("weight_format")}


def device_of(name: str, device_map: dict[str, str]) -> str:
    found = [module for module in device_map if not module or name == module or name.startswith(f"{module}.")]
    return device_map[max(found, key=len)]


def to_meta(module: nn.Module) -> None:
    for name, parameter in list(module._parameters.items()):
        if parameter is not None:
            empty = torch.empty_like(parameter.data, device="meta")
            more = {"has_fp16_weights": False} if type(parameter).__name__ == "Int8Params" else {}
            module._parameters[name] = type(parameter)(empty, requires_grad=parameter.requires_grad, **more)


def plan_of(file: Path, model: nn.Module, device_map: dict[str, str], init: bool = False) -> Any:
    """What of a plan a dispatch asks for; `init` makes int8 layers on disk such as no checkpoint has."""
    save_file(stored(model), file)
    checkpoint = inspect(file.parent)
    placements = []
    for name in stored(model):
        entry = checkpoint[name]
        device = device_of(name, device_map)
        link = Link(entry, name, whole(entry.shape))
        int8 = is_int8(model.get_submodule(name.rpartition(".")[0]))
        way: Any = "copy" if device == "cpu" else "init" if init and int8 else "refer"
        shape = entry.shape
        placements.append(Placement(name, (name,), shape, entry.dtype, entry.nbytes, device, way, (link,)))
    return SimpleNamespace(
        device_map=device_map, main_device="cpu", placements=placements, checkpoint=checkpoint, offload=None
    )


def spread(model: nn.Module, folder: Path, device_map: dict[str, str] = ALL, **options: Any) -> Any:
    """A copy of the model, dispatched as lowmem does it."""
    plan = plan_of(folder / "model.safetensors", model, device_map, **options)
    found = copy.deepcopy(model)
    absent = {p.target.rpartition(".")[0] for p in plan.placements if p.residency == "refer"}
    for name in absent:
        to_meta(found.get_submodule(name))
    dispatch(found, plan, SimpleNamespace(skip_keys=("past_key_values",)))  # type: ignore[arg-type]
    return found


def check_nothing_stays(model: nn.Module, device_map: dict[str, str] = ALL) -> None:
    seen = 0
    for name, module in model.named_modules():
        if is_int8(module) and device_of(name, device_map) == "disk":
            seen += 1
            assert all(p.is_meta for p in module.parameters()), name
            assert module.weight.dtype == torch.int8
            if not isinstance(module, Int8Linear):
                assert module.weight.CB is None
                assert module.weight.SCB.is_meta
                state = module.state
                assert [state.CB, state.SCB, state.SB, state.idx] == [None] * 4
    assert seen


@pytest.fixture
def tensors() -> Iterator[Callable[[], int]]:
    """Counts the tensors that were made after its first call, as far as they are alive."""
    gc.collect()

    def count() -> int:
        if not gc.get_freeze_count():
            gc.freeze()
        gc.collect()
        return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())

    yield count
    gc.unfreeze()


def ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 96, (2, 7), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("threshold", [0.0, 0.5])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", MAPS)
def test_logits_are_those_of_the_model_in_memory(
    tmp_path: Path, where: str, dtype: torch.dtype, bias: bool, threshold: float
) -> None:
    model: Any = llama(dtype, bias, threshold=threshold)
    found = spread(model, tmp_path, MAPS[where])
    with torch.no_grad():
        for seed in range(3):
            assert torch.equal(found(ids(seed)).logits, model(ids(seed)).logits)
            check_nothing_stays(found, MAPS[where])


@pytest.mark.parametrize("where", MAPS)
def test_generated_tokens_are_those_of_the_model_in_memory(tmp_path: Path, where: str) -> None:
    model: Any = llama()
    found = spread(model, tmp_path, MAPS[where])
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(found.generate(ids(), **options), model.generate(ids(), **options))
    check_nothing_stays(found, MAPS[where])


@pytest.mark.parametrize("how", ["mapped here", "no file has it"])
def test_weights_that_accelerate_cannot_open(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "mapped here":
        monkeypatch.setattr(hooks, "_mapped_here", lambda plan: {p for p in plan.placements if p.residency == "refer"})
    model: Any = llama()
    found = spread(model, tmp_path, ALL, init=how != "mapped here")
    with torch.no_grad():
        for seed in range(2):
            assert torch.equal(found(ids(seed)).logits, model(ids(seed)).logits)
            check_nothing_stays(found)


def test_mapped_weights_are_used_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer computes with the pages that the map gives."""
    monkeypatch.setattr(hooks, "_mapped_here", lambda plan: {p for p in plan.placements if p.residency == "refer"})
    found = spread(llama(), tmp_path)
    layer = found.model.layers[0].mlp.down_proj
    given: list[int] = []
    plain = MappedWeights.__getitem__

    def noted(self: MappedWeights, name: str) -> torch.Tensor:
        tensor = plain(self, name)
        given.append(tensor.data_ptr())
        return tensor

    monkeypatch.setattr(MappedWeights, "__getitem__", noted)
    layer._hf_hook.pre_forward(layer)
    assert sorted(given) == sorted([layer.weight.CB.data_ptr(), layer.weight.SCB.data_ptr(), layer.bias.data_ptr()])
    layer._hf_hook.post_forward(layer, None)
    check_nothing_stays(found)


@pytest.mark.parametrize("make", [as_bitsandbytes, as_int8_linear])
def test_fifty_forwards_leave_no_tensor(
    tmp_path: Path, tensors: Callable[[], int], make: Callable[..., nn.Module]
) -> None:
    found = spread(llama(make=make), tmp_path)
    counts = []
    with torch.no_grad():
        for seed in range(50):
            found(ids(seed))
            if seed % 7 == 0:
                counts.append(tensors())
    # accelerate makes a parameter on meta of each that it took away.
    assert {*counts[2:]} == {counts[1]}, counts
    own = [module for module in found.modules() if make is as_int8_linear or not is_int8(module)]
    assert counts[-1] == sum(len(list(module.parameters(recurse=False))) for module in own)


@pytest.mark.parametrize("train", [False, True])
def test_a_graph_that_is_kept_keeps_no_weight(tmp_path: Path, train: bool) -> None:
    found = spread(llama(), tmp_path).train(train)
    weights: list[Any] = []
    layer = found.model.layers[0].mlp.down_proj
    plain = layer._old_forward

    def noted(x: torch.Tensor) -> Any:
        weights.extend([weakref.ref(layer.weight), weakref.ref(layer.weight.CB), weakref.ref(layer.weight.SCB)])
        return plain(x)

    layer._old_forward = noted
    kept = found(ids()).logits
    assert kept.grad_fn is not None
    gc.collect()
    assert [reference() for reference in weights] == [None] * 3
    check_nothing_stays(found)


def test_activations_of_another_dtype_leave_the_bias_as_it_is_stored(tmp_path: Path) -> None:
    """bitsandbytes casts the parameter itself; here it is brought anew for each forward."""
    model: Any = llama(torch.float32)
    found = spread(model, tmp_path)
    layer, reference = (one.model.layers[0].mlp.down_proj for one in (found, model))
    x = torch.randn(3, 112)
    with torch.inference_mode():
        wanted = reference(x)
        assert layer(x.bfloat16()).dtype == torch.bfloat16
        assert torch.equal(layer(x), wanted)
    assert layer.bias.dtype == torch.float32
    assert torch.equal(layer(x).detach(), wanted)
    check_nothing_stays(found)


def test_a_layer_that_failed_is_mended_by_the_next_forward(tmp_path: Path) -> None:
    model: Any = llama()
    found = spread(model, tmp_path)
    layer = found.model.layers[0].mlp.down_proj
    with torch.no_grad():
        with pytest.raises(RuntimeError):
            layer(torch.randn(2, 3))
        assert torch.equal(found(ids()).logits, model(ids()).logits)
    check_nothing_stays(found)


def test_a_weight_that_cannot_be_brought_leaves_the_layer_on_meta(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = llama()
    found = spread(model, tmp_path)
    layer = found.model.layers[0].mlp.down_proj
    with monkeypatch.context() as patch:
        there = layer._hf_hook.weights_map
        patch.setattr(layer._hf_hook, "weights_map", {"weight": there["weight"], "SCB": there["SCB"]})
        with pytest.raises(KeyError, match="bias"):
            layer(torch.randn(2, 112))
    check_nothing_stays(found)
    with torch.no_grad():
        assert torch.equal(found(ids()).logits, model(ids()).logits)


class Noting(ModelHook):
    """Notes what it sees of a weight."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.seen.append("before")
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.seen.append("behind")
        return output


def test_hooks_that_were_at_the_module_stay_and_accelerates_manner_is_kept(tmp_path: Path) -> None:
    model: Any = llama()
    other = Noting()
    plan = plan_of(tmp_path / "model.safetensors", model, ALL)
    found: Any = copy.deepcopy(model)
    for module in found.modules():
        to_meta(module)
    layer = found.model.layers[0].mlp.down_proj
    add_hook_to_module(layer, other)
    dispatch(found, plan, SimpleNamespace(skip_keys=("past_key_values",)))  # type: ignore[arg-type]
    assert isinstance(layer._hf_hook, SequentialHook)
    first, second = layer._hf_hook.hooks
    assert first is other
    assert isinstance(second, AlignDevicesHook)
    plain = found.model.embed_tokens._hf_hook
    assert type(plain) is AlignDevicesHook
    assert type(second) is not AlignDevicesHook
    for name in ("execution_device", "offload", "io_same_device", "offload_buffers", "place_submodules", "skip_keys"):
        assert getattr(second, name) == getattr(plain, name)
    with torch.no_grad():
        assert torch.equal(found(ids()).logits, model(ids()).logits)
    assert other.seen == ["before", "behind"]
    check_nothing_stays(found)


def test_a_layer_alone_gives_its_output_on_the_device_of_its_input(tmp_path: Path) -> None:
    """`io_same_device` and `skip_keys` as accelerate's hook has them; meta stands for another device."""
    found = spread(llama(), tmp_path)
    layer = found.model.layers[0].mlp.down_proj
    hook = layer._hf_hook
    hook.io_same_device, hook.skip_keys = True, "kept"
    (moved,), named = hook.pre_forward(layer, torch.ones(2), kept=torch.ones(1, device="meta"))
    assert (moved.device.type, named["kept"].device.type) == ("cpu", "meta")
    hook.post_forward(layer, None)
    hook.pre_forward(layer, torch.ones(2, device="cpu"))
    hook.input_device = torch.device("meta")
    assert hook.post_forward(layer, torch.ones(3)).is_meta
    hook.execution_device = "meta"
    hook.pre_forward(layer, torch.ones(2))
    assert layer.weight.CB is None
    hook.post_forward(layer, None)
    check_nothing_stays(found)


@pytest.mark.parametrize("init", [False, True])
def test_without_hooks_what_was_in_memory_is_there_again(tmp_path: Path, init: bool) -> None:
    model = llama()
    found = spread(model, tmp_path, ALL, init=init)
    with torch.no_grad():
        found(ids())
    name = "model.layers.0.mlp.down_proj"
    layer, reference = found.get_submodule(name), model.get_submodule(name)
    remove_hook_from_module(layer)
    assert layer.weight.is_meta is not init
    if init:
        assert torch.equal(layer.weight, reference.weight)
        assert torch.equal(layer.weight.SCB, reference.weight.SCB)
        x = torch.randn(2, 112)
        assert torch.equal(layer(x), reference(x))


@pytest.mark.parametrize("where", MAPS)
def test_scales_on_disk_survive_saving(tmp_path: Path, where: str) -> None:
    model: Any = llama()
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = spread(model, tmp_path, MAPS[where])
    with torch.no_grad():
        found(ids())
    assert found.state_dict().keys() == wanted.keys()
    with pytest.warns(UserWarning, match="offloaded modules"):
        found.save_pretrained(tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    taken = get_state_dict_offloaded_model(found)
    for other in (saved, taken):
        assert other.keys() == wanted.keys()
        assert all(torch.equal(other[name], tensor) for name, tensor in wanted.items())
        assert all(other[name].dtype == tensor.dtype for name, tensor in wanted.items())
    del other, saved, taken
    check_nothing_stays(found, MAPS[where])


def test_attributes_of_a_quantised_model_change_nothing(tmp_path: Path) -> None:
    model: Any = llama()
    model.is_loaded_in_8bit = model.is_quantized = True
    model.quantization_method = "bitsandbytes"
    found = spread(model, tmp_path, ONE)
    with torch.no_grad():
        assert torch.equal(found(ids()).logits, model(ids()).logits)
    check_nothing_stays(found, ONE)


def test_an_int8_model_on_one_device_is_moved_although_its_own_to_refuses() -> None:
    class Refusing(nn.Linear):
        is_loaded_in_8bit = True

        def to(self, *_: Any, **__: Any) -> Any:
            raise ValueError("You need to install bitsandbytes>=0.48.0")

    model = Refusing(3, 3)
    dispatch(model, SimpleNamespace(device_map={"": "meta"}), SimpleNamespace())  # type: ignore[arg-type]
    assert model.weight.is_meta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", MAPS)
def test_layers_without_bitsandbytes_on_disk(tmp_path: Path, where: str, dtype: torch.dtype) -> None:
    """accelerate's own hook serves them: weight and scales are ordinary parameters."""
    model: Any = llama(dtype, make=as_int8_linear)
    found = spread(model, tmp_path, MAPS[where])
    with torch.no_grad():
        for seed in range(3):
            assert torch.equal(found(ids(seed)).logits, model(ids(seed)).logits)
            check_nothing_stays(found, MAPS[where])
    assert {p.dtype for m in found.modules() if is_int8(m) for p in [m.SCB]} == {torch.float32}
    with pytest.warns(UserWarning, match="offloaded modules"):
        found.save_pretrained(tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        wanted = model.state_dict()
        assert set(file.keys()) == set(wanted)
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in wanted.items())


_MEASURE = """
import ctypes, torch, tempfile, pathlib
import test_int8_on_disk as made
from torch import nn
from lowmem.memory import measure

torch.set_num_threads(1)
# M_MMAP_THRESHOLD: what glibc keeps of freed blocks is no weight's, and is some of them or all by chance.
getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)(-3, 64 * 1024)

def peak(make, count):
    torch.manual_seed(0)
    plain = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(count)))
    whole, x = made.quantised(plain, make), torch.randn(2, 1024)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        wanted = whole(x)
        model = made.spread(whole, pathlib.Path(folder))
        del whole
        # What is imported at the first forward is no weight's.
        model(x)
        with measure() as memory:
            got = model(x)
    assert torch.equal(got, wanted)
    return memory.peak

result = [peak(make, args["count"]) for make in (made.as_bitsandbytes, made.as_int8_linear)]
"""


def test_forwards_take_the_memory_of_one_layer() -> None:
    """Of one layer's floats, that is, which both kinds compute with on most processors."""
    peaks = server().run(_MEASURE, count=32)
    assert max(peaks) <= 4 * 4 * MIB, peaks


def test_int8_pages_are_refused_a_move_as_floats_are(tmp_path: Path) -> None:
    """And a layer whose weights are in memory is not kept from one."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )
    model.save_pretrained(tmp_path / "floats")
    lowmem.convert(tmp_path / "floats", tmp_path / "int8", quantize="int8")
    device_map = {"": "cpu", "model.layers.1.mlp": "disk"}
    ours = lowmem.load(tmp_path / "int8", device_map=device_map).model
    layer = ours.model.layers[1].mlp.up_proj
    before = layer.weight.data_ptr()
    with pytest.raises(RunningError, match="on disk and cannot be moved"):
        nn.Module.to(ours, "meta")
    assert layer.weight.data_ptr() == before
    assert not any(parameter.is_meta for parameter in ours.parameters())
    nn.Module.to(ours.model.layers[0], "cpu")
