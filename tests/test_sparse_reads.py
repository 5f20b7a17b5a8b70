"""Of views with gaps, only what is wanted is read, by every way of reading, and arrives as torch slices it."""

from __future__ import annotations

import errno
import mmap
import os
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cold_files import drop, needs_cold, resident, shard_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_engine import FLOATS, OTHERS, some
from test_fused import load, mapping_of, part_of, region_of, values_of
from test_strided import checkpoint_of, deflated, entry_of, read_all
from tiny_models import same
from torch import nn

from lowmem.checkpoint import inspect
from lowmem.checkpoint.records import Packed
from lowmem.engine import reading
from lowmem.engine.reading import ShardReader
from lowmem.engine.ways import Ways
from lowmem.errors import CheckpointError
from lowmem.mapping import Link, Region, whole
from lowmem.planner import LoadPlan, StreamRequest, make_stream_plan, moves
from lowmem.planner.moves import bytes_to_read
from lowmem.planner.records import IO
from lowmem.sizes import KIB, MIB

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(not hasattr(os, "preadv"), reason="needs positional reads"),
]
WAYS: list[IO] = ["buffered", "direct", "mmap", "auto"]


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Bytes by way, of all loads meanwhile."""
    found: Counter[str] = Counter()
    original = Ways.record

    def record(self: Ways, device: int, way: Any, nbytes: int, seconds: float, *, cached: bool) -> None:
        found[way] += nbytes
        original(self, device, way, nbytes, seconds, cached=cached)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ways, "record", record)
        yield found


@contextmanager
def routed(route: str) -> Iterator[None]:
    """Small files read as large ones are: each run by a call, directly, or through many small windows."""
    with pytest.MonkeyPatch.context() as patch:
        if route == "calls":
            patch.setattr(reading, "_LONG", 1)
            patch.setattr(reading, "_AHEAD", 3)
        elif route == "direct":
            patch.setattr(reading, "LEAST_DIRECT", 1)
            patch.setattr("lowmem.engine.ways.LEAST_DIRECT", 1)
        elif route == "windows":
            patch.setattr(reading, "_WINDOW", 700)
        elif route == "far":
            patch.setattr(reading, "_FAR", 150)
        yield


ROUTES = ["", "calls", "direct", "windows", "far"]


@st.composite
def slices(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[slice, ...]]:
    """A shape and a slice of it that is not empty."""
    most = {2: 300, 3: 40, 4: 14}
    shape = tuple(draw(st.lists(st.integers(1, 12), min_size=1, max_size=3)))
    shape = (*shape, draw(st.integers(1, most[len(shape) + 1])))
    index = []
    for n in shape:
        begin = draw(st.integers(0, n - 1))
        index.append(slice(begin, draw(st.integers(begin + 1, n)), draw(st.sampled_from([1, 1, 1, 2, 3]))))
    return shape, tuple(index)


def is_in_long_runs(shape: tuple[int, ...], index: tuple[slice, ...], size: int) -> bool:
    """Whether each row has 32 bytes or more that lie together."""
    taken = range(shape[-1])[index[-1]]
    return taken.step == 1 and len(taken) * size >= 32


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    made=slices(),
    dtype=st.sampled_from(FLOATS + OTHERS),
    final=st.sampled_from(["auto", "auto", "float32", "bfloat16"]),
    place=st.sampled_from(["whole", "dense part", "strided part"]),
    disk=st.booleans(),
    io=st.sampled_from(WAYS),
    route=st.sampled_from(ROUTES),
    chunk=st.sampled_from([64, 1000, 4 * MIB, 4 * MIB]),
    pad=st.integers(0, 3),
)
def test_slices_arrive_and_nothing_else_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    made: tuple[tuple[int, ...], tuple[slice, ...]],
    dtype: str,
    final: str,
    place: str,
    disk: bool,
    io: IO,
    route: str,
    chunk: int,
    pad: int,
) -> None:
    shape, index = made
    folder = tmp_path_factory.mktemp("slices")
    tensor = some(dtype, shape, 7)
    save_file({"x" * pad: torch.zeros(pad, dtype=torch.uint8), "y": tensor}, folder / "a.safetensors")
    checkpoint = inspect(folder / "a.safetensors")
    wanted, entry = tensor[index], part_of(checkpoint["y"], torch.empty_like(tensor, device="meta")[index])
    target, links = into(wanted, entry, place)
    model = nn.Module()
    model.inner = nn.Module()
    floats = target.is_floating_point() or target.is_complex()
    model.inner.register_parameter("t", nn.Parameter(torch.empty_like(target, device="meta"), requires_grad=floats))
    options: dict[str, Any] = {"dtype": final, "io": io, "residency": "copy"}
    if disk:
        options.update(device_map={"": "cpu", "inner": "disk"}, offload_folder=folder / "off")
    drop(folder / "a.safetensors")
    with routed(route), counting() as read, pytest.MonkeyPatch.context() as patch:
        patch.setattr(moves, "CHUNK", chunk)
        found = values_of(*(loaded := load(checkpoint, model, mapping_of(links), **options)))
        check_bytes(loaded[1], read, chunk)
    cast = final != "auto" and target.is_floating_point()
    assert same(found["inner.t"], target.to(getattr(torch, final)) if cast else target)
    if is_in_long_runs(shape, index, tensor.itemsize):
        assert bytes_to_read(entry) <= wanted.numel() * tensor.itemsize * 1.02


def into(wanted: torch.Tensor, entry: Any, place: str) -> tuple[torch.Tensor, list[Link]]:
    """The slice as all of a tensor, or twice in one: one part behind the other, or side by side."""
    if place == "whole":
        return torch.empty(wanted.shape, dtype=wanted.dtype).copy_(wanted), [
            Link(entry, "inner.t", whole(tuple(wanted.shape)), whole=False)
        ]
    dim = 0 if place == "dense part" else wanted.dim() - 1
    target = torch.cat([wanted, wanted], dim)
    parts = torch.empty_like(target, device="meta").chunk(2, dim)
    return target, [Link(entry, "inner.t", region_of(part), whole=False) for part in parts]


def check_bytes(plan: LoadPlan, read: Counter[str], chunk: int) -> None:
    """What was read is what was planned, in moves that fit."""
    planned = list(plan.moves())
    assert sum(read.values()) == sum(move.nbytes for move in planned) <= plan.bytes_read
    if chunk == 4 * MIB:
        assert sum(read.values()) == plan.bytes_read
    for move in planned:
        assert move.nbytes <= max(chunk, 16)
        assert move.scratch <= plan.staging.each
        assert move.spread is None or move.spread.count == move.nbytes
    for one in plan.reads():
        assert len(one.moves) == 1 or all(move.spread is None for move in one.moves)


@pytest.mark.parametrize("io", WAYS)
@pytest.mark.parametrize("ranks", [4, 64])
def test_each_rank_reads_its_columns_straight_into_their_place(tmp_path: Path, ranks: int, io: IO) -> None:
    file = tmp_path / "weight"
    weight = torch.arange(2048 * 4096).view(2048, 4096).to(torch.bfloat16)
    file.write_bytes(weight.view(torch.uint8).numpy().tobytes())
    for rank, part in enumerate(weight.chunk(ranks, 1)[:4]):
        checkpoint = checkpoint_of(file, [entry_of("w", part, file)])
        plan, _ = make_stream_plan(checkpoint, StreamRequest(io=io))
        assert plan.bytes_read == part.nbytes
        assert not plan.placements[0].is_staged
        assert all(move.scratch == 0 and move.source is None for move in plan.moves())
        assert len(list(plan.moves())) == max(1, part.nbytes // moves.CHUNK)
        with counting() as read:
            assert torch.equal(read_all(checkpoint, io=io)["w"], part), rank
        assert sum(read.values()) == part.nbytes


def test_a_buffer_holds_what_is_read_and_no_gaps(tmp_path: Path) -> None:
    file = tmp_path / "weight"
    weight = torch.randn(2048, 2048)
    file.write_bytes(weight.numpy().tobytes())
    part = weight[:, 512:1024]
    checkpoint = checkpoint_of(file, [entry_of("w", part, file)])
    plan, _ = make_stream_plan(checkpoint, StreamRequest(dtype="bfloat16", staging=8 * MIB))
    assert len(list(plan.moves())) <= 1 + part.nbytes // (plan.staging.each - 8 * KIB)
    assert torch.equal(read_all(checkpoint, dtype="bfloat16", staging=8 * MIB)["w"], part.bfloat16())


@pytest.mark.parametrize(
    ("view", "share"),
    [
        (lambda t: t[:, ::2], 1.0),
        (lambda t: t[:, :8], 8 / 512),
        (lambda t: t[:, 3], 1 / 512),
        (lambda t: t[:, :504], 1.0),
        (lambda t: t[:, :500], 500 / 512),
        (lambda t: t.t()[:, 4:], 1.0),
        (lambda t: t.t()[128:256], 1 / 4),
    ],
)
def test_gaps_are_skipped_where_that_saves_something(tmp_path: Path, view: Any, share: float) -> None:
    """Not those of a cache line, which comes whole; and not a fiftieth."""
    part = view(torch.empty(256, 512, dtype=torch.bfloat16))
    got = bytes_to_read(entry_of("w", part, tmp_path)) / (256 * 512 * 2)
    assert share * 0.98 <= got <= share


def test_what_is_packed_is_unpacked_with_its_gaps(tmp_path: Path) -> None:
    raw = torch.randn(100, 200)
    packed = deflated(raw.numpy().tobytes())
    file = tmp_path / "storage"
    file.write_bytes(packed)
    begin = len(packed) + -len(packed) % 64
    entry = entry_of("w", raw[:, 50:100], file, begin, packed=True)
    found = read_all(checkpoint_of(file, [entry], (Packed(begin, raw.nbytes, 0, len(packed), "deflate", None),)))
    assert bytes_to_read(entry) == entry.nbytes
    assert torch.equal(found["w"], raw[:, 50:100])


def test_big_endian_columns_are_swapped(tmp_path: Path) -> None:
    values = np.arange(10_000, dtype=">f4").reshape(50, 200)
    file = tmp_path / "storage"
    file.write_bytes(values.tobytes())
    tensor = torch.from_numpy(values.astype("f4"))[:, 60:120]
    checkpoint = checkpoint_of(file, [entry_of("w", tensor, file, swapped=True)])
    assert make_stream_plan(checkpoint, StreamRequest())[0].bytes_read == tensor.numel() * 4
    assert torch.equal(read_all(checkpoint)["w"], tensor)


# -- the reader


SPREAD = Region(0, (40, 64), (1000, 1))


@contextmanager
def reader_of(path: Path, io: IO, **options: Any) -> Iterator[ShardReader]:
    with closing(ShardReader(shard_of(path), Ways(io), direct=True, **options)) as reader:
        yield reader


@pytest.mark.parametrize("io", WAYS)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("size", [0, 20_000, 38_900, 39_070])
def test_a_file_that_was_truncated_is_an_error(tmp_path: Path, io: IO, route: str, size: int) -> None:
    path = tmp_path / "shard"
    path.write_bytes(bytes(40_000))
    drop(path)
    with routed(route), reader_of(path, io) as reader:
        os.truncate(path, size)
        with pytest.raises(CheckpointError, match=r"shard: ended at byte \d+, expected \d+ bytes more"):
            reader.fill([memoryview(bytearray(SPREAD.count))], 11, memoryview(mmap.mmap(-1, MIB)), None, SPREAD)


def can_populate() -> bool:
    try:
        mmap.mmap(-1, mmap.PAGESIZE).madvise(reading._POPULATE)
    except (OSError, ValueError, AttributeError):
        return False
    return True


@pytest.mark.skipif(not can_populate(), reason="needs Linux 5.14")
def test_a_file_truncated_after_it_was_mapped_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "shard"
    path.write_bytes(bytes(40_000))
    original = mmap.mmap

    def late(*arguments: Any, **options: Any) -> Any:
        pages = original(*arguments, **options)
        os.truncate(path, 10_000)
        return pages

    with reader_of(path, "auto") as reader:
        monkeypatch.setattr(reading.mmap, "mmap", late)
        with pytest.raises(CheckpointError, match="ended at byte 0"):
            reader.fill([memoryview(bytearray(SPREAD.count))], 0, None, None, SPREAD)


@needs_cold
@pytest.mark.parametrize("io", ["buffered", "mmap", "auto"])
@pytest.mark.parametrize("route", ["", "calls", "windows"])
def test_pages_that_were_not_cached_are_given_back(tmp_path: Path, io: IO, route: str) -> None:
    path = tmp_path / "shard"
    content = random.Random(1).randbytes(MIB)
    path.write_bytes(content)
    drop(path)
    spread = Region(0, (100, 64), (10_000, 1))
    got = bytearray(spread.count)
    with routed(route), reader_of(path, io, keep_cache=False) as reader:
        reader.fill([memoryview(got)], 5, None, None, spread)
    assert bytes(got) == b"".join(content[5 + 10_000 * i :][:64] for i in range(100))
    assert not any(resident(path))


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.ENODEV])
@pytest.mark.parametrize("io", WAYS)
def test_where_nothing_can_be_mapped_each_run_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, io: IO, code: int
) -> None:
    """A limit on address space, or a file system that refuses."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    path = tmp_path / "shard"
    content = random.Random(1).randbytes(40_000)
    path.write_bytes(content)
    got = bytearray(SPREAD.count)
    with reader_of(path, io) as reader, counting() as read:
        monkeypatch.setattr(reading.mmap, "mmap", refuse)
        for _ in range(2):
            reader.fill([memoryview(got)], 3, None, None, SPREAD)
    assert bytes(got) == b"".join(content[3 + 1000 * i :][:64] for i in range(40))
    assert read == {"buffered": 2 * SPREAD.count}


def test_what_is_read_does_not_depend_on_where_it_goes(tmp_path: Path) -> None:
    """Rows that lie alike in the file go apart."""
    numbers = torch.arange(4 * 20 * 3, dtype=torch.bfloat16)
    save_file({"y": numbers}, tmp_path / "a.safetensors")
    checkpoint = inspect(tmp_path / "a.safetensors")
    view = torch.empty_like(numbers, device="meta")[::2].view(12, 10)
    target, links = into(numbers[::2].view(12, 10), part_of(checkpoint["y"], view), "strided part")
    model = nn.Module()
    model.inner = nn.Module()
    model.inner.register_parameter("t", nn.Parameter(torch.empty_like(target, device="meta")))
    with counting() as read:
        found = values_of(*(loaded := load(checkpoint, model, mapping_of(links), residency="copy")))
        check_bytes(loaded[1], read, 4 * MIB)
    assert same(found["inner.t"], target)
