"""Many loads at once, from threads and from processes, and many one after the other: equal, and nothing grows."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
from fresh import INT8_IMPORTS, server

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc"),
    pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"),
]
# For the record: LOWMEM_LOADS=500.
LOADS = int(os.environ.get("LOWMEM_LOADS", "64"))

_BEGIN = """
import gc, os, shutil, sys, threading, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import transformers
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
import lowmem
import ways_to_load as ways
base = Path(args["folder"])
files = ways.make_files(base / "files")
def place(name):
    made = base / "places" / f"{os.getpid()}-{name}"
    made.mkdir(parents=True)
    return made
"""


def run(job: str, folder: Path, **args: Any) -> Any:
    """In a process of its own, in which nothing was loaded yet."""
    return server(*INT8_IMPORTS, "torch._dynamo").run(_BEGIN + job, folder=str(folder), **args)


_THREADS = """
alone = {name: way(files, place(name)) for name, way in ways.WAYS.items()}
shutil.rmtree(files.shared)
before = ways.state_of_process()
results, failures = [], []
together = threading.Barrier(len(ways.WAYS))
def work(number, name):
    try:
        for turn in range(args["turns"]):
            together.wait(60)
            results.append((name, ways.WAYS[name](files, place(f"{number}-{turn}")) == alone[name]))
    except BaseException as error:
        failures.append(f"{name}: {error!r}"[:500])
        together.abort()
threads = [threading.Thread(target=work, args=each) for each in enumerate(ways.WAYS)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
result = {
    "failures": failures,
    "wrong": sorted({name for name, same in results if not same}),
    "loads": len(results),
    "changed": ways.differences(before, ways.state_of_process()),
    "left": ways.leftovers(base),
}
"""


def test_sixteen_loads_in_threads_give_what_each_gives_alone_and_change_nothing(tmp_path: Path) -> None:
    turns = max(2, LOADS // 64)
    found = run(_THREADS, tmp_path, turns=turns)
    assert found == {"failures": [], "wrong": [], "loads": 16 * turns, "changed": [], "left": []}


_BUILDERS = """
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))
        self.register_buffer("steps", torch.linspace(0, 1, 5), persistent=False)
lowmem.load(files.whole, dtype="bfloat16")
from safetensors.torch import save_file
save_file({"scale": torch.ones(3)}, base / "net.safetensors")
before = ways.state_of_process()
wrong, ended = [], threading.Event()
def others():
    while not ended.is_set():
        lowmem.plan(files.whole, dtype="bfloat16")
def own():
    for _ in range(args["turns"]):
        buffer = lowmem.load(base / "net.safetensors", model=Net).model.steps
        if str(buffer.dtype) != "torch.float32" or str(buffer.device) != "cpu":
            wrong.append([str(buffer.dtype), str(buffer.device)])
threads = [threading.Thread(target=others) for _ in range(3)]
owns = [threading.Thread(target=own) for _ in range(2)]
for thread in threads + owns:
    thread.start()
for thread in owns:
    thread.join()
ended.set()
for thread in threads:
    thread.join()
result = [wrong, ways.differences(before, ways.state_of_process())]
"""


def test_a_model_that_is_built_beside_others_has_tensors_of_its_own_dtype(tmp_path: Path) -> None:
    assert run(_BUILDERS, tmp_path, turns=20) == [[], []]


_QUIET = """
import warnings
before = ways.state_of_process()
from lowmem.offload.hooks import quiet
first, second = threading.Event(), threading.Event()
def outer():
    with quiet():
        first.set()
        second.wait(1)
def inner():
    first.wait()
    with quiet():
        second.set()
        time.sleep(0.1)
threads = [threading.Thread(target=outer), threading.Thread(target=inner)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
result = ways.differences(before, ways.state_of_process())
"""


def test_logs_and_warnings_speak_again_after_two_threads_had_them_silent(tmp_path: Path) -> None:
    assert run(_QUIET, tmp_path) == []


_PROCESSES = """
alone = {name: way(files, place(name)) for name, way in ways.WAYS.items()}
shutil.rmtree(files.shared)
children = {}
for name in ways.WAYS:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if ways.WAYS[name](files, place(name)) == alone[name] else 2
        finally:
            os._exit(status)
    children[child] = name
result = {children[child]: os.waitpid(child, 0)[1] for child in children}
"""


def test_sixteen_loads_in_processes_give_what_each_gives_alone(tmp_path: Path) -> None:
    found = run(_PROCESSES, tmp_path)
    assert len(found) == 16
    assert not any(found.values()), found
    left = [path for path in tmp_path.rglob("*") if path.name.startswith(".")]
    assert not left


_FAILURES = """
def failing(**options):
    def way(files, place):
        try:
            lowmem.load(files.whole, **options)
        except lowmem.LowmemError as error:
            return {"error": type(error).__name__}
        return {"error": None}
    return way
def damaged(files, place):
    try:
        lowmem.load(files.damaged, dtype="bfloat16", device_map="disk", offload_folder=place / "off")
    except lowmem.LowmemError as error:
        return {"error": type(error).__name__}
def given_up(files, place):
    made = lowmem.stream(files.whole, dtype="bfloat16")
    next(made)
    return {}
def ended(files, place):
    def stop(progress):
        raise ZeroDivisionError
    try:
        lowmem.load(files.whole, dtype="bfloat16", device_map="disk", offload_folder=place / "off", progress=stop)
    except ZeroDivisionError:
        return {}
everything = {
    **ways.WAYS,
    "budget": failing(dtype="bfloat16", ram="1KiB"),
    "keys": failing(rename={"model": "other"}),
    "option": failing(device_map="nowhere"),
    "damaged": damaged,
    "given up": given_up,
    "ended": ended,
}
"""
_ONE_AFTER_THE_OTHER = (
    _FAILURES
    + """
import ctypes
trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)
def look():
    gc.collect()
    trim(0)
    statm = [int(number) for number in Path("/proc/self/statm").read_text().split()]
    return {
        "anonymous": (statm[1] - statm[2]) * os.sysconf("SC_PAGE_SIZE"),
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "mappings": len(Path("/proc/self/maps").read_text().splitlines()),
        "objects": len(gc.get_objects()),
        "children": len(ways.children()),
        "temporary": len(list(Path("/dev/shm").glob("lowmem*"))),
    }
looks, loads = [], 0
# The first rounds fill caches.
rounds = 4 + args["loads"] // len(everything)
for turn in range(rounds):
    for name, way in everything.items():
        at = base / "place"
        at.mkdir()
        way(files, at)
        shutil.rmtree(at)
        loads += 1
    if turn in (3, rounds - 1):
        looks.append(look())
result = {"loads": loads, "looks": looks, "rounds": rounds - 4}
"""
)


def test_loads_one_after_the_other_grow_nothing_also_those_that_fail(tmp_path: Path) -> None:
    found = run(_ONE_AFTER_THE_OTHER, tmp_path, loads=LOADS)
    first, last = found["looks"]
    for what in ("open files", "threads", "children", "temporary"):
        assert last[what] <= first[what], what
    # Some of malloc's arenas, and the interpreter's caches of names and code.
    assert last["anonymous"] - first["anonymous"] < 4 << 20
    assert last["mappings"] - first["mappings"] <= 24
    # Less than one for a load: none is kept.
    assert last["objects"] - first["objects"] < found["loads"]
