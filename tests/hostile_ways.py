"""Every public way into the package, tried on a hostile file in a child: what came of it, what it took, what it opened.

A job of `fresh.server` calls `attempt`. The child is ended by an alarm when a way hangs, so a hang is a failed job.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import fresh

JOB = "import hostile_ways; result = hostile_ways.attempt(**args)"
MIB = 2**20
# What a way may add to the bytes of its input.
ROOM = 64 * MIB
# A guard against hangs only: each way is to end within five seconds on an idle machine.
SECONDS = 60
LONGEST = 8000
LIBRARY = ("inspect", "check", "stream", "convert", "plan", "load", "diff", "source")
SHELL = ("inspect --tensors", "plan", "load", "diff", "check", "convert")
WAYS = (*LIBRARY, *(f"lowmem {verb}" for verb in SHELL))
IMPORTS = ("hostile_ways", "torch._dynamo", "lowmem.converter", "lowmem.checker", "lowmem.streaming", "rich.table")
# What may steer a terminal: C0 but for tab and newline, DEL, C1, and what changes the direction of text.
STEERING = {*map(chr, (*range(9), *range(11, 32), *range(127, 160)))}
STEERING |= set("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029\ufeff\u200b")


ENTRY: dict[str, Any] = {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]}
SOUND = {"weight": ENTRY, "bias": {"dtype": "F32", "shape": [3], "data_offsets": [24, 36]}}


def safetensors(header: Any, data: bytes = bytes(36), length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def folder_of(path: Path, raw: bytes, name: str = "model.safetensors") -> Path:
    path.mkdir(exist_ok=True)
    (path / name).write_bytes(raw)
    return path


def one(**changed: Any) -> dict[str, Any]:
    return {"weight": {**ENTRY, **changed}}


def special(path: Path, kind: str) -> Path:
    """A file of a kind that no checkpoint has."""
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "socket":
            here = Path.cwd()
            os.chdir(path.parent)
            try:
                socket.socket(socket.AF_UNIX).bind(path.name)
            finally:
                os.chdir(here)
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "loop":
            path.symlink_to(path.name)
        case "nowhere":
            path.symlink_to("nowhere")
        case "4 GB":
            path.touch()
            os.truncate(path, 4 << 30)
    return path


KINDS = ("fifo", "socket", "device", "folder", "loop", "nowhere", "4 GB")


def tried(
    source: Path | str,
    *,
    ways: Iterable[str] = WAYS,
    model: str = "",
    options: dict[str, Any] | None = None,
    allowed: Sequence[Path] = (),
    seconds: int = SECONDS,
) -> dict[str, dict[str, Any]]:
    """Way → what came of it, after asserting what must be so of each.

    Args:
        source: what is given to each way.
        ways: which of `WAYS`.
        model: what is given as the model, of `MODELS`; the config beside the source otherwise.
        options: more for the ways that load.
        allowed: folders and files that may be opened besides the source's own folder.
        seconds: when the child is ended.
    """
    found: dict[str, dict[str, Any]] = fresh.server(*IMPORTS).run(
        JOB,
        source=str(source),
        ways=list(ways),
        model=model,
        options=options or {},
        allowed=[str(path) for path in allowed],
        seconds=seconds,
    )
    for way, came in found.items():
        assert came["outcome"] in ("fine", "refused"), (way, came)
        assert not came["outside"], (way, came["outside"])
        assert came["added"] <= came["input"] + ROOM, (way, came)
        assert len(came["text"]) <= LONGEST, (way, len(came["text"]), came["text"][:300])
        assert not STEERING & set(came["text"]), (way, came["text"][:1000])
    return found


def refused(source: Path | str, match: str = "", **given: Any) -> None:
    """Every way refuses the source, with `match` in what it says."""
    for way, came in tried(source, **given).items():
        assert came["outcome"] == "refused", (way, came)
        assert match in came["text"], (way, came["text"][:1000])


def linear() -> Any:
    from torch import nn

    return nn.Linear(2, 3)


MODELS: dict[str, Callable[[], Any]] = {"linear": linear}


def attempt(
    source: str, ways: list[str], model: str, options: dict[str, Any], allowed: list[str], seconds: int
) -> dict[str, dict[str, Any]]:
    """Try each way in this process; only for a child."""
    signal.alarm(seconds)
    import resource
    import tempfile

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out = tempfile.mkdtemp(prefix="lowmem-out-")
    seen: list[str] = []
    roots = tuple(os.path.realpath(p) for p in (*_places(source), *allowed, out))
    sys.addaudithook(lambda event, args: _note(event, args, roots, seen))
    found = {}
    for number, way in enumerate(ways):
        del seen[:]
        size = _size_of(source)
        before = _reset_peak()
        outcome, text = _outcome(way, source, MODELS.get(model), options, f"{out}/{number}")
        added = _peak() - before
        found[way] = {"outcome": outcome, "text": text[:100_000], "added": added, "input": size, "outside": [*seen]}
    import shutil

    shutil.rmtree(out, ignore_errors=True)
    return found


def _places(source: str) -> tuple[str, ...]:
    path = Path(source)
    return (source, str(path if path.is_dir() else path.parent))


def _size_of(source: str) -> int:
    """Bytes that the files of a source take on the disk: holes are no input."""
    total = 0
    path = Path(source)
    for file in [path, *(path.rglob("*") if path.is_dir() else ())]:
        with contextlib.suppress(OSError, ValueError):
            total += file.lstat().st_blocks * 512 if file.is_file() else 0
    return total


def _outcome(
    way: str, source: str, make: Callable[[], Any] | None, options: dict[str, Any], out: str
) -> tuple[str, str]:
    import lowmem

    try:
        if way.startswith("lowmem "):
            return _shell(way.split()[1:], source, make, options, out)
        return "fine", str(_call(way, source, make, options, out))
    except lowmem.LowmemError as error:
        return "refused", f"{error}"
    except BaseException as error:
        import traceback

        return f"raised {type(error).__name__}", traceback.format_exc()[-3000:]


def _call(way: str, source: str, make: Callable[[], Any] | None, options: dict[str, Any], out: str) -> Any:
    import lowmem

    given = dict(options)
    if make is not None:
        given["model"] = make
    match way:
        case "inspect":
            found = lowmem.inspect(source)
            return len(found), list(map(ascii, found.warnings))[:20]
        case "check":
            report = lowmem.check(source, **{k: v for k, v in options.items() if k.endswith("manifest")})
            return len(report.files), [ascii(str(p)) for p in report.problems][:20]
        case "stream":
            return sum(1 for _ in lowmem.stream(source))
        case "convert":
            lowmem.convert(source, out)
        case "plan":
            lowmem.plan(source, **given)
        case "load":
            lowmem.load(source, **given)
        case "diff":
            return len(lowmem.diff(source, **{k: v for k, v in given.items() if k == "model"}).text())
        case "source":
            lowmem.plan({"": lowmem.Source(source)}, **given)
    return ""


def _shell(
    words: list[str], source: str, make: Callable[[], Any] | None, options: dict[str, Any], out: str
) -> tuple[str, str]:
    from lowmem.cli import main

    verb, more = words[0], words[1:]
    more += [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    arguments = [verb, *more, "--", source, *([out] if verb == "convert" else [])]
    if make is not None and verb in ("plan", "load", "diff"):
        arguments = [verb, "--model", "hostile_ways:linear", *more, "--", source]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = main(arguments)
        except SystemExit as ended:
            code = 99 if ended.code is None else int(ended.code)
    return ("fine" if code == 0 else "refused" if code in (1, 2) else f"ended with {code}"), said.getvalue()


_RESET = "/proc/self/clear_refs"
# The only program that a load starts: it looks at the memory of its parent.
_SAMPLER = str(Path(__file__).parent.parent / "lowmem" / "_sampler.py")
_CODE = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn", "webbrowser.open")
_CHANGES = ("os.remove", "os.rename", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.truncate", "shutil.")
_KNOWN = (sys.prefix, sys.base_prefix, Path(__file__).parent.parent, "/proc", "/sys", "/dev/null", "/dev/urandom")
_OURS = (*map(os.path.realpath, _KNOWN), "/usr/", "/lib", "/etc/")


def _note(event: str, args: tuple[Any, ...], roots: tuple[str, ...], seen: list[str]) -> None:
    """Keep what no input may cause: code that runs, a socket, a file that is written or read outside of `roots`."""
    if event == "os.posix_spawn" and _SAMPLER in args[1]:
        return
    if event.startswith(_CODE) or event in ("socket.connect", "socket.bind"):
        seen.append(f"{event} {args!r}"[:300])
    if event == "open" and isinstance(args[0], (str, bytes, Path)) and str(args[0]) != _RESET:
        path = os.path.realpath(os.fsdecode(args[0]))
        writes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not path.startswith(roots) and ((writes and path != "/dev/null") or not path.startswith(_OURS)):
            seen.append(f"open {path} {args[1]!r}"[:300])
    if event.startswith(_CHANGES):
        # Such a name may be told beside the open folder that it is in.
        inside = Path(f"/proc/self/fd/{args[2]}") if event == "os.mkdir" and args[2] >= 0 else Path()
        for arg in args[:2]:
            if isinstance(arg, (str, bytes)) and not os.path.realpath(inside / os.fsdecode(arg)).startswith(roots):
                seen.append(f"{event} {args!r}"[:300])


def _reset_peak() -> int:
    with Path(_RESET).open("w") as file:
        file.write("5")
    return _peak()


def _peak() -> int:
    """The most that was resident since the peak was reset; what is mapped counts, so no test may map much."""
    with Path("/proc/self/status").open() as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
