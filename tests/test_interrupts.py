"""Ctrl-C at any moment: it comes out, nothing is left behind, and the next load is right."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_many_loads import run

import lowmem
from lowmem import cli
from lowmem._shared import start
from lowmem.engine.cleanup import join
from lowmem.errors import ModelError

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc"),
    pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"),
]
# For the record: LOWMEM_INTERRUPTS=200.
INTERRUPTS = int(os.environ.get("LOWMEM_INTERRUPTS", "34"))

_WAYS = """
import random, signal, traceback
from torch import nn
package = str(Path(lowmem.__file__).parent)
class Loaded(Exception):
    pass
def borrowed(files, place):
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(files.whole))
    before = {name: id(tensor) for name, tensor in ways.every_tensor(model).items()}
    mode, hooks = model.training, sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    done = False
    try:
        on = {"": "cpu", "model.layers.1": "disk"}
        result = lowmem.load(files.whole, model=model, dtype="bfloat16", device_map=on)
        done = True
        facts = ways.facts_of(result.model)
    finally:
        after = {name: id(tensor) for name, tensor in ways.every_tensor(model).items()}
        same = after == before and model.training == mode
        same = same and sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()) == hooks
        whole = not any(tensor.is_meta and not ways.is_on_disk(tensor) for tensor in ways.every_tensor(model).values())
        # A Ctrl-C between the last step and the return finds it complete.
        if not same and not whole:
            wrong.append("borrowed: neither as before nor complete")
        if whole:
            lowmem.release(model)
    return facts
wrong, known, counts = [], [], {"interrupted": 0, "finished": 0}
everything = {**ways.WAYS, "borrowed": borrowed}
alone = {name: way(files, place(f"alone-{name}")) for name, way in everything.items()}
took = {}
for name, way in everything.items():
    started = time.perf_counter()
    way(files, place(f"again-{name}"))
    took[name] = time.perf_counter() - started
shutil.rmtree(base / "places")
unseen = []
sys.unraisablehook = lambda what: unseen.append(str(what.object))
before = ways.state_of_process()
def check(name, at):
    if name == "converted":
        # What is whole is kept, to go on with.
        for hidden in (at / "converted").glob(".*"):
            shutil.rmtree(hidden)
    left = ways.leftovers(base) + ways.differences(before, ways.state_of_process())
    if fresh := [what for what in left if what not in known]:
        known.extend(fresh)
        wrong.append(f"{name}: {fresh}"[:1500])
def inside(name, at, begin):
    begin()
    return everything[name](files, at)
def is_inside(frame):
    while frame is not None and frame.f_code is not inside.__code__:
        frame = frame.f_back
    return frame is not None
foreign = []
def is_ours(frame):
    while frame is not None and not frame.f_code.co_filename.startswith(package):
        frame = frame.f_back
    return frame is not None
def attempt(name, at, begin, end):
    facts = None
    try:
        facts = inside(name, at, begin)
        came = False
    except KeyboardInterrupt:
        came = True
    except BaseException as error:
        end()
        if foreign and all(foreign):
            # Of the loaded model, which computes without us, and of what another library makes of a Ctrl-C.
            counts["interrupted"] += 1
            return True
        wrong.append(f"{name}: {traceback.format_exc()}"[-1500:])
        return True
    end()
    if any(foreign):
        # Nobody puts `no_grad` and `device` right, of `borrowed` and of models' forwards.
        torch.set_grad_enabled(True)
        while torch._C._len_torch_function_stack():
            torch._C._pop_torch_function_stack()
    if not came and facts != alone[name]:
        wrong.append(f"{name}: finished, but wrong")
    counts["interrupted" if came else "finished"] += 1
    return came
"""

_AT_RANDOM = (
    _WAYS
    + """
chance = random.Random(args["seed"])
fired, places = [0, 0], []
def interrupt(number, frame):
    if frame.f_code in (is_inside.__code__, is_ours.__code__, interrupt.__code__):
        return
    if not is_inside(frame):
        # What is looked at is over.
        signal.setitimer(signal.ITIMER_REAL, 0)
        return
    fired[0] += 1
    foreign.append(not is_ours(frame))
    places.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
    if fired[0] >= fired[1]:
        signal.setitimer(signal.ITIMER_REAL, 0)
    raise KeyboardInterrupt
signal.signal(signal.SIGALRM, interrupt)
names = list(everything)
for turn in range(args["turns"]):
    name = names[turn % len(names)]
    at = place(f"{turn}")
    moment = chance.uniform(0.0001, took[name])
    places.clear()
    foreign.clear()
    # Once, or again while the first is being handled.
    fired[:] = [0, chance.choice((1, 1, 2, 3))]
    del unseen[:]
    came = attempt(
        name,
        at,
        lambda: signal.setitimer(signal.ITIMER_REAL, moment, chance.uniform(0.0001, 0.003)),
        lambda: signal.setitimer(signal.ITIMER_REAL, 0),
    )
    if fired[0] and not came and not unseen:
        wrong.append(f"{name}: swallowed")
    found = len(wrong)
    check(name, at)
    wrong[found:] = [text + " interrupted at " + " and at ".join(places) for text in wrong[found:]]
    counts["fired"] = counts.get("fired", 0) + fired[0]
    counts["in lowmem"] = counts.get("in lowmem", 0) + foreign.count(False)
    shutil.rmtree(base / "places")
for name, way in everything.items() if not wrong else ():
    if way(files, place(f"after-{name}")) != alone[name]:
        wrong.append(f"{name}: wrong afterwards")
result = {"wrong": wrong, **counts}
"""
)


def test_an_interrupt_at_a_random_moment_comes_out_and_leaves_nothing(tmp_path: Path) -> None:
    found = run(_AT_RANDOM, tmp_path, turns=INTERRUPTS, seed=INTERRUPTS)
    assert not found["wrong"], "\n\n".join(found["wrong"])
    assert found["interrupted"] + found["finished"] == INTERRUPTS
    assert found["interrupted"] > INTERRUPTS // 4
    if INTERRUPTS >= 200:
        print(found)


_AT_CALLS = (
    _WAYS
    + """
def counting(name, at, stop=None):
    count, seen = [0, ""], {}
    def trace(frame, event, argument):
        if frame.f_code.co_filename.startswith(package):
            count[0] += 1
            if stop is None:
                seen.setdefault(frame.f_code, []).append(count[0])
            if count[0] == stop:
                sys.settrace(None)
                code = frame.f_code
                count[1] = f"{code.co_filename[len(package):]}:{code.co_name}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return None
    came = attempt(name, at, lambda: sys.settrace(trace), lambda: sys.settrace(None))
    return count, came, seen
chance = random.Random(args["seed"])
for name in args["names"]:
    seen = counting(name, place(f"{name}-count"))[2]
    counts["functions"] = counts.get("functions", 0) + len(seen)
    stops = [chance.choice(calls) for calls in seen.values()]
    for stop in sorted(chance.sample(stops, min(len(stops), args["turns"]))):
        at = place(f"{name}-{stop}")
        found = len(wrong)
        del unseen[:]
        count, came, _ = counting(name, at, stop)
        if count[1] and not came and not unseen:
            wrong.append(f"{name}: swallowed")
        check(name, at)
        wrong[found:] = [f"at {count[1]}: {text}" for text in wrong[found:]]
        shutil.rmtree(base / "places")
result = {"wrong": wrong, **counts}
"""
)
_CALLED = ["cast", "int8", "own folder", "filtered", "dispatched", "converted", "borrowed", "streamed"]


def test_an_interrupt_at_any_call_of_a_function_comes_out_and_leaves_nothing(tmp_path: Path) -> None:
    found = run(_AT_CALLS, tmp_path, turns=max(2, INTERRUPTS // 10), seed=INTERRUPTS, names=_CALLED)
    if INTERRUPTS >= 200:
        print({**found, "wrong": len(found["wrong"])})
    assert not found["wrong"], "\n\n".join(found["wrong"])


_ENTERING = """
from lowmem.engine.feed import Feed
from lowmem.engine.shard_writer import Sealer
class Stop(Exception):
    pass
def interrupted(step, name):
    # As an interrupt that is seen when the lock's own function has returned.
    def trace(frame, event, argument):
        if frame.f_code.co_name in ("__enter__", "__exit__") and "threading" in frame.f_code.co_filename:
            frame.f_trace_opcodes = True
            if event == "return" and frame.f_code.co_name == name:
                raise KeyboardInterrupt
        return trace
    sys.settrace(trace)
    try:
        step()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
def is_free(lock):
    taken = []
    def take():
        taken.append(lock.acquire(timeout=5))
        if taken[0]:
            lock.release()
    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return taken[0]
result = []
for name in ("__enter__", "__exit__"):
    sealer = Sealer(verify=False, seal=lambda shard: None)
    interrupted(lambda: sealer.add(1), name)
    feed = Feed(lowmem.plan(files.whole, dtype="bfloat16"))
    interrupted(feed.stop, name)
    result += [is_free(sealer._turn), is_free(feed.turn)]
"""


def test_an_interrupt_where_a_lock_is_taken_or_given_back_leaves_it_free(tmp_path: Path) -> None:
    assert run(_ENTERING, tmp_path) == [True] * 4


_MODES = """
def interrupted(kind):
    def trace(frame, event, argument):
        if frame.f_code is kind.__enter__.__code__:
            frame.f_trace_opcodes = True
            if event == "return":
                raise KeyboardInterrupt
        return trace
    sys.settrace(trace)
    try:
        ways.WAYS["filtered"](files, place(kind.__name__))
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
before = ways.state_of_process()
result = []
for kind in (torch.no_grad,):
    result += [interrupted(kind), ways.differences(before, ways.state_of_process())]
"""


def test_an_interrupt_where_torch_changes_a_mode_leaves_it_as_it_was(tmp_path: Path) -> None:
    assert run(_MODES, tmp_path) == [True, []]


def test_what_an_interrupt_in_other_code_leads_to_comes_out_as_the_interrupt() -> None:
    from lowmem.modeling.failures import refusing

    def build() -> None:
        with refusing("model"):
            try:
                raise KeyboardInterrupt
            finally:
                raise RuntimeError

    with pytest.raises(KeyboardInterrupt):
        build()
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        # That one was before.
        with pytest.raises(ModelError), refusing("model"):
            raise RuntimeError from None


def test_a_command_says_interrupted_where_a_library_swallowed_that_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(argv: object) -> int:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise RecursionError

    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main([]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


_COMMANDS = {
    "plan": ["plan", "{whole}", "--dtype", "bfloat16"],
    "check": ["check", "{whole}"],
    "load": ["load", "{whole}", "--dtype", "bfloat16"],
    "convert": ["convert", "{whole}", "{out}", "--dtype", "bfloat16"],
}
_SHELL = """
import os, sys, threading, time, signal
from lowmem.cli import main
def soon():
    time.sleep(float(os.environ["MOMENT"]))
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=soon, daemon=True).start()
try:
    code = main(sys.argv[1:])
    # What comes later is the interpreter's end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
except KeyboardInterrupt as error:
    # One between these two lines is nobody's.
    if error.__traceback__.tb_next is not None:
        raise
sys.exit(code)
"""


@pytest.mark.parametrize("moment", ["0.02", "0.6", "2.5"] if INTERRUPTS < 200 else [str(i / 4) for i in range(20)])
def test_an_interrupted_command_ends_with_130_and_a_message_and_no_traceback(tmp_path: Path, moment: str) -> None:
    from ways_to_load import make_files

    files = make_files(tmp_path / "files")
    for name, words in _COMMANDS.items():
        given = [word.format(whole=files.whole, out=tmp_path / "out") for word in words]
        ended = subprocess.run(
            [sys.executable, "-c", _SHELL, *given],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "MOMENT": moment},
            check=False,
        )
        assert ended.returncode in (130, 0), (name, ended)
        # What Python says of one that came while it ended an object is Python's.
        assert "Traceback" not in ended.stderr or "Exception ignored in" in ended.stderr, (name, ended.stderr)
        assert ("interrupted" in ended.stderr) == (ended.returncode == 130), (name, ended)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_a_thread_whose_start_left_its_lock_taken_is_freed_and_joined() -> None:
    """A Ctrl-C may come between the lock of `Thread._started` and what gives it back."""
    done: list[bool] = []
    thread = threading.Thread(target=lambda: done.append(True), daemon=True)
    began: Any = vars(thread)["_started"]

    def interrupted(timeout: float | None = None) -> bool:
        raise KeyboardInterrupt

    began._cond.__enter__()
    began.wait = interrupted
    with pytest.raises(KeyboardInterrupt):
        start(thread)
    assert not done
    join(thread)
    assert done
    assert thread not in threading.enumerate()


def test_a_thread_that_a_ctrl_c_kept_from_being_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Thread.start` notes it before there is one."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    thread = threading.Thread(target=print, daemon=True)
    name = "_start_joinable_thread" if hasattr(threading, "_start_joinable_thread") else "_start_new_thread"
    with monkeypatch.context() as patch:
        patch.setattr(threading, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            start(thread)
    assert thread in threading.enumerate()
    join(thread)
    assert thread not in threading.enumerate()


def test_an_error_of_python_that_a_ctrl_c_led_to_comes_out_as_it(tmp_path: Path) -> None:
    def model() -> object:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("trying to pop from empty mode stack")

    def of_a_user() -> object:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise EOFError from None

    save_file({"weight": torch.ones(2)}, tmp_path / "a.safetensors")
    with torch.no_grad():
        with pytest.raises(KeyboardInterrupt):
            lowmem.plan(tmp_path / "a.safetensors", model=model)
        assert not torch.is_grad_enabled()
    with pytest.raises(ModelError):
        lowmem.plan(tmp_path / "a.safetensors", model=of_a_user)
