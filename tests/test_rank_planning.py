"""Ranks planned on paper hold what torch and transformers give them, and read what `lowmem.plan` says there."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import KINDS, new_model

import lowmem
from lowmem.cli import main
from lowmem.errors import OptionError
from lowmem.sizes import MIB, format_size
from lowmem.synthetic import llama_recipe, write_checkpoint

pytest.importorskip("transformers.distributed")
pytest.importorskip("torch.testing._internal.distributed.fake_pg")

Saved = Callable[..., Path]

# 97 words are a multiple of nothing, and no dimension of the other tensors is one of 3.
CASES: list[tuple[str, dict[str, int]]] = [
    ("llama", {"fsdp": 3}),
    ("llama", {"tp": 3}),
    ("llama", {"fsdp": 2, "tp": 2}),
    ("llama", {"replicate": 2, "tp": 2}),
    ("llama-tied", {"fsdp": 2}),
    ("qwen3-moe", {"tp": 2}),
    ("qwen3-moe", {"replicate": 2, "fsdp": 2}),
    ("qwen3-moe", {"ep": 2}),
    ("qwen3-moe", {"fsdp": 1, "ep": 2}),
    ("qwen3-moe", {"fsdp": 2, "ep": 2}),
    ("qwen3-moe", {"replicate": 2, "fsdp": 1, "ep": 2}),
]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of models with a vocabulary that nothing divides."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        for kind in sorted({kind for kind, _ in CASES}):
            cls, config, changes = KINDS[kind]
            patch.setitem(KINDS, kind, (cls, config, changes | {"vocab_size": 97}))
            folders[kind] = tmp_path_factory.mktemp(kind)
            new_model(kind).save_pretrained(folders[kind])
    return folders


@pytest.fixture(scope="module")
def torchs(odd: dict[str, Path]) -> list[list[dict[str, Any]]]:
    """What torch says of each rank of each case."""
    asked = json.dumps([(str(odd[kind]), mesh) for kind, mesh in CASES])
    program = Path(__file__).with_name("torch_ranks.py")
    done = subprocess.run([sys.executable, program, asked], capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    found: list[list[dict[str, Any]]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: f"{CASES[n][0]}-{CASES[n][1]}")
def test_each_rank_holds_what_torch_gives_it(
    number: int, odd: dict[str, Path], torchs: list[list[dict[str, Any]]]
) -> None:
    kind, mesh = CASES[number]
    plan = lowmem.plan_ranks(odd[kind], mesh=mesh)
    assert len(plan.ranks) == len(torchs[number]) == math.prod(mesh.values())
    for ours, theirs in zip(plan.ranks, torchs[number], strict=True):
        # These models have no buffers in their state dicts.
        assert ours.weights == sum(one["nbytes"] for one in theirs["held"].values())
        said = {name: value for name, value in theirs.items() if name != "held"}
        assert {name: getattr(ours, name) for name in said} == said
    assert plan.weights == sum(d.weights for d in lowmem.plan(odd[kind]).devices.values())


def test_ranks_of_a_host_share_what_they_map(saved: Saved) -> None:
    folder = saved("llama")
    plan = lowmem.plan_ranks(folder, mesh="replicate=2,dp=2", ranks_per_host=2)
    assert [host.ranks for host in plan.hosts] == [(0, 1), (2, 3)]
    assert [host.mapped for host in plan.hosts] == [plan.weights] * 2
    assert plan.amplification == 2
    assert [h.mapped for h in lowmem.plan_ranks(folder, mesh="replicate=2,dp=2").hosts] == [plan.weights]
    assert [rank.at for rank in plan.ranks][2] == {"replicate": 1, "fsdp": 0}


def test_ranks_that_copy_read_each_their_own(saved: Saved) -> None:
    plan = lowmem.plan_ranks(saved("llama"), mesh={"dp": 4}, residency="copy")
    assert sum(host.reads for host in plan.hosts) == plan.weights == sum(rank.resident for rank in plan.ranks) - 4 * 32
    assert plan.amplification == 1


def test_tied_tensors_count_once_in_the_whole_model(saved: Saved) -> None:
    whole = sum(device.weights for device in lowmem.plan(saved("llama-tied")).devices.values())
    for mesh in ("dp=2", "tp=2", "dp=2,tp=2"):
        assert lowmem.plan_ranks(saved("llama-tied"), mesh=mesh).weights == whole


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("llama", {"mesh": "xp=2"}, ["'xp' is not one", "dp (or fsdp), tp, ep and replicate", "dp=2,tp=4"]),
        ("llama", {"mesh": "dp=2,fsdp=2"}, ["'fsdp' is there twice"]),
        ("llama", {"mesh": "dp=many"}, ["'dp'", "expected a number of ranks", "'many'"]),
        ("llama", {"mesh": 8}, ["expected dimensions such as 'dp=2,tp=4'", "8"]),
        ("llama", {"mesh": "dp=2", "ranks": 3}, ["ranks: expected as many as the mesh has, 2, found 3"]),
        ("llama", {"mesh": "dp=2", "ranks_per_host": 0}, ["ranks_per_host", "found 0"]),
        ("llama", {"mesh": "dp=2", "device_map": "auto"}, ["expected one device", "'auto'", "the mesh says who holds"]),
        ("llama", {"mesh": "ep=2"}, ["LlamaForCausalLM has no ep plan", "leave ep out"]),
        ("qwen3-moe", {"mesh": "ep=2,tp=2"}, ["tp and ep together", "give one of them"]),
        ("qwen3-moe", {"mesh": "ep=3"}, ["cannot be divided by its ep plan", "4 experts"]),
    ],
)
def test_what_means_nothing_is_refused(kind: str, options: dict[str, Any], words: list[str], saved: Saved) -> None:
    with pytest.raises(lowmem.LowmemError) as caught:
        lowmem.plan_ranks(saved(kind), **options)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_plain_module_has_no_plan_of_its_own(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file(torch.nn.Linear(4, 6).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(OptionError, match=r"Linear has no tp plan of its own .* leave tp out"):
        lowmem.plan_ranks(tmp_path, mesh="tp=2", model=lambda: torch.nn.Linear(4, 6))
    plan = lowmem.plan_ranks(tmp_path, mesh="dp=4", model=lambda: torch.nn.Linear(4, 6))
    # Of 6 rows, as torch.chunk gives them.
    assert [rank.weights for rank in plan.ranks] == [40, 40, 40, 0]


def test_a_model_of_the_caller_is_not_divided_by_its_plan(saved: Saved) -> None:
    model = new_model("llama").to("meta")
    with pytest.raises(OptionError, match=r"would change the model that was given; give what makes it"):
        lowmem.plan_ranks(saved("llama"), mesh="tp=2", model=model)


def shell(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(a) for a in argv])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_the_shell_prints_what_to_dict_returns(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved("llama")
    flags = ("--mesh", "dp=2,tp=2", "--ranks", 4, "--ranks-per-host", 2, "--dtype", "bfloat16", "--ram", "1GiB")
    code, out, err = shell(capsys, "plan", folder, *flags, "--json")
    assert (code, err) == (0, "")
    plan = lowmem.plan_ranks(folder, mesh="dp=2,tp=2", ranks_per_host=2, dtype="bfloat16", ram="1GiB")
    assert json.loads(out) == json.loads(json.dumps(plan.to_dict()))


def cells(text: str) -> list[list[str]]:
    """The rows of tables, without what depends on the machine: staging, and the peaks that it is in."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.strip(" ─")]
    return [[cell for cell in row if cell][: 7 if len(row) > 6 else 4 if len(row) > 4 else 3] for row in rows]


def test_the_readme_shows_what_the_shell_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    command, _, shown = readme.partition("$ lowmem plan path/to/model --ranks")[2].partition("\n")
    write_checkpoint(llama_recipe(8 * MIB), tmp_path / "path/to/model", max_shard_size=3 * MIB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "110")
    code, printed, _ = shell(capsys, "plan", "path/to/model", "--ranks", *command.split())
    assert code == 0
    assert cells(printed) == cells(shown.partition("```")[0])


def test_ranks_alone_divide_as_data(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    shown = json.loads(shell(capsys, "plan", saved("llama"), "--ranks", 4, "--json")[1])
    assert shown["mesh"] == {"fsdp": 4}
    assert [rank["at"] for rank in shown["ranks"]] == [{"fsdp": n} for n in range(4)]


def test_the_shell_shows_ranks_hosts_and_all_together(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved("llama")
    plan = lowmem.plan_ranks(folder, mesh="dp=2,tp=2", ranks_per_host=2)
    code, out, err = shell(capsys, "plan", folder, "--mesh", "dp=2,tp=2", "--ranks-per-host", 2)
    assert (code, err) == (0, "")
    rows = [line.split("  ") for line in out.splitlines() if line.strip()]
    rows = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert rows[0] == [f"{folder}: 4 ranks, fsdp 2 x tp 2"]
    for rank in plan.ranks:
        sizes = (rank.weights, rank.mapped, rank.resident, rank.reads, rank.staging, rank.peak)
        at = f"fsdp={rank.at['fsdp']} tp={rank.at['tp']}"
        assert [str(rank.rank), at, str(rank.host), *map(format_size, sizes)] in rows
    for host, ranks in zip(plan.hosts, ("0-1", "2-3"), strict=True):
        assert [str(host.host), ranks, *map(format_size, (host.mapped, host.reads, host.peak))] in rows
    assert ["the whole model", format_size(plan.weights), "1.00x"] in rows
    assert rows[-1][0] == "to read and to map"
    assert rows[-1][-1] == f"{plan.amplification:.2f}x"


def test_many_equal_ranks_are_one_row(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    out = shell(capsys, "plan", saved("llama"), "--ranks", 40, "--ranks-per-host", 2)[1]
    rows = [line.split()[:3] for line in out.splitlines() if "fsdp=" in line]
    # 32 rows of the smallest matrices are on the first ranks only.
    assert rows[-1] == ["32-39", "fsdp=32-39", "16-19"]
    assert len(rows) < 8


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--ranks-per-host", 2), "expected --ranks or --mesh with it"),
        (("--ranks", 0), "--ranks: expected a number of ranks, found 0"),
        (("--ranks", 3, "--mesh", "dp=2"), "ranks: expected as many as the mesh has, 2, found 3"),
        (("--mesh", "dp=2", "--max-memory", "cpu=1GiB"), "--max-memory: is for device maps that are inferred"),
        (("--mesh", "dp=2", "--no-split", "Block"), "--no-split: is for device maps that are inferred"),
        (("--mesh", "dp=2", "--device-map", "auto"), "expected one device for all ranks"),
        (("--mesh", "dp"), "'dp': expected a number of ranks"),
    ],
)
def test_wrong_usage_exits_with_2(
    flags: tuple[object, ...], words: str, saved: Saved, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = shell(capsys, "plan", saved("llama"), *flags)
    assert (code, out) == (2, "")
    assert words in err


def test_a_budget_that_one_rank_exceeds_exits_with_1(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = shell(capsys, "plan", saved("llama"), "--ranks", 2, "--residency", "copy", "--ram", 1)
    assert (code, out) == (1, "")
    assert "ram" in err
