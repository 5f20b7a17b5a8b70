"""Models of transformers: built from `config.json` without weights, and finished by transformers' own rules.

What `from_pretrained` decides is read from the same attributes it reads (`transformers/modeling_utils.py`, version 5).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint import Checkpoint
from ..errors import ModelError, UnsupportedError
from .failures import refusing
from .targets import dtype_name


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ModelError(
            "config.json describes a transformers model, and transformers cannot be imported "
            f"({error}); install lowmem[transformers], or give model="
        ) from error
    if int(transformers.__version__.split(".")[0]) < 5:
        raise ModelError(f"expected transformers 5, found {transformers.__version__}; install lowmem[transformers]")
    return transformers


def is_transformers_model(model: nn.Module) -> bool:
    """Whether `model` is a transformers model, told without importing transformers."""
    return any(
        base.__name__ == "PreTrainedModel" and base.__module__.startswith("transformers.")
        for base in type(model).__mro__
    )


@dataclass(frozen=True, slots=True)
class Blueprint:
    """What `config.json` names: a model class, imported, and its config."""

    cls: Any
    config: Any


def read_blueprint(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Blueprint:
    """Read `config.json` beside the checkpoint and import the class that it names.

    Raises:
        ModelError: config.json is damaged, or names a class that does not exist.
        UnsupportedError: quantised weights, or code that the user did not allow.
    """
    assert checkpoint.config is not None
    with refusing(f"{checkpoint.config}: cannot be read"):
        table = _read_table(checkpoint.config)
    _refuse_quantised(checkpoint.config, table)
    for key in ("dtype", "torch_dtype"):
        _parse_dtype(table.get(key), key, checkpoint.config)
    transformers = _transformers()
    # whatever a config class raises for whatever a file says
    with refusing(f"{checkpoint.config}: transformers cannot read it"):
        config = transformers.AutoConfig.from_pretrained(
            str(checkpoint.folder), trust_remote_code=trust_remote_code, local_files_only=True
        )
        config.name_or_path = str(checkpoint.folder)
    with refusing(f"{checkpoint.config}: the class that it names cannot be imported"):
        cls = _model_class(transformers, config, checkpoint, trust_remote_code)
    return Blueprint(cls, config)


def build(blueprint: Blueprint, checkpoint: Checkpoint, dtype: str) -> nn.Module:
    """The model on meta, at its final dtypes.

    Args:
        blueprint: class and config.
        checkpoint: decides the dtype when neither the request nor the config does.
        dtype: `"auto"` (the config's, else that of the checkpoint's first float) or a torch name.

    Raises:
        ModelError: the class does not accept the config.
    """
    config = copy.deepcopy(blueprint.config)
    resolved = _resolve_dtype(config, checkpoint, dtype)
    # Some models ask a tensor for its value while they are built; transformers keeps those off meta.
    from transformers import initialization

    safe = getattr(initialization, "meta_device_safe_creation_ops", nullcontext)
    # whatever a model class raises for whatever a config says
    with (
        refusing(f"{checkpoint.config}: {blueprint.cls.__name__} cannot be built from it"),
        torch.device("meta"),
        safe(),
    ):
        model: nn.Module = blueprint.cls._from_config(config, dtype=resolved)
    if not hasattr(model, "all_tied_weights_keys"):
        raise ModelError(
            f"{checkpoint.config}: {blueprint.cls.__name__} is the base of models and no model (it never calls "
            "post_init); name a complete class in 'architectures', or give model="
        )
    return model


def _read_table(config: Path) -> dict[str, Any]:
    try:
        table = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{config}: not valid JSON ({error}); bring the model's own config.json") from error
    if not isinstance(table, dict):
        raise ModelError(f"{config}: expected a JSON object; bring the model's own config.json")
    return table


def _refuse_quantised(config: Path, table: Mapping[str, Any]) -> None:
    quantisation = table.get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else quantisation
        raise UnsupportedError(
            f"{config}: the weights are quantised ({method!r}), which lowmem does not load; "
            "use the checkpoint in fp32, bf16 or fp16"
        )


def _model_class(transformers: Any, config: Any, checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    architectures = getattr(config, "architectures", None)
    auto_map = getattr(config, "auto_map", None)
    if not isinstance(architectures, (list, tuple, type(None))):
        raise ModelError(
            f"{checkpoint.config}: 'architectures': expected a list of class names such as [\"LlamaForCausalLM\"], "
            f"found {architectures!r}; correct it, or give model="
        )
    if not isinstance(auto_map, (dict, type(None))):
        raise ModelError(
            f'{checkpoint.config}: \'auto_map\': expected an object such as {{"AutoModel": "file.Class"}}, found '
            f"{auto_map!r}; correct it, or give model="
        )
    for name in architectures or ():
        reference = next(
            (ref for ref in (auto_map or {}).values() if isinstance(ref, str) and ref.endswith(f".{name}")), None
        )
        if reference is not None and trust_remote_code:
            from transformers.dynamic_module_utils import get_class_from_dynamic_module

            with refusing(f"{checkpoint.config}: {name} cannot be imported from {reference!r}"):
                cls: Any = get_class_from_dynamic_module(reference, str(checkpoint.folder), local_files_only=True)
            if not isinstance(cls, type) or not hasattr(cls, "_from_config"):
                raise ModelError(
                    f"{checkpoint.config}: expected {reference!r} to be a PreTrainedModel, found {cls!r}; give model="
                )
            return cls
        with refusing(f"{checkpoint.config}: transformers cannot import {name!r}"):
            cls = getattr(transformers, str(name), None)
        if isinstance(cls, type) and hasattr(cls, "_from_config"):
            return cls
        if reference is not None:
            raise UnsupportedError(
                f"{checkpoint.config}: {name} is code beside the checkpoint ({reference}); "
                "pass trust_remote_code=True to run it"
            )
    if architectures:
        raise ModelError(
            f"{checkpoint.config}: transformers {transformers.__version__} has no class {architectures[0]!r}; "
            "update transformers, or give model="
        )
    # No class is named: the headless one, as AutoModel would choose.
    mapping = transformers.MODEL_MAPPING
    if type(config) not in mapping:
        raise ModelError(
            f"{checkpoint.config}: no 'architectures', and no model for {type(config).__name__}; give model="
        )
    return mapping[type(config)]


def _resolve_dtype(config: Any, checkpoint: Checkpoint, dtype: str) -> torch.dtype:
    """`"auto"` is the config's dtype, else that of the first float in the checkpoint."""
    named = None
    if dtype == "auto" and config.dtype is not None:
        assert checkpoint.config is not None
        named = _parse_dtype(config.dtype, "dtype", checkpoint.config)
    if dtype != "auto":
        resolved = dtype
    elif named is not None:
        resolved = dtype_name(named)
    else:
        usable = ("float64", "float32", "float16", "bfloat16")
        resolved = next((e.dtype for e in checkpoint.values() if e.dtype in usable), "float32")
    if resolved.startswith("float8"):
        raise UnsupportedError(f"dtype {resolved}: a transformers model cannot be built at this dtype; use bfloat16")
    value: torch.dtype = getattr(torch, resolved)
    return value


def _parse_dtype(value: Any, key: str, config: Path) -> torch.dtype | None:
    """A dtype as config.json may give it; one per sub-config counts by that of the whole, as `from_pretrained` has it.

    Raises:
        ModelError: it is no dtype.
    """
    found = value
    if isinstance(value, dict):
        found = value.get("", torch.get_default_dtype())
    if isinstance(found, str):
        found = getattr(torch, found, found)
    if found is None or isinstance(found, torch.dtype):
        return found
    raise ModelError(
        f'{config}: {key!r}: expected the name of a torch dtype, such as "bfloat16", or an object that gives one to '
        f"each sub-config, found {value!r}; correct it, or remove it and pass dtype="
    )


def read_generation_config(model: nn.Module, folder: Path | None) -> Any:
    """What `from_pretrained` would read as the model's generation config; None where it reads none.

    As there, a generation_config.json that is no JSON counts as absent, and `config.json` stands in.

    Args:
        model: a transformers model.
        folder: where the files are.

    Raises:
        ModelError: generation_config.json holds something else than generation options, or options that mean nothing.
    """
    hf: Any = model
    if folder is None or not hf.can_generate():
        return None
    from transformers import GenerationConfig

    file = folder / "generation_config.json"
    if file.is_file():
        with refusing(f"{file}: transformers cannot use it; correct it, or remove it"):
            try:
                return GenerationConfig.from_pretrained(str(folder), local_files_only=True)
            except OSError:
                pass
    if not (folder / "config.json").is_file():
        return None
    with refusing(f"{folder / 'config.json'}: transformers cannot make a generation config of it"):
        return GenerationConfig.from_pretrained(
            str(folder), config_file_name="config.json", _from_model_config=True, local_files_only=True
        )
