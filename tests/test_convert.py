"""A conversion is the source, bit for bit, in files that others read; whole or unfinished, and never in between."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh import JobError, big_checkpoint, server
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model
from tiny_models import same

import lowmem
from bench.kernel_limits import cgroup_kind
from lowmem.checkpoint import TensorEntry
from lowmem.cli import main
from lowmem.engine import read_back, shard_writer
from lowmem.engine.conversion_folder import HIDDEN
from lowmem.engine.read_back import Piece, checksum, find_difference
from lowmem.errors import BudgetError, CheckpointError, KeysError, LowmemError, OptionError, OutputError
from lowmem.planner.convert import INDEX, ConvertRequest, make_convert_plan
from lowmem.sizes import MIB

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
pytestmark = pytest.mark.timeout(180)

KINDS = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "int64", "int8", "bool", "complex64"]


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Every kind, some larger than a chunk, an empty one and a scalar."""
    made = torch.Generator().manual_seed(seed)
    state = {f"kinds.{name}": torch.randn(37, 11, generator=made).to(getattr(torch, name)) for name in KINDS}
    state["large"] = torch.randn(3 * MIB + 5, generator=made)
    state["half"] = torch.randn(1 * MIB + 3, generator=made).bfloat16()
    state["empty"] = torch.empty(0, 7)
    state["scalar"] = torch.tensor(1.5)
    return state


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read it, do not change it."""
    path = tmp_path_factory.mktemp("source") / "some.safetensors"
    save_file(tensors(), path)
    return path


def result_of(folder: Path) -> dict[str, torch.Tensor]:
    """What safetensors finds there, by the index or in the one file."""
    index = folder / INDEX
    if not index.exists():
        return load_file(folder / "model.safetensors")
    table = json.loads(index.read_text())["weight_map"]
    found = {}
    for name in sorted(set(table.values())):
        with safe_open(folder / name, "pt") as f:
            assert f.metadata()["format"] == "pt"
            found.update({key: f.get_tensor(key) for key in f.keys()})  # noqa: SIM118
            assert {key for key, file in table.items() if file == name} == set(f.keys())
    return found


def check_result(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = result_of(folder)
    assert found.keys() == expected.keys()
    assert all(same(found[key], tensor) for key, tensor in expected.items())
    again = dict(lowmem.stream(folder))
    assert all(same(again[key], tensor) for key, tensor in expected.items())
    assert not (folder / HIDDEN).exists()


def no_threads() -> bool:
    return not [t for t in threading.enumerate() if t.name.startswith("lowmem")]


@pytest.mark.parametrize("shard", ["5GiB", "4MiB", "1KB"])
def test_a_conversion_is_the_source_bit_for_bit(source: Path, tmp_path: Path, shard: str) -> None:
    report = lowmem.convert(source, tmp_path / "out", max_shard_size=shard)
    check_result(tmp_path / "out", tensors())
    assert report.files == {p.name: p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")}
    assert (report.tensors, report.shared, report.kept) == (len(tensors()), {}, ())
    assert report.bytes_read == sum(t.nbytes for t in tensors().values())
    assert no_threads()


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "float8_e5m2"])
def test_casts_are_those_of_torch(source: Path, tmp_path: Path, dtype: str) -> None:
    lowmem.convert(source, tmp_path / "out", dtype=dtype, max_shard_size="6MiB", staging="1MiB")
    wanted = getattr(torch, dtype)
    check_result(tmp_path / "out", {k: t.to(wanted) if t.is_floating_point() else t for k, t in tensors().items()})


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=12),
    most=st.integers(0, 9000),
)
def test_shards_are_filled_in_order_up_to_their_size(tmp_path: Path, sizes: list[int], most: int) -> None:
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    state = {f"t{n:02d}": torch.arange(size, dtype=torch.int16) for n, size in enumerate(sizes)}
    save_file(state, tmp_path / "some.safetensors")
    report = lowmem.convert(tmp_path / "some.safetensors", tmp_path / "out", max_shard_size=most, verify=False)
    check_result(tmp_path / "out", state)
    order = []
    held = [list(lowmem.inspect(tmp_path / "out" / name).values()) for name in report.files]
    for entries, following in zip(held, [*held[1:], []], strict=True):
        nbytes = sum(entry.nbytes for entry in entries)
        assert nbytes <= most or len([e for e in entries if e.nbytes]) == 1
        # The next would not have fitted.
        assert not following or nbytes + following[0].nbytes > most
        order += [entry.key for entry in entries if entry.nbytes]
    assert order == [key for key, entry in lowmem.inspect(tmp_path / "some.safetensors").items() if entry.nbytes]


def test_the_layout_is_that_of_save_pretrained(saved: Callable[..., Path], tmp_path: Path) -> None:
    """Same names, same index but for what counts parameters; transformers loads it, and so does lowmem."""
    transformers = pytest.importorskip("transformers")
    folder = saved("llama", "float32", shard="20KB")
    out = tmp_path / "out"
    report = lowmem.convert(folder, out, max_shard_size="20KB")
    theirs, ours = (json.loads((path / INDEX).read_text()) for path in (folder, out))
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    count = len(report.files)
    assert list(report.files) == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    a, b = (transformers.AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder, out))
    assert a.keys() == b.keys()
    assert all(same(a[key], b[key]) for key in a)
    assert lowmem.inspect(out).warnings == ()


def test_a_cast_is_said_in_the_config(saved: Callable[..., Path], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    lowmem.convert(saved("llama", "float32"), tmp_path / "out", dtype="bfloat16")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16


def test_small_files_come_along_and_others_do_not(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    save_file({"w": torch.ones(3)}, folder / "model.safetensors")
    wanted = [
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
        "merges.txt",
        "spiece.model",
        "chat_template.jinja",
    ]
    wanted += ["generation_config.json", "preprocessor_config.json"]
    for name in [*wanted, "optimizer.pt", "training_args.bin", "notes.md", "modeling_x.py", "other.index.json"]:
        (folder / name).write_text(f"content of {name}")
    (folder / "config.json").write_text("{}")
    report = lowmem.convert(folder, tmp_path / "out")
    assert set(report.copied) == {*wanted, "config.json"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {*report.copied, "model.safetensors"}
    assert all((tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes() for name in report.copied)
    (folder / "config.json").write_text('{"auto_map": {"AutoModel": "modeling_x.Model"}}')
    assert "modeling_x.py" in lowmem.convert(folder, tmp_path / "code").copied


def test_keys_are_picked_and_renamed(tmp_path: Path) -> None:
    state = {f"net.layers.{n}.{part}": torch.full((3,), n) for n in range(3) for part in ("gamma", "beta")}
    save_file({**state, "head.w": torch.ones(2)}, tmp_path / "some.safetensors")
    report = lowmem.convert(
        tmp_path / "some.safetensors",
        tmp_path / "out",
        prefix="net",
        skip=["layers.1"],
        rename=[{r"\.gamma$": ".weight"}, lambda key: key.replace("beta", "bias")],
    )
    expected = {f"layers.{n}.{part}": torch.full((3,), n) for n in (0, 2) for part in ("weight", "bias")}
    check_result(tmp_path / "out", expected)
    assert report.tensors == 4
    lowmem.convert(tmp_path / "some.safetensors", tmp_path / "only", only=["head", "*gamma"])
    assert len(result_of(tmp_path / "only")) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rename": {r"\d": "x"}}, "both become"),
        ({"prefix": "nothing"}, "found none; keys begin with"),
        ({"only": ["nothing"]}, "only='nothing'"),
        ({"skip": ["*"]}, "no tensor is left"),
    ],
)
def test_rules_that_cannot_be_are_refused_before_anything_is_made(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    save_file({"a.1": torch.ones(2), "a.2": torch.ones(2)}, tmp_path / "some.safetensors")
    with pytest.raises(KeysError, match=message):
        lowmem.convert(tmp_path / "some.safetensors", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "int8"},
        {"max_shard_size": "much"},
        {"rename": {"(": "x"}},
        {"rename": [3]},
        {"prefix": ""},
        {"staging": "1KB"},
        {"verify": "no"},
        {"progress": 3},
    ],
)
def test_options_that_mean_nothing_are_refused(source: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        lowmem.convert(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


# Shared tensors.


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(5, 5, bias=False)
        self.b = self.a
        self.c = torch.nn.Linear(5, 3)


def test_what_save_model_recorded_is_honoured(tmp_path: Path) -> None:
    """The name that it left out is a tensor of the checkpoint, in the same range, counted once."""
    model = Tied()
    save_model(model, str(tmp_path / "tied.safetensors"))
    checkpoint = lowmem.inspect(tmp_path / "tied.safetensors")
    assert set(checkpoint) == {"a.weight", "b.weight", "c.weight", "c.bias"}
    a, b = checkpoint["a.weight"], checkpoint["b.weight"]
    assert (a.offset, a.nbytes, a.shape) == (b.offset, b.nbytes, b.shape)
    assert checkpoint.nbytes == sum(size for _, size in checkpoint.dtypes().values()) == 4 * (25 + 15 + 3)
    found = dict(lowmem.stream(tmp_path / "tied.safetensors"))
    assert all(same(found[key], tensor) for key, tensor in model.state_dict().items())
    loaded = lowmem.load(tmp_path / "tied.safetensors", model=Tied, residency="copy").model
    assert all(same(loaded.state_dict()[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("shard", ["5GiB", "50"])
def test_shared_tensors_are_stored_once_and_recorded(tmp_path: Path, shard: str) -> None:
    save_model(Tied(), str(tmp_path / "tied.safetensors"))
    source = lowmem.inspect(tmp_path / "tied.safetensors")
    dropped, kept = ("b.weight", "a.weight") if list(source).index("a.weight") == 0 else ("a.weight", "b.weight")
    report = lowmem.convert(tmp_path / "tied.safetensors", tmp_path / "out", max_shard_size=shard)
    assert list(source).index(kept) < list(source).index(dropped)
    assert dict(report.shared) == {dropped: kept}
    assert set(result_of(tmp_path / "out")) == set(source) - {dropped}
    again = lowmem.inspect(tmp_path / "out")
    assert set(again) == set(source)
    assert again.warnings == ()
    assert again.nbytes == source.nbytes
    assert (again[kept].file, again[kept].offset) == (again[dropped].file, again[dropped].offset)
    if shard == "50":
        assert json.loads((tmp_path / "out" / INDEX).read_text())["metadata"] == {
            "total_size": source.nbytes,
            "lowmem_shared": {dropped: kept},
        }


def test_metadata_that_names_no_tensor_or_a_known_one_is_only_metadata(tmp_path: Path) -> None:
    state = {"a": torch.ones(2), "b": torch.zeros(2)}
    save_file(state, tmp_path / "m.safetensors", metadata={"b": "a", "format": "pt", "x": "nothing"})
    found = dict(lowmem.stream(tmp_path / "m.safetensors"))
    assert found.keys() == state.keys()
    assert same(found["b"], state["b"])


def test_ranges_of_other_strides_are_not_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned only: safetensors has no strides, a pickled file has."""
    save_file({"a": torch.ones(4, 4)}, tmp_path / "m.safetensors")
    checkpoint = lowmem.inspect(tmp_path / "m.safetensors")
    a = checkpoint["a"]
    turned = TensorEntry("t", a.dtype, a.shape, a.file, a.offset, a.nbytes, strides=(1, 4))
    again = TensorEntry("u", a.dtype, a.shape, a.file, a.offset, a.nbytes, strides=(1, 4))
    both = lowmem.Checkpoint("m", tmp_path, checkpoint.shards, {"a": a, "t": turned, "u": again})
    plan = make_convert_plan(both, tmp_path / "out", ConvertRequest())
    assert plan.shared == {"u": "t"}
    assert plan.tensors == 2


# Unfinished runs.

KILLED = """
import os, lowmem
from pathlib import Path
rename, left = Path.replace, [args["count"]]
def replace(self, target):
    made = rename(self, target)
    left[0] -= Path(target).match(args["pattern"])
    if not left[0]:
        os.kill(os.getpid(), 9)
    return made
Path.replace = replace
lowmem.convert(args["source"], args["out"], max_shard_size="1MiB")
"""


def kill_after(count: int, source: Path, out: Path, pattern: str = f"{HIDDEN}/*.safetensors.json") -> None:
    """Kill a run when it has given `count` files names of this pattern."""
    with pytest.raises(JobError) as killed:
        server().run(KILLED, source=str(source), out=str(out), count=count, pattern=pattern)
    assert killed.value.status == -signal.SIGKILL


@linux
def test_a_killed_run_looks_unfinished_and_the_next_goes_on(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    state = {f"t{n}": torch.randn(200_000) for n in range(6)}
    save_file(state, source / "model.safetensors")
    (source / "config.json").write_text('{"model_type": "llama"}')
    kill_after(3, source, out)
    assert [p.name for p in out.iterdir()] == [HIDDEN]
    with pytest.raises(LowmemError, match="an unfinished conversion; run lowmem convert again"):
        lowmem.inspect(out)
    transformers = pytest.importorskip("transformers")
    with pytest.raises((OSError, ValueError)):
        transformers.AutoModel.from_pretrained(out)
    whole = {p.name: p.stat().st_mtime_ns for p in (out / HIDDEN).glob("*.safetensors")}
    assert len(whole) == 3
    report = lowmem.convert(source, out, max_shard_size="1MiB")
    assert set(report.kept) == set(whole)
    assert {name: (out / name).stat().st_mtime_ns for name in whole} == whole
    assert report.bytes_read == 3 * 800_000
    check_result(out, state)
    with pytest.raises(OutputError, match="holds a finished checkpoint already"):
        lowmem.convert(source, out, max_shard_size="1MiB")


@linux
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_run_killed_while_names_are_given_is_finished_by_the_next(source: Path, tmp_path: Path, count: int) -> None:
    out = tmp_path / "out"
    kill_after(count, source, out, "out/*")
    assert len(list(out.iterdir())) == count + 1
    report = lowmem.convert(source, out, max_shard_size="1MiB")
    assert report.bytes_read == 0
    assert len(report.kept) == len(report.files)
    check_result(out, tensors())


@linux
def test_what_was_damaged_meanwhile_is_written_again(tmp_path: Path) -> None:
    source, out = tmp_path / "some.safetensors", tmp_path / "out"
    state = {f"t{n}": torch.randn(200_000) for n in range(6)}
    save_file(state, source)
    kill_after(3, source, out)
    first = min((out / HIDDEN).glob("*.safetensors"))
    before = first.stat()
    with first.open("rb+") as file:
        file.seek(50_000)
        file.write(b"x")
    os.utime(first, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert first.name not in lowmem.convert(source, out, max_shard_size="1MiB").kept
    check_result(out, state)


@linux
def test_another_conversion_does_not_go_on_with_it(tmp_path: Path) -> None:
    source, out = tmp_path / "some.safetensors", tmp_path / "out"
    save_file({f"t{n}": torch.randn(200_000) for n in range(6)}, source)
    kill_after(2, source, out)
    with pytest.raises(OutputError, match="unfinished conversion of something else"):
        lowmem.convert(source, out, max_shard_size="1MiB", dtype="bfloat16")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"found notes\.txt"):
        lowmem.convert(source, out, max_shard_size="1MiB")
    (out / "notes.txt").unlink()
    os.utime(source, ns=(1, 1))
    with pytest.raises(OutputError, match="unfinished conversion of something else"):
        lowmem.convert(source, out, max_shard_size="1MiB")
    assert len(list((out / HIDDEN).glob("*.safetensors"))) == 2


def test_a_small_file_may_have_the_longest_name_there_is(tmp_path: Path) -> None:
    """What it is called while it is written must not be longer."""
    folder = tmp_path / "source"
    folder.mkdir()
    save_file({"w": torch.ones(3)}, folder / "model.safetensors")
    name = f"chat_template{'x' * 236}.jinja"
    (folder / name).write_text("long")
    assert len(name) == 255
    assert name in lowmem.convert(folder, tmp_path / "out").copied
    assert (tmp_path / "out" / name).read_text() == "long"


@pytest.mark.parametrize("found", ["a file", "a link to nothing"])
def test_what_is_no_folder_is_refused_by_its_kind(source: Path, tmp_path: Path, found: str) -> None:
    out = tmp_path / "out"
    out.write_text("mine") if found == "a file" else out.symlink_to("nothing")
    with pytest.raises(OutputError, match=f"expected a folder, found {found}"):
        lowmem.convert(source, out)


def test_a_folder_with_something_in_it_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"found notes\.txt"):
        lowmem.convert(source, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["notes.txt"]


@linux
def test_two_runs_at_once_are_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def second(_: Any) -> None:
        with pytest.raises(OutputError, match="another conversion is writing there"):
            lowmem.convert(source, out)

    lowmem.convert(source, out, progress=second)
    check_result(out, tensors())


class StopError(Exception):
    pass


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
def test_an_interrupted_run_keeps_what_is_whole(tmp_path: Path, error: type[BaseException]) -> None:
    source, out = tmp_path / "some.safetensors", tmp_path / "out"
    state = {f"t{n}": torch.randn(MIB) for n in range(6)}
    save_file(state, source)

    def stop(progress: lowmem.Progress) -> None:
        if any((out / HIDDEN).glob("*.safetensors.json")):
            raise error

    with pytest.raises(error):
        lowmem.convert(source, out, max_shard_size="4MiB", progress=stop)
    assert no_threads()
    assert not list(out.rglob("*.partial")) + list(out.rglob("*.draft"))
    # Without a whole file nothing is left, which the last report may be too late for.
    assert out.exists() == any(out.rglob("*.safetensors.json"))
    lowmem.convert(source, out, max_shard_size="4MiB")
    check_result(out, state)


@pytest.mark.parametrize("existed", [False, True])
def test_a_run_that_fails_at_once_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existed: bool
) -> None:
    out = tmp_path / "out"
    if existed:
        out.mkdir()

    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match=r"cannot reserve .* No space left on device"):
        lowmem.convert(source, out)
    assert out.exists() == existed
    assert not existed or not list(out.iterdir())
    assert no_threads()


def test_what_the_disk_has_no_room_for_is_refused_at_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 5 * MIB})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match=r"14\.0. MiB are still to be written, the disk has 5\.00 MiB free"):
        lowmem.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@linux
def test_a_file_that_may_not_grow_is_an_error_that_says_so(source: Path, tmp_path: Path) -> None:
    job = """
import lowmem, resource
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
try:
    lowmem.convert(args["source"], args["out"])
except lowmem.OutputError as error:
    result = str(error)
"""
    text = server().run(job, source=str(source), out=str(tmp_path / "out"))
    assert "File too large" in text
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_while_it_is_written_is_an_error(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = shard_writer.write_at, []

    def failing(fd: int, view: memoryview, offset: int) -> None:
        calls.append(offset)
        if len(calls) > 4:
            raise OSError(5, "Input/output error")
        original(fd, view, offset)

    monkeypatch.setattr(shard_writer, "write_at", failing)
    with pytest.raises(OutputError, match=r"model\.safetensors.*tensor .*Input/output error"):
        lowmem.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert no_threads()


def test_a_sync_that_fails_is_an_error(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(fd: int, size: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(shard_writer, "settle", failing)
    with pytest.raises(OutputError, match="cannot be brought to the disk: Input/output error"):
        lowmem.convert(source, tmp_path / "out", max_shard_size="1MiB")
    assert not (tmp_path / "out").exists()
    assert no_threads()


def test_a_source_that_changes_meanwhile_is_an_error(tmp_path: Path) -> None:
    source, out = tmp_path / "some.safetensors", tmp_path / "out"
    save_file({f"t{n}": torch.randn(MIB) for n in range(4)}, source)

    def touch(_: lowmem.Progress) -> None:
        os.utime(source, ns=(7, 7))

    with pytest.raises(CheckpointError, match="changed"):
        lowmem.convert(source, out, max_shard_size="4MiB", progress=touch)
    assert not list(out.glob("model*"))


# Reading back.


@pytest.mark.parametrize("at", [0, 8, 70, 4096 * 3 + 1, -1])
@pytest.mark.parametrize("shard", ["5GiB", "1MiB"])
def test_a_byte_that_the_disk_changed_is_found(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, shard: str
) -> None:
    original, changed = shard_writer.settle, []

    def damage(fd: int, size: int) -> None:
        if not changed:
            byte = os.pread(fd, 1, at % size)
            os.pwrite(fd, bytes([byte[0] ^ 1]), at % size)
            changed.append(at)
        original(fd, size)

    monkeypatch.setattr(shard_writer, "settle", damage)
    with pytest.raises(OutputError, match=r"\.partial: (the header|tensor '.*'): .* differ from what was written"):
        lowmem.convert(source, tmp_path / "out", max_shard_size=shard)
    assert not list((tmp_path / "out").glob("*"))
    changed.clear()
    lowmem.convert(source, tmp_path / "unseen", max_shard_size=shard, verify=False)
    assert changed


def test_reading_back_that_is_stopped_seals_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking = threading.Event()

    def slow(path: Path, pieces: Any) -> None:
        looking.set()
        time.sleep(0.05)

    def interrupt(_: shard_writer.Sealer) -> None:
        assert looking.wait(20)
        raise KeyboardInterrupt

    monkeypatch.setattr(read_back, "_TASK", 1)
    monkeypatch.setattr(read_back, "find_difference", slow)
    monkeypatch.setattr(shard_writer.Sealer, "finish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        lowmem.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert no_threads()


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 20_000), min_size=1, max_size=8),
    first=st.integers(0, 9000),
    size=st.sampled_from([4096 * 2, 4096 * 5, 2 * MIB]),
    direct=st.booleans(),
    data=st.data(),
)
def test_pieces_are_read_back_wherever_they_lie(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], first: int, size: int, direct: bool, data: Any
) -> None:
    path = tmp_path_factory.mktemp("pieces") / "file"
    content = bytearray(os.urandom(first + sum(sizes)))
    pieces, at = [], first
    for n in sizes:
        pieces.append(Piece(at, n, checksum(memoryview(content)[at : at + n]), f"t{at}"))
        at += n
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_back, "_BUFFER", size)
        if not direct:
            patch.delattr(os, "O_DIRECT", raising=False)
        assert find_difference(path, pieces) is None
        where = data.draw(st.integers(first, len(content) - 1))
        content[where] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        hit = next(piece for piece in pieces if piece.offset <= where < piece.offset + piece.nbytes)
        assert f"tensor {hit.tensor!r}" in (find_difference(path, pieces) or "")
        path.write_bytes(content[:where])
        assert find_difference(path, pieces) is not None


def test_checksums_of_parts_are_the_checksum_of_the_whole() -> None:
    content = memoryview(os.urandom(50_001))
    assert checksum(content[8192:], checksum(content[:8192])) == checksum(content)
    swapped = bytes(content[4096:8192]) + bytes(content[:4096]) + bytes(content[8192:])
    assert checksum(memoryview(swapped)) != checksum(content)


# Memory, and the shell.

PEAK = """
import lowmem, shutil
with lowmem.measure() as memory:
    report = lowmem.convert(args["source"], args["out"], dtype=args["dtype"], staging=args["staging"])
shutil.rmtree(args["out"])
result = [memory.peak, report.bytes_read]
"""


@linux
@pytest.mark.parametrize(("dtype", "staging"), [("auto", None), ("float32", "4MiB")])
def test_memory_is_staging_whatever_the_size(tmp_path: Path, dtype: str, staging: str | None) -> None:
    source = big_checkpoint()
    peak, read = server().run(PEAK, source=str(source), out=str(tmp_path / "out"), dtype=dtype, staging=staging)
    request = ConvertRequest(dtype=dtype, staging=None if staging is None else 4 * MIB)
    plan = make_convert_plan(lowmem.inspect(source), tmp_path / "out", request)
    assert read > 200 * MIB
    # Buffers of those who read back, and of Python's threads, besides.
    assert peak <= plan.host.peak + 12 * MIB
    assert plan.staging.total <= (64 if staging is None else 4) * MIB


LIMITED = """
import lowmem
lowmem.convert(args["source"], args["out"], dtype=args["dtype"])
result = True
"""


@linux
@pytest.mark.cgroup
@pytest.mark.skipif(cgroup_kind() is None, reason="this process may make no memory cgroup")
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_the_kernel_confirms_it(tmp_path: Path, dtype: str) -> None:
    """Its own pages, those of both files, and what torch touches when it is first used: in less than the file has."""
    limit = (cgroup_kind(), 100 * MIB, 0)
    source = big_checkpoint()
    assert server().run(LIMITED, limit=limit, source=str(source), out=str(tmp_path / "out"), dtype=dtype)


def test_a_machine_without_memory_refuses(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowmem.limits import HostMemory
    from lowmem.planner import convert

    monkeypatch.setattr(convert, "host_memory", lambda: HostMemory(MIB, "a test", {}))
    with pytest.raises(BudgetError, match="the conversion needs at least"):
        lowmem.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_shell_converts(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    rules = ["--rename", r"^kinds\.=k.", "--rename", "float=f", "--skip", "large,half", "--dtype", "float16"]
    assert main(["convert", str(source), str(out), *rules, "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["verified"] is True
    assert table["files"] == {"model.safetensors": (out / "model.safetensors").stat().st_size}
    assert {"k.f32", "k.bf16", "k.int64"} < set(lowmem.inspect(out))
    assert lowmem.inspect(out)["k.f32"].dtype == "float16"
    assert main(["convert", str(source), str(out)]) == 1
    assert "holds a finished checkpoint already" in capsys.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "x"), "--rename", "nothing"]) == 2
    assert main(["convert", str(source), str(tmp_path / "y"), "--no-verify", "--max-shard-size", "4MiB"]) == 0
    assert "not read back" in capsys.readouterr().out


def pickled(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A training checkpoint with views, a shared tensor, and an optimizer."""
    torch.manual_seed(5)
    both = torch.randn(300, 500)
    state = {
        "turned.weight": both[:, :200].t(),
        "columns.weight": both[:, 100:400],
        "whole.weight": torch.randn(64, 32, dtype=torch.bfloat16),
        "steps": torch.tensor(7),
        "many": torch.randn(1, 6).expand(5, 6),
    }
    state["head.weight"] = state["whole.weight"]
    file = tmp_path / "training.pth"
    torch.save({"model": state, "optimizer": {"state": {0: torch.randn(1000)}}, "epoch": 3}, file)
    return file, state


@pytest.mark.parametrize("dtype", ["auto", "float16"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickled_checkpoint_becomes_safetensors(tmp_path: Path, dtype: str, legacy: bool) -> None:
    file, state = pickled(tmp_path)
    if legacy:
        torch.save({"model": state}, file, _use_new_zipfile_serialization=False)
    report = lowmem.convert(file, tmp_path / "out", dtype=dtype)
    assert report.shared == {"head.weight": "whole.weight"}
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == state.keys() - {"head.weight"}
    for key, value in found.items():
        wanted = state[key] if dtype == "auto" or not state[key].is_floating_point() else state[key].half()
        assert value.dtype == wanted.dtype
        assert torch.equal(value, wanted), key
    assert torch.equal(dict(lowmem.stream(tmp_path / "out"))["head.weight"], found["whole.weight"])


def test_any_mapping_of_a_pickled_file_is_converted(tmp_path: Path) -> None:
    file, _ = pickled(tmp_path)
    lowmem.convert(file, tmp_path / "out", weights="optimizer.state")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == {"0"}


def test_what_was_scattered_is_read_back_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transposed weight is written through a mapping; a byte that changed on its way to the disk is found."""
    file, _ = pickled(tmp_path)
    from lowmem.engine import shard_writer

    real = shard_writer.settle

    def damaging(fd: int, size: int) -> None:
        real(fd, size)
        os.pwrite(fd, b"\x55\xaa\x55", size - 2000)

    lowmem.convert(file, tmp_path / "fine", only=["turned"])
    monkeypatch.setattr(shard_writer, "settle", damaging)
    with pytest.raises(OutputError, match="turned"):
        lowmem.convert(file, tmp_path / "out", only=["turned"])


def test_an_error_of_the_callback_stays_what_it_is(tmp_path: Path) -> None:
    file, _ = pickled(tmp_path)

    def fail(progress: object) -> None:
        raise OSError(5, "mine")

    with pytest.raises(OSError, match="mine"):
        lowmem.convert(file, tmp_path / "out", progress=fail)


def test_a_tensor_may_not_have_the_name_of_the_metadata(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(LowmemError, match="__metadata__"):
        lowmem.convert(tmp_path / "a.pt", tmp_path / "out", rename={"^a$": "__metadata__"})


@linux
def test_whole_files_of_which_no_state_tells_are_not_believed(tmp_path: Path) -> None:
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    state = {f"t{n}": torch.randn(200_000) for n in range(6)}
    save_file({key: value + 1 for key, value in state.items()}, other)
    save_file(state, one)
    for damage in (b"", b"{"):
        out = tmp_path / f"out{len(damage)}"
        kill_after(3, other, out)
        (out / HIDDEN / "state.json").write_bytes(damage)
        report = lowmem.convert(one, out, max_shard_size="1MiB")
        assert not report.kept
        check_result(out, state)
