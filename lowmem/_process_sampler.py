"""Looks at our memory from a child process, which no work of ours holds up; see `_sampler`."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import Literal

from ._sampler import Timeline
from .errors import MeasureError

# Far above the 15 ms that the sampler needs to answer, for machines that are swapping.
_ANSWER_SECONDS = 60.0


class ProcessSampler:
    """Looks at us from a child process. What it began ends with it at the latest.

    No `subprocess.Popen`: a Ctrl-C in its Python code loses a process or a pipe that was just made, or leaves the lock
    taken that its `wait` takes; and before Python 3.11.4 a pipe is lost where only one can be had. Here each of them is
    made and kept in one step of C code.

    Args:
        script: `_sampler.py`.
        interval: seconds from look to look.

    Raises:
        OSError: the system has no more processes or open files.
    """

    method: Literal["process"] = "process"

    def __init__(self, script: Path, interval: float) -> None:
        self._owner = os.getpid()
        self._pids: list[int] = []
        self._ended: list[tuple[int, int]] = []
        # What the child reads, and where we write it; where we read what it says, and where it writes.
        self._files: list[io.FileIO] = []
        self._files.extend(
            map(io.FileIO, itertools.chain.from_iterable(itertools.starmap(os.pipe, ((), ()))), ("r", "w") * 2)
        )
        asked, self._ask, self._answer, answered = self._files
        actions = (
            (os.POSIX_SPAWN_DUP2, asked.fileno(), 0),
            (os.POSIX_SPAWN_DUP2, answered.fileno(), 1),
            (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
        )
        command = [sys.executable, "-I", "-S", str(script), str(os.getpid()), str(interval)]
        # In a process group of its own: Ctrl-C in the terminal is for us, not for the child.
        spawn = functools.partial(os.posix_spawn, file_actions=actions, setpgroup=0)
        self._pids.extend(map(spawn, (sys.executable,), (command,), (os.environ,)))
        asked.close()
        answered.close()

    @property
    def pid(self) -> int:
        """Of the child."""
        return self._pids[0]

    def give_up(self) -> None:
        """End it, if it runs and is ours: whoever is only forgotten would look at us to our end."""
        if self._pids and not self._ended and os.getpid() == self._owner:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self._wait()
        for file in self._files:
            file.close()

    def finish(self) -> Timeline:
        """End it: what was seen.

        Raises:
            MeasureError: it ended before, or does not answer.
        """
        answer = b""
        try:
            if not self._is_up():
                return Timeline()
            # A byte, not only the end of input: a process forked in the block may hold the pipe open.
            with contextlib.suppress(BrokenPipeError):
                self._ask.write(b"\n")
            self._ask.close()
            answer = self._read()
            self._wait()
        finally:
            self.give_up()
        code = os.waitstatus_to_exitcode(self._ended[0][1])
        if code or not answer.strip():
            raise MeasureError(
                f"the memory sampler ended early with exit code {code}; the peak is not known, run again"
            )
        timeline = Timeline()
        vars(timeline).update(json.loads(answer))
        return timeline

    def _read(self) -> bytes:
        until = time.monotonic() + _ANSWER_SECONDS
        pieces: list[bytes] = []
        while self._has_said(until):
            piece = self._answer.read(1 << 16)
            if not piece:
                return b"".join(pieces)
            pieces.append(piece)
        raise MeasureError("the memory sampler does not answer; the peak is not known, run again")

    def _wait(self) -> None:
        try:
            self._ended.extend(map(os.waitpid, (self.pid,), (0,)))
        except ChildProcessError:
            # Someone else waited for it, or the system does (SIGCHLD is ignored).
            self._ended.append((self.pid, 0))

    def _is_up(self) -> bool:
        return self._has_said(0.0)

    def _has_said(self, until: float) -> bool:
        # Not select.select, which cannot take a file number above 1023.
        poll = select.poll()
        poll.register(self._answer, select.POLLIN)
        return bool(poll.poll(max(0.0, until - time.monotonic()) * 1000))

    def __del__(self) -> None:
        interrupt = None
        while True:
            try:
                # Attributes that a Ctrl-C kept from being are of nothing that was begun.
                with contextlib.suppress(AttributeError):
                    self.give_up()
                break
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt
