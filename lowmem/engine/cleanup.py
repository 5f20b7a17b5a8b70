"""Undo that Ctrl-C does not cut short."""

from __future__ import annotations

from collections.abc import Callable


def undisturbed(step: Callable[[], None]) -> None:
    """Run `step`, once more for each Ctrl-C that interrupts it, and let the last one through when it is done.

    `step` must bear to be run again after it was interrupted anywhere.
    """
    interrupt: KeyboardInterrupt | None = None
    while True:
        try:
            step()
            break
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt
