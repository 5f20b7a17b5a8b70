"""The library that makes system calls fail: what the tests of failing machines rest on."""

from __future__ import annotations

import errno
import mmap
import os
import signal
from pathlib import Path
from typing import Any

from fault_shim import CALLS, Fault, armed, in_fork, under_shim


def _faults(folder: str) -> dict[str, Any]:
    file = Path(folder) / "file"
    file.write_bytes(b"x" * 100)
    seen: dict[str, Any] = {}

    def attempt(name: str, fault: Fault, function: Any) -> None:
        with armed(fault) as said:
            try:
                seen[name] = function()
            except (OSError, MemoryError) as error:
                seen[name] = error.errno if isinstance(error, OSError) else "memory"
        seen[f"{name} counted"] = (said.counted, said.fired, said.kinds)

    def read(n: int = 100) -> int:
        with file.open("rb", buffering=0) as f:
            return len(f.read(n) or b"")

    def write() -> int | None:
        with (Path(folder) / "new").open("wb", buffering=0) as f:
            return f.write(b"y" * 10)

    def mapped() -> int:
        with file.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return len(view)

    attempt("none", Fault(["read"], [folder], at=5), read)
    attempt("read", Fault(["read"], [folder], error=errno.EIO), read)
    attempt("elsewhere", Fault(["read"], [folder + "x"], error=errno.EIO), read)
    attempt("short", Fault(["read"], [folder], action="short"), read)
    attempt("end", Fault(["read"], [folder], action="end"), read)
    attempt("small", Fault(["read"], [folder], larger=1000), read)
    attempt("open", Fault(["open"], [folder], error=errno.EMFILE), read)
    attempt("write", Fault(["write"], [folder], error=errno.ENOSPC), write)
    attempt("torn", Fault(["write"], [folder], action="short"), write)
    attempt("map", Fault(["map"], [folder], error=errno.ENOMEM), mapped)
    attempt("rename", Fault(["rename"], [folder], error=errno.EXDEV), lambda: file.rename(f"{file}2"))
    attempt("memory", Fault(["allocate"], larger=1 << 24), lambda: len(bytearray(1 << 24)))
    attempt("back", Fault(["read"], [folder], action="call back", back=lambda: os.truncate(file, 7)), read)
    return seen


def test_each_fault_does_what_it_says_and_only_there(tmp_path: Path) -> None:
    seen = under_shim(_faults, str(tmp_path))
    assert seen["none"] == 100
    assert seen["none counted"] == (1, 0, ("read",))
    assert seen["read"] == errno.EIO
    assert seen["read counted"][1] == 1
    assert seen["elsewhere"] == 100
    assert seen["elsewhere counted"][0] == 0
    assert (seen["short"], seen["end"], seen["small"]) == (50, 0, 100)
    assert (seen["open"], seen["write"], seen["torn"]) == (errno.EMFILE, errno.ENOSPC, 5)
    assert (seen["map"], seen["rename"], seen["memory"]) == (errno.ENOMEM, errno.EXDEV, "memory")
    assert seen["back"] == 7


def _killed(folder: str) -> list[int]:
    file = Path(folder) / "file"

    def write(action: str) -> None:
        with armed(Fault(["write"], [folder], action=action)), file.open("wb", buffering=0) as f:
            f.write(b"y" * 10)

    sizes = []
    for action in ("kill", "torn", "kill after"):
        assert in_fork(lambda action=action: write(action)) == -signal.SIGKILL  # type: ignore[misc]
        sizes.append(file.stat().st_size)
    return [*sizes, in_fork(lambda: None)]


def test_a_process_dies_before_within_and_behind_a_write(tmp_path: Path) -> None:
    assert under_shim(_killed, str(tmp_path)) == [0, 5, 10, 0]


def test_names_of_calls_are_those_of_the_source() -> None:
    text = (Path(__file__).parent / "faults" / "shim.c").read_text()
    listed = text.split("enum call {")[1].split("}")[0].replace("\n", " ").split(",")
    assert [name.strip().lower() for name in listed] == [*CALLS, "calls"]
