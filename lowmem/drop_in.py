"""`from_pretrained` of transformers with its own arguments, done by `load`.

The arguments are those of transformers 5.23 (`PreTrainedModel.from_pretrained` in modeling_utils.py, and
`_BaseAutoModelClass.from_pretrained` in models/auto/auto_factory.py).
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import logging
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ._small_files import MOST_OF_A_CONFIG, read_small
from .checkpoint import make_wish, survey
from .checkpoint.file_names import canonical_index, canonical_name
from .checkpoint.int8 import is_int8_weight
from .errors import KeysError, LowmemError, ModelError, OptionError, SourceError, UnsupportedError
from .loader import LoadResult, load
from .modeling.hf_conversions import reported
from .modeling.int8_choice import Int8Request
from .modeling.quantization_config import (
    accelerator,
    device_in_use,
    kept_off_the_gpu,
    parse_quantization_config,
)
from .modeling.request import ModelRequest, make_model_request
from .planner.request import flag
from .sizes import shown

_LOGGER = logging.getLogger("lowmem")
# Taken and ignored there, so here too; the last is what that version still takes from callers of old ones.
_RETIRED = ("mirror", "_fast_init", "low_cpu_mem_usage", "from_tf", "from_flax", "offload_state_dict", "_commit_hash")
# For telemetry and bars there.
_NOT_ABOUT_THE_MODEL = ("_from_auto", "_from_pipeline", "tqdm_class")
# Whether pickles may hold more than tensors; here nothing is unpickled.
_HOW_PICKLES_ARE_READ = ("weights_only",)
# Argument → what it is when it asks for nothing, and why it is refused when it asks for something.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "state_dict": ((None,), "lowmem loads from files; give the model its tensors with load_state_dict(assign=True)"),
    "gguf_file": ((None,), "GGUF files are not read; bring the model's safetensors"),
    "tp_plan": ((None,), "give distributed_config=DistributedConfig(...) instead"),
    "tp_size": ((None,), "give distributed_config=DistributedConfig(...) instead"),
    "device_mesh": ((None,), "give distributed_config=DistributedConfig(...) instead"),
    "fusion_config": ((None,), "fused modules are other modules than those of the checkpoint; leave it out"),
    "use_kernels": ((None, False), "call model.set_use_kernels(True) after the load"),
    "kernel_config": ((None,), "call model.set_use_kernels(True, kernel_config) after the load"),
    "allow_all_kernels": ((None, False), "kernels of the hub are code that is fetched; set attention after the load"),
    "adapter_kwargs": ((None, {}), "adapters are not applied; call model.load_adapter(...) after the load"),
    "adapter_name": ((None, "default"), "adapters are not applied; call model.load_adapter(...) after the load"),
    "offload_buffers": ((None, False), "buffers of layers on disk stay in memory; leave it out"),
}
# Arguments that only matter where something is fetched or looked up in the hub's cache.
_OF_THE_HUB: dict[str, tuple[tuple[Any, ...], str]] = {
    "cache_dir": ((None,), "set HF_HUB_CACHE instead"),
    "force_download": ((None, False), "fetch it anew with `hf download --force-download`"),
    "proxies": ((None, {}), "set HTTPS_PROXY instead"),
    "code_revision": ((None, "main"), "code is taken from the same revision as the weights"),
}
# Options of `load` that are no argument of `from_pretrained` and no likely attribute of a config.
_OWN = (
    "ram",
    "staging",
    "keep_fp32",
    "residency",
    "io",
    "prefetch",
    "keep_cache",
    "dispatch",
    "no_split",
    "weights",
    "ema",
    "download",
    "only",
    "skip",
    "rename",
    "reshape",
    "progress",
    *("quantize", "skip_modules", "dequantize", "int8_threshold"),
)
# How the plan says of keys what transformers' report says too.
_OF_KEYS = ("are not in the model and are not read", "are initialised by the model's own rule")


# Arguments of `from_pretrained` that do something here.
_SERVED = (
    "attn_implementation",
    "config",
    "device_map",
    "dtype",
    "experts_implementation",
    "generation_config",
    "ignore_mismatched_sizes",
    "key_mapping",
    "local_files_only",
    "max_memory",
    "offload_folder",
    "output_loading_info",
    "quantization_config",
    "revision",
    "subfolder",
    "torch_dtype",
    "trust_remote_code",
    "use_safetensors",
    "variant",
)


def from_pretrained(
    cls: Any, pretrained_model_name_or_path: str | os.PathLike[str], *model_args: Any, **kwargs: Any
) -> Any:
    """What `cls.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)` gives, in bounded memory.

    Arguments of transformers' own do here what they do there. Those that lowmem cannot serve are refused by name,
    unless they ask for nothing, and those that transformers ignores are ignored. Arguments of neither become attributes
    of the config, or go to the model's `__init__`, as there. As there, missing tensors are initialised by the model's
    own rule and reported by transformers' logger, and tensors of another shape are refused unless
    `ignore_mismatched_sizes`. Nothing is fetched without `download=True`. What else the plan warns of, such as an
    adapter that was not applied, goes to the logger `lowmem`.

    `quantization_config` is a `BitsAndBytesConfig(load_in_8bit=True)` or the equal dictionary, and works without
    bitsandbytes too. Of a checkpoint that is int8 already its own settings count, with a warning as there. Where there
    is a GPU, an int8 model without a `device_map` goes to it, as there. int8 runs on the CPU and from disk too, which
    transformers refuses for a part of a model; with `llm_int8_enable_fp32_cpu_offload=True` the modules that a table
    `device_map` puts on `"cpu"` or `"disk"` stay floats, as there.

    Keys under a prefix that transformers does not know are found as `load` finds them, where it would leave the model
    untrained; a checkpoint of which next to nothing fits is refused.

    Args:
        cls: a class of transformers: an auto class such as `AutoModelForCausalLM`, or a model class.
        pretrained_model_name_or_path: whatever `load` takes as a source.
        model_args: what the model's `__init__` is given behind the config.
        kwargs: arguments of `from_pretrained`, and of `load`: `ram`, `staging`, `keep_fp32`, `residency`, `io`,
            `prefetch`, `keep_cache`, `dispatch`, `no_split`, `weights`, `ema`, `download`, `only`, `skip`, `rename`,
            `reshape`, `progress`, `quantize`, `skip_modules`, `dequantize`, `int8_threshold`.

    Returns:
        The model in eval mode; with `output_loading_info=True` the model and the dictionary that `from_pretrained`
        gives: `missing_keys`, `unexpected_keys`, `mismatched_keys`, `error_msgs`.

    Raises:
        UnsupportedError: an argument, or a checkpoint, that only transformers itself serves.
        LowmemError: as `load`. Where `from_pretrained` raises `OSError` (nothing to load from), `RuntimeError` (tensors
            of another shape) or `TypeError` (an argument that nobody knows), the error is one of these too.
    """
    if not isinstance(cls, type) or not (hasattr(cls, "_from_config") or hasattr(cls, "_model_mapping")):
        raise OptionError(
            f"cls: expected a class of transformers that makes models, such as AutoModelForCausalLM, found {shown(cls)}"
        )
    if pretrained_model_name_or_path is None:
        raise UnsupportedError(
            "pretrained_model_name_or_path: expected a path or a name, found None; there are no weights"
        )
    name = os.fspath(pretrained_model_name_or_path)
    given = dict(kwargs)
    with_info = flag(given.pop("output_loading_info", False), "output_loading_info")
    options = _placement(given)
    options.update({option: given.pop(option) for option in _OWN if option in given})
    if given.pop("disable_mmap", None):
        options = {"residency": "copy", "io": "buffered", **options}
    options["dtype"] = _dtype(given)
    options["ignore_mismatched_sizes"] = given.pop("ignore_mismatched_sizes", False)
    asked = None
    try:
        wanted = _quantization(given, options)
        source = _source(pretrained_model_name_or_path, given, options)
        _refuse(given)
        asked = _model(cls, name, model_args, given)
        asked = _int8_options(wanted, source, asked, options)
        result = load(source, model=asked, strict="shapes", **options)
    except LowmemError as error:
        known = _as_there(error, cls, asked)
        if known is error:
            raise
        raise known from error.__cause__
    model = result.model
    info = _loading_info(result, asked)
    _report(model, name, info, options["ignore_mismatched_sizes"])
    _say(result)
    return (model, info) if with_info else model


def _placement(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments that say where weights go, as `load` takes them."""
    from transformers import modeling_utils

    device_map = given.pop("device_map", None)
    if device_map is None:
        # `with torch.device("cuda"):` and `torch.set_default_device` count, as there.
        ambient: Any = modeling_utils.get_torch_context_manager_or_global_device
        device_map = ambient()
        if device_map is not None and device_map.type == "meta":
            raise OptionError(
                "the default device is meta, which has no room for weights; call from_pretrained outside of "
                "torch.device('meta')"
            )
    if device_map == "cuda":
        device_map = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return {
        "device_map": device_map,
        "max_memory": given.pop("max_memory", None),
        "offload_folder": given.pop("offload_folder", None),
    }


def _dtype(given: dict[str, Any]) -> Any:
    dtype, old = given.pop("dtype", None), given.pop("torch_dtype", None)
    asked = old if dtype is None else dtype
    return "auto" if asked is None else asked


def _source(path: str | os.PathLike[str], given: dict[str, Any], options: dict[str, Any]) -> str | os.PathLike[str]:
    """What `load` is to open.

    Raises:
        UnsupportedError: an argument about the hub that lowmem cannot serve, or files that are not chosen so.
    """
    local = _on_disk(path)
    only_local = given.pop("local_files_only", False)
    if only_local and options.get("download"):
        raise OptionError("download: True contradicts local_files_only=True; leave one of them out")
    for name, (idle, remedy) in _OF_THE_HUB.items():
        value = given.pop(name, None)
        if local is None and value not in idle:
            raise UnsupportedError(f"{name}: lowmem does not take {shown(value)} for a model of the hub; {remedy}")
    if given.pop("token", None) is not None and options.get("download"):
        raise UnsupportedError("token: lowmem fetches with the token of `hf auth login` or HF_TOKEN; set it there")
    revision, safetensors = given.pop("revision", None), given.pop("use_safetensors", None)
    chosen = {"variant": given.pop("variant", None), "subfolder": given.pop("subfolder", None) or None}
    if safetensors is not None:
        if local is None or not local.is_dir():
            raise UnsupportedError(
                f"use_safetensors: lowmem takes {shown(safetensors)} for a local folder only, found {shown(path)}; "
                "leave it out, safetensors go first, or give the path of the file"
            )
        return _file_in(local / (chosen["subfolder"] or ""), chosen["variant"], safetensors)
    options.update(chosen)
    if local is None and revision != "main":
        options["revision"] = revision
    return path


def _on_disk(path: str | os.PathLike[str]) -> Path | None:
    """What a source is as a path, which `load` believes first."""
    try:
        found = Path(path).expanduser()
        return found if found.exists() else None
    except (OSError, RuntimeError, ValueError):
        # Why it cannot be followed is for `load` to say.
        return None


def _file_in(folder: Path, variant: str | None, safetensors: bool) -> Path:
    """The file of weights or the index of the kind that was asked for.

    Raises:
        SourceError: there is none.
    """
    pickled = not flag(safetensors, "use_safetensors")
    names = [canonical_name(pickled, variant), canonical_index(pickled, variant)]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise SourceError(f"{folder}: expected {' or '.join(names)}, found neither; leave use_safetensors= out")
    return found


def _quantization(given: dict[str, Any], options: Mapping[str, Any]) -> Any:
    """The `BitsAndBytesConfig` that was given, or None.

    Raises:
        OptionError: an option says the same, or the opposite.
        UnsupportedError: it asks for something else than int8.
    """
    wanted = parse_quantization_config(given.pop("quantization_config", None))
    for name in ("quantize", "skip_modules", "dequantize", "int8_threshold"):
        if wanted is not None and options.get(name) is not None and options[name] is not False:
            raise OptionError(f"quantization_config: {name}= is about int8 too, or against it; leave one of them out")
    return wanted


def _int8_options(
    wanted: Any, source: str | os.PathLike[str], asked: ModelRequest, options: dict[str, Any]
) -> ModelRequest:
    """Fill in the device of an int8 model, and let the request say what a `quantization_config` asks."""
    kind = accelerator() if options["device_map"] is None and not options.get("dequantize") else None
    quantised = options.get("quantize") is not None
    if wanted is not None or (kind is not None and not quantised and _may_be_int8(source, options)):
        chosen = {name: options[name] for name in ("variant", "subfolder", "revision", "download") if name in options}
        found = survey(source, **chosen).glance(make_wish(options.get("weights"), options.get("ema")))
        if any(is_int8_weight(found, entry) for entry in found.values()):
            quantised = True
            if wanted is not None:
                warnings.warn(
                    "quantization_config: the checkpoint is int8 already, and what its own config says counts",
                    stacklevel=3,
                )
        elif wanted is not None:
            quantised = True
            skips = wanted.llm_int8_skip_modules
            int8 = Int8Request(
                quantize=True,
                skip_modules=None if skips is None else tuple(skips),
                threshold=wanted.llm_int8_threshold,
                also_skip=tuple(kept_off_the_gpu(wanted, options["device_map"])),
                config=wanted,
            )
            asked = dataclasses.replace(asked, int8=int8)
    if quantised and kind is not None:
        options["device_map"] = device_in_use(kind)
    return asked


def _may_be_int8(source: str | os.PathLike[str], options: Mapping[str, Any]) -> bool:
    """What a config in a folder does not rule out; its headers need not be looked at twice then."""
    config = Path(os.fspath(source), options.get("subfolder") or "", "config.json")
    try:
        return b'"quantization_config"' in read_small(config, MOST_OF_A_CONFIG)
    except (OSError, ValueError):
        return True


def _key_mapping(mapping: Any) -> dict[str, str]:
    """The user's renames, which transformers applies before its own.

    Raises:
        OptionError: they mean nothing to it.
    """
    if mapping is None:
        return {}
    if not isinstance(mapping, Mapping) or not all(isinstance(text, str) for pair in mapping.items() for text in pair):
        raise OptionError(f"key_mapping: expected {{pattern: replacement}}, both text, found {shown(mapping)}")
    from transformers.core_model_loading import WeightRenaming

    for old, new in mapping.items():
        try:
            WeightRenaming(source_patterns=old, target_patterns=new)
        except (re.error, ValueError) as error:
            rule = f"key_mapping: {shown(old)}: {shown(new)}"
            raise OptionError(f"{rule}: transformers does not take it: {error}; correct it") from error
    return dict(mapping)


def _refuse(given: dict[str, Any]) -> None:
    """Take out of `given` what transformers ignores or what asks for nothing.

    Raises:
        UnsupportedError: what is left asks for what lowmem does not do.
    """
    for name in (*_RETIRED, *_NOT_ABOUT_THE_MODEL, *_HOW_PICKLES_ARE_READ):
        given.pop(name, None)
    for name, (idle, remedy) in _REFUSED.items():
        value = given.pop(name, None)
        if not any(value is none or (type(value) is type(none) and value == none) for none in idle):
            raise UnsupportedError(f"{name}: lowmem does not take {shown(value)}: {remedy}")


def _model(cls: Any, name: str, model_args: tuple[Any, ...], given: dict[str, Any]) -> ModelRequest:
    """What is asked about the model: all that is left, for the config or for the class."""
    beside = {
        "model_args": model_args,
        "key_mapping": _key_mapping(given.pop("key_mapping", None)),
        "generation_config": given.pop("generation_config", None),
        "name": name,
    }
    asked = make_model_request(
        auto_class=cls,
        config=given.pop("config", None),
        attn_implementation=given.pop("attn_implementation", None),
        experts_implementation=given.pop("experts_implementation", None),
        trust_remote_code=flag(given.pop("trust_remote_code", None) or False, "trust_remote_code"),
        distributed_config=given.pop("distributed_config", None),
        model_kwargs=given,
    )
    return dataclasses.replace(asked, **beside)


class MissingSourceError(SourceError, OSError):
    """A `SourceError` for whoever falls back on `OSError`, as `from_pretrained` has it."""


class DifferentKeysError(KeysError, RuntimeError):
    """A `KeysError` for whoever catches `RuntimeError`, as `from_pretrained` has it."""


class UnknownArgumentError(ModelError, TypeError):
    """An argument that neither `from_pretrained`, the config nor the class knows: a `TypeError`, as there."""


def _as_there(error: LowmemError, cls: type, asked: ModelRequest | None) -> LowmemError:
    """The error of a kind that callers of `from_pretrained` know too, with the option that was probably meant."""
    if type(error) is SourceError:
        return MissingSourceError(str(error))
    if type(error) is KeysError:
        return DifferentKeysError(str(error))
    if asked is None or not isinstance(error.__cause__, TypeError):
        return error
    for name in asked.model_kwargs:
        if f"unexpected keyword argument {name!r}" in str(error):
            near = difflib.get_close_matches(name, [*_SERVED, *(own for own in _OWN if own != "download")], n=1)
            hint = f". Did you mean {near[0]!r}?" if near else ""
            return UnknownArgumentError(
                f"from_pretrained() got an unexpected keyword argument {name!r}: it is no attribute of the config and "
                f"no argument of {cls.__name__} either{hint}"
            )
    return error


def _loading_info(result: LoadResult, asked: ModelRequest) -> dict[str, Any]:
    """The dictionary of `LoadStateDictInfo.to_dict` (transformers/utils/loading_report.py)."""
    import torch

    mapping = result.plan.mapping
    unexpected = reported(result.model, mapping.unexpected, asked.key_mapping) if mapping.unexpected else set()
    return {
        "missing_keys": set(mapping.missing),
        "unexpected_keys": unexpected,
        "mismatched_keys": {(m.target, torch.Size(m.found), torch.Size(m.expected)) for m in mapping.mismatched},
        "error_msgs": [],
    }


def _report(model: nn.Module, name: str, info: Mapping[str, Any], ignore_mismatched_sizes: bool) -> None:
    """What transformers would log of missing, unexpected and mismatched keys, by its own words."""
    if not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]):
        return
    from transformers.modeling_utils import logger
    from transformers.utils.loading_report import LoadStateDictInfo, log_state_dict_report

    fields = inspect.signature(LoadStateDictInfo).parameters
    empty: dict[str, Any] = {"conversion_errors": {}, "skipped_pp_keys": set()}
    values = {field: value for field, value in {**empty, **info}.items() if field in fields}
    report: Any = log_state_dict_report
    report(model, name, ignore_mismatched_sizes, LoadStateDictInfo(**values), logger)


def _say(result: LoadResult) -> None:
    """The plan's warnings, but for those of keys, which transformers' report has."""
    told = set(result.plan.mapping.suggestions)
    for warning in result.plan.warnings:
        if warning not in told and not any(phrase in warning for phrase in _OF_KEYS):
            _LOGGER.warning(warning)


__all__ = ["from_pretrained"]
