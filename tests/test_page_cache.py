"""A load leaves the page cache as it found it, or as it was told to."""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from cold_files import PAGE, drop, needs_cold, patched, resident, wait_until, warm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import lowmem
from lowmem import _page_cache as page_cache
from lowmem._page_cache import CachedPages, cached_share, give_back, look, read_ahead
from lowmem.limits import HostMemory
from lowmem.planner import plan as planning
from lowmem.planner.records import IO
from lowmem.sizes import MIB

pytestmark = [pytest.mark.timeout(180), needs_cold]
# Pages that the kernel may keep or bring by itself: a block of several at each end, and the header.
FEW = 40
counted = contextmanager(patched)
# What the kernel's counter says, if there is one; on overlayfs it is zero whatever is cached.
COUNTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "the truth": lambda patch: None,
    "nothing": lambda patch: patch.setattr(page_cache, "_count_cached", lambda fd, size: None),
    "zero": lambda patch: patch.setattr(page_cache, "_count_cached", lambda fd, size: 0),
}


class Rows(nn.Module):
    """16 MiB as fp32 in tensors whose ends lie on no pages."""

    def __init__(self, count: int = 6) -> None:
        super().__init__()
        for number in range(count):
            self.register_parameter(f"r{number}", nn.Parameter(torch.empty(700_001, device="meta")))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "rows.safetensors"
    generator = torch.Generator().manual_seed(1)
    save_file({f"r{n}": torch.randn(700_001, generator=generator) for n in range(6)}, path)
    drop(path)
    return path


def look_at(path: Path) -> CachedPages:
    with path.open("rb") as opened:
        return look(opened.fileno(), path.stat().st_size)


def holds(pages: list[bool], offset: int, nbytes: int) -> bool:
    """The naive model."""
    touched = pages[offset // PAGE : -(-(offset + nbytes) // PAGE)]
    return 2 * sum(touched) >= len(touched)


def absent(pages: list[bool], offset: int, nbytes: int) -> list[int]:
    """The numbers of the pages that the range touches and that were not there."""
    if nbytes <= 0:
        return []
    return [n for n in range(offset // PAGE, -(-(offset + nbytes) // PAGE)) if n < len(pages) and not pages[n]]


def check_model(found: CachedPages, pages: list[bool], offset: int, nbytes: int) -> None:
    assert found.holds(offset, nbytes) == holds(pages, offset, nbytes)
    runs = list(found.absent(offset, nbytes))
    assert all(begin % PAGE == length % PAGE == 0 < length for begin, length in runs)
    numbers = [n for begin, length in runs for n in range(begin // PAGE, (begin + length) // PAGE)]
    assert [n for n in numbers if n < len(pages)] == absent(pages, offset, nbytes)
    # Maximal: no run begins where another ends.
    assert not {begin for begin, _ in runs} & {begin + length for begin, length in runs}


# -- looking


@settings(max_examples=100, deadline=None)
@given(data=st.data(), pages=st.lists(st.booleans(), min_size=1, max_size=70))
def test_what_is_told_of_a_range_is_what_the_pages_say(data: st.DataObject, pages: list[bool]) -> None:
    import numpy as np

    size = len(pages) * PAGE - data.draw(st.integers(0, PAGE - 1))
    offset = data.draw(st.integers(0, size - 1))
    nbytes = data.draw(st.integers(1, size - offset))
    check_model(CachedPages(np.array(pages), len(pages)), pages, offset, nbytes)
    for whole in (False, True):
        check_model(CachedPages(whole, len(pages)), [whole] * len(pages), offset, nbytes)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    gone=st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 400)), max_size=4),
    ranges=st.lists(st.tuples(st.integers(0, 8 * MIB - 1), st.integers(1, 2 * MIB)), min_size=1, max_size=5),
)
def test_looking_finds_what_mincore_finds(
    tmp_path_factory: pytest.TempPathFactory, gone: list[tuple[int, int]], ranges: list[tuple[int, int]]
) -> None:
    path = tmp_path_factory.mktemp("look") / "x"
    path.write_bytes(bytes(8 * MIB + 17))
    for first, count in gone:
        drop(path, first * PAGE, count * PAGE)
    pages = resident(path)
    found = look_at(path)
    assert found.everything == all(pages)
    for offset, nbytes in ranges:
        check_model(found, pages, offset, min(nbytes, 8 * MIB + 17 - offset))
    assert resident(path) == pages  # looking brings nothing in


@pytest.mark.parametrize("counts", COUNTS)
def test_looking_at_all_and_at_nothing(file: Path, monkeypatch: pytest.MonkeyPatch, counts: str) -> None:
    COUNTS[counts](monkeypatch)
    warm(file)
    assert look_at(file).everything
    assert list(look_at(file).absent(0, file.stat().st_size)) == []
    drop(file)
    found = look_at(file)
    assert not found.everything
    assert not found.holds(0, file.stat().st_size)
    assert not any(resident(file))


@pytest.mark.parametrize("counts", COUNTS)
def test_the_share_that_is_cached(file: Path, monkeypatch: pytest.MonkeyPatch, counts: str) -> None:
    COUNTS[counts](monkeypatch)
    drop(file)
    assert cached_share(file) == 0
    warm(file)
    assert cached_share(file) == 1
    drop(file, 0, 4 * MIB)
    pages = resident(file)
    assert 0.6 < sum(pages) / len(pages) < 0.9
    assert cached_share(file) == pytest.approx(sum(pages) / len(pages), abs=1 / len(pages))


def test_an_empty_file_is_there(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    assert look_at(tmp_path / "x").everything
    assert cached_share(tmp_path / "x") == 1


def test_a_file_that_cannot_be_opened_counts_as_there(tmp_path: Path) -> None:
    """Whoever reads it says what is wrong."""
    assert cached_share(tmp_path / "none") == 1


def test_where_the_system_cannot_say_everything_counts_as_there(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "libc", lambda: None)
    drop(file)
    assert look_at(file).everything


def test_pages_that_are_mapped_stay(tmp_path: Path) -> None:
    import mmap

    path = tmp_path / "x"
    path.write_bytes(bytes(4 * MIB))
    drop(path)
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as view:
        assert view[2 * MIB] == 0
        warm(path)
        give_back(opened.fileno(), 0, 4 * MIB)
        assert resident(path)[2 * MIB // PAGE]


# -- copying


def leaves(path: Path, action: Callable[[], object]) -> int:
    """Pages of the cold file that `action` leaves in the cache.

    The least of several: what the kernel is reading ahead when the file is closed cannot be given back.
    """
    found = []
    for _ in range(20):
        drop(path)
        action()
        found.append(sum(resident(path)))
        if found[-1] <= FEW:
            break
    return min(found)


def load(path: Path, **options: Any) -> lowmem.LoadResult:
    result = lowmem.load(path, model=Rows, **{"residency": "copy", **options})
    assert torch.isfinite(result.model.get_parameter("r5").float()).all()
    return result


@pytest.mark.parametrize("io", ["auto", "buffered", "mmap"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_what_a_copy_read_is_given_back(file: Path, io: IO, dtype: str) -> None:
    assert leaves(file, lambda: load(file, io=io, dtype=dtype)) <= FEW


@pytest.mark.parametrize("io", ["buffered", "mmap"])
def test_keep_cache_leaves_what_a_copy_read(file: Path, io: IO) -> None:
    drop(file)
    load(file, io=io, keep_cache=True)
    assert sum(not page for page in resident(file)) <= FEW


@pytest.mark.parametrize("io", ["auto", "buffered", "mmap"])
def test_what_was_there_before_stays(file: Path, io: IO) -> None:
    warm(file)
    load(file, io=io)
    assert all(resident(file))


@pytest.mark.parametrize("io", ["auto", "buffered", "mmap"])
def test_of_a_file_that_was_there_in_part_that_part_stays(file: Path, io: IO) -> None:
    """In one of several loads: the kernel reads ahead by itself, and where it keeps many pages as one (a large folio),
    neighbours of what is given back go with it.
    """
    for _ in range(20):
        warm(file)
        drop(file, 3 * MIB, 4 * MIB)
        before = resident(file)
        assert 0 < sum(before) < len(before)
        load(file, io=io)
        pairs = list(zip(resident(file), before, strict=True))
        more, gone = sum(now and not then for now, then in pairs), sum(then and not now for now, then in pairs)
        if more <= FEW and not gone:
            return
    pytest.fail(f"{more} pages more than before the load, {gone} fewer")


def test_a_load_to_disk_gives_back_what_it_read(file: Path, tmp_path: Path) -> None:
    folders = itertools.count()

    def write() -> None:
        folder = tmp_path / str(next(folders))
        lowmem.load(file, model=Rows, dtype="bfloat16", device_map="disk", offload_folder=folder, io="buffered")

    assert leaves(file, write) <= FEW


def test_a_stream_gives_back_and_keeps_too(file: Path) -> None:
    assert leaves(file, lambda: list(lowmem.stream(file, io="buffered"))) <= FEW
    assert len(list(lowmem.stream(file, io="buffered", keep_cache=True))) == 6
    assert sum(not page for page in resident(file)) <= FEW


def test_a_stream_that_ends_early_gives_back(file: Path) -> None:
    def begin() -> None:
        made = lowmem.stream(file, io="buffered", staging=MIB)
        next(made)
        made.close()

    assert leaves(file, begin) <= FEW


def test_a_load_that_fails_gives_back(file: Path) -> None:
    def stop(progress: lowmem.Progress) -> None:
        raise ZeroDivisionError

    def fail() -> None:
        with pytest.raises(ZeroDivisionError):
            load(file, io="buffered", progress=stop)

    assert leaves(file, fail) <= FEW


# -- comparing


class Pair(nn.Module):
    """8 MiB as fp32, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(2 * MIB, device="meta"))
        self.b = self.a


@pytest.fixture
def twice(tmp_path: Path) -> Path:
    """Tied tensors that differ only at their end, so that all is read and nothing is loaded."""
    values = torch.ones(2 * MIB)
    save_file({"a": values, "b": torch.cat([values[:-1], values[:1] + 1])}, tmp_path / "twice.safetensors")
    return tmp_path / "twice.safetensors"


def compare(path: Path, **options: Any) -> None:
    with pytest.raises(lowmem.KeysError, match="differ, and the model ties them"):
        lowmem.load(path, model=Pair, **options)


def test_a_comparison_of_tied_tensors_gives_back_what_it_read(twice: Path) -> None:
    assert leaves(twice, lambda: compare(twice)) <= FEW
    values = torch.ones(2 * MIB)
    save_file({"a": values, "b": values.clone()}, twice)
    assert leaves(twice, lambda: lowmem.load(twice, model=Pair)) <= FEW
    assert leaves(twice, lambda: lowmem.load(twice, model=Pair, residency="copy", io="buffered")) <= FEW


def test_a_comparison_of_tied_tensors_leaves_what_was_there_and_what_it_is_told_to(twice: Path) -> None:
    drop(twice)
    compare(twice, keep_cache=True)
    assert sum(not page for page in resident(twice)) <= FEW
    warm(twice)
    drop(twice, MIB, 2 * MIB)
    before = resident(twice)
    assert 0 < sum(before) < len(before)
    compare(twice)
    assert all(now for now, then in zip(resident(twice), before, strict=True) if then)
    warm(twice)
    compare(twice)
    assert all(resident(twice))


def test_tied_tensors_in_two_shards_are_given_back_too(tmp_path: Path) -> None:
    paths = []
    for name in "ab":
        paths.append(tmp_path / f"model-{name}.safetensors")
        save_file({name: torch.ones(2 * MIB)}, paths[-1])
        drop(paths[-1])
    write_index(tmp_path)
    assert leaves(paths[0], lambda: lowmem.load(tmp_path, model=Pair)) <= FEW
    assert leaves(paths[1], lambda: lowmem.load(tmp_path, model=Pair)) <= FEW


# -- mapping


def dropped_by(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What is told to go from now on."""
    calls: list[tuple[int, int]] = []
    original = os.posix_fadvise

    def advise(fd: int, offset: int, length: int, advice: int) -> None:
        if advice == os.POSIX_FADV_DONTNEED:
            calls.append((offset, length))
        original(fd, offset, length, advice)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    return calls


def test_a_load_that_only_maps_reads_nothing_and_drops_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drop(file)
    calls = dropped_by(monkeypatch)
    with counted() as seen:
        result = load_mapped(file)
    assert calls == []
    assert seen.calls == []
    assert sum(resident(file)) <= FEW
    warm(file)
    load_mapped(file)
    assert calls == []
    assert all(resident(file))
    assert result.report.read == {}


def load_mapped(path: Path, **options: Any) -> lowmem.LoadResult:
    return lowmem.load(path, model=Rows, **options)


def test_prefetch_brings_in_what_is_mapped(file: Path) -> None:
    drop(file)
    result = load_mapped(file, prefetch=True)
    assert result.plan.reading.prefetch == 6 * 700_001 * 4
    assert not [text for text in result.plan.warnings if "prefetch" in text]
    assert wait_until(lambda: all(resident(file)[1:]))


def write_index(folder: Path) -> None:
    table = {name: f"model-{name}.safetensors" for name in "ab"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))


def test_prefetch_leaves_what_was_copied(tmp_path: Path) -> None:
    """Of two shards, one of which is cast."""
    for name in "ab":
        save_file({name: torch.ones(MIB)}, tmp_path / f"model-{name}.safetensors")
        drop(tmp_path / f"model-{name}.safetensors")
    write_index(tmp_path)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.empty(MIB, device="meta"))
            self.b = nn.Parameter(torch.empty(MIB, device="meta"))

    result = lowmem.load(tmp_path, model=Two, dtype="bfloat16", keep_fp32=["b"], prefetch=True)
    assert {p.target: p.residency for p in result.plan.placements} == {"a": "copy", "b": "map"}
    assert wait_until(lambda: all(resident(tmp_path / "model-b.safetensors")[1:]))
    assert sum(resident(tmp_path / "model-a.safetensors")) <= FEW


def test_prefetch_bears_a_shard_of_empty_tensors(tmp_path: Path) -> None:
    save_file({"a": torch.empty(0)}, tmp_path / "model-a.safetensors")
    save_file({"b": torch.ones(5)}, tmp_path / "model-b.safetensors")
    write_index(tmp_path)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.empty(0, device="meta"))
            self.b = nn.Parameter(torch.empty(5, device="meta"))

    model: Any = lowmem.load(tmp_path, model=Two, prefetch=True).model
    assert model.b.sum() == 5


def test_prefetch_says_when_nothing_is_mapped(file: Path) -> None:
    plan = lowmem.plan(file, model=Rows, residency="copy", prefetch=True)
    assert plan.reading.prefetch == 0
    assert [text for text in plan.warnings if text.startswith("prefetch: no weight is mapped")]


def test_prefetch_asks_for_no_more_than_there_is_memory(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "host_memory", lambda: HostMemory(8 * MIB, "a test", {}))
    drop(file)
    result = load_mapped(file, prefetch=True)
    assert result.plan.reading.prefetch == 8 * MIB
    assert [text for text in result.plan.warnings if "only the first 8.00 MiB are read ahead" in text], (
        result.plan.warnings
    )
    begin = min(entry.offset for entry in result.plan.checkpoint.values())
    assert wait_until(lambda: all(resident(file)[1 : (begin + 8 * MIB) // PAGE]))
    assert not any(resident(file)[(begin + 12 * MIB) // PAGE :])


def test_prefetch_by_itself_is_off(file: Path) -> None:
    drop(file)
    assert load_mapped(file).plan.reading.prefetch == 0
    assert sum(resident(file)) <= FEW


@pytest.mark.parametrize("seed", range(3))
def test_values_are_right_whatever_is_in_the_cache(file: Path, seed: int) -> None:
    random_pages = random.Random(seed)
    for _ in range(6):
        drop(file, random_pages.randrange(16 * MIB), random_pages.randrange(4 * MIB))
    drawn = load(file).model.get_parameter("r3")
    assert torch.equal(drawn, load_mapped(file).model.get_parameter("r3"))


def test_the_read_ahead_is_that_of_the_files_device(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"x")
    device = file.stat().st_dev
    told = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    assert read_ahead(file) == (int(told.read_text()) * 1024 if told.exists() else 0)
    assert read_ahead(tmp_path / "none") == 0
