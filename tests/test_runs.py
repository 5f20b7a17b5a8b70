"""Neighbours are read together: a run of small tensors costs one call, and reads cover the moves exactly."""

from __future__ import annotations

import itertools
import os
import random
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from cold_files import drop, needs_direct, patched
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_models import same
from torch import nn

import lowmem
from lowmem.checkpoint import Checkpoint, TensorEntry
from lowmem.dtypes import itemsize
from lowmem.errors import BudgetError
from lowmem.mapping import KeyMapping, Link, Region, whole
from lowmem.planner import LoadPlan, Placement, budget, moves
from lowmem.planner.budget import Need
from lowmem.planner.moves import ALIGNMENT, BLOCK, CHUNK, LEAST_DIRECT
from lowmem.planner.records import IO, HostPlan, Staging
from lowmem.sizes import KIB, MIB

pytestmark = pytest.mark.timeout(180)
needs_preadv = pytest.mark.skipif(not hasattr(os, "preadv"), reason="needs positional reads")
counted = contextmanager(patched)
COUNT = 5000


# -- few calls


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5,000 tensors of 0.4 to 2 KiB in one file, some 6 MiB."""
    path = tmp_path_factory.mktemp("runs") / "small.safetensors"
    save_file({f"n{n:04d}": torch.full((100 + n * 7 % 400,), float(n)) for n in range(COUNT)}, path)
    return path


class Many(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for n in range(COUNT):
            self.register_parameter(f"n{n:04d}", nn.Parameter(torch.empty(100 + n * 7 % 400, device="meta")))


def calls(seen: Any, path: Path) -> int:
    return sum(name == str(path.resolve()) for name, *_ in seen.calls)


def check_values(model: nn.Module, dtypes: tuple[torch.dtype, ...]) -> None:
    for n, (_, parameter) in enumerate(model.named_parameters()):
        expected = torch.full(parameter.shape, float(n)).to(parameter.dtype)
        assert parameter.dtype in dtypes
        assert same(parameter, expected)


@needs_preadv
@pytest.mark.parametrize(("dtype", "staging"), [("auto", None), ("bfloat16", None), ("float64", MIB)])
def test_small_neighbours_are_read_in_few_calls(small: Path, dtype: str, staging: int | None) -> None:
    total = lowmem.inspect(small).nbytes
    with counted() as seen:
        model = lowmem.load(small, model=Many, residency="copy", dtype=dtype, staging=staging, io="buffered").model
    assert 0 < calls(seen, small) <= total // (100 * KIB) + 2
    check_values(model, (torch.float32 if dtype == "auto" else getattr(torch, dtype),))


@needs_preadv
def test_gaps_between_mapped_ones_are_read_no_more_than_once_each(small: Path) -> None:
    """Every tenth is cast, nine neighbours are; the rest is mapped and not read."""
    with counted() as seen:
        result = lowmem.load(small, model=Many, dtype="bfloat16", keep_fp32=["*0"], io="buffered")
    mapped = [p for p in result.plan.placements if p.residency == "map"]
    assert len(mapped) == COUNT // 10
    assert calls(seen, small) <= COUNT // 10 + 2
    assert sum(got for *_, got in seen.calls) == result.plan.bytes_read
    check_values(result.model, (torch.float32, torch.bfloat16))


@needs_preadv
@pytest.mark.parametrize("dtype", ["auto", "float64"])
def test_a_stream_reads_runs_too_and_what_was_not_asked_for_is_not_read(small: Path, dtype: str) -> None:
    checkpoint = lowmem.inspect(small)
    with counted() as seen:
        assert len(list(lowmem.stream(small, dtype=dtype, io="buffered"))) == COUNT
    assert calls(seen, small) <= checkpoint.nbytes // (100 * KIB) + 2
    with counted() as seen:
        every_second = dict(lowmem.stream(small, dtype=dtype, io="buffered", only=lambda key: int(key[1:]) % 2 == 0))
    assert len(every_second) == COUNT // 2
    assert sum(got for *_, got in seen.calls) == sum(checkpoint[key].nbytes for key in every_second)
    assert calls(seen, small) <= COUNT // 2 + 1


def test_a_run_is_no_more_buffers_than_the_kernel_takes_at_once(small: Path) -> None:
    reads = list(lowmem.plan(small, model=Many, residency="copy").reads())
    assert max(len(read.moves) for read in reads) == 512
    assert len(reads) == -(-COUNT // 512)


@needs_direct
def test_runs_are_read_directly_too(small: Path) -> None:
    drop(small)
    result = lowmem.load(small, model=Many, residency="copy", dtype="bfloat16", io="direct")
    assert result.report.read["direct"] >= result.plan.bytes_read * 9 // 10
    check_values(result.model, (torch.bfloat16,))


# -- reads are the moves


@st.composite
def plans(draw: Any) -> LoadPlan:
    """Made by hand: two files with gaps, all kinds of sources, and placements fed from one place or from several."""
    entries: list[list[TensorEntry]] = []
    for number in range(2):
        at = draw(st.integers(8, 9000))
        files = []
        for n in range(draw(st.integers(0, 8))):
            at += draw(st.sampled_from([0, 0, 0, 2, 7, 4096]))
            dtype = draw(st.sampled_from(["float32", "bfloat16", "float8_e5m2", "float64"]))
            count = draw(st.one_of(st.integers(0, 300), st.integers(1, 3 * MIB)))
            size = count * itemsize(dtype)
            files.append(TensorEntry(f"{number}.{n}", dtype, (count,), Path(f"/shard-{number}"), at, size))
            at += size
        entries.append(files)
    placements = []
    for files in entries:
        left = list(files)
        while left:
            take = draw(st.sampled_from([1, 1, 1, 2]))
            group, left = left[:take], left[take:]
            group = [entry for entry in group if entry.dtype == group[0].dtype]
            count = sum(entry.shape[0] for entry in group)
            links, begin = [], 0
            for entry in group:
                region = whole(entry.shape) if len(group) == 1 else Region(begin, entry.shape, (1,))
                links.append(Link(entry, group[0].key, region))
                begin += entry.shape[0]
            dtype = draw(st.sampled_from([group[0].dtype, "bfloat16", "float64"]))
            residency = draw(st.sampled_from(["copy", "copy", "copy", "map"]))
            placements.append(
                Placement(
                    group[0].key,
                    (group[0].key,),
                    (count,),
                    dtype,
                    count * itemsize(dtype),
                    "cpu",
                    residency,
                    tuple(links),
                )
            )
    moved = [p for p in placements if p.residency == "copy"]
    io: IO = draw(st.sampled_from(["direct", "mmap"]))
    share = draw(st.sampled_from([0.0, 0.6, 1.0]))
    need = budget.needs_of(moved, io, lambda file: share, free_address_space=draw(st.booleans()))
    staging = budget.fit_staging(draw(st.integers(0, 20 * MIB)), draw(st.integers(MIB, 20 * MIB)), need)
    table = {entry.key: entry for files in entries for entry in files}
    shards = tuple(shard_at(Path(f"/shard-{n}")) for n in range(2))
    checkpoint = Checkpoint("/", Path("/"), shards, table)
    host = HostPlan(0, 0, 0, 0, 0, 1 << 40, "test", 1 << 40)
    mapping = KeyMapping((), {}, {}, (), (), (), (), ())
    return LoadPlan(checkpoint, mapping, {"": "cpu"}, tuple(placements), None, staging, {}, host, "cpu")


def shard_at(path: Path) -> Any:
    from lowmem.checkpoint import Shard

    return Shard(path, 1 << 40, 0, 8, {})


@settings(max_examples=80, deadline=None)
@given(plan=plans(), most=st.one_of(st.none(), st.integers(1, 8 * MIB)))
def test_reads_are_the_moves_in_runs(plan: LoadPlan, most: int | None) -> None:
    moves, reads = list(plan.moves()), list(plan.reads(most))
    assert [move for read in reads for move in read.moves] == moves
    assert sum(read.nbytes for read in reads) == plan.bytes_read
    for read in reads:
        assert read.nbytes == sum(move.nbytes for move in read.moves) <= CHUNK
        assert read.offset == read.moves[0].offset
        assert len(read.moves) <= 512
        at = read.offset
        for move in read.moves:
            assert (move.file, move.offset) == (read.file, at)
            assert move.nbytes > 0
            at += move.nbytes
        assert sum(move.scratch for move in read.moves) <= plan.staging.each
        if len(read.moves) > 1:
            assert read.nbytes <= (most or CHUNK)
            # With a bound, a part of a tensor is read alone.
            assert most is None or all(move.nbytes == move.placement.source_bytes for move in read.moves)


@settings(max_examples=60, deadline=None)
@given(plan=plans())
def test_neighbours_that_fit_together_are_together(plan: LoadPlan) -> None:
    reads = list(plan.reads())
    for one, other in itertools.pairwise(reads):
        whole_ones = all(m.nbytes == m.placement.source_bytes for m in (*one.moves, *other.moves))
        touching = one.file == other.file and one.offset + one.nbytes == other.offset
        first = other.moves[0]
        room = sum(m.scratch for m in one.moves) + first.scratch <= plan.staging.each
        assert not (whole_ones and touching and room and one.nbytes + first.nbytes <= CHUNK)


@settings(max_examples=80, deadline=None)
@given(plan=plans())
def test_moves_cover_what_is_fed_once_and_are_cut_where_direct_reads_can_begin(plan: LoadPlan) -> None:
    covered: dict[tuple[Path, int], int] = {}
    for move in plan.moves():
        covered[move.file, move.offset] = move.nbytes
        assert move.nbytes % itemsize(move.dtype) == 0
        assert move.region.count * itemsize(move.dtype) == move.nbytes
        assert move.nbytes <= CHUNK
        assert bool(move.scratch) == move.placement.is_staged
        assert move.scratch % ALIGNMENT == 0
        if move.scratch and move.nbytes >= LEAST_DIRECT:
            # The bytes, with one end where the file has it, and the other aligned for the cast.
            assert move.scratch >= move.nbytes + BLOCK
    for placement in plan.placements:
        if placement.residency != "copy":
            continue
        for link in placement.links:
            at, end = link.entry.offset, link.entry.end
            while at < end:
                # Every cut but the first and the last is at a block, where elements allow it.
                size = covered.pop((link.entry.file, at))
                at += size
                assert at == end or at % BLOCK == 0 or link.entry.offset % itemsize(link.entry.dtype) or size <= BLOCK
            assert at == end
    assert not covered


@settings(max_examples=200, deadline=None)
@given(
    room=st.integers(0, 100 * MIB),
    wanted=st.one_of(st.none(), st.integers(MIB, 100 * MIB)),
    need=st.one_of(st.just(0), st.integers(1, 20 * MIB)),
    direct=st.booleans(),
    workers=st.integers(1, 8),
)
def test_buffers_stay_within_what_there_is(
    room: int, wanted: int | None, need: int, direct: bool, workers: int
) -> None:
    staging = budget.fit_staging(room, wanted, Need(need, direct, workers))
    assert 1 <= staging.workers <= workers
    assert staging.total <= max(MIB if need else 0, min(room, wanted or 64 * MIB))
    assert staging.bounce % BLOCK == staging.each % ALIGNMENT == 0
    assert staging.bounce == 0 or direct
    assert staging.each <= need
    assert not need or staging.each >= min(need, 448 * KIB) - ALIGNMENT


# -- hostile orders


@pytest.mark.parametrize("workers", [1, 4])
def test_sizes_in_any_order_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """Small and large, staged and not, by turns, and every buffer as small as it may be."""
    monkeypatch.setattr(budget, "workers_here", lambda: workers)
    monkeypatch.setattr(moves, "CHUNK", 64 * KIB)
    rng = random.Random(workers)
    made = {
        f"t{n:03d}{'k' if n % 3 else ''}": torch.full((rng.choice([1, 3, 500, 20_000, 70_001]),), n, dtype=torch.int16)
        for n in range(120)
    }
    made = {key: value.view(torch.bfloat16) for key, value in made.items()}
    save_file(made, tmp_path / "m.safetensors")

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, tensor in made.items():
                self.register_parameter(name, nn.Parameter(torch.empty(tensor.shape, device="meta").bfloat16()))

    for options in ({"keep_fp32": ["*k"]}, {"keep_fp32": ["*k"], "residency": "copy"}, {"dtype": "float32"}):
        model = lowmem.load(tmp_path / "m.safetensors", model=Bag, staging=MIB, **options).model
        for name, parameter in model.named_parameters():
            assert same(parameter, made[name].to(parameter.dtype))


def test_a_budget_of_nothing_is_refused_and_not_looped_over(small: Path) -> None:
    with pytest.raises(BudgetError):
        lowmem.load(small, model=Many, residency="copy", ram=MIB)


@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize("wanted", [MIB, 16 * MIB, 64 * MIB])
def test_a_cast_leaves_room_for_direct_reads(workers: int, wanted: int) -> None:
    staging = budget.fit_staging(1 << 40, wanted, Need(12 * MIB, True, workers))
    assert staging.bounce >= 64 * KIB
    assert staging.each >= 448 * KIB
    assert budget.fit_staging(1 << 40, wanted, Need(12 * MIB, False, workers)).bounce == 0


@pytest.mark.parametrize("room", [0, 40 * KIB, 64 * KIB, 500 * KIB, 16 * MIB])
def test_few_readers_that_read_directly_are_better_than_many_that_cannot(room: int) -> None:
    staging = budget.fit_staging(room, None, Need(0, True, 8))
    assert (staging.bounce > 0) is (room >= 64 * KIB)
    assert staging.workers == min(8, max(1, room // (64 * KIB)))


def test_staging_counts_every_buffer() -> None:
    assert Staging(3, 1000, 24).total == 3072
