"""What no input may bring lowmem to do: told as a `Broken`, whatever else is fuzzed."""

from __future__ import annotations

import codecs
import ctypes
import gc
import os
import re
import shutil
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import lowmem
from lowmem.errors import LowmemError

_PACKAGE = Path(lowmem.__file__).parent
SECONDS = 5
_OPEN = Path("/proc/self/fd")
# What waits for something that never comes takes no time of the processor, and nor does what the machine keeps waiting.
_PATIENCE = 6
# Beside the size of the input.
BYTES = 64 << 20

# Events of the interpreter that only code of a stranger would bring about, once everything is imported.
_RUNNING = frozenset(
    {
        *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "os.fork", "os.forkpty", "pty.spawn"),
        *("subprocess.Popen", "pickle.find_class", "marshal.loads", "marshal.load", "code.__new__", "function.__new__"),
        *("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "urllib.Request", "webbrowser.open"),
        *("ctypes.dlopen", "ctypes.dlsym", "import", "exec", "compile", "os.kill", "signal.pthread_kill"),
        *("os.putenv", "os.unsetenv", "os.chdir", "os.fchdir", "sys.addaudithook", "builtins.input", "os.killpg"),
    }
)
# What importing brings about.
_OF_IMPORTS = frozenset(
    ("import", "exec", "compile", "marshal.loads", "code.__new__", "function.__new__", "ctypes.dlopen", "ctypes.dlsym")
)
# Event → which of its arguments are paths that it changes.
_CHANGING: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.truncate", "os.utime"), (0,)),
    **dict.fromkeys(("os.setxattr", "os.removexattr", "shutil.rmtree", "tempfile.mkdtemp", "tempfile.mkstemp"), (0,)),
    **dict.fromkeys(("os.rename", "os.link", "shutil.move"), (0, 1)),
    **dict.fromkeys(("os.symlink", "shutil.copyfile", "shutil.copymode", "shutil.copystat"), (1,)),
}
# Of these a link among the names is what is changed, and not what it leads to.
_BY_NAME = frozenset({"os.mkdir", "os.remove", "os.rmdir", "os.rename", "os.symlink", "os.link"})
_LISTING = frozenset({"os.listdir", "os.scandir", "glob.glob", "os.walk"})
_OPENS_BESIDE = getattr(getattr(shutil, "_rmtree_safe_fd", None), "__code__", None)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# What lowmem asks of the kernel, by names that it has from no file.
_KERNEL = re.compile(
    r"/proc/((self|\d+)/(status|statm|mountinfo|cgroup|pagemap|smaps_rollup|task|task/\d+/children|fd|limits)|meminfo"
    r"|thread-self/children|sys/kernel/random/boot_id|sys/vm/\w+)|/sys/fs/cgroup(/.*)?|/sys/class/bdi/.*|/dev/null"
)
# Modules that are imported when first needed, although every sound input ran before: what their names begin with.
LAZY: list[str] = ["encodings."]


class Broken(BaseException):
    """A rule was broken; not an `Exception`, so that nothing on the way can take it for an error of its own."""


@dataclass
class Rules:
    """Where one execution may read and write."""

    read: tuple[str, ...]
    write: tuple[str, ...]


class Guard:
    """Watches this process; one for each.

    Args:
        seconds: of the processor that an execution may take; what waits ends after some times as much.

    Attributes:
        executions: how often something was run.
        refused: how often it ended in a `LowmemError`.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.executions = self.refused = 0
        self.seconds = seconds
        self._rules: Rules | None = None
        self._broken: str | None = None
        self._rested = 0
        self._began = 0.0, 0.0
        # The interpreter's own files: sources for tracebacks.
        paths = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")} | {str(_PACKAGE)}
        self._own = tuple(os.path.realpath(path) for path in paths if path)
        for name in ("raw_unicode_escape", "latin_1", "cp437", "utf_8", "ascii", "idna"):
            codecs.lookup(name)  # imported when first asked for, and lowmem asks for these
        sys.addaudithook(self._hear)
        # Python hears a signal between its own steps only: what computes in C for ever is ended by the kernel.
        signal.signal(signal.SIGPROF, signal.SIG_DFL)

    def run(
        self, function: Callable[[], Any], *, size: int, read: Path, write: Path | None = None, holds: bool = False
    ) -> Any:
        """What `function()` gives, or None when it raised a `LowmemError`.

        Args:
            function: calls lowmem.
            size: bytes of the input.
            read: the folder it may read in.
            write: the folder it may write in.
            holds: what it gives may hold files open, as mappings do.

        Raises:
            Broken: it did what no input may bring it to do.
        """
        self.executions += 1
        before, held = _state(), self._rest()
        try:
            with self._watched(Rules(_real(read), _real(write) if write else ())):
                made = function()
        except LowmemError as error:
            self.refused += 1
            text = str(error)
            if not text or len(text) > 20_000:
                raise Broken(f"an error of {len(text)} characters: {text[:200]}") from error
            made, holds = None, False
        except (KeyboardInterrupt, Broken):
            raise
        except BaseException as error:
            raise Broken(f"{type(error).__name__} came out: {error}"[:2000]) from error
        taken = _high_water() - held
        if taken > BYTES + size:
            raise Broken(f"{taken >> 20} MiB of memory for an input of {size} bytes")
        self._check_left(before, holds)
        return made

    @contextmanager
    def _watched(self, rules: Rules) -> Iterator[None]:
        self._broken = None
        self._began = time.monotonic(), time.process_time()
        signal.setitimer(signal.ITIMER_PROF, 8 * self.seconds)
        handler = signal.signal(signal.SIGALRM, self._hung)
        timer = signal.setitimer(signal.ITIMER_REAL, self.seconds)
        self._rules = rules
        try:
            yield
        finally:
            self._rules = None
            signal.setitimer(signal.ITIMER_PROF, 0)
            # Who runs the tests has a timer of its own.
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
            signal.setitimer(signal.ITIMER_REAL, *timer)
            # Whatever came of it: somebody may have taken it for an error, and a thread may have died of it.
            if self._broken is not None:
                raise Broken(self._broken)
            self._check_time()

    def _rest(self) -> int:
        """Bytes resident before an execution; what those before it freed is given back, or it would hide growth."""
        held = _high_water(reset=True)
        if held > self._rested + (16 << 20):
            gc.collect()
            if _trim is not None:
                _trim(0)
            held = self._rested = _high_water(reset=True)
        return held

    def _check_left(self, before: dict[str, Any], holds: bool) -> None:
        """Nothing of the process is other than it was: threads, open files, what is set for all."""
        for attempt in range(3):
            after = _state()
            others = {name for name, value in after.items() if value != before[name]}
            others -= {"open files"} if holds else set()
            # Threads that end, and what only a cycle of garbage holds.
            if not others:
                return
            gc.collect()
            time.sleep(0.1 * attempt)
        changed = {name: (before[name], after[name]) for name in sorted(others)}
        raise Broken(f"left behind, before and after: {changed}"[:2000])

    def _hung(self, signum: int, frame: FrameType | None) -> None:
        # Timers of a fuzzer come here too.
        if self._rules is not None:
            signal.setitimer(signal.ITIMER_REAL, self.seconds)
            self._check_time()

    def _check_time(self) -> None:
        """Of this process alone: on a machine that does much else, an hour may pass."""
        wall, used = time.monotonic() - self._began[0], time.process_time() - self._began[1]
        if used > self.seconds or wall > _PATIENCE * self.seconds:
            self._break(f"it takes {used:.1f} s of the processor, {wall:.1f} s in all")

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        rules = self._rules
        if rules is None:
            return
        if event == "open":
            path, mode, flags = args
            writes = bool(flags & _WRITING) if isinstance(flags, int) else any(c in (mode or "") for c in "wax+")
            if isinstance(path, int) or (not writes and self._is_own(path)):
                return
            if not writes and sys._getframe(1).f_code is _OPENS_BESIDE:
                return  # Of a folder that was looked at when its removal began, whose descriptor is not told here.
            if not _below(path, rules.write if writes else rules.read + rules.write):
                self._break(f"opened {path!r} to {'write' if writes else 'read'}")
        elif event in _CHANGING:
            for path in _changed(event, args):
                if not _below(path, rules.write):
                    self._break(f"{event}{args!r}"[:500])
        elif event in _LISTING:
            if (
                args
                and _is_path(args[0])
                and not self._is_own(args[0])
                and not _below(args[0], rules.read + rules.write)
            ):
                self._break(f"{event}{args!r}"[:500])
        elif event in _RUNNING and not _is_harmless(event, args):
            self._break(f"{event}{args!r}"[:500])

    def _break(self, what: str) -> None:
        """Known at once where it happens, and told again at the end, should somebody have taken it for an error."""
        self._broken = self._broken or what
        raise Broken(what)

    def _is_own(self, path: Any) -> bool:
        text = os.fsdecode(path)
        if _KERNEL.fullmatch(text):
            return True
        # An import lists the folder of encodings when it has changed since.
        return text.endswith((".py", ".pyc", "/encodings")) and _below(path, self._own)


class Unwatched(Guard):
    """Runs without rules: sound inputs before the others, so that what is imported when first needed is there."""

    def __init__(self) -> None:
        self.executions = self.refused = 0

    def run(
        self, function: Callable[[], Any], *, size: int, read: Path, write: Path | None = None, holds: bool = False
    ) -> Any:
        """What `function()` gives, or None when it raised a `LowmemError`."""
        try:
            return function()
        except LowmemError:
            return None


def _is_harmless(event: str, args: tuple[Any, ...]) -> bool:
    """Only modules of `LAZY`, and what runs while one of them is imported: all else was imported with sound inputs."""
    if event == "import" and _is_lazy(args[0]):
        return True
    if event == "ctypes.dlopen" and args[0] is None:
        return True
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        file = frame.f_code.co_filename
        if event == "ctypes.dlsym" and _below(file, (os.path.realpath(_PACKAGE),)):
            return True  # of the C library, by names that lowmem has from no file
        if file.startswith("<frozen importlib") and _is_lazy(frame.f_locals.get("name")):
            return event in _OF_IMPORTS
        frame = frame.f_back
    return False


def _is_lazy(module: Any) -> bool:
    return isinstance(module, str) and module.startswith(tuple(LAZY))


def _state() -> dict[str, Any]:
    """What a function has no business to leave changed."""
    return {
        "threads": set(threading.enumerate()),
        "open files": len(list(_OPEN.iterdir())) if _OPEN.is_dir() else 0,
        "garbage collector": gc.isenabled(),
        "gradients": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "folder": Path.cwd(),
        "search path": tuple(sys.path),
        "environment": dict(os.environ),
        "recursion limit": sys.getrecursionlimit(),
        "signals": (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)),
    }


def _real(path: Path) -> tuple[str, ...]:
    return (os.path.realpath(path),)


def _is_path(value: Any) -> bool:
    return isinstance(value, str | bytes | os.PathLike)


def _changed(event: str, args: tuple[Any, ...]) -> Iterator[str]:
    """What is changed, by its whole path."""
    # Such names may be told beside the descriptor of their folder (`shutil.rmtree`).
    folders = [fd for fd in args[2 if event == "os.mkdir" else 1 :] if isinstance(fd, int)] if event in _BY_NAME else []
    for n, at in enumerate(_CHANGING[event]):
        if at >= len(args) or not _is_path(args[at]):
            continue
        fd = folders[n] if n < len(folders) else -1
        whole = Path(f"/proc/self/fd/{fd}" if fd >= 0 else "", os.fsdecode(args[at]))
        if event in _BY_NAME:
            whole = Path(os.path.realpath(whole.parent), "link" if whole.is_symlink() else whole.name)
        yield str(whole)


def _below(path: Any, folders: tuple[str, ...]) -> bool:
    # Links are followed: a name inside that leads outside is outside.
    real = os.path.realpath(os.fsdecode(path))
    return any(real == folder or real.startswith(folder + os.sep) for folder in folders)


def _high_water(reset: bool = False) -> int:
    """Most bytes that this process has had resident, since the last reset where the kernel lets it be reset.

    Where it does not, a larger growth before hides a smaller one after.
    """
    if reset:
        with suppress(OSError), Path("/proc/self/clear_refs").open("w") as clear:
            clear.write("5")
    with suppress(OSError), Path("/proc/self/status").open("rb") as status:
        for line in status:
            if line.startswith(b"VmHWM:"):
                return int(line.split()[1]) << 10
    return 0


def _allocator() -> Callable[[int], int] | None:
    """glibc's `malloc_trim`, where there is one."""
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim


_trim = _allocator()
