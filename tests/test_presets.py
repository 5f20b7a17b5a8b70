"""Presets: what becomes of a generated file in the old layout. The names and shapes are those of the code they name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from layouts import (
    Shapes,
    State,
    clip,
    clip_of_mmpretrain,
    convnext,
    convnext_of_mmpretrain,
    convnext_of_timm,
    model_of,
    official_swin,
    state_of,
    swin,
    vit,
    vit_of_mmpretrain,
)
from safetensors.torch import save_file

import lowmem
from lowmem.cli import main
from lowmem.errors import KeysError, OptionError
from lowmem.mapping.presets import PRESETS, Preset

pytestmark = pytest.mark.usefixtures("one_thread")

# The old layout and the new one.
LAYOUTS: dict[str, tuple[Shapes, Shapes]] = {
    "convnext->timm": (convnext(False), convnext_of_timm(False)),
    "convnext->mmpretrain": (convnext(False), convnext_of_mmpretrain(False)),
    "convnextv2->timm": (convnext(True), convnext_of_timm(True)),
    "convnextv2->mmpretrain": (convnext(True), convnext_of_mmpretrain(True)),
    "timm-vit->mmpretrain": (vit(), vit_of_mmpretrain()),
    "openai-clip->mmpretrain": (clip(), clip_of_mmpretrain()),
    "swin->timm": (official_swin(), swin((1, 2, 3), "head.fc")),
}


def test_every_preset_has_a_layout_here_and_names_its_source() -> None:
    assert set(LAYOUTS) == set(PRESETS)
    for name, preset in PRESETS.items():
        assert preset.name == name
        assert preset.source


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_file_in_the_old_layout_loads_into_the_new_one(name: str, tmp_path: Path) -> None:
    old, new = LAYOUTS[name]
    state = state_of(old)
    torch.save({"model": state, "epoch": 3}, tmp_path / "official.pth")
    made = PRESETS[name].apply(state, new)
    assert {key: tuple(value.shape) for key, value in made.items()} == new
    result = lowmem.load(tmp_path / "official.pth", model=model_of(new), preset=name)
    loaded = result.model.state_dict()
    wanted = {key for key in old if not key.endswith(("relative_position_index", "attn_mask"))}
    values = sorted((state[key].flatten().tolist() for key in wanted), key=lambda v: (len(v), v))
    assert sorted((v.flatten().tolist() for v in loaded.values()), key=lambda v: (len(v), v)) == values
    for key, value in made.items():
        assert torch.equal(loaded[key], value), key
    # Names and shapes only: everything is the file's own pages.
    assert result.plan.host.resident == 0
    assert result.plan.host.computing == 0


@pytest.mark.parametrize("to", ["timm", "mmpretrain"])
def test_global_response_normalisation_and_layers_keep_their_values(to: str) -> None:
    state = state_of(convnext(True))
    made = PRESETS[f"convnextv2->{to}"].apply(state, {})
    grn = {"timm": "stages.1.blocks.1.mlp.grn.{}", "mmpretrain": "backbone.stages.1.1.grn.{}"}[to]
    names = {"timm": ("weight", "bias"), "mmpretrain": ("gamma", "beta")}[to]
    for new, old in zip(names, ("gamma", "beta"), strict=True):
        assert torch.equal(made[grn.format(new)], state[f"stages.1.1.grn.{old}"].flatten())
    pairs = {
        "timm": {
            "stem.0.weight": "downsample_layers.0.0.weight",
            "stages.2.downsample.1.bias": "downsample_layers.2.1.bias",
            "stages.1.blocks.1.conv_dw.weight": "stages.1.1.dwconv.weight",
            "head.norm.bias": "norm.bias",
            "stages.3.blocks.0.mlp.fc2.weight": "stages.3.0.pwconv2.weight",
            "head.fc.weight": "head.weight",
        },
        "mmpretrain": {
            "backbone.downsample_layers.2.1.bias": "downsample_layers.2.1.bias",
            "head.fc.bias": "head.bias",
            "backbone.stages.1.1.depthwise_conv.weight": "stages.1.1.dwconv.weight",
            "backbone.stages.3.0.pointwise_conv2.weight": "stages.3.0.pwconv2.weight",
            "backbone.norm3.weight": "norm.weight",
            "backbone.stages.1.1.norm.bias": "stages.1.1.norm.bias",
        },
    }[to]
    for new, old in pairs.items():
        assert torch.equal(made[new], state[old])


def sparse(state: State) -> State:
    """The encoder and decoder of FCMAE, as MinkowskiEngine's layers hold them (models/convnextv2_sparse.py)."""
    found: State = {"mask_token": torch.ones(1, 2, 1, 1), "proj.weight": torch.ones(2, 7, 1, 1)}
    found |= {"decoder.0.dwconv.weight": torch.ones(2, 1, 7, 7), "pred.bias": torch.ones(4)}
    for name, value in state.items():
        module, _, kind = name.rpartition(".")
        if name.startswith(("norm.", "head.")):
            continue
        if name.startswith("downsample_layers.0."):
            found[f"encoder.{name}"] = value
        elif ".grn." in name:
            found[f"encoder.{name}"] = value.reshape(1, -1)
        elif value.ndim == 4:
            # Points down the columns, then inputs, then outputs; a kernel for each channel has no inputs.
            points = value.transpose(3, 2).flatten(2).permute(2, 1, 0)
            found[f"encoder.{module}.kernel"] = (points[:, 0] if "dwconv" in name else points).contiguous()
        elif "pwconv" in name:
            found[f"encoder.{module}.linear.{kind}"] = value
        elif "norm" in name or re.match(r"downsample_layers\.\d\.0\.", name):
            found[f"encoder.{module}.ln.{kind}"] = value
        else:
            found[f"encoder.{name}"] = value.reshape(1, -1)
    return found


@pytest.mark.parametrize("to", ["timm", "mmpretrain"])
def test_the_sparse_encoder_of_a_pretrained_file_becomes_the_dense_one(to: str, tmp_path: Path) -> None:
    state = state_of(convnext(True))
    name = f"convnextv2->{to}"
    shapes = {key: shape for key, shape in LAYOUTS[name][1].items() if "head" not in key and "norm3" not in key}
    torch.save({"model": sparse(state)}, tmp_path / "fcmae.pt")
    result = lowmem.load(tmp_path / "fcmae.pt", model=model_of(shapes), preset=name)
    expected = PRESETS[name].apply(state, shapes)
    for key, value in result.model.state_dict().items():
        assert torch.equal(value, expected[key]), key
    assert result.plan.host.computing == 0


def test_a_bare_backbone_takes_what_the_preset_gives_to_a_whole_model(tmp_path: Path) -> None:
    state = state_of(convnext(True))
    save_file(state, tmp_path / "official.safetensors")
    shapes = {
        key.removeprefix("backbone."): shape
        for key, shape in convnext_of_mmpretrain(True).items()
        if key.startswith("backbone.")
    }
    result = lowmem.load(tmp_path / "official.safetensors", model=model_of(shapes), preset="convnextv2->mmpretrain")
    expected = PRESETS["convnextv2->mmpretrain"].apply(state, {})
    for key, value in result.model.state_dict().items():
        assert torch.equal(value, expected[f"backbone.{key}"]), key


@pytest.mark.parametrize("to", ["timm", "mmpretrain"])
def test_pointwise_layers_may_be_convolutions(to: str, tmp_path: Path) -> None:
    state = state_of(convnext(True))
    save_file(state, tmp_path / "official.safetensors")
    name = f"convnextv2->{to}"
    shapes = {
        key: (*shape, 1, 1) if re.search(r"(mlp\.fc|pointwise_conv)\d\.weight$", key) else shape
        for key, shape in LAYOUTS[name][1].items()
    }
    result = lowmem.load(tmp_path / "official.safetensors", model=model_of(shapes), preset=name)
    expected = PRESETS[name].apply(state, {})
    for key, value in result.model.state_dict().items():
        assert torch.equal(value.flatten(), expected[key].flatten()), key


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_what_is_around_a_whole_model_is_no_part_of_a_layout(wrapper: str, tmp_path: Path) -> None:
    state = state_of(convnext(True))
    torch.save({"model": {f"{wrapper}{name}": value for name, value in state.items()}}, tmp_path / "wrapped.pth")
    result = lowmem.load(tmp_path / "wrapped.pth", model=model_of(convnext_of_timm(True)), preset="convnextv2->timm")
    expected = PRESETS["convnextv2->timm"].apply(state, {})
    assert result.model.state_dict().keys() == expected.keys()
    for key, value in result.model.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_a_preset_that_there_is_not_lists_those_that_there_are(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "m.safetensors")
    with pytest.raises(OptionError) as caught:
        lowmem.load(tmp_path / "m.safetensors", model=model_of({"weight": (2,)}), preset="convnextv2")
    assert str(caught.value) == f"preset: expected one of {', '.join(sorted(PRESETS))}, found 'convnextv2'"


def test_two_tensors_that_get_one_name_are_refused_by_their_own(tmp_path: Path) -> None:
    both = Preset("a->b", rename=((r"^old\.", "new."),), source="here")
    with pytest.raises(ValueError, match=r"found that 'old\.w' and 'new\.w' both become 'new\.w'; skip= one of them"):
        both.apply({"old.w": torch.zeros(1), "new.w": torch.zeros(1)}, {})
    state = state_of(convnext(True))
    state |= {f"encoder.{name}": value.clone() for name, value in state.items()}
    save_file(state, tmp_path / "twice.safetensors")
    with pytest.raises(KeysError, match=r"twice\.safetensors: preset 'convnextv2->timm' .*both become"):
        lowmem.load(tmp_path / "twice.safetensors", model=model_of(convnext_of_timm(True)), preset="convnextv2->timm")


def test_a_tensor_that_a_preset_cannot_change_is_named(tmp_path: Path) -> None:
    state = sparse(state_of(convnext(True)))
    state["encoder.stages.0.0.dwconv.kernel"] = torch.zeros(48, 4)
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(KeysError) as caught:
        lowmem.load(
            tmp_path / "odd.safetensors",
            model=model_of(convnext_of_timm(True)),
            preset="convnextv2->timm",
            strict=False,
        )
    for part in (
        "odd.safetensors",
        "encoder.stages.0.0.dwconv.kernel",
        "expected the points of a square kernel",
        "(48, 4)",
    ):
        assert part in str(caught.value)


def of_timm() -> torch.nn.Module:
    """For the shell."""
    return model_of(convnext_of_timm(True))()


def test_the_shell_takes_a_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "official.safetensors"
    save_file(state_of(convnext(True)), file)
    said = [str(file), "--model", f"{__name__}:of_timm"]
    for verb in ("diff", "plan", "load"):
        assert main([verb, *said, "--preset", "convnextv2->timm"]) == 0
        capsys.readouterr()
    assert main(["diff", *said]) == 1
    assert main(["load", *said, "--preset", "timm"]) == 2
    assert "lowmem: preset: expected one of convnext->mmpretrain, " in capsys.readouterr().err


def test_the_shell_says_what_a_timm_model_is_to_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = [str(tmp_path), "--model", f"{__name__}:of_timm"]
    assert main(["plan", *said, "--num-classes", "ten"]) == 2
    assert capsys.readouterr().err.startswith("lowmem: --num-classes: expected a whole number such as 10, found 'ten'")
    assert main(["diff", *said, "--in-chans", "1"]) == 2
    assert "lowmem: in_chans: " in capsys.readouterr().err


def test_a_preset_that_fits_nothing_says_so(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    save_file(model.state_dict(), tmp_path / "other.safetensors")
    plan = lowmem.plan(tmp_path / "other.safetensors", model=model, preset="convnextv2->timm")
    assert "preset 'convnextv2->timm': changed no key and no tensor" in plan.warnings
