"""Files as Lightning, Ultralytics, fairseq, DeepSpeed and Megatron write them, against how each of them is read.

Each file has the nesting and the keys of the function named beside it. What a program's own way of loading gives is
made with `torch.load(weights_only=False)` while the classes in the file can be imported; lowmem reads it afterwards.
"""

from __future__ import annotations

import argparse
import copy
import io
import pickle
import random
import re
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import same
from torch import nn

import lowmem
from lowmem.errors import KeysError, SourceError, UnsupportedError

State = Mapping[str, torch.Tensor]
Build = Callable[[], nn.Module]


class Net(nn.Module):
    """Weights, and buffers of two kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.stem(x)))


def filled(build: Build, seed: int) -> Any:
    """A model with numbers of its own in every tensor."""
    model = build()
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * 8 + 1)
    return model


def under(prefix: str, state: State) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in state.items()}


def adam(model: nn.Module) -> dict[str, Any]:
    """The state of an optimizer that has run."""
    model = copy.deepcopy(model).float()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    return optimizer.state_dict()


STRANGERS = "strangers_of_trainers"


@pytest.fixture
def strangers() -> Iterator[types.ModuleType]:
    """A package that is there while a file is written, and gone when lowmem reads it."""
    made = types.ModuleType(STRANGERS)
    sys.modules[STRANGERS] = made
    yield made
    sys.modules.pop(STRANGERS, None)


def stranger(package: types.ModuleType, name: str, base: type = object, **members: Any) -> Any:
    """A class of that package."""
    if name in vars(package):
        return getattr(package, name)
    kind = type(name, (base,), {"__module__": STRANGERS, **members})
    setattr(package, name, kind)
    return kind


def saved(held: Any, file: Path) -> Any:
    """Write it; what torch reads back, after which the strangers are gone."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(held, file)
    back = torch.load(file, weights_only=False)
    if sys.modules.pop(STRANGERS, None) is not None:
        with pytest.raises((ImportError, AttributeError)):
            torch.load(file, weights_only=False)
    return back


def check(file: Path, build: Build, theirs: State, opened: str, extra: int = 0, inner: str = "", **options: Any) -> Any:
    """`load`, `diff` and `inspect` agree with a model that has `theirs` by its own `load_state_dict`.

    Args:
        file: what was written.
        build: makes the model.
        theirs: what the program itself would give to `load_state_dict`.
        opened: the path of the mapping with the weights.
        extra: keys of the file that are not the model's.
        inner: a mapping inside of it that does as well, because all of the weights are in it.
        options: of `load`.
    """
    wanted = build()
    wanted.load_state_dict(theirs)
    result = lowmem.load(file, model=build, **options)
    found, expected = result.model.state_dict(), wanted.state_dict()
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert torch.equal(found[key].to(value.dtype), value), key
    assert result.report.opened in (opened, inner)
    assert len(result.report.unexpected) == extra
    assert not result.report.initialised
    picks = {k: v for k, v in options.items() if k in ("weights", "ema")}
    difference = lowmem.diff(file, model=build, **picks)
    assert (difference.missing, difference.mismatched, len(difference.unexpected)) == ((), (), extra)
    checkpoint = lowmem.inspect(file, **picks)
    assert checkpoint.opened == opened
    assert len(checkpoint) == len(expected) + extra
    return result


def refusal(file: Path, build: Build | None = None, **options: Any) -> str:
    """What both `inspect` and, with a model, `load` say."""
    with pytest.raises(SourceError) as caught:
        lowmem.inspect(file, **options)
    if build is None:
        return str(caught.value)
    with pytest.raises(SourceError) as loading:
        lowmem.load(file, model=build, **options)
    return f"{caught.value}\n{loading.value}"


# --- Lightning: `_CheckpointConnector.dump_checkpoint`, trainer/connectors/checkpoint_connector.py ---


def progress(n: int) -> dict[str, Any]:
    return {"total": {"ready": n, "completed": n}, "current": {"ready": 0, "completed": 0}}


def lightning(state: State, net: nn.Module, **more: Any) -> dict[str, Any]:
    """The checkpoint of a run with a learning-rate schedule; `more` is merged in, as callbacks do on saving."""
    monitor = "ModelCheckpoint{'monitor': 'val_loss', 'mode': 'min', 'every_n_train_steps': 0, 'every_n_epochs': 1}"
    best = torch.tensor(0.25)
    return {
        "epoch": 2,
        "global_step": 12,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": state,
        "loops": {
            "fit_loop": {
                "state_dict": {},
                "epoch_loop.state_dict": {"_batches_that_stepped": 12},
                "epoch_loop.batch_progress": {**progress(4), "is_last_batch": True},
                "epoch_loop.automatic_optimization.optim_progress": {"optimizer": {"step": progress(12)}},
                "epoch_progress": progress(3),
            },
            "validate_loop": {"state_dict": {}, "batch_progress": {**progress(1), "is_last_batch": False}},
        },
        "callbacks": {
            monitor: {"monitor": "val_loss", "best_model_score": best, "best_k_models": {"a.ckpt": best}},
            "EarlyStopping{'monitor': 'val_loss', 'mode': 'min'}": {"wait_count": 0, "best_score": best},
        },
        "optimizer_states": [adam(net)],
        "lr_schedulers": [{"step_size": 1, "base_lrs": [0.1], "last_epoch": 3, "_last_lr": [0.1]}],
        "MixedPrecision": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 4},
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1},
        **more,
    }


@pytest.mark.parametrize("prefix", ["net.", "model.", "", "model._orig_mod.", "_orig_mod.model."])
def test_lightning_files_feed_the_network_inside(prefix: str, tmp_path: Path, strangers: Any) -> None:
    """`save_hyperparameters` keeps the whole network too, and whatever else it was made from."""
    net = filled(Net, 1)
    choice = stranger(strangers, "Choice")()
    choice.rate, choice.class_weights = 0.1, torch.ones(3)
    own = {"net": filled(Net, 9), "choice": choice, "weights": torch.ones(6, 4), "path": Path("a")}
    held = lightning(under(prefix, net.state_dict()), net, hyper_parameters=own, datamodule_hyper_parameters=own)
    back = saved(held, tmp_path / "last.ckpt")
    theirs = {key.removeprefix(prefix): value for key, value in back["state_dict"].items()}
    check(tmp_path / "last.ckpt", Net, theirs, "state_dict")


class Lit(nn.Module):
    """What a LightningModule is to its own state dict: the network, and a loss with weights beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.criterion = nn.CrossEntropyLoss(weight=torch.ones(3))


def metric(state: State) -> dict[str, torch.Tensor]:
    """Persistent states of a metric of torchmetrics."""
    return {**state, "val_acc.tp": torch.tensor(3), "val_acc.fp": torch.tensor(1)}


def test_lightning_modules_with_losses_and_metrics_load_whole_or_by_their_network(tmp_path: Path) -> None:
    whole = filled(Lit, 1)
    back = saved(lightning(metric(whole.state_dict()), whole), tmp_path / "a.ckpt")
    theirs = {key: value for key, value in back["state_dict"].items() if not key.startswith("val_acc.")}
    check(tmp_path / "a.ckpt", Lit, theirs, "state_dict", extra=2)
    inner = {key.removeprefix("net."): value for key, value in theirs.items() if key.startswith("net.")}
    check(tmp_path / "a.ckpt", Net, inner, "state_dict", extra=3)


def averaging() -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """`WeightAveraging.on_save_checkpoint`, callbacks/weight_averaging.py: the averages take the usual place."""
    trained, averages = filled(Lit, 1), filled(Lit, 2)
    whole = torch.optim.swa_utils.AveragedModel(averages)
    state = whole.state_dict()
    held = lightning(trained.state_dict(), trained)
    held["callbacks"]["WeightAveraging"] = {"latest_update_step": 12}
    held["current_model_state"] = held["state_dict"]
    held["state_dict"] = {name[7:]: value for name, value in state.items() if name.startswith("module.")}
    held["averaging_state"] = {name: value for name, value in state.items() if not name.startswith("module.")}
    return trained, averages, held


@pytest.mark.parametrize("ema", [None, True, False])
def test_lightning_averages_in_the_usual_place_are_averages(ema: bool | None, tmp_path: Path) -> None:
    """Lightning itself loads `state_dict` for prediction."""
    back = saved(averaging()[2], tmp_path / "a.ckpt")
    name = "current_model_state" if ema is False else "state_dict"
    options = {} if ema is None else {"ema": ema}
    result = check(tmp_path / "a.ckpt", Lit, back[name], name, **options)
    assert any("ema=False" in warning for warning in result.plan.warnings) is (ema is None)


def test_averages_that_lightning_keeps_in_a_callback_are_loaded_by_their_path(tmp_path: Path) -> None:
    """`StochasticWeightAveraging.state_dict`, callbacks/stochastic_weight_avg.py: resuming alone reads them."""
    trained, averages = filled(Lit, 1), filled(Lit, 2)
    held = lightning(trained.state_dict(), trained)
    kept = {"n_averaged": 3, "latest_update_epoch": 2, "average_model_state": averages.state_dict()}
    held["callbacks"]["StochasticWeightAveraging"] = kept
    back = saved(held, tmp_path / "a.ckpt")
    check(tmp_path / "a.ckpt", Lit, back["state_dict"], "state_dict")
    path = "callbacks.StochasticWeightAveraging.average_model_state"
    assert f"weights={path!r}" in refusal(tmp_path / "a.ckpt", Lit, ema=True)
    theirs = back["callbacks"]["StochasticWeightAveraging"]["average_model_state"]
    check(tmp_path / "a.ckpt", Lit, theirs, path, weights=path)


# --- Ultralytics: `BaseTrainer.save_model`, engine/trainer.py; `load_checkpoint`, nn/tasks.py ---


class Conv(nn.Module):
    def __init__(self, wide: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(wide, out, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(out)
        self.act = nn.SiLU()


class Detect(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cv2 = nn.ModuleList(nn.Sequential(Conv(8, 8), nn.Conv2d(8, 16, 1)) for _ in range(2))
        self.register_buffer("anchors", torch.zeros(2, 3), persistent=False)
        self.stride = torch.tensor([8.0, 16.0])


class DetectionModel(nn.Module):
    """The names of theirs: everything in a `Sequential` called `model`."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(Conv(3, 8), Conv(8, 8), Detect())


def detector(package: types.ModuleType, seed: int) -> nn.Module:
    """A model of classes that nobody can import later, with what theirs carry about."""
    for kind in (Conv, Detect, DetectionModel):
        stranger(package, kind.__name__, kind)
    model = filled(DetectionModel, seed)
    for module in model.modules():
        if type(module).__name__ in vars(package):
            module.__class__ = getattr(package, type(module).__name__)
    args = stranger(package, "IterableSimpleNamespace", types.SimpleNamespace)(imgsz=640, data="coco.yaml")
    model.stride, model.names, model.args = torch.tensor([8.0, 16.0]), {0: "person", 1: "bus"}, args
    model.yaml, model.task, model.pt_path, model.criterion = {"nc": 2}, "detect", "a.pt", None
    for parameter in model.parameters():
        parameter.requires_grad = False
    return model.half()


def ultralytics(model: nn.Module | None, ema: nn.Module | None, stripped: bool = False) -> dict[str, Any]:
    """A checkpoint, or what `strip_optimizer` (utils/torch_utils.py) leaves of it: the model alone."""
    training = {
        "best_fitness": 0.5,
        "updates": 64,
        "optimizer": {} if stripped else adam(next(m for m in (ema, model) if m is not None)),
        "scaler": {"scale": 65536.0, "_growth_tracker": 3},
        "stopper": {"best_fitness": 0.5, "best_epoch": 4},
    }
    return {
        "date": "2026-01-01T00:00:00",
        "version": "8.4.0",
        "epoch": -1 if stripped else 4,
        "model": model,
        "ema": ema,
        "modelopt": None,
        **(dict.fromkeys(training) if stripped else training),
        "train_args": {"task": "detect", "imgsz": 640},
        "train_metrics": {"metrics/mAP50(B)": np.float64(0.5), "fitness": 0.5},
        "train_results": {"epoch": [1, 2]},
        "git": {"root": "/", "branch": "main"},
    }


ULTRALYTICS = {
    "of today": (False, True, False, "ema"),
    "with both": (True, True, False, "ema"),
    "stripped": (True, False, True, "model"),
}


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("kind", ULTRALYTICS)
def test_ultralytics_modules_load_without_their_classes(kind: str, dtype: str, tmp_path: Path, strangers: Any) -> None:
    model, ema, stripped, opened = ULTRALYTICS[kind]
    held = ultralytics(detector(strangers, 1) if model else None, detector(strangers, 2) if ema else None, stripped)
    back = saved(held, tmp_path / "best.pt")
    chosen = back.get("ema") or back["model"]
    theirs = chosen.float().state_dict()
    result = check(tmp_path / "best.pt", DetectionModel, theirs, opened, dtype=dtype)
    floating = {value.dtype for value in result.model.state_dict().values() if value.is_floating_point()}
    assert floating == {torch.float16 if dtype == "auto" else torch.float32}
    assert torch.equal(result.model.model[2].anchors, torch.zeros(2, 3))


def test_ultralytics_models_load_into_their_layers_alone(tmp_path: Path, strangers: Any) -> None:
    back = saved(ultralytics(None, detector(strangers, 2)), tmp_path / "last.pt")
    theirs = back["ema"].model.float().state_dict()
    check(tmp_path / "last.pt", lambda: DetectionModel().model, theirs, "ema", dtype="float32")


def test_ultralytics_trained_weights_are_there_for_who_wants_them(tmp_path: Path, strangers: Any) -> None:
    back = saved(ultralytics(detector(strangers, 1), detector(strangers, 2)), tmp_path / "last.pt")
    check(tmp_path / "last.pt", DetectionModel, back["model"].state_dict(), "model", ema=False)


# --- fairseq: `Trainer.state_dict`, trainer.py; `load_model_ensemble_and_task`, checkpoint_utils.py ---


class Translator(nn.Module):
    """The names of a fairseq transformer, with the tied output that it writes twice and its buffer `version`."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict(
            {"embed_tokens": nn.Embedding(9, 4), "layers": nn.ModuleList(nn.Linear(4, 4) for _ in range(2))}
        )
        self.decoder = nn.ModuleDict({"embed_tokens": nn.Embedding(9, 4), "output_projection": nn.Linear(4, 9, False)})
        self.encoder.register_buffer("version", torch.Tensor([3]))
        self.decoder["output_projection"].weight = self.decoder["embed_tokens"].weight


def fairseq(model: nn.Module, package: types.ModuleType, old: bool = False, **extra: Any) -> dict[str, Any]:
    choice = stranger(package, "Choice", str)("ddp")
    config = stranger(package, "DictConfig", dict)(model=argparse.Namespace(arch="transformer"))
    config.flags = {"resolver": choice}
    history = {"criterion_name": "CE", "optimizer_name": "FairseqAdam", "lr_scheduler_state": {"best": 2.5}}
    return {
        "args": argparse.Namespace(arch="transformer", task="translation", backend=choice) if old else None,
        "cfg": None if old else config,
        "model": model.state_dict(),
        "criterion": {"weight": torch.ones(9, 4)} if old else None,
        "optimizer_history": [{**history, "num_updates": 7}],
        "task_state": {"table": torch.ones(3)},
        "extra_state": {
            "metrics": [(0, "loss", "loss", {"val": torch.tensor(2.5), "round": 3})],
            "previous_training_time": 9.5,
            "train_iterator": {"epoch": 1, "iterations_in_epoch": 0, "shuffle": True},
            "val_loss": 2.5,
            **extra,
        },
        "last_optimizer_state": {**adam(model), "loss_scale": 128.0},
    }


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_fairseq_files_load(old: bool, half: bool, tmp_path: Path, strangers: Any) -> None:
    """Of today with `cfg` and of before hydra with `args`; `--fp16` keeps its model in half."""
    model = filled(Translator, 1)
    back = saved(fairseq(model.half() if half else model, strangers, old), tmp_path / "checkpoint_best.pt")
    check(tmp_path / "checkpoint_best.pt", Translator, back["model"], "model")


def test_fairseq_averages_are_loaded_by_their_path(tmp_path: Path, strangers: Any) -> None:
    """`load_ema_from_checkpoint` takes them, and nothing else does."""
    model, averages = filled(Translator, 1), filled(Translator, 2)
    kept = {"ema": averages.state_dict(), "ema_fp32_params": averages.state_dict()}
    back = saved(fairseq(model, strangers, **kept), tmp_path / "a.pt")
    check(tmp_path / "a.pt", Translator, back["model"], "model")
    assert "weights='extra_state.ema'" in refusal(tmp_path / "a.pt", Translator, ema=True)
    theirs = back["extra_state"]["ema"]
    check(tmp_path / "a.pt", Translator, theirs, "extra_state.ema", weights="extra_state.ema")


# --- DeepSpeed: `DeepSpeedEngine._common_checkpoint_state`, runtime/engine.py; utils/zero_to_fp32.py ---


def deepspeed(model: nn.Module, module: State | None, zero: bool, package: types.ModuleType) -> dict[str, Any]:
    """`zero`: the optimizer's part is in files of its own, and shapes are kept; frozen weights are kept twice."""
    frozen = OrderedDict((name, p) for name, p in model.named_parameters() if not p.requires_grad)
    shapes = OrderedDict((name, p.shape) for name, p in model.named_parameters() if p.requires_grad)
    rate = stranger(package, "LossScaleConfig")()
    return {
        "module": module,
        "buffer_names": [name for name, _ in model.named_buffers()],
        "optimizer": None if zero else {**adam(model), "fp32_groups": [p.detach().float() for p in model.parameters()]},
        "param_shapes": [shapes] if zero else None,
        "frozen_param_shapes": OrderedDict((name, p.shape) for name, p in frozen.items()) if zero else None,
        "shared_params": {} if zero else None,
        "frozen_param_fragments": OrderedDict((n, p.detach().clone()) for n, p in frozen.items()) if zero else None,
        "lr_scheduler": {"last_batch_iteration": 7},
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": 0,
        "global_steps": 8,
        "global_samples": 64,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {"train_batch_size": 8, "fp16": rate},
        "ds_version": "0.19.8",
        "epoch": 3,
    }


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("frozen", [0, 2, 6])
@pytest.mark.parametrize("zero", [False, True])
def test_deepspeed_files_load(zero: bool, frozen: int, prefix: str, tmp_path: Path, strangers: Any) -> None:
    model = filled(Net, 1).half()
    for parameter in list(model.parameters())[:frozen]:
        parameter.requires_grad = False
    held = deepspeed(model, under(prefix, model.state_dict()), zero, strangers)
    back = saved(held, tmp_path / "global_step8" / "mp_rank_00_model_states.pt")
    theirs = {key.removeprefix(prefix): value for key, value in back["module"].items()}
    (tmp_path / "global_step8" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"never opened")
    for source in (tmp_path / "global_step8", tmp_path / "global_step8" / "mp_rank_00_model_states.pt"):
        check(source, Net, theirs, "module")


def emptied(model: nn.Module) -> dict[str, torch.Tensor]:
    """ZeRO-3 leaves buffers and, for each parameter, a tensor without elements."""
    names = {name for name, _ in model.named_parameters()}
    return {k: torch.empty(0, dtype=v.dtype) if k in names else v for k, v in model.state_dict().items()}


@pytest.mark.parametrize("frozen", [0, 2])
@pytest.mark.parametrize("build", [Net, lambda: nn.Linear(4, 6)])
def test_places_of_divided_weights_are_refused_with_what_would_help(
    build: Build, frozen: int, tmp_path: Path, strangers: Any
) -> None:
    model = filled(build, 1).half()
    for parameter in list(model.parameters())[:frozen]:
        parameter.requires_grad = False
    file = tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    saved(deepspeed(model, emptied(model), True, strangers), file)
    assert refusal(file, build).count("tensors are empty") == 2
    assert "make one file of the whole checkpoint with the zero_to_fp32.py" in refusal(file)
    with pytest.raises(UnsupportedError, match=r"zero_to_fp32\.py"):
        lowmem.load(tmp_path, model=build)
    # Who names it is told, and gets no model without weights.
    assert any("zero_to_fp32.py" in warning for warning in lowmem.inspect(file, weights="module").warnings)
    with pytest.raises(KeysError):
        lowmem.load(file, model=build, weights="module")


def test_a_model_saved_while_divided_is_refused(tmp_path: Path) -> None:
    """`save_pretrained` of a model whose weights were not gathered."""
    saved(emptied(filled(Net, 1)), tmp_path / "pytorch_model.bin")
    assert "zero_to_fp32.py" in refusal(tmp_path / "pytorch_model.bin", Net)


def test_empty_tensors_of_the_model_are_its_own(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.ParameterDict({"full": torch.zeros(3), "none": torch.zeros(0), "neither": torch.zeros(0)})

    saved({"full": torch.ones(3), "none": torch.zeros(0), "neither": torch.zeros(0)}, tmp_path / "a.pt")
    assert torch.equal(lowmem.load(tmp_path / "a.pt", model=build).model["full"], torch.ones(3))


@pytest.mark.parametrize("frozen", [0, 2])
def test_a_pipelines_file_without_weights_says_where_they_are(frozen: int, tmp_path: Path, strangers: Any) -> None:
    """`PipelineEngine.module_state_dict` gives None, and writes each layer."""
    model = filled(Net, 1)
    for parameter in list(model.parameters())[:frozen]:
        parameter.requires_grad = False
    saved(deepspeed(model, None, True, strangers), tmp_path / "mp_rank_00_model_states.pt")
    said = refusal(tmp_path / "mp_rank_00_model_states.pt", Net)
    assert said.count("'module' holds nothing") == 2
    saved(model.head.state_dict(), tmp_path / "layer_03-model_states.pt")
    with pytest.raises(UnsupportedError, match=r"a file for each layer \(layer_03-model_states\.pt\)"):
        lowmem.load(tmp_path, model=Net)
    theirs = dict(model.head.state_dict())
    check(tmp_path / "layer_03-model_states.pt", lambda: nn.Linear(6, 3), theirs, "")


def test_what_zero_to_fp32_writes_loads(tmp_path: Path) -> None:
    """Bare: buffers, then frozen weights, then the others, with shared ones as one tensor."""
    model = filled(Translator, 1)
    state = dict(model.named_buffers())
    state.update((name, p.detach()) for name, p in model.named_parameters())
    state["decoder.output_projection.weight"] = state["decoder.embed_tokens.weight"]
    back = saved(state, tmp_path / "pytorch_model.bin")
    check(tmp_path, Translator, back, "")


# --- Megatron: `generate_state_dict`, training/checkpointing.py of Megatron-LM ---


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(4)
        self.self_attention = nn.ModuleDict({"query_key_value": nn.Linear(4, 12), "dense": nn.Linear(4, 4)})
        self.mlp = nn.ModuleDict({"dense_h_to_4h": nn.Linear(4, 16), "dense_4h_to_h": nn.Linear(16, 4)})


class Stack(nn.Module):
    def __init__(self, layers: int = 2, last: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        if last:
            self.final_layernorm = nn.LayerNorm(4)


class Legacy(nn.Module):
    """`TransformerLanguageModel` inside a `GPTModel`, before Megatron Core."""

    def __init__(self) -> None:
        super().__init__()
        embedding = {"word_embeddings": nn.Embedding(9, 4), "position_embeddings": nn.Embedding(5, 4)}
        self.language_model = nn.ModuleDict({"embedding": nn.ModuleDict(embedding), "encoder": Stack()})


class Core(nn.Module):
    """A `GPTModel` of Megatron Core, or a stage of it."""

    def __init__(self, layers: int = 2, first: bool = True, last: bool = True) -> None:
        super().__init__()
        if first:
            self.embedding = nn.ModuleDict({"word_embeddings": nn.Embedding(9, 4)})
        self.decoder = Stack(layers, last=last)
        if last:
            self.output_layer = nn.Linear(4, 9, bias=False)


def nested(model: Legacy) -> dict[str, Any]:
    """`state_dict_for_save_checkpoint`: a mapping for each part, down to the layers, whose keys are joined."""
    parts = model.language_model
    embedding = {name: part.state_dict() for name, part in parts["embedding"].items()}
    return {"language_model": {"embedding": embedding, "encoder": parts["encoder"].state_dict()}}


def megatron(models: Mapping[str, Any], like: nn.Module, package: types.ModuleType) -> dict[str, Any]:
    kind = stranger(package, "AttnBackend", int)
    rng = {
        "random_rng_state": random.Random(1).getstate(),
        "np_rng_state": np.random.RandomState(1).get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.zeros(16, dtype=torch.uint8),
        "rng_tracker_states": {"model-parallel-rng": torch.zeros(16, dtype=torch.uint8)},
    }
    return {
        "args": argparse.Namespace(num_layers=2, attention_backend=kind(5), params_dtype=torch.bfloat16),
        "checkpoint_version": 3.0,
        "iteration": 10,
        **models,
        "optimizer": {
            "optimizer": adam(like),
            "grad_scaler": {"scale": torch.ones(1), "growth_tracker": 0},
            "fp32_from_fp16_params": [[p.detach().float() for p in like.parameters()]],
        },
        "opt_param_scheduler": {"max_lr": 0.1, "num_steps": 80},
        "rerun_state_machine": {"mode": "disabled", "sharded": {}},
        "rng_state": [rng],
        "num_floating_point_operations_so_far": 1e9,
    }


def test_megatron_legacy_files_load(tmp_path: Path, strangers: Any) -> None:
    model = filled(Legacy, 1).bfloat16()
    file = tmp_path / "iter_0000010" / "mp_rank_00" / "model_optim_rng.pt"
    back = saved(megatron({"model": nested(model)}, model, strangers), file)
    # As `load_state_dict` of each part takes it.
    theirs: dict[str, torch.Tensor] = {}
    for name, part in back["model"]["language_model"]["embedding"].items():
        theirs.update(under(f"language_model.embedding.{name}.", part))
    theirs.update(under("language_model.encoder.", back["model"]["language_model"]["encoder"]))
    for source in (file, file.parent):
        check(source, Legacy, theirs, "model", inner="model.language_model")
    inner = back["model"]["language_model"]["encoder"]
    result = lowmem.load(file, model=Stack)
    assert all(same(value, inner[key]) for key, value in result.model.state_dict().items())


def fp8_state(kind: str) -> Any:
    """What Transformer Engine adds for each of its layers (`TELinear`, extensions/transformer_engine.py)."""
    if kind == "bytes":
        stream = io.BytesIO()
        torch.save({"recipe": None, "scale_fwd": torch.ones(3)}, stream)
        return stream
    if kind == "tensor":
        return torch.frombuffer(bytearray(pickle.dumps({"recipe": None})), dtype=torch.uint8)
    return torch.empty(0, dtype=torch.uint8) if kind == "empty tensor" else None


@pytest.mark.parametrize("kind", ["bytes", "None", "tensor", "empty tensor"])
def test_megatron_core_files_load_with_their_extra_states(kind: str, tmp_path: Path, strangers: Any) -> None:
    model = filled(Core, 1).bfloat16()
    states = [f"{name}._extra_state" for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.LayerNorm))]
    flat = OrderedDict(model.state_dict())
    flat.update((name, fp8_state(kind)) for name in states)
    file = tmp_path / "iter_0000010" / "mp_rank_00" / "model_optim_rng.pt"
    back = saved(megatron({"model": flat}, model, strangers), file)
    theirs = {key: value for key, value in back["model"].items() if not key.endswith("_extra_state")}
    check(file, Core, theirs, "model", extra=len(states) if "tensor" in kind else 0)


@pytest.mark.parametrize("build", [Core, lambda: Core(4), lambda: Core(2, last=False)])
def test_stages_of_a_virtual_pipeline_are_not_taken_for_the_model(build: Build, tmp_path: Path, strangers: Any) -> None:
    """Each counts its layers from zero: the first, or all together, look like a smaller model."""
    first, last = filled(lambda: Core(2, last=False), 1), filled(lambda: Core(2, first=False), 2)
    stages = {"model0": first.state_dict(), "model1": last.state_dict()}
    file = tmp_path / "model_optim_rng.pt"
    back = saved(megatron(stages, first, strangers), file)
    said = refusal(file)
    assert "the stages of a virtual pipeline" in said
    assert "weights='model0', weights='model1'" in said
    if set(build().state_dict()) == set(stages["model0"]):
        # Just this stage is what the model is.
        assert lowmem.load(file, model=build).report.opened == "model0"
    else:
        assert "the stages of a virtual pipeline" in refusal(file, build)
    result = lowmem.load(file, model=lambda: Core(2, last=False), weights="model0")
    assert all(same(value, back["model0"][key]) for key, value in result.model.state_dict().items())


def test_stages_are_put_together_by_rename(tmp_path: Path, strangers: Any) -> None:
    whole = filled(lambda: Core(4), 1)
    state = whole.state_dict()
    later = {f"decoder.layers.{n}": f"decoder.layers.{n - 2}" for n in (2, 3)}
    stages: dict[str, dict[str, torch.Tensor]] = {"model0": {}, "model1": {}}
    for key, value in state.items():
        old = next((front for front in later if key.startswith(f"{front}.")), None)
        first = old is None and key.startswith(("embedding.", "decoder.layers."))
        stages["model0" if first else "model1"][key.replace(old, later[old]) if old else key] = value
    saved(megatron(stages, whole, strangers), tmp_path / "model_optim_rng.pt")
    rename = {rf"^model1\.{re.escape(new)}\b": old for old, new in later.items()} | {r"^model[01]\.": ""}
    result = lowmem.load(tmp_path / "model_optim_rng.pt", model=lambda: Core(4), rename=rename)
    assert all(same(value, state[key]) for key, value in result.model.state_dict().items())
    assert not result.report.initialised


def test_models_in_one_file_under_numbers_may_be_parts_of_a_model(tmp_path: Path) -> None:
    """Not every `model0` and `model1` is Megatron's."""
    pair = {"model0": filled(Net, 1).state_dict(), "model1": filled(Net, 2).state_dict()}
    back = saved(pair, tmp_path / "a.pt")
    both = nn.ModuleDict({"model0": Net(), "model1": Net()})
    state = lowmem.load(tmp_path / "a.pt", model=lambda: copy.deepcopy(both)).model.state_dict()
    assert all(same(state[f"{name}.{key}"], v) for name, held in back.items() for key, v in held.items())
    assert refusal(tmp_path / "a.pt", Net).count("several models, or parts of one") == 2
    others = {"model0": filled(Net, 1).state_dict(), "model1": {"w": torch.ones(3)}}
    saved(others, tmp_path / "b.pt")
    # Nothing of the second is in the first: no stages, and the one that fits more is taken as ever.
    assert lowmem.load(tmp_path / "b.pt", model=Lit, strict=False).report.opened == "model0"


@pytest.mark.parametrize("second", ["mp_rank_01", "mp_rank_00_001", "mp_rank_00_000_001"])
def test_folders_of_several_megatron_ranks_are_refused(second: str, tmp_path: Path, strangers: Any) -> None:
    model = filled(Core, 1)
    held = megatron({"model": model.state_dict()}, model, strangers)
    step = tmp_path / "iter_0000010"
    saved(held, step / "mp_rank_00" / "model_optim_rng.pt")
    (step / second).mkdir()
    (step / second / "model_optim_rng.pt").write_bytes(b"never opened")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    with pytest.raises(UnsupportedError, match=rf"divided among processes \(mp_rank_00, {second}\).*convert\.py"):
        lowmem.load(step, model=Core)
    with pytest.raises(SourceError, match=r"where an iteration has one; where it has several.*convert\.py"):
        lowmem.load(tmp_path, model=Core)
    assert lowmem.load(step / "mp_rank_00", model=Core).report.opened == "model"
