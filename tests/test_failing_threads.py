"""Threads that are refused, and a system that does not say what it has: fewer threads, or an error that says so."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any, NoReturn

import failing
import pytest
from fault_shim import under_shim

import lowmem
from lowmem import _shared

_ALL = failing.is_full()


def _try(function: str, root: Path, *args: Any) -> failing.Sweep:
    made: failing.Sweep = under_shim(failing.fresh_sweep, function, str(root / "root"), *args, timeout=3000)
    assert made.tried
    assert not made.problems, f"{len(made.problems)} of {made.tried}:\n" + "\n".join(made.problems[:20])
    return made


def test_threads_that_are_refused_are_done_without_or_named(tmp_path: Path) -> None:
    names = list(failing.WAYS) if _ALL else ["cast", "check", "convert"]
    made = _try("sweep_threads", tmp_path, names)
    assert made.succeeded
    assert made.refused


def test_a_system_that_does_not_say_what_it_has_is_named(tmp_path: Path) -> None:
    kinds = [("open", (errno.EACCES, errno.EMFILE)), ("read", (errno.EIO,)), ("stat", (errno.EIO,))]
    names = list(failing.WAYS) if _ALL else ["cast"]
    for part in ("/proc", "/sys"):
        made = _try("sweep", tmp_path / part[1:], names, kinds if _ALL else kinds[1:], 10**6 if _ALL else 3, part)
        assert made.succeeded


def test_a_measurement_without_a_sampler_has_its_start_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    def refuse_thread(_: threading.Thread) -> NoReturn:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(os, "posix_spawn", refuse)
    monkeypatch.setattr(threading.Thread, "start", refuse_thread)
    with lowmem.measure() as measured:
        pass
    assert measured.method == "thread"
    assert measured.gap == pytest.approx(measured.seconds)


def test_a_thread_that_ends_before_it_begins_is_one_that_was_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """For want of memory: Python alone would wait for it without end."""
    monkeypatch.setattr(_shared, "_BEGINS_WITHIN", 0.05)
    thread = threading.Thread(target=print, daemon=True)
    monkeypatch.setattr(thread, "_bootstrap", lambda: None)
    with pytest.raises(RuntimeError, match="it ended before it began"):
        _shared.start(thread)
    assert thread not in threading.enumerate()
