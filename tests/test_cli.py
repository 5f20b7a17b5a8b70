"""The shell's verbs: what they print where, and how they exit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import lowmem
from lowmem.cli import main
from lowmem.sizes import MIB, format_size
from lowmem.synthetic import llama_recipe, write_checkpoint

PLAN_KEYS = {
    "source",
    "shards",
    "tensors",
    "devices",
    "host",
    "bytes_read",
    "bytes_written",
    "missing",
    "unexpected",
    "mismatched",
    "warnings",
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(llama_recipe(8 * MIB), tmp_path_factory.mktemp("cli") / "llama", max_shard_size=3 * MIB)


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(a) for a in argv])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def run_json(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    code, out, err = run(capsys, *argv, "--json")
    assert code == 0, err
    value: dict[str, Any] = json.loads(out)
    return value


def test_inspect_shows_shards_and_dtypes(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "inspect", llama)
    assert (code, err) == (0, "")
    for shard in lowmem.inspect(llama).shards:
        assert shard.file.name in out
    assert "bfloat16" in out


def test_inspect_lists_every_tensor_when_asked(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "inspect", llama, "--tensors")[1]
    assert all(key in out for key in lowmem.inspect(llama))


def test_inspect_prints_what_to_dict_returns(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_json(capsys, "inspect", llama) == lowmem.inspect(str(llama)).to_dict()


def test_plan_prints_what_to_dict_returns(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = run_json(capsys, "plan", llama, "--dtype", "float32", "--ram", "1GiB", "--keep-fp32", "norm,lm_head")
    expected = lowmem.plan(str(llama), dtype="float32", ram="1GiB", keep_fp32=["norm", "lm_head"]).to_dict()
    # What is free differs from one moment to the next.
    for table in (shown, expected):
        table["host"].pop("available")
    assert shown == json.loads(json.dumps(expected))
    assert set(shown) >= PLAN_KEYS
    assert {"resident", "mapped", "staging", "peak"} <= set(shown["host"])
    assert {"resident", "staging", "peak"} <= set(shown["devices"]["cpu"])


def test_load_adds_seconds_predicted_and_measured(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = run_json(capsys, "load", llama)
    assert set(shown) >= PLAN_KEYS
    assert shown["seconds"] > 0
    for side in ("predicted", "measured"):
        assert shown[side]["host"]["peak"] >= 0
        assert "cpu" in shown[side]["devices"]
    assert shown["predicted"]["host"]["peak"] == shown["host"]["peak"]


def test_load_shows_tables_on_stdout(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "load", llama)
    assert code == 0
    assert "predicted" in out
    assert "measured" in out


@pytest.mark.parametrize("verb", ["plan", "load"])
def test_how_files_are_read_is_shown_where_it_was_asked_for(
    verb: str, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mapped = format_size(lowmem.plan(llama).host.mapped)
    every = ["--io", "buffered", "--prefetch", "--keep-cache"]
    rows = [["io", "buffered"], ["prefetch", *mapped.split()], ["keep_cache", "on"]]
    for flags, expected in (([], []), (["--io", "auto"], []), (["--keep-cache"], rows[2:]), (every, rows)):
        shown = rows_of(run(capsys, verb, llama, *flags)[1])
        assert [row for row in shown if row[0] in ("io", "prefetch", "keep_cache")] == expected
        assert (["reading", "as", "asked"] in shown) == bool(expected)


def test_load_shows_the_seconds_of_each_phase(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(run(capsys, "load", llama)[1])
    at = rows.index(["phase", "seconds"])
    phases = [row for row in rows[at + 1 :] if len(row) == 2]
    assert [name for name, _ in phases] == ["inspect", "import", "build", "plan", "weights"]
    assert all(float(seconds) >= 0 for _, seconds in phases)
    assert ["phase", "seconds"] not in rows_of(run(capsys, "plan", llama)[1])


def rows_of(text: str) -> list[list[str]]:
    """The words of each line that has some."""
    return [line.split() for line in text.splitlines() if line.strip()]


def test_int8_in_the_shell(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = (
        "--quantize",
        "int8",
        "--skip-modules",
        "lm_head,q_proj",
        "--skip-modules",
        "k_proj",
        "--int8-threshold",
        "0",
    )
    shown = run_json(capsys, "plan", llama, *asked)
    assert {"lm_head", "q_proj", "k_proj"}.isdisjoint(
        part for t in shown["tensors"] if t["dtype"] == "int8" for part in t["name"].split(".")
    )
    plan = lowmem.plan(llama, quantize="int8", skip_modules=["lm_head", "q_proj", "k_proj"], int8_threshold=0)
    assert shown["dtypes"] == plan.dtypes
    assert set(plan.dtypes) == {"int8", "float32", "bfloat16"}
    assert sum(plan.dtypes.values()) == sum(p.nbytes for p in plan.placements)
    loaded = run_json(capsys, "load", llama, *asked)
    assert loaded["dtypes"] == plan.dtypes
    table = run(capsys, "plan", llama, *asked)[1]
    for dtype, size in plan.dtypes.items():
        (line,) = (line for line in table.splitlines() if line.strip().startswith(dtype))
        assert line.split()[-2:] == format_size(size).split()
    assert "float32 (scales of int8)" in table
    assert "bfloat16" not in run(capsys, "plan", llama)[1], "a model without int8 needs no table of dtypes"


def test_int8_becomes_floats_in_the_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {"weight": torch.ones(4, 8, dtype=torch.int8), "SCB": torch.ones(4), "bias": torch.ones(4)}
    save_file({f"0.{key}": tensor for key, tensor in tensors.items()}, tmp_path / "int8.safetensors")
    (tmp_path / "small_int8.py").write_text("import torch\nmake = lambda: torch.nn.Sequential(torch.nn.Linear(8, 4))\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        asked = ("plan", "int8.safetensors", "--model", "small_int8:make")
        assert run_json(capsys, *asked)["dtypes"] == {"int8": 32, "float32": 32}
        assert run_json(capsys, *asked, "--dequantize")["dtypes"] == {"float32": 144}
        assert "float32 " not in run(capsys, *asked, "--dequantize")[1]
        # What is no linear layer cannot be int8, and what would mend it is an option of `diff` too.
        (tmp_path / "small_int8.py").write_text(
            "import torch\nclass Own(torch.nn.Linear):\n    pass\nmake = lambda: torch.nn.Sequential(Own(8, 4))\n"
        )
        patch.delitem(sys.modules, "small_int8", raising=False)
        asked = ("diff", "int8.safetensors", "--model", "small_int8:make")
        code, _, err = run(capsys, *asked)
        assert code == 1
        assert "(--dequantize)" in err
        assert run_json(capsys, *asked, "--dequantize")["matched"] == 2


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--int8-threshold", "much"), "--int8-threshold: expected a number such as 6.0, found 'much'"),
        (("--int8-threshold", "-1"), "int8_threshold: expected a number, 0 or more"),
        (("--skip-modules", "lm_head"), "skip_modules: it is about layers that quantize='int8' makes int8"),
        (("--quantize", "int8", "--dequantize"), "quantize and dequantize: the one makes int8"),
    ],
)
def test_what_means_nothing_about_int8_is_wrong_usage(
    argv: tuple[str, ...], said: str, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "plan", llama, *argv)
    assert (code, out) == (2, "")
    assert said in err


def test_every_option_reaches_the_plan(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "map.json"
    table.write_text(json.dumps({"": "cpu", "model.layers": "disk"}))
    flags = [
        "--device-map",
        table,
        "--dtype",
        "float16",
        "--offload-folder",
        tmp_path / "off",
        "--keep-fp32",
        "lm_head",
    ]
    shown = run_json(capsys, "plan", llama, *flags, "--staging", "1MiB", "--residency", "copy")
    by_name = {t["name"]: t for t in shown["tensors"]}
    assert by_name["lm_head.weight"]["dtype"] == "float32"
    assert by_name["model.norm.weight"]["dtype"] == "float16"
    assert {t["device"] for n, t in by_name.items() if n.startswith("model.layers.")} == {"disk"}
    assert 0 < shown["host"]["staging"] <= MIB
    copied = run_json(capsys, "plan", llama, "--residency", "copy")
    assert {t["residency"] for t in copied["tensors"]} == {"copy"}
    split = run_json(capsys, "plan", llama, "--device-map", "auto", "--max-memory", "0=2MiB,cuda:1=3MiB,cpu=1GiB")
    assert {"cuda:0", "cuda:1"} & set(split["devices"])


def test_a_callable_makes_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"weight": torch.ones(3, 2), "bias": torch.zeros(3)}, tmp_path / "w.safetensors")
    (tmp_path / "mine_for_cli.py").write_text("import torch\ndef make():\n    return torch.nn.Linear(2, 3)\n")
    monkeypatch.chdir(tmp_path)
    shown = run_json(capsys, "load", "w.safetensors", "--model", "mine_for_cli:make")
    assert {t["name"] for t in shown["tensors"]} == {"weight", "bias"}


def test_missing_tensors_are_refused_unless_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"weight": torch.ones(3, 2)}, tmp_path / "w.safetensors")
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "plan", "w.safetensors", "--model", "torch.nn:Identity")
    assert code == 0  # nothing is missing in a module without weights
    assert "not in the model" in err
    (tmp_path / "mine_for_strict.py").write_text("import torch\ndef make():\n    return torch.nn.Linear(2, 3)\n")
    code, out, err = run(capsys, "load", "w.safetensors", "--model", "mine_for_strict:make")
    assert (code, out) == (1, "")
    assert "'bias'" in err
    assert "--no-strict" in err
    shown = run_json(capsys, "load", "w.safetensors", "--model", "mine_for_strict:make", "--no-strict")
    assert shown["missing"] == ["bias"]


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["plan", "no/such/folder"], 1, "no such file or folder"),
        (["inspect", "no/such/folder"], 1, "no such file or folder"),
        (["plan", "LLAMA", "--ram", "lots"], 2, "ram: expected a size"),
        (["plan", "LLAMA", "--ram", "1MiB", "--dtype", "float32"], 1, "the load needs at least"),
        (["plan", "LLAMA", "--dtype", "int3"], 2, "dtype: expected"),
        (["plan", "LLAMA", "--device-map", "gpu"], 2, "device_map: expected a device"),
        (["plan", "LLAMA", "--device-map", "absent.json"], 2, "absent.json"),
        (["plan", "LLAMA", "--max-memory", "cpu"], 2, "DEVICE=SIZE"),
        (["plan", "LLAMA", "--model", "nocolon"], 2, "MODULE:CALLABLE"),
        (["plan", "LLAMA", "--model", "no_such_module_at_all:x"], 2, "cannot be imported"),
        (["plan", "LLAMA", "--staging", "5KiB"], 2, "at least 1MiB"),
        (["load", "LLAMA", "--device-map", "cuda:7"], 1, "cuda:7 is not on this machine"),
        (["measure", "--"], 2, "expected a command"),
        (["measure", "--", "no-such-program-at-all"], 1, "no-such-program-at-all"),
        (["demo", "--size", "1KiB"], 2, "size: expected at least"),
    ],
)
def test_failures_exit_with_a_message_on_stderr(
    argv: list[str], code: int, said: str, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, out, err = run(capsys, *[str(llama) if a == "LLAMA" else a for a in argv])
    assert found == code
    assert out == ""
    assert err.startswith("lowmem: ")
    assert said in err


@pytest.mark.parametrize("argv", [[], ["fly"], ["plan"], ["plan", "x", "--residency", "swap"]])
def test_wrong_usage_exits_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    assert "usage: lowmem" in capsys.readouterr().err


def test_every_verb_has_help_that_names_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("inspect", "plan", "load", "measure", "demo"):
        with pytest.raises(SystemExit) as exit_:
            main([verb, "--help"])
        assert exit_.value.code == 0
        shown = capsys.readouterr().out
        assert "--json" in shown
        assert "exit codes" in shown


def command(*argv: object, **options: Any) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "lowmem", *map(str, argv)]
    return subprocess.run(line, capture_output=True, text=True, check=False, **options)


def test_measure_passes_output_and_exit_code_on() -> None:
    done = command("measure", "--", sys.executable, "-c", "print('hello'); raise SystemExit(7)")
    assert done.returncode == 7
    assert "hello" in done.stdout
    assert "anonymous" in done.stdout


def test_measure_with_json_keeps_stdout_for_the_json() -> None:
    # Held for a while, or a machine that is busy ends it between two looks.
    program = "import time; b = bytearray(b'x') * (64 << 20); print('hello'); time.sleep(0.5)"
    done = command("measure", "--json", "--", sys.executable, "-c", program)
    shown = json.loads(done.stdout)
    assert done.returncode == shown["exit_code"] == 0
    assert shown["peak_anonymous"] >= 64 * MIB
    assert "hello" in done.stderr


def test_names_from_a_file_never_steer_the_terminal(tmp_path: Path) -> None:
    save_file({"evil\x1b[2Jname[red]": torch.ones(1)}, tmp_path / "w.safetensors")
    done = command("inspect", tmp_path / "w.safetensors", "--tensors")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert "[red]" in done.stdout


def test_a_reader_that_goes_away_is_no_traceback(llama: Path) -> None:
    line = f"{sys.executable} -m lowmem inspect {llama} --tensors --json | head -c 10"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr


def test_inspect_imports_no_torch(llama: Path) -> None:
    program = (
        "import sys\nfrom lowmem.cli import main\n"
        f"main(['inspect', {str(llama)!r}])\nassert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_demo_runs_within_its_budget_and_cleans_up(tmp_path: Path) -> None:
    done = command("demo", "--size", "64MiB", "--folder", tmp_path, "--json", env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["predicted"]["host"]["peak"] <= 32 * MIB
    assert shown["devices"]["disk"]["weights"] > 0
    assert "generated tokens" in done.stderr
    assert "object at 0x" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_load_draws_its_memory_beside_its_report(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "memory.png"
    shown = run_json(capsys, "load", llama, "--dtype", "float32", "--plot", picture)
    assert shown["measured"]["host"]["peak"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, out, _ = run(capsys, "load", llama, "--plot", tmp_path / "memory.svg")
    assert code == 0
    assert "measured" in out
    assert b"<svg" in (tmp_path / "memory.svg").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory.png", "memory.svg"]


@pytest.mark.parametrize("code", [0, 7])
def test_measure_draws_the_memory_of_a_command(code: int, tmp_path: Path) -> None:
    picture = tmp_path / "memory.pdf"
    line = [sys.executable, "-c", f"print('hello'); raise SystemExit({code})"]
    done = command("measure", "--plot", picture, "--json", "--", *line)
    assert done.returncode == json.loads(done.stdout)["exit_code"] == code, done.stderr
    assert "hello" in done.stderr
    assert picture.read_bytes().startswith(b"%PDF-")
    done = command("measure", "--plot", picture, "--", *line)
    assert done.returncode == code
    assert "anonymous" in done.stdout


@pytest.mark.parametrize(
    ("name", "said"), [("memory.gif", "expected a file that ends in"), ("no/folder/memory.png", "there is no folder")]
)
def test_a_picture_that_cannot_be_drawn_is_refused_before_the_work(
    name: str, said: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proof = tmp_path / "ran"
    program = ["--", sys.executable, "-c", f"open({str(proof)!r}, 'w')"]
    for verb in (["load", llama], ["measure", *program]):
        code, out, err = run(capsys, verb[0], "--plot", tmp_path / name, *verb[1:])
        assert (code, out) == (2, "")
        assert err.startswith("lowmem: plot: ")
        assert said in err
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_nothing_is_begun(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    proof = tmp_path / "ran"
    program = ["--", sys.executable, "-c", f"open({str(proof)!r}, 'w')"]
    for verb in (["load", llama], ["measure", *program]):
        code, out, err = run(capsys, verb[0], "--plot", tmp_path / "memory.png", *verb[1:])
        assert (code, out) == (1, "")
        assert "pip install 'lowmem[plot]'" in err
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_fails_at_the_end_does_not_cost_the_report(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    for verb in (["load", "--json", llama], ["measure", "--json", "--", sys.executable, "-c", ""]):
        code, out, err = run(capsys, verb[0], "--plot", tmp_path / "memory.png", *verb[1:])
        assert code == 1
        assert json.loads(out)["seconds"] > 0
        assert "No space left on device" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [0, 7])
def test_a_folder_that_vanishes_meanwhile_costs_only_the_picture(code: int, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    program = f"import os; os.rmdir({str(folder)!r}); raise SystemExit({code})"
    done = command("measure", "--json", "--plot", folder / "memory.png", "--", sys.executable, "-c", program)
    assert done.returncode == (code or 1)
    assert json.loads(done.stdout)["exit_code"] == code
    assert done.stderr.startswith("lowmem: plot: ")
    assert "there is no folder" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_folder_that_vanishes_during_a_load_does_not_cost_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"weight": torch.ones(3, 2), "bias": torch.zeros(3)}, tmp_path / "w.safetensors")
    body = "import os, torch\ndef make():\n    os.rmdir('pictures')\n    return torch.nn.Linear(2, 3)\n"
    (tmp_path / "mine_for_plot.py").write_text(body)
    monkeypatch.chdir(tmp_path)
    for options in ([], ["--json"]):
        (tmp_path / "pictures").mkdir()
        line = ["load", "w.safetensors", "--model", "mine_for_plot:make", "--plot", "pictures/memory.png", *options]
        code, out, err = run(capsys, *line)
        assert code == 1
        assert "measured" in out
        assert err.startswith("lowmem: plot: ")
        assert err.count("\n") == 1


def test_progress_is_drawn_only_for_a_terminal(llama: Path) -> None:
    done = command("load", llama, "--residency", "copy", "--json")
    assert "loading" not in done.stderr
    if sys.platform != "linux":
        pytest.skip("needs a pseudo-terminal")
    line = f"{sys.executable} -m lowmem load {llama} --residency copy --json"
    drawn = subprocess.run(["script", "-qec", line, "/dev/null"], capture_output=True, text=True, check=False)
    if drawn.returncode == 127:
        pytest.skip("script(1) is not here")
    assert "\x1b[" in drawn.stdout


def shell(line: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """A line of bash, in which `lowmem` is this one."""
    line = line.replace("lowmem ", f"{sys.executable} -m lowmem ")
    return subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
        env={**os.environ, **extra},
    )


@pytest.mark.parametrize(
    "verb", ["inspect {}", "inspect --json {}", "plan {}", "load --json {}", "--help", "plan --help"]
)
@pytest.mark.parametrize("where", [">&-", "> /dev/full"])
def test_results_that_cannot_be_written_are_a_failure_in_one_line(verb: str, where: str, llama: Path) -> None:
    if "full" in where and not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    done = shell(f"lowmem {verb.format(llama)} {where}")
    assert done.returncode == 1
    assert done.stderr.startswith("lowmem: stdout: cannot be written: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("where", ["2>&-", "2> /dev/full", "<&- 2>&-"])
def test_a_load_needs_no_stderr(where: str, llama: Path) -> None:
    if "full" in where and not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    done = shell(f"lowmem load --json {llama} {where}")
    assert done.returncode == 0
    assert json.loads(done.stdout)["seconds"] > 0
    assert shell(f"lowmem inspect no/such {where}").returncode == 1
    assert shell(f"lowmem fly {where}").returncode == 2
    assert shell(f"lowmem measure --json -- true {where}").returncode == 0
    assert shell(f"lowmem plan {where} >&-").returncode == 2


@pytest.mark.parametrize("locale", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "LANG": "C"}])
def test_names_that_the_locale_cannot_write_are_no_traceback(locale: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "naïve-模型"
    folder.mkdir()
    save_file({"café.重み": torch.ones(1)}, folder / "w.safetensors")
    for options in ("--tensors", "--json"):
        done = shell(f"lowmem inspect {options} {folder}", **locale)
        assert (done.returncode, done.stderr) == (0, "")
    done = shell(f"lowmem plan {folder}", **locale)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "argv",
    [
        ["plan", "LLAMA", "--ram", "9" * 5000],
        ["plan", "LLAMA", "--device-map", "cuda:" + "9" * 5000],
        ["plan", "LLAMA", "--max-memory", "cpu=" + "9" * 5000],
        ["plan", "LLAMA", "--max-memory", "9" * 5000],
        ["plan", "LLAMA", "--dtype", "f" * 5000],
        ["plan", "LLAMA", "--model", "m" * 5000],
        ["plan", "LLAMA", "--model", "a:" + "m" * 5000],
        ["plan", "LLAMA", "--residency", "m" * 5000],
        ["plan", "LLAMA", "--offload-folder", "m" * 5000],
        ["demo", "--tokens", "9" * 4000],
        ["demo", "--tokens", "9" * 5000],
        ["measure", "--interval", "9" * 5000, "--", "true"],
        ["plan", "LLAMA", "--no-such-option-" + "x" * 5000],
    ],
)
def test_what_is_wrong_is_not_repeated_at_length(
    argv: list[str], llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main([str(llama) if a == "LLAMA" else a for a in argv])
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    assert code == 2
    err = capsys.readouterr().err
    assert "lowmem" in err
    assert len(err) < 2500


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ("def broken(:", "x"),
        ("raise RuntimeError('no')", "x"),
        ("class E(BaseException): pass\nraise E", "x"),
        ("import sys; sys.exit(0)", "x"),
        ("x = 3", "x"),
        ("x = 3", "x.y.z"),
        ("def __getattr__(name): raise ValueError(name)", "x"),
    ],
)
def test_a_module_that_cannot_be_imported_is_wrong_usage(
    body: str,
    name: str,
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "broken_for_cli.py").write_text(body)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_for_cli", raising=False)
    before = list(sys.path)
    code, _, err = run(capsys, "plan", llama, "--model", f"broken_for_cli:{name}")
    sys.modules.pop("broken_for_cli", None)
    assert code == 2
    assert err.startswith("lowmem: --model: ")
    assert sys.path == before


@pytest.mark.parametrize("text", [".x:y", "..:y", ":y", "x:", "a..b:c", "a b:c", "\0:x"])
def test_a_model_is_named_by_module_and_callable(text: str, llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "plan", llama, "--model", text)
    assert code == 2
    assert err.startswith("lowmem: --model: ")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"": "cpu", "": "disk"}', "'' stands there twice"),
        ('{"a": "cpu", "b": "cpu", "a": "cpu"}', "'a' stands there twice"),
        ("[]", "expected a JSON object"),
        ("{", "not valid JSON"),
        ('{"": ' + "9" * 5000 + "}", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"": NaN}', "expected a device"),
        ('{"": {"a": 1}}', "expected a device"),
    ],
)
def test_a_device_map_file_is_checked(
    content: str, said: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "map.json").write_text(content)
    code, _, err = run(capsys, "plan", llama, "--device-map", tmp_path / "map.json")
    assert code == 2
    assert said in err


def test_a_device_is_given_memory_once(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("cpu=1,cpu=1GiB", "cpu=1GiB,cpu:0=1GiB", "0=1GiB,cuda:0=1GiB"):
        code, _, err = run(capsys, "plan", llama, "--max-memory", text)
        assert code == 2
        assert "give each device once" in err


def test_out_of_memory_is_one_message(
    llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("lowmem.loader.plan", full)
    code, out, err = run(capsys, "plan", llama)
    assert (code, out) == (1, "")
    assert err.startswith("lowmem: out of memory")


def test_tables_in_a_pipe_fit_eighty_columns_and_long_names_stay_whole(
    tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in ("inspect", "plan", "load"):
        rows = run(capsys, verb, llama)[1].splitlines()
        assert all(len(row) <= 80 for row in rows if not row.startswith(str(llama)))
    save_file({"layer." * 60: torch.ones(1)}, tmp_path / "w.safetensors")
    assert "layer." * 60 in run(capsys, "inspect", "--tensors", tmp_path / "w.safetensors")[1]


def test_measures_usage_shows_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["measure", "--help"])
    assert (
        "usage: lowmem measure [-h] [--json] [--interval SECONDS] [--plot FILE] -- CMD ..." in capsys.readouterr().out
    )
