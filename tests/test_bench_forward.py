"""The bench of forwards on a tiny checkpoint: what it writes, and that a wrong result never counts."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from bench.forward import limited
from bench.forward.__main__ import main
from bench.forward.cases import CASES, REFERENCE, device_map, find_cases
from bench.forward.child import Runner
from bench.forward.goals import judge
from bench.forward.loaders import LOADERS, TITLES, Order
from bench.forward.pages import give_back_mapped
from bench.forward.runs import check_digests
from bench.forward.tables import as_markdown
from bench.kernel_limits import cgroup_kind
from bench.make_checkpoint import RECIPES
from bench.page_cache import cached_pages, drop
from lowmem._mounts import memory_file_system
from lowmem.sizes import GIB, MIB
from lowmem.synthetic import llama_recipe, write_checkpoint

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the bench reads Linux's /proc")


@pytest.fixture(scope="module", autouse=True)
def one_thread_a_child() -> Iterator[None]:
    """Tiny tensors: threads that wait for each other cost more than they compute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of checkpoints in which the quick ones are tiny, so that the bench takes them for written."""
    folder = tmp_path_factory.mktemp("forward")
    write_checkpoint(llama_recipe(4 * MIB), folder / "llama-125m", max_shard_size=2 * MIB)
    build, _ = RECIPES["few-experts"]
    write_checkpoint(build("bfloat16"), folder / "few-experts", max_shard_size=64 * MIB)
    return folder


def bench(folder: Path, out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """One run of the door, end to end."""
    code = main(["--quick", "--folder", str(folder), "--json", str(out / "forward.json"), *arguments])
    return code, json.loads((out / "forward.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def results(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    names = ["warm-half", "cast", "cold", "steady-experts"]
    if memory_file_system(folder) is not None:
        names.remove("cold")
    arguments = ["--cases", ",".join(names), "--forwards", "10"]
    code, found = bench(folder, tmp_path_factory.mktemp("out"), *arguments)
    assert code == 0
    assert [case["name"] for case in found["cases"]] == names
    return found


def rows_of(results: dict[str, Any], case: str) -> dict[str, dict[str, Any]]:
    return {row["loader"]: row for row in results["rows"] if row["case"] == case}


def test_every_loader_of_a_case_takes_its_turns_and_gives_the_same_logits(results: dict[str, Any]) -> None:
    for case in find_cases([case["name"] for case in results["cases"] if case["kind"] == "steps"]):
        rows = rows_of(results, case.name)
        assert [name for name in rows if name != "disk"] == list(case.loaders)
        for loader in case.loaders:
            row = rows[loader]
            assert row["status"] == "ok", row
            # Two rounds of two tokens, or of one where each needs cold files.
            assert [len(turn) for turn in row["times"]] == ([1, 1] if case.cold else [2, 2])
            assert 0 < row["least"] <= row["median"]
            assert row["load"] > 0
        assert len({rows[loader]["digest"] for loader in case.loaders}) == 1


def test_the_disk_is_timed_beside_cold_forwards(results: dict[str, Any]) -> None:
    assert "disk" not in rows_of(results, "warm-half")
    if not rows_of(results, "cold"):
        pytest.skip("files that are memory are never cold")
    disk = rows_of(results, "cold")["disk"]
    assert disk["status"] == "ok"
    assert disk["least"] == min(time for turn in disk["times"] for time in turn) > 0
    assert len(disk["times"]) == len(rows_of(results, "cold")["lowmem"]["times"])
    assert disk["variant"] in disk["variants"]
    assert "lowmem within 15 % of disk" in {goal["goal"] for goal in results["goals"]}


def test_what_must_not_grow_is_counted_twice(results: dict[str, Any]) -> None:
    row = rows_of(results, "steady-experts")["lowmem"]
    assert row["status"] == "ok", row
    assert row["forwards"] == [1, 10]
    for state in row["states"]:
        assert set(state) == {"anonymous", "handles", "threads", "mappings"}
        assert min(state.values()) > 0
    goals = [goal for goal in results["goals"] if goal["case"] == "steady-experts"]
    assert len(goals) == 4


def test_the_record_says_what_was_run_and_the_table_shows_all_of_it(results: dict[str, Any]) -> None:
    assert set(results["machine"]["versions"]) >= {"torch", "transformers", "accelerate"}
    assert results["options"]["rounds"] == 2
    text = as_markdown(results)
    for row in results["rows"]:
        assert f"| {TITLES[row['loader']]} |" in text
    goals = text.split("**goals**")[1]
    assert "| warm-half | lowmem ≥ 3x accelerate-dat |" in goals
    assert goals.count("\n|") == 2 + len(results["goals"])


def test_nothing_is_left_beside_the_checkpoints(results: dict[str, Any], folder: Path) -> None:
    assert results["rows"]
    assert {path.name for path in folder.iterdir()} == {"llama-125m", "few-experts"}


def load_something_else(order: Order) -> nn.Module:
    """A loader with one wrong number in one weight. Children import it from here."""
    model = LOADERS["loaded-copy"](order)
    with torch.no_grad():
        model.get_submodule("model.norm").weight[0] += 1
    return model


def fail_to_load(order: Order) -> nn.Module:
    raise ValueError(f"{order.source.name} cannot\nbe loaded")


def test_a_loader_whose_logits_differ_is_wrong_and_meets_no_goal(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(LOADERS, "lowmem", load_something_else)
    monkeypatch.setitem(LOADERS, "accelerate", fail_to_load)
    code, found = bench(folder, tmp_path, "--cases", "warm-all", "--loaders", "loaded,lowmem,accelerate")
    assert code == 1
    rows = rows_of(found, "warm-all")
    assert rows["loaded"]["status"] == "ok"
    assert rows["lowmem"]["status"] == "wrong"
    assert rows["lowmem"]["reason"] == "logits of the prompt are not those of loaded"
    assert rows["accelerate"]["status"] == "failed"
    assert rows["accelerate"]["reason"] == "ValueError: llama-125m cannot"
    (goal,) = found["goals"]
    assert (goal["goal"], goal["met"]) == ("lowmem runs", False)
    assert "| lowmem | wrong: logits of the prompt are not those of loaded |" in capsys.readouterr().out


def row(loader: str, *digests: str, status: str = "ok") -> dict[str, Any]:
    return {"loader": loader, "status": status, "reason": "", "digests": list(digests)}


def test_the_first_turn_that_differs_is_named() -> None:
    rows = check_digests(
        [
            row("gone", status="failed"),
            row("loaded", "a", "b", "c"),
            row("lowmem", "a", "b", "x"),
            row("other", "a", "b"),
        ]
    )
    assert [one["status"] for one in rows] == ["failed", "ok", "wrong", "wrong"]
    assert rows[2]["reason"] == "logits of turn 2 are not those of loaded"


def timed(case: str, **least: float) -> list[dict[str, Any]]:
    return [
        {
            "case": case,
            "loader": name.replace("_", "-"),
            "status": "ok",
            "reason": "",
            "least": seconds,
            "median": seconds,
        }
        for name, seconds in least.items()
    ]


@pytest.mark.parametrize(("lowmem", "met"), [(0.115, True), (0.17, False)])
def test_goals_are_ratios_to_the_peers_and_to_the_quickest_model_in_memory(lowmem: float, met: bool) -> None:
    rows = timed("warm-all", loaded=0.2, loaded_copy=0.1, lowmem=lowmem, accelerate=0.3, accelerate_dat=0.4)
    found = {outcome.goal: outcome for outcome in judge(rows)}
    assert found["lowmem ≥ 2x accelerate"].met is met
    assert found["lowmem ≥ 3x accelerate-dat"].met is met
    assert found["lowmem within 15 % of loaded"].met is met
    assert "loaded-copy" in found["lowmem within 15 % of loaded"].found


def test_growth_is_no_goal_met() -> None:
    states = [{"anonymous": 100 * MIB, "handles": 8, "threads": 2, "mappings": 500}]
    states.append({"anonymous": 101 * MIB, "handles": 9, "threads": 2, "mappings": 501})
    grown = {"case": "steady-dense", "loader": "lowmem", "status": "ok", "forwards": [20, 200], "states": states}
    found = {outcome.goal: outcome.met for outcome in judge([grown])}
    assert found == {
        "lowmem: memory does not grow": True,
        "lowmem: handles do not grow": False,
        "lowmem: threads do not grow": True,
        "lowmem: mappings do not grow": True,
    }


@pytest.mark.slow
@pytest.mark.cgroup
def test_a_generation_runs_under_a_kernel_limit_and_one_too_small_is_killed(folder: Path, tmp_path: Path) -> None:
    kind = cgroup_kind()
    if kind is None:
        pytest.skip("this process may make no memory cgroup")
    source = folder / "llama-125m"
    found = limited.generate(source, "lowmem", kind, GIB, 3, tmp_path, 300)
    assert found["status"] == "ok", found
    assert len(found["tokens"]) == len(found["times"][0]) == 3
    assert found["interpreter"] < found["anonymous"] < found["peak"] <= GIB
    assert found["ram"] < GIB - found["interpreter"]
    assert limited.generate(source, "lowmem", kind, 64 * MIB, 3, tmp_path, 300)["status"] == "killed"


def test_without_a_cgroup_the_limit_case_says_so(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited, "cgroup_kind", lambda: None)
    monkeypatch.setattr(limited, "generate", lambda *_: {"status": "ok", "reason": "", "tokens": [1]})
    found = list(limited.run_limited(folder / "llama-125m", GIB, 1, tmp_path, 60, lambda text: None))
    assert [one["status"] for one in found] == ["ok", "cannot", "cannot"]
    assert "cgroup" in found[1]["reason"]


def test_other_tokens_than_without_a_limit_are_wrong() -> None:
    free = {"loader": "no limit", "status": "ok", "tokens": [1, 2]}
    assert limited.check_tokens({"status": "ok", "tokens": [1, 2]}, free)["status"] == "ok"
    assert limited.check_tokens({"status": "ok", "tokens": [1, 3]}, free)["status"] == "wrong"
    assert limited.check_tokens({"status": "killed"}, free)["status"] == "killed"


@pytest.fixture
def mapped(tmp_path: Path) -> Iterator[tuple[Path, mmap.mmap]]:
    """A file on the disk, privately mapped, with all its pages in use."""
    file = tmp_path / "weights"
    file.write_bytes(bytes(range(256)) * 1024)
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY) as pages:
        assert sum(pages[::4096]) == 0
        yield file, pages


def test_pages_that_are_mapped_are_given_back_and_come_again(mapped: tuple[Path, mmap.mmap]) -> None:
    file, pages = mapped
    if not drop([file]):
        pytest.skip("this file system drops mapped pages, or keeps none")
    assert give_back_mapped([file]) == 0
    assert drop([file]) == 0
    assert pages[:] == file.read_bytes()
    assert cached_pages(file) > 0


def test_a_mapping_that_was_written_to_stays_as_it_is(mapped: tuple[Path, mmap.mmap]) -> None:
    file, pages = mapped
    pages[5000] = 7
    assert give_back_mapped([file]) == len(pages)
    assert pages[5000] == 7


def test_a_runner_repeats_itself_and_does_not_mix_its_logits(folder: Path, tmp_path: Path) -> None:
    order = Order(folder / "llama-125m", "float32", "everything", tmp_path)
    first, second = Runner(LOADERS["loaded"](order)), Runner(LOADERS["lowmem"](order))
    assert first.prompt(None)["digest"] == second.prompt(None)["digest"]
    once, twice = first.steps(2), [second.steps(1), second.steps(1)]
    assert len(once["seconds"]) == 2
    assert once["digest"] == twice[1]["digest"] != twice[0]["digest"]
    assert len(first.forwards(2)["digests"]) == 1


def test_cases_are_found_by_name_group_and_loader() -> None:
    assert [case.name for case in find_cases(["warm"])] == ["warm-all", "warm-half"]
    assert find_cases([]) == CASES
    assert all(set(case.loaders) <= set(LOADERS) for case in CASES)
    assert all(case.loaders[0] == REFERENCE for case in CASES if case.kind == "steps")
    (case,) = find_cases(["limit"], ["lowmem"], quick=True)
    assert case.checkpoint == "llama-125m"
    with pytest.raises(KeyError, match="cod"):
        find_cases(["cod"])
    with pytest.raises(KeyError, match="lowmen"):
        find_cases([], ["lowmen"])


def test_half_a_map_keeps_the_head_and_the_first_layers(folder: Path) -> None:
    placed = device_map(folder / "llama-125m", "half")
    layers = [device for module, device in placed.items() if module.startswith("model.layers.")]
    assert layers == ["cpu"] * (len(layers) // 2) + ["disk"] * (len(layers) - len(layers) // 2)
    assert {placed[module] for module in ("lm_head", "model.embed_tokens")} == {"cpu"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--cases", "lukewarm"], "no case or loader is called 'lukewarm'"),
        (["--limit", "much"], "--limit: expected a size"),
        (["--rounds", "0"], "expected a number of at least 1"),
    ],
)
def test_what_cannot_be_run_is_refused(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert text in capsys.readouterr().err
