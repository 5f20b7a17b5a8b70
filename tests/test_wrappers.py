"""Which mapping inside of a pickled file holds the weights: by the model, by known names, or as the user says."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowmem
from lowmem.checkpoint import places, survey, wrappers
from lowmem.checkpoint.records import Leaf
from lowmem.checkpoint.wrappers import find_candidates
from lowmem.errors import CheckpointError, LowmemError, OptionError, SourceError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)


def weights(seed: int) -> OrderedDict[str, torch.Tensor]:
    torch.manual_seed(seed)
    state = Net().state_dict()
    return OrderedDict((key, torch.randn_like(v) if v.is_floating_point() else v) for key, v in state.items())


RAW, EMA = weights(0), weights(1)


def optimizer() -> dict[str, Any]:
    net = Net()
    adam = torch.optim.AdamW(net.parameters())
    net.head(net.norm(net.stem(torch.randn(5, 4)))).sum().backward()
    adam.step()
    return adam.state_dict()


def under(prefix: str, state: OrderedDict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in state.items()}


def nested(state: OrderedDict[str, torch.Tensor]) -> dict[str, Any]:
    """Each module a mapping of its own."""
    tree: dict[str, Any] = {}
    for key, value in state.items():
        owner, _, leaf = key.rpartition(".")
        tree.setdefault(owner, {})[leaf] = value
    return tree


def module(state: OrderedDict[str, torch.Tensor]) -> Net:
    net = Net()
    net.load_state_dict(state)
    return net


META = {"epoch": 3, "args": argparse.Namespace(lr=0.1, model="net"), "best": 0.5}
# What is in the file, the path that is opened, and whose weights these are.
FILES: dict[str, tuple[Callable[[], Any], str, Any]] = {
    "bare": (lambda: RAW, "", RAW),
    "timm": (
        lambda: {"state_dict": RAW, "state_dict_ema": EMA, "optimizer": optimizer(), **META},
        "state_dict_ema",
        EMA,
    ),
    "timm, older": (lambda: {"model": RAW, "model_ema": EMA, **META}, "model_ema", EMA),
    "ConvNeXt-V2": (lambda: {"model": RAW, "optimizer": optimizer(), "scaler": {"scale": 1.0}, **META}, "model", RAW),
    "mmengine": (
        lambda: {
            "meta": {"epoch": 1},
            "state_dict": RAW,
            "message_hub": {"log": torch.ones(9)},
            "optimizer": optimizer(),
        },
        "state_dict",
        RAW,
    ),
    "mmengine with its EMA hook": (
        lambda: {"meta": {}, "state_dict": EMA, "ema_state_dict": {"steps": torch.tensor(1), **under("module.", RAW)}},
        "state_dict",
        EMA,
    ),
    "Lightning": (
        lambda: {
            "state_dict": under("model.", RAW),
            "hyper_parameters": {"weight": torch.ones(2)},
            "callbacks": {"EMA": {"w": torch.ones(3)}},
            "optimizer_states": [optimizer()],
            "loops": {"fit": {"t": torch.ones(1)}},
        },
        "state_dict",
        RAW,
    ),
    "BasicSR": (lambda: {"params": RAW, "params_ema": EMA}, "params_ema", EMA),
    "BasicSR, dashed": (lambda: {"params-ema": EMA}, "params-ema", EMA),
    "pycls": (lambda: {"model_state": RAW, "ema_state": EMA, "optimizer_state": optimizer()}, "ema_state", EMA),
    "3DMPPE": (lambda: {"network": under("module.", RAW), "optimizer": optimizer()}, "network", RAW),
    "fairseq": (
        lambda: {"model": RAW, "cfg": argparse.Namespace(), "last_optimizer_state": optimizer(), "task_state": {}},
        "model",
        RAW,
    ),
    "DeepSpeed": (
        lambda: {"module": RAW, "param_shapes": [], "buffer_names": ["norm"], "shared_params": {}},
        "module",
        RAW,
    ),
    "detectron2, values of numpy": (
        lambda: {"model": {key: value.numpy() for key, value in RAW.items()}, "__author__": "model zoo"},
        "model",
        RAW,
    ),
    "Megatron": (lambda: {"model": nested(RAW), "iteration": 7, "optimizer": optimizer()}, "model", RAW),
    "Ultralytics": (lambda: {"model": module(RAW), "ema": None, "optimizer": None, "date": "today"}, "model", RAW),
    "own tensors beside": (lambda: {"model": RAW, "queue": torch.ones(3), "queue_ptr": torch.ones(1)}, "model", RAW),
    "a name of its own": (lambda: {"my_very_own": RAW, "step": 3}, "my_very_own", RAW),
    "deep": (lambda: {"checkpoint": {"stage": {"model": RAW}}}, "checkpoint.stage.model", RAW),
}


def saved(make: Callable[[], Any], file: Path, legacy: bool = False) -> Path:
    torch.save(make(), file, _use_new_zipfile_serialization=not legacy)
    return file


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_the_weights_are_found_with_a_model(name: str, legacy: bool, tmp_path: Path) -> None:
    make, path, held = FILES[name]
    result = lowmem.load(saved(make, tmp_path / "a.pth", legacy), model=Net)
    assert result.report.opened == path
    state = result.model.state_dict()
    assert state.keys() == held.keys()
    assert all(torch.equal(state[key], held[key]) for key in held)


@pytest.mark.parametrize("name", FILES)
def test_the_weights_are_found_without_a_model(name: str, tmp_path: Path) -> None:
    make, path, held = FILES[name]
    checkpoint = lowmem.inspect(saved(make, tmp_path / "a.pth"))
    assert checkpoint.opened == path
    assert len(checkpoint) == len(held)


BOTH = [name for name, (make, _, _) in FILES.items() if name in ("timm", "timm, older", "BasicSR", "pycls")]


@pytest.mark.parametrize("name", [*BOTH, "mmengine with its EMA hook"])
@pytest.mark.parametrize("ema", [True, False])
def test_ema_prefers_averages_or_what_was_trained(name: str, ema: bool, tmp_path: Path) -> None:
    """In a file of mmengine's EMA hook the names mean the opposite."""
    file = saved(FILES[name][0], tmp_path / "a.pth")
    state = lowmem.load(file, model=Net, ema=ema).model.state_dict()
    held = EMA if ema else RAW
    assert all(torch.equal(state[key], held[key]) for key in held)
    assert len(lowmem.inspect(file, ema=ema)) >= len(held)


@pytest.mark.parametrize("name", BOTH)
def test_a_preference_that_nobody_stated_is_told(name: str, tmp_path: Path) -> None:
    plan = lowmem.plan(saved(FILES[name][0], tmp_path / "a.pth"), model=Net)
    assert any("ema=False" in warning for warning in plan.warnings)


def test_averages_that_are_not_there_are_an_error(tmp_path: Path) -> None:
    file = saved(FILES["ConvNeXt-V2"][0], tmp_path / "a.pth")
    with pytest.raises(SourceError, match=r"ema=True: no averaged.*\n.*weights='model'"):
        lowmem.load(file, model=Net, ema=True)
    assert lowmem.load(file, model=Net, ema=False).report.opened == "model"


def test_a_tie_is_an_error_that_lists_the_candidates(tmp_path: Path) -> None:
    file = saved(lambda: {"student": RAW, "teacher": EMA}, tmp_path / "a.pth")
    with pytest.raises(SourceError, match=r"weights=") as caught:
        lowmem.load(file, model=Net)
    assert "weights='student'" in str(caught.value)
    assert "weights='teacher'" in str(caught.value)
    state = lowmem.load(file, model=Net, weights="teacher").model.state_dict()
    assert torch.equal(state["stem.weight"], EMA["stem.weight"])


def test_weights_are_picked_by_path(tmp_path: Path) -> None:
    file = saved(FILES["timm"][0], tmp_path / "a.pth")
    checkpoint = lowmem.inspect(file, weights="state_dict")
    assert checkpoint.opened == "state_dict"
    paths = [c.path for _, held in survey(file).pickled for c in held]
    assert "optimizer" in paths
    # It has a mapping for each weight, none of which is a candidate; they can be named all the same.
    assert not any(path.startswith("optimizer.") for path in paths)
    state = dict(lowmem.stream(file, weights="optimizer.state.0"))
    assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
    with pytest.raises(SourceError, match=r"weights='nowhere'.*found none") as caught:
        lowmem.inspect(file, weights="nowhere")
    assert "weights='state_dict_ema'" in str(caught.value)


def test_what_was_opened_is_told(tmp_path: Path) -> None:
    file = saved(FILES["timm"][0], tmp_path / "a.pth")
    said = [warning for warning in lowmem.inspect(file).warnings if "'state_dict_ema' was opened: 9" in warning]
    assert len(said) == 1
    assert "beside it: 'state_dict'" in said[0]
    assert lowmem.load(file, model=Net).report.to_dict()["opened"] == "state_dict_ema"
    # Where there is nothing to choose there is nothing to say.
    assert not lowmem.inspect(saved(FILES["ConvNeXt-V2"][0], tmp_path / "b.pth")).warnings


def test_gradients_in_the_weights_shapes_are_not_the_weights(tmp_path: Path) -> None:
    file = saved(lambda: {"optimizer": {"exp_avg": EMA, "exp_avg_sq": EMA}, "net": RAW}, tmp_path / "a.pth")
    state = lowmem.load(file, model=Net).model.state_dict()
    assert torch.equal(state["stem.weight"], RAW["stem.weight"])


def test_a_pickled_module_is_read_without_its_class(tmp_path: Path) -> None:
    net = Net()
    net.load_state_dict(RAW)
    file = saved(lambda: {"ema": None, "model": net, "epoch": 1}, tmp_path / "a.pt")
    assert lowmem.inspect(file).opened == "model"
    state = lowmem.load(file, model=Net).model.state_dict()
    assert all(torch.equal(state[key], RAW[key]) for key in RAW)
    torch.save(net, tmp_path / "whole.pt")
    assert lowmem.load(tmp_path / "whole.pt", model=Net).report.opened == ""


def test_transient_buffers_of_a_pickled_module_are_no_weights(tmp_path: Path) -> None:
    net = Net()
    net.register_buffer("table", torch.ones(7), persistent=False)
    torch.save(net, tmp_path / "whole.pt")
    assert set(lowmem.inspect(tmp_path / "whole.pt")) == set(net.state_dict())


def test_mappings_inside_mappings_have_dotted_keys(tmp_path: Path) -> None:
    """As Megatron nests them."""
    nested = {"language_model": {"embedding": {"weight": torch.ones(3, 2)}, "encoder": {"a.b": torch.zeros(2)}}}
    file = saved(lambda: {"model": nested, "iteration": 3}, tmp_path / "a.pt")
    assert set(lowmem.inspect(file)) == {"language_model.embedding.weight", "language_model.encoder.a.b"}


def test_a_file_without_tensors_says_so(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no tensors"):
        lowmem.inspect(saved(lambda: {"epoch": 3}, tmp_path / "a.pt"))


def test_wishes_about_safetensors_and_of_other_kinds_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(dict(RAW), tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match="safetensors, which hold tensors only"):
        lowmem.inspect(tmp_path, weights="model")
    for options in ({"weights": 3}, {"ema": "yes"}, {"download": 1}):
        with pytest.raises(OptionError):
            lowmem.inspect(tmp_path, **options)  # type: ignore[arg-type]


LEAF = Leaf("float32", (1,), None, "0", 0, 4)


def test_mappings_that_share_one_another_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrappers, "_MOST_VISITS", 100_000)
    node: Any = {"w": LEAF}
    for _ in range(60):
        node = {"a": node, "b": node}
    with pytest.raises(CheckpointError, match="made to do harm"):
        find_candidates(node, Path("bomb.pt"))


def test_mappings_deeper_than_any_are_refused_and_those_in_themselves_end() -> None:
    node: Any = {"w": LEAF}
    for _ in range(100_000):
        node = {"a": node}
    with pytest.raises(CheckpointError, match="one inside the other"):
        find_candidates(node, Path("deep.pt"))
    ring: dict[str, Any] = {"w": LEAF}
    ring["self"] = ring
    assert [c.path for c in find_candidates(ring, Path("ring.pt"))] == [""]


def test_names_of_mmengine_in_files_of_others_mean_what_they_say(tmp_path: Path) -> None:
    file = saved(lambda: {"state_dict": RAW, "ema_state_dict": EMA}, tmp_path / "a.pth")
    assert lowmem.inspect(file, ema=True).opened == "ema_state_dict"
    assert lowmem.inspect(file, ema=False).opened == "state_dict"
    wrapped = {"state_dict": under("module.", RAW), "ema_state_dict": under("module.", EMA)}
    assert lowmem.inspect(saved(lambda: wrapped, tmp_path / "b.pth"), ema=True).opened == "ema_state_dict"
    hub = {"state_dict": EMA, "ema_state_dict": RAW, "message_hub": {"log": {}}, "meta": {}}
    assert lowmem.inspect(saved(lambda: hub, tmp_path / "c.pth"), ema=True).opened == "state_dict"


def test_a_mapping_that_stands_there_twice_has_both_names(tmp_path: Path) -> None:
    file = saved(lambda: {"net": RAW, "model": RAW}, tmp_path / "a.pth")
    assert lowmem.inspect(file, weights="model").opened == "model"
    assert lowmem.inspect(file, weights="net").opened == "net"


def test_an_optimizer_alone_is_no_weights(tmp_path: Path) -> None:
    file = saved(lambda: {"optimizer": optimizer(), "scheduler": {"last": torch.ones(1)}}, tmp_path / "a.pth")
    with pytest.raises(SourceError, match="found only what trainers keep"):
        lowmem.inspect(file)


def test_the_weights_that_rename_would_make_fit_are_found(tmp_path: Path) -> None:
    """Two mappings under other names than the model's: what the user's rules make of them decides."""
    ours = {f"x_{key}": value for key, value in RAW.items()}
    theirs = {f"y_{key}": value for key, value in EMA.items()}
    file = saved(lambda: {"one": theirs, "two": ours}, tmp_path / "a.pth")
    result = lowmem.load(file, model=Net, rename={"^x_": ""})
    assert result.report.opened == "two"


def test_what_was_opened_stands_in_the_difference(tmp_path: Path) -> None:
    file = saved(FILES["ConvNeXt-V2"][0], tmp_path / "a.pth")
    assert "'model'" in lowmem.diff(file, model=Net).text()


def test_weights_and_ema_are_not_given_together(tmp_path: Path) -> None:
    file = saved(FILES["timm"][0], tmp_path / "a.pth")
    with pytest.raises(OptionError, match="give one of them"):
        lowmem.inspect(file, weights="state_dict", ema=True)


def test_twins_of_unknown_names_are_a_tie_without_a_model_too(tmp_path: Path) -> None:
    file = saved(lambda: {"student": RAW, "teacher": EMA, "epoch": 3}, tmp_path / "a.pth")
    for verb in (lowmem.inspect, lambda f: dict(lowmem.stream(f))):
        with pytest.raises(SourceError, match=r"name one with weights=") as caught:
            verb(file)
        assert "weights='teacher'" in str(caught.value)


def test_two_tensors_of_one_joined_key_are_an_error_for_who_wants_it(tmp_path: Path) -> None:
    torch.save({"a": {"b": torch.ones(1)}, "a.b": torch.zeros(1), "c": torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(LowmemError, match=r"'a\.b': two tensors have this key"):
        dict(lowmem.stream(tmp_path / "a.pt"))
    assert dict(lowmem.stream(tmp_path / "a.pt", only=["c"])).keys() == {"c"}


def test_a_part_of_a_model_may_be_called_as_what_trainers_keep(tmp_path: Path) -> None:
    held = {"encoder": {"w": torch.ones(2)}, "loss": {"scale": torch.ones(3)}}
    file = saved(lambda: {"model": held, "optimizer": optimizer()}, tmp_path / "a.pt")
    assert set(lowmem.inspect(file)) == {"encoder.w", "loss.scale"}
    file = saved(lambda: {"run": {"model": RAW, "optimizer": optimizer(), "epoch": 2}}, tmp_path / "b.pt")
    assert lowmem.inspect(file).opened == "run.model"


def test_what_is_named_is_whole_and_what_is_left_out_is_told(tmp_path: Path) -> None:
    parts = {"net": dict(RAW), "loss": {"weight": torch.ones(2, 2)}}
    file = saved(lambda: {"model": parts, "optimizer": {"lr": torch.ones(1)}}, tmp_path / "a.pt")
    assert any("beside it: 'model.loss'" in warning for warning in lowmem.inspect(file).warnings)
    assert "loss.weight" in lowmem.inspect(file, weights="model")
    assert "optimizer.lr" in lowmem.inspect(file, weights="")

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()
            self.loss = nn.Linear(2, 2, bias=False)

    assert torch.equal(lowmem.load(file, model=Parts).model.loss.weight, torch.ones(2, 2))


def test_a_shard_of_which_nothing_is_used_is_told(tmp_path: Path) -> None:
    torch.save({"model": RAW}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save(EMA, tmp_path / "pytorch_model-00002-of-00002.bin")
    warnings = lowmem.load(tmp_path, model=Net).plan.warnings
    assert any("00002-of-00002.bin: nothing of it is used" in warning for warning in warnings)


def test_what_is_opened_with_and_without_a_model_is_located_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = saved(FILES["timm"][0], tmp_path / "a.pth")
    real, calls = places.Locator.locate, []
    monkeypatch.setattr(places.Locator, "locate", lambda self, leaves: calls.append(len(leaves)) or real(self, leaves))
    lowmem.load(file, model=Net)
    assert calls == [len(RAW)]
