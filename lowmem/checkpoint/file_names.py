"""What the names of files say: whether they are weights or an index, of which format, shard and variant."""

from __future__ import annotations

import re
from collections.abc import Iterable

SAFETENSORS = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pth.tar")
# transformers writes a variant's index as model.safetensors.index.fp16.json (`_add_variant` in modeling_utils.py).
_INDEX = re.compile(r"\.(safetensors|bin|pth|pt|ckpt)\.index((?:\.[\w-]+)*)\.json$", re.IGNORECASE)
_NUMBERED = re.compile(r"-(\d{5,})-of-(\d{5,})$")
_VARIANT = re.compile(r"\.[A-Za-z][\w-]*")
# The ranks of a distributed checkpoint (`is_sharded_checkpoint` in transformers/distributed/checkpoint.py).
_RANK = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors$")
# What trainers of transformers, accelerate, DeepSpeed and Megatron write beside the weights, and what is hidden:
# macOS puts a ._model.safetensors beside model.safetensors on disks of others.
_NEVER = re.compile(
    r"\.|(training_args|trainer_state|(lr_)?scheduler|(grad_)?scaler|sampler|dl_state_dict|(distrib_)?optim(izer)?(_states?)?)"
    r"([_-]?\d+)*\.|rng_states?|random_states?|.*_optim_states\.pt$",
    re.IGNORECASE,
)
ADAPTER = re.compile(r"adapter_model[.-]|pytorch_lora_weights\.", re.IGNORECASE)
_FOREIGN = {
    ".h5": "TensorFlow",
    ".keras": "Keras",
    ".pb": "TensorFlow",
    ".tflite": "TensorFlow Lite",
    ".msgpack": "Flax",
    ".gguf": "GGUF",
    ".ggml": "GGML",
    ".onnx": "ONNX",
    ".npz": "numpy",
    ".npy": "numpy",
    ".distcp": "torch.distributed.checkpoint",
    ".pdparams": "Paddle",
    ".pkl": "plain pickle",
    ".pickle": "plain pickle",
}
_TENSORFLOW_1 = re.compile(r"\.ckpt(-\d+)?\.(index|meta)$|\.data-\d{5}-of-\d{5}$")
_SHOWN = 10


def is_index(name: str) -> bool:
    """Whether `name` is that of an index, of whatever format and variant."""
    return _INDEX.search(name) is not None


def is_pickled(name: str) -> bool:
    """Whether `name` is that of pickled weights, or of an index of such."""
    found = _INDEX.search(name)
    return found[1].lower() != "safetensors" if found else name.lower().endswith(PICKLES)


def canonical_name(pickled: bool, variant: str | None = None) -> str:
    """What transformers calls a model in one file (`WEIGHTS_NAME`, `SAFE_WEIGHTS_NAME` in its utils/__init__.py)."""
    return _with_variant("pytorch_model.bin" if pickled else "model.safetensors", variant)


def canonical_index(pickled: bool, variant: str | None = None) -> str:
    """What transformers calls the index of a model in shards (`SAFE_WEIGHTS_INDEX_NAME`)."""
    return _with_variant(f"{canonical_name(pickled)}.index.json", variant)


def _with_variant(name: str, variant: str | None) -> str:
    """As `_add_variant` in transformers/modeling_utils.py."""
    head, _, suffix = name.rpartition(".")
    return f"{head}.{variant}.{suffix}" if variant else name


def variant_of(name: str) -> str | None:
    """The variant that a file may be by its name: `fp16` of `model.fp16.safetensors`."""
    head, dot, last = stem(name).rpartition(".")
    return last if head and _VARIANT.fullmatch(dot + last) else None


def is_of_variant(name: str, variant: str) -> bool:
    """Whether a file is of this variant; a variant may have dots in it."""
    return stem(name).endswith(f".{variant}") and len(stem(name)) > len(variant) + 1


def without_variants(names: Iterable[str]) -> list[str]:
    """The names of weights and indexes less those that are a variant of another one, as `model.fp16` is of `model`.

    `pytorch_model.bin` and `model.safetensors` are one model.
    """
    every = list(names)
    stems = {_common(name) for name in every}

    def is_variant(own: str) -> bool:
        plain, dot, last = own.rpartition(".")
        return plain in stems and _VARIANT.fullmatch(dot + last) is not None

    return [name for name in every if not is_variant(_common(name))]


def are_alike(name: str, other: str) -> bool:
    """Whether two files of different formats look like the same model: `model.safetensors`, `pytorch_model.bin`."""
    return _common(name) == _common(other) or _common(other).startswith(_common(name) + ".")


def _common(name: str) -> str:
    return stem(name).replace("pytorch_", "")


def is_of_rank(name: str) -> bool:
    """Whether a file is what one process wrote of a distributed checkpoint: parts of tensors."""
    return _RANK.match(name) is not None


def is_weights(name: str, pickled: bool) -> bool:
    """Whether a file of this name can be the weights of a model: no optimizer, no adapter, no part of one."""
    suffixes = PICKLES if pickled else (SAFETENSORS,)
    return name.lower().endswith(suffixes) and not any(kind.match(name) for kind in (_NEVER, ADAPTER, _RANK))


def kind_of(name: str) -> str | None:
    """Whose weights a file holds that is neither safetensors nor a torch pickle; None when it is none that is known."""
    if _TENSORFLOW_1.search(name):
        return "TensorFlow"
    return next((kind for suffix, kind in _FOREIGN.items() if name.lower().endswith(suffix)), None)


def listed(names: Iterable[str]) -> str:
    """File names for a message: the first of them, and how many more."""
    every = list(names)
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + more


def stem(name: str) -> str:
    """What a file is called without suffix, number and format: `model.fp16` for `model.safetensors.index.fp16.json`."""
    found = _INDEX.search(name)
    if found:
        return name[: found.start()] + found[2]
    return _NUMBERED.sub("", _without_suffix(name))


def shard_number(name: str) -> tuple[int, int] | None:
    """Which shard a file is, of how many, by its name; None when it is the whole."""
    found = numbered(name)
    return (int(found[1]), int(found[2])) if found and int(found[2]) > 1 else None


def numbered(name: str) -> re.Match[str] | None:
    """The number of a shard and how many there are, as the groups of a match."""
    return _NUMBERED.search(_without_suffix(name))


def _without_suffix(name: str) -> str:
    suffix = next((s for s in (SAFETENSORS, *PICKLES) if name.lower().endswith(s)), "")
    return name[: len(name) - len(suffix)]
