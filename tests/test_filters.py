"""Functions of a state dict: what becomes of what they rename, move, compute, leave out and ask for."""

from __future__ import annotations

import copy
import gc
import logging
import os
import random
import sys
import types
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_budget import check_prediction
from torch import nn
from torch.nn import functional as F  # noqa: N812

import lowmem
from lowmem._shared import silent
from lowmem.checkpoint import inspect
from lowmem.errors import KeysError, UnsupportedError
from lowmem.mapping import NO_RULES
from lowmem.mapping.made import make_names, odd_names
from lowmem.mapping.names import give_names
from lowmem.modeling.skeleton import Origin, make_skeleton


class Model(nn.Module):
    def __init__(self, grid: int = 4, width: int = 8) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, 5)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "model.safetensors"
    save_file(
        {
            "pos": torch.randn(1, 10, 8),
            "qkv.weight": torch.randn(24, 8),
            "qkv.bias": torch.randn(24),
            "proj": torch.randn(8, 5),
            "logit_scale": torch.randn(()),
        },
        path,
    )
    return path


def resized(pos: torch.Tensor, model: nn.Module) -> torch.Tensor:
    new = int((model.pos_embed.shape[1] - 1) ** 0.5)
    grid = pos[:, 1:].float().reshape(1, 3, 3, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True)
    return torch.cat([pos[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2).to(pos.dtype)], dim=1)


def convert(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    found = {}
    for key, value in state.items():
        if key.startswith("qkv"):
            kind = key.removeprefix("qkv")
            found[f"q{kind}"], found[f"kv{kind}"] = value[:8], value[8:]
        elif key == "pos":
            found["pos_embed"] = resized(value, model)
        elif key == "proj":
            found["head.weight"] = value.T
            found["head.bias"] = torch.zeros(value.shape[1])
    return found


@pytest.mark.parametrize("residency", ["map", "copy"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_a_filter_gives_what_it_gives_on_values(file: Path, residency: str, stored: torch.dtype, dtype: str) -> None:
    state = {key: value.to(stored) for key, value in load_file(file).items()}
    save_file(state, file)
    model = Model()
    result = lowmem.load(file, model=model, filter_fn=convert, residency=residency, dtype=dtype)
    expected = {key: value.clone() for key, value in convert(state, Model()).items()}
    loaded = model.state_dict()
    assert loaded.keys() == expected.keys()
    for key, value in expected.items():
        final = value.dtype if dtype == "auto" else getattr(torch, dtype)
        assert torch.equal(loaded[key], value.to(final)), key
        assert loaded[key].dtype == final
    assert {group.what for group in result.plan.groups} == {"filter_fn convert"}
    assert sorted(places[0].target for g in result.plan.groups for places in g.results) == ["head.bias", "pos_embed"]
    assert any("1 tensors are left out ('logit_scale')" in line for line in result.plan.warnings)


def names(state: dict[str, Any]) -> dict[str, Any]:
    """All that the model needs, moved about only."""
    return {
        "pos_embed": state["pos"],
        "q.weight": state["qkv.weight"][:8],
        "q.bias": state["qkv.bias"][:8],
        "kv.weight": state["qkv.weight"][8:],
        "kv.bias": state["qkv.bias"][8:],
        "head.weight": state["proj"].T,
        "head.bias": state["qkv.bias"][:5],
    }


def on_values(file: Path, change: Callable[[dict[str, Any]], torch.Tensor], **options: Any) -> lowmem.LoadResult:
    """What becomes of the bias of the head, on values and loaded."""

    def function(state: dict[str, Any]) -> dict[str, Any]:
        return {**names({key: value.clone() for key, value in state.items()}), "head.bias": change(state)}

    expected = function(load_file(file))["head.bias"]
    result = lowmem.load(file, model=Model(grid=3), filter_fn=function, **options)
    assert torch.equal(result.model.head.bias, expected)
    return result


def halves(state: dict[str, Any]) -> torch.Tensor:
    out = torch.zeros(8)
    out[:5] = state["proj"][0]
    return out[:5] * 2


def of_a_layer(state: dict[str, Any]) -> torch.Tensor:
    layer = nn.Linear(5, 8, bias=False)
    layer.load_state_dict({"weight": state["proj"]})
    return layer.weight.detach()[1].contiguous() + 1


def after_an_alias(state: dict[str, Any]) -> torch.Tensor:
    row = state["proj"][1]
    state["proj"].mul_(3)
    return row


@pytest.mark.parametrize("change", [halves, of_a_layer, after_an_alias])
def test_what_lies_in_tensors_of_the_functions_own_is_followed(file: Path, change: Any) -> None:
    on_values(file, change)


def test_constants_take_nothing_of_the_tensors_that_they_are_like(file: Path) -> None:
    result = on_values(file, lambda state: torch.zeros_like(state["proj"])[0] + state["proj"].new_ones(5))
    (group,) = result.plan.groups
    assert [source.target for source in group.sources] == ["logit_scale"], "the smallest, as something must be read"


def to_array(state: dict[str, Any]) -> torch.Tensor:
    out = torch.zeros(5, device=state["proj"].device)
    out[:] = state["proj"][0]
    return torch.from_numpy(out.numpy() * 2)


def array_before(state: dict[str, Any]) -> torch.Tensor:
    out = torch.zeros(5, device="cpu")
    array = out.numpy()
    out[:] = state["proj"][0]
    return torch.from_numpy(array * 2)


def deep_copies(state: dict[str, Any]) -> torch.Tensor:
    copied = copy.deepcopy({"all": state["proj"], "row": state["proj"][0]})
    copied["all"].mul_(2)
    return copied["row"]


def other_memory(state: dict[str, Any]) -> torch.Tensor:
    value = state["proj"]
    value.data = value * 2
    return value[0]


def by_catching(state: dict[str, Any]) -> torch.Tensor:
    try:
        factor = state["logit_scale"].item()
    except Exception:
        factor = 1.0
    return state["proj"][0] * factor


GENERATOR = torch.Generator().manual_seed(1)
ASKS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "item": (lambda s: s["proj"][0] * s["logit_scale"].item(), "the values of a tensor"),
    "int": (lambda s: s["proj"][int(s["logit_scale"])], "the values of a tensor"),
    "if": (lambda s: s["proj"][0] if s["proj"].sum() > 0 else s["proj"][1], "the values of a tensor"),
    "any": (lambda s: s["proj"][0] if s["proj"].isnan().any() else s["proj"][1], "the values of a tensor"),
    "equal": (lambda s: s["proj"][0] if torch.equal(s["pos"], s["pos"]) else None, "the values of a tensor"),
    "tolist": (lambda s: torch.tensor(s["proj"][0].tolist()), "the values of a tensor"),
    "numpy": (lambda s: torch.from_numpy(s["proj"][0].numpy()), "the values of a tensor"),
    "list": (lambda s: torch.tensor([*s["proj"][0]]), "the values of a tensor"),
    "unique": (lambda s: s["proj"].unique()[:5], "the values of a tensor"),
    "max": (lambda s: s["proj"][0] / float(s["proj"].max()), r"the values of a tensor \(max\) at test_filters.py:\d+,"),
    "mask": (lambda s: s["proj"][s["proj"] > 0][:5], r"which elements a mask chooses \(torch's index\) at [^:]*:\d+,"),
    "apply": (lambda s: s["proj"][0].apply_(lambda v: v * 2), "the values of a tensor"),
    "array": (to_array, "the values of a tensor"),
    "array before": (array_before, "the values of a tensor"),
    "caught": (by_catching, "its error was one of missing values"),
    "copies": (deep_copies, "copies of tensors that share memory"),
    "data": (other_memory, "other memory for a tensor"),
    "resized": (lambda s: s["proj"].t_()[:, 0], "changes the shape of a tensor"),
    "strides": (lambda s: s["proj"].as_strided((5,), (1,)), "torch's as_strided"),
    "random": (lambda s: s["proj"][0] + torch.randn(5), "draws random numbers"),
    "dropout": (lambda s: F.dropout(s["proj"][0]), "draws random numbers"),
    "generator": (lambda s: s["proj"][0] + torch.randn(5, generator=GENERATOR), "draws random numbers"),
    "python": (lambda s: s["proj"][0] * random.random(), "draws random numbers"),
    "array of chance": (lambda s: s["proj"][0] * float(np.random.rand()), "draws random numbers"),
}


@pytest.mark.parametrize("case", ASKS)
def test_what_needs_values_when_nothing_is_read_is_refused(file: Path, case: str) -> None:
    change, text = ASKS[case]

    def function(state: dict[str, Any]) -> dict[str, Any]:
        return {**names(state), "head.bias": change(state)}

    model = Model(grid=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    drawn = random.getstate(), np.random.get_state()[1].tolist()
    with pytest.raises(UnsupportedError, match=text) as error:
        lowmem.load(file, model=model, filter_fn=function)
    assert "filter_fn" in str(error.value)
    assert str(file) in str(error.value)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == drawn
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("made", [None, [1], {"a": 1}, {1: torch.zeros(1)}, {"missing": "key"}])
def test_what_gives_no_tensors_by_name_is_refused(file: Path, made: Any) -> None:
    with pytest.raises(KeysError, match=r"filter_fn .* failed"):
        lowmem.load(file, model=Model(), filter_fn=lambda state: state["nothing"] if made is None else made)


def test_a_change_that_would_show_under_another_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    weight = torch.randn(4, 4)
    torch.save({"weight": weight, "bias": weight[0]}, path)

    def function(state: dict[str, Any]) -> dict[str, Any]:
        state["weight"].mul_(2)
        return state

    with pytest.raises(UnsupportedError, match="'weight' in place, which shares its memory"):
        lowmem.load(path, model=nn.Linear(4, 4), filter_fn=function)


SCALE = 2.0


def scaled(state: dict[str, Any]) -> dict[str, Any]:
    return {**names(state), "head.bias": state["proj"][0] * SCALE}


def test_a_folder_is_used_again_while_all_that_the_function_names_is_the_same(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "off", "filter_fn": scaled}
    found = []
    for scale in (2.0, 2.0, 3.0):
        monkeypatch.setattr(f"{__name__}.SCALE", scale)
        plan = lowmem.load(file, model=Model(grid=3), **options).plan
        assert plan.offload is not None
        found.append(plan.offload.reused)
    assert found == [False, True, False]


def test_a_plan_keeps_no_model(file: Path) -> None:
    model = Model()
    known = weakref.ref(model)
    result = lowmem.load(file, model=model, filter_fn=convert)
    plan = result.plan
    assert plan.groups
    del model, result
    gc.collect()
    assert known() is None


_MEASURE = """
import lowmem, torch
from torch import nn
class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.empty(args["rows"], 4096))
        self.b = nn.Parameter(torch.empty(4096, 4096))
given = {}
exec(args["function"], globals(), given)
options = {"model": Wide, "filter_fn": given["f"]}
peak = lowmem.plan(args["source"], **options).host.peak
loaded = lowmem.load(args["source"], ram=peak, **options)
result = {"measured": loaded.report.peak, "predicted": loaded.plan.host.peak}
"""


@pytest.mark.parametrize(
    ("rows", "function"),
    [
        (4196, "f = lambda s: {'a': torch.cat([s['a'], torch.zeros(100, 4096)]), 'b': s['b'].T}"),
        (4096, "f = lambda s: {'a': s['a'] @ s['b'], 'b': s['b']}"),
        (5000, "f = lambda s: {'a': nn.functional.interpolate(s['a'].T[None], 5000)[0].T, 'b': s['b']}"),
    ],
)
def test_the_predicted_peak_is_the_measured_one(
    tmp_path: Path, rows: int, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"a": torch.ones(4096, 4096), "b": torch.ones(4096, 4096)}, tmp_path / "m.safetensors")
    monkeypatch.setattr("test_budget._MEASURE", _MEASURE)
    check_prediction({}, source=str(tmp_path / "m.safetensors"), rows=rows, function=function)


def test_a_function_gets_a_pickle_in_its_own_order(tmp_path: Path) -> None:
    """The records of a zip are sorted by their names, as text: the eleventh tensor lies before the third."""
    state = {f"old{number}": torch.full((2, 2), float(number)) for number in range(13)}
    torch.save(state, tmp_path / "old.bin")
    model = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(13)])

    def by_order(old: dict[str, Any], model: nn.Module) -> dict[str, Any]:
        return dict(zip(model.state_dict(), old.values(), strict=True))

    loaded = lowmem.load(tmp_path / "old.bin", model=model, filter_fn=by_order).model
    assert [layer.weight[0, 0].item() for layer in loaded] == list(range(13))


class Scaled(Model):
    """One whose functions may ask it for a number."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__(grid=3)
        self.factor = factor


def scaled_by_the_model(state: dict[str, Any], model: Scaled) -> dict[str, Any]:
    return {**names(state), "head.bias": state["proj"][0] * model.factor}


def scaled_by_the_environment(state: dict[str, Any]) -> dict[str, Any]:
    return {**names(state), "head.bias": state["proj"][0] * float(os.environ["FACTOR"])}


FACTORS = types.ModuleType("my_factors")
FACTORS.factor = 2.0  # type: ignore[attr-defined]
FACTORS.__version__ = "1.0"  # type: ignore[attr-defined]


def scaled_by_a_package(state: dict[str, Any]) -> dict[str, Any]:
    return {**names(state), "head.bias": state["proj"][0] * FACTORS.factor}


def scaled_by_a_file(state: dict[str, Any]) -> dict[str, Any]:
    return {**names(state), "head.bias": state["proj"][0] * torch.load("factor.pt")}


def change_of(factor: float) -> dict[str, lowmem.Transform]:
    return {"head.bias": lowmem.Transform("scale()", lambda tensor, shape: tensor[:5] * factor)}


@pytest.mark.parametrize(
    "case", [scaled_by_the_model, scaled_by_the_environment, scaled_by_a_package, scaled_by_a_file, change_of]
)
def test_a_folder_is_not_used_again_where_what_a_function_makes_may_be_another(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "my_factors", FACTORS)
    for factor in (2.0, 3.0):
        monkeypatch.setenv("FACTOR", str(factor))
        monkeypatch.setattr(FACTORS, "factor", factor)
        torch.save(factor, "factor.pt")
        options: dict[str, Any] = {"filter_fn": case}
        if case is change_of:
            options = {"filter_fn": names, "transforms": change_of(factor)}
        result = lowmem.load(
            file, model=Scaled(factor), device_map={"": "disk"}, offload_folder=tmp_path / "off", **options
        )
        assert result.plan.offload is not None
        assert not result.plan.offload.reused


class Whole(nn.Module):
    def __init__(self, part: type[nn.Module]) -> None:
        super().__init__()
        self.part = part()


class Other(nn.Linear):
    def __init__(self) -> None:
        super().__init__(5, 8, bias=False)


class Another(Other):
    """What its kind would make of the same tensors may be others."""


def doubled(state: dict[str, Any]) -> dict[str, Any]:
    return {"weight": state["proj"] * 2}


def test_the_class_of_a_part_tells_a_folder(file: Path, tmp_path: Path) -> None:
    found = []
    for part in (Other, Other, Another):
        plan = lowmem.load(
            {"part": lowmem.Source(file, filter_fn=doubled)},
            model=Whole(part),
            device_map={"": "disk"},
            offload_folder=tmp_path / "off",
        ).plan
        assert plan.offload is not None
        found.append(plan.offload.reused)
    assert found == [False, True, False]


def adds(state: dict[str, Any], model: Model) -> dict[str, Any]:
    return {**names(state), "head.bias": state["proj"][0] + model.head.bias}


def alone(state: dict[str, Any], model: Model) -> dict[str, Any]:
    return {**names(state), "head.bias": model.head.bias * 2}


def writes(state: dict[str, Any], model: Model) -> dict[str, Any]:
    model.head.bias.detach().copy_(state["proj"][0])
    return names(state)


def through_an_array(state: dict[str, Any], model: Model) -> dict[str, Any]:
    return {**names(state), "head.bias": torch.from_numpy(model.head.bias.detach().numpy() * 2)}


@pytest.mark.parametrize("function", [adds, alone, writes, through_an_array])
@pytest.mark.parametrize("model", [Model(grid=3), lambda: Model(grid=3)], ids=["made", "class"])
def test_values_of_the_models_own_tensors_are_refused(file: Path, function: Any, model: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"asks for the values of the model's own tensors \((\w+)\) at test_fil"):
        lowmem.load(file, model=model, filter_fn=function)


@pytest.mark.parametrize("model", [Model(grid=3), lambda: Model(grid=3)], ids=["made", "class"])
def test_a_tensor_of_the_model_itself_counts_as_not_given(file: Path, model: Any) -> None:
    def over_its_own(state: dict[str, Any], model: Model) -> dict[str, Any]:
        own = model.state_dict()
        given = names(state)
        given["pos_embed"] = given["pos_embed"] + torch.zeros_like(model.pos_embed)
        given["head.weight"] = given["head.weight"].reshape(model.head.weight.shape)
        del given["head.bias"], given["q.bias"]
        own.update(given)
        return own

    with pytest.raises(KeysError, match=r"not in the checkpoint: 'q.bias', 'head.bias'"):
        lowmem.load(file, model=model, filter_fn=over_its_own)
    result = lowmem.load(file, model=model, filter_fn=over_its_own, strict=False)
    assert sorted(result.plan.mapping.missing) == ["head.bias", "q.bias"]
    assert torch.equal(result.model.pos_embed, load_file(file)["pos"])
    (line,) = [line for line in result.plan.warnings if "count as not given" in line]
    assert "over_its_own: 2 tensors are the model's own ('head.bias', …), and count as not given" in line


@pytest.mark.parametrize("outer", [False, True])
def test_a_function_may_have_inference_mode_itself(file: Path, outer: bool) -> None:
    @torch.inference_mode()
    def function(state: dict[str, Any]) -> dict[str, Any]:
        state["proj"][1:3].mul_(2)
        return {**names(state), "head.bias": state["proj"][0] * 2, "q.bias": state["qkv.bias"].chunk(3)[1] + 1}

    expected = function(load_file(file))
    with torch.inference_mode(outer):
        model = lowmem.load(file, model=Model(grid=3), filter_fn=function).model
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert not model.head.bias.is_inference()


def test_inference_mode_is_no_matter(file: Path) -> None:
    def in_place(state: dict[str, Any]) -> dict[str, Any]:
        state["proj"].mul_(2)
        return {**names(state), "head.bias": state["proj"].T @ state["qkv.bias"][:8]}

    expected = in_place(load_file(file))
    with torch.inference_mode():
        result = lowmem.load(
            file, model=Model(grid=4), filter_fn=in_place, transforms={"pos_embed": lowmem.interpolate()}
        )
    assert {group.what for group in result.plan.groups} == {
        "filter_fn test_inference_mode_is_no_matter.<locals>.in_place",
        "interpolate()",
    }
    for name in ("head.weight", "head.bias", "kv.weight"):
        assert torch.equal(result.model.get_parameter(name), expected[name]), name
    plain = lowmem.load(file, model=Model(), filter_fn=in_place, transforms={"pos_embed": lowmem.interpolate()})
    assert torch.equal(result.model.pos_embed, plain.model.pos_embed)


def test_names_that_the_model_does_not_have_are_told_with_what_they_are_like(file: Path) -> None:
    def wrong(state: dict[str, Any]) -> dict[str, Any]:
        return {
            **state,
            **{name.replace("q.", "Q."): tensor for name, tensor in names(state).items()},
            "x": state["pos"],
        }

    skeleton = make_skeleton(Origin(Model(grid=3)), inspect(file), "auto")
    given = make_names(give_names(inspect(file), NO_RULES), inspect(file), skeleton, replace(NO_RULES, filter_fn=wrong))
    assert given.tracing is not None
    first, second = odd_names(given, {"x": "pos_embed"}, list(Model().state_dict()))
    assert first.startswith("filter_fn test_names")
    assert first.endswith("gives 'Q.weight' (of 'qkv.weight'), which the model does not have; like it is 'q.weight'")
    assert second.endswith("gives 'Q.bias' (of 'qkv.bias'), which the model does not have; like it is 'q.bias'")
    assert odd_names(given, {"x": "y"}, [])[-1] == "… (8 such)"


@pytest.mark.parametrize("front", ["module", "_orig_mod"])
def test_a_prefix_that_a_function_did_not_know_is_told(tmp_path: Path, front: str) -> None:
    path = tmp_path / "wrapped.safetensors"
    save_file({f"{front}.{name}": torch.zeros(2) for name in "abc"}, path)

    def unaware(state: dict[str, Any]) -> dict[str, Any]:
        return {name.replace("a", "b") if name.startswith("a") else name: tensor for name, tensor in state.items()}

    skeleton = make_skeleton(Origin(Model(grid=3)), inspect(path), "auto")
    rules = replace(NO_RULES, filter_fn=unaware)
    given = make_names(give_names(inspect(path), rules), inspect(path), skeleton, rules)
    (line,) = odd_names(given, {}, list(Model().state_dict()))
    assert line.endswith(f"was given names that begin with '{front}.': prefix='{front}' (--prefix) takes them without")


def test_a_log_is_silent_while_any_load_is_in_disguise() -> None:
    log = logging.getLogger("lowmem.test.disguise")
    first, second = silent(log.name), silent(log.name)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert log.disabled
    second.__exit__(None, None, None)
    assert not log.disabled


def test_results_of_the_same_shapes_cost_what_each_costs(tmp_path: Path) -> None:
    path = tmp_path / "two.safetensors"
    save_file({"a": torch.ones(2048, 2048), "b": torch.ones(2048, 2048)}, path)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.zeros(2048, 2048))
            self.b = nn.Parameter(torch.zeros(2048, 2048))

    def function(state: dict[str, Any]) -> dict[str, Any]:
        many = state["b"].repeat(12, 1).view(12, 2048, 2048)
        return {"a": state["a"] * 2, "b": many.mul_(1.5).mean(0)}

    groups = lowmem.plan(path, model=Two, filter_fn=function).groups
    assert sorted(group.scratch for group in groups) == [0, 12 * 2**24]


def test_names_that_a_filter_gives_and_the_model_has_not_are_told(tmp_path: Path) -> None:
    save_file({"old.weight": torch.ones(2, 2)}, tmp_path / "old.safetensors")

    def convert(state: dict[str, Any]) -> dict[str, Any]:
        return {"0.wieght": state["old.weight"]}

    said = r"gives '0\.wieght' \(of 'old\.weight'\), which the model does not have; like it is '0\.weight'"
    with pytest.raises(lowmem.KeysError, match=said):
        lowmem.load(tmp_path / "old.safetensors", model=nn.Sequential(nn.Linear(2, 2, bias=False)), filter_fn=convert)


def test_two_lambdas_of_one_line_are_two_functions(tmp_path: Path) -> None:
    save_file({"0.weight": torch.ones(2, 2)}, tmp_path / "one.safetensors")
    functions = [lambda s: {k: v * 2 for k, v in s.items()}, lambda s: {k: v * 3 for k, v in s.items()}]  # fmt: skip
    for factor, function in zip((2.0, 3.0), functions, strict=True):
        model = nn.Sequential(nn.Linear(2, 2, bias=False))
        options: dict[str, Any] = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "off"}
        lowmem.load(tmp_path / "one.safetensors", model=model, filter_fn=function, **options)
        assert torch.equal(model(torch.ones(1, 2)), torch.full((1, 2), 2 * factor))
