"""int8 in a conversion: which tensors become int8, or floats again, and what `config.json` says of it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ._small_files import MOST_OF_A_CONFIG, read_small
from .checkpoint import Checkpoint
from .checkpoint.int8 import is_int8_weight, scales_of
from .dtypes import CASTABLE, is_floating
from .errors import LowmemError, ModelError, UnsupportedError
from .mapping import KeyMapping, choose_layers, match
from .mapping.int8 import floats_that_become_int8
from .modeling.int8 import mark, swap
from .modeling.int8_choice import Int8Request
from .modeling.request import make_model_request
from .modeling.skeleton import Skeleton, find_origin, make_skeleton
from .planner.convert import ConvertRequest

# What `config.json` is to say under `quantization_config`: the same as before, nothing, or this.
Declared = Mapping[str, Any] | str
KEEP, NOTHING = "keep", "nothing"
_WHERE = "quantization_config"


@dataclass(frozen=True)
class Change:
    """What becomes of a conversion by int8.

    Attributes:
        request: the conversion, with what becomes int8 or floats.
        declared: what the config says of it.
        warnings: what the user should know.
    """

    request: ConvertRequest
    declared: Declared = KEEP
    warnings: tuple[str, ...] = ()


def find_change(
    checkpoint: Checkpoint, request: ConvertRequest, int8: Int8Request, *, trust_remote_code: bool = False
) -> Change:
    """Look at the checkpoint, and at its model where something becomes int8.

    Args:
        checkpoint: what is converted.
        request: how.
        int8: what the user asked.
        trust_remote_code: whether Python files beside the checkpoint may run.

    Raises:
        ModelError: the model is unknown, or cannot be built.
        KeysError: the checkpoint does not fit it.
        UnsupportedError: nothing is int8 that could become floats.
    """
    if int8.dequantize:
        return _to_floats(checkpoint, request, trust_remote_code)
    return _to_int8(checkpoint, request, int8, trust_remote_code) if int8.quantize else Change(request)


def _to_floats(checkpoint: Checkpoint, request: ConvertRequest, trust_remote_code: bool) -> Change:
    int8 = [entry for entry in checkpoint.values() if is_int8_weight(checkpoint, entry)]
    if not int8:
        raise UnsupportedError(
            f"{checkpoint.source}: dequantize (--dequantize): expected int8 weights with their scales (SCB), found "
            "none; convert it without"
        )
    dtype = request.dtype
    if dtype == "auto":
        table = {} if checkpoint.config is None else read_table(checkpoint.config)
        named = table.get("dtype") or table.get("torch_dtype")
        scales = {scales_of(checkpoint, entry.key) for entry in int8}
        floats = (e.dtype for e in checkpoint.values() if is_floating(e.dtype) and e not in scales)
        dtype = named if isinstance(named, str) and named in CASTABLE else next(floats, "float32")
    turned: set[str] = set()
    unknown = "no config.json tells which"
    if checkpoint.config is not None:
        try:
            origin = find_origin(checkpoint, make_model_request(trust_remote_code=trust_remote_code))
            skeleton = make_skeleton(origin, checkpoint, request.dtype)
            sources = match(checkpoint, skeleton, rules=request.rules).sources
            turned = {key for name, key in sources.items() if skeleton.targets[name].turned}
            unknown = ""
        except LowmemError as error:
            unknown = str(error)
    warnings: tuple[str, ...] = ()
    if unknown:
        text = "dequantize: weights are written as those of linear layers (GPT-2's are the transpose)"
        warnings = (f"{text}, for the model is unknown: {unknown}",)
    return Change(replace(request, from_int8=dtype, turned=turned), NOTHING, warnings)


def _to_int8(checkpoint: Checkpoint, request: ConvertRequest, int8: Int8Request, trust_remote_code: bool) -> Change:
    if checkpoint.config is None:
        raise ModelError(
            f"{checkpoint.source}: quantize='int8' (--quantize int8): expected a config.json beside the weights, by "
            "which linear layers are told from others, found none; put the model's own there, or load with "
            "quantize='int8'"
        )
    origin = find_origin(checkpoint, make_model_request(trust_remote_code=trust_remote_code))
    skeleton = make_skeleton(origin, checkpoint, request.dtype)
    if skeleton.rules.kind == "timm":
        raise UnsupportedError(
            f"{checkpoint.source}: quantize='int8' (--quantize int8): expected a model of transformers, whose config "
            "can say that its weights are int8, found one of timm; load with quantize='int8' instead"
        )
    mapping = match(checkpoint, skeleton, rules=request.rules)
    choice = choose_layers(checkpoint, skeleton, mapping, int8, ())
    keys, left = floats_that_become_int8(checkpoint, skeleton, mapping, choice.names)
    if not keys and choice.names and not left:
        raise ModelError(
            f"{checkpoint.source}: quantize='int8' (--quantize int8): its linear layers are int8 already; convert it "
            "without"
        )
    if not keys:
        raise ModelError(
            f"{checkpoint.source}: quantize='int8' (--quantize int8): expected linear layers to make int8, found none "
            f"in {type(skeleton.model).__name__}; convert it without"
        )
    warnings = [*skeleton.warnings, *choice.warnings]
    if left:
        warnings.append(
            f"{len(left)} layers stay floats, because the checkpoint does not have their weights in one piece "
            f"({left[0]!r}{', …' if len(left) > 1 else ''})"
        )
    names = [name for name in choice.names if name not in left]
    kept = _kept_in_fp32(skeleton, mapping, request.dtype)
    return Change(replace(request, to_int8=keys, in_fp32=kept), _described(skeleton, names, int8), tuple(warnings))


def _kept_in_fp32(skeleton: Skeleton, mapping: KeyMapping, dtype: str) -> set[str]:
    """Keys of what the model wants in fp32, as which transformers saves it: of a checkpoint that is int8 it casts none.

    See `HfQuantizer.get_new_dtype` in transformers/quantizers/base.py.
    """
    kept: set[str] = set()
    for half in ("float16", "bfloat16"):
        links = {
            link.target: link.entry.key
            for link in mapping.links
            if is_floating(link.entry.dtype) and (link.entry.dtype if dtype == "auto" else dtype) == half
        }
        kept.update(links[name] for name in skeleton.rules.keep_fp32(half, links))
    return kept


def _described(skeleton: Skeleton, names: list[str], int8: Int8Request) -> Mapping[str, Any]:
    """What transformers saves in the config of a model whose layers `names` are int8."""
    mark(skeleton.model, swap(skeleton.model, names), int8)
    model: Any = skeleton.model
    table: Mapping[str, Any] = json.loads(json.dumps(model.config.quantization_config.to_dict()))
    return table


def declare(config: dict[str, Any], declared: Declared) -> None:
    """Change, in place, what a config says of its weights; in its sub-configs it says nothing then."""
    if declared == KEEP:
        return
    _remove(config)
    if isinstance(declared, Mapping):
        config[_WHERE] = dict(declared)


def _remove(table: dict[str, Any]) -> None:
    table.pop(_WHERE, None)
    for value in table.values():
        if isinstance(value, dict):
            _remove(value)


def read_table(path: Path) -> dict[str, Any]:
    """What a JSON file says, if it is an object; empty otherwise."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        table = json.loads(read_small(path, MOST_OF_A_CONFIG))
        if isinstance(table, dict):
            return table
    return {}
