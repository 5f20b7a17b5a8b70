"""What is loaded, from what, into what: the cases of the bench."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from lowmem import Checkpoint, TensorEntry
from lowmem.dtypes import itemsize

# Checkpoints that transformers has a class for; the others are plain modules.
WITH_CONFIG = ("llama-1b", "llama-3b", "llama-125m", "qwen3-moe", "many-experts")
# Ends of keys that stand beside int8 weights: their scales, and bitsandbytes' word for how they lie.
BESIDE_INT8 = (".SCB", ".weight_format")


@dataclass(frozen=True)
class Case:
    """One load.

    Attributes:
        name: for the command line and the JSON.
        title: for tables.
        group: cases of one table.
        checkpoint: a name of `bench.make_checkpoint`.
        stored: dtype of the checkpoint; `int8` for one whose linear layers are int8 and the rest bfloat16.
        dtype: dtype of the loaded weights; `int8` likewise.
        residency: `map` (pages of the files), `copy` (memory of its own) or `any` (as the loader likes best).
        on_disk: whether the decoder's layers stay on disk.
        written: whether those are cast once and written, and not cast at each use.
        cold: whether the files are dropped from the page cache before each load.
        staging: bound on lowmem's buffers, for the cases that compare it.
        least_memory: whether the smallest kernel limit is looked for.
        shard: largest file of the checkpoint.
        repeats: most loads in a process, for what takes long; None for as many as the run wants.
    """

    name: str
    title: str
    group: str
    checkpoint: str = "llama-1b"
    stored: str = "bfloat16"
    dtype: str = "bfloat16"
    residency: str = "copy"
    on_disk: bool = False
    written: bool = False
    cold: bool = False
    staging: str | None = None
    least_memory: bool = False
    shard: str = "1GB"
    repeats: int | None = None

    @property
    def casts(self) -> bool:
        """Whether the bytes change."""
        return self.stored != self.dtype

    @property
    def is_int8(self) -> bool:
        """Whether int8 is loaded, or what it is made from."""
        return "int8" in (self.stored, self.dtype)

    @property
    def float_dtype(self) -> str:
        """Dtype of what is no int8 when it is loaded."""
        return next((dtype for dtype in (self.dtype, self.stored) if dtype != "int8"), "bfloat16")

    @property
    def has_config(self) -> bool:
        """Whether transformers has a class for it."""
        return self.checkpoint in WITH_CONFIG

    def resident(self, checkpoint: Checkpoint) -> int:
        """Bytes of anonymous memory that the weights keep when the load is done."""
        if self.residency == "map" and not self.casts:
            return 0
        kept = [entry for key, entry in checkpoint.items() if not (self.on_disk and is_layer(key))]
        if self.residency == "any" and not self.casts:
            # Experts are fused, which is no page of a file; the rest may be.
            kept = [entry for entry in kept if ".experts." in entry.key]
        if self.residency == "any" and self.is_int8:
            # The rest may be pages of the file still.
            kept = [entry for entry in kept if becomes_int8(entry.key)]
        return sum(self._size(entry) for entry in kept)

    def _size(self, entry: TensorEntry) -> int:
        """Bytes of a tensor when it is loaded, with what is made beside it."""
        if not self.is_int8:
            return entry.nbytes // itemsize(self.stored) * itemsize(self.dtype)
        if entry.key.endswith(BESIDE_INT8):
            return entry.nbytes if self.dtype == "int8" and entry.key.endswith(".SCB") else 0
        if self.stored != "int8" and becomes_int8(entry.key):
            return math.prod(entry.shape) + entry.shape[0] * itemsize("float32")
        if entry.dtype == "int8" != self.dtype:
            return entry.nbytes * itemsize(self.dtype)
        return entry.nbytes


def is_layer(key: str) -> bool:
    """Whether a key belongs to a decoder layer, which the cases on disk leave there."""
    return re.match(r"model\.layers\.\d+\.", key) is not None


def becomes_int8(key: str) -> bool:
    """Whether a key is the weight of a layer that transformers makes int8, in the checkpoints with a Llama."""
    return is_layer(key) and key.endswith("_proj.weight")


_MAIN = (
    Case("map-bf16", "map bf16", "warm", residency="map"),
    Case("copy-bf16", "copy bf16", "warm", least_memory=True),
    Case("bf16-fp32", "bf16 to fp32", "warm", dtype="float32", least_memory=True),
    Case("fp32-bf16", "fp32 to bf16", "warm", stored="float32"),
)
_DISK = (
    Case("disk-bf16", "layers on disk, bf16", "layers on disk", residency="map", on_disk=True),
    Case(
        "disk-fp32", "layers on disk, bf16 to fp32", "layers on disk", dtype="float32", on_disk=True, least_memory=True
    ),
    Case(
        "disk-fp32-written",
        "layers on disk, bf16 to fp32, cast once and written",
        "layers on disk",
        dtype="float32",
        on_disk=True,
        written=True,
    ),
)
_INT8 = (
    Case("int8-quantise", "bf16 to int8", "int8", dtype="int8", residency="any", repeats=2),
    Case("int8-stored", "int8 from an int8 checkpoint", "int8", stored="int8", dtype="int8", residency="any"),
    Case("int8-dequantise", "int8 to bf16", "int8", stored="int8", residency="any", repeats=3),
)
_SHAPES = (
    Case("experts-bf16", "fused experts, bf16", "other shapes", checkpoint="qwen3-moe", residency="any"),
    Case("experts-fp32", "fused experts, bf16 to fp32", "other shapes", checkpoint="qwen3-moe", dtype="float32"),
    Case("experts-many", "31,000 tensors of experts", "other shapes", checkpoint="many-experts", residency="any"),
    Case("small-map", "30,000 small tensors, mapped", "other shapes", checkpoint="many-small", residency="map"),
    Case("small-copy", "30,000 small tensors, copied", "other shapes", checkpoint="many-small"),
    Case("large-copy", "one 3 GB tensor, copied", "other shapes", checkpoint="one-3gb-tensor", shard="5GB"),
    Case("large-fp32", "one 3 GB tensor, bf16 to fp32", "other shapes", "one-3gb-tensor", dtype="float32", shard="5GB"),
)
_COLD = tuple(
    replace(case, name=f"cold-{case.name}", title=f"{case.title}, cold", group="cold", cold=True, least_memory=False)
    for case in _MAIN[:3]
)
_STAGING = tuple(
    Case(f"staging-{size}", f"bf16 to fp32, staging {size} MiB", "staging", dtype="float32", staging=f"{size}MiB")
    for size in (16, 64)
)
# Those of one checkpoint together: what loaders converted is removed after the last of them.
CASES = (*_MAIN[:3], *_COLD, *_DISK, *_STAGING, _MAIN[3], *_INT8, *_SHAPES)

QUICK = tuple(replace(case, checkpoint="llama-125m", shard="100MB") for case in (*_MAIN[:3], _COLD[1], _DISK[1]))


def find_cases(names: Iterable[str], quick: bool) -> tuple[Case, ...]:
    """The cases of these names, all of them without names; `quick`: on a checkpoint of 250 MB.

    Raises:
        KeyError: no case has this name.
    """
    all_of = {case.name: case for case in CASES}
    if quick:
        small = {
            name: replace(case, checkpoint="llama-125m", shard="100MB")
            for name, case in all_of.items()
            if case.checkpoint == "llama-1b"
        }
        all_of.update(small)
    wanted = tuple(names) or tuple(case.name for case in (QUICK if quick else CASES))
    return tuple(all_of[name] for name in wanted)
