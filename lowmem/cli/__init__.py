"""The shell's door: verbs that parse, call and print. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from .. import __version__
from .._terminal import give_up, mend_streams, output, say
from ..errors import LowmemError, OptionError
from . import converting, loading, measuring, running
from .parser import EPILOG, FAILED, INTERRUPTED, MISUSED, Parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code. Errors of lowmem become one message on stderr."""
    mend_streams()
    with _noted_interrupts() as noted:
        try:
            return _main(argv)
        except Exception:
            # Other libraries swallow a Ctrl-C in their imports, and then fail for what is not there.
            if not noted:
                raise
            return _interrupted()


@contextmanager
def _noted_interrupts() -> Iterator[list[int]]:
    """Each Ctrl-C in a list, as it comes."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        raise KeyboardInterrupt

    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not ours or threading.current_thread() is not threading.main_thread():
        yield noted
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupted() -> int:
    say("lowmem: interrupted; nothing half-loaded is left")
    return INTERRUPTED


def _main(argv: Sequence[str] | None) -> int:
    try:
        return _run(argv)
    except OptionError as error:
        say(f"lowmem: {error}")
        return MISUSED
    except LowmemError as error:
        say(f"lowmem: {error}")
        return FAILED
    except KeyboardInterrupt:
        return _interrupted()
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


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; README's reference is made from it."""
    parser = Parser(
        prog="lowmem",
        description="Load large PyTorch checkpoints within a memory budget.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lowmem {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    loading.add_inspect(verbs)
    loading.add_diff(verbs)
    loading.add_plan(verbs)
    loading.add_load(verbs)
    running.add_run(verbs)
    converting.add_convert(verbs)
    converting.add_check(verbs)
    measuring.add_measure(verbs)
    measuring.add_demo(verbs)
    return parser


__all__ = ["build_parser", "main"]
