"""The shell's door: verbs that parse, call and print. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .. import __version__
from .._terminal import give_up, mend_streams, output, say
from ..errors import LowmemError, OptionError
from . import converting, loading, measuring, running
from .parser import EPILOG, FAILED, INTERRUPTED, MISUSED, Parser


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
