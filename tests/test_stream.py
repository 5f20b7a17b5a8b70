"""A stream gives every tensor once, in file order, bit for bit, within its staging; and leaves nothing behind."""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cold_files import drop
from fresh import server
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import same

import lowmem
from lowmem.engine import feed
from lowmem.errors import BudgetError, CheckpointError, KeysError, LowmemError, OptionError, UnsupportedError
from lowmem.limits import HostMemory
from lowmem.planner import budget, moves, records
from lowmem.planner import stream as planning
from lowmem.planner.records import IO
from lowmem.sizes import KIB, MIB

pytestmark = pytest.mark.timeout(180)
linux = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")

FLOATS = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
OTHERS = ["int8", "uint8", "int16", "int32", "int64", "bool", "complex64"]


def some(dtype: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Any bits, NaNs too; a truth value is 0 or 1."""
    made: Any = torch.empty(shape, dtype=getattr(torch, dtype))
    raw = torch.frombuffer(bytearray(random.Random(seed).randbytes(max(1, made.nbytes))), dtype=torch.uint8)
    raw = raw[: made.nbytes] % 2 if dtype == "bool" else raw[: made.nbytes]
    return raw.clone().view(made.dtype).reshape(shape)


def write(folder: Path, *parts: dict[str, torch.Tensor]) -> Path:
    """A shard for each part, and the index."""
    folder.mkdir(parents=True, exist_ok=True)
    table = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file(part, folder / name)
        table.update(dict.fromkeys(part, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    return folder


def expected_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def check_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], dtype: str = "auto") -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        if dtype == "auto" or not tensor.is_floating_point():
            assert same(found[key], tensor), key
            continue
        cast = tensor.to(getattr(torch, dtype))
        assert (found[key].dtype, found[key].shape) == (cast.dtype, cast.shape), key
        # Which of its NaNs torch's own cast gives depends on where an element lies in a vector.
        nan = cast.float().isnan()
        assert torch.equal(found[key].float().isnan(), nan), key
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[cast.itemsize]
        assert torch.equal(found[key].view(bits)[~nan], cast.view(bits)[~nan]), key


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("lowmem")]


def open_below(folder: Path) -> list[str]:
    links = [os.path.realpath(fd) for fd in Path("/proc/self/fd").iterdir()]
    return [link for link in links if link.startswith(str(folder.resolve()) + "/")]


def check_nothing_is_left(folder: Path) -> None:
    gc.collect()
    assert threads() == []
    assert open_below(folder) == []


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards: every dtype, empty tensors and single numbers, small and large, in two modules."""
    kinds = FLOATS + OTHERS
    first = {f"a.{dtype}": some(dtype, (5, 7), n) for n, dtype in enumerate(kinds)}
    second = {f"b.{dtype}": some(dtype, (1 + n * 1000, 33), n) for n, dtype in enumerate(kinds)}
    third = {
        "a.empty": torch.empty(0, 3, dtype=torch.bfloat16),
        "a.number": torch.tensor(2.5),
        "b.large": some("bfloat16", (3 * MIB + 5,), 5),
        "b.number": torch.tensor(7),
        "c": some("float32", (11,), 6),
    }
    return write(tmp_path_factory.mktemp("stream") / "mixed", first, second, third)


# -- values and order


@pytest.mark.parametrize("io", ["auto", "buffered", "direct", "mmap"])
@pytest.mark.parametrize("dtype", ["auto", "float32", "float8_e5m2"])
def test_a_stream_is_what_safetensors_reads(mixed: Path, io: IO, dtype: str) -> None:
    for file in mixed.glob("*.safetensors"):
        drop(file)
    found = dict(lowmem.stream(mixed, dtype=dtype, io=io, staging=random.Random(dtype + io).choice([MIB, 8 * MIB])))
    check_equal(found, expected_of(mixed), dtype)
    check_nothing_is_left(mixed)


def test_the_order_is_that_of_the_files(mixed: Path) -> None:
    keys = [key for key, _ in lowmem.stream(mixed)]
    checkpoint = lowmem.inspect(mixed)
    assert keys == list(checkpoint)
    places = [(checkpoint[key].file.name, checkpoint[key].offset) for key in keys]
    assert places == sorted(places)
    assert len({file for file, _ in places}) == 3


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    tensors=st.lists(
        st.tuples(st.sampled_from(FLOATS + OTHERS), st.lists(st.integers(0, 23), max_size=4).map(tuple)),
        min_size=1,
        max_size=12,
    ),
    cuts=st.integers(1, 3),
    dtype=st.sampled_from(["auto", "float32", "bfloat16", "float8_e4m3fn"]),
    chunk=st.sampled_from([16, 48, 256, 4096, 4 * MIB]),
    workers=st.integers(1, 4),
    window=st.sampled_from([None, 0, 100, 3000]),
)
def test_every_tensor_arrives_once(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: list[Any],
    cuts: int,
    dtype: str,
    chunk: int,
    workers: int,
    window: int | None,
) -> None:
    """Whatever the sizes of chunks and window are."""
    made = [(f"t{i}", some(*spec, seed=i)) for i, spec in enumerate(tensors)]
    folder = write(tmp_path_factory.mktemp("any"), *(dict(made[i::cuts]) for i in range(min(cuts, len(made)))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moves, "CHUNK", chunk)
        patch.setattr(budget, "workers_here", lambda: workers)
        if window is not None:
            original = lowmem.streaming.make_stream_plan
            patch.setattr(lowmem.streaming, "make_stream_plan", lambda *given: (original(*given)[0], window))
        pairs = list(lowmem.stream(folder, dtype=dtype, staging=MIB))
    assert [key for key, _ in pairs] == list(lowmem.inspect(folder))
    check_equal(dict(pairs), expected_of(folder), dtype)


def test_a_tensor_belongs_to_the_caller(mixed: Path) -> None:
    """All are kept to the end, and what the caller writes into one is in no other."""
    kept = {}
    for key, tensor in lowmem.stream(mixed, staging=MIB):
        kept[key] = tensor
        if key == "b.float32":
            tensor.zero_()
    expected = expected_of(mixed)
    expected["b.float32"].zero_()
    check_equal(kept, expected)
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in kept.values() if t.nbytes)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


# -- which tensors


@pytest.mark.parametrize(
    ("only", "test"),
    [
        ("b", lambda key: key.startswith("b.")),
        ("a.int8", lambda key: key == "a.int8"),
        (["c", "a.bool"], lambda key: key in ("c", "a.bool")),
        ("*float8*", lambda key: "float8" in key),
        (["a.*", "b.large"], lambda key: key.startswith("a.") or key == "b.large"),
        ((key for key in ("c",)), lambda key: key == "c"),
        (lambda key: key.endswith("16"), lambda key: key.endswith("16")),
        (lambda key: False, lambda key: False),
        ([], lambda key: False),
        (None, lambda key: True),
    ],
)
def test_only_what_was_asked_for_is_given_and_read(mixed: Path, only: Any, test: Callable[[str], bool]) -> None:
    found = dict(lowmem.stream(mixed, only=only))
    check_equal(found, {key: value for key, value in expected_of(mixed).items() if test(key)})
    assert list(found) == [key for key in lowmem.inspect(mixed) if test(key)]


@pytest.mark.parametrize("only", ["d", "a.int", ["a", "nothing"], "*nothing*"])
def test_a_name_of_nothing_is_refused(mixed: Path, only: Any) -> None:
    name = only if isinstance(only, str) else only[-1]
    with pytest.raises(KeysError, match="only=.*" + name.replace("*", r"\*")):
        lowmem.stream(mixed, only=only)


BAD: list[dict[str, Any]] = [
    {"device": "disk"},
    {"staging": MIB - 1},
    {"staging": "many"},
    {"staging": 0},
    {"dtype": "int8"},
    {"dtype": "float33"},
    {"io": "fast"},
    {"io": None},
    {"only": 5},
    {"only": [""]},
    {"only": b"a"},
    {"keep_cache": "no"},
    {"device": "nowhere"},
]


@pytest.mark.parametrize("options", BAD, ids=str)
def test_options_that_mean_nothing_are_refused_at_once(mixed: Path, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        lowmem.stream(mixed, **options)


def test_scales_keep_their_dtype_as_integers_do(tmp_path: Path) -> None:
    save_file({"scale": some("float8_e8m0fnu", (8,), 1)}, tmp_path / "m.safetensors")
    for dtype in ("auto", "float32"):
        assert same(dict(lowmem.stream(tmp_path, dtype=dtype))["scale"], some("float8_e8m0fnu", (8,), 1))


def test_a_dtype_that_torch_has_not_is_refused(tmp_path: Path) -> None:
    head = json.dumps({"packed": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    (tmp_path / "m.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + bytes(3))
    with pytest.raises(UnsupportedError, match="packed"):
        lowmem.stream(tmp_path)


def test_what_does_not_fit_is_refused_before_it_is_read(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "host_memory", lambda: HostMemory(5 * MIB, "a test", {}))
    with pytest.raises(BudgetError, match=r"^the stream needs at least .*b\.large"):
        lowmem.stream(mixed)
    with pytest.raises(BudgetError, match=r"^the stream needs") as refused:
        lowmem.stream(mixed, staging=MIB)
    assert "the load" not in str(refused.value)
    assert len(dict(lowmem.stream(mixed, staging=MIB, only="c"))) == 1


def test_nothing_of_a_checkpoint_can_be_asked_for_without_memory(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "host_memory", lambda: HostMemory(5 * MIB, "a test", {}))
    assert list(lowmem.stream(mixed, only=lambda key: False)) == []


# -- endings


def read_three(folder: Path) -> Any:
    made = lowmem.stream(folder, staging=MIB)
    for _ in range(3):
        next(made)
    return made


@linux
def test_a_stream_that_never_began_has_nothing_open(mixed: Path) -> None:
    made = lowmem.stream(mixed)
    assert threads() == []
    assert open_below(mixed) == []
    del made
    check_nothing_is_left(mixed)


@linux
def test_closing_early_ends_everything(mixed: Path) -> None:
    made = read_three(mixed)
    assert threads()
    made.close()
    check_nothing_is_left(mixed)
    assert next(made, None) is None


@linux
def test_forgetting_it_ends_everything(mixed: Path) -> None:
    made = read_three(mixed)
    del made
    check_nothing_is_left(mixed)


@linux
def test_an_error_in_the_loop_ends_everything(mixed: Path) -> None:
    def loop() -> None:
        for number, _ in enumerate(lowmem.stream(mixed, staging=MIB)):
            if number == 4:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        loop()
    del caught
    check_nothing_is_left(mixed)


@linux
def test_a_thrown_error_comes_back_and_ends_everything(mixed: Path) -> None:
    made = read_three(mixed)
    with pytest.raises(KeyboardInterrupt):
        made.throw(KeyboardInterrupt())
    check_nothing_is_left(mixed)


@linux
def test_two_streams_at_once_do_not_meet(mixed: Path) -> None:
    expected = expected_of(mixed)
    pairs = list(zip(lowmem.stream(mixed, staging=MIB), lowmem.stream(mixed, dtype="float32"), strict=True))
    check_equal(dict(a for a, _ in pairs), expected)
    check_equal(dict(b for _, b in pairs), expected, "float32")
    check_nothing_is_left(mixed)


@linux
@pytest.mark.parametrize("spoil", ["touched", "truncated"])
def test_a_file_that_changes_midway_is_an_error(tmp_path: Path, spoil: str) -> None:
    folder = write(tmp_path / "x", {f"t{i:02d}": some("bfloat16", (MIB // 2,), i) for i in range(12)})
    file = next(folder.glob("*.safetensors"))
    made = lowmem.stream(folder, staging=MIB)
    next(made)
    if spoil == "touched":
        os.utime(file, ns=(3, 3))
    else:
        os.truncate(file, 8 * MIB)
    with pytest.raises(CheckpointError, match=file.name):
        list(made)
    check_nothing_is_left(folder)


@linux
def test_a_second_shard_that_is_gone_is_an_error(mixed: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "x", {"a": some("int8", (MIB,), 1)}, {"b": some("int8", (MIB,), 2)})
    made = lowmem.stream(folder, staging=MIB)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: cannot be opened"):
        list(made)
    check_nothing_is_left(folder)


# -- within the staging


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5,000 tiny tensors with large ones among them, in two shards."""
    parts: list[dict[str, torch.Tensor]] = [{}, {}]
    for number in range(5000):
        # safetensors puts larger dtypes first, so of one dtype the order is that of names.
        size = 3 * MIB if number % 1250 == 600 else 700 * KIB if number % 1000 == 9 else 8 + number % 300
        parts[number % 2][f"n{number:05d}"] = torch.full((size,), number, dtype=torch.int16).view(torch.bfloat16)
    return write(tmp_path_factory.mktemp("crowd") / "x", *parts)


@pytest.mark.parametrize(("dtype", "staging"), [("auto", MIB), ("float64", MIB), ("float64", 3 * MIB)])
def test_tiny_tensors_among_large_ones_pass_a_small_staging(crowd: Path, dtype: str, staging: int) -> None:
    expected = expected_of(crowd)
    count = 0
    for key, tensor in lowmem.stream(crowd, dtype=dtype, staging=staging):
        found, wanted = tensor.flatten()[-1:], expected[key].flatten()[-1:]
        assert same(found, wanted if dtype == "auto" else wanted.to(torch.float64))
        count += 1
    assert count == 5000
    check_nothing_is_left(crowd)


PEAKS = """
import time
import lowmem, torch
result = {}
for dtype in args["dtypes"]:
    for _ in lowmem.stream(args["folder"], dtype=dtype): pass
    for staging in args["stagings"]:
        # On a busy machine nobody may have looked while the largest tensor was there: then once more.
        for _ in range(5):
            with lowmem.measure(interval=0.0005) as memory:
                # No enumerate: it would keep the last pair.
                for key, tensor in lowmem.stream(args["folder"], dtype=dtype, staging=staging):
                    if args["kind"] == "holding" and tensor.nbytes > 100_000:
                        time.sleep(0.005)
                    large = tensor.nbytes > 100_000
                    del tensor
                    if args["kind"] == "slow" and large:
                        time.sleep(0.01)
            if memory.peak >= args["largest"][dtype] - 2**20:
                break
        result[f"{dtype} {staging}"] = memory.peak
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 110 MiB: tensors of 2 to 24 MiB, and small ones."""
    sizes = [2, 5, 24, 3, 16, 8, 24, 1, 12, 4, 10]
    made = {f"t{n:02d}": torch.ones(size * MIB // 2, dtype=torch.bfloat16) for n, size in enumerate(sizes)}
    made |= {f"small.{n}": torch.ones(500, dtype=torch.bfloat16) for n in range(100)}
    return write(tmp_path_factory.mktemp("large") / "x", made)


@linux
@pytest.mark.parametrize("kind", ["quick", "slow", "holding"])
def test_the_peak_is_the_staging_or_the_largest_tensor(large: Path, kind: str) -> None:
    """Besides the one that the caller has: another is begun as soon as one is given out."""
    dtypes, stagings = ["auto", "float32"], [MIB, 16 * MIB, 64 * MIB]
    sizes = {"auto": 24 * MIB, "float32": 48 * MIB}
    peaks = server().run(PEAKS, folder=str(large), kind=kind, stagings=stagings, dtypes=dtypes, largest=sizes)
    for dtype, largest in sizes.items():
        for staging in stagings:
            buffers = plan_of(large, staging, dtype)[0].staging.total
            peak, bound = peaks[f"{dtype} {staging}"], max(staging, largest + buffers) + largest
            # Less would be a measure of nothing.
            assert largest - MIB <= peak <= bound + 8 * MIB, (dtype, staging)


@pytest.mark.parametrize(
    ("io", "dtype", "staging"),
    [("auto", "auto", MIB), ("direct", "float32", 3 * MIB), ("auto", "float8_e5m2", 16 * MIB)],
)
def test_tensors_ahead_of_the_caller_are_within_the_window(
    crowd: Path, monkeypatch: pytest.MonkeyPatch, io: IO, dtype: str, staging: int
) -> None:
    """Counted where they are made: what was made and not given out, or a single one, or the run that a read begins."""
    window = plan_of(crowd, staging, dtype, io)[1]
    given = made = 0
    lock = threading.Lock()
    worst = 0
    original = feed.MemoryDestination

    def counted(placement: Any, **options: Any) -> Any:
        nonlocal made, worst
        with lock:
            made += placement.nbytes
            worst = max(worst, made - given)
        return original(placement, **options)

    monkeypatch.setattr(feed, "MemoryDestination", counted)
    for _, tensor in lowmem.stream(crowd, dtype=dtype, staging=staging, io=io):
        # Handed over before it is given out.
        with lock:
            given += tensor.nbytes
    largest = 3 * MIB * {"auto": 2, "float32": 4, "float8_e5m2": 1}[dtype]
    # The tensor at hand is counted out a moment later here than in the stream.
    assert worst <= max(window, largest) + largest
    assert made == given


def plan_of(folder: Path, staging: int, dtype: str, io: IO = "auto") -> tuple[lowmem.LoadPlan, int]:
    request = records.StreamRequest(dtype=dtype, staging=staging, io=io)
    return planning.make_stream_plan(lowmem.inspect(folder), request)


@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize("size", [20, 31, 39, 45])
def test_a_tensor_that_fits_into_the_staging_takes_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, size: int
) -> None:
    """The buffers get smaller, however many readers there are."""
    monkeypatch.setattr(budget, "workers_here", lambda: workers)
    save_file({"w": torch.ones(size * MIB // 4, dtype=torch.bfloat16)}, tmp_path / "w.safetensors")
    for staging in (size * MIB + 2 * MIB, 48 * MIB, 64 * MIB):
        plan, _ = plan_of(tmp_path / "w.safetensors", staging, "float32")
        assert plan.host.staging <= staging
        assert plan.staging.total >= MIB // 2


def test_readers_bring_no_helpers(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would start some for each reader that casts, and OpenMP ends the process where it may not."""
    monkeypatch.setattr(budget, "COLD_WORKERS", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        alone = len(list(Path("/proc/self/task").iterdir()))
        stream = lowmem.stream(large, dtype="float32", staging="16MiB")
        next(stream)
        assert len(list(Path("/proc/self/task").iterdir())) <= alone + budget.workers_here()
        assert torch.get_num_threads() == 4
        stream.close()
    finally:
        torch.set_num_threads(before)


@linux
def test_a_fork_ends_a_stream_in_the_new_process_only(large: Path) -> None:
    stream = lowmem.stream(large, staging="1MiB")
    first = next(stream)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        try:
            next(stream)
        except LowmemError:
            stream.close()
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    found = dict([first, *stream])
    assert found.keys() == lowmem.inspect(large).keys()


def test_a_fifo_in_the_place_of_a_shard_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.zeros(300)}, path)
    stream = lowmem.stream(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="changed since it was planned"):
        next(stream)


def test_the_plan_of_a_stream_keeps_to_its_staging(large: Path) -> None:
    """Buffers and window together."""
    ways: list[IO] = ["auto", "direct", "mmap"]
    for staging in (MIB, MIB + 1, 2 * MIB, 5 * MIB, 16 * MIB, 64 * MIB, 200 * MIB):
        for dtype in ("auto", "float32"):
            for io in ways:
                plan, window = plan_of(large, staging, dtype, io)
                assert plan.staging.total + window <= staging
                sizes = [placement.nbytes for placement in plan.placements]
                # As many tensors as the window holds, and always one.
                assert plan.host.staging == plan.staging.total + max(min(window, sum(sizes)), *sizes)
