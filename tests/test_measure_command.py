"""What a command used."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lowmem import memory
from lowmem.errors import MeasureError, OptionError
from lowmem.sizes import MIB

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
REPOSITORY = Path(__file__).parents[1]


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize(("code", "expected"), [("", 0), ("raise SystemExit(3)", 3)])
def test_a_command_hands_on_its_exit_code(code, expected):
    found, measured = memory.measure_command([sys.executable, "-c", code])
    assert found == expected
    assert measured.baseline == 0
    assert measured.peak == measured.peak_anonymous


@linux
def test_a_command_that_a_signal_ended_has_a_shells_exit_code():
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert memory.measure_command([sys.executable, "-c", code])[0] == 128 + signal.SIGKILL


# Ends when the measuring process has looked at it: on a busy machine a short life may be missed.
HOLD = "x = bytearray({size}); import time; time.sleep({seconds})"


def test_a_command_is_measured():
    _, measured = memory.measure_command([sys.executable, "-c", HOLD.format(size=64 * MIB, seconds=0.5)])
    assert 64 * MIB <= measured.peak <= 96 * MIB
    assert measured.peak_rss >= measured.peak
    assert measured.devices == {}


def test_the_descendants_of_a_command_are_added_up():
    inner = HOLD.format(size=64 * MIB, seconds=1)
    middle = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    outer = f"import subprocess, sys; x = bytearray({64 * MIB}); subprocess.run([sys.executable, '-c', {middle!r}])"
    _, measured = memory.measure_command([sys.executable, "-c", outer])
    assert 128 * MIB <= measured.peak <= 192 * MIB


@linux
def test_a_descendant_that_lost_its_parent_still_counts():
    inner = HOLD.format(size=64 * MIB, seconds=2)
    middle = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {inner!r}]); time.sleep(0.5)"
    outer = f"import subprocess, sys, time; subprocess.run([sys.executable, '-c', {middle!r}]); time.sleep(1)"
    _, measured = memory.measure_command([sys.executable, "-c", outer])
    assert measured.samples[-1][1] <= measured.peak
    late = [anonymous for seconds, anonymous, _ in measured.samples if seconds > measured.seconds - 0.3]
    assert max(late) >= 64 * MIB


@linux
def test_starting_small_programs_from_a_large_one_is_no_peak():
    code = f"import subprocess; x = bytearray({128 * MIB})\nfor _ in range(50): subprocess.run(['true'])"
    _, measured = memory.measure_command([sys.executable, "-c", code], interval=0.0001)
    assert measured.peak <= 192 * MIB


def test_a_command_is_measured_without_proc_too(monkeypatch):
    monkeypatch.setattr("lowmem._processes.has_statm", lambda: False)
    _, measured = memory.measure_command([sys.executable, "-c", HOLD.format(size=64 * MIB, seconds=1)], interval=0.01)
    assert 64 * MIB <= measured.peak <= 96 * MIB


def test_a_command_that_is_not_found_is_named_with_the_remedy():
    with pytest.raises(MeasureError, match=r"^no-such-program: cannot be started .*PATH"):
        memory.measure_command(["no-such-program", "x"])


@pytest.mark.parametrize("command", [[], "ls -l"])
def test_a_command_must_be_words(command):
    with pytest.raises(OptionError, match="as a list"):
        memory.measure_command(command)


@linux
def test_ctrl_c_is_left_to_the_command():
    program = (
        "import signal, sys, time; signal.signal(signal.SIGINT, lambda *_: sys.exit(7)); print('up', flush=True);"
        "time.sleep(600)"
    )
    code = (
        f"import sys\nfrom lowmem import memory\nprint(memory.measure_command([sys.executable, '-c', {program!r}])[0])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, start_new_session=True
    ) as measuring:
        assert measuring.stdout.readline() == "up\n"
        os.killpg(measuring.pid, signal.SIGINT)  # as the terminal does
        assert measuring.stdout.read() == "7\n"
    assert measuring.returncode == 0


@linux
def test_the_tree_keeps_no_files_open():
    before = open_files()
    for _ in range(5):
        memory.measure_command([sys.executable, "-c", ""])
    after = open_files()
    assert after == before
