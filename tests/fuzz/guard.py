"""What no input may bring lowmem to do: told as a `Broken`, whatever else is fuzzed."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from lowmem.errors import LowmemError

SECONDS = 5
# Beside the size of the input.
BYTES = 64 << 20

# Events of the interpreter that only code of a stranger would bring about.
_RUNNING = (
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "os.fork", "os.forkpty", "pty.spawn"),
    *("subprocess.Popen", "pickle.find_class", "marshal.loads", "code.__new__", "function.__new__"),
    *("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "urllib.Request", "webbrowser.open"),
    *("ctypes.dlopen", "ctypes.dlsym", "import", "exec", "compile", "os.kill", "signal.pthread_kill", "os.putenv"),
)
_CHANGING = (
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.chown", "os.truncate"),
    *(
        "os.utime",
        "os.setxattr",
        "os.removexattr",
        "shutil.rmtree",
        "shutil.move",
        "shutil.copyfile",
        "tempfile.mkdtemp",
    ),
    "tempfile.mkstemp",
)
_OPENS_BESIDE = getattr(getattr(shutil, "_rmtree_safe_fd", None), "__code__", None)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Broken(BaseException):
    """A rule was broken; not an `Exception`, so that nothing on the way can take it for an error of its own."""


@dataclass
class Rules:
    """Where one execution may read and write."""

    read: tuple[str, ...]
    write: tuple[str, ...]


class Guard:
    """Watches this process; one for each.

    Attributes:
        executions: how often something was run.
        refused: how often it ended in a `LowmemError`.
    """

    def __init__(self) -> None:
        self.executions = self.refused = 0
        self._rules: Rules | None = None
        self._thread = threading.get_ident()
        self._broken: str | None = None
        # The interpreter's own files: sources for tracebacks, and modules that were not needed before.
        paths = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")} | {sys.prefix, sys.base_prefix}
        self._own = tuple(os.path.realpath(path) for path in paths if path)
        sys.addaudithook(self._hear)
        signal.signal(signal.SIGALRM, self._hung)

    def run(self, function: Callable[[], Any], *, size: int, read: Path, write: Path | None = None) -> Any:
        """What `function()` gives, or None when it raised a `LowmemError`.

        Args:
            function: calls lowmem.
            size: bytes of the input.
            read: the folder it may read in.
            write: the folder it may write in.

        Raises:
            Broken: it did what no input may bring it to do.
        """
        self.executions += 1
        held = _high_water(reset=True)
        try:
            with self._watched(Rules(_real(read), _real(write) if write else ())):
                return function()
        except LowmemError as error:
            self.refused += 1
            text = str(error)
            # `None` is printed by what asks whether there is a text; the rest is what a user could not read.
            if not text or len(text) > 20_000:
                raise Broken(f"an error of {len(text)} characters: {text[:200]}") from error
            return None
        except (KeyboardInterrupt, Broken):
            raise
        except BaseException as error:
            raise Broken(f"{type(error).__name__} came out: {error}"[:2000]) from error
        finally:
            taken = _high_water() - held
            if taken > BYTES + size and sys.exc_info()[0] is not Broken:
                # Garbage of the executions before may have been on its way.
                gc.collect()
                raise Broken(f"{taken >> 20} MiB of memory for an input of {size} bytes")

    @contextmanager
    def _watched(self, rules: Rules) -> Iterator[None]:
        threads = threading.active_count()
        self._broken = None
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        self._rules = rules
        try:
            yield
        finally:
            self._rules = None
            signal.setitimer(signal.ITIMER_REAL, 0)
            if self._broken is not None:
                raise Broken(self._broken)
        if threading.active_count() > threads:
            time.sleep(0.2)
            if threading.active_count() > threads:
                raise Broken(f"threads are left: {threading.enumerate()}")

    def _hung(self, signum: int, frame: FrameType | None) -> None:
        raise Broken(f"it takes more than {SECONDS} s")

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
        elif event in _RUNNING and not self._is_harmless(event, args):
            self._break(f"{event}{args!r}"[:500])

    def _break(self, what: str) -> None:
        """Known at once where it happens, and told again at the end, should somebody have taken it for an error."""
        self._broken = self._broken or what
        raise Broken(what)

    def _is_own(self, path: Any) -> bool:
        text = os.fsdecode(path)
        return text.startswith(("/proc/", "/sys/", "/dev/null", "/etc/")) or _below(path, self._own)

    def _is_harmless(self, event: str, args: tuple[Any, ...]) -> bool:
        """Modules of the libraries that are imported when first needed, and what dataclasses and ctypes do then."""
        if event == "import":
            return args[1] is None or _below(args[1], self._own) or str(args[1]).endswith(".so")
        if event in ("exec", "compile"):
            name = args[0].co_filename if event == "exec" else args[1]
            return isinstance(name, str | bytes) and (name[:1] in ("<", b"<") or _below(name, self._own))
        if event in ("marshal.loads", "code.__new__", "function.__new__", "ctypes.dlsym", "ctypes.dlopen"):
            frame: FrameType | None = sys._getframe()
            while frame is not None:
                if frame.f_code.co_filename.startswith("<frozen importlib") or "ctypes" in frame.f_code.co_filename:
                    return True
                frame = frame.f_back
            # Looked up by lowmem in the C library: no name that a file gives.
            return event.startswith("ctypes")
        return False


class Unwatched(Guard):
    """Runs without rules: sound inputs before the others, so that what is imported when first needed is there."""

    def __init__(self) -> None:
        self.executions = self.refused = 0

    def run(self, function: Callable[[], Any], *, size: int, read: Path, write: Path | None = None) -> Any:
        """What `function()` gives."""
        return function()


def _real(path: Path) -> tuple[str, ...]:
    return (os.path.realpath(path),)


def _changed(event: str, args: tuple[Any, ...]) -> Iterator[str]:
    """What is changed, by its whole path."""
    count = 2 if event in ("os.rename", "os.link", "shutil.move") else 1
    # Of a link and of a copy the second is what is made.
    named = args[1:2] if event in ("os.symlink", "shutil.copyfile") else args[:count]
    by_name = event in ("os.remove", "os.rmdir", "os.rename", "os.symlink", "os.link")
    # Such names may be told beside the descriptor of their folder (`shutil.rmtree`).
    folders = [fd for fd in args[1:] if isinstance(fd, int)] if by_name else []
    for n, path in enumerate(named):
        if not isinstance(path, str | bytes | os.PathLike):
            continue
        fd = folders[n] if n < len(folders) else -1
        whole = Path(f"/proc/self/fd/{fd}" if fd >= 0 else "", os.fsdecode(path))
        if by_name:
            # A link is removed or renamed, and not what it leads to.
            whole = Path(os.path.realpath(whole.parent), "link" if whole.is_symlink() else whole.name)
        yield str(whole)


def _below(path: Any, folders: tuple[str, ...]) -> bool:
    # Links are followed: a name inside that leads outside is outside.
    real = os.path.realpath(os.fsdecode(path))
    return any(real == folder or real.startswith(folder + os.sep) for folder in folders)


def _high_water(reset: bool = False) -> int:
    """Most bytes that this process has had resident, since the last reset."""
    if reset:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return 1 << 62  # Cannot be measured here.
    with Path("/proc/self/status").open("rb") as status:
        for line in status:
            if line.startswith(b"VmHWM:"):
                return int(line.split()[1]) << 10
    return 0
