"""The options of a load or a stream, parsed into a `LoadRequest` or `StreamRequest`."""

from __future__ import annotations

import difflib
import errno
import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, get_args

import torch

from .._shared import interrupt_behind
from ..dtypes import parse_dtype
from ..errors import OptionError
from ..mapping.presets import find_preset
from ..mapping.records import KeyRules, RenameRule
from ..mapping.transforms import Transform
from ..modeling.alone import Modes
from ..modeling.int8_choice import Int8Request
from ..sizes import parse_size, shown
from .budget import MIN_STAGING
from .devices import device_name, parse_device_map, parse_max_memory
from .records import IO, LoadRequest, StreamRequest

P = ParamSpec("P")
R = TypeVar("R")
Names = str | Iterable[str] | Callable[[str], bool] | None
Renames = (
    Mapping[str, str]
    | Callable[[str], str]
    | Iterable["tuple[str, str] | Mapping[str, str] | Callable[[str], str]"]
    | None
)

FilterFunction = Callable[..., Mapping[str, Any]] | None
TransformsOption = Mapping[str, Transform] | None

# What mmengine, torch, timm and transformers call what has another name here.
_ELSEWHERE = {
    "revise_keys": "rename=",
    "map_location": "device_map=",
    "checkpoint": "source",
    "checkpoint_path": "source",
    "filename": "source",
    "torch_dtype": "dtype=",
    "use_ema": "ema=",
    "load_in_8bit": "quantize='int8'",
    "key_mapping": "rename=",
}


def checks_names(verb: Callable[P, R]) -> Callable[P, R]:
    """Decorate a verb: an option that it does not have is refused under the verb's own name, with the nearest one.

    As Python 3.13 says it. A verb that takes `**options` has those of `make_request`.
    """
    parameters = inspect.signature(verb).parameters.values()
    known = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    if len(known) < len(parameters):
        known += inspect.signature(make_request).parameters

    @functools.wraps(verb)
    def checked(*args: P.args, **options: P.kwargs) -> R:
        unknown = next((name for name in options if name not in known), None)
        if unknown is not None:
            near = difflib.get_close_matches(unknown, known, n=1, cutoff=0.7)
            hint = f". Did you mean {near[0]!r}?" if near else ""
            if unknown in _ELSEWHERE and _ELSEWHERE[unknown].partition("=")[0] in known:
                hint = f"; what others call so is {_ELSEWHERE[unknown]} here"
                near = [unknown]
            if not near and "model_kwargs" in known:
                hint = "; what is an attribute of the model's config goes into model_kwargs="
            raise TypeError(f"{verb.__name__}() got an unexpected keyword argument {shown(unknown)}{hint}")
        modes = Modes()
        # No `with`: its end is Python's code, in which a second Ctrl-C would leave them.
        try:
            return verb(*args, **options)
        except KeyboardInterrupt as interrupt:
            modes.restore(interrupt)
            raise
        except Exception as error:
            # What a Ctrl-C left half done, another's code may have met.
            behind = interrupt_behind(error, modes.outside)
            if behind is None:
                raise
            modes.restore(error)
            raise behind from None

    return checked


def make_request(
    *,
    dtype: Any = "auto",
    device_map: Any = None,
    max_memory: Mapping[Any, int | str] | None = None,
    ram: int | str | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    keep_fp32: Iterable[str] | None = (),
    residency: str = "map",
    strict: bool | str = True,
    staging: int | str | None = None,
    no_split: Iterable[str] | None = None,
    io: str = "auto",
    prefetch: bool = False,
    keep_cache: bool = False,
    dispatch: str = "lowmem",
    prefix: str | None = None,
    only: Names = None,
    skip: Names = None,
    rename: Renames = None,
    reshape: str | Iterable[str] | None = None,
    preset: str | None = None,
    filter_fn: FilterFunction = None,
    transforms: TransformsOption = None,
    ignore_mismatched_sizes: bool = False,
    quantize: str | None = None,
    skip_modules: str | Iterable[str] | None = None,
    dequantize: bool = False,
    int8_threshold: float | None = None,
    read: str = "auto",
) -> LoadRequest:
    """Parse the options of `load`.

    Raises:
        OptionError: a value that means nothing.
    """
    if not isinstance(residency, str) or residency not in ("map", "copy"):
        raise OptionError(f"residency: expected 'map' or 'copy', found {shown(residency)}")
    if not isinstance(dispatch, str) or dispatch not in ("lowmem", "accelerate"):
        raise OptionError(f"dispatch: expected 'lowmem' or 'accelerate', found {shown(dispatch)}")
    if not isinstance(read, str) or read not in ("auto", "each", "once"):
        raise OptionError(f"read: expected 'auto', 'each' or 'once', found {shown(read)}")
    return LoadRequest(
        dtype=whole_dtype(dtype),
        unused_dtypes=tuple(part for part in dtype if part) if isinstance(dtype, Mapping) else (),
        device_map=parse_device_map(device_map),
        max_memory=parse_max_memory(max_memory),
        ram=None if ram is None else parse_size(ram, "ram"),
        staging=parse_staging(staging),
        offload_folder=None if offload_folder is None else parse_folder(offload_folder, "offload_folder"),
        keep_fp32=() if keep_fp32 is None else names_of(keep_fp32, "keep_fp32"),
        residency="map" if residency == "map" else "copy",
        strict=parse_strict(strict),
        no_split=None if no_split is None else names_of(no_split, "no_split"),
        io=parse_io(io),
        prefetch=flag(prefetch, "prefetch"),
        keep_cache=flag(keep_cache, "keep_cache"),
        dispatch="lowmem" if dispatch == "lowmem" else "accelerate",
        keys=make_key_rules(
            prefix=prefix,
            only=only,
            skip=skip,
            rename=rename,
            reshape=reshape,
            preset=preset,
            filter_fn=filter_fn,
            transforms=transforms,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
        ),
        int8=make_int8_request(quantize, skip_modules, dequantize, int8_threshold),
        read=None if read == "auto" else "each" if read == "each" else "once",
    )


def make_int8_request(
    quantize: str | None = None,
    skip_modules: str | Iterable[str] | None = None,
    dequantize: bool = False,
    int8_threshold: float | None = None,
) -> Int8Request:
    """Parse what the user says about int8; see `load`.

    Raises:
        OptionError: a value that means nothing, or two that exclude each other.
    """
    if quantize is not None and (not isinstance(quantize, str) or quantize != "int8"):
        raise OptionError(f"quantize: expected 'int8' or None, found {shown(quantize)}")
    if flag(dequantize, "dequantize") and quantize is not None:
        raise OptionError("quantize and dequantize: the one makes int8 and the other floats; leave one of them out")
    if skip_modules is not None and quantize is None:
        raise OptionError("skip_modules: it is about layers that quantize='int8' makes int8; give that too")
    is_number = isinstance(int8_threshold, (int, float)) and not isinstance(int8_threshold, bool)
    if int8_threshold is not None and not (is_number and 0 <= int8_threshold <= sys.float_info.max):
        raise OptionError(f"int8_threshold: expected a number, 0 or more, found {shown(int8_threshold)}")
    return Int8Request(
        quantize=quantize is not None,
        skip_modules=None if skip_modules is None else names_of(skip_modules, "skip_modules"),
        dequantize=dequantize,
        threshold=None if int8_threshold is None else float(int8_threshold),
    )


def whole_dtype(value: Any) -> str:
    """The dtype of the whole model; of sub-config → dtype that of `""`, which is all that transformers 5 looks at.

    Without one for the whole it is torch's default, as in transformers' `_get_dtype`.

    Raises:
        OptionError: not a float dtype that weights can be cast to.
    """
    if not isinstance(value, Mapping):
        return parse_dtype(value)
    parsed = {part: parse_dtype(dtype, f"dtype[{part!r}]") for part, dtype in value.items()}
    whole = parsed.get("", parse_dtype(torch.get_default_dtype()))
    if whole == "auto":
        raise OptionError("dtype['']: expected a float dtype, found 'auto'; 'auto' is for the whole: dtype='auto'")
    return whole


def parse_strict(value: bool | str) -> bool | Literal["shapes"]:
    """What is refused: missing and mismatched tensors, mismatched ones only, or neither.

    Raises:
        OptionError: something else.
    """
    if isinstance(value, str) and value == "shapes":
        return "shapes"
    if not isinstance(value, bool):
        raise OptionError(f"strict: expected True or False, or 'shapes', found {shown(value)}")
    return value


def make_key_rules(
    *,
    prefix: str | None = None,
    only: Names = None,
    skip: Names = None,
    rename: Renames = None,
    reshape: str | Iterable[str] | None = None,
    preset: str | None = None,
    filter_fn: FilterFunction = None,
    transforms: TransformsOption = None,
    ignore_mismatched_sizes: bool = False,
) -> KeyRules:
    """Parse what the user says about keys.

    Args:
        prefix: take only the keys inside this module, without it.
        only: names, patterns with `*`, or a function of a key: what to take. None for everything.
        skip: likewise, what to leave.
        rename: regular expression → replacement, a function of a key, or a list of such pairs and functions.
        reshape: names of the model's tensors, or patterns, that may be fed from another shape of as many elements.
        preset: name of a known change of layout.
        filter_fn: a function of a state dict, or of one and the model.
        transforms: names of the model's tensors, or patterns → what is done to what feeds them.
        ignore_mismatched_sizes: initialise what has another shape.

    Raises:
        OptionError: a value that means nothing.
    """
    if prefix is not None and (not isinstance(prefix, str) or not prefix.rstrip(".")):
        raise OptionError(f"prefix: expected the name of a module such as 'backbone', found {shown(prefix)}")
    return KeyRules(
        prefix=None if prefix is None else prefix.rstrip("."),
        only=only if only is None or callable(only) else names_of(only, "only"),
        skip=() if skip is None else skip if callable(skip) else names_of(skip, "skip"),
        rename=parse_rename(rename),
        reshape=() if reshape is None else names_of(reshape, "reshape"),
        preset=None if preset is None else find_preset(preset),
        filter_fn=_function(filter_fn),
        transforms=_transforms(transforms),
        ignore_mismatched_sizes=flag(ignore_mismatched_sizes, "ignore_mismatched_sizes"),
    )


def _function(value: FilterFunction) -> FilterFunction:
    if value is not None and not callable(value):
        raise OptionError(f"filter_fn: expected a function of a state dict, found {shown(value)}")
    return value


def _transforms(value: TransformsOption) -> tuple[tuple[str, Transform], ...]:
    if value is None:
        return ()
    if not isinstance(value, Mapping):
        raise OptionError(f"transforms: expected {{name of a tensor: transform}}, found {shown(value)}")
    for name, transform in value.items():
        if not isinstance(name, str) or not name:
            raise OptionError(f"transforms: expected names of the model's tensors, found {shown(name)}")
        if not isinstance(transform, Transform):
            raise OptionError(
                f"transforms: {name!r}: expected a transform such as lowmem.interpolate(), found {shown(transform)}"
            )
    return tuple(value.items())


def parse_rename(value: Renames) -> tuple[RenameRule, ...]:
    """The rules that rename keys, in order; a regular expression replaces as `re.sub` does.

    Raises:
        OptionError: something else, or an expression or replacement that `re` does not take.
    """
    if value is None:
        return ()
    if callable(value):
        return (value,)
    if isinstance(value, Mapping):
        return tuple(_expression(old, new) for old, new in value.items())
    if isinstance(value, (str, bytes, bytearray)) or not isinstance(value, Iterable):
        raise OptionError(
            f"rename: expected {{regex: replacement}}, a function, or a list of these, found {shown(value)}"
        )
    rules: list[RenameRule] = []
    for rule in value:
        if callable(rule) or isinstance(rule, Mapping):
            rules += parse_rename(rule)
        elif isinstance(rule, (tuple, list)) and len(rule) == 2:
            rules.append(_expression(rule[0], rule[1]))
        else:
            raise OptionError(f"rename: expected pairs (regex, replacement) or functions, found {shown(rule)}")
    return tuple(rules)


def _expression(old: Any, new: Any) -> tuple[re.Pattern[str], str]:
    rule = f"rename: {shown(old)}: {shown(new)}"
    if not isinstance(old.pattern if isinstance(old, re.Pattern) else old, str) or not isinstance(new, str):
        raise OptionError(f"{rule}: expected a regular expression and its replacement, both text")
    try:
        pattern: re.Pattern[str] = re.compile(old)
    except (re.error, RecursionError, OverflowError) as error:
        raise OptionError(f"{rule}: the regular expression means nothing to re: {error}") from error
    try:
        # The replacement is looked at before anything is looked for.
        pattern.sub(new, "")
    except (re.error, IndexError) as error:
        raise OptionError(f"{rule}: the replacement means nothing to re.sub: {error}") from error
    return pattern, new


def make_stream_request(
    *,
    prefix: str | None = None,
    only: Names = None,
    skip: Names = None,
    rename: Renames = None,
    dtype: Any = "auto",
    device: Any = "cpu",
    staging: int | str | None = None,
    io: str = "auto",
    keep_cache: bool = False,
) -> StreamRequest:
    """Parse the options of `stream`.

    Raises:
        OptionError: a value that means nothing.
    """
    name = device_name(device, "device")
    if name == "disk":
        raise OptionError(
            "device: a stream gives tensors in memory: expected 'cpu', 'cuda:0' or the like, found 'disk'"
        )
    return StreamRequest(
        keys=make_key_rules(prefix=prefix, only=only, skip=skip, rename=rename),
        dtype=parse_dtype(dtype),
        device=name,
        staging=parse_staging(staging),
        io=parse_io(io),
        keep_cache=flag(keep_cache, "keep_cache"),
    )


def parse_staging(value: int | str | None) -> int | None:
    """The bound on the readers' buffers in bytes, or None for lowmem's own.

    Raises:
        OptionError: not a size, or less than 1 MiB.
    """
    size = None if value is None else parse_size(value, "staging")
    if size is not None and size < MIN_STAGING:
        raise OptionError(f"staging: expected at least 1MiB, found {shown(value)}")
    return size


def parse_io(value: str) -> IO:
    """How files are read.

    Raises:
        OptionError: not one of the ways.
    """
    for way in get_args(IO):
        if isinstance(value, str) and value == way:
            found: IO = way
            return found
    raise OptionError(f"io: expected 'auto', 'buffered', 'direct' or 'mmap', found {shown(value)}")


def names_of(value: Iterable[str], what: str) -> tuple[str, ...]:
    """A name or several as a tuple; `what` names the option in the message.

    Raises:
        OptionError: something else.
    """
    # The text of bytes and the keys of a mapping would be taken for names.
    if not isinstance(value, Iterable) or isinstance(value, (bytes, bytearray, Mapping)):
        raise OptionError(f"{what}: expected a name or a list of names, found {shown(value)}")
    names = (value,) if isinstance(value, str) else tuple(value)
    bad = [name for name in names if not isinstance(name, str) or not name]
    if bad:
        raise OptionError(f"{what}: expected names, found {shown(bad[0])}")
    return names


def flag(value: bool, what: str) -> bool:
    """`value` if it is a truth value; no truth of other things, 'no' would be true.

    Raises:
        OptionError: it is not.
    """
    if not isinstance(value, bool):
        raise OptionError(f"{what}: expected True or False, found {shown(value)}")
    return value


def parse_folder(value: str | os.PathLike[str], what: str, kind: str = "folder") -> Path:
    """The absolute path of a folder to write in, or another `kind`, which need not exist; `~` is the home folder.

    Raises:
        OptionError: not a path, or one that no folder can have. `what` names the option in the message.
    """
    path = None
    try:
        text = os.fsdecode(value)
        # accelerate opens what is written there by safetensors, which takes only names in UTF-8.
        text.encode("utf-8")
        if not text or "\0" in text:
            raise ValueError("it is empty or holds a NUL")
        path = Path(text).expanduser().absolute()
        path.stat()
    except (TypeError, RuntimeError, ValueError) as error:
        raise OptionError(f"{what}: expected the path of a {kind}, found {shown(value)} ({error})") from error
    except OSError as error:
        # Without a current folder there is no absolute path; what only cannot be written, the writer finds out.
        if path is None or error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            raise OptionError(f"{what}: {shown(value)} cannot be followed: {error.strerror or error}") from error
    return path
