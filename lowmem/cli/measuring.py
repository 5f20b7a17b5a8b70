"""The verbs that measure and show."""

from __future__ import annotations

import argparse
import contextlib
import shlex
from typing import TYPE_CHECKING, Any

from .._terminal import print_json, progress_bar, say_text, show, stdout_to_stderr
from ..errors import OptionError
from .options import add_plot, draw, picture_of
from .parser import FINE, verb

if TYPE_CHECKING:
    from ..memory import Measurement


def add_measure(verbs: Any) -> None:
    """`lowmem measure`."""
    parser = verb(
        verbs,
        "measure",
        "run a command and report its peak memory, its children included (--json sends its output to stderr)",
        _measure,
    )
    parser.add_argument(
        "--interval", type=float, default=0.001, metavar="SECONDS", help="between looks (default 0.001)"
    )
    add_plot(parser)
    # argparse would show "..." for the command.
    parser.usage = "lowmem measure [-h] [--json] [--interval SECONDS] [--plot FILE] -- CMD ..."
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- CMD ...", help="the command, after --")


def add_demo(verbs: Any) -> None:
    """`lowmem demo`."""
    parser = verb(
        verbs, "demo", "write a Llama checkpoint, load it in less memory than it has, run a few tokens, clean up", _demo
    )
    parser.add_argument("--size", default="1GiB", help="size of the bf16 checkpoint (default 1GiB)")
    parser.add_argument("--ram", help="host memory the load may add (default: half the checkpoint)")
    parser.add_argument("--dtype", default="float32", help="dtype to load at (default float32, twice the checkpoint)")
    parser.add_argument("--folder", help="where to write (default: the system's temporary folder)")
    parser.add_argument("--tokens", type=int, default=4, help="tokens to generate (default 4)")


def _measure(arguments: argparse.Namespace) -> int:
    from ..memory import measure_command

    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        raise OptionError("measure: expected a command after --, for instance: lowmem measure -- python train.py")
    picture = picture_of(arguments)
    # With --json, stdout is for the JSON alone; the command's own output goes to stderr.
    with stdout_to_stderr() if arguments.json else contextlib.nullcontext():
        code, memory = measure_command(command, arguments.interval)
    drawn = FINE
    try:
        _show_measurement(command, code, memory, arguments.json)
    finally:
        if picture is not None:
            drawn = draw(lambda: memory.plot(picture, title=f"{shlex.join(command)}: {memory.seconds:.2f} s"))
    return code or drawn


def _show_measurement(command: list[str], code: int, memory: Measurement, as_json: bool) -> None:
    if as_json:
        print_json({"command": command, "exit_code": code, **memory.to_dict()})
        return
    from ..report import measurement_table

    show(measurement_table(memory))


def _demo(arguments: argparse.Namespace) -> int:
    from ..demo import run_demo

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
