"""Any division of a model into sources gives what its files say, part by part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import lowmem

MODULES = ["a", "a.x", "a.y", "b", "b.x", "b.list.0", "b.list.1", "ab", "ab.x"]


class Leaf(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, 3))
        self.register_buffer("count", torch.zeros(()))


class Tree(nn.Module):
    """Every module has parameters of its own, of a shape of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.ab = Leaf(2), Leaf(3), Leaf(4)
        self.a.x, self.a.y, self.b.x, self.ab.x = Leaf(5), Leaf(6), Leaf(7), Leaf(8)
        self.b.list = nn.ModuleList([Leaf(9), Leaf(10)])
        self.bias = nn.Parameter(torch.zeros(11))


def filled(value: float, dtype: torch.dtype, inside: str = "") -> dict[str, torch.Tensor]:
    """The state of the model, or of a module of it, where every tensor is of one value."""
    front = f"{inside}." if inside else ""
    return {
        name[len(front) :]: torch.full(tensor.shape, value, dtype=dtype)
        for name, tensor in Tree().state_dict().items()
        if name.startswith(front)
    }


@st.composite
def divisions(draw: st.DrawFn) -> list[tuple[str, str, torch.dtype]]:
    """Modules in an order in which none comes before one that it is inside of; how their keys begin, and a dtype."""
    chosen = draw(st.lists(st.sampled_from(MODULES), unique=True, max_size=5))
    chosen.sort(key=lambda name: name.count("."))
    fronts = st.sampled_from(["", "full", "module.", "tail"])
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
    return [(name, draw(fronts), draw(dtypes)) for name in chosen]


@given(divisions(), st.sampled_from(["map", "copy"]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_tensor_is_that_of_the_last_source_for_its_module(
    tmp_path: Path, division: list[tuple[str, str, torch.dtype]], residency: str
) -> None:
    save_file(filled(1.0, torch.float32), tmp_path / "whole.safetensors")
    sources: dict[str, Path] = {"": tmp_path / "whole.safetensors"}
    expected = filled(1.0, torch.float32)
    for number, (module, front, dtype) in enumerate(division):
        state = filled(number + 2.0, dtype, module)
        expected |= {f"{module}.{name}": tensor for name, tensor in state.items()}
        begin = {"full": f"{module}.", "tail": f"{module.rpartition('.')[2]}."}.get(front, front)
        sources[module] = tmp_path / f"{number}.pth"
        torch.save({"state_dict": {begin + name: tensor for name, tensor in state.items()}}, sources[module])
    result = lowmem.load(sources, model=Tree, residency=residency)
    loaded = result.model.state_dict()
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name
        assert loaded[name].dtype == tensor.dtype, name
    shares = result.plan.mapping.shares
    assert sum(share.tensors for share in shares) == len(expected)
    assert result.report.peak <= result.plan.host.peak


def test_a_source_before_one_that_holds_its_module_clashes(tmp_path: Path) -> None:
    for name in ("a.x", "a"):
        save_file(filled(2.0, torch.float32, name), tmp_path / f"{name}.safetensors")
    save_file(filled(1.0, torch.float32), tmp_path / "whole.safetensors")
    given = {name: tmp_path / f"{name or 'whole'}.safetensors" for name in ("", "a.x", "a")}
    with pytest.raises(lowmem.KeysError, match=r"the model's 'a\.x\.\w+': expected one source for it"):
        lowmem.load(given, model=Tree)
