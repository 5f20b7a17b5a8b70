"""Checkpoints whose weights are quantised, told by the config, by files beside the weights, or by their keys.

bitsandbytes' row-wise int8 is loaded; every other way is refused by its name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ..checkpoint import Checkpoint, TensorEntry
from ..checkpoint.there import is_file_at
from ..errors import ModelError, UnsupportedError

# That of transformers' BitsAndBytesConfig.
DEFAULT_THRESHOLD = 6.0
_REMEDY = "which lowmem does not load; bring the model in fp32, bf16 or fp16, or load it with transformers"
# What other programs leave beside the weights instead of an entry in config.json: TensorRT Model Optimizer, AutoGPTQ,
# AutoAWQ.
_FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
# Last part of a key → who writes it, beside or instead of a weight. Names from the modules that hold them:
# bitsandbytes/nn/modules.py and functional.py (QuantState), auto_gptq, autoawq, transformers' integrations
# (finegrained_fp8, fbgemm_fp8, mxfp4), compressed_tensors, hqq, optimum-quanto, aqlm.
_LEAVES = {
    "absmax": "bitsandbytes 4 bit",
    "quant_map": "bitsandbytes 4 bit",
    "bitsandbytes__nf4": "bitsandbytes 4 bit",
    "bitsandbytes__fp4": "bitsandbytes 4 bit",
    "qweight": "gptq or awq",
    "qzeros": "gptq or awq",
    "weight_scale_inv": "fp8",
    "weight_scale": "fp8, compressed-tensors or modelopt",
    "weight_packed": "compressed-tensors",
    "W_q": "hqq",
    "weight._data": "quanto",
    "codebooks": "aqlm",
}
_FUSED = ("_blocks", "_scales")


def int8_config(table: Mapping[str, Any], where: str = "config.json") -> Mapping[str, Any] | None:
    """What a config says of its weights as bitsandbytes' int8, in the names of transformers' `BitsAndBytesConfig`.

    Args:
        table: the config, sub-configs and all; a `quantization_config` in the config itself comes first.
        where: what errors call the config.

    Returns:
        `llm_int8_threshold` (a float, 6.0 where it is not given) and `llm_int8_skip_modules` (a list of names or
        patterns, or None); None when it does not say that its weights are int8.

    Raises:
        ModelError: one of the two is something else.
    """
    found = next((value for _, value in _declared(table, "") if _is_int8(value)), None)
    if found is None:
        return None
    threshold = found.get("llm_int8_threshold", DEFAULT_THRESHOLD)
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold < math.inf:
        raise ModelError(
            f"{where}: quantization_config: 'llm_int8_threshold': expected a number, 0 or more, found {threshold!r}; "
            f"correct it, or remove it for {DEFAULT_THRESHOLD}"
        )
    skipped = found.get("llm_int8_skip_modules")
    if skipped is not None and not (isinstance(skipped, list) and all(isinstance(name, str) for name in skipped)):
        raise ModelError(
            f"{where}: quantization_config: 'llm_int8_skip_modules': expected a list of names of modules, or null, "
            f"found {skipped!r}; correct it"
        )
    return {"llm_int8_threshold": float(threshold), "llm_int8_skip_modules": skipped}


def refuse_quantised(checkpoint: Checkpoint, where: str, table: Mapping[str, Any]) -> None:
    """Refuse weights that are no numbers by themselves, but for bitsandbytes' int8 with its scales (`SCB`).

    Args:
        checkpoint: the entries, and the folder with files that may say so.
        where: what errors call the config.
        table: the config, sub-configs and all.

    Raises:
        UnsupportedError: says who quantised them and what tells so.
        ModelError: the config says what is no setting of int8.
    """
    for path, found in _declared(table, ""):
        if _is_int8(found):
            continue
        place = f" in {path}" if path else ""
        raise UnsupportedError(f"{where}: the weights are quantised ({_method(found)}{place}), {_REMEDY}")
    int8_config(table, where)
    every = [entry for entry in checkpoint.values() if _is_packed(entry) and not _has_scales(checkpoint, entry)]
    if not every:
        return
    # Masks of old checkpoints are small integers too.
    weights = [entry for entry in every if "weight" in entry.key]
    packed = (weights or every)[0]
    for name, method in _FILES.items():
        if weights and is_file_at(checkpoint.folder / name):
            raise UnsupportedError(
                f"{checkpoint.folder / name}: the weights are quantised ({method!r}; {packed.key!r} is "
                f"{packed.dtype}), {_REMEDY}"
            )
    for key, entry in checkpoint.items():
        writer = _writer(checkpoint, key)
        if writer is not None:
            raise UnsupportedError(
                f"{entry.file}: the weights are quantised ({key!r} is of {writer}, {packed.key!r} is {packed.dtype}), "
                f"though {where} does not say so, {_REMEDY}"
            )


def _declared(table: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    """The path of the sub-config and the value of every entry that says how weights are quantised."""
    for key in ("quantization_config", "compression_config"):
        if table.get(key):
            yield path, table[key]
    for key, value in table.items():
        if isinstance(value, dict) and key not in ("quantization_config", "compression_config"):
            yield from _declared(value, f"{path}.{key}" if path else key)


def _is_int8(found: Any) -> bool:
    """Whether a `quantization_config` is that of bitsandbytes' int8 (`AutoQuantizationConfig.from_dict`)."""
    if not isinstance(found, dict) or found.get("load_in_8bit") is not True:
        return False
    others = ("load_in_4bit", "llm_int8_has_fp16_weight")
    method = getattr(found.get("quant_method"), "value", found.get("quant_method")) or "bitsandbytes"
    return str(method).lower() == "bitsandbytes" and not any(found.get(key) for key in others)


def _method(found: Any) -> str:
    """Who quantised, and which of bitsandbytes' ways it is."""
    if not isinstance(found, dict):
        return repr(found)
    named = [repr(found.get("quant_method", "unknown"))]
    named += [key for key in ("load_in_4bit", "llm_int8_has_fp16_weight") if found.get(key)]
    return ", ".join(named)


def _has_scales(checkpoint: Checkpoint, entry: TensorEntry) -> bool:
    """Whether an int8 weight has bitsandbytes' scales beside it; whether they fit is looked at with the model."""
    path, _, leaf = entry.key.rpartition(".")
    return entry.dtype == "int8" and leaf == "weight" and (f"{path}.SCB" if path else "SCB") in checkpoint


def _is_packed(entry: TensorEntry) -> bool:
    """Whether a tensor of two or more dimensions holds integers or very small floats, as no weight does by itself."""
    small = entry.dtype.startswith(("float8", "float4")) or entry.dtype in ("int8", "uint8", "int32", "int16")
    return small and len(entry.shape) >= 2


def _writer(checkpoint: Checkpoint, key: str) -> str | None:
    for leaf, writer in _LEAVES.items():
        if key.endswith(f".{leaf}"):
            return writer
    stem = next((key.removesuffix(end) for end in _FUSED if key.endswith(end)), None)
    return "mxfp4" if stem is not None and all(stem + end in checkpoint for end in _FUSED) else None
