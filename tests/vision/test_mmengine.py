"""Files of mmengine as its own loader and lowmem take them, and official files in the layouts of others."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mmengine", reason="mmengine is not installed")

import torch
from layouts import ATTO, TINY, Sizes, convnext, state_of
from mmengine.model import BaseModel, BaseModule
from mmengine.runner import Runner, load_checkpoint, save_checkpoint
from mmengine.runner.checkpoint import _load_checkpoint_with_prefix
from torch import nn

import lowmem

State = dict[str, torch.Tensor]


class Backbone(BaseModule):
    def __init__(self, init_cfg: dict[str, Any] | None = None) -> None:
        super().__init__(init_cfg)
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.layers = nn.ModuleList([nn.Linear(4, 5), nn.Linear(5, 6)])


class Detector(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.head = nn.Linear(6, 2)

    def forward(self, inputs: torch.Tensor, mode: str = "tensor") -> dict[str, torch.Tensor]:
        values = self.backbone.norm(self.backbone.conv(inputs)).mean((2, 3))
        for layer in self.backbone.layers:
            values = layer(values)
        return {"loss": self.head(values).pow(2).mean()}


class Images(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"inputs": torch.full((3, 5, 5), float(index))}


@pytest.fixture(autouse=True)
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """mmengine's loader does not say `weights_only=False`, which its own files need since torch 2.6."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What mmengine's runner writes after an epoch with averaged weights."""
    folder = tmp_path_factory.mktemp("run")
    runner = Runner(
        model=Detector(),
        work_dir=str(folder),
        train_dataloader=torch.utils.data.DataLoader(Images(), batch_size=2),
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1, "momentum": 0.9}},
        train_cfg={"by_epoch": True, "max_epochs": 1},
        custom_hooks=[{"type": "EMAHook", "momentum": 0.3}],
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 1}},
        experiment_name="lowmem",
        log_level="ERROR",
    )
    runner.train()
    return folder / "epoch_1.pth"


def assert_equal(found: nn.Module, expected: nn.Module) -> None:
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
        assert found.state_dict()[name].dtype == value.dtype


def test_a_prefix_is_that_of_init_cfg(trained: Path) -> None:
    """`init_cfg=dict(type="Pretrained", checkpoint=…, prefix="backbone")`."""
    theirs = Backbone({"type": "Pretrained", "checkpoint": str(trained), "prefix": "backbone"})
    theirs.init_weights()
    ours = lowmem.load(trained, model=Backbone(), prefix="backbone")
    assert_equal(ours.model, theirs)
    assert ours.report.opened == "state_dict"
    assert not torch.equal(
        theirs.head.weight if hasattr(theirs, "head") else theirs.conv.weight, Backbone().conv.weight
    )
    direct = Backbone()
    direct.load_state_dict(_load_checkpoint_with_prefix("backbone", str(trained)))
    assert_equal(ours.model, direct)


def test_the_weights_beside_the_averages_have_the_wrappers_prefix(trained: Path) -> None:
    inside = torch.load(trained, weights_only=False)
    assert {"meta", "state_dict", "message_hub", "optimizer", "ema_state_dict"} <= set(inside)
    trained_ones = {key: value for key, value in inside["ema_state_dict"].items() if ".backbone." in key}
    result = lowmem.load(trained, model=Backbone(), prefix="module.backbone", ema=False)
    for name, value in result.model.state_dict().items():
        assert torch.equal(value, trained_ones[f"module.backbone.{name}"]), name
    assert not torch.equal(result.model.conv.weight, inside["state_dict"]["backbone.conv.weight"])


def test_a_whole_model_is_loaded_as_mmengine_loads_it(trained: Path) -> None:
    theirs = Detector()
    load_checkpoint(theirs, str(trained), strict=True)
    assert_equal(lowmem.load(trained, model=Detector()).model, theirs)


def test_renames_are_its_revised_keys(tmp_path: Path) -> None:
    torch.manual_seed(3)
    file = str(tmp_path / "wrapped.pth")
    wrapped = {f"module.{key}": value for key, value in Detector().state_dict().items()}
    save_checkpoint({"meta": {"epoch": 3}, "state_dict": wrapped, "optimizer": {"state": {}}}, file)
    theirs, ours = Detector(), Detector()
    load_checkpoint(theirs, file)
    assert_equal(lowmem.load(file, model=ours, rename={r"^module\.": ""}).model, theirs)
    rules = [(r"^module\.backbone\.", ""), (r"^module\.", "")]
    backbone = Backbone()
    load_checkpoint(backbone, file, revise_keys=rules)
    assert_equal(lowmem.load(file, model=Backbone(), rename=rules).model, backbone)


class GRN(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(width))
        self.beta = nn.Parameter(torch.zeros(width))


class Block(BaseModule):
    def __init__(self, width: int, use_grn: bool) -> None:
        super().__init__()
        self.depthwise_conv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.pointwise_conv1 = nn.Linear(width, 4 * width)
        self.pointwise_conv2 = nn.Linear(4 * width, width)
        if use_grn:
            self.grn = GRN(4 * width)
        else:
            self.gamma = nn.Parameter(torch.ones(width))


class ConvNeXt(BaseModule):
    """The parameters of mmpretrain's backbone (mmpretrain/models/backbones/convnext.py)."""

    def __init__(self, sizes: Sizes, use_grn: bool, init_cfg: dict[str, Any] | None = None) -> None:
        super().__init__(init_cfg)
        widths = sizes.widths
        self.downsample_layers = nn.ModuleList([nn.Sequential(nn.Conv2d(3, widths[0], 4, 4), nn.LayerNorm(widths[0]))])
        for before, width in pairwise(widths):
            self.downsample_layers.append(nn.Sequential(nn.LayerNorm(before), nn.Conv2d(before, width, 2, 2)))
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(width, use_grn) for _ in range(depth)))
            for depth, width in zip(sizes.depths, widths, strict=True)
        )
        self.norm3 = nn.LayerNorm(widths[-1])


def as_mmpretrain(state: State) -> State:
    """`convert_convnext` of mmpretrain's tools/model_converters/convnext_to_mmpretrain.py, with GRN's shape."""
    found = {}
    for key, value in state.items():
        if key.startswith("head"):
            found[key.replace("head.", "head.fc.")] = value
            continue
        if key.startswith("stages"):
            name = key.replace("dwconv", "depthwise_conv").replace("pwconv", "pointwise_conv")
        else:
            name = key.replace("norm", "norm3") if key.startswith("norm") else key
        found[f"backbone.{name}"] = value.flatten() if ".grn." in key else value
    return found


@pytest.mark.parametrize("version", ["convnext", "convnextv2"])
def test_an_official_file_is_mmpretrains_backbone_by_the_preset(version: str, tmp_path: Path) -> None:
    grn = version == "convnextv2"
    state = state_of(convnext(grn, TINY))
    torch.save({"model": state}, tmp_path / "official.pt")
    # As one does today: convert the file, and let init_cfg take its backbone.
    save_checkpoint({"state_dict": as_mmpretrain(state)}, str(tmp_path / "converted.pth"))
    pretrained = {"type": "Pretrained", "checkpoint": str(tmp_path / "converted.pth"), "prefix": "backbone"}
    theirs = ConvNeXt(TINY, grn, pretrained)
    theirs.init_weights()
    result = lowmem.load(tmp_path / "official.pt", model=ConvNeXt(TINY, grn), preset=f"{version}->mmpretrain")
    assert_equal(result.model, theirs)
    assert torch.equal(theirs.norm3.weight, state["norm.weight"])
    assert (result.plan.host.resident, result.plan.host.computing) == (0, 0)


@pytest.mark.parametrize("conv_mlp", [False, True])
def test_an_official_file_is_timms_model_by_the_preset(conv_mlp: bool, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    from timm.models import load_checkpoint as load_by_timm
    from timm.models.convnext import checkpoint_filter_fn

    file = tmp_path / "official.pt"
    torch.save({"model": state_of(convnext(True, ATTO))}, file)
    theirs = timm.create_model("convnextv2_atto", num_classes=9, conv_mlp=conv_mlp)
    load_by_timm(theirs, str(file), filter_fn=checkpoint_filter_fn)
    ours = timm.create_model("convnextv2_atto", num_classes=9, conv_mlp=conv_mlp)
    result = lowmem.load(file, model=ours, preset="convnextv2->timm")
    assert_equal(result.model, theirs)
    assert result.plan.host.resident == 0
    images = torch.ones(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(result.model.eval()(images), theirs.eval()(images))


def test_a_position_embedding_is_timms_at_another_size(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    from timm.models.vision_transformer import checkpoint_filter_fn

    small = {"num_classes": 3, "embed_dim": 24, "depth": 1, "num_heads": 2}
    torch.manual_seed(5)
    state = timm.create_model("vit_tiny_patch16_224", **small).state_dict()
    torch.save(state, tmp_path / "224.pth")
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=384, **small)
    theirs.load_state_dict(checkpoint_filter_fn(dict(state), theirs))
    ours = timm.create_model("vit_tiny_patch16_224", img_size=384, **small)
    result = lowmem.load(tmp_path / "224.pth", model=ours, transforms={"pos_embed": lowmem.interpolate()})
    assert_equal(result.model, theirs)
