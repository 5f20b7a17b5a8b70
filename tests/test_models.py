"""A model that cannot be filled, or cannot be made, is refused before the load, with its name and the remedy."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import change_config, every_tensor, same
from torch import nn

import lowmem
from lowmem.errors import LowmemError, ModelError

pytestmark = pytest.mark.usefixtures("one_thread")

Folder = Callable[..., Path]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x)))


def write(model: nn.Module, path: Path) -> Path:
    tensors = {name: torch.full_like(tensor, 3) for name, tensor in model.state_dict().items()}
    save_file(tensors, path / "x.safetensors")
    return path / "x.safetensors"


def refused(path: Path, text: str, **options: Any) -> None:
    """Loading and planning both refuse."""
    for verb in (lowmem.load, lowmem.plan):
        with pytest.raises(ModelError, match=text):
            verb(path, **options)


# ---- a module that computes with other weights than those it is given ----


def test_a_module_with_accelerate_hooks_is_refused(tmp_path: Path) -> None:
    """They would bring the old weights back."""
    import accelerate

    path = write(Net(), tmp_path)
    model = accelerate.cpu_offload(Net(), execution_device="cpu")
    refused(
        path, r"model \(Net\): expected no accelerate hooks, found .*remove_hook_from_submodules\(model\)", model=model
    )
    accelerate.hooks.remove_hook_from_submodules(model)


@pytest.mark.parametrize("dispatch", ["lowmem", "accelerate"])
def test_a_model_that_was_loaded_onto_disk_is_refused_until_its_hooks_are_gone(dispatch: str, tmp_path: Path) -> None:
    import accelerate

    path = write(Net(), tmp_path)
    model = lowmem.load(path, model=Net, device_map={"": "cpu", "last": "disk"}, dispatch=dispatch).model
    if dispatch == "lowmem":
        refused(path, "expected no weights on disk", model=model)
        lowmem.release(model)
    else:
        refused(path, "accelerate hooks", model=model)
        accelerate.hooks.remove_hook_from_submodules(model)
    again = lowmem.load(path, model=model).model
    x = torch.ones(2, 3)
    assert same(again(x), lowmem.load(path, model=Net).model(x))


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return torch.ones(1)

    def set_extra_state(self, state: Any) -> None:
        pass


class Doubling(nn.Linear):
    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        state_dict[prefix + "weight"] = state_dict[prefix + "weight"] * 2
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Packed(nn.Linear):
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "packed"] = self.weight


@pytest.mark.parametrize(
    ("kind", "text"), [(Extra, "extra state"), (Doubling, "_load_from_state_dict"), (Packed, "packed parameters")]
)
def test_a_module_with_a_state_of_its_own_is_refused(kind: type[nn.Linear], text: str, tmp_path: Path) -> None:
    path = write(nn.Sequential(nn.Linear(2, 2)), tmp_path)
    refused(path, rf"module '0' \({kind.__name__}\): .*{text}.*load_state_dict", model=nn.Sequential(kind(2, 2)))


def test_quantised_modules_of_torch_are_refused(tmp_path: Path) -> None:
    quantised = pytest.importorskip("torch.ao.nn.quantized")
    path = write(nn.Linear(2, 2), tmp_path)
    try:
        model = nn.Sequential(quantised.Linear(2, 2))
    except RuntimeError:
        pytest.skip("no quantised kernels on this machine")
    refused(path, "packed parameters", model=model)


def test_a_hook_that_may_rename_keys_is_refused_and_those_of_torch_are_not(tmp_path: Path) -> None:
    def rename(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        state[prefix + "weight"] = state.pop(prefix + "weight").mT

    model = nn.Sequential(nn.Linear(2, 2))
    path = write(model, tmp_path)
    model[0].register_load_state_dict_pre_hook(rename)
    refused(path, r"module '0' \(Linear\): its load_state_dict pre-hook .*rename.*remove the hook", model=model)

    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), nn.BatchNorm1d(2))
    normed.append(nn.MultiheadAttention(2, 1)).append(nn.InstanceNorm1d(2, track_running_stats=True))
    loaded = lowmem.load(write(normed, tmp_path), model=normed).model
    assert all((tensor == 3).all() for tensor in loaded.state_dict().values())


def test_transformers_models_with_hooks_and_loaders_of_their_own_are_not_refused() -> None:
    """`from_pretrained` never runs them."""
    transformers = pytest.importorskip("transformers")
    from lowmem.modeling.checks import checked_modules

    config = transformers.MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, state_size=2)
    model = transformers.MambaModel(config)
    assert model._load_state_dict_pre_hooks
    assert len(list(checked_modules(model, transformers=True))) == len(list(model.modules()))
    assert len(list(checked_modules(nn.Sequential(model), transformers=False))) == len(list(model.modules())) + 1


# ---- a module that has no state dict to speak of ----


def test_a_module_inside_itself_is_refused(tmp_path: Path) -> None:
    model = Net()
    path = write(model, tmp_path)
    model.first.parent = model
    refused(path, r"module 'first\.parent' is the model itself, .*found a cycle", model=model)
    deep = nn.Sequential(nn.Sequential(nn.Sequential()))
    deep[0][0].up = deep[0]
    refused(path, r"module '0\.0\.up' is '0', .*found a cycle", model=deep)


def test_a_module_under_two_names_is_no_cycle(tmp_path: Path) -> None:
    shared = nn.Sequential(nn.Linear(2, 2))
    path = tmp_path / "x.safetensors"
    save_file({"0.0.weight": torch.ones(2, 2), "0.0.bias": torch.ones(2)}, path)
    model = lowmem.load(path, model=nn.Sequential(shared, shared), strict=False).model
    assert model[0] is model[1]
    assert (model[1][0].weight == 1).all()


@pytest.mark.parametrize("model", [lambda: nn.Sequential(nn.LazyLinear(2)), nn.Sequential(nn.LazyLinear(2))])
def test_lazy_parameters_are_refused(model: Any, tmp_path: Path) -> None:
    path = write(nn.Sequential(nn.Linear(2, 2)), tmp_path)
    refused(path, r"tensor '0\.weight' is lazy.*run one dummy forward first", model=model)
    ready = nn.Sequential(nn.LazyLinear(2))
    ready(torch.ones(1, 2))
    assert (lowmem.load(path, model=ready).model[0].weight == 3).all()


def test_torchscript_is_refused(tmp_path: Path) -> None:
    path = write(nn.Linear(2, 2), tmp_path)
    scripted = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))
    refused(path, r"model .*found TorchScript", model=scripted)
    refused(path, r"module '0' .*found TorchScript", model=nn.Sequential(scripted))


class Wrapped(torch.Tensor):
    """A tensor subclass, as DTensor is one."""


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_tensor_subclasses_are_refused(kind: str, tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = nn.Linear(2, 2)
        tensor = torch.ones(2, 2).as_subclass(Wrapped)
        if kind == "parameter":
            model.weight = nn.Parameter(tensor)
        else:
            model.register_buffer("weighted", tensor)
        return model

    path = write(nn.Linear(2, 2), tmp_path)
    for model in (make, make()):
        refused(path, r"tensor 'weight(ed)?': expected a plain torch tensor, found Wrapped", model=model)


@pytest.mark.parametrize("table", ["_parameters", "_buffers", "_modules"])
def test_names_with_dots_are_refused(table: str, tmp_path: Path) -> None:
    path = write(nn.Linear(2, 2), tmp_path)
    model = nn.Linear(2, 2)
    getattr(model, table)["a.b"] = nn.Linear(2, 2) if table == "_modules" else nn.Parameter(torch.ones(2))
    refused(path, r"model \(Linear\): expected names without a dot, found 'a\.b'", model=model)


# ---- a callable that does not make a model ----


def _raise(error: BaseException) -> Any:
    raise error


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("mine"), KeyError(0), SystemExit(3), MemoryError(), RuntimeError(), OSError("mine")]
)
def test_a_callable_that_raises_is_a_model_error_from_it(error: BaseException, tmp_path: Path) -> None:
    def make_it() -> nn.Module:
        raise error

    path = write(nn.Linear(2, 2), tmp_path)
    with pytest.raises(ModelError, match=r"the callable .*make_it failed: ..") as caught:
        lowmem.load(path, model=make_it)
    assert caught.value.__cause__ is error
    assert isinstance(caught.value, MemoryError) is isinstance(error, MemoryError)


def test_an_interrupt_and_an_error_of_lowmem_pass(tmp_path: Path) -> None:
    path = write(nn.Linear(2, 2), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        lowmem.load(path, model=lambda: _raise(KeyboardInterrupt()))
    mine = LowmemError("mine")
    with pytest.raises(LowmemError) as caught:
        lowmem.load(path, model=lambda: _raise(mine))
    assert caught.value is mine


def test_a_callable_that_asks_its_weights_for_values_is_told_what_to_do(tmp_path: Path) -> None:
    class Asks(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.scale = self.weight.max().item()

    refused(write(nn.Linear(2, 2), tmp_path), "Asks failed: .*build it yourself and pass the module", model=Asks)


@pytest.mark.parametrize("model", [nn.Linear, lambda config: Net(), type("Model", (nn.Linear,), {})])
def test_a_callable_that_needs_arguments_is_refused(model: Any, tmp_path: Path) -> None:
    path = write(nn.Linear(2, 2), tmp_path)
    refused(path, r"needs no arguments, found .*missing a required argument: '\w+'.*functools\.partial", model=model)


# ---- config.json ----


@pytest.mark.parametrize("value", [5, True, 3.5, [], "nope", "auto", "load", "Tensor", "torch.bfloat16", {"": 5}])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_dtype_that_is_none_is_refused(key: str, value: Any, own: Folder) -> None:
    folder = own("llama")
    change_config(folder, **{"dtype": None, key: value})
    refused(folder, rf"config\.json: '{key}': expected the name of a torch dtype.*pass dtype=")


@pytest.mark.parametrize("value", [{}, {"": "float16"}, {"text_config": "float16"}])
def test_a_dtype_for_each_sub_config_is_what_from_pretrained_makes_of_it(value: Any, own: Folder) -> None:
    import transformers

    folder = own("llama")
    change_config(folder, dtype=value)
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype="auto")
    assert lowmem.load(folder).model.dtype == theirs.dtype


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": 5},
        {"architectures": True},
        {"architectures": {"a": 1}},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": [["a"]]},
        {"auto_map": "x"},
        {"auto_map": ["x"]},
        {"auto_map": 5},
    ],
)
def test_a_config_that_names_its_class_in_no_sensible_way_is_refused(changes: dict[str, Any], own: Folder) -> None:
    folder = own("llama")
    change_config(folder, **changes)
    refused(folder, r"config\.json: ")


@pytest.mark.parametrize("code", [None, "import sys; sys.exit(1)", "1 +", "MyModel = 3", "raise KeyError"])
def test_code_beside_the_checkpoint_that_gives_no_model_is_refused(
    code: str | None, own: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = own("llama")
    change_config(folder, architectures=["MyModel"], auto_map={"AutoModelForCausalLM": "mine.MyModel"})
    if code is not None:
        (folder / "mine.py").write_text(code)
    refused(folder, r"config\.json: .*mine\.MyModel", trust_remote_code=True)


def test_code_of_another_repository_is_never_fetched(own: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import dynamic_module_utils

    asked: list[dict[str, Any]] = []

    def stand_in(*args: Any, **options: Any) -> Any:
        asked.append(options)
        raise OSError("not here")

    monkeypatch.setattr(dynamic_module_utils, "get_class_from_dynamic_module", stand_in)
    folder = own("llama")
    change_config(folder, architectures=["MyModel"], auto_map={"AutoModelForCausalLM": "some/one--mine.MyModel"})
    refused(folder, r"config\.json: MyModel cannot be imported from 'some/one--mine\.MyModel'", trust_remote_code=True)
    assert all(options["local_files_only"] for options in asked)


@pytest.mark.parametrize("error", [RuntimeError("no backend"), MemoryError()])
def test_a_class_that_cannot_be_imported_is_refused(
    error: Exception, own: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    module = type(transformers)
    before = module.__getattr__
    monkeypatch.setattr(module, "__getattr__", lambda self, n: _raise(error) if n == "Odd" else before(self, n))
    folder = own("llama")
    change_config(folder, architectures=["Odd"])
    refused(folder, r"config\.json: transformers cannot import 'Odd': .*(no backend|out of host memory)")


def test_no_memory_for_the_config_stays_a_memory_error(own: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *a, **k: _raise(MemoryError()))
    folder = own("llama")
    refused(folder, r"config\.json: transformers cannot read it: out of host memory \(MemoryError\); free memory")
    with pytest.raises(builtins.MemoryError):
        lowmem.load(folder)


# ---- generation_config.json ----


@pytest.mark.parametrize("text", ["[]", "null", "5", '{"max_new_tokens": -5}'])
def test_a_generation_config_that_means_nothing_is_refused_before_the_load(text: str, own: Folder) -> None:
    folder = own("llama")
    (folder / "generation_config.json").write_text(text)
    refused(folder, r"generation_config\.json: transformers cannot use it")


@pytest.mark.parametrize("text", ["", "{", "\xff", '{"temperature": 0.5, "max_new_tokens": 4}'])
def test_a_generation_config_is_what_from_pretrained_makes_of_it(text: str, own: Folder) -> None:
    import transformers

    folder = own("llama")
    (folder / "generation_config.json").write_bytes(text.encode("latin1"))
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder)
    for model in (None, lambda: transformers.LlamaForCausalLM(theirs.config)):
        ours: Any = lowmem.load(folder, model=model).model
        assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()


# ---- the caller's default device ----


@contextmanager
def default_meta() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("surroundings", [default_meta, lambda: torch.device("meta")])
@pytest.mark.parametrize("kind", ["llama-tied", "t5", "bert-mlm"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_default_device_of_meta_changes_nothing(
    surroundings: Callable[[], AbstractContextManager[Any]], kind: str, dtype: str, saved: Folder
) -> None:
    folder = saved(kind)
    with surroundings():
        ours = lowmem.load(folder, dtype=dtype).model
        assert torch.empty(0).is_meta
    theirs = lowmem.load(folder, dtype=dtype).model
    found, expected = every_tensor(ours), every_tensor(theirs)
    assert list(found) == list(expected)
    assert all(same(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("surroundings", [default_meta, lambda: torch.device("meta")])
def test_a_callable_keeps_its_buffers_and_missing_tensors_are_made_under_a_default_device_of_meta(
    surroundings: Callable[[], AbstractContextManager[Any]], tmp_path: Path
) -> None:
    class Rotary(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.register_buffer("freq", torch.arange(3.0), persistent=False)

    path = tmp_path / "x.safetensors"
    save_file({"weight": torch.ones(2, 2)}, path)
    with surroundings():
        model = lowmem.load(path, model=Rotary, strict=False).model
    assert same(model.freq, torch.arange(3.0))
    assert not any(tensor.is_meta for tensor in every_tensor(model).values())


def test_nothing_of_this_file_leaves_a_default_device() -> None:
    assert torch.empty(0).device.type == "cpu"
    assert "lowmem" in sys.modules
