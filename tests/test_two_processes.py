"""Two processes, or threads, at one output or one offload folder: each is right or told why not, and harms no other.

A few rounds of each; `LOWMEM_KILLS=all` makes thirty, and pauses a process at each of its calls.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fault_shim import Fault, armed, under_shim
from test_kills import CHANGES, Convert, Manifest, Offload, answered, spread

ALL = os.environ.get("LOWMEM_KILLS") == "all"
ROUNDS = 30 if ALL else 2
PAUSES = 0 if ALL else 4
BUSY = "another conversion is writing there|holds a finished checkpoint already"
OTHER = f"{BUSY}|an unfinished conversion of something else|expected an empty folder"


def said(function: Callable[[], Any]) -> tuple[str, Any]:
    """What a function gave, or lowmem's own error; any other error is raised."""
    from lowmem.errors import LowmemError

    try:
        return "fine", function()
    except LowmemError as error:
        return type(error).__name__, str(error)


class Child:
    """A function in a fork of this process, which begins when it is let go."""

    def __init__(self, function: Callable[[], Any], answer: Path) -> None:
        self.answer = answer
        answer.unlink(missing_ok=True)
        read, self._gate = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.close(self._gate)
                os.read(read, 1)
                signal.alarm(120)
                answer.write_bytes(pickle.dumps(said(function)))
                code = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stderr.flush()
                os._exit(code)
        os.close(read)

    def go(self) -> None:
        """Let it begin."""
        os.write(self._gate, b"x")
        os.close(self._gate)

    def stopped(self) -> bool:
        """Wait until it stops itself; false if it ended before."""
        self._status = os.waitpid(self.pid, os.WUNTRACED)[1]
        return os.WIFSTOPPED(self._status)

    def end(self, ended: bool = False) -> tuple[str, Any]:
        """Wait for its end: what it said."""
        status = self._status if ended else os.waitpid(self.pid, 0)[1]
        assert os.waitstatus_to_exitcode(status) == 0
        found: tuple[str, Any] = pickle.loads(self.answer.read_bytes())
        return found


def at_once(base: Path, *functions: Callable[[], Any]) -> list[tuple[str, Any]]:
    children: list[Child] = []
    for n, function in enumerate(functions):
        children.append(Child(function, base / f"answer{n}"))
    for child in children:
        child.go()
    return [child.end() for child in children]


def prepared(case: Any, *options: dict[str, Any]) -> list[dict[str, Any]]:
    """For each of these options what lies there after an undisturbed run; imports are paid here."""
    import importlib

    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    wholes = []
    for n, changed in enumerate(options):
        place = case.base / f"whole{n}"
        case.start(place)

        def run(changed: Any = changed, place: Path = place) -> Any:
            with changing(case, changed):
                return case.run(place), sorted(sys.modules)

        code, (result, modules) = answered(run, case.base / "answer")
        assert code == 0
        for module in modules:
            with contextlib.suppress(Exception):
                importlib.import_module(module)
        wholes.append({"files": case.files(place), "result": result})
    return wholes


@contextlib.contextmanager
def changing(case: Any, changed: dict[str, Any]) -> Any:
    before = case.options
    case.options = {**before, **changed}
    yield
    case.options = before


def converting(case: Convert, place: Path, **changed: Any) -> Callable[[], Any]:
    def run() -> Any:
        with changing(case, changed):
            return case.run(place)["files"]

    return run


HALF = {"dtype": "bfloat16"}


def _conversions(folder: str, rounds: int) -> Counter[str]:
    case = Convert(Path(folder))
    whole, half = prepared(case, {}, HALF)
    done: Counter[str] = Counter()
    for n in range(rounds):
        place = case.base / f"same{n}"
        case.start(place)
        told = at_once(case.base, converting(case, place), converting(case, place))
        check_told(told, BUSY)
        assert case.files(place) == whole["files"]
        done.update(name for name, _ in told)
        place = case.base / f"other{n}"
        case.start(place)
        told = at_once(case.base, converting(case, place), converting(case, place, **HALF))
        check_told(told, OTHER)
        assert case.files(place) in [
            r["files"] for r, (name, _) in zip((whole, half), told, strict=True) if name == "fine"
        ]
        done.update(name for name, _ in told)
    return done


def check_told(told: list[tuple[str, Any]], errors: str) -> None:
    import re

    assert [name for name, _ in told].count("fine") == 1, told
    assert all(name == "fine" or re.search(errors, text) for name, text in told), told


def test_of_two_conversions_into_one_folder_one_is_whole_and_one_is_told(tmp_path: Path) -> None:
    done = under_shim(_conversions, str(tmp_path), ROUNDS, timeout=1000)
    assert done["fine"] == 2 * ROUNDS


def _readers(folder: str, rounds: int) -> Counter[str]:
    import lowmem

    case = Convert(Path(folder))
    (whole,) = prepared(case, {})
    done: Counter[str] = Counter()
    for n in range(rounds):
        place = case.base / f"read{n}"
        case.start(place)
        out = place / "out"

        def read(out: Path = out) -> list[tuple[str, Any]]:
            return [said(lambda: sorted(lowmem.inspect(out).keys())) for _ in range(60)]

        def look(out: Path = out) -> list[tuple[str, Any]]:
            return [said(lambda: lowmem.check(out).is_fine) for _ in range(20)]

        made, *seen = at_once(case.base, converting(case, place), read, look)
        assert made[0] == "fine", made
        assert case.files(place) == whole["files"]
        for name, what in (one for _, each in seen for one in each):
            assert name == "SourceError" or what is False or what is True or what == [f"t{n}" for n in range(6)], what
            done[name] += 1
    return done


def test_who_reads_what_is_being_made_gets_all_of_it_or_is_told(tmp_path: Path) -> None:
    assert under_shim(_readers, str(tmp_path), ROUNDS, timeout=1000)["SourceError"]


def _removed(folder: str, most: int) -> Counter[str]:
    """One is paused, its output removed, another conversion made there, and the first goes on."""
    case = Convert(Path(folder))
    whole, half = prepared(case, {}, HALF)
    done: Counter[str] = Counter()
    for at in spread(count_of(case), most):
        place = case.base / f"removed{at}"
        case.start(place)
        first = Child(paused(converting(case, place), place, at), case.base / "first")
        first.go()
        if not first.stopped():
            assert first.end(ended=True)[0] == "fine"
            continue
        shutil.rmtree(place / "out", ignore_errors=True)
        (second,) = at_once(case.base, converting(case, place, **HALF))
        between = case.files(place)
        os.kill(first.pid, signal.SIGCONT)
        told = first.end()
        done[told[0]] += 1
        # Before it had looked at the folder, and if the other was refused, it may still be the first one's.
        if second[0] == "fine":
            assert told[0] in ("OutputError", "fine"), told
            assert between == half["files"]
            assert case.files(place) == between, f"paused at {at}: {told}"
        else:
            assert case.files(place) == whole["files"], (at, second, told)
    return done


def count_of(case: Any) -> int:
    def run() -> int:
        place = case.base / "counted"
        case.start(place)
        with armed(Fault(CHANGES, [place], action="pass")) as found:
            case.run(place)
        return found.counted

    code, count = answered(run, case.base / "answer")
    assert code == 0
    return int(count)


def paused(function: Callable[[], Any], place: Path, at: int) -> Callable[[], Any]:
    """The same, but it stops at a call until it is told to go on."""

    def run() -> Any:
        stop = lambda: os.kill(os.getpid(), signal.SIGSTOP)  # noqa: E731
        with armed(Fault(CHANGES, [place], at=at, action="call back", back=stop)):
            return function()

    return run


def test_a_conversion_whose_folder_was_removed_leaves_the_next_one_alone(tmp_path: Path) -> None:
    done = under_shim(_removed, str(tmp_path), PAUSES, timeout=2000)
    print(done)
    assert done["OutputError"]


def _paused(folder: str, most: int) -> Counter[str]:
    """One conversion is paused, the same is asked for, and the first goes on."""
    case = Convert(Path(folder))
    (whole,) = prepared(case, {})
    done: Counter[str] = Counter()
    for at in spread(count_of(case), most):
        place = case.base / f"paused{at}"
        case.start(place)
        first = Child(paused(converting(case, place), place, at), case.base / "first")
        first.go()
        if not first.stopped():
            assert first.end(ended=True)[0] == "fine"
            continue
        (second,) = at_once(case.base, converting(case, place))
        os.kill(first.pid, signal.SIGCONT)
        told = [first.end(), second]
        check_told(told, BUSY)
        assert case.files(place) == whole["files"]
        done.update(name for name, _ in told)
    return done


def test_a_paused_conversion_goes_on_unharmed(tmp_path: Path) -> None:
    done = under_shim(_paused, str(tmp_path), PAUSES, timeout=2000)
    print(done)
    assert done["fine"]


def loading(case: Offload, place: Path, **changed: Any) -> Callable[[], Any]:
    def run() -> Any:
        with changing(case, changed):
            return case.run(place)

    return run


def _loads(folder: str, rounds: int, most: int) -> Counter[str]:
    case = Offload(Path(folder))
    f16 = {"dtype": "float16"}
    whole, half = prepared(case, {}, f16)
    done: Counter[str] = Counter()
    for n in range(rounds):
        place = case.base / f"loads{n}"
        case.start(place)
        told = at_once(case.base, loading(case, place), loading(case, place), loading(case, place, **f16))
        assert told == [("fine", r["result"]) for r in (whole, whole, half)], told
        assert case.files(place) == {**whole["files"], **half["files"]}
        done["at once"] += 3
    for at in spread(count_of(case), most):
        place = case.base / f"paused{at}"
        case.start(place)
        first = Child(paused(loading(case, place), place, at), case.base / "first")
        second = Child(loading(case, place), case.base / "second")
        first.go()
        if not first.stopped():
            second.go()
            assert (first.end(ended=True), second.end()) == (("fine", whole["result"]),) * 2
            continue
        second.go()
        # The second either gets through, or waits where the first is alone.
        for _ in range(100):
            if os.waitid(os.P_PID, second.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                done["went past"] += 1
                break
            time.sleep(0.01)
        os.kill(first.pid, signal.SIGCONT)
        assert (first.end(), second.end()) == (("fine", whole["result"]),) * 2, at
        assert case.files(place) == whole["files"], at
        done["paused"] += 1
    return done


def test_loads_share_an_offload_folder(tmp_path: Path) -> None:
    done = under_shim(_loads, str(tmp_path), ROUNDS, PAUSES, timeout=2000)
    print(done)
    assert done["paused"]


def _manifests(folder: str, rounds: int) -> int:
    case = Manifest(Path(folder))
    (whole,) = prepared(case, {})
    for n in range(rounds):
        place = case.base / f"manifest{n}"
        case.start(place)
        told = at_once(case.base, *[lambda place=place: case.run(place)] * 3)  # type: ignore[misc]
        assert told == [("fine", True)] * 3, told
        assert case.files(place) == whole["files"]
    return rounds


def test_manifests_written_at_once_are_whole(tmp_path: Path) -> None:
    assert under_shim(_manifests, str(tmp_path), ROUNDS, timeout=1000) == ROUNDS


def _threads(folder: str, rounds: int) -> int:
    (Path(folder) / "a").mkdir()
    (Path(folder) / "b").mkdir()
    convert, offload = Convert(Path(folder) / "a"), Offload(Path(folder) / "b")
    (whole,), (loaded,) = prepared(convert, {}), prepared(offload, {})
    for n in range(rounds):
        out, off = convert.base / f"threads{n}", offload.base / f"threads{n}"
        convert.start(out)
        offload.start(off)
        told: dict[int, tuple[str, Any]] = {}
        gate = threading.Barrier(4)
        jobs = [converting(convert, out), converting(convert, out), loading(offload, off), loading(offload, off)]

        def work(number: int, jobs: Any = jobs, told: Any = told, gate: Any = gate) -> None:
            gate.wait()
            told[number] = said(jobs[number])

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        check_told([told[0], told[1]], BUSY)
        assert told[2] == told[3] == ("fine", loaded["result"])
        assert convert.files(out) == whole["files"]
        assert offload.files(off) == loaded["files"]
    return rounds


def test_threads_are_as_good_as_processes(tmp_path: Path) -> None:
    assert under_shim(_threads, str(tmp_path), ROUNDS, timeout=1000) == ROUNDS


def test_a_lock_is_on_what_has_the_name_now(tmp_path: Path) -> None:
    """Who waits for a folder that is removed and made anew locks the new one."""
    pytest.importorskip("fcntl")
    from lowmem.engine.locks import hold, release

    folder = tmp_path / "folder"
    folder.mkdir()
    old: list[int] = []
    new: list[int] = []
    assert hold(old, folder)
    waiting = threading.Thread(target=hold, args=(new, folder, True))
    waiting.start()
    time.sleep(0.1)
    folder.rmdir()
    folder.mkdir()
    release(old)
    waiting.join()
    assert len(new) == 1
    assert os.path.samestat(os.fstat(new[0]), folder.stat())
    with pytest.raises(BlockingIOError):
        hold(old, folder)
    release(new)
    release(old)
