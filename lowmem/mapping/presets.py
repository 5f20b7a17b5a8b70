"""Known changes from the layout of one library to that of another: names and shapes, as data.

To add one, add a row to `_ROWS`: its name, what happens to names (regular expressions, in order), what happens to
shapes, and the code that says so; and to `tests/test_presets.py` a file in the old layout with the names and shapes
that become of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .._patterns import name_matches
from .._strides import Shape
from ..errors import OptionError
from ..sizes import shown
from .transforms import Transform, reshape_to

# What DistributedDataParallel and torch.compile put around a whole model.
_WRAPPERS = ("module.", "_orig_mod.")
_WRAPPED = r"^(?:module\.|_orig_mod\.)+"


@dataclass(frozen=True, slots=True)
class Preset:
    """How the tensors of one library's files become those of another's model.

    Attributes:
        name: such as `"convnextv2->timm"`.
        rename: regular expressions with their replacements, as `re.sub` takes them, one after the other.
        transforms: patterns of new names, with `*`, and what is done to these tensors, one after the other.
        drop: regular expressions; an old name in which one is found is not wanted.
        source: the code that says so.
    """

    name: str
    rename: tuple[tuple[str, str], ...]
    transforms: tuple[tuple[str, Transform], ...] = ()
    drop: tuple[str, ...] = ()
    source: str = ""

    def apply(self, state: Mapping[str, Any], shapes: Mapping[str, Shape]) -> dict[str, Any]:
        """A state dict in the other layout.

        Args:
            state: name → tensor; `module.` and the like around all of them are taken off.
            shapes: of the model's tensors; one that it does not have keeps its shape.

        Raises:
            ValueError: a tensor that a transform cannot change, or two that get one name.
        """
        made: dict[str, Any] = {}
        origin: dict[str, str] = {}
        wrapped = all(name.startswith(_WRAPPERS) for name in state)
        for key, tensor in state.items():
            old = re.sub(_WRAPPED, "", key) if wrapped else key
            if any(re.search(expression, old) for expression in self.drop):
                continue
            name = old
            for expression, replacement in self.rename:
                name = re.sub(expression, replacement, name)
            if name in made:
                raise ValueError(
                    f"expected names that stay apart, found that {origin[name]!r} and {key!r} "
                    f"both become {name!r}; skip= one of them"
                )
            made[name], origin[name] = self._changed(key, name, tensor, shapes), key
        return made

    def _changed(self, key: str, name: str, tensor: Any, shapes: Mapping[str, Shape]) -> Any:
        for pattern, transform in self.transforms:
            if name_matches(name, pattern):
                try:
                    tensor = transform(tensor, shapes.get(name, tuple(tensor.shape)))
                except ValueError as error:
                    raise ValueError(f"tensor {key!r}: {transform.what}: {error}") from error
        return tensor


def _dense_kernel(tensor: torch.Tensor, shape: Shape) -> torch.Tensor:
    """A convolution's kernel from MinkowskiEngine's (points, channels) or (points, inputs, outputs)."""
    if tensor.ndim not in (2, 3):
        return tensor
    side = math.isqrt(tensor.shape[0])
    if side * side != tensor.shape[0]:
        raise ValueError(f"expected the points of a square kernel, found {tuple(tensor.shape)}; is it a sparse kernel?")
    outputs, inputs = tensor.shape[-1], tensor.shape[1] if tensor.ndim == 3 else 1
    # Its points run down the columns.
    return tensor.permute(*reversed(range(tensor.ndim))).reshape(outputs, inputs, side, side).transpose(3, 2)


def _as_linear_or_convolution(tensor: torch.Tensor, shape: Shape) -> torch.Tensor:
    """A matrix as the 1 x 1 convolution that the model may have instead; a difference in size is told elsewhere."""
    fits = math.prod(shape) == tensor.numel() and tensor.ndim != len(shape)
    return tensor.reshape(shape) if fits else tensor


def _add_dimensions(count: int) -> Transform:
    def added(tensor: torch.Tensor, shape: Shape) -> torch.Tensor:
        return tensor.reshape(*[1] * count, *tensor.shape)

    return Transform(f"{count} dimensions more in front", added)


_FLAT = reshape_to(-1)
_DENSE = Transform("a dense kernel", _dense_kernel)
_AS_MODEL = Transform("matrix or 1 x 1 convolution", _as_linear_or_convolution)

# The names of MinkowskiEngine's layers, which the pre-trained files of ConvNeXt-V2 have (remap_checkpoint_keys).
_SPARSE = (
    (r"^encoder\.", ""),
    (r"\.kernel$", ".weight"),
    (r"\.(?:ln|linear)(\.(?:weight|bias))$", r"\1"),
)
_CONVNEXT_TO_TIMM = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.(\d+)\.", r"stages.\1.downsample.\2."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv(\d)\.", r".mlp.fc\1."),
    (r"\.grn\.gamma$", ".mlp.grn.weight"),
    (r"\.grn\.beta$", ".mlp.grn.bias"),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)
_CONVNEXT_TO_MMPRETRAIN = (
    (r"\.dwconv\.", ".depthwise_conv."),
    (r"\.pwconv(\d)\.", r".pointwise_conv\1."),
    (r"^norm\.", "norm3."),
    (r"^(downsample_layers|stages|norm3)\.", r"backbone.\1."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)
# Of the masked autoencoder that the encoder was trained in.
_DECODER = (r"^decoder\.", r"^proj\.", r"^pred\.", r"^mask_token$")
_VIT_TO_MMPRETRAIN = (
    (r"^patch_embed\.proj\.", "patch_embed.projection."),
    (r"^norm_pre\.", "pre_norm."),
    (r"^norm\.", "ln1."),
    (r"^blocks\.", "layers."),
    (r"^(layers\.\d+)\.norm([12])\.", r"\1.ln\2."),
    (r"^(layers\.\d+)\.mlp\.fc1\.", r"\1.ffn.layers.0.0."),
    (r"^(layers\.\d+)\.mlp\.fc2\.", r"\1.ffn.layers.1."),
    (r"^(layers\.\d+)\.(?:gamma_1|ls1\.gamma)$", r"\1.attn.gamma1.weight"),
    (r"^(layers\.\d+)\.(?:gamma_2|ls2\.gamma)$", r"\1.ffn.gamma2.weight"),
    (r"^(?!head\.)", "backbone."),
    (r"^head\.(weight|bias)$", r"head.layers.head.\1"),
)
_CLIP_TO_MMPRETRAIN = (
    (r"^visual\.conv1\.", "visual.patch_embed.projection."),
    (r"^visual\.positional_embedding$", "visual.pos_embed"),
    (r"^visual\.class_embedding$", "visual.cls_token"),
    (r"^visual\.ln_pre\.", "visual.pre_norm."),
    (r"^visual\.ln_post\.", "visual.ln1."),
    (r"^visual\.proj$", "visual_proj.proj"),
    (r"^visual\.transformer\.resblocks\.", "visual.layers."),
    (r"^(visual\.layers\.\d+)\.ln_([12])\.", r"\1.ln\2."),
    (r"^(visual\.layers\.\d+)\.mlp\.c_fc\.", r"\1.ffn.layers.0.0."),
    (r"^(visual\.layers\.\d+)\.mlp\.c_proj\.", r"\1.ffn.layers.1."),
    (r"^(visual\.layers\.\d+)\.attn\.in_proj_", r"\1.attn.qkv."),
    (r"^(visual\.layers\.\d+)\.attn\.out_proj\.", r"\1.attn.proj."),
)
_SWIN_TO_TIMM = (
    (r"^layers\.2\.downsample\.", "layers.3.downsample."),
    (r"^layers\.1\.downsample\.", "layers.2.downsample."),
    (r"^layers\.0\.downsample\.", "layers.1.downsample."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)

_TIMM = "checkpoint_filter_fn of timm/models/"
_MMPRETRAIN = "tools/model_converters/ of mmpretrain: "
_REMAP = "; remap_checkpoint_keys in utils.py of facebookresearch/ConvNeXt-V2"

_ROWS = (
    Preset(
        "convnext->timm",
        rename=_CONVNEXT_TO_TIMM,
        transforms=(("*.mlp.fc*.weight", _AS_MODEL),),
        drop=(r"^projectors\.", r"^norms\."),
        source=f"{_TIMM}convnext.py",
    ),
    Preset(
        "convnext->mmpretrain",
        rename=_CONVNEXT_TO_MMPRETRAIN,
        transforms=(("*.pointwise_conv*.weight", _AS_MODEL),),
        source=f"{_MMPRETRAIN}convnext_to_mmpretrain.py",
    ),
    Preset(
        "convnextv2->timm",
        rename=_SPARSE + _CONVNEXT_TO_TIMM,
        transforms=(
            ("*.mlp.grn", _FLAT),
            ("*.conv_dw.weight", _DENSE),
            ("*.downsample.1.weight", _DENSE),
            ("*.downsample.1.bias", _FLAT),
            ("*.conv_dw.bias", _FLAT),
            ("*.mlp.fc*.weight", _AS_MODEL),
        ),
        drop=_DECODER,
        source=f"{_TIMM}convnext.py{_REMAP}",
    ),
    Preset(
        "convnextv2->mmpretrain",
        rename=_SPARSE + _CONVNEXT_TO_MMPRETRAIN,
        transforms=(
            ("*.grn", _FLAT),
            ("*.depthwise_conv.weight", _DENSE),
            ("downsample_layers.*.1.weight", _DENSE),
            ("downsample_layers.*.1.bias", _FLAT),
            ("*.depthwise_conv.bias", _FLAT),
            ("*.pointwise_conv*.weight", _AS_MODEL),
        ),
        drop=_DECODER,
        source=f"{_MMPRETRAIN}convnext_to_mmpretrain.py, GRN in mmpretrain/models/utils/norm.py{_REMAP}",
    ),
    Preset(
        "timm-vit->mmpretrain",
        rename=_VIT_TO_MMPRETRAIN,
        source=f"{_MMPRETRAIN}clip_to_mmpretrain.py and deit3_to_mmpretrain.py",
    ),
    Preset(
        "openai-clip->mmpretrain",
        rename=_CLIP_TO_MMPRETRAIN,
        transforms=(("visual.pos_embed", _add_dimensions(1)), ("visual.cls_token", _add_dimensions(2))),
        source=f"{_MMPRETRAIN}openai-clip_to_mmpretrain-clip.py",
    ),
    Preset(
        "swin->timm",
        rename=_SWIN_TO_TIMM,
        drop=(r"\.relative_position_index$", r"\.attn_mask$"),
        source=f"{_TIMM}swin_transformer.py",
    ),
)
PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ROWS}


def find_preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
        OptionError: there is none; those that there are are listed.
    """
    if isinstance(name, str) and name in PRESETS:
        return PRESETS[name]
    raise OptionError(f"preset: expected one of {', '.join(sorted(PRESETS))}, found {shown(name)}")
