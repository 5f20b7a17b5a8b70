"""Processes that load: a fresh one for each order, or forks of one that has imported everything."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parent.parent


class Fresh:
    """A new interpreter for each order: its imports are measured too."""

    def ask(self, order: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The child's answer; `failed` when it was killed or took more than `seconds`."""
        process = _start(json.dumps(order))
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"status": "failed", "reason": f"it took more than {seconds:.0f} s"}
        finally:
            _end(process)
        return _parse(output, process.returncode)

    def close(self) -> None:
        """There is nothing to close."""


class Forks:
    """One interpreter that imports once and forks for each order: quick, but imports are not measured."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, order: dict[str, Any], seconds: float) -> dict[str, Any]:
        """As that of `Fresh`."""
        if self._process is None:
            self._process = _start("serve")
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(order).encode() + b"\n")
        process.stdin.flush()
        # The pipe is unbuffered, so nothing can wait where poll does not see it.
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        if not poll.poll(seconds * 1000):
            self.close()
            return {"status": "failed", "reason": f"it took more than {seconds:.0f} s"}
        line = process.stdout.readline()
        if not line:
            self.close()
        return _parse(line, process.returncode)

    def close(self) -> None:
        """End it and its forks."""
        if self._process is not None:
            process, self._process = self._process, None
            with contextlib.suppress(OSError):
                assert process.stdin is not None
                process.stdin.close()
            _end(process)


def _start(argument: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "HF_HUB_OFFLINE": "1", "RUNAI_STREAMER_LOG_LEVEL": "WARNING"}
    return subprocess.Popen(
        [sys.executable, "-m", "bench.child", argument],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        bufsize=0,
        # Its own session, so that its forks end with it.
        start_new_session=True,
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def _parse(output: bytes, code: int | None) -> dict[str, Any]:
    lines = output.decode().splitlines()
    if not lines:
        return {"status": "failed", "reason": "killed" if code is None or code < 0 else f"exit {code}"}
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer
