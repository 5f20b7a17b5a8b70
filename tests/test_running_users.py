"""A model whose weights are on disk is an ordinary module for its users, and says clearly what it cannot be."""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import importlib.util
import io
import os
import pickle
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh import server
from safetensors import safe_open
from safetensors.torch import load_model, save_file, save_model
from test_ecosystem import assert_same_files, make_tokenizer, with_lora
from test_engine import linux, threads_of_lowmem
from tiny_models import inputs_of, least_ram, model_class, new_model, outputs_of, same
from torch import nn
from torch.nn import functional

import lowmem
from lowmem.errors import BudgetError, CheckpointError, LowmemError, OptionError, RunningError
from lowmem.sizes import MIB

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread", "quiet")

LAYERS = 6
# Of the file, which has fp32: mapped where it lies, or cast whenever it is used.
USES = {"mapped": "float32", "cast": "float64"}
use = pytest.mark.parametrize("dtype", USES.values(), ids=USES)
# Every second layer in memory.
MAPS = {
    "all": {"": "disk"},
    "half": {"": "disk", **{f"layers.{number}": "cpu" for number in range(1, LAYERS, 2)}},
}
# All that comes before it is in memory, and could be changed before it is seen.
LATE = {"": "cpu", "layers.4": "disk"}
anywhere = pytest.mark.parametrize("where", MAPS)


class Net(nn.Module):
    """Six layers of 256 KiB in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(LAYERS))

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x)) * scale
        return x


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(5)
    (tmp_path / "m").mkdir()
    save_file(Net().state_dict(), tmp_path / "m" / "m.safetensors")
    return tmp_path / "m" / "m.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    new_model("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def load(file: Path, dtype: str = "float32", where: str = "all", **options: Any) -> Any:
    return lowmem.load(
        file, model=Net, dtype=dtype, device_map=LATE if where == "late" else MAPS[where], **options
    ).model


def loaded(file: Path, dtype: str = "float32") -> Any:
    model = Net()
    load_model(model, file)
    return model.to(getattr(torch, dtype)).eval()


def load_narrowly(file: Path, dtype: str) -> Any:
    """With as little memory as the plan accepts: everything that is behind is given back."""
    options: dict[str, Any] = {"model": Net, "dtype": dtype, "device_map": {"": "disk"}}
    return lowmem.load(file, ram=least_ram(file, **options), **options).model


def batch(dtype: str = "float32", seed: int = 1) -> torch.Tensor:
    return torch.randn(3, 256, generator=torch.Generator().manual_seed(seed)).to(getattr(torch, dtype))


def check_same(ours: Any, other: Any, dtype: str = "float32", times: int = 3) -> None:
    for seed in range(times):
        with torch.no_grad():
            assert torch.equal(ours(batch(dtype, seed)), other(batch(dtype, seed)))


def refusal(call: Callable[[], Any], *kinds: type[Exception]) -> str | None:
    """What the call said against it, or None when it was done."""
    try:
        call()
    except (LowmemError, *kinds) as error:
        return str(error)
    return None


def theirs(folder: Path, **options: Any) -> Any:
    return model_class(folder).from_pretrained(folder, **{"dtype": "auto", **options})


# -- hooks of other people's


@use
@anywhere
def test_hooks_see_what_they_see_of_a_loaded_model(dtype: str, where: str, file: Path) -> None:
    """The weight of the module that they are at among it, before its forward and after."""
    seen: list[list[Any]] = []
    for model in (load(file, dtype, where), loaded(file, dtype)):
        notes: list[Any] = []

        def before(
            module: Any, args: Any, kwargs: Any, notes: list[Any] = notes
        ) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
            notes.append(("before", dict(kwargs), module.weight.sum().item(), tuple(module.weight.shape)))
            return tuple(a * 2 for a in args), kwargs

        def behind(module: Any, args: Any, output: torch.Tensor, notes: list[Any] = notes) -> torch.Tensor:
            notes.append(("behind", module.weight[3].tolist(), output.sum().item()))
            return output + module.bias

        def whole(module: Any, args: Any, kwargs: Any, output: torch.Tensor, notes: list[Any] = notes) -> None:
            notes.append(("whole", dict(kwargs), [p.abs().max().item() for p in module.parameters()]))

        for number in (0, 3):
            model.layers[number].register_forward_pre_hook(before, with_kwargs=True)
            model.layers[number].register_forward_hook(behind)
        model.register_forward_hook(whole, with_kwargs=True)
        with torch.no_grad():
            for seed in range(3):
                notes.append(model(batch(dtype, seed), scale=0.5).tolist())
        seen.append(notes)
    assert seen[0] == seen[1]
    assert len(seen[0]) == 3 * (4 + 1 + 1)


@use
def test_hooks_that_are_always_called_are_called_and_the_next_forward_is_right(dtype: str, file: Path) -> None:
    ours, other = load(file, dtype), loaded(file, dtype)
    called: list[str] = []

    def fail(module: Any, args: Any) -> None:
        if called.count("always") < 2:
            raise ZeroDivisionError

    for model in (ours, other):
        called.clear()
        handle = model.layers[3].register_forward_pre_hook(fail)
        model.layers[3].register_forward_hook(lambda *_: called.append("always"), always_call=True)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError), torch.no_grad():
                model(batch(dtype))
        assert called == ["always"] * 2
        handle.remove()
    check_same(ours, other, dtype)


@use
@anywhere
def test_hooks_that_are_skipped_give_no_wrong_number(dtype: str, where: str, file: Path) -> None:
    """Called by `forward`, in parts, in another order, and with every hook thrown away."""
    ours, other = load(file, dtype, where), loaded(file, dtype)
    x = batch(dtype)
    with torch.no_grad():
        check_same(ours, other, dtype)
        assert torch.equal(ours.forward(x), other.forward(x))
        for number in (4, 1, 4, 0, 5):
            assert torch.equal(ours.layers[number].forward(x), other.layers[number].forward(x))
            assert torch.equal(ours.layers[number](x), other.layers[number](x))
        for module in ours.modules():
            module._forward_pre_hooks.clear()
            module._forward_hooks.clear()
        check_same(ours, other, dtype)


@use
def test_a_layer_can_be_exchanged(dtype: str, file: Path) -> None:
    """By another module, by another parameter, and by one of its own that is in memory."""
    ours, other = load(file, dtype), loaded(file, dtype)
    check_same(ours, other, dtype)
    torch.manual_seed(1)
    new = nn.Linear(256, 256).to(getattr(torch, dtype))
    for model in (ours, other):
        model.layers[2] = new
        model.layers[4].weight = nn.Parameter(torch.eye(256, dtype=getattr(torch, dtype)) * 2)
        model.layers[5] = nn.Sequential(model.layers[5], nn.ReLU())
        del model.layers[0]
    check_same(ours, other, dtype)


@use
@anywhere
def test_a_functional_call_with_other_weights_computes_with_those(dtype: str, where: str, file: Path) -> None:
    ours, other = load(file, dtype, where), loaded(file, dtype)
    weights = {name: tensor.detach() * 3 for name, tensor in other.named_parameters()}
    with torch.no_grad():
        found, expected = (torch.func.functional_call(model, weights, batch(dtype)) for model in (ours, other))
    assert torch.equal(found, expected)
    check_same(ours, other, dtype)


# -- the state dict


@use
@anywhere
def test_a_state_dict_is_that_of_the_loaded_model(dtype: str, where: str, file: Path) -> None:
    ours, other = load(file, dtype, where), loaded(file, dtype)
    for _ in range(2):
        found, expected = ours.state_dict(), other.state_dict()
        assert list(found) == list(expected)
        for name, tensor in expected.items():
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
            assert found[name].device == tensor.device
            assert torch.equal(found[name], tensor)
            assert same(found[name].clone(), tensor)
            assert found[name].numpy(force=True).tobytes() == tensor.numpy().tobytes()
        check_same(ours, other, dtype, times=1)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five layers of 8 MiB in bf16: of 16 MiB in fp32."""
    file = tmp_path_factory.mktemp("large") / "large.safetensors"
    row = torch.randn(1, 2048).bfloat16()
    save_file({f"{i}.weight": (row * (i + 1)).repeat(2048, 1) for i in range(5)}, file)
    return file


def make_large() -> nn.Module:
    return nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(5)))


@linux
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_state_dict_comes_from_the_disk_one_by_one(dtype: str, large: Path) -> None:
    """A second layer in memory would be seen."""
    options: dict[str, Any] = {"model": make_large, "dtype": dtype, "device_map": "disk"}
    model = lowmem.load(large, ram=least_ram(large, **options), **options).model
    torch.ones(4, 4).amax()
    found = []
    with lowmem.measure() as memory:
        for tensor in model.state_dict().values():
            found.append((tensor.amax().item(), tensor.sum().item()))
            del tensor
    assert memory.peak < (2 * 16 - 2) * MIB
    expected = [t.to(getattr(torch, dtype)) for _, t in lowmem.stream(large)]
    assert found == [(tensor.amax().item(), tensor.sum().item()) for tensor in expected]


@use
@anywhere
def test_a_state_dict_can_be_saved(dtype: str, where: str, file: Path, tmp_path: Path) -> None:
    """By torch and by safetensors; no tensor brings more of its file along than itself."""
    ours, other = load(file, dtype, where), loaded(file, dtype)
    torch.save(other.state_dict(), tmp_path / "theirs.pt")
    torch.save(ours.state_dict(), tmp_path / "ours.pt")
    assert abs((tmp_path / "ours.pt").stat().st_size - (tmp_path / "theirs.pt").stat().st_size) < 8192
    save_model(ours, str(tmp_path / "ours.safetensors"))
    save_file(dict(ours.state_dict()), tmp_path / "state.safetensors")
    expected = other.state_dict()
    for kind in ("ours.pt", "ours.safetensors", "state.safetensors"):
        found = loaded(file, dtype)
        for parameter in found.parameters():
            parameter.data.zero_()
        if kind.endswith(".pt"):
            found.load_state_dict(torch.load(tmp_path / kind))
        else:
            load_model(found, tmp_path / kind)
        assert all(same(tensor, expected[name]) for name, tensor in found.state_dict().items()), kind


LLAMAS = {"all": {"": "disk"}, "half": {"": "disk", "model.layers.1": "cpu", "lm_head": "cpu"}}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("where", LLAMAS)
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen3-moe"])
def test_save_pretrained_saves_what_a_loaded_model_saves(kind: str, where: str, dtype: str, tmp_path: Path) -> None:
    """Into another folder, and over the files that are mapped and read."""
    source, out = tmp_path / "m", tmp_path / "out"
    new_model(kind).save_pretrained(source)
    other = theirs(source, dtype=dtype)
    other.save_pretrained(tmp_path / "expected")
    # A tie between memory and disk is another matter.
    device_map = {"": "disk", "model.layers.1": "cpu"} if where == "half" else LLAMAS[where]
    model = lowmem.load(source, dtype=dtype, device_map=device_map).model
    model.save_pretrained(out, max_shard_size="20KB")
    assert_same_files(out, tmp_path / "expected")
    model.save_pretrained(source)
    assert_same_files(source, tmp_path / "expected")
    expected = outputs_of(other)
    assert same(outputs_of(model), expected)
    del model
    gc.collect()
    assert same(outputs_of(lowmem.load(source, device_map=device_map).model), expected)


# -- changes


@use
@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_is_right_or_refused(dtype: str, assign: bool, file: Path) -> None:
    """What is mapped takes it, and keeps it however little memory there is; what is read at use says that it cannot."""
    ours, other = load_narrowly(file, dtype), loaded(file, dtype)
    check_same(ours, other, dtype)
    before = file.read_bytes()
    doubled = {name: tensor * 2 for name, tensor in other.state_dict().items()}
    # torch makes one RuntimeError of what its copies raise.
    refused = refusal(lambda: ours.load_state_dict(doubled, assign=assign), RuntimeError)
    if refused is None:
        other.load_state_dict(doubled)
    else:
        assert (dtype, assign) == ("float64", False)
        assert "disk" in refused
    check_same(ours, other, dtype)
    assert file.read_bytes() == before


def test_what_is_written_into_a_mapped_weight_stays(file: Path) -> None:
    """Under the least `ram`, which gives back the pages of layers that are past."""
    ours, other = load_narrowly(file, "float32"), loaded(file)
    check_same(ours, other)
    before = file.read_bytes()
    for number in range(LAYERS):
        with torch.no_grad():
            for model in (ours, other):
                model.layers[number].weight[number].mul_(2)
                model.layers[number].bias.data.add_(0.5)
        check_same(ours, other)
    for model in (ours, other):
        model.layers[1].weight.data.mul_(-1)
    check_same(ours, other, times=5)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), other.parameters(), strict=True))
    assert file.read_bytes() == before


def test_what_is_written_into_a_weight_that_is_cast_at_use_is_kept_or_refused(file: Path) -> None:
    ours, other = load_narrowly(file, "float64"), loaded(file, "float64")
    for change in (
        lambda w: w.mul_(2),
        lambda w: w.data.add_(1),
        lambda w: w[3].zero_(),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: w.copy_(torch.ones(256, 256, dtype=torch.float64)),
        lambda w: nn.init.zeros_(w),
        lambda w: torch.add(w, 1, out=w),
    ):
        with torch.no_grad():
            refused = refusal(functools.partial(change, ours.layers[2].weight))
            if refused is None:
                change(other.layers[2].weight)
        assert refused is None or "disk" in refused
        if refused is not None:
            check_same(ours, other, "float64")
            continue
        # Through a view of it: known at the next use at the latest.
        with pytest.raises(RunningError, match="on disk and was changed"):
            check_same(ours, other, "float64")
        ours, other = load_narrowly(file, "float64"), loaded(file, "float64")


@use
@anywhere
def test_a_deep_copy_is_refused(dtype: str, where: str, file: Path) -> None:
    """Of the model and of a part of it that has weights on disk; a part that has none can be copied."""
    ours, other = load(file, dtype, where), loaded(file, dtype)
    for part in (ours, ours.layers, ours.layers[0]):
        with pytest.raises(LowmemError, match="disk"):
            copy.deepcopy(part)
    if where == "half":
        twin = copy.deepcopy(ours.layers[1])
        with torch.no_grad():
            twin.weight.zero_()
            assert torch.equal(twin(batch(dtype)), twin.bias.expand(3, -1))
    check_same(ours, other, dtype)


REFUSED: dict[str, Callable[[Any], Any]] = {
    "meta": lambda m: m.to("meta"),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "to float16": lambda m: m.to(torch.float16),
    "to both": lambda m: m.to("cpu", torch.float16),
    "type": lambda m: m.type(torch.float16),
    "to_empty": lambda m: m.to_empty(device="meta"),
    "a layer": lambda m: m.layers[4].half(),
}


@use
@pytest.mark.parametrize("where", [*MAPS, "late"])
@pytest.mark.parametrize("change", REFUSED)
def test_conversions_are_refused_before_anything_changed(change: str, dtype: str, where: str, file: Path) -> None:
    ours, other = load(file, dtype, where), loaded(file, dtype)
    with pytest.raises(LowmemError, match="disk"):
        REFUSED[change](ours)
    for found, expected in zip(ours.parameters(), other.parameters(), strict=True):
        assert (found.dtype, found.device) == (expected.dtype, expected.device)
    check_same(ours, other, dtype)


@pytest.mark.parametrize("move", [lambda m: m.cuda(), lambda m: m.to("cuda:0"), lambda m: m.xpu()])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_moves_of_a_transformers_model_are_refused(dtype: str, move: Callable[[Any], Any], folder: Path) -> None:
    """With or without such a device; its own `to` and `half` do not come before."""
    model = lowmem.load(folder, dtype=dtype, device_map=LLAMAS["half"]).model
    for change in (move, lambda m: m.to("meta"), lambda m: m.half()):
        with pytest.raises(LowmemError, match="disk"):
            change(model)
    assert same(outputs_of(model), outputs_of(theirs(folder, dtype=dtype)))


ALLOWED: dict[str, Callable[[Any, torch.dtype], Any]] = {
    "cpu": lambda m, _: m.cpu(),
    "to cpu": lambda m, _: m.to("cpu"),
    "the same dtype": lambda m, dtype: m.to(dtype),
    "both": lambda m, dtype: m.to(torch.device("cpu"), dtype, non_blocking=True),
    "a tensor": lambda m, dtype: m.to(torch.ones(1, dtype=dtype)),
    "its type": lambda m, dtype: m.type(dtype),
    "train": lambda m, _: m.train().eval(),
    "frozen": lambda m, _: m.requires_grad_(False),
    "no gradients": lambda m, _: (m.zero_grad(), m)[1],
}


@use
@anywhere
@pytest.mark.parametrize("change", ALLOWED)
def test_what_changes_nothing_is_allowed(change: str, dtype: str, where: str, file: Path) -> None:
    ours, other = load(file, dtype, where), loaded(file, dtype)
    assert ALLOWED[change](ours, getattr(torch, dtype)) is ours
    check_same(ours, other, dtype)


# -- gradients


@use
def test_a_gradient_for_a_weight_on_disk_is_refused(dtype: str, file: Path) -> None:
    """Whether the forward says so or the backward; the next forward is right."""
    ours, other = load(file, dtype), loaded(file, dtype)
    assert all(parameter.requires_grad for parameter in ours.parameters())
    with pytest.raises(LowmemError, match=r"requires_grad_\(False\)"):
        ours(batch(dtype)).sum().backward()
    assert all(parameter.grad is None for parameter in ours.parameters())
    check_same(ours, other, dtype)


def gradient(model: Any, dtype: str, seed: int = 1) -> torch.Tensor:
    x = batch(dtype, seed).requires_grad_()
    model(x).pow(2).sum().backward()
    assert x.grad is not None
    return x.grad


@use
def test_gradients_go_through_frozen_weights_on_disk(dtype: str, file: Path) -> None:
    """The backward uses each weight again, behind all the others, within the least memory."""
    ours, other = load_narrowly(file, dtype).requires_grad_(False), loaded(file, dtype).requires_grad_(False)
    for seed in range(3):
        assert torch.equal(gradient(ours, dtype, seed), gradient(other, dtype, seed))
        check_same(ours, other, dtype, times=1)
    # Two graphs at once, the older one backwards last.
    grads = []
    for model in (ours, other):
        first, second = (batch(dtype, seed).requires_grad_() for seed in (1, 2))
        a, b = model(first), model(second)
        b.sum().backward()
        a.sum().backward()
        grads.append((first.grad, second.grad))
    assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))


def test_weights_in_memory_are_trained_beside_frozen_ones_on_disk(file: Path) -> None:
    found = []
    for model in (load(file, where="half"), loaded(file)):
        for number, layer in enumerate(model.layers):
            layer.requires_grad_(number % 2 == 1)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        for seed in range(3):
            functional.mse_loss(model(batch(seed=seed)), batch(seed=9)).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.fixture
def peft() -> Any:
    if importlib.util.find_spec("peft") is None:
        pytest.skip("peft is not installed")
    return importlib.import_module("peft")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("where", LLAMAS)
def test_lora_trains_on_a_model_on_disk(where: str, dtype: str, folder: Path, peft: Any, tmp_path: Path) -> None:
    losses = []
    ours = lowmem.load(folder, dtype=dtype, device_map=LLAMAS[where]).model
    for number, model in enumerate((ours, theirs(folder, dtype=dtype))):
        adapted = with_lora(model, peft).eval()
        optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 0.1)
        batch_of = inputs_of(model)
        for _ in range(2):
            loss = adapted(**batch_of, labels=batch_of["input_ids"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        adapted.save_pretrained(tmp_path / f"adapter{number}")
    assert losses[:2] == losses[2:]
    assert losses[0] != losses[1]
    assert_same_files(tmp_path / "adapter0", tmp_path / "adapter1")
    again = lowmem.load(folder, dtype=dtype, device_map=LLAMAS[where]).model
    put_on = peft.PeftModel.from_pretrained(again, tmp_path / "adapter0").eval()
    assert same(outputs_of(put_on), outputs_of(adapted))


# -- files that change

_NET = """
import os
import torch
from pathlib import Path
from torch import nn
import lowmem
torch.set_num_threads(1)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(6))
    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x

def load():
    return lowmem.load(args["source"], model=Net, dtype=args["dtype"], device_map="disk").model

file = Path(args["source"])
x = torch.ones(2, 256, dtype=getattr(torch, args["dtype"]))
torch.set_grad_enabled(False)
model = load()
first = model(x)
"""
# A mapped file that shrinks can end the process, so this happens in another.
_CHANGED = (
    _NET
    + """
how = args["how"]
if how == "bytes":
    with file.open("r+b") as f:
        f.seek(-8, 2)
        f.write(b"12345678")
    os.utime(file, ns=(1, 1))
elif how == "time":
    os.utime(file, ns=(1, 1))
else:
    os.truncate(file, file.stat().st_size // 2 if how == "half" else 0)
result = []
for _ in range(2):
    try:
        model(x)
        result.append("nothing")
    except lowmem.CheckpointError as error:
        result.append(str(error))
"""
)


@linux
@use
@pytest.mark.parametrize("how", ["bytes", "half", "empty"])
def test_a_file_that_changed_between_forwards_is_an_error_that_names_it(how: str, dtype: str, file: Path) -> None:
    for text in server().run(_CHANGED, source=str(file), dtype=dtype, how=how):
        assert file.name in text


@use
@pytest.mark.parametrize("how", ["deleted", "renamed", "replaced"])
def test_a_file_that_went_away_is_still_there_for_the_model(how: str, dtype: str, file: Path, tmp_path: Path) -> None:
    """The mapping keeps it; a file that took its place is another."""
    ours, other = load(file, dtype), loaded(file, dtype)
    check_same(ours, other, dtype, times=1)
    if how == "renamed":
        file.rename(tmp_path / "elsewhere")
    else:
        file.unlink()
    if how == "replaced":
        save_file({name: tensor + 1 for name, tensor in Net().state_dict().items()}, file)
    check_same(ours, other, dtype)


@linux
def test_a_file_of_the_offload_folder_that_changed_is_an_error_that_names_it(file: Path, tmp_path: Path) -> None:
    ours = load(file, "float64", offload_folder=tmp_path / "off")
    check_same(ours, loaded(file, "float64"), "float64")
    (written,) = (tmp_path / "off").rglob("*.safetensors")
    with written.open("r+b") as f:
        f.seek(-8, 2)
        f.write(b"12345678")
    os.utime(written, ns=(1, 1))
    with pytest.raises(LowmemError, match=written.name):
        ours(batch("float64"))


# -- the end


def mapped(folder: Path) -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder.resolve()) in line]


def opened(folder: Path) -> list[str]:
    found = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            found.append(str(link.readlink()))
        except OSError:
            continue
    return [name for name in found if name.startswith(str(folder.resolve()))]


def check_nothing_is_left(folder: Path, threads: set[threading.Thread]) -> None:
    assert {thread for thread in threading.enumerate() if thread not in threads} == set()
    assert threads_of_lowmem() == []
    assert mapped(folder) == []
    assert opened(folder) == []


@pytest.fixture
def threads() -> set[threading.Thread]:
    gc.collect()
    return set(threading.enumerate())


@linux
@use
@anywhere
def test_release_ends_threads_and_mappings_now(
    dtype: str, where: str, file: Path, threads: set[threading.Thread]
) -> None:
    ours, other = load(file, dtype, where), loaded(file, dtype)
    check_same(ours, other, dtype)
    lowmem.release(ours)
    assert threads_of_lowmem() == []
    if where == "all":
        check_nothing_is_left(file.parent, threads)
    else:
        # What lies in memory may be mapped from the same file, and stays.
        assert torch.equal(ours.layers[1](batch(dtype)), other.layers[1](batch(dtype)))
    for _ in range(2):
        with pytest.raises(LowmemError, match="released"):
            ours(batch(dtype))
    for change in (lambda w: w.sum(), lambda w: w[0].tolist(), lambda w: w.clone()):
        with pytest.raises(LowmemError, match="released"):
            change(ours.layers[0].weight)
    assert repr(ours)
    lowmem.release(ours)


@linux
@use
@pytest.mark.parametrize("ran", [True, False])
def test_dropping_the_model_ends_threads_and_mappings(
    dtype: str, ran: bool, file: Path, threads: set[threading.Thread]
) -> None:
    result = lowmem.load(file, model=Net, dtype=dtype, device_map="disk")
    if ran:
        check_same(result.model, loaded(file, dtype), dtype)
    gone = weakref.ref(result.model)
    del result
    gc.collect()
    assert gone() is None
    check_nothing_is_left(file.parent, threads)


# A weight that is touched after its mapping went would end the process.
_KEPT = (
    _NET
    + """
kept = [model.layers[1].weight, model.layers[2].weight.data, model.layers[3].bias[:5], *model.state_dict().values()]
wanted = [load().layers[n].weight.clone() for n in (1, 2)]
if args["how"] == "release":
    lowmem.release(model)
else:
    import gc
    del model
    gc.collect()
result = []
for number, tensor in enumerate(kept):
    try:
        total = tensor.sum()
        result.append(number > 1 or bool((tensor == wanted[number]).all()))
    except lowmem.LowmemError:
        result.append(args["how"] == "release")
"""
)


@linux
@use
@pytest.mark.parametrize("how", ["release", "drop"])
def test_weights_that_somebody_kept_are_right_or_refused(how: str, dtype: str, file: Path) -> None:
    """Never the end of the process. Of a model that was only dropped they are right."""
    assert all(server().run(_KEPT, source=str(file), dtype=dtype, how=how))


@use
def test_release_is_for_models_of_lowmem(dtype: str, file: Path) -> None:
    """Twice is fine, and so is a model that has nothing on disk."""
    ours = load(file, dtype)
    lowmem.release(ours)
    lowmem.release(ours)
    in_memory = lowmem.load(file, model=Net, dtype=dtype).model
    lowmem.release(in_memory)
    check_same(in_memory, loaded(file, dtype), dtype)
    for other in (nn.Linear(2, 2), loaded(file), "a path", None):
        with pytest.raises(OptionError, match="release"):
            lowmem.release(other)


def test_two_models_of_one_file_end_for_themselves(file: Path) -> None:
    first, second, other = load(file), load(file), loaded(file)
    check_same(first, other)
    lowmem.release(first)
    check_same(second, other)
    del first
    gc.collect()
    check_same(second, other)


# -- libraries


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "task", "text"),
    [("llama", "text-generation", "a b w20"), ("bert", "feature-extraction", "a w9"), ("gpt2", "text-generation", "c")],
)
def test_a_pipeline_takes_a_model_on_disk(kind: str, task: str, text: str, dtype: str, tmp_path: Path) -> None:
    new_model(kind).save_pretrained(tmp_path)
    options = {"max_new_tokens": 6, "do_sample": False} if task == "text-generation" else {}
    ours = transformers.pipeline(
        task, model=lowmem.load(tmp_path, dtype=dtype, device_map="disk").model, tokenizer=make_tokenizer()
    )
    other = transformers.pipeline(task, model=theirs(tmp_path, dtype=dtype), tokenizer=make_tokenizer(), device="cpu")
    assert ours(text, **options) == other(text, **options)


@use
def test_a_pickle_is_right_or_refused(dtype: str, file: Path) -> None:
    ours, other = load(file, dtype), loaded(file, dtype)
    for dump, undo in (
        (pickle.dumps, pickle.loads),
        (saved_by_torch, lambda data: torch.load(io.BytesIO(data), weights_only=False)),
    ):
        data: list[bytes] = []
        refused = refusal(lambda dump=dump, data=data: data.append(dump(ours)))
        if refused is None:
            check_same(undo(data[0]), other, dtype)
        else:
            assert "disk" in refused
    check_same(ours, other, dtype)


def saved_by_torch(model: Any) -> bytes:
    out = io.BytesIO()
    torch.save(model, out)
    return out.getvalue()


@use
@anywhere
def test_two_threads_run_one_model_at_once(dtype: str, where: str, file: Path) -> None:
    """Within the least memory, from different ends, and again after each other."""
    ours = load_narrowly(file, dtype) if where == "all" else load(file, dtype, where)
    other = loaded(file, dtype)
    wrong: list[Any] = []
    start = threading.Barrier(3)

    def work(which: int) -> None:
        start.wait()
        with torch.no_grad():
            for seed in range(12):
                x = batch(dtype, 100 * which + seed)
                layers = other.layers[which:]
                expected = functools.reduce(lambda y, layer: layer(y), layers, x)
                found = functools.reduce(lambda y, layer: layer(y), ours.layers[which:], x)
                if not (torch.equal(found, expected) and torch.equal(ours(x), other(x))):
                    wrong.append((which, seed))

    running = [threading.Thread(target=work, args=(which,)) for which in range(3)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert wrong == []
    check_same(ours, other, dtype)


_FORK = (
    _NET
    + """
import signal
reading, writing = os.pipe()
child = os.fork()
if child == 0:
    # A child that waits for a thread that it does not have would wait forever.
    signal.alarm(60)
    said = b"wrong"
    try:
        said = b"right" if torch.equal(model(x), first) and torch.equal(model(x), first) else b"wrong"
        del model
    except lowmem.LowmemError:
        said = b"refused"
    os.write(writing, said)
    os._exit(0)
os.close(writing)
said = os.read(reading, 100).decode()
status = os.waitpid(child, 0)[1]
result = [said, status, torch.equal(model(x), first)]
"""
)


@linux
@use
def test_a_forked_process_computes_right_or_is_refused(dtype: str, file: Path) -> None:
    said, status, parent = server().run(_FORK, source=str(file), dtype=dtype)
    assert said in ("right", "refused")
    assert status == 0
    assert parent


# -- accelerate's own


def has_hooks(model: nn.Module) -> bool:
    return any(hasattr(module, "_hf_hook") for module in model.modules())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_accelerate_dispatches_for_who_wants_it(dtype: str, folder: Path) -> None:
    expected = outputs_of(theirs(folder, dtype=dtype))
    for dispatch, hooks in (("accelerate", True), ("lowmem", False)):
        model = lowmem.load(folder, dtype=dtype, device_map="disk", dispatch=dispatch).model
        assert has_hooks(model) is hooks
        assert all(parameter.is_meta is hooks for parameter in model.parameters())
        assert getattr(model, "hf_device_map", None) == ({"": "disk"} if hooks else None)
        assert same(outputs_of(model), expected)
    assert not has_hooks(lowmem.load(folder, dtype=dtype, device_map="disk").model)
    through = lowmem.from_pretrained(
        transformers.AutoModelForCausalLM, folder, device_map={"": "disk"}, dispatch="accelerate"
    )
    assert has_hooks(through)


@pytest.mark.parametrize("value", ["nonsense", "", None, True, 1])
def test_a_dispatch_that_means_nothing_is_refused(value: Any, file: Path) -> None:
    for call in (lowmem.load, lowmem.plan):
        with pytest.raises(OptionError, match="dispatch"):
            call(file, model=Net, device_map="disk", dispatch=value)


def test_a_file_that_changed_before_the_first_forward_is_an_error(file: Path) -> None:
    ours = load(file)
    with file.open("r+b") as f:
        f.seek(-8, 2)
        f.write(b"12345678")
    os.utime(file, ns=(1, 1))
    with pytest.raises(CheckpointError, match=file.name):
        ours(batch())


# -- what reviewers found


def test_weights_that_pass_through_one_buffer_are_not_shared(file: Path, tmp_path: Path) -> None:
    """By their storages libraries tell which tensors are one."""
    ours, other = load_narrowly(file, "float64"), loaded(file, "float64")
    save_model(ours, str(tmp_path / "out.safetensors"))
    with safe_open(tmp_path / "out.safetensors", "pt") as saved:
        assert set(saved.keys()) == set(other.state_dict())
        assert all(torch.equal(saved.get_tensor(name), value) for name, value in other.state_dict().items())
    assert [w.untyped_storage().nbytes() for w in ours.parameters()] == [w.nbytes for w in other.parameters()]


def test_threads_have_blocks_of_their_own(tmp_path: Path) -> None:
    """Linear layers larger than the buffers, of several threads at once."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(1024, 2048), nn.Linear(2048, 1024)

        def forward(self, x: torch.Tensor) -> Any:
            return self.last(torch.tanh(self.first(x)))

    torch.manual_seed(3)
    save_file(Wide().state_dict(), tmp_path / "m.safetensors")
    options: dict[str, Any] = {"model": Wide, "dtype": "float64", "device_map": "disk"}
    with pytest.raises(BudgetError) as refused:
        lowmem.plan(tmp_path / "m.safetensors", ram=1, **options)
    ours = lowmem.load(tmp_path / "m.safetensors", ram=refused.value.required, **options).model
    other = lowmem.load(tmp_path / "m.safetensors", model=Wide, dtype="float64").model
    inputs = [torch.randn(2, 1024, dtype=torch.float64) for _ in range(12)]
    with torch.no_grad():
        expected = [other(x) for x in inputs]
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(torch.no_grad()(ours), inputs))
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(found, expected, strict=True))


def test_a_forward_that_was_interrupted_leaves_the_next_one_its_way(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, other = load(file), loaded(file)
    interrupted = []

    def once(*piece: int, exactly: bool) -> None:
        if not interrupted:
            interrupted.append(piece)
            raise KeyboardInterrupt

    monkeypatch.setattr("lowmem.offload.runtime.Runtime._call", lambda self: None)
    monkeypatch.setattr("lowmem.offload.runtime.bring_range", once)
    with pytest.raises(KeyboardInterrupt):
        ours(batch("float32"))
    check_same(ours, other)


def test_a_part_that_is_run_by_itself_sees_a_changed_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowmem.offload.runtime._FRESH", -1.0)
    ours = load(file)
    ours(batch("float32"))
    with file.open("r+b") as opened:
        opened.seek(-64, 2)
        opened.write(bytes(64))
    for use in (lambda: ours.layers[1](batch("float32")), ours.state_dict):
        with pytest.raises(CheckpointError, match="changed while a model on disk uses it"):
            use()


def test_functions_take_weights_by_keyword(file: Path) -> None:
    ours, other = load_narrowly(file, "float64"), loaded(file, "float64")
    x = batch("float64")
    for function in (
        lambda w, b: nn.functional.linear(input=x, weight=w, bias=b),
        lambda w, b: torch.transpose(input=w, dim0=0, dim1=1),
        lambda w, b: w.transpose(dim0=0, dim1=1),
        lambda w, b: torch.zeros_like(input=w),
        lambda w, b: w.new_tensor([1.0, 2.0]),
        lambda w, b: torch.from_numpy(w.detach().numpy()),
    ):
        found = function(ours.layers[1].weight, ours.layers[1].bias)
        assert torch.equal(found, function(other.layers[1].weight, other.layers[1].bias))


def test_a_graph_tells_what_was_changed_meanwhile(file: Path) -> None:
    """As torch does for weights in memory."""
    ours = load_narrowly(file, "float64")
    x = batch("float64").requires_grad_()
    h = x * 2
    y = nn.functional.layer_norm(h, (h.shape[-1],), ours.layers[0].weight.detach()[0])
    h.mul_(5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_experts_that_are_all_used_at_once_come_in_turn(tmp_path: Path) -> None:
    """`torch.bmm` with as many matrices as there are, in buffers of one."""

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(8, 64, 96))

        def forward(self, x: torch.Tensor) -> Any:
            return torch.bmm(x, self.up) + torch.matmul(x, self.up), torch.bmm(x @ self.up, self.up.transpose(1, 2))

    torch.manual_seed(5)
    save_file(Mixture().state_dict(), tmp_path / "m.safetensors")
    options: dict[str, Any] = {"model": Mixture, "dtype": "float64", "device_map": "disk"}
    with pytest.raises(BudgetError) as refused:
        lowmem.plan(tmp_path / "m.safetensors", ram=1, **options)
    result = lowmem.load(tmp_path / "m.safetensors", ram=refused.value.required, **options)
    assert result.plan.running.buffers < result.model.up.nbytes
    other = lowmem.load(tmp_path / "m.safetensors", model=Mixture, dtype="float64").model
    x = torch.randn(8, 3, 64, dtype=torch.float64)
    with torch.no_grad():
        for a, b in zip(result.model(x), other(x), strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
