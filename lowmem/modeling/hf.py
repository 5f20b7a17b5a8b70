"""Models of transformers: built from `config.json` without weights, and finished by transformers' own rules.

What `from_pretrained` decides is read from the same attributes it reads (`transformers/modeling_utils.py`, version 5).
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._files import read_config
from ..checkpoint import Checkpoint
from ..checkpoint.int8 import has_scales
from ..checkpoint.there import is_file_at, is_there, looking_at
from ..errors import ModelError, OptionError, UnsupportedError
from .alone import as_before
from .classes import Chosen, choose
from .demands import counted, refuse_endless
from .failures import refusing
from .parallel import distributed_model, prepared
from .quantised import DEFAULT_THRESHOLD, int8_config, refuse_quantised
from .request import ModelRequest
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


@dataclass(frozen=True, slots=True, eq=False)
class Blueprint:
    """What a transformers model is built from: a class, imported, and its config.

    Attributes:
        chosen: both, and what the class is given besides.
        request: what was asked.
        where: what errors call the config.
        warnings: what lies in the folder and was left alone.
    """

    chosen: Chosen
    request: ModelRequest
    where: str
    warnings: tuple[str, ...] = ()


def read_blueprint(checkpoint: Checkpoint, request: ModelRequest) -> Blueprint:
    """Read `config.json` beside the checkpoint, or the config that was given, and import the class.

    Raises:
        ModelError: the config is damaged, or names a class that does not exist.
        OptionError: what was asked is nothing of transformers.
        UnsupportedError: quantised weights, or code that the user did not allow.
    """
    where = str(checkpoint.config)
    if request.config is not None:
        where = f"config={request.config!r}" if isinstance(request.config, str) else "config="
    if request.config is None:
        assert checkpoint.config is not None
        with refusing(f"{where}: cannot be read"):
            table = _read_table(checkpoint.config)
        refuse_endless(where, table, checkpoint)
        refuse_quantised(checkpoint, where, table)
        for key in ("dtype", "torch_dtype"):
            _parse_dtype(table.get(key), key, where)
    transformers = _transformers()
    chosen = choose(transformers, where, checkpoint.folder, request)
    if request.config is not None:
        with refusing(f"{where}: transformers cannot write it down"):
            table = chosen.config.to_dict()
        refuse_quantised(checkpoint, where, table)
        _refuse_int8_of_floats(checkpoint, where, table)
    _check_int8(transformers, where, table)
    chosen.config.name_or_path = _name_of(checkpoint) if request.name is None else request.name
    return Blueprint(chosen, request, where, tuple(_left_alone(checkpoint.folder, request)))


def _check_int8(transformers: Any, where: str, table: Mapping[str, Any]) -> None:
    """What a config says of int8 becomes a `BitsAndBytesConfig` when all is loaded: it must be able to.

    Raises:
        ModelError: it is not.
    """
    said = table.get("quantization_config")
    if isinstance(said, dict) and int8_config(table, where) is not None:
        with refusing(f"{where}: quantization_config: BitsAndBytesConfig does not take it"):
            threshold = float(said.get("llm_int8_threshold", DEFAULT_THRESHOLD))
            transformers.BitsAndBytesConfig(**{**said, "llm_int8_threshold": threshold})


def _refuse_int8_of_floats(checkpoint: Checkpoint, where: str, table: Mapping[str, Any]) -> None:
    """A config that is given must not say that floats are int8: what is saved with it could not be loaded.

    Raises:
        UnsupportedError: it does.
    """
    if int8_config(table, where) is not None and not has_scales(checkpoint):
        raise UnsupportedError(
            f"{where}: quantization_config says that the weights are int8, and {checkpoint.source} has none that are; "
            "remove it from the config, and give quantize='int8' to load, or quantization_config= to from_pretrained, "
            "to make them so"
        )


def _name_of(checkpoint: Checkpoint) -> str:
    """What `from_pretrained` would have been given: `org/name` of a model in the hub's cache, else the folder.

    The cache's folders are named as huggingface_hub/file_download.py does (`repo_folder_name`).
    """
    if not is_there(Path(checkpoint.source).expanduser()):
        for part in checkpoint.folder.parts:
            if part.startswith("models--"):
                return part.removeprefix("models--").replace("--", "/")
    return str(checkpoint.folder)


def _left_alone(folder: Path, request: ModelRequest) -> Iterator[str]:
    code = folder / "custom_generate" / "generate.py"
    if is_file_at(code) and not request.trust_remote_code:
        yield f"{code}: code for generate(), which did not run; trust_remote_code=True lets it"


def build(blueprint: Blueprint, checkpoint: Checkpoint, dtype: str) -> nn.Module:
    """The model on meta, at its final dtypes.

    Args:
        blueprint: class and config.
        checkpoint: decides the dtype when neither the request nor the config does.
        dtype: `"auto"` (the config's, else that of the checkpoint's first float) or a torch name.

    Raises:
        ModelError: the class does not accept the config.
        OptionError: it does not accept a way of computing that was asked for.
    """
    chosen, where = blueprint.chosen, blueprint.where
    base = f"{where}: {chosen.cls.__name__} is the base of models and no model (it never calls post_init); name a"
    if chosen.cls is _transformers().PreTrainedModel:
        # Once one was built, it would answer for every class whether experts can be computed in other ways.
        raise ModelError(f"{base} complete class in 'architectures', or give model=")
    config = copy.deepcopy(chosen.config)
    resolved = _resolve_dtype(config, checkpoint, dtype, where)
    given = {**named_arguments(chosen.cls, blueprint.request.model_args), **chosen.model_kwargs}
    # Some models ask a tensor for its value while they are built; transformers keeps those off meta.
    from transformers import initialization

    safe = getattr(initialization, "meta_device_safe_creation_ops", nullcontext)
    settled, meshes = prepared(chosen.cls, config, blueprint.request.distributed_config)
    # whatever a model class raises for whatever a config says
    with (
        as_before(),
        refusing(f"{where}: {chosen.cls.__name__} cannot be built from it"),
        _refusing_implementations(blueprint),
        torch.device("meta"),
        safe(),
        nullcontext() if meshes is None else initialization.no_tie_weights(),
        counted(where, checkpoint),
    ):
        model: nn.Module = chosen.cls._from_config(config, dtype=resolved, **given)
    if not hasattr(model, "all_tied_weights_keys"):
        raise ModelError(f"{base} complete class in 'architectures', or give model=")
    return distributed_model(model, settled, meshes)


def named_arguments(cls: Any, arguments: Sequence[Any]) -> dict[str, Any]:
    """The arguments behind the config by the names that the class has for them.

    Raises:
        OptionError: it has no names for so many.
    """
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in inspect.signature(cls.__init__).parameters.values() if p.kind in kinds][2:]
    if len(arguments) > len(names):
        raise OptionError(
            f"model_args: {cls.__name__} takes {len(names)} behind its config, found {len(arguments)}; leave the "
            "others out, or give them by name"
        )
    return dict(zip(names, arguments, strict=False))


@contextmanager
def _refusing_implementations(blueprint: Blueprint) -> Iterator[None]:
    """What a class says of a way of computing that it does not have is about the option, not the config."""
    try:
        yield
    except (ValueError, ImportError) as error:
        text = str(error).lower()
        for name, value in blueprint.request.implementations.items():
            words = _ATTENTION if name == "attn_implementation" else _EXPERTS
            if any(word in text for word in words):
                raise OptionError(
                    f"{name}: {blueprint.chosen.cls.__name__} does not take {value!r}: {error}"
                ) from error
        raise


# What transformers' refusals speak of (`get_correct_attn_implementation` and what it calls).
_ATTENTION = ("attn_implementation", "attention", "flash", "sdpa", "flex", "kernel")
_EXPERTS = ("experts_implementation", "grouped_mm", "expert")


def _read_table(config: Path) -> dict[str, Any]:
    try:
        with looking_at(config):
            text = read_config(config)
        table = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{config}: not valid JSON ({error}); bring the model's own config.json") from error
    if not isinstance(table, dict):
        raise ModelError(f"{config}: expected a JSON object; bring the model's own config.json")
    return table


def _resolve_dtype(config: Any, checkpoint: Checkpoint, dtype: str, where: str) -> torch.dtype:
    """`"auto"` is the config's dtype, else what the index says, else that of the first float in the checkpoint."""
    named = _parse_dtype(config.dtype, "dtype", where) if dtype == "auto" and config.dtype is not None else None
    if dtype != "auto":
        resolved = dtype
    elif named is not None:
        resolved = dtype_name(named)
    else:
        resolved = _dtype_in_index(checkpoint) or _first_float(checkpoint)
    if resolved.startswith("float8"):
        raise UnsupportedError(f"dtype {resolved}: a transformers model cannot be built at this dtype; use bfloat16")
    value: torch.dtype = getattr(torch, resolved)
    return value


def _dtype_in_index(checkpoint: Checkpoint) -> str | None:
    """The dtype in the metadata of an index, which `_get_dtype` believes before the tensors."""
    if checkpoint.index is None:
        return None
    metadata = _read_table(checkpoint.index).get("metadata")
    named = metadata.get("dtype") if isinstance(metadata, dict) else None
    found = _parse_dtype(named, "metadata.dtype", str(checkpoint.index))
    return None if found is None else dtype_name(found)


def _first_float(checkpoint: Checkpoint) -> str:
    """The dtype of the first float as `_get_dtype` finds it: in the first file, in the order in which that is opened.

    safetensors gives keys in alphabetic order, whatever order the file has them in.
    """
    usable = ("float64", "float32", "float16", "bfloat16")
    entries = list(checkpoint.values())
    if entries and checkpoint.shards[0].container == "safetensors":
        files = {shard.file: shard.file.name for shard in checkpoint.shards}
        entries.sort(key=lambda entry: (files[entry.file], entry.key))
    return next((entry.dtype for entry in entries if entry.dtype in usable), "float32")


def _parse_dtype(value: Any, key: str, where: str) -> torch.dtype | None:
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
        f'{where}: {key!r}: expected the name of a torch dtype, such as "bfloat16", or an object that gives one to '
        f"each sub-config, found {value!r}; correct it, or remove it and pass dtype="
    )
