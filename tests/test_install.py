"""Installing directly gives what accelerate's `set_module_tensor_to_device` gives."""

from __future__ import annotations

import copy
import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import set_module_tensor_to_device
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import lowmem
from lowmem.engine import Installer
from lowmem.engine import install as install_module
from lowmem.engine.install import replace_tensor
from lowmem.engine.mapping import map_shard, view_of
from lowmem.planner import Placement

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn)
OTHERS = (torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64)
SHAPES = ((), (0,), (3,), (2, 3), (1, 4, 1))


class Named(nn.Parameter):
    """A parameter class of someone's own."""


class Linear4bit(nn.Module):
    """bitsandbytes' class by name only, which is all that accelerate looks at."""


def make(
    where: str, shape: tuple[int, ...], dtype: torch.dtype, *, kind: str, grad: bool, attributes: dict[str, Any]
) -> nn.Module:
    """A module with a tensor `x` among others, of which it is neither the first nor the last."""
    module = Linear4bit() if kind == "bitsandbytes" else nn.Module()
    for leaf in ("before", "x", "after"):
        tensor = torch.zeros(shape, dtype=dtype, device=where)
        if kind in ("buffer", "transient"):
            module.register_buffer(leaf, tensor, persistent=kind == "buffer")
            continue
        grad = grad and (dtype.is_floating_point or dtype.is_complex)
        parameter = (Named if kind == "subclass" else nn.Parameter)(tensor, requires_grad=grad)
        vars(parameter).update(attributes)
        module.register_parameter(leaf, parameter)
    if isinstance(module, Linear4bit):
        module.weight = torch.zeros(1)  # asked for its device
    return module


def described(module: nn.Module) -> dict[str, Any]:
    """Everything that can be told of a module's tables, their order included."""
    return {
        "order": [list(module._parameters), list(module._buffers)],
        "transient": sorted(module._non_persistent_buffers_set),
        "state": list(module.state_dict()),
        "tensors": [
            (leaf, type(t), t.shape, t.dtype, t.device, t.requires_grad, t.is_leaf, dict(vars(t)), t.stride())
            for table in (module._parameters, module._buffers)
            for leaf, t in table.items()
            if t is not None
        ],
    }


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "kind": draw(st.sampled_from(("parameter", "subclass", "buffer", "transient", "bitsandbytes"))),
        "where": draw(st.sampled_from(("meta", "cpu"))),
        "to": draw(st.sampled_from(("meta", "cpu"))),
        "shape": draw(st.sampled_from(SHAPES)),
        "old": draw(st.sampled_from(FLOATS + OTHERS)),
        "new": draw(st.sampled_from(FLOATS + OTHERS)),
        "grad": draw(st.booleans()),
        "attributes": draw(
            st.dictionaries(st.sampled_from(("no_decay", "tensor_model_parallel", "_is_hf_initialized")), st.booleans())
        ),
    }


@given(cases())
def test_the_outcome_is_accelerates(case: dict[str, Any]) -> None:
    """Class, gradient, attributes, table order, dtype, shape, device and the very memory, for every kind of tensor."""
    ours, theirs = (
        make(
            case["where"],
            case["shape"],
            case["old"],
            kind=case["kind"],
            grad=case["grad"],
            attributes=case["attributes"],
        )
        for _ in range(2)
    )
    value = torch.ones(case["shape"], device=case["to"]).to(case["new"])
    new = replace_tensor(ours, "x", value)
    held = theirs._parameters.get("x")
    # The helper copies the flag as it is, which torch refuses for integers: no gradient there is our addition.
    if held is not None and not (case["new"].is_floating_point or case["new"].is_complex):
        held.requires_grad_(False)
    kept = {} if held is None else dict(vars(held))
    set_module_tensor_to_device(theirs, "x", case["to"], value=value, dtype=value.dtype, clear_cache=False)
    if held is not None:
        # And that the author's attributes stay.
        vars(theirs._parameters["x"]).update(kept)
    assert described(ours) == described(theirs)
    assert new is (ours._parameters["x"] if "x" in ours._parameters else ours._buffers["x"])
    if case["to"] == "cpu":
        assert new.data_ptr() == value.data_ptr()


@pytest.mark.parametrize("kind", ["parameter", "subclass", "buffer"])
@pytest.mark.parametrize(("leaf", "shape"), [("x", (3, 2)), ("x", (6,)), ("gone", (2, 3))])
def test_what_does_not_fit_is_refused_as_accelerate_refuses_it(kind: str, leaf: str, shape: tuple[int, ...]) -> None:
    module = make("meta", (2, 3), torch.float32, kind=kind, grad=True, attributes={})
    before, value = described(module), torch.zeros(shape)
    with pytest.raises(ValueError, match=leaf) as theirs:
        set_module_tensor_to_device(copy.deepcopy(module), leaf, "cpu", value=value, dtype=value.dtype)
    with pytest.raises(ValueError, match=leaf) as ours:
        replace_tensor(module, leaf, value)
    assert str(ours.value) == str(theirs.value)
    assert described(module) == before


@pytest.mark.parametrize(("kind", "calls"), [("parameter", 0), ("buffer", 0), ("subclass", 1), ("bitsandbytes", 1)])
def test_only_what_has_its_own_ways_goes_through_accelerate(
    kind: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(
        install_module,
        "set_module_tensor_to_device",
        lambda *args, **options: seen.append(args[1]) or set_module_tensor_to_device(*args, **options),
    )
    replace_tensor(make("meta", (2,), torch.float32, kind=kind, grad=True, attributes={}), "x", torch.ones(2))
    assert len(seen) == calls


def test_tied_names_share_one_parameter_wherever_they_are() -> None:
    with torch.device("meta"):
        inner = nn.Sequential(nn.Linear(2, 2, bias=False))
        model = nn.ModuleDict({"a": inner, "b": nn.Linear(2, 2, bias=False), "c": inner})
    names = ("b.weight", "a.0.weight", "c.0.weight")
    placement = Placement("b.weight", names, (2, 2), "float32", 16, "cpu", "copy", ())
    value = torch.ones(2, 2)
    Installer(model).install(placement, value)
    assert model["b"].weight is model["a"][0].weight is model["c"][0].weight
    assert model["b"].weight.data_ptr() == value.data_ptr()
    assert type(model["b"].weight) is nn.Parameter


def test_the_old_parameter_is_left_as_it_was() -> None:
    """Whoever keeps it finds its attributes, which accelerate's helper takes off."""
    module = make("meta", (2,), torch.float32, kind="parameter", grad=True, attributes={"_is_hf_initialized": True})
    old = module._parameters["x"]
    replace_tensor(module, "x", torch.ones(2))
    assert vars(old) == {"_is_hf_initialized": True}
    assert old.is_meta


MAPPABLE = [
    getattr(torch, name)
    for name in sorted(lowmem.dtypes.SAFETENSORS_NAMES)
    if hasattr(torch, name) and not name.startswith("float4")
]


@pytest.mark.parametrize("dtype", MAPPABLE, ids=str)
def test_a_mapped_tensor_is_the_files_with_a_storage_of_its_own(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    raw = torch.randint(0, 2, (2 * 3 * dtype.itemsize,), dtype=torch.uint8)
    values = raw.view(dtype)
    tensors = {"a": values.view(2, 3), "b": values[:1].clone().view(()), "c": values[:0].clone()}
    save_file(tensors, path)
    checkpoint = lowmem.inspect(path)
    pages = map_shard(checkpoint.shards[0])
    assert isinstance(pages, mmap.mmap)
    for key, expected in load_file(path).items():
        found = view_of(pages, checkpoint[key])
        assert (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride())
        assert found.reshape(-1).view(torch.uint8).equal(expected.reshape(-1).view(torch.uint8))
        assert found.untyped_storage().nbytes() == expected.nbytes
        assert found._base is None
