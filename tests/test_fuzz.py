"""The fuzzer itself: the guard notices what it forbids, the kept corpus passes, and so do short runs of each target."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz import guard as guards
from fuzz.chance import run_by_chance, the_guard
from fuzz.guard import Broken
from fuzz.targets import CORPUS, all_targets

from lowmem import CheckpointError

# What is kept of each target, and of all inputs of one.
MOST_FILES, MOST_BYTES = 80, 200_000
NAMES = sorted(all_targets())
GUIDED = ["pickled", "safetensors"]
# Threads that a test leaves wait for it.
over = threading.Event()


@pytest.fixture(autouse=True)
def in_peace() -> Any:
    """The guard's timers are stopped, and what a test let loose is taken back."""
    over.clear()
    yield
    over.set()
    torch.set_default_dtype(torch.float32)
    gc.enable()
    os.environ.pop("OF_A_TEST", None)


def judge(function: Callable[[], Any], folder: Path, **more: Any) -> Any:
    return the_guard().run(function, size=100, read=folder, **more)


def caught_within(folder: Path) -> None:
    """As code that takes every error for its own would."""
    try:
        (folder.parent / "beside").read_bytes()
    except BaseException:
        return


def in_thread(function: Callable[[], Any]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def quiet(function: Callable[[], Any]) -> None:
    try:
        function()
    except BaseException:
        return


FORBIDDEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a command": (lambda folder: os.system("true"), "os.system"),
    "a process": (lambda folder: subprocess.run(["true"], check=True), "subprocess.Popen"),
    "a read outside": (lambda folder: (folder.parent / "beside").read_bytes(), "beside' to read"),
    "a read outside that is taken for an error": (caught_within, "beside' to read"),
    "a read outside in a thread": (
        lambda f: in_thread(lambda: quiet(lambda: (f.parent / "beside").read_bytes())),
        "beside",
    ),
    "a read through a link": (lambda folder: (folder / "link").read_bytes(), "link' to read"),
    "a list of another folder": (lambda folder: list(folder.parent.iterdir()), "os.listdir"),
    "a secret of the system": (lambda folder: Path("/proc/self/environ").read_bytes(), "environ' to read"),
    "a password": (lambda folder: Path("/etc/passwd").read_bytes(), "passwd' to read"),
    "a write": (lambda folder: (folder / "x").write_bytes(b""), "to write"),
    "a folder": (lambda folder: (folder / "x").mkdir(), "os.mkdir"),
    "a rename": (lambda folder: (folder / "held").rename(folder / "x"), "os.rename"),
    "a removal": (lambda folder: (folder / "held").unlink(), "os.remove"),
    "a temporary file": (lambda folder: tempfile.mkdtemp(), "to write|tempfile"),
    "an import": (lambda folder: __import__("antigravity"), "import"),
    "code": (lambda folder: eval("1 + 1"), "compile"),
    "a program in pieces": (lambda folder: exec(compile("1", "x", "exec")), "compile"),
    "a library": (lambda folder: ctypes.CDLL("libm.so.6"), "ctypes.dlopen"),
    "another error": (lambda folder: 1 // 0, "ZeroDivisionError came out"),
    "an error of the system": (lambda folder: (folder / "nothing").read_bytes(), "FileNotFoundError came out"),
    "too little memory": (lambda folder: quiet_raise(MemoryError()), "MemoryError came out"),
    "another thread": (lambda folder: threading.Thread(target=over.wait).start(), "threads"),
    "another folder to be in": (lambda folder: os.chdir("/"), "os.chdir"),
    "the environment": (lambda folder: os.environ.update(OF_A_TEST="1"), "os.putenv"),
    "the default dtype": (lambda folder: torch.set_default_dtype(torch.float64), "default dtype"),
    "the garbage collector": (lambda folder: gc.disable(), "garbage collector"),
    "an endless text": (lambda folder: quiet_raise(EndlessError()), "an error of 30000 characters"),
}


class EndlessError(CheckpointError):
    """Its text is not bounded, as that of all others is."""

    def __str__(self) -> str:
        return "x" * 30_000


def quiet_raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("name", FORBIDDEN)
def test_the_guard_notices(name: str, tmp_path: Path) -> None:
    """What no input may bring about, also where it is taken for an error, or happens in a thread."""
    function, said = FORBIDDEN[name]
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "beside").write_bytes(b"secret")
    (folder / "held").write_bytes(b"")
    (folder / "link").symlink_to("../beside")
    with pytest.raises(Broken, match=said):
        judge(lambda: function(folder), folder)


def test_the_guard_lets_pass_what_is_allowed(tmp_path: Path) -> None:
    """Reading and writing where it was said, an error of lowmem, and memory for the input."""
    (tmp_path / "a").write_bytes(b"1")
    out = tmp_path / "out"
    assert judge(lambda: (tmp_path / "a").read_bytes(), tmp_path) == b"1"
    judge(lambda: out.mkdir() or (out / "b").write_bytes(bytes(1 << 20)), tmp_path, write=out)
    refused = the_guard().refused
    assert judge(lambda: quiet_raise(CheckpointError("why")), tmp_path) is None
    assert the_guard().refused == refused + 1


def test_the_guard_notices_files_left_open(tmp_path: Path) -> None:
    """Unless what is given holds them on purpose."""
    (tmp_path / "a").write_bytes(b"1")
    held: list[Any] = []
    with pytest.raises(Broken, match="open files"):
        judge(lambda: held.append((tmp_path / "a").open("rb")), tmp_path)
    held.pop().close()
    judge(lambda: held.append((tmp_path / "a").open("rb")), tmp_path, holds=True)
    held.pop().close()


def test_the_guard_notices_memory_that_was_given_back(tmp_path: Path) -> None:
    """The most that was held counts, and not what is left."""
    with pytest.raises(Broken, match="MiB of memory for an input of 100 bytes"):
        judge(lambda: bytearray(b"\1") * (100 << 20), tmp_path)
    judge(lambda: bytearray(b"\1") * (20 << 20), tmp_path)


@pytest.mark.parametrize("way", ["computes", "waits"])
def test_the_guard_ends_what_hangs(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it computes or waits for what never comes."""
    monkeypatch.setattr(the_guard(), "seconds", 0.2)

    def computes() -> None:
        while True:
            pass

    with pytest.raises(Broken, match="s of the processor"):
        judge(computes if way == "computes" else threading.Event().wait, tmp_path)


def test_only_lazy_modules_may_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are named, and what they import."""
    monkeypatch.setattr(guards, "LAZY", ["this_is_", "tabnanny"])
    sys.modules.pop("tabnanny", None)
    judge(lambda: __import__("tabnanny"), tmp_path)
    with pytest.raises(Broken, match="import"):
        judge(lambda: __import__("antigravity"), tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_the_corpus_is_small(name: str) -> None:
    """So that it can be kept, and all of it run."""
    sizes = [len(data) for data in all_targets()[name].kept()]
    assert len(sizes) <= MOST_FILES
    assert sum(sizes) <= MOST_BYTES


def test_the_corpus_is_of_targets() -> None:
    """No folder of it is forgotten."""
    assert {path.name for path in CORPUS.iterdir()} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_short_runs(name: str) -> None:
    """The seeds, the corpus and some mutations of each target break nothing."""
    target = all_targets()[name]
    before = the_guard().executions
    run_by_chance(target, 120, seed=8)
    assert the_guard().executions >= before + 120


@pytest.mark.parametrize("name", GUIDED)
def test_a_short_run_by_coverage(name: str, tmp_path: Path) -> None:
    """As `python tests/fuzz` does it: in a process of its own, since a fuzzer takes it over."""
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed: it has no wheels for this machine")
    program = Path(__file__).parent / "fuzz"
    done = subprocess.run(
        [sys.executable, str(program), name, "--runs", "400", "--findings", str(tmp_path / "findings")],
        capture_output=True,
        text=True,
        errors="replace",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list((tmp_path / "findings").iterdir())
    assert "stat::number_of_executed_units" in done.stderr
