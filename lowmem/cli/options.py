"""The options that several verbs have, and what their texts mean."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .._terminal import say
from ..errors import LowmemError, OptionError
from ..sizes import shown
from .parser import FAILED, FINE

_MOST_OF_A_MAP = 16 * 1024**2


def add_plot(parser: argparse.ArgumentParser) -> None:
    """`--plot FILE`."""
    parser.add_argument(
        "--plot", metavar="FILE", help="draw memory over time: .png, .svg or .pdf (pip install 'lowmem[plot]')"
    )


def add_source(parser: argparse.ArgumentParser) -> None:
    """The source, and what of it is wanted."""
    add = parser.add_argument
    add(
        "source",
        metavar="SRC",
        help="folder, index, .safetensors, .bin, .pt, .pth or .ckpt file, or a hub model in its cache (org/name)",
    )
    add("--weights", metavar="PATH", help="the mapping inside a pickled file with the weights, such as state_dict")
    add(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="averaged weights, or those that were trained, where a pickled file has both",
    )
    add_selection(parser)


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Which files of the source are meant."""
    add = parser.add_argument
    add("--variant", metavar="WORD", help="take the files of this variant, such as fp16 (model.fp16.safetensors)")
    add("--subfolder", metavar="FOLDER", help="the folder inside the source that is meant, with its own config")
    add("--revision", metavar="REVISION", help="branch, tag or commit of a hub model, as org/name@REVISION")
    add("--download", action="store_true", help="fetch a model of the hub that is not in its cache")


def selection_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments that `add_selection` stands for."""
    return {name: getattr(arguments, name) for name in ("variant", "subfolder", "revision", "download")}


def source_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments that `add_source` stands for, but for the source."""
    return {"weights": arguments.weights, "ema": arguments.ema, **selection_options(arguments)}


def add_key_options(parser: argparse.ArgumentParser) -> None:
    """Which keys are taken, and under which names."""
    add = parser.add_argument
    add("--prefix", metavar="MODULE", help="take only the keys inside this module, without it")
    add("--only", metavar="NAMES", action="append", help="tensors, modules or patterns to take, a,b,...")
    add("--skip", metavar="NAMES", action="append", help="tensors, modules or patterns to leave, a,b,...")
    add(
        "--rename",
        metavar="OLD=NEW",
        action="append",
        help="regular expression and replacement (the last = parts them); may be repeated, and is applied in order",
    )


def key_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments that `add_key_options` stands for.

    Raises:
        OptionError: a rule without `=`.
    """
    rules = []
    for text in arguments.rename or ():
        old, equals, new = text.rpartition("=")
        if not equals or not old:
            raise OptionError(
                f"--rename: expected OLD=NEW, a regular expression and its replacement; found {shown(text)}"
            )
        rules.append((old, new))
    return {
        "prefix": arguments.prefix,
        "only": None if arguments.only is None else split(arguments.only),
        "skip": None if arguments.skip is None else split(arguments.skip),
        "rename": rules or None,
    }


def add_fit_options(parser: argparse.ArgumentParser) -> None:
    """The model, and what may feed it."""
    add = parser.add_argument
    add("--model", metavar="MODULE:CALLABLE", help="makes the model (default: transformers, from config.json)")
    add(
        "--auto-class",
        metavar="CLASS",
        help="class of transformers, such as AutoModel or LlamaModel (default: by architectures in config.json)",
    )
    add("--attn-implementation", metavar="NAME", help="how a transformers model computes attention: eager, sdpa, ...")
    add(
        "--part",
        metavar="MODULE=SRC",
        action="append",
        help="read this module of the model from a source of its own; may be given several times",
    )
    add_key_options(parser)
    add(
        "--reshape",
        metavar="NAMES",
        action="append",
        help="the model's tensors that may be fed from another shape of as many elements, a,b,...",
    )
    add(
        "--preset",
        metavar="NAME",
        help="known change from one library's layout to another's, such as 'convnextv2->timm', in quotes because of "
        "the > (a name that there is not lists those that there are)",
    )
    add(
        "--num-classes",
        metavar="N",
        help="outputs of a timm model's classifier; initialised where the checkpoint's differ",
    )
    add(
        "--in-chans",
        metavar="N",
        help="input channels of a timm model; its first convolution is adapted as timm does it",
    )
    add("--dequantize", action="store_true", help="make floats of what is int8 in the checkpoint")
    add("--trust-remote-code", action="store_true", help="let Python files beside the checkpoint run")


def sources(arguments: argparse.Namespace) -> Any:
    """The source, or all of them by their modules.

    Raises:
        OptionError: a part that is none.
    """
    if not arguments.part:
        return arguments.source
    found = {"": arguments.source}
    for text in arguments.part:
        module, equals, source = text.partition("=")
        if not module or not equals or not source:
            raise OptionError(f"--part: expected MODULE=SRC, such as model.vision_tower=tower.pth, found {text!r}")
        if module in found:
            raise OptionError(f"--part: {module!r} is given twice; name it once")
        found[module] = source
    return found


def fit_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments that `add_fit_options` stands for.

    Raises:
        OptionError: a text that means nothing.
    """
    return {
        **key_options(arguments),
        "model": None if arguments.model is None else import_callable(arguments.model),
        "auto_class": arguments.auto_class,
        "attn_implementation": arguments.attn_implementation,
        "reshape": None if arguments.reshape is None else split(arguments.reshape),
        "preset": arguments.preset,
        "num_classes": _read_count(arguments.num_classes, "--num-classes"),
        "in_chans": _read_count(arguments.in_chans, "--in-chans"),
        "dequantize": arguments.dequantize,
        "trust_remote_code": arguments.trust_remote_code,
    }


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """The source and everything that decides a load."""
    add = parser.add_argument
    add_source(parser)
    add("--dtype", default="auto", help="auto (the checkpoint's, default), float32, bfloat16, float16, ...")
    add(
        "--device-map",
        metavar="MAP",
        help="cpu (default), cuda:0, disk, auto, balanced, balanced_low_0, sequential, or FILE.json (module to device)",
    )
    add("--max-memory", metavar="DEVICE=SIZE,...", help="for instance cpu=6GiB,cuda:0=20GiB")
    add("--ram", metavar="SIZE", help="host memory the load may add (default: what the machine and its limits leave)")
    add("--offload-folder", metavar="DIR", help="where weights on disk go that must be cast; else cast at each use")
    add(
        "--keep-fp32",
        metavar="NAMES",
        action="append",
        default=[],
        help="modules or parameters to keep in fp32, a,b,...",
    )
    add(
        "--residency",
        choices=("map", "copy"),
        default="map",
        help="same dtype on the CPU: map the file (default) or copy",
    )
    add(
        "--dispatch",
        choices=("lowmem", "accelerate"),
        default="lowmem",
        help="who brings weights on disk when they are used (default lowmem)",
    )
    add("--staging", metavar="SIZE", help="bound on the readers' buffers, at least 1MiB")
    add(
        "--io", choices=("auto", "buffered", "direct", "mmap"), default="auto", help="how files are read (default auto)"
    )
    add("--prefetch", action="store_true", help="let the kernel read mapped weights ahead")
    add("--keep-cache", action="store_true", help="leave in the page cache what the load read")
    add("--no-split", metavar="CLASSES", action="append", help="module classes that stay on one device, A,B,...")
    add_fit_options(parser)
    add_int8_options(parser)
    add("--no-strict", dest="strict", action="store_false", help="initialise what is missing or mismatched")
    add("--ignore-mismatched-sizes", action="store_true", help="initialise what is mismatched only")


def add_int8_options(parser: argparse.ArgumentParser) -> None:
    """What becomes int8."""
    add = parser.add_argument
    add("--quantize", choices=("int8",), help="make the linear layers int8 while they are read")
    add(
        "--skip-modules",
        metavar="NAMES",
        action="append",
        help="linear layers that --quantize leaves floats, a,b,... (default: as transformers)",
    )
    add(
        "--int8-threshold",
        metavar="NUMBER",
        help="magnitude from which bitsandbytes computes in fp16, not int8 (default: the config's, or 6)",
    )


def int8_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments that `add_int8_options` stands for.

    Raises:
        OptionError: a text that is no number.
    """
    return {
        "quantize": arguments.quantize,
        "skip_modules": None if arguments.skip_modules is None else split(arguments.skip_modules),
        "int8_threshold": _read_number(arguments.int8_threshold, "--int8-threshold"),
    }


def add_rank_options(parser: argparse.ArgumentParser) -> None:
    """A load by several ranks, on paper."""
    add = parser.add_argument
    add(
        "--ranks",
        type=int,
        metavar="N",
        help="plan for so many ranks, none of which need be there; without --mesh: dp=N",
    )
    add(
        "--mesh",
        metavar="DIM=N,...",
        help="how these divide the model, such as dp=2,tp=4: dp as fully_shard, tp and ep by the model's own plans, "
        "replicate not at all; without --ranks: as many as it has",
    )
    add(
        "--ranks-per-host",
        type=int,
        metavar="N",
        help="neighbours that share a host and its page cache (default: all)",
    )
    add(
        "--read",
        choices=("each", "once"),
        help="every rank reads what it holds, or one rank of a host what several hold alike (default: each)",
    )


def rank_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `plan_ranks` that `add_rank_options` stands for; none where one process is meant.

    Raises:
        OptionError: options that do not fit each other.
    """
    if arguments.ranks is None and arguments.mesh is None:
        for name in ("ranks_per_host", "read"):
            if getattr(arguments, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise OptionError(f"{option}: expected --ranks or --mesh with it, which say how many ranks there are")
        return {}
    for name in ("max_memory", "no_split"):
        if getattr(arguments, name) is not None:
            raise OptionError(
                f"--{name.replace('_', '-')}: is for device maps that are inferred, and with --ranks or --mesh the "
                "mesh says who holds what; leave it out (--ram bounds the host memory of each rank)"
            )
    if arguments.ranks is not None and arguments.ranks < 1:
        raise OptionError(f"--ranks: expected a number of ranks, found {arguments.ranks}")
    return {
        "mesh": f"dp={arguments.ranks}" if arguments.mesh is None else arguments.mesh,
        "ranks": arguments.ranks,
        "ranks_per_host": arguments.ranks_per_host,
        **({} if arguments.read is None else {"read": arguments.read}),
    }


def options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `load` and `plan` that the arguments stand for.

    Raises:
        OptionError: a text that means nothing.
    """
    return {
        **source_options(arguments),
        **fit_options(arguments),
        **int8_options(arguments),
        "dtype": arguments.dtype,
        "device_map": _read_device_map(arguments.device_map),
        "max_memory": _read_max_memory(arguments.max_memory),
        "ram": arguments.ram,
        "offload_folder": arguments.offload_folder,
        "keep_fp32": split(arguments.keep_fp32),
        "residency": arguments.residency,
        "dispatch": arguments.dispatch,
        "strict": arguments.strict,
        "ignore_mismatched_sizes": arguments.ignore_mismatched_sizes,
        "staging": arguments.staging,
        "io": arguments.io,
        "prefetch": arguments.prefetch,
        "keep_cache": arguments.keep_cache,
        "no_split": None if arguments.no_split is None else split(arguments.no_split),
    }


def split(values: Sequence[str]) -> list[str]:
    """Names given as `a,b` or by an option that stands there several times."""
    return [name.strip() for value in values for name in value.split(",") if name.strip()]


def _read_number(text: str | None, option: str) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError as error:
        raise OptionError(f"{option}: expected a number such as 6.0, found {shown(text)}") from error


def _read_count(text: str | None, option: str) -> int | None:
    try:
        return None if text is None else int(text)
    except ValueError as error:
        raise OptionError(f"{option}: expected a whole number such as 10, found {shown(text)}") from error


def _read_device_map(text: str | None) -> Any:
    if text is None or not (text.endswith(".json") or os.sep in text):
        return text
    twice: list[str] = []

    def as_table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key, value in pairs:
            if key in table:
                twice.append(key)
            table[key] = value
        return table

    try:
        with Path(text).open(encoding="utf-8") as file:
            content = file.read(_MOST_OF_A_MAP + 1)
        if len(content) > _MOST_OF_A_MAP:
            raise OptionError(f"--device-map: {text}: too long to be a device map")
        table = json.loads(content, object_pairs_hook=as_table)
    except OSError as error:
        raise OptionError(f"--device-map: {text}: cannot be read: {error.strerror or error}") from error
    except OptionError:
        raise
    except (ValueError, RecursionError) as error:
        raise OptionError(f"--device-map: {text}: not valid JSON: {error}") from error
    if not isinstance(table, dict):
        raise OptionError(f"--device-map: {text}: expected a JSON object of module to device")
    if twice:
        raise OptionError(f"--device-map: {text}: {shown(twice[0])} stands there twice; name each module once")
    return table


def _read_max_memory(text: str | None) -> dict[str, str] | None:
    if text is None:
        return None
    table = {}
    for part in text.split(","):
        device, equals, size = part.partition("=")
        if not equals or not device.strip():
            raise OptionError(
                f"--max-memory: expected DEVICE=SIZE,... such as cpu=6GiB,cuda:0=20GiB; found {shown(part)}"
            )
        if device.strip() in table:
            raise OptionError(f"--max-memory: {shown(device.strip())} is given twice; give each device once")
        table[device.strip()] = size.strip()
    return table


def import_callable(text: str) -> Callable[..., Any]:
    """The callable that `MODULE:CALLABLE` names.

    Raises:
        OptionError: there is none.
    """
    module_name, colon, name = text.partition(":")
    if not colon or not module_name or not name:
        raise OptionError(f"--model: expected MODULE:CALLABLE, found {shown(text)}")
    try:
        # As `python -m` does: a file in the current folder can be named.
        here = str(Path.cwd())
    except OSError as error:
        raise OptionError(f"--model: the current folder is gone ({error.strerror}); change to another") from error
    sys.path.insert(0, here)
    try:
        value: Any = importlib.import_module(module_name)
        for part in name.split("."):
            value = getattr(value, part)
    except (KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:
        # The module's code may raise anything, and may call sys.exit.
        raise OptionError(f"--model: {shown(text)} cannot be imported: {_reason(error)}") from error
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)
    if not callable(value):
        raise OptionError(f"--model: {shown(text)} is not callable")
    function: Callable[..., Any] = value
    return function


def _reason(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def picture_of(arguments: argparse.Namespace) -> Path | None:
    """Where to draw; what stands in the way of that is known before the work."""
    if arguments.plot is None:
        return None
    from ..plots import parse_target

    return parse_target(arguments.plot)


def draw(plot: Callable[[], None]) -> int:
    """Exit code of a picture drawn after the work. What stands in its way only now was no wrong usage."""
    try:
        plot()
    except LowmemError as error:
        say(f"lowmem: {error}")
        return FAILED
    return FINE
