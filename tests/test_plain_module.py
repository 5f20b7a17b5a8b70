"""A plain `nn.Module` gets what `safetensors.torch.load_file` and `load_state_dict(assign=True)` would give it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import every_tensor, same, ties_of
from torch import nn

import lowmem
from lowmem.dtypes import CASTABLE
from lowmem.errors import KeysError, ModelError, OptionError, UnsupportedError

pytestmark = pytest.mark.usefixtures("one_thread")

FLOATS = sorted(CASTABLE)
OTHERS = ["int8", "uint8", "int16", "int32", "int64", "bool", "uint16", "uint32", "uint64", "complex64"]


class Bag(nn.Module):
    """Whatever tensors it is given, as parameters (floats) and buffers (all else)."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and tensor.dtype.itemsize > 1:
                self.register_parameter(name, nn.Parameter(torch.empty(tensor.shape)))
            else:
                self.register_buffer(name, torch.empty(tensor.shape))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 11)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(self.embed(ids).mT)).mT)


def values(dtype: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Random bits that are valid for `dtype`: for floats every kind of value, infinities, NaNs and subnormals too."""
    generator = torch.Generator().manual_seed(seed)
    kind: torch.dtype = getattr(torch, dtype)
    if dtype == "bool":
        return torch.randint(0, 2, shape, generator=generator).to(torch.bool)
    raw = torch.randint(0, 256, (math.prod(shape) * kind.itemsize,), generator=generator).to(torch.uint8)
    return raw.view(kind).reshape(shape) if raw.numel() else torch.empty(shape, dtype=kind)


def write(tensors: dict[str, torch.Tensor], path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def trained_net() -> Net:
    torch.manual_seed(4)
    net = Net()
    for _ in range(3):
        net(torch.randint(0, 11, (5, 4)))
    return net.eval()


def reference(factory: Callable[[], nn.Module], path: Path) -> nn.Module:
    with torch.device("meta"):
        module = factory()
    module.load_state_dict(load_file(path), assign=True)
    return module.eval()


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    found, expected = every_tensor(ours), every_tensor(theirs)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert same(found[name], tensor), name
        assert type(found[name]) is type(tensor), name
    assert not ours.training


@pytest.mark.parametrize("residency", ["map", "copy"])
def test_auto_keeps_every_dtype_and_every_bit(residency: str, tmp_path: Path) -> None:
    """Floats, fp8, integers, booleans, complex numbers; scalars and empty tensors."""
    tensors = {
        f"{dtype}_{i}": values(dtype, shape, i)
        for dtype in [*FLOATS, *OTHERS]
        for i, shape in enumerate([(3, 5), (), (0, 4), (1,)])
    }
    path = write(tensors, tmp_path / "bag.safetensors")
    ours = lowmem.load(path, model=lambda: Bag(tensors), residency=residency).model
    assert_same(ours, reference(lambda: Bag(tensors), path))
    for name, tensor in tensors.items():
        assert same(every_tensor(ours)[name], tensor), name


@pytest.mark.parametrize("residency", ["map", "copy"])
@pytest.mark.parametrize("final", FLOATS)
def test_a_dtype_casts_floats_as_torch_does_and_nothing_else(final: str, residency: str, tmp_path: Path) -> None:
    tensors = {f"{dtype}_": values(dtype, (7, 9)) for dtype in [*FLOATS, *OTHERS]}
    path = write(tensors, tmp_path / "bag.safetensors")
    ours = every_tensor(lowmem.load(path, model=lambda: Bag(tensors), dtype=final, residency=residency).model)
    for name, tensor in tensors.items():
        expected = tensor.to(getattr(torch, final)) if name[:-1] in FLOATS else tensor
        assert same(ours[name], expected), name


@pytest.mark.parametrize("source", FLOATS)
def test_a_cast_in_pieces_is_the_cast_of_the_whole(source: str, tmp_path: Path) -> None:
    """With the least staging a tensor is many moves; every piece lands in its place."""
    tensors = {"big": values(source, (1200, 1025), 5), "small": values(source, (3,), 6)}
    path = write(tensors, tmp_path / "big.safetensors")
    for final in ("float32", "bfloat16", "float8_e4m3fn"):
        result = lowmem.load(path, model=lambda: Bag(tensors), dtype=final, staging="1MiB", residency="copy")
        for name, tensor in every_tensor(result.model).items():
            assert same(tensor, tensors[name].to(getattr(torch, final))), (final, name)
        assert result.plan.staging.total <= 1024**2
        if source != final:
            moves = list(result.plan.moves())
            assert len(moves) > 2
            assert sum(move.nbytes for move in moves) == result.plan.bytes_read


def test_an_aligned_and_an_unaligned_tensor_are_both_right(tmp_path: Path) -> None:
    """Odd sizes before a wide dtype: such a tensor cannot be mapped, so it is copied."""
    tensors = {"a": values("float64", (3,)), "b": values("int8", (3,)), "c": values("float16", (3,))}
    path = write(tensors, tmp_path / "x.safetensors")
    raw = path.read_bytes()
    # One space more in the header moves every tensor by one byte.
    size = int.from_bytes(raw[:8], "little")
    path.write_bytes((size + 1).to_bytes(8, "little") + raw[8 : 8 + size] + b" " + raw[8 + size :])
    ours = every_tensor(lowmem.load(path, model=lambda: Bag(tensors)).model)
    for name, tensor in tensors.items():
        assert same(ours[name], tensor), name


def test_batch_norm_buffers_are_loaded(tmp_path: Path) -> None:
    """Running statistics are floats that are cast; the counter is an integer that is not."""
    net = trained_net()
    path = write(net.state_dict(), tmp_path / "net.safetensors")
    ours = lowmem.load(path, model=Net).model
    assert_same(ours, reference(Net, path))
    ids = torch.arange(10).reshape(2, 5)
    with torch.no_grad():
        assert same(ours(ids), net(ids))
    half = lowmem.load(path, model=Net, dtype="bfloat16").model
    assert half.norm.running_mean.dtype == torch.bfloat16
    assert half.norm.num_batches_tracked.dtype == torch.int64
    assert same(half.norm.num_batches_tracked, net.norm.num_batches_tracked)


@pytest.mark.parametrize("where", ["meta", "cpu"])
def test_the_callers_module_is_the_one_that_is_filled(where: str, tmp_path: Path) -> None:
    net = trained_net()
    path = write(net.state_dict(), tmp_path / "net.safetensors")
    with torch.device(where):
        module = Net()
    assert lowmem.load(path, model=module).model is module
    assert_same(module, reference(Net, path))


def test_a_frozen_parameter_stays_frozen(tmp_path: Path) -> None:
    def frozen() -> Net:
        net = Net()
        net.embed.requires_grad_(False)
        return net

    path = write(trained_net().state_dict(), tmp_path / "net.safetensors")
    for dtype in ("auto", "bfloat16"):
        for residency in ("map", "copy"):
            model = lowmem.load(path, model=frozen, dtype=dtype, residency=residency).model
            assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"embed.weight"}


def test_parameters_of_an_integer_dtype_need_no_gradient(tmp_path: Path) -> None:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(2, 3))

    path = write({"weight": values("int8", (2, 3))}, tmp_path / "q.safetensors")
    weight = lowmem.load(path, model=Quantised, dtype="float32").model.weight
    assert same(weight, values("int8", (2, 3)))
    assert isinstance(weight, nn.Parameter)
    assert not weight.requires_grad


# ---- ties ----


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embed.weight


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.second = self.first
        self.third = nn.ModuleList([self.first[0]])


@pytest.mark.parametrize("factory", [Tied, Shared])
@pytest.mark.parametrize("options", [{}, {"residency": "copy"}, {"dtype": "bfloat16"}], ids=["map", "copy", "cast"])
@pytest.mark.parametrize("held", ["once", "last", "all"])
def test_what_is_one_object_stays_one_object(
    factory: Callable[[], nn.Module], options: dict[str, Any], held: str, tmp_path: Path
) -> None:
    """Whichever of its names the checkpoint holds."""
    torch.manual_seed(2)
    module = factory()
    state = module.state_dict()
    groups = ties_of(module)
    names = list(state)
    drop = set()
    for group in groups:
        ordered = sorted(group, key=names.index)
        drop |= set(ordered[1:] if held == "once" else ordered[:-1] if held == "last" else [])
    path = write({k: v.clone() for k, v in state.items() if k not in drop}, tmp_path / "tied.safetensors")
    result = lowmem.load(path, model=factory, **options)
    assert ties_of(result.model) == groups
    final = torch.bfloat16 if "dtype" in options else torch.float32
    for name, tensor in every_tensor(result.model).items():
        assert same(tensor, state[name].to(final) if state[name].is_floating_point() else state[name]), name
    unique = sum(t.nbytes for t in {id(t): t for t in every_tensor(result.model).values()}.values())
    assert sum(p.nbytes for p in result.plan.placements) == unique


def test_tied_tensors_that_differ_in_the_checkpoint_are_refused(tmp_path: Path) -> None:
    """A plain module has no rule for that."""
    state = {k: v.clone() for k, v in Tied().state_dict().items()}
    state["head.weight"] += 1
    path = write(state, tmp_path / "tied.safetensors")
    with pytest.raises(KeysError, match=r"'head\.weight' and 'embed\.weight' differ, and the model ties them"):
        lowmem.load(path, model=Tied)


def test_casting_a_tied_module_counts_its_bytes_once(tmp_path: Path) -> None:
    path = write({k: v.clone() for k, v in Tied().state_dict().items()}, tmp_path / "tied.safetensors")
    plan = lowmem.plan(path, model=Tied, dtype="bfloat16")
    assert plan.host.resident == 2 * (11 * 6 + 11)
    assert plan.bytes_read == 4 * (11 * 6 + 11)


# ---- keys that differ ----


def test_missing_tensors_are_initialised_by_their_module(tmp_path: Path) -> None:
    """`reset_parameters` gives values to what is missing and touches nothing else."""
    state = trained_net().state_dict()
    kept = {k: v for k, v in state.items() if k not in ("head.bias", "norm.weight", "norm.running_var")}
    path = write(kept, tmp_path / "net.safetensors")
    before = path.read_bytes()
    result = lowmem.load(path, model=Net, strict=False)
    found = every_tensor(result.model)
    for name, tensor in kept.items():
        assert same(found[name], tensor), name
    bound = 1 / math.sqrt(8)
    assert 0 < found["head.bias"].abs().max() <= bound
    assert torch.equal(found["norm.weight"], torch.ones(8))
    assert torch.equal(found["norm.running_var"], torch.ones(8))
    assert set(result.plan.mapping.missing) == {"head.bias", "norm.weight", "norm.running_var"}
    # The running variance has values already: buffers are built real.
    assert any("2 tensors are initialised" in warning for warning in result.plan.warnings)
    assert path.read_bytes() == before
    assert all(p.requires_grad for p in result.model.parameters())


def test_missing_tensors_take_the_requested_dtype(tmp_path: Path) -> None:
    state = {k: v for k, v in trained_net().state_dict().items() if k != "head.weight"}
    path = write(state, tmp_path / "net.safetensors")
    model = lowmem.load(path, model=Net, strict=False, dtype="bfloat16").model
    assert model.head.weight.dtype == torch.bfloat16
    assert model.head.weight.float().std() > 0.05
    assert bool(model.head.weight.isfinite().all())


def test_missing_tensors_of_a_real_module_keep_their_values(tmp_path: Path) -> None:
    state = {k: v for k, v in trained_net().state_dict().items() if k != "head.weight"}
    path = write(state, tmp_path / "net.safetensors")
    module = Net()
    head = module.head.weight
    lowmem.load(path, model=module, strict=False)
    assert module.head.weight is head


def test_missing_tensors_are_refused_when_strict(tmp_path: Path) -> None:
    state = {k: v for k, v in trained_net().state_dict().items() if not k.startswith("head")}
    path = write(state, tmp_path / "net.safetensors")
    with pytest.raises(KeysError) as caught:
        lowmem.load(path, model=Net)
    text = str(caught.value)
    assert "2 of the model's tensors are not in the checkpoint: 'head.weight', 'head.bias'" in text
    assert str(path) in text
    assert "strict=False" in text


def test_a_missing_tensor_without_a_rule_is_an_error_before_the_load(tmp_path: Path) -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.body = nn.Linear(3, 3)

    path = write(nn.Linear(3, 3).state_dict(), tmp_path / "x.safetensors")
    named = write({f"body.{k}": v for k, v in nn.Linear(3, 3).state_dict().items()}, tmp_path / "y.safetensors")
    with pytest.raises(ModelError, match=r"'scale' is not in the checkpoint, and Scale has no reset_parameters"):
        lowmem.plan(named, model=Scale, strict=False)
    with pytest.raises(KeysError, match=r"not in the checkpoint: 'scale'\n'body\.' was put before 2 keys"):
        lowmem.plan(path, model=Scale)


def test_a_prefix_that_every_key_has_is_stripped(tmp_path: Path) -> None:
    net = trained_net()
    path = write({f"module.{k}": v for k, v in net.state_dict().items()}, tmp_path / "net.safetensors")
    result = lowmem.load(path, model=Net)
    assert all(same(v, net.state_dict()[k]) for k, v in result.model.state_dict().items())
    assert result.plan.mapping.steps == ("'module.' was stripped from 10 keys",)


def test_a_renamed_tensor_is_suggested(tmp_path: Path) -> None:
    state = trained_net().state_dict()
    state["heads.weight"] = state.pop("head.weight")
    path = write(state, tmp_path / "net.safetensors")
    with pytest.raises(KeysError, match=r'likely heads\.weight[^$]*rename=\{r"\^heads\\b": r"head"\}'):
        lowmem.load(path, model=Net)


def test_a_buffer_that_only_a_built_model_has_is_an_error_on_meta(tmp_path: Path) -> None:
    """A meta module lost it; a callable keeps it."""

    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.register_buffer("freq", torch.arange(3.0), persistent=False)

    path = write({"weight": torch.full((3,), 2.0)}, tmp_path / "x.safetensors")
    with torch.device("meta"):
        module = Rotary()
    weight = module.weight
    with pytest.raises(ModelError, match=r"buffer 'freq' is on the meta device and not in the checkpoint.*callable"):
        lowmem.load(path, model=module)
    assert module.weight is weight
    model = lowmem.load(path, model=Rotary, dtype="bfloat16").model
    assert same(model.freq, torch.arange(3.0))
    assert same(model.weight, torch.full((3,), 2.0, dtype=torch.bfloat16))


def test_a_shape_that_differs_is_refused_or_initialised(tmp_path: Path) -> None:
    state = trained_net().state_dict()
    state["head.weight"] = torch.zeros(8, 11)
    path = write(state, tmp_path / "net.safetensors")
    with pytest.raises(KeysError, match=r"'head\.weight': expected \[11, 8\], found \[8, 11\]"):
        lowmem.load(path, model=Net)
    model = lowmem.load(path, model=Net, strict=False).model
    assert model.head.weight.shape == (11, 8)
    assert model.head.weight.std() > 0.05


@pytest.mark.parametrize("dtype", ["int8", "bool", "float4_e2m1fn_x2", "nonsense", 3, None])
def test_a_dtype_that_weights_cannot_be_cast_to_is_refused(dtype: Any, tmp_path: Path) -> None:
    path = write(Net().state_dict(), tmp_path / "net.safetensors")
    with pytest.raises(OptionError, match="dtype: expected 'auto' or one of"):
        lowmem.load(path, model=Net, dtype=dtype)


def test_a_callable_runs_without_memory_for_its_parameters(tmp_path: Path) -> None:
    """Its parameters go to meta one by one, and registering works as before afterwards."""
    seen = []

    def factory() -> nn.Module:
        net = Net()
        seen.extend(p.is_meta for p in net.parameters())
        seen.append(not net.norm.running_mean.is_meta)
        return net

    path = write(trained_net().state_dict(), tmp_path / "net.safetensors")
    lowmem.load(path, model=factory)
    assert all(seen)
    assert len(seen) == 8
    assert not any(p.is_meta for p in Net().parameters())


def test_a_callable_that_fails_leaves_torch_as_it_was(tmp_path: Path) -> None:
    def factory() -> nn.Module:
        raise ZeroDivisionError("mine")

    path = write(trained_net().state_dict(), tmp_path / "net.safetensors")
    register = nn.Module.register_parameter
    with pytest.raises(ModelError, match="factory failed: ZeroDivisionError: mine"):
        lowmem.load(path, model=factory)
    assert nn.Module.register_parameter is register


def test_keep_fp32_names_whole_components(tmp_path: Path) -> None:
    path = write(trained_net().state_dict(), tmp_path / "net.safetensors")
    result = lowmem.load(path, model=Net, dtype="bfloat16", keep_fp32=["norm", "he*", "nobody"])
    kept = {name for name, tensor in every_tensor(result.model).items() if tensor.dtype == torch.float32}
    assert kept == {
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
        "head.weight",
        "head.bias",
    }
    assert any("'nobody' names no module or parameter" in warning for warning in result.plan.warnings)


# ---- any module ----

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
leaf = st.tuples(st.sampled_from([*FLOATS, *OTHERS]), shapes)
trees: st.SearchStrategy[Any] = st.recursive(
    leaf, lambda inner: st.dictionaries(st.sampled_from("abcd"), inner, min_size=1, max_size=4), max_leaves=12
).filter(lambda tree: isinstance(tree, dict))


def grow(tree: dict[str, Any]) -> nn.Module:
    """A module of the shape of `tree`, real and fp32."""
    module = nn.Module()
    for name, value in tree.items():
        if isinstance(value, dict):
            module.add_module(name, grow(value))
        elif value[0] in FLOATS:
            module.register_parameter(name, nn.Parameter(torch.empty(value[1])))
        else:
            module.register_buffer(name, torch.empty(value[1]))
    return module


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, tuple[str, tuple[int, ...]]]:
    found = {}
    for name, value in tree.items():
        found.update(leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return found


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tree=trees,
    dtype=st.sampled_from(["auto", *FLOATS]),
    residency=st.sampled_from(["map", "copy"]),
    given_as=st.sampled_from(["callable", "meta", "real"]),
    shards=st.integers(1, 3),
)
def test_any_module_gets_exactly_its_checkpoint(
    tree: dict[str, Any], dtype: str, residency: str, given_as: str, shards: int, tmp_path_factory: Any
) -> None:
    """Whatever its tree, dtypes and shapes, and however it is given."""
    folder = tmp_path_factory.mktemp("any")
    tensors = {name: values(kind, shape, i) for i, (name, (kind, shape)) in enumerate(leaves(tree).items())}
    names = list(tensors)
    for i in range(shards):
        part = {name: tensors[name] for name in names[i::shards]}
        write(part, folder / f"model-{i + 1:05d}-of-{shards:05d}.safetensors")
    if given_as == "callable":
        model: Any = lambda: grow(tree)  # noqa: E731
    else:
        with torch.device("meta" if given_as == "meta" else "cpu"):
            model = grow(tree)
    result = lowmem.load(folder, model=model, dtype=dtype, residency=residency)
    found = every_tensor(result.model)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        cast = dtype != "auto" and leaves(tree)[name][0] in FLOATS
        assert same(found[name], tensor.to(getattr(torch, dtype)) if cast else tensor), name
    assert result.plan.bytes_read == sum(move.nbytes for move in result.plan.moves())


def test_a_dtype_that_torch_lacks_is_refused_by_name(tmp_path: Path) -> None:
    header = b'{"weight":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(4))
    assert lowmem.inspect(path)["weight"].dtype == "float6_e2m3"
    with pytest.raises(UnsupportedError, match=r"tensor 'weight': torch .* has no dtype float6_e2m3"):
        lowmem.plan(path, model=module)


def test_buffers_that_keep_what_the_model_was_built_with_are_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    state = {key: value for key, value in model.state_dict().items() if "running" not in key}
    save_file(state, tmp_path / "w.safetensors")
    result = lowmem.load(
        tmp_path / "w.safetensors", model=lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), strict=False
    )
    assert any("2 tensors" in w and "keep the values" in w and "'1.running_mean'" in w for w in result.plan.warnings)
