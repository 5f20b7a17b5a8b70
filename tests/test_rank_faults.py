"""Loads by several ranks of which one fails or dies: all end with its reason, and nothing is left of the load."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from rank_processes import Died, run_ranks
from safetensors import safe_open
from torch import nn

import lowmem
from lowmem import divided, loader
from lowmem.engine import reading, sharing
from lowmem.modeling.hf_rules import TransformersRules
from lowmem.ranks import Together, links
from lowmem.ranks.carrier import Carrier

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"),
]

PRELOAD = (
    "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama",
    "safetensors.torch",
    "accelerate.utils",
    "lowmem.loader",
)
NO_WORD = "ended without a word (killed, or its machine is gone)"
KILLED = Died(-signal.SIGKILL)


@pytest.fixture(scope="module", autouse=True)
def _one_server() -> Iterator[None]:
    yield
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


# What a rank does in a load.


def new_divided(folder: Path, mesh: Any, **changes: Any) -> nn.Module:
    """The model of a folder on the meta device, each layer divided among the ranks of a mesh."""
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoConfig, LlamaForCausalLM

    config = AutoConfig.from_pretrained(folder, **changes)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.author = ["of the model"]
    return model


class Plain(nn.Module):
    """The same on every rank: tensors of several chunks, and small ones."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.ModuleList(nn.Linear(700, 700) for _ in range(6))
        self.small = nn.ModuleList(nn.Linear(5, 3) for _ in range(6))
        self.author = ["of the model"]


def new_plain() -> nn.Module:
    with torch.device("meta"):
        return Plain()


def state_of(model: nn.Module) -> list[Any]:
    """Every object that a load could exchange, add or take away; kept alive by what is given."""
    found: list[Any] = []
    for name, module in model.named_modules():
        found.append((name, module, type(module), module.training))
        for key, value in vars(module).items():
            found.append((name, key, value))
            if isinstance(value, dict):
                found.extend((name, key, inner, each) for inner, each in value.items())
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                held = getattr(tensor, "_local_tensor", tensor)
                found.append((name, key, tensor, held.device.type, tensor.requires_grad, *sorted(vars(tensor))))
    return found


def changes_of(before: list[Any], model: nn.Module) -> list[str]:
    now = state_of(model)
    if len(now) != len(before):
        return [f"{len(before)} facts before, {len(now)} now"]
    same = [
        all(x is y or _is_equal_text(x, y) for x, y in zip(a, b, strict=True)) for a, b in zip(before, now, strict=True)
    ]
    return [str(a[:3]) for a, well in zip(now, same, strict=True) if not well]


def _is_equal_text(x: Any, y: Any) -> bool:
    return isinstance(x, str) and x == y


def left_of(folders: list[Path]) -> list[str]:
    """Threads, open files and mapped ones that a load has left."""
    gc.collect()
    names = [str(folder) for folder in folders]
    found = [thread.name for thread in threading.enumerate() if thread.name.startswith("lowmem")]
    if sys.platform == "linux":
        for fd in Path("/proc/self/fd").iterdir():
            try:
                target = str(fd.readlink())
            except OSError:
                continue
            found += [target for name in names if target.startswith(name)]
        maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        found += [line.split()[-1] for line in maps if any(name in line for name in names)]
    return found


def attempt(model: nn.Module, source: Path, *, read: str = "auto", **options: Any) -> dict[str, Any]:
    """A load into `model`: its error, and what it left. Expected to fail; the model should be what it was."""
    before = state_of(model)
    told: dict[str, Any] = {"error": None, "rank": None}
    try:
        load(model, source, read=read, **options)
    except BaseException as error:
        told["error"] = f"{type(error).__name__}: {error}"
        told["rank"] = getattr(error, "rank", None)
    told["changed"] = changes_of(before, model)
    told["left"] = left_of([source])
    return told


def load(model: nn.Module, source: Path, *, read: str = "auto", **options: Any) -> Any:
    return lowmem.load(source, **{"model": model, "residency": "copy", "read": read, **options})


def wrong_of(model: nn.Module, source: Path, index: int, count: int) -> list[str]:
    """Names of the tensors that are not what the files say."""
    wrong = []
    named = dict(model.state_dict())
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                expected, found = opened.get_tensor(name), named.pop(name)
                if hasattr(found, "_local_tensor"):
                    parts = torch.chunk(expected, count)
                    expected = parts[index] if index < len(parts) else expected[:0]
                    found = found._local_tensor
                if not torch.equal(found, expected):
                    wrong.append(name)
    return [*wrong, *named]


# Faults, each on one rank.


def fail_in(owner: Any, name: str, error: Callable[[], BaseException], *, after: bool = False) -> Any:
    """A function of lowmem fails, before or after it has done what it does."""
    original = getattr(owner, name)

    def failing(*args: Any, **options: Any) -> Any:
        if after:
            original(*args, **options)
        raise error()

    return mock.patch.object(owner, name, failing)


def die(*_: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def die_late(*_: Any) -> Any:
    """When the others wait for this one, as far as that can be."""
    time.sleep(0.5)
    die()


@contextmanager
def change_after_plan(change: Callable[[], None]) -> Iterator[None]:
    original = loader.check_present

    def changing(*args: Any) -> None:
        original(*args)
        change()

    with mock.patch.object(loader, "check_present", changing):
        yield


@contextmanager
def slow_reads() -> Iterator[None]:
    original = reading.ShardReader.fill

    def fill(*args: Any) -> None:
        time.sleep(0.2)
        original(*args)

    with mock.patch.object(reading.ShardReader, "fill", fill):
        yield


@contextmanager
def reads_that_wait() -> Iterator[None]:
    """Reads that begin when it is known here that another has failed, so that this rank cannot be done before."""
    original, hear, known = reading.ShardReader.fill, Together._fail, threading.Event()

    def fill(*args: Any) -> None:
        assert known.wait(60)
        original(*args)

    def fail(*args: Any) -> None:
        hear(*args)
        known.set()

    with mock.patch.object(reading.ShardReader, "fill", fill), mock.patch.object(Together, "_fail", fail):
        yield


def raising(error: BaseException) -> Callable[..., None]:
    def progress(_: Any) -> None:
        raise error

    return progress


def last_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[-1]


def shorten(file: Path) -> None:
    # As a download begins anew: another file, so that nobody who has mapped the old one is hurt.
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[:-16])


def rewrite(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(-4, os.SEEK_END)
        opened.write(b"\0\0\0\0")


def refuse_reads(file: Path) -> Any:
    original = os.preadv

    def preadv(fd: int, *args: Any) -> int:
        if Path(f"/proc/self/fd/{fd}").readlink() == file:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(fd, *args)

    return mock.patch.object(os, "preadv", preadv)


def little_memory(nbytes: int) -> Any:
    found = divided.host_memory()
    return mock.patch.object(divided, "host_memory", return_value=replace(found, limits={"this machine": nbytes}))


# Name → what the culprit does: prepares its folder and patches, and gives its options.
Fault = Callable[[Path, ExitStack], dict[str, Any]]


def patched(make: Callable[[Path], Any]) -> Fault:
    def fault(folder: Path, stack: ExitStack) -> dict[str, Any]:
        stack.enter_context(make(folder))
        return {}

    return fault


def prepared(change: Callable[[Path], Any]) -> Fault:
    def fault(folder: Path, stack: ExitStack) -> dict[str, Any]:
        change(folder)
        return {}

    return fault


def optioned(**options: Any) -> Fault:
    return lambda folder, stack: options


def interrupt() -> BaseException:
    return KeyboardInterrupt("of the user")


FAULTS: dict[str, tuple[Fault, str]] = {
    "missing": (prepared(lambda at: last_shard(at).unlink()), "Error: "),
    "truncated": (prepared(lambda at: shorten(last_shard(at))), "CheckpointError: "),
    "shrinks": (patched(lambda at: change_after_plan(lambda: shorten(last_shard(at)))), "CheckpointError: "),
    "rewritten": (patched(lambda at: change_after_plan(lambda: rewrite(last_shard(at)))), "CheckpointError: "),
    "vanishes": (patched(lambda at: change_after_plan(lambda: last_shard(at).unlink())), "CheckpointError: "),
    "unreadable": (patched(lambda at: refuse_reads(last_shard(at))), "CheckpointError: "),
    "ram": (optioned(ram="1KiB"), "BudgetError: "),
    "bad option": (optioned(residency="nonsense"), "OptionError: residency"),
    "bad model": (optioned(config={}), "Error: "),
    "no source": (lambda at, stack: (shutil.rmtree(at), {})[1], "SourceError: "),
    "progress": (optioned(progress=raising(ValueError("of a callback"))), "ValueError: of a callback"),
    "interrupt": (optioned(progress=raising(KeyboardInterrupt("of a callback"))), "KeyboardInterrupt: of a callback"),
    "finish": (
        patched(lambda at: fail_in(TransformersRules, "finish", lambda: RuntimeError("of a hook"))),
        "RuntimeError: of a hook",
    ),
    "at last": (
        patched(lambda at: fail_in(loader, "mark", lambda: MemoryError("at last"), after=True)),
        "MemoryError: at last",
    ),
    "interrupt when done": (
        patched(lambda at: fail_in(loader, "mark", interrupt, after=True)),
        "KeyboardInterrupt: of the user",
    ),
    "exit": (optioned(progress=raising(SystemExit("of a callback"))), "SystemExit: of a callback"),
}


def play(name: str, rank: int, culprit: int, model: nn.Module, source: Path, **options: Any) -> dict[str, Any]:
    """A load in which `culprit` fails, in a copy of the source that is its own; the others are slow."""
    fault, _ = FAULTS[name]
    mine = source.parent / f"{name} of {rank}"
    with ExitStack() as stack:
        if rank == culprit:
            # Not of one that has mapped it already.
            shutil.copytree(source, mine)
            return attempt(model, mine, **{**options, **fault(mine, stack)})
        stack.enter_context(slow_reads())
        return attempt(model, source, **options)


def expect(seen: list[dict[str, Any]], name: str, culprit: int) -> None:
    """All ended with the culprit's error, and nothing is left."""
    own = seen[culprit]["error"]
    assert own is not None, (name, seen)
    assert FAULTS[name][1] in own, (name, seen)
    for rank, told in enumerate(seen):
        assert told["left"] == [], (name, rank, told)
        assert told["changed"] == [], (name, rank, told)
        if rank != culprit:
            assert told["rank"] == culprit, (name, rank, told)
            assert told["error"] == f"RankError: rank {culprit}: {own}".removesuffix(": "), (name, rank, told)


# Two ranks, of which none dies: everything in one pair of processes.


def play_two(rank: int, saved: str, other: str) -> dict[str, Any]:
    links.COMING = timedelta(seconds=20)
    source, told = Path(saved), {}
    mesh = dist.init_device_mesh("cpu", (2,))
    model = new_divided(source, mesh)
    for name in FAULTS:
        culprit = 0 if name in ("interrupt", "ram") else 1
        told[name] = play(name, rank, culprit, model, source)
    first = rank == 0
    told["dtype"] = attempt(model, source, dtype="float32" if first else "bfloat16")
    told["read"] = attempt(model, source, read="once" if first else "each")
    told["other model"] = attempt(
        model if first else new_divided(Path(other), mesh), source if first else Path(other), dtype="float32"
    )
    told["other checkpoint"] = attempt(model, source if first else Path(other))
    need = lowmem.plan(source, model=model, residency="copy").host.peak
    with little_memory(need * 3 // 2):
        told["host"] = attempt(model, source)
    told["alone"] = alone(rank, model, source)
    told["twice"] = load_twice(rank, mesh, source)
    load(model, source)
    told["wrong"] = wrong_of(model, source, rank, 2)
    ids = torch.arange(6)[None]
    told["same"] = [float(v) for v in model(ids).logits[0, -1, :4]]
    del model
    told["left"] = left_of([source])
    return told


def alone(rank: int, model: nn.Module, source: Path) -> Any:
    """What one rank does without the others waits for none of them."""
    if rank == 1:
        return None
    plan = lowmem.plan(source, model=model, residency="copy")
    result = lowmem.load(source, residency="copy")
    return [plan.bytes_read > 0, wrong_of(result.model, source, 0, 1)]


def load_twice(rank: int, mesh: Any, source: Path) -> Any:
    """One rank loads once more than the other."""
    one, two, three = (new_divided(source, mesh) for _ in range(3))
    load(one, source)
    told = [wrong_of(one, source, rank, 2)]
    if rank == 1:
        with mock.patch.object(links, "COMING", timedelta(seconds=0.5)):
            told.append(attempt(two, source))
    dist.barrier()
    # The other one is told of it by its next load, and then they are in step.
    if rank == 0:
        told.append(attempt(two, source))
    load(three, source)
    return [*told, wrong_of(three, source, rank, 2)]


@pytest.fixture(scope="module")
def two(saved: Callable[..., Path]) -> list[Any]:
    pytest.importorskip("transformers")
    seen = run_ranks(2, play_two, str(saved("llama")), str(saved("llama-tied")), preload=PRELOAD, timeout=150)
    assert all(isinstance(each, dict) for each in seen), [str(each) + getattr(each, "trace", "") for each in seen]
    return seen


@pytest.mark.parametrize("name", FAULTS)
def test_an_error_of_one_of_two_ends_both(two: list[Any], name: str) -> None:
    expect([each[name] for each in two], name, 0 if name in ("interrupt", "ram") else 1)


def test_both_of_two_that_load_otherwise_say_so(two: list[Any]) -> None:
    for name in ("dtype", "read", "other model"):
        for rank, each in enumerate(two):
            assert "do not load the same" in each[name]["error"], (name, each[name])
            assert (each[name]["changed"], each[name]["left"]) == ([], []), (rank, name, each[name])


def test_other_checkpoints_and_too_little_memory_end_both(two: list[Any]) -> None:
    error = two[1]["other checkpoint"]["error"]
    assert "the checkpoint does not fit the model" in error
    assert two[0]["other checkpoint"]["error"] == f"RankError: rank 1: {error}"
    for each in two:
        assert "BudgetError: the ranks of this host (0, 1) need" in each["host"]["error"]
        for name in ("other checkpoint", "host"):
            assert (each[name]["changed"], each[name]["left"]) == ([], [])


def test_who_plans_or_loads_alone_waits_for_nobody(two: list[Any]) -> None:
    assert [each["alone"] for each in two] == [[True, []], None]


def test_one_load_more_on_one_rank_ends_in_time_and_the_next_but_one_is_well(two: list[Any]) -> None:
    for each in two:
        first, late, well = each["twice"]
        assert (first, well) == ([], [])
        assert late["error"] == "RankError: rank 0 has not come to the load within 0:00:00.500000"
        assert (late["changed"], late["left"]) == ([], [])


def test_after_all_these_failures_the_same_model_loads(two: list[Any]) -> None:
    assert [(each["wrong"], each["left"]) for each in two] == [([], []), ([], [])]
    assert two[0]["same"] == two[1]["same"]


# Four ranks: faults of one, what all hold alike read once, and the death of one rank after the other.

FOUR = ("missing", "progress", "interrupt", "finish", "bad option")
ONCE = ("missing", "unreadable", "progress", "at last", "interrupt when done")


def play_four(rank: int, saved: str, plain: str) -> dict[str, Any]:
    links.COMING = timedelta(seconds=20)
    links.CONNECTING = timedelta(seconds=5)
    source, same, told = Path(saved), Path(plain), {}
    model = new_divided(source, dist.init_device_mesh("cpu", (4,)))
    for name in FOUR:
        told[name] = play(name, rank, 2, model, source)
    load(model, source)
    told["wrong"] = wrong_of(model, source, rank, 4)
    model = new_plain()
    for name in ONCE:
        told[f"once {name}"] = play(name, rank, 1, model, same, read="once")
    told["taking"] = fail_as_it_takes(rank, model, same)
    told["offload"] = fail_with_files(rank, model, same)
    result = load(model, same, read="once")
    told["once"] = [
        wrong_of(model, same, 0, 1),
        sum_of(result.plan.bytes_read),
        sum(p.nbytes for p in model.parameters()),
    ]
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts"))
    model = new_divided(source, mesh)
    result = load(model, source, read="once")
    told["copies"] = [
        wrong_of(model, source, rank % 2, 2),
        sum_of(result.plan.bytes_read),
        sum(p.nbytes for p in model.parameters()),
    ]
    told["killed"] = be_killed_sharing(rank, same)
    return told


def fail_as_it_takes(rank: int, model: nn.Module, source: Path) -> Any:
    """The system refuses one rank the memory for a tensor that another has read."""
    with ExitStack() as stack:
        if rank == 2:
            stack.enter_context(fail_in(sharing, "allocate", lambda: MemoryError("of one")))
        return attempt(model, source, read="once")


def fail_with_files(rank: int, model: nn.Module, source: Path) -> Any:
    """One rank fails while the others write what they hold on disk."""
    folder = source.parent / f"offload {rank}"
    folder.mkdir()
    options: dict[str, Any] = {"device_map": {"large": "disk", "small": "cpu"}, "offload_folder": folder}
    with ExitStack() as stack:
        if rank == 3:
            options["progress"] = raising(ValueError("of a callback"))
        else:
            stack.enter_context(reads_that_wait())
        told = attempt(model, source, read="once", dtype="bfloat16", **options)
    return {**told, "files": [str(file) for file in folder.rglob("*")]}


def sum_of(number: int) -> int:
    total = torch.tensor(number)
    dist.all_reduce(total)
    return int(total)


def be_killed_sharing(rank: int, source: Path) -> dict[str, Any]:
    """Rank after rank dies; the others go on."""
    told: dict[str, Any] = {}
    moments = ((3, "receiving"), (0, "reading"), (2, "done"))
    living = {0, 1, 2, 3}
    for victim, moment in moments:
        with mock.patch.object(loader, "ranks_of", return_value=tuple(sorted(living))), ExitStack() as stack:
            if rank == victim:
                stack.enter_context(dying(moment))
            model = new_plain()
            told[moment] = attempt(model, source, read="once")
            told[f"wrong when {moment}"] = wrong_of(model, source, 0, 1) if told[moment]["error"] is None else None
        living.remove(victim)
        with mock.patch.object(loader, "ranks_of", return_value=tuple(sorted(living))):
            load(new_plain(), source, read="once")
    return told


def dying(moment: str) -> Any:
    """This rank is killed: as it takes or gives a tensor, or when all have all and the load has not quite ended."""
    if moment == "done":
        return mock.patch.object(loader, "LoadReport", die)
    original = Carrier.put

    def put(self: Carrier, data: torch.Tensor, reader: int, *rest: Any) -> None:
        if (reader == self.rank) is (moment == "reading"):
            self.finish()
            die_late()
        original(self, data, reader, *rest)

    return mock.patch.object(Carrier, "put", put)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.torch import save_file

    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("plain") / "plain"
    folder.mkdir()
    save_file({name: tensor.clone() for name, tensor in Plain().state_dict().items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def four(saved: Callable[..., Path], plain: Path) -> list[Any]:
    pytest.importorskip("transformers")
    seen = run_ranks(4, play_four, str(saved("llama")), str(plain), preload=PRELOAD, timeout=150)
    assert [seen[0], seen[2], seen[3]] == [KILLED] * 3, seen
    assert isinstance(seen[1], dict), [str(each) + getattr(each, "trace", "") for each in seen]
    return seen


@pytest.mark.parametrize("name", FOUR)
def test_an_error_of_one_of_four_ends_all(four: list[Any], name: str) -> None:
    told = four[1][name]
    assert (told["rank"], told["changed"], told["left"]) == (2, [], [])
    assert told["error"].startswith("RankError: rank 2: ")
    assert FAULTS[name][1].removesuffix(": of the user") in told["error"]


def test_an_error_of_one_ends_those_that_read_once(four: list[Any]) -> None:
    told = four[1]
    for name in ONCE:
        assert FAULTS[name][1] in told[f"once {name}"]["error"]
        assert (told[f"once {name}"]["changed"], told[f"once {name}"]["left"]) == ([], [])
    assert told["taking"] == {"error": "RankError: rank 2: MemoryError: of one", "rank": 2, "changed": [], "left": []}
    error = "RankError: rank 3: ValueError: of a callback"
    assert told["offload"] == {"error": error, "rank": 3, "changed": [], "left": [], "files": []}


def test_after_these_failures_what_all_hold_is_read_once_and_right(four: list[Any]) -> None:
    assert four[1]["wrong"] == []
    for name in ("once", "copies"):
        wrong, read, nbytes = four[1][name]
        assert (wrong, read) == ([], nbytes), name


@pytest.mark.parametrize(("moment", "victim"), [("receiving", 3), ("reading", 0)])
def test_a_rank_killed_while_tensors_are_shared_ends_the_others(four: list[Any], moment: str, victim: int) -> None:
    error = f"RankError: rank {victim} {NO_WORD}"
    assert four[1]["killed"][moment] == {"error": error, "rank": victim, "changed": [], "left": []}


def test_a_rank_killed_when_all_are_done_ends_nothing(four: list[Any]) -> None:
    assert four[1]["killed"]["done"]["error"] is None
    assert four[1]["killed"]["wrong when done"] == []


# Four ranks of a divided model, of which three die; the last to die is the first rank, which holds the store.


def play_dying(rank: int, saved: str) -> dict[str, Any]:
    links.COMING = timedelta(seconds=20)
    links.CONNECTING = timedelta(seconds=5)
    source, told = Path(saved), {}
    # Everyone makes all of them, while everyone is there.
    moments = (("planning", 3, range(4)), ("reading", 2, range(3)), ("waiting", 0, range(2)))
    meshes = [dist.DeviceMesh("cpu", torch.tensor([*members])) for _, _, members in moments]
    models = [[new_divided(source, mesh) for _ in range(2)] if rank in mesh.mesh else [] for mesh in meshes]
    for (moment, victim, members), (model, other) in zip(moments, models, strict=False):
        with ExitStack() as stack:
            if rank == victim:
                stack.enter_context(dying_alone(moment))
            elif moment == "waiting":
                # When the victim is done with its own part this one reads.
                stack.enter_context(reads_that_wait())
            told[moment] = attempt(model, source)
        if moment != "waiting":
            left = len(members) - 1
            del other
            after = models[moments.index((moment, victim, members)) + 1]
            if rank < left:
                load(after[1], source)
                told[f"wrong after {moment}"] = wrong_of(after[1], source, rank, left)
    told["alone"] = wrong_of(lowmem.load(source, residency="copy").model, source, 0, 1)
    return told


def dying_alone(moment: str) -> Any:
    if moment == "planning":
        return mock.patch.object(divided, "mapped_share", die_late)
    if moment == "reading":
        return mock.patch.object(reading.ShardReader, "fill", die_late)
    return mock.patch.object(divided.Company, "settle", die_late)


@pytest.fixture(scope="module")
def died(saved: Callable[..., Path]) -> list[Any]:
    pytest.importorskip("transformers")
    seen = run_ranks(4, play_dying, str(saved("llama")), preload=PRELOAD, store_at=0, timeout=120)
    assert [seen[0], seen[2], seen[3]] == [KILLED] * 3, seen
    assert isinstance(seen[1], dict), str(seen[1]) + getattr(seen[1], "trace", "")
    return seen


@pytest.mark.parametrize(("moment", "victim"), [("planning", 3), ("reading", 2), ("waiting", 0)])
def test_a_killed_rank_ends_the_others(died: list[Any], moment: str, victim: int) -> None:
    error = f"RankError: rank {victim} {NO_WORD}"
    assert died[1][moment] == {"error": error, "rank": victim, "changed": [], "left": []}


def test_those_that_are_left_can_load_again(died: list[Any]) -> None:
    assert [died[1][name] for name in ("wrong after planning", "wrong after reading", "alone")] == [[], [], []]


SCRIPT = """
import sys, traceback
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import lowmem

dist.init_process_group("gloo")
rank = dist.get_rank()
for source in sys.argv[1:]:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    fully_shard(model)
    try:
        result = lowmem.load(source.replace("RANK", str(rank)), model=model, residency="copy")
    except lowmem.LowmemError:
        traceback.print_exc()
        # torchrun ends all when the first has ended, with or without a word.
        dist.barrier()
        raise
    if rank == 0:
        print("sum", result.model(torch.ones(2, 8)).sum().item(), flush=True)
    else:
        result.model(torch.ones(2, 8))
dist.destroy_process_group()
"""


def test_a_program_of_torchrun_ends_with_the_reason(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    save_file(dict(model.state_dict()), tmp_path / "good.safetensors")
    shutil.copy(tmp_path / "good.safetensors", tmp_path / "on0.safetensors")
    whole = (tmp_path / "good.safetensors").read_bytes()
    (tmp_path / "on1.safetensors").write_bytes(whole[:-8])
    (tmp_path / "program.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--redirects", "3", "--log-dir", str(tmp_path / "logs"), str(tmp_path / "program.py")]
    sources = [str(tmp_path / "good.safetensors"), str(tmp_path / "onRANK.safetensors")]
    path = os.pathsep.join([str(Path(lowmem.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *sources], capture_output=True, text=True, timeout=120, env=environment)
    said = {f"{file.parent.name}/{file.name}": file.read_text() for file in (tmp_path / "logs").rglob("*.log")}
    assert done.returncode != 0, (done, said)
    assert f"sum {model(torch.ones(2, 8)).sum().item()}" in said["0/stdout.log"]
    assert "CheckpointError: " in said["1/stderr.log"], said
    assert "RankError: rank 1: CheckpointError: " in said["0/stderr.log"], said
    assert "on1.safetensors" in said["0/stderr.log"]
