"""Where the verbs write: results to stdout, messages and the progress bar to stderr, and what may go wrong there."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any

from .errors import LowmemError, harmless

if TYPE_CHECKING:
    from rich.console import Console

    from .planner import Progress, ProgressCallback

_NO_WIDTH = 4096
# C0 and C1 but for tabs and newlines, and what overrides the direction of text; what joins emoji is not printable
# either, and steers nothing.
_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """What this process and its children write to stdout goes to stderr meanwhile."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@contextlib.contextmanager
def progress_bar() -> Iterator[ProgressCallback | None]:
    """A bar with rate and time left on stderr, when a person watches it."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading", total=None)

        def advance(progress: Progress) -> None:
            from .report import plain

            bar.update(task, completed=progress.done, total=progress.total, description=plain(progress.file))

        yield advance


def _console() -> Console:
    from rich.console import Console

    # A pipe or a file has no width: long names stay whole there, and tables are as wide as what they hold.
    width = None if sys.stdout.isatty() else _NO_WIDTH
    return Console(width=width, highlight=False, soft_wrap=not sys.stdout.isatty())


def show(*things: Any) -> None:
    """Tables or text on stdout."""
    console = _console()
    with output():
        for thing in things:
            console.print(thing)


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    with output():
        # The one character that steers and that JSON need not escape.
        print(json.dumps(value, indent=2).replace("\x7f", "\\u007f"))


def write_text(text: str) -> None:
    """A piece of generated text on stdout, at once; a terminal gets nothing that steers it.

    Raises:
        LowmemError, BrokenPipeError: as `output`.
    """
    if sys.stdout.isatty():
        text = _STEERING.sub("\N{REPLACEMENT CHARACTER}", text)
    with output():
        sys.stdout.write(text)


@contextlib.contextmanager
def output() -> Iterator[None]:
    """Around what writes to stdout: when that cannot be written, it is a failure with a message.

    Raises:
        LowmemError: the disk is full, or stdout is closed.
        BrokenPipeError: the reader went away.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        give_up(sys.stdout)
        raise LowmemError(f"stdout: cannot be written: {error.strerror or error}") from error


def give_up(stream: IO[str]) -> None:
    """Let what is still in the buffer go nowhere, else the interpreter tries once more at its end, and complains."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def mend_streams() -> None:
    """Streams that take all text, also where the shell closed them or the locale is ASCII."""
    for number, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            # Else the next file that is opened gets this number, and is written into. Messages go nowhere; results
            # have a stdout that refuses them, because they would be lost.
            os.set_inheritable(os.open(os.devnull, mode), True)
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - it is to last
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def say_text(value: Any) -> None:
    """With --json the tables' figures are in the JSON."""
    if isinstance(value, str):
        say(value)


def warn(warnings: Sequence[str]) -> None:
    """Each of them on stderr."""
    for warning in warnings:
        say(f"warning: {harmless(warning)}")


def say(text: Any) -> None:
    """One message on stderr, with nothing in it that steers a terminal or looks like another message."""
    text = str(text).replace("\nlowmem: ", "\n lowmem: ").replace("\nwarning: ", "\n warning: ")
    cleaned = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
    try:
        print(shortened(cleaned), file=sys.stderr, flush=True)
    except OSError:
        give_up(sys.stderr)


def shortened(text: str) -> str:
    """`text` with its endless words cut; paths are shorter."""
    return re.sub(r"(\S{80})\S{1000,}", r"\1...", text)
