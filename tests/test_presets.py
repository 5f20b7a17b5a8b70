"""Presets: what becomes of a generated file in the old layout. The names and shapes are those of the code they name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lowmem
from lowmem.errors import KeysError, OptionError
from lowmem.mapping.presets import PRESETS, Preset

pytestmark = pytest.mark.usefixtures("one_thread")

State = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]
# Blocks of each stage, and their widths.
DEPTHS, WIDTHS = (1, 2, 1, 1), (4, 5, 6, 7)


def blocks() -> Iterator[tuple[int, int, int]]:
    for stage, (depth, width) in enumerate(zip(DEPTHS, WIDTHS, strict=True)):
        for block in range(depth):
            yield stage, block, width


def with_bias(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def convnext(grn: bool) -> Shapes:
    """facebookresearch/ConvNeXt and ConvNeXt-V2, models/convnext.py and convnextv2.py."""
    found = {**with_bias("downsample_layers.0.0", WIDTHS[0], 3, 4, 4), **with_bias("downsample_layers.0.1", WIDTHS[0])}
    for i in range(1, 4):
        found |= with_bias(f"downsample_layers.{i}.0", WIDTHS[i - 1])
        found |= with_bias(f"downsample_layers.{i}.1", WIDTHS[i], WIDTHS[i - 1], 2, 2)
    for stage, block, width in blocks():
        at = f"stages.{stage}.{block}"
        found |= with_bias(f"{at}.dwconv", width, 1, 7, 7) | with_bias(f"{at}.norm", width)
        found |= with_bias(f"{at}.pwconv1", 4 * width, width) | with_bias(f"{at}.pwconv2", width, 4 * width)
        if grn:
            found |= {f"{at}.grn.{part}": (1, 1, 1, 4 * width) for part in ("gamma", "beta")}
        else:
            found[f"{at}.gamma"] = (width,)
    return found | with_bias("norm", WIDTHS[-1]) | with_bias("head", 9, WIDTHS[-1])


def convnext_of_timm(grn: bool) -> Shapes:
    """timm/models/convnext.py."""
    found = {**with_bias("stem.0", WIDTHS[0], 3, 4, 4), **with_bias("stem.1", WIDTHS[0])}
    for i in range(1, 4):
        found |= with_bias(f"stages.{i}.downsample.0", WIDTHS[i - 1])
        found |= with_bias(f"stages.{i}.downsample.1", WIDTHS[i], WIDTHS[i - 1], 2, 2)
    for stage, block, width in blocks():
        at = f"stages.{stage}.blocks.{block}"
        found |= with_bias(f"{at}.conv_dw", width, 1, 7, 7) | with_bias(f"{at}.norm", width)
        found |= with_bias(f"{at}.mlp.fc1", 4 * width, width) | with_bias(f"{at}.mlp.fc2", width, 4 * width)
        found |= with_bias(f"{at}.mlp.grn", 4 * width) if grn else {f"{at}.gamma": (width,)}
    return found | with_bias("head.norm", WIDTHS[-1]) | with_bias("head.fc", 9, WIDTHS[-1])


def convnext_of_mmpretrain(grn: bool) -> Shapes:
    """mmpretrain/models/backbones/convnext.py, GRN in models/utils/norm.py, inside of an ImageClassifier."""
    found: Shapes = {}
    for name, shape in convnext(grn).items():
        name = name.replace("dwconv", "depthwise_conv").replace("pwconv", "pointwise_conv")
        if name.startswith("head."):
            found[name.replace("head.", "head.fc.")] = shape
        else:
            name = name.replace("norm.", "norm3.") if name.startswith("norm.") else name
            found[f"backbone.{name}"] = shape[-1:] if ".grn." in name else shape
    return found


def vit() -> Shapes:
    """timm/models/vision_transformer.py, with what CLIP's and DeiT III's have."""
    found = {"cls_token": (1, 1, 8), "pos_embed": (1, 5, 8)}
    found |= with_bias("patch_embed.proj", 8, 3, 2, 2) | with_bias("norm_pre", 8)
    for at in ("blocks.0", "blocks.11"):
        found |= with_bias(f"{at}.norm1", 8) | with_bias(f"{at}.norm2", 8)
        found |= with_bias(f"{at}.attn.qkv", 24, 8) | with_bias(f"{at}.attn.proj", 8, 8)
        found |= with_bias(f"{at}.mlp.fc1", 32, 8) | with_bias(f"{at}.mlp.fc2", 8, 32)
    found |= {
        "blocks.0.gamma_1": (8,),
        "blocks.0.gamma_2": (8,),
        "blocks.11.ls1.gamma": (8,),
        "blocks.11.ls2.gamma": (8,),
    }
    return found | with_bias("norm", 8) | with_bias("head", 9, 8)


def vit_of_mmpretrain() -> Shapes:
    """mmpretrain/models/backbones/vision_transformer.py and deit3.py, inside of an ImageClassifier."""
    found: Shapes = {"backbone.cls_token": (1, 1, 8), "backbone.pos_embed": (1, 5, 8)}
    found |= with_bias("backbone.patch_embed.projection", 8, 3, 2, 2) | with_bias("backbone.pre_norm", 8)
    for at in ("backbone.layers.0", "backbone.layers.11"):
        found |= with_bias(f"{at}.ln1", 8) | with_bias(f"{at}.ln2", 8)
        found |= with_bias(f"{at}.attn.qkv", 24, 8) | with_bias(f"{at}.attn.proj", 8, 8)
        found |= with_bias(f"{at}.ffn.layers.0.0", 32, 8) | with_bias(f"{at}.ffn.layers.1", 8, 32)
        found |= {f"{at}.attn.gamma1.weight": (8,), f"{at}.ffn.gamma2.weight": (8,)}
    return found | with_bias("backbone.ln1", 8) | with_bias("head.layers.head", 9, 8)


def clip() -> Shapes:
    """openai/CLIP, clip/model.py."""
    found: Shapes = {"visual.class_embedding": (8,), "visual.positional_embedding": (5, 8), "visual.proj": (8, 6)}
    found |= {"visual.conv1.weight": (8, 3, 2, 2)} | with_bias("visual.ln_pre", 8) | with_bias("visual.ln_post", 8)
    for at in ("visual.transformer.resblocks.0", "transformer.resblocks.0"):
        found |= {f"{at}.attn.in_proj_weight": (24, 8), f"{at}.attn.in_proj_bias": (24,)}
        found |= with_bias(f"{at}.attn.out_proj", 8, 8) | with_bias(f"{at}.ln_1", 8) | with_bias(f"{at}.ln_2", 8)
        found |= with_bias(f"{at}.mlp.c_fc", 32, 8) | with_bias(f"{at}.mlp.c_proj", 8, 32)
    text: Shapes = {"positional_embedding": (7, 8), "text_projection": (8, 6), "token_embedding.weight": (9, 8)}
    return found | text | with_bias("ln_final", 8) | {"logit_scale": ()}


def clip_of_mmpretrain() -> Shapes:
    """mmpretrain/models/multimodal/clip/clip.py."""
    found: Shapes = {"visual.cls_token": (1, 1, 8), "visual.pos_embed": (1, 5, 8), "visual_proj.proj": (8, 6)}
    found |= {"visual.patch_embed.projection.weight": (8, 3, 2, 2)}
    found |= with_bias("visual.pre_norm", 8) | with_bias("visual.ln1", 8)
    at = "visual.layers.0"
    found |= with_bias(f"{at}.attn.qkv", 24, 8) | with_bias(f"{at}.attn.proj", 8, 8)
    found |= with_bias(f"{at}.ln1", 8) | with_bias(f"{at}.ln2", 8)
    found |= with_bias(f"{at}.ffn.layers.0.0", 32, 8) | with_bias(f"{at}.ffn.layers.1", 8, 32)
    return found | {name: shape for name, shape in clip().items() if not name.startswith("visual.")}


def swin(downsample: tuple[int, ...], head: str) -> Shapes:
    found = with_bias("patch_embed.proj", 4, 3, 4, 4) | with_bias("patch_embed.norm", 4)
    for i in range(4):
        found |= with_bias(f"layers.{i}.blocks.0.attn.qkv", 12, 4) | with_bias(f"layers.{i}.blocks.0.mlp.fc1", 16, 4)
        found[f"layers.{i}.blocks.0.attn.relative_position_bias_table"] = (169, 2)
    for width, i in enumerate(downsample, start=1):
        found |= {f"layers.{i}.downsample.reduction.weight": (2 * width, 4 * width)}
        found |= with_bias(f"layers.{i}.downsample.norm", 4 * width)
    return found | with_bias("norm", 32) | with_bias(head, 9, 32)


def official_swin() -> Shapes:
    """microsoft/Swin-Transformer, models/swin_transformer.py."""
    buffers: Shapes = {
        "layers.0.blocks.0.attn.relative_position_index": (49, 49),
        "layers.0.blocks.0.attn_mask": (4, 9),
    }
    return swin((0, 1, 2), "head") | buffers


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


def state_of(shapes: Shapes) -> State:
    """Values that tell tensors apart, whatever their shapes."""
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def model_of(shapes: Shapes) -> Callable[[], torch.nn.Module]:
    """What makes a module with these parameters."""

    def make() -> torch.nn.Module:
        whole = torch.nn.Module()
        for name, shape in shapes.items():
            *path, last = name.split(".")
            part = whole
            for step in path:
                if not hasattr(part, step):
                    part.add_module(step, torch.nn.Module())
                part = getattr(part, step)
            part.register_parameter(last, torch.nn.Parameter(torch.zeros(shape)))
        return whole

    return make


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
