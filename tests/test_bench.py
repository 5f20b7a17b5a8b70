"""The bench on a tiny checkpoint: what it writes, what it refuses, and that a wrong result never counts."""

from __future__ import annotations

import json
import mmap
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lowmem
from bench import runs
from bench.__main__ import main
from bench.cases import CASES, Case, becomes_int8, find_cases
from bench.checks import WrongMemoryError, WrongResultError, check_memory, check_values
from bench.children import Fresh
from bench.goals import judge
from bench.kernel_limits import cgroup_kind
from bench.least_memory import bisect
from bench.loaders import LOADERS, Job
from bench.loaders.limit import Limit, readers
from bench.make_checkpoint import RECIPES
from bench.page_cache import cached_pages, drop
from bench.phases import Phases
from bench.results import Results, make_row
from bench.sources import make_checkpoint
from bench.tables import as_markdown
from lowmem.sizes import MIB
from lowmem.synthetic import llama_recipe, write_checkpoint

SMALL = Case("tiny", "tiny", "warm", checkpoint="llama-125m", dtype="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of checkpoints in which the quick one is tiny, so that the bench takes it for written."""
    folder = tmp_path_factory.mktemp("bench")
    write_checkpoint(llama_recipe(4 * MIB), folder / "llama-125m", max_shard_size=2 * MIB)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, str]:
    """One run of the door, end to end."""
    pytest.importorskip("transformers")
    out = tmp_path_factory.mktemp("out")
    loaders = "lowmem,safetensors,transformers,torch,limit"
    cases = "map-bf16,copy-bf16,bf16-fp32,disk-fp32"
    arguments = ["--quick", "--rounds", "1", "--repeats", "2", "--no-plots", "--cases", cases, "--loaders", loaders]
    assert main([*arguments, "--folder", str(folder), "--out", str(out)]) == 0
    found: Results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return found, (out / "results.md").read_text(encoding="utf-8")


def test_every_row_is_timed_and_checked_or_says_why_not(results: tuple[Results, str]) -> None:
    found, _ = results
    assert len(found["rows"]) == 4 * 5
    tensors = len(load_keys(found))
    for row in found["rows"]:
        if row["case"] == "disk-fp32" and row["loader"] in ("safetensors", "torch"):
            assert (row["status"], row["reason"]) == ("cannot", "it leaves nothing on disk")
            continue
        assert row["status"] == "ok", row
        assert 0 < row["least"] <= row["median"] <= row["most"]
        assert row["least"] <= row["first"] <= row["most"]
        assert row["checked"] == tensors
        assert row["peak"] >= 0
        assert row["timeline"]
        assert all(len(times) == 2 * len(row["variants"]) for times in row["times"])
    names = {"cpu", "cores", "memory", "kernel", "python", "versions", "file_system", "commit", "date"}
    assert set(found["machine"]) == names


def load_keys(found: Results) -> set[str]:
    recipe = llama_recipe(4 * MIB)
    assert found["cases"]
    return {key for key, _ in recipe.tensors}


def test_the_tables_show_every_loader_and_the_reason_of_those_that_cannot(results: tuple[Results, str]) -> None:
    found, text = results
    assert text.strip() == as_markdown(found).strip()
    table = text.split("**layers on disk, bf16 to fp32**")[1]
    assert "| safetensors | cannot: it leaves nothing on disk |" in table
    assert "| lowmem |" in table
    widths = {line.count("|") - line.count("\\|") for line in table.splitlines() if line.startswith("|")}
    assert len(widths) == 1
    assert "torch.load reads `.bin` files" in text


def test_conversions_are_removed_and_checkpoints_stay(results: tuple[Results, str], folder: Path) -> None:
    assert [path.name for path in folder.iterdir()] == ["llama-125m"]


def state(source: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        found.update({key: tensor.to(dtype) for key, tensor in load_file(file).items()})
    return found


def test_a_wrong_result_is_named(folder: Path) -> None:
    source = folder / "llama-125m"
    good = state(source, torch.float32)
    assert check_values(SMALL, source, good) == len(good)
    key = sorted(good)[3]
    one = {**good, key: good[key].clone()}
    one[key].view(-1)[-1] = -one[key].view(-1)[-1]
    for wrong, text in (
        (one, "values differ"),
        ({**good, key: good[key].bfloat16()}, "expected torch.float32, found torch.bfloat16"),
        ({**good, key: good[key][..., :-1]}, "expected shape"),
        ({name: tensor for name, tensor in good.items() if name != key}, "not there"),
    ):
        with pytest.raises(WrongResultError, match=f"^{key}: {text}"):
            check_values(SMALL, source, wrong)


INT8 = ("int8-quantise", "int8-stored", "int8-dequantise")


@pytest.fixture(scope="module")
def int8_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint in bf16, and in int8 beside it as the bench writes it."""
    pytest.importorskip("bitsandbytes")
    own = tmp_path_factory.mktemp("bench-int8")
    shutil.copytree(folder / "llama-125m", own / "llama-125m")
    assert make_checkpoint(own, "llama-125m", "int8", "1MB") == own / "llama-125m-int8"
    assert len(list((own / "llama-125m-int8").glob("*.safetensors"))) > 1
    return own


def int8_source(case: Case, folder: Path) -> Path:
    return folder / ("llama-125m-int8" if case.stored == "int8" else "llama-125m")


@pytest.mark.parametrize("loader", ["lowmem", "transformers"])
@pytest.mark.parametrize("name", INT8)
def test_int8_is_loaded_and_checked(int8_folder: Path, tmp_path: Path, name: str, loader: str) -> None:
    from bench import child

    (case,) = find_cases([name], quick=True)
    recipe = llama_recipe(4 * MIB)
    layers = sum(becomes_int8(key) for key, _ in recipe.tensors)
    job = Job(case, int8_source(case, int8_folder), None, tmp_path / "offload", ())
    LOADERS[loader].imports(job)
    answer = child._time(LOADERS[loader], job, 1)
    assert answer["status"] == "ok", answer
    assert answer["checked"] == len(recipe.tensors) + (layers if case.dtype == "int8" else 0)


def test_only_those_that_know_int8_are_asked(int8_folder: Path, tmp_path: Path) -> None:
    from bench import child

    (case,) = find_cases(["int8-stored"], quick=True)
    for name, loader in LOADERS.items():
        if not loader.has_int8:
            answer = child._obey({"case": vars(case), "loader": name})
            assert answer == {"status": "cannot", "reason": "it knows no int8 layers"}


def test_int8_counts_as_what_it_takes(int8_folder: Path) -> None:
    """As lowmem's own plan has it, but for buffers, which no checkpoint holds."""
    options: dict[str, dict[str, Any]] = {
        "int8-quantise": {"quantize": "int8"},
        "int8-stored": {},
        "int8-dequantise": {"dequantize": True, "dtype": "bfloat16"},
    }
    for case in find_cases(options, quick=True):
        source = int8_source(case, int8_folder)
        checkpoint = lowmem.inspect(source)
        for residency, used in (("any", "map"), ("copy", "copy")):
            plan = lowmem.plan(source, residency=used, **options[case.name])
            kept = sum(p.nbytes for p in plan.placements if p.residency != "map" and "rotary_emb" not in p.target)
            assert replace(case, residency=residency).resident(checkpoint) == kept


def test_wrong_int8_is_named(int8_folder: Path) -> None:
    stored, made = find_cases(["int8-stored", "int8-quantise"], quick=True)
    good: dict[str, torch.Tensor] = {}
    for file in (int8_folder / "llama-125m-int8").glob("*.safetensors"):
        good.update(load_file(file))
    for case, source in ((stored, "llama-125m-int8"), (made, "llama-125m")):
        check_values(case, int8_folder / source, good)
        for end in ("weight", "SCB"):
            key = f"model.layers.0.self_attn.q_proj.{end}"
            wrong = {**good, key: good[key].clone()}
            wrong[key].view(-1)[0] += 1
            with pytest.raises(WrongResultError, match=f"^{key}: values differ"):
                check_values(case, int8_folder / source, wrong)


def test_zero_and_minus_zero_differ(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    case = replace(SMALL, stored="float32")
    save_file({"a": torch.tensor([0.0, float("nan")])}, tmp_path / "model.safetensors")
    check_values(case, tmp_path, {"a": torch.tensor([0.0, float("nan")])})
    with pytest.raises(WrongResultError, match="values differ"):
        check_values(case, tmp_path, {"a": torch.tensor([-0.0, float("nan")])})


def test_a_wrong_loader_has_no_time(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The child finds it before it answers with times."""
    from bench import child

    class Wrong(Limit):
        def load(self, job: Job, phases: Phases) -> Mapping[str, torch.Tensor]:
            found = state(job.source, job.dtype)
            next(iter(found.values())).zero_()
            return found

    job = Job(SMALL, folder / "llama-125m", None, tmp_path / "offload", ())
    answer = child._time(Wrong(), job, 2)
    assert answer["status"] == "wrong"
    assert answer["reason"].startswith("wrong: model.")
    row = make_row(SMALL, "limit", [answer], 0)
    assert "least" not in row
    shown = {"machine": MACHINE, "options": {"rounds": 1, "repeats": 2}, "titles": {}, "rows": [row]}
    assert "| limit | wrong: model." in as_markdown({**shown, "cases": [vars(SMALL)]})


MACHINE = {
    **dict.fromkeys(("cpu", "cores", "kernel", "python", "file_system", "commit", "date"), "?"),
    "memory": 0,
    "versions": {},
}


def test_the_kind_of_memory_is_checked(folder: Path) -> None:
    source = folder / "llama-125m"
    copied = torch.nn.Module()
    mapped = torch.nn.Module()
    for file in source.glob("*.safetensors"):
        for key, tensor in load_file(file).items():
            for model, value in ((mapped, tensor), (copied, tensor.clone())):
                model._parameters[key] = torch.nn.Parameter(value)
    copy, share = replace(SMALL, dtype="bfloat16"), replace(SMALL, dtype="bfloat16", residency="map")
    check_memory(copy, source, copied)
    check_memory(share, source, mapped)
    with pytest.raises(WrongMemoryError, match="it copies"):
        check_memory(share, source, copied)
    with pytest.raises(WrongMemoryError, match="it does not copy"):
        check_memory(copy, source, mapped)
    with pytest.raises(WrongMemoryError, match="in memory, not on disk"):
        check_memory(replace(copy, on_disk=True), source, copied)


@pytest.fixture
def cold_file(tmp_path: Path) -> Path:
    file = tmp_path / "file"
    file.write_bytes(bytes(3 * MIB + 5))
    if drop([file]):
        pytest.skip("this file system keeps its pages, as tmpfs does")
    return file


def test_dropped_files_are_cold_and_read_ones_are_not(cold_file: Path) -> None:
    assert cached_pages(cold_file) == 0
    cold_file.read_bytes()
    assert cached_pages(cold_file) == -(-(3 * MIB + 5) // mmap.PAGESIZE)


def test_a_file_that_is_still_mapped_is_not_taken_for_cold(cold_file: Path) -> None:
    with cold_file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[:: mmap.PAGESIZE].count(0)
        assert drop([cold_file]) > 0
    assert drop([cold_file]) == 0


def test_a_load_of_files_that_stay_cached_has_no_time(folder: Path, tmp_path: Path) -> None:
    from bench import child

    source = folder / "llama-125m"
    job = Job(replace(SMALL, cold=True), source, None, tmp_path / "offload", ())
    file = job.shards[0]
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[:: mmap.PAGESIZE]
        answer = child._time(Limit(), job, 1)
    assert answer["status"] == "not cold"
    assert "stayed in the page cache" in answer["reason"]
    assert "runs" not in answer


@pytest.mark.parametrize(("on_disk", "written"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_reader_of_the_limit_reads_what_is_there(
    folder: Path, tmp_path: Path, dtype: str, on_disk: bool, written: bool
) -> None:
    source = folder / "llama-125m"
    case = replace(SMALL, dtype=dtype, on_disk=on_disk, written=written, cold=True)
    limit = Limit()
    job = Job(case, source, None, tmp_path, ())
    limit.imports(job)
    assert len(readers(case)) == 10
    for variant in limit.variants(case):
        found = limit.load(replace(job, variant=variant), Phases())
        assert check_values(case, source, found) > 0


def test_the_loaders_that_convert_are_known() -> None:
    assert {name for name, loader in LOADERS.items() if loader.converts} == set(runs.CONVERTING)


def test_cases_name_checkpoints_that_can_be_made() -> None:
    assert {case.checkpoint for case in (*CASES, *find_cases((), quick=True))} <= set(RECIPES)
    assert len({case.name for case in CASES}) == len(CASES)
    with pytest.raises(KeyError):
        find_cases(["no-such-case"], quick=False)


def test_goals_compare_within_one_run() -> None:
    def row(case: str, loader: str, least: float) -> dict[str, Any]:
        return {"case": case, "loader": loader, "status": "ok", "reason": "", "least": least, "variant": ""}

    rows = [row("copy-bf16", "lowmem", 0.25), row("copy-bf16", "limit", 0.22), row("copy-bf16", "safetensors", 0.6)]
    rows += [row("copy-bf16", "runai", 0.9), {**row("bf16-fp32", "lowmem", 0), "status": "cannot", "reason": "why"}]
    found = {(one.case, one.goal): (one.found, one.met) for one in judge({"rows": rows})}
    assert found == {
        ("copy-bf16", "≥ 85% of the limit"): ("88% ()", True),
        ("copy-bf16", "≥ 2x the best peer"): ("2.40x (safetensors)", True),
        ("copy-bf16", "≥ 4x runai"): ("3.60x", False),
        ("bf16-fp32", "be loaded by lowmem"): ("cannot: why", False),
    }


def test_the_least_limit_is_found_within_its_precision() -> None:
    for needed in (20 * MIB, 300 * MIB, 3000 * MIB):
        for first in (1, 300 * MIB):
            found = bisect(lambda size, needed=needed: size >= needed, first)
            assert found is not None
            assert needed <= found <= needed * 1.06 + 4 * MIB
    assert bisect(lambda size: False, MIB) is None


@pytest.mark.cgroup
@pytest.mark.skipif(cgroup_kind() is None, reason="this process may make no memory cgroup")
def test_the_least_memory_of_a_load_is_found_and_its_groups_removed(folder: Path, tmp_path: Path) -> None:
    def groups() -> set[str]:
        roots = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))
        found = {path for root in roots if root.is_dir() for path in root.glob("lowmem-*")}
        # Those of processes that live are of tests that run beside this one.
        return {str(path) for path in found if not Path("/proc", path.name.rpartition("-")[2]).exists()}

    before = groups()
    order = {"do": "least", "case": vars(SMALL), "loader": "limit", "source": str(folder / "llama-125m")}
    answer = Fresh().ask(
        {**order, "converted": None, "work": str(tmp_path), "kind": cgroup_kind(), "first": 64 * MIB}, 100
    )
    assert answer["status"] == "ok", answer
    assert 0 < answer["least"] < 1024 * MIB
    assert groups() <= before
