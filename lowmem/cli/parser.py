"""What all verbs share: the parser, the exit codes, and how a verb is added."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from .._terminal import output, say, shortened

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

FINE, FAILED, MISUSED, INTERRUPTED = 0, 1, 2, 130

EPILOG = """exit codes: 0 fine, 1 it failed or found something wrong, 2 wrong usage, 130 interrupted; measure
gives the command's own, or 1 where that is 0 and the picture failed.
Sizes: 8GiB, 512MiB (powers of 1024), 8GB, 500MB (powers of 1000), or bytes."""


class Parser(argparse.ArgumentParser):
    """Does not repeat what is too long to be read."""

    def error(self, message: str) -> NoReturn:
        """Refuse wrong usage."""
        super().error(shortened(message))

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        # argparse would say nothing when help cannot be written.
        if file is sys.stdout:
            with output():
                print(message, end="")
        else:
            say(message.rstrip("\n"))


def verb(verbs: Any, name: str, help_: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    """Add the verb `name` to `verbs`; `run` carries it out and gives the exit code."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=help_,
        description=help_[0].upper() + help_[1:] + ".",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.set_defaults(run=run)
    return parser
