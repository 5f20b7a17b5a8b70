"""The shell's door: verbs that parse, call and print. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__
from ._terminal import (
    give_up,
    mend_streams,
    output,
    print_json,
    progress_bar,
    say,
    say_text,
    shortened,
    show,
    stdout_to_stderr,
    warn,
)
from .errors import LowmemError, OptionError
from .sizes import shown

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

    from .loader import LoadResult
    from .memory import Measurement

FINE, FAILED, MISUSED, INTERRUPTED = 0, 1, 2, 130
_MOST_OF_A_MAP = 16 * 1024**2

_EPILOG = """exit codes: 0 fine, 1 the load, plan or picture failed, 2 wrong usage; measure gives the command's
own, or 1 where that is 0 and the picture failed.
Sizes: 8GiB, 512MiB (powers of 1024), 8GB, 500MB (powers of 1000), or bytes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code. Errors of lowmem become one message on stderr."""
    mend_streams()
    try:
        return _run(argv)
    except OptionError as error:
        say(f"lowmem: {error}")
        return MISUSED
    except LowmemError as error:
        say(f"lowmem: {error}")
        return FAILED
    except KeyboardInterrupt:
        say("lowmem: interrupted; nothing half-loaded is left")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (head, less) went away: nothing to say, and nobody to say it to.
        give_up(sys.stdout)
        return FAILED
    except MemoryError:
        say("lowmem: out of memory: the system gave no more to this process; free some, or raise its limit")
        return FAILED
    except OSError as error:
        say(f"lowmem: {error}")
        return FAILED


def _run(argv: Sequence[str] | None) -> int:
    arguments = build_parser().parse_args(argv)
    code: int = arguments.run(arguments)
    with output():
        return code


class _Parser(argparse.ArgumentParser):
    """Does not repeat what is too long to be read."""

    def error(self, message: str) -> NoReturn:
        super().error(shortened(message))

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        # argparse would say nothing when help cannot be written.
        if file is sys.stdout:
            with output():
                print(message, end="")
        else:
            say(message.rstrip("\n"))


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; README's reference is made from it."""
    parser = _Parser(
        prog="lowmem",
        description="Load large PyTorch checkpoints within a memory budget.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lowmem {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    _add_inspect(verbs)
    _add_plan(verbs)
    _add_load(verbs)
    _add_measure(verbs)
    _add_demo(verbs)
    return parser


def _verb(verbs: Any, name: str, help_: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=help_,
        description=help_[0].upper() + help_[1:] + ".",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.set_defaults(run=run)
    return parser


def _add_inspect(verbs: Any) -> None:
    parser = _verb(verbs, "inspect", "show what a checkpoint holds; reads headers only", _inspect)
    parser.add_argument("source", metavar="SRC", help="folder, index file or .safetensors file")
    parser.add_argument("--tensors", action="store_true", help="list every tensor too")


def _add_plan(verbs: Any) -> None:
    parser = _verb(verbs, "plan", "show what a load would do and need; reads no tensor byte", _plan)
    _add_load_options(parser)


def _add_load(verbs: Any) -> None:
    parser = _verb(verbs, "load", "load a checkpoint and report predicted beside measured memory", _load)
    _add_load_options(parser)
    _add_plot(parser)


def _add_measure(verbs: Any) -> None:
    parser = _verb(
        verbs,
        "measure",
        "run a command and report its peak memory, its children included (--json sends its output to stderr)",
        _measure,
    )
    parser.add_argument(
        "--interval", type=float, default=0.001, metavar="SECONDS", help="between looks (default 0.001)"
    )
    _add_plot(parser)
    # argparse would show "..." for the command.
    parser.usage = "lowmem measure [-h] [--json] [--interval SECONDS] [--plot FILE] -- CMD ..."
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- CMD ...", help="the command, after --")


def _add_demo(verbs: Any) -> None:
    parser = _verb(
        verbs, "demo", "write a Llama checkpoint, load it in less memory than it has, run a few tokens, clean up", _demo
    )
    parser.add_argument("--size", default="1GiB", help="size of the bf16 checkpoint (default 1GiB)")
    parser.add_argument("--ram", help="host memory the load may add (default: half the checkpoint)")
    parser.add_argument("--dtype", default="float32", help="dtype to load at (default float32, twice the checkpoint)")
    parser.add_argument("--folder", help="where to write (default: the system's temporary folder)")
    parser.add_argument("--tokens", type=int, default=4, help="tokens to generate (default 4)")


def _add_plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plot", metavar="FILE", help="draw memory over time: .png, .svg or .pdf (pip install 'lowmem[plot]')"
    )


def _add_load_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="SRC", help="folder, index file or .safetensors file")
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
    add("--model", metavar="MODULE:CALLABLE", help="makes the model (default: transformers, from config.json)")
    add(
        "--residency",
        choices=("map", "copy"),
        default="map",
        help="same dtype on the CPU: map the file (default) or copy",
    )
    add("--staging", metavar="SIZE", help="bound on the readers' buffers, at least 1MiB")
    add(
        "--io", choices=("auto", "buffered", "direct", "mmap"), default="auto", help="how files are read (default auto)"
    )
    add("--prefetch", action="store_true", help="let the kernel read mapped weights ahead")
    add("--keep-cache", action="store_true", help="leave in the page cache what the load read")
    add("--no-split", metavar="CLASSES", action="append", help="module classes that stay on one device, A,B,...")
    add("--no-strict", dest="strict", action="store_false", help="initialise what is missing or mismatched")
    add("--trust-remote-code", action="store_true", help="let Python files beside the checkpoint run")


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": None if arguments.model is None else _import_callable(arguments.model),
        "dtype": arguments.dtype,
        "device_map": _read_device_map(arguments.device_map),
        "max_memory": _read_max_memory(arguments.max_memory),
        "ram": arguments.ram,
        "offload_folder": arguments.offload_folder,
        "keep_fp32": _split(arguments.keep_fp32),
        "residency": arguments.residency,
        "strict": arguments.strict,
        "staging": arguments.staging,
        "io": arguments.io,
        "prefetch": arguments.prefetch,
        "keep_cache": arguments.keep_cache,
        "no_split": None if arguments.no_split is None else _split(arguments.no_split),
        "trust_remote_code": arguments.trust_remote_code,
    }


def _split(values: Sequence[str]) -> list[str]:
    return [name.strip() for value in values for name in value.split(",") if name.strip()]


def _read_device_map(text: str | None) -> Any:
    if text is None or not (text.endswith(".json") or os.sep in text):
        return text
    twice: list[str] = []

    def as_table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        twice.extend(key for key in table if len(table) < len(pairs) and sum(key == k for k, _ in pairs) > 1)
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


def _import_callable(text: str) -> Callable[..., Any]:
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


def _inspect(arguments: argparse.Namespace) -> int:
    from .checkpoint import inspect

    checkpoint = inspect(arguments.source)
    warn(checkpoint.warnings)
    if arguments.json:
        print_json(checkpoint.to_dict())
        return FINE
    from .report import checkpoint_tables, tensor_table

    show(*checkpoint_tables(checkpoint))
    if arguments.tensors:
        show(tensor_table(checkpoint))
    return FINE


def _plan(arguments: argparse.Namespace) -> int:
    from .loader import plan

    decided = plan(arguments.source, **_options(arguments))
    warn(decided.warnings)
    if arguments.json:
        print_json(decided.to_dict())
        return FINE
    from .report import plan_tables

    show(*plan_tables(decided))
    return FINE


def _load(arguments: argparse.Namespace) -> int:
    from .loader import load

    picture = _picture(arguments)
    with progress_bar() as progress:
        result = load(arguments.source, progress=progress, **_options(arguments))
    warn(result.plan.warnings)
    drawn = FINE
    try:
        _show_load(result, arguments.json)
    finally:
        if picture is not None:
            drawn = _draw(lambda: result.report.plot(picture))
    return drawn


def _show_load(result: LoadResult, as_json: bool) -> None:
    if as_json:
        print_json(result.report.to_dict())
        return
    from .report import phase_table, plan_tables, report_table

    show(*plan_tables(result.plan), report_table(result.report), phase_table(result.report))


def _measure(arguments: argparse.Namespace) -> int:
    from .memory import measure_command

    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        raise OptionError("measure: expected a command after --, for instance: lowmem measure -- python train.py")
    picture = _picture(arguments)
    # With --json, stdout is for the JSON alone; the command's own output goes to stderr.
    with stdout_to_stderr() if arguments.json else contextlib.nullcontext():
        code, memory = measure_command(command, arguments.interval)
    drawn = FINE
    try:
        _show_measurement(command, code, memory, arguments.json)
    finally:
        if picture is not None:
            drawn = _draw(lambda: memory.plot(picture, title=f"{shlex.join(command)}: {memory.seconds:.2f} s"))
    return code or drawn


def _show_measurement(command: list[str], code: int, memory: Measurement, as_json: bool) -> None:
    if as_json:
        print_json({"command": command, "exit_code": code, **memory.to_dict()})
        return
    from .report import measurement_table

    show(measurement_table(memory))


def _picture(arguments: argparse.Namespace) -> Path | None:
    """Where to draw; what stands in the way of that is known before the work."""
    if arguments.plot is None:
        return None
    from .plots import parse_target

    return parse_target(arguments.plot)


def _draw(plot: Callable[[], None]) -> int:
    """Exit code of a picture drawn after the work. What stands in its way only now was no wrong usage."""
    try:
        plot()
    except LowmemError as error:
        say(f"lowmem: {error}")
        return FAILED
    return FINE


def _demo(arguments: argparse.Namespace) -> int:
    from .demo import run_demo

    with progress_bar() as progress:
        report = run_demo(
            size=arguments.size,
            ram=arguments.ram,
            dtype=arguments.dtype,
            folder=arguments.folder,
            tokens=arguments.tokens,
            say=say_text if arguments.json else show,
            progress=progress,
        )
    if arguments.json:
        print_json(report.to_dict())
    return FINE
