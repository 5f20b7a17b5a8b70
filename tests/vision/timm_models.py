"""Small models of timm's families, their folders as timm writes them, and timm's own load beside lowmem's."""

from __future__ import annotations

import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

TINY = (1, 1, 1, 1)
# Architecture → what makes it small.
FAMILIES: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 64},
    "cait_xxs24_224": {"depth": 2, "img_size": 64},
    "coat_lite_tiny": {},
    "coatnet_pico_rw_224": {"img_size": 64},
    "convit_tiny": {"depth": 3},
    "convnext_atto": {"depths": TINY},
    "convnextv2_atto": {"depths": TINY},
    "crossvit_tiny_240": {},
    "deit_tiny_distilled_patch16_224": {"depth": 2, "img_size": 64},
    "densenet121": {"growth_rate": 8},
    "dla46_c": {},
    "edgenext_xx_small": {},
    "efficientformer_l1": {},
    "efficientvit_b0": {},
    "eva02_tiny_patch14_224": {"depth": 2, "img_size": 56},
    "fastvit_t8": {},
    "gcvit_xxtiny": {},
    "ghostnet_050": {},
    "hiera_tiny_224": {"stages": TINY, "embed_dim": 24},
    "hrnet_w18_small": {},
    "inception_v4": {},
    "legacy_xception": {},
    "levit_128s": {},
    "mambaout_femto": {},
    "maxvit_rmlp_pico_rw_256": {"img_size": 64},
    "mixer_s32_224": {"img_size": 64},
    "mobilenetv3_small_050": {},
    "mobilenetv4_conv_small_035": {},
    "mobilevit_xxs": {},
    "poolformer_s12": {},
    "pvt_v2_b0": {},
    "regnetx_002": {},
    "repvgg_a0": {},
    "repvit_m0_9": {},
    "resnet10t": {},
    "resnetv2_18": {},
    "rexnet_100": {},
    "starnet_s1": {},
    "swin_tiny_patch4_window7_224": {
        "depths": (1, 2, 1, 1),
        "embed_dim": 24,
        "num_heads": (1, 2, 4, 8),
        "img_size": 64,
        "window_size": 4,
    },
    "swinv2_cr_tiny_224": {"depths": TINY, "img_size": 64, "window_size": 2},
    "swinv2_tiny_window8_256": {
        "depths": (1, 2, 1, 1),
        "embed_dim": 24,
        "num_heads": (1, 2, 4, 8),
        "img_size": 64,
        "window_size": 4,
    },
    "test_nfnet": {},
    "tf_efficientnet_b0": {},
    "tinynet_e": {},
    "tiny_vit_5m_224": {"depths": TINY},
    "twins_svt_small": {"depths": TINY},
    "visformer_tiny": {},
    "vit_small_r26_s32_224": {"depth": 1, "img_size": 64},
    "vit_tiny_patch16_224": {"depth": 2, "img_size": 64},
    "volo_d1_224": {},
    "xcit_nano_12_p16_224": {"depth": 2},
}


def new(architecture: str, **options: Any) -> nn.Module:
    """A model of timm whose tensors are all different, so that none can stand for another."""
    import timm

    model: nn.Module = timm.create_model(architecture, **{**FAMILIES.get(architecture, {}), **options})
    generator = torch.Generator().manual_seed(zlib.crc32(architecture.encode()))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.is_floating_point():
                tensor.normal_(0, 0.05, generator=generator)
            elif name.endswith("num_batches_tracked"):
                tensor.fill_(7)
    return model


def write(folder: Path, model: nn.Module, safe: bool = True, **options: Any) -> Path:
    """The folder that timm pushes to the hub."""
    from timm.models._hub import save_for_hf

    save_for_hf(model, str(folder), safe_serialization=safe, **options)
    return folder


def by_timm(folder: Path, **options: Any) -> nn.Module:
    """The model that timm loads from the folder, in eval mode as lowmem's is."""
    import timm

    model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True, **options).eval()
    return model


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers by name, those that no state dict has too."""
    held = dict(model.named_parameters(remove_duplicate=False))
    held.update(model.named_buffers(remove_duplicate=False))
    return held


def assert_same(model: nn.Module, expected: nn.Module, but: Collection[str] = ()) -> None:
    """Bit for bit, names, dtypes, gradients and types of modules too. `but`: what only has the same shape."""
    ours, theirs = tensors_of(model), tensors_of(expected)
    assert list(ours) == list(theirs)
    assert list(model.state_dict()) == list(expected.state_dict())
    assert [(name, type(m)) for name, m in model.named_modules()] == [
        (name, type(m)) for name, m in expected.named_modules()
    ]
    for name, tensor in ours.items():
        other = theirs[name]
        assert (tensor.dtype, tensor.shape, tensor.device) == (other.dtype, other.shape, other.device), name
        assert tensor.requires_grad == other.requires_grad, name
        assert name in but or torch.equal(tensor, other), name
