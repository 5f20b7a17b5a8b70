"""Looks at our memory from a child process, which no work of ours holds up; see `_sampler`."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, Literal, cast

from ._sampler import Timeline
from .errors import MeasureError

# Far above the 15 ms that the sampler needs to answer, for machines that are swapping.
_ANSWER_SECONDS = 60.0


def _need_descriptors(count: int) -> None:
    """Fail where so many files cannot be opened: `Popen` before Python 3.11.4 loses a pipe where it cannot have both.

    Raises:
        OSError: they cannot.
    """
    with contextlib.ExitStack() as held:
        for _ in range(count):
            held.callback(os.close, os.open(os.devnull, os.O_RDONLY))


class ProcessSampler:
    """Looks at us from a child process."""

    method: Literal["process"] = "process"

    def __init__(self, script: Path, interval: float) -> None:
        self._owner = os.getpid()
        _need_descriptors(7)
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(script), str(os.getpid()), str(interval)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Ctrl-C in the terminal is for us, not for the child.
            start_new_session=True,
        )

    def give_up(self) -> None:
        """End it, if it runs and is ours: whoever is only forgotten would look at us to our end."""
        process = self._process
        if process.returncode is None and os.getpid() == self._owner:
            process.kill()
            # Not its own `wait`: a Ctrl-C in one may leave the lock taken for which the next would wait.
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process.pid, 0)
            process.returncode = -signal.SIGKILL
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                # What was not sent is not missed.
                with contextlib.suppress(OSError):
                    pipe.close()

    def finish(self) -> Timeline:
        """End it: what was seen.

        Raises:
            MeasureError: it ended before, or does not answer.
        """
        process = self._process
        try:
            if not self._is_up():
                return Timeline()
            # A byte, not only the end of input: a process forked in the block may hold the pipe open.
            answer, _ = process.communicate(b"\n", timeout=_ANSWER_SECONDS)
        except subprocess.TimeoutExpired:
            raise MeasureError("the memory sampler does not answer; the peak is not known, run again") from None
        finally:
            self.give_up()
        if process.returncode or not answer.strip():
            raise MeasureError(
                f"the memory sampler ended early with exit code {process.returncode}; the peak is not known, run again"
            )
        timeline = Timeline()
        vars(timeline).update(json.loads(answer))
        return timeline

    def _is_up(self) -> bool:
        # Not select.select, which cannot take a file number above 1023.
        poll = select.poll()
        poll.register(cast("IO[bytes]", self._process.stdout), select.POLLIN)
        return bool(poll.poll(0))
