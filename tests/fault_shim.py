"""Processes whose system calls fail on demand, by the library of tests/faults/shim.c."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

_SOURCE = Path(__file__).parent / "faults" / "shim.c"

# In the order of the C source.
ACTIONS = ("pass", "fail", "short", "end", "kill", "kill after", "torn", "call back")
CALLS = (
    *("open", "read", "write", "sync", "resize", "rename", "link", "unlink", "mkdir", "rmdir", "stat", "list", "map"),
    *("lock", "copy", "close", "allocate", "thread"),
)


@dataclass(frozen=True)
class Fault:
    """What is to go wrong.

    Attributes:
        calls: kinds of system calls, of `CALLS`; "allocate" is memory and "thread" the start of one, whatever
            the folders.
        folders: only calls on paths at or below these count.
        at: the first call that fails, counted from 0.
        times: how many fail from there on; 0 for all.
        action: of `ACTIONS`. "fail" with `error`; "short" moves half of the bytes; "end" moves none; "kill" and "kill
            after" end the process before and behind the call, "torn" behind half a write; "call back" calls `back`.
        error: of module errno.
        larger: bytes from which on a read, write, map or allocation counts.
    """

    calls: Sequence[str]
    folders: Iterable[str | os.PathLike[str]] = ()
    at: int = 0
    times: int = 1
    action: str = "fail"
    error: int = errno.EIO
    larger: int = 0
    back: Callable[[], object] | None = None

    def moved(self, at: int) -> Fault:
        """The same at another call."""
        return replace(self, at=at)


@dataclass
class Armed:
    """Of a fault that is or was armed: how many calls were counted, which, and how many did what they should."""

    counted: int = 0
    fired: int = 0
    kinds: tuple[str, ...] = ()


@functools.cache
def shim() -> Path:
    """The compiled library; skips the test where there is none."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if sys.platform != "linux" or compiler is None or os.confstr("CS_GNU_LIBC_VERSION") is None:
        pytest.skip("needs Linux with glibc and a C compiler")
    made = Path(tempfile.gettempdir()) / f"lowmem-faults-{os.getpid()}.so"
    subprocess.run(
        [compiler, "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Werror", "-o", made, _SOURCE, "-ldl"],
        check=True,
    )
    return made


@functools.cache
def _library() -> Any:
    """The library in this process, where it was preloaded."""
    library = ctypes.CDLL(None)
    library.fault_arm.argtypes = (
        *(ctypes.c_uint, ctypes.c_long, ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_size_t, ctypes.c_char_p),
        ctypes.c_void_p,
    )
    library.fault_arm.restype = None
    library.fault_counted.restype = library.fault_fired.restype = ctypes.c_long
    library.fault_logged.argtypes = (ctypes.c_long,)
    return library


@contextmanager
def armed(fault: Fault) -> Iterator[Armed]:
    """Within this, in a process of `under_shim`, calls fail as `fault` says."""
    library, result = _library(), Armed()
    bits = sum(1 << CALLS.index(call) for call in fault.calls)
    folders = "\n".join(os.path.realpath(folder) for folder in fault.folders).encode()
    back = ctypes.CFUNCTYPE(None)(fault.back or (lambda: None))
    pointer = ctypes.cast(back, ctypes.c_void_p) if fault.back else None
    action = ACTIONS.index(fault.action)
    library.fault_arm(bits, fault.at, fault.times, action, fault.error, fault.larger, folders, pointer)
    try:
        yield result
    finally:
        library.fault_disarm()
        result.counted, result.fired = library.fault_counted(), library.fault_fired()
        result.kinds = tuple(CALLS[library.fault_logged(n)] for n in range(min(result.counted, 1 << 16)))


def under_shim(function: Callable[..., Any], *args: Any, timeout: float = 300) -> Any:
    """What `function(*args)` gives in a new process in which faults can be armed.

    It must be a function of a module that can be imported, and what it gives picklable.

    Raises:
        AssertionError: the function raised, or the process died or hung; with what it wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        job, answer = Path(folder) / "job", Path(folder) / "answer"
        job.write_bytes(pickle.dumps((function.__module__, function.__qualname__, args)))
        paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
        environment = {
            **os.environ,
            "LD_PRELOAD": str(shim()),
            "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        command = [sys.executable, "-X", "faulthandler", __file__, str(job), str(answer)]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired as expired:
            raise AssertionError(f"it hung for {timeout} s:\n{expired.stderr!r}") from None
        assert done.returncode == 0, f"exit {done.returncode}:\n{done.stderr[-6000:]}"
        return pickle.loads(answer.read_bytes())


def in_fork(function: Callable[[], Any], timeout: float = 120) -> int:
    """Call `function` in a fork of this process: its exit code, minus a signal's number if one ended it.

    0 for a function that came back, 1 for one that raised, whose traceback is written. Cheap: nothing is imported
    again. Only for processes that have no other threads.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(int(timeout))
            function()
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _serve(job: str, answer: str) -> None:
    import importlib

    module, name, args = pickle.loads(Path(job).read_bytes())
    # A test's module, seen from here under its own name.
    function: Any = importlib.import_module(module)
    for part in name.split("."):
        function = getattr(function, part)
    result = function(*args)
    Path(answer).write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    _serve(*sys.argv[1:])
