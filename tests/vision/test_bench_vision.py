"""The bench of timm's models and several sources at tiny sizes: what it writes, and that a wrong load never counts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.kernel_limits import cgroup_kind
from bench.vision import cases, runs
from bench.vision.__main__ import main
from bench.vision.cases import CASES, TIMM, Sizes

ROOT = Path(__file__).parent.parent.parent
linux = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the bench reads Linux's /proc")


@pytest.fixture(scope="module", autouse=True)
def one_thread_a_child() -> Iterator[None]:
    """Tiny tensors: threads that wait for each other cost more than they compute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def bench(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    out = folder / "vision.json"
    code = main(["--small", "--folder", str(folder), "--output", str(out), "--rounds", "2", *arguments])
    return code, json.loads(out.read_text(encoding="utf-8"))


def test_its_modules_are_imported_without_timm() -> None:
    code = """
import sys
sys.modules["timm"] = sys.modules["torchvision"] = None
import bench.vision.checkpoints, bench.vision.limited, bench.vision.runs, bench.vision.ways
from bench.vision.__main__ import main
main(["--help"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--folder" in done.stdout


def test_help_imports_no_torch() -> None:
    code = "import sys, bench.vision.__main__ as door; door.parser().format_help(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_an_unknown_case_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench(tmp_path, "--cases", "gone")
    assert "no case is called 'gone'" in capsys.readouterr().err


@linux
@pytest.mark.slow
def test_every_loader_of_timms_cases_gives_what_timm_gives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm", reason="timm is not installed: these need lowmem[dev-vision]")
    code, results = bench(tmp_path, "--cases", "timm,in_chans")
    assert code == 0
    expected = [(case.name, way) for case in CASES if case.needs_timm for way in case.ways]
    assert [(row["case"], row["loader"]) for row in results["rows"]] == expected
    for row in results["rows"]:
        assert row["status"] == "ok", row
        assert len(row["times"]) == 2
        assert row["least"] == min(row["times"])
        assert row["first"] == row["times"][0]
        if row["loader"] == "lowmem":
            assert row["peak"] < row["size"] / 2
    shown = capsys.readouterr().out
    assert "**a ViT, 5 shards (timm: the unsharded file)**" in shown
    assert "| timm.create_model | " in shown
    assert len(list((tmp_path / "vit_tiny_patch16_224-shards").glob("*.safetensors"))) == 5


def test_without_timm_its_rows_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(runs, "has_timm", lambda: False)
    code, results = bench(tmp_path, "--cases", "timm-vit")
    assert code == 0
    assert [row["loader"] for row in results["rows"]] == list(TIMM)
    assert {row["status"] for row in results["rows"]} == {"cannot"}


@linux
@pytest.mark.slow
def test_every_way_to_load_several_sources_gives_the_same(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    code, results = bench(tmp_path, "--cases", "sources")
    assert code == 0
    assert len(results["rows"]) == 6
    assert {row["status"] for row in results["rows"]} == {"ok"}


@pytest.mark.slow
@pytest.mark.cgroup
@pytest.mark.skipif(cgroup_kind() is None, reason="this process may make no memory cgroup")
def test_under_the_limit_lowmem_passes_and_copies_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """170 MiB of weights, of which the largest has 16."""
    pytest.importorskip("transformers")
    sizes = Sizes("", "", width=512, layers=16, words=16000, tower=384, depth=12, shard=40_000_000)
    monkeypatch.setattr("bench.vision.__main__.SMALL", sizes)
    code, results = bench(tmp_path, "--cases", "limits")
    assert code == 0
    found = {row["loader"]: row["status"] for row in results["rows"]}
    assert found["no limit, by hand"] == found["lowmem"] == "ok"
    assert found["hand"] == found["hand-mmap"] == found["hand-assign"] == "killed"


def row(loader: str, digest: str, **more: Any) -> dict[str, Any]:
    tensors = {"a": ("torch.float32", (2,), digest), "head.bias": ("torch.float32", (3,), digest)}
    return {"loader": loader, "status": "ok", "reason": "", "times": [1.0], "tensors": tensors, **more}


def test_a_time_counts_only_when_the_tensors_are_the_references() -> None:
    rows = [row("lowmem", "x"), row("lowmem-copy", "y"), row("timm", "x")]
    assert [found["status"] for found in runs.check_tensors(rows, "timm")] == ["ok", "wrong", "ok"]
    assert "least" not in runs._summed_up(runs.check_tensors(rows, "timm")[1])
    failed = {"loader": "timm", "status": "failed", "reason": "killed", "times": []}
    assert [found["status"] for found in runs.check_tensors([rows[0], failed], "timm")] == ["cannot", "failed"]


def test_a_fresh_head_may_have_other_values_but_no_other_shape() -> None:
    ours, theirs = row("lowmem", "x", fresh=["head.bias"]), row("timm", "x")
    ours["tensors"]["head.bias"] = ("torch.float32", (3,), "z")
    assert runs.check_tensors([ours, theirs], "timm")[0]["status"] == "ok"
    ours["tensors"]["head.bias"] = ("torch.float32", (4,), "z")
    assert runs.check_tensors([ours, theirs], "timm")[0]["reason"] == "head.bias is not that of timm"


def test_every_way_has_a_title() -> None:
    assert {way for case in CASES for way in case.ways} == set(cases.TITLES)
