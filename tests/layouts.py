"""Names and shapes in the layouts of several libraries, and modules and state dicts that have them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

State = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Sizes:
    """Of a ConvNeXt: blocks of each stage, and their widths."""

    depths: tuple[int, ...] = (1, 2, 1, 1)
    widths: tuple[int, ...] = (4, 5, 6, 7)

    def blocks(self) -> Iterator[tuple[int, int, int]]:
        for stage, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            for block in range(depth):
                yield stage, block, width


TINY = Sizes()
ATTO = Sizes((2, 2, 6, 2), (40, 80, 160, 320))


def with_bias(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def convnext(grn: bool, sizes: Sizes = TINY) -> Shapes:
    """facebookresearch/ConvNeXt and ConvNeXt-V2, models/convnext.py and convnextv2.py."""
    found = {
        **with_bias("downsample_layers.0.0", sizes.widths[0], 3, 4, 4),
        **with_bias("downsample_layers.0.1", sizes.widths[0]),
    }
    for i in range(1, 4):
        found |= with_bias(f"downsample_layers.{i}.0", sizes.widths[i - 1])
        found |= with_bias(f"downsample_layers.{i}.1", sizes.widths[i], sizes.widths[i - 1], 2, 2)
    for stage, block, width in sizes.blocks():
        at = f"stages.{stage}.{block}"
        found |= with_bias(f"{at}.dwconv", width, 1, 7, 7) | with_bias(f"{at}.norm", width)
        found |= with_bias(f"{at}.pwconv1", 4 * width, width) | with_bias(f"{at}.pwconv2", width, 4 * width)
        if grn:
            found |= {f"{at}.grn.{part}": (1, 1, 1, 4 * width) for part in ("gamma", "beta")}
        else:
            found[f"{at}.gamma"] = (width,)
    return found | with_bias("norm", sizes.widths[-1]) | with_bias("head", 9, sizes.widths[-1])


def convnext_of_timm(grn: bool, sizes: Sizes = TINY) -> Shapes:
    """timm/models/convnext.py."""
    found = {**with_bias("stem.0", sizes.widths[0], 3, 4, 4), **with_bias("stem.1", sizes.widths[0])}
    for i in range(1, 4):
        found |= with_bias(f"stages.{i}.downsample.0", sizes.widths[i - 1])
        found |= with_bias(f"stages.{i}.downsample.1", sizes.widths[i], sizes.widths[i - 1], 2, 2)
    for stage, block, width in sizes.blocks():
        at = f"stages.{stage}.blocks.{block}"
        found |= with_bias(f"{at}.conv_dw", width, 1, 7, 7) | with_bias(f"{at}.norm", width)
        found |= with_bias(f"{at}.mlp.fc1", 4 * width, width) | with_bias(f"{at}.mlp.fc2", width, 4 * width)
        found |= with_bias(f"{at}.mlp.grn", 4 * width) if grn else {f"{at}.gamma": (width,)}
    return found | with_bias("head.norm", sizes.widths[-1]) | with_bias("head.fc", 9, sizes.widths[-1])


def convnext_of_mmpretrain(grn: bool, sizes: Sizes = TINY) -> Shapes:
    """mmpretrain/models/backbones/convnext.py, GRN in models/utils/norm.py, inside of an ImageClassifier."""
    found: Shapes = {}
    for name, shape in convnext(grn, sizes).items():
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
