"""What is loaded, and by whom. Without torch, so that `--help` is quick."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TIMM = ("lowmem", "lowmem-copy", "timm")
# `mmap` is torch.load's, `assign` is load_state_dict's, into a model that was built on meta.
BY_HAND = ("hand", "hand-mmap", "hand-assign", "hand-mmap-assign")
TITLES = {
    "lowmem": "lowmem, mapped",
    "lowmem-copy": "lowmem, residency=copy",
    "timm": "timm.create_model",
    "hand": "by hand",
    "hand-mmap": "by hand, mmap=True",
    "hand-assign": "by hand, meta and assign=True",
    "hand-mmap-assign": "by hand, mmap=True, meta and assign=True",
}


@dataclass(frozen=True)
class Sizes:
    """Timm's architectures, and the shape of the model of several sources, whose shards have `shard` bytes."""

    vit: str
    convnext: str
    width: int
    layers: int
    words: int
    tower: int
    depth: int
    shard: int


# 1.2 GB and 0.8 GB in fp32; an LLM of 1.2 GB in bf16 and a tower of 0.6 GB in fp16.
FULL = Sizes("vit_large_patch16_224", "convnextv2_large", 1536, 18, 32000, 1024, 24, 300_000_000)
SMALL = Sizes("vit_tiny_patch16_224", "convnextv2_atto", 64, 2, 128, 48, 2, 100_000)


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: for the command line and the JSON; the word before its dash is the name of its group.
        title: for tables.
        ways: names of `ways.WAYS`; the others' tensors must be those of `reference`.
        checkpoint: a name of `checkpoints.WRITERS`.
        plain: what timm reads instead, where it would not read all of it.
        options: of `timm.create_model`.
        kind: `turns` or `limits`.
    """

    name: str
    title: str
    ways: tuple[str, ...]
    checkpoint: str
    plain: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    kind: str = "turns"

    @property
    def reference(self) -> str:
        return "timm" if self.needs_timm else "hand"

    @property
    def needs_timm(self) -> bool:
        return "timm" in self.ways


CASES = (
    Case("timm-vit", "a ViT, safetensors", TIMM, "vit"),
    Case("timm-convnextv2", "a ConvNeXt V2, safetensors", TIMM, "convnextv2"),
    Case("timm-pth", "a ViT, .pth", TIMM, "vit-pth"),
    Case("timm-shards", "a ViT, 5 shards (timm: the unsharded file)", TIMM, "vit-shards", plain="vit"),
    Case("in_chans-1", "a ViT, in_chans=1, num_classes=10", TIMM, "vit", options={"in_chans": 1, "num_classes": 10}),
    Case("in_chans-size", "a ViT, img_size=384", TIMM, "vit", options={"img_size": 384}),
    Case("sources", "an LLM, a tower and a projector", ("lowmem", "lowmem-copy", *BY_HAND), "sources"),
    Case("limits", "the same, under a kernel limit", ("lowmem", *BY_HAND), "sources", kind="limits"),
)


@dataclass(frozen=True)
class Order:
    """What a process loads.

    Attributes:
        way: a name of `ways.WAYS`.
        folder: the checkpoint's.
        plain: the folder that timm reads.
        options: of `timm.create_model`.
        sizes: of the model of several sources.
        ram: the budget that lowmem is given, in bytes.
    """

    way: str
    folder: Path
    plain: Path
    options: dict[str, Any]
    sizes: Sizes
    ram: int | None = None


def find_cases(names: Iterable[str]) -> tuple[Case, ...]:
    """The cases of these names or groups, all of them without names.

    Raises:
        KeyError: no case has this name.
    """
    names = tuple(names)
    for name in names:
        if not any(_is_called(case, name) for case in CASES):
            raise KeyError(name)
    return tuple(case for case in CASES if not names or any(_is_called(case, name) for name in names))


def _is_called(case: Case, name: str) -> bool:
    return name in (case.name, case.name.partition("-")[0])
