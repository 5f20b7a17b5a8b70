"""A fork in the middle: the child loads and computes, and its parent goes on."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from test_many_loads import run

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc"),
    pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"),
]

_CHILDREN = """
import signal, traceback
def in_child(job):
    child = os.fork()
    if child == 0:
        # A child that waits for a thread that it does not have would wait for ever.
        signal.alarm(60)
        status = 1
        try:
            status = 0 if job() else 2
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]
"""

_DURING = (
    _CHILDREN
    + """
alone = {name: way(files, place(f"alone-{name}")) for name, way in ways.WAYS.items()}
before = ways.state_of_process()
ended, failures, done = threading.Event(), [], [0]
def work(number, names):
    try:
        while not ended.is_set():
            for name in names:
                done[0] += 1
                if ways.WAYS[name](files, place(f"{number}-{done[0]}-{name}")) != alone[name]:
                    failures.append(name)
    except BaseException as error:
        failures.append(repr(error))
names = list(ways.WAYS)
threads = [threading.Thread(target=work, args=(i, names[i::4])) for i in range(4)]
for thread in threads:
    thread.start()
def job():
    changed = ways.differences(before, ways.state_of_process())
    if changed:
        print("in the child:", changed, flush=True)
    name = names[turn % len(names)]
    return not changed and ways.WAYS[name](files, place(name)) == alone[name]
statuses = []
for turn in range(args["forks"]):
    time.sleep(0.01 * (turn % 5))
    statuses.append(in_child(job))
ended.set()
for thread in threads:
    thread.join()
result = [[status for status in statuses if status], failures, ways.differences(before, ways.state_of_process())]
"""
)


def test_a_child_forked_while_threads_load_can_load_and_the_loads_go_on(tmp_path: Path) -> None:
    assert run(_DURING, tmp_path, forks=16) == [[], [], []]


_LOCKED = (
    _CHILDREN
    + """
import logging
from contextlib import ExitStack
from lowmem import _devices, _shared
from lowmem._collector import paused_collector
from lowmem.engine.cleanup import large_blocks_apart
from lowmem.modeling.alone import alone, as_before
from lowmem.modeling.empty import empty_parameters
from lowmem.offload.hooks import quiet
before = ways.state_of_process()
inside, over = threading.Event(), threading.Event()
def hold():
    with ExitStack() as held:
        for one in (as_before(), paused_collector(), large_blocks_apart(), empty_parameters(), quiet()):
            held.enter_context(one)
        for lock in _shared._locks:
            held.enter_context(lock)
        torch.set_default_dtype(torch.bfloat16)
        inside.set()
        over.wait()
thread = threading.Thread(target=hold)
thread.start()
inside.wait()
def job():
    with alone(), quiet(), paused_collector():
        pass
    return not ways.differences(before, ways.state_of_process())
result = in_child(job)
over.set()
thread.join()
result = [result, ways.differences(before, ways.state_of_process())]
"""
)


def test_a_child_finds_no_lock_held_and_nothing_changed_by_threads_that_it_does_not_have(tmp_path: Path) -> None:
    assert run(_LOCKED, tmp_path) == [0, []]


_COMPUTING = (
    _CHILDREN
    + """
from lowmem.checkpoint.records import Candidate
inside, over = threading.Event(), threading.Event()
def wait():
    inside.set()
    over.wait()
    return {}
thread = threading.Thread(target=lambda: Candidate("slow", wait).leaves)
thread.start()
inside.wait()
result = in_child(lambda: Candidate("other", dict).leaves == {})
over.set()
thread.join()
"""
)


def test_a_child_computes_a_property_that_a_thread_was_computing_at_the_fork(tmp_path: Path) -> None:
    assert run(_COMPUTING, tmp_path) == 0


_IN_CALLBACK = (
    _CHILDREN
    + """
folder = base / "off"
said = []
def fork(progress):
    if said:
        return
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        return
    said.append(os.waitpid(child, 0)[1])
parent = os.getpid()
try:
    model = lowmem.load(
        files.whole, dtype="bfloat16", device_map="disk", offload_folder=folder, progress=fork
    ).model
    facts = ways.facts_of(model)
    lowmem.release(model)
except BaseException as error:
    if os.getpid() == parent:
        raise
    os._exit(0 if isinstance(error, lowmem.LowmemError) else 1)
if os.getpid() != parent:
    os._exit(0)
result = [said, facts == ways.WAYS["own folder"](files, place("alone")), ways.leftovers(base)]
"""
)


def test_a_child_forked_in_the_callback_of_a_load_is_refused_or_right_and_takes_nothing_away(tmp_path: Path) -> None:
    assert run(_IN_CALLBACK, tmp_path) == [[0], True, []]


_UNLOCK = (
    _CHILDREN
    + """
from lowmem.engine.locks import alone_in, hold, release
held = []
hold(held, base)
reading, writing = os.pipe()
child = os.fork()
if child == 0:
    # It lives on, with the same open file.
    os.close(writing)
    os.read(reading, 1)
    os._exit(0)
release(held)
again = []
result = hold(again, base)
release(again)
os.close(writing)
os.waitpid(child, 0)
"""
)


def test_a_lock_on_a_folder_ends_although_a_child_was_forked_meanwhile(tmp_path: Path) -> None:
    assert run(_UNLOCK, tmp_path) is True


_USERS = (
    _CHILDREN
    + """
import multiprocessing
from torch.utils.data import DataLoader, Dataset
def forked(number):
    torch.set_num_threads(1)
    sys.exit(0 if ways.WAYS["cast"](files, place(f"child-{number}")) == alone else 1)
alone = ways.WAYS["cast"](files, place("alone"))
processes = [multiprocessing.get_context("fork").Process(target=forked, args=(i,)) for i in range(4)]
for process in processes:
    process.start()
for process in processes:
    process.join(60)
codes = [process.exitcode for process in processes]
ids = torch.arange(1, 9).reshape(1, -1)
found = []
for options in ({}, {"dtype": "bfloat16", "device_map": "disk"}, {"device_map": "disk"}):
    model = lowmem.load(files.whole, **options).model
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    class Rows(Dataset):
        def __len__(self):
            return 6
        def __getitem__(self, number):
            with torch.no_grad():
                return torch.equal(model(input_ids=ids).logits, expected)
    loader = DataLoader(Rows(), num_workers=2, multiprocessing_context="fork", timeout=60)
    found += [bool(value) for batch in loader for value in batch]
    with torch.no_grad():
        found.append(torch.equal(model(input_ids=ids).logits, expected))
    lowmem.release(model)
result = [codes, found]
"""
)


def test_processes_and_data_loaders_that_fork_use_a_loaded_model_and_load(tmp_path: Path) -> None:
    codes, found = run(_USERS, tmp_path)
    assert codes == [0] * 4
    assert found == [True] * 21
