"""How the sampler begins, looks and ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem import _sampler, memory
from lowmem._shared import Stop
from lowmem.errors import MeasureError

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
REPOSITORY = Path(__file__).parents[1]


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=REPOSITORY)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def kill(pid: int) -> None:
    """Whoever waits for it finds that it has ended."""
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def wait_for_sampler(context: memory.measure) -> None:
    """A block that must be looked at from its first line on begins here."""
    sampler = context._run._sampler
    while isinstance(sampler, memory.ProcessSampler) and not sampler._is_up():
        time.sleep(0.001)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=200))
def test_a_thinned_timeline_never_loses_a_peak(looks):
    limit, _sampler.LIMIT = _sampler.LIMIT, 8
    try:
        timeline = _sampler.Timeline()
        for at, (anonymous, rss) in enumerate(looks):
            timeline.add(at, anonymous, rss)
    finally:
        _sampler.LIMIT = limit
    points = timeline.points
    assert len(points) <= 8
    assert [point[0] for point in points] == sorted(point[0] for point in points)
    assert max((point[1] for point in points), default=0) == max((look[0] for look in looks), default=0)
    assert max((point[2] for point in points), default=0) == max((look[1] for look in looks), default=0)
    assert all(point[1] == looks[int(point[0])][0] for point in points)


@linux
def test_a_sampler_that_is_forgotten_ends():
    before = open_files()
    context = memory.measure()
    context.__enter__()
    sampler = context._run._sampler
    child = sampler.pid
    del context, sampler
    assert not psutil.pid_exists(child)
    assert open_files() == before


@linux
@pytest.mark.parametrize("room", range(8))
def test_a_sampler_where_few_files_can_be_opened_leaves_none(room):
    code = """
        import gc, os, resource, sys
        from lowmem import memory
        with memory.measure():
            pass
        before = sorted(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(before) + int(sys.argv[1]), 4096))
        try:
            with memory.measure() as run:
                pass
            print(run.method)
        except memory.MeasureError as error:
            print("refused")
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
        gc.collect()
        assert sorted(os.listdir("/proc/self/fd")) == before
    """
    done = python(code, str(room))
    assert done.returncode == 0, done.stderr


def test_threads_end_at_the_word_whoever_says_it_how_often():
    stop, ended = Stop(), []
    assert not stop.wait()
    assert not stop.wait(0.001)

    def work():
        while not stop.wait(0.01):
            pass
        ended.append(True)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        stop.say()
    for thread in threads:
        thread.join(60)
    assert len(ended) == 4
    assert stop.wait()
    assert stop.wait(60)


@linux
def test_a_killed_sampler_is_an_error_not_a_low_peak():
    context = memory.measure()
    context.__enter__()
    kill(context._run._sampler.pid)
    with pytest.raises(MeasureError, match="ended early"):
        context.__exit__(None, None, None)


@linux
def test_a_sampler_that_someone_else_waited_for_is_no_error():
    context = memory.measure()
    with context as run:
        wait_for_sampler(context)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    assert run.method == "process"


@linux
def test_a_sampler_holds_nothing_that_we_let_children_have():
    ours, theirs = os.pipe()
    os.set_inheritable(theirs, True)
    context = memory.measure()
    with context:
        wait_for_sampler(context)
        os.close(theirs)
        assert os.read(ours, 1) == b""
    os.close(ours)


@linux
def test_an_error_of_the_block_is_not_hidden_by_a_killed_sampler():
    context = memory.measure()
    with pytest.raises(ZeroDivisionError), context:
        kill_sampler_and_fail(context)


def kill_sampler_and_fail(context: memory.measure) -> None:
    kill(context._run._sampler.pid)
    _ = 1 // 0


@linux
def test_fifty_measures_leave_no_process_and_no_open_file():
    with memory.measure():
        pass
    files, children = open_files(), psutil.Process().children()
    for at in range(50):
        context = memory.measure()
        with context:
            if at % 2:
                wait_for_sampler(context)
    assert open_files() == files
    assert psutil.Process().children() == children


@linux
def test_many_open_files_do_not_disturb():
    done = python(
        """
        import os, resource
        from lowmem import memory
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
        kept = [os.open("/dev/null", os.O_RDONLY) for _ in range(1500)] if hard >= 4096 else []
        with memory.measure() as measured:
            pass
        print(measured.method)
        """
    )
    assert done.stdout.strip() == "process", done.stderr


@linux
def test_a_process_forked_in_the_block_does_not_hold_up_its_end():
    done = python(
        """
        import os, signal, time
        from lowmem import memory
        context = memory.measure()
        with context as measured:
            while not context._run._sampler._is_up():
                time.sleep(0.001)
            child = os.fork()
            if not child:
                time.sleep(600)
        os.kill(child, signal.SIGKILL)
        print(measured.method)
        """
    )
    assert done.stdout.strip() == "process", done.stderr


@linux
@pytest.mark.parametrize("fork", ["", "import os; child = os.fork(); child or time.sleep(600)"])
def test_the_sampler_ends_when_the_measured_process_is_killed(fork):
    code = f"""
import sys, time
from lowmem import memory
context = memory.measure()
context.__enter__()
sampler = context._run._sampler
while not sampler._is_up():
    time.sleep(0.001)
child = 0
{fork}
print(sampler.pid, child, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as parent:
        sampler, child = map(int, parent.stdout.readline().split())
        parent.kill()
        parent.wait()
        try:
            # Its new parent may be slow to collect it: a zombie has ended.
            while psutil.pid_exists(sampler) and psutil.Process(sampler).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)
        except psutil.NoSuchProcess:
            pass
        finally:
            if child:
                os.kill(child, signal.SIGKILL)


@linux
def test_ctrl_c_does_not_reach_the_sampler():
    code = """
import os, signal, time
from lowmem import memory
# Who started the tests may have had it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
context = memory.measure()
try:
    with context as measured:
        while not context._run._sampler._is_up():
            time.sleep(0.001)
        os.killpg(0, signal.SIGINT)
        time.sleep(600)
except KeyboardInterrupt:
    print(measured.method, measured.peak >= 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,
        check=False,
        cwd=REPOSITORY,
    )
    assert done.stdout == "process True\n", done.stderr
