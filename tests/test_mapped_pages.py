"""Pages of mapped files are brought and let go of, and nothing that was written is lost."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cold_files import PAGE, drop, needs_cold, resident, warm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowmem import _mapped_pages as mapped_pages
from lowmem._mapped_pages import address_of, bring, holds, let_go, written
from lowmem.sizes import MIB

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's madvise and pagemap"),
]
SIZE = 4 * MIB + 321


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mapped") / "random"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


@contextmanager
def mapping(path: Path, size: int = 0) -> Iterator[tuple[mmap.mmap, int]]:
    """A private writable mapping of the file, and where it begins."""
    with path.open("rb") as opened:
        pages = mmap.mmap(opened.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    try:
        yield pages, address_of(pages)
    finally:
        pages.close()  # an error if anything of it were still held


def present(address: int, nbytes: int) -> list[bool]:
    """Page by page of all that the range touches, whether it is mapped now, by pagemap."""
    first, last = address // PAGE, -(-(address + nbytes) // PAGE)
    with Path("/proc/self/pagemap").open("rb") as pagemap:
        pagemap.seek(first * 8)
        entries = np.frombuffer(pagemap.read((last - first) * 8), dtype=np.uint64)
    return [bool(entry >> np.uint64(63)) for entry in entries]


def resident_set(address: int) -> int:
    """Bytes of the mapping that begins here that are in the resident set, by smaps."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.startswith((f"{address:x}-", f"{address:08x}-")):
            return next(int(field.split()[1]) * 1024 for field in lines if field.startswith("Rss:"))
    raise AssertionError(f"{address:x} is no mapping")


def touch(pages: mmap.mmap) -> None:
    for at in range(0, len(pages), PAGE):
        pages[at]


# -- letting go


def test_pages_that_nobody_wrote_to_leave_the_resident_set(file: Path) -> None:
    with mapping(file) as (pages, address):
        touch(pages)
        assert resident_set(address) >= SIZE // PAGE * PAGE
        assert let_go(address, SIZE)
        # Inward: what is left is the page that the end of the file shares.
        assert resident_set(address) <= PAGE
        assert pages[:] == file.read_bytes()


def test_what_was_written_survives(file: Path) -> None:
    with mapping(file) as (pages, address):
        touch(pages)
        pages[MIB + 5] ^= 255
        changed = pages[:]
        assert written(address, SIZE)
        assert not let_go(address, SIZE)
        assert all(present(address, SIZE))
        assert pages[:] == changed != file.read_bytes()


def test_a_part_without_writes_is_let_go_of_beside_one_with(file: Path) -> None:
    with mapping(file) as (pages, address):
        touch(pages)
        pages[2 * MIB] ^= 255
        changed = pages[:]
        assert let_go(address, 2 * MIB)
        assert not let_go(address + 2 * MIB, MIB)
        assert let_go(address + 2 * MIB + PAGE, SIZE - 2 * MIB - PAGE)
        assert present(address, SIZE)[2 * MIB // PAGE]
        assert sum(present(address, SIZE)) <= 2
        assert pages[:] == changed


@pytest.mark.parametrize("before", ["touched", "not touched"])
def test_one_written_byte_in_the_middle_of_64_mib_is_seen(tmp_path: Path, before: str) -> None:
    path = tmp_path / "large"
    with path.open("wb") as opened:
        opened.truncate(64 * MIB)
    with mapping(path) as (pages, address):
        if before == "touched":
            touch(pages)
        assert not written(address, 64 * MIB)
        at = 32 * MIB + 77
        pages[at] = 1
        assert written(address, 64 * MIB)
        assert written(address + at, 1)
        assert not written(address, at // PAGE * PAGE)
        assert not written(address + at // PAGE * PAGE + PAGE, 64 * MIB - at // PAGE * PAGE - PAGE)


def test_reading_is_no_writing(file: Path) -> None:
    with mapping(file) as (pages, address):
        assert not written(address, SIZE)
        touch(pages)
        assert not written(address, SIZE)
        assert not written(address + 5, 0)


def test_a_write_of_what_was_there_already_counts_as_one(file: Path) -> None:
    """The page is memory then, whatever is in it."""
    with mapping(file) as (pages, address):
        pages[9] = pages[9]
        assert written(address, 1)


def test_memory_that_is_no_file_is_never_let_go_of() -> None:
    with mmap.mmap(-1, MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
        pages[:] = bytes([7]) * MIB
        assert not let_go(address_of(pages), MIB)
        assert pages[:] == bytes([7]) * MIB


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    writes=st.lists(st.integers(0, SIZE - 1), max_size=4),
    begin=st.integers(0, SIZE),
    nbytes=st.one_of(st.integers(0, SIZE), st.integers(0, 3 * PAGE)),
    neighbours=st.booleans(),
)
def test_whole_pages_inside_the_range_go_and_no_write_in_it_or_beside_it_is_lost(
    file: Path, writes: list[int], begin: int, nbytes: int, neighbours: bool
) -> None:
    nbytes = min(nbytes, SIZE - begin)
    # Neighbours on the partial pages at the ends write too.
    ends = [begin - 1] * (begin % PAGE > 0) + [begin + nbytes] * ((begin + nbytes) % PAGE > 0 and begin + nbytes < SIZE)
    writes = writes + ends * neighbours
    with mapping(file) as (pages, address):
        touch(pages)
        for at in writes:
            pages[at] ^= 255
        changed = pages[:]
        inside = range(-(-begin // PAGE), (begin + nbytes) // PAGE)
        touched = range(begin // PAGE, -(-(begin + nbytes) // PAGE)) if nbytes else range(0)
        assert written(address + begin, nbytes) == any(at // PAGE in touched for at in writes)
        done = let_go(address + begin, nbytes)
        assert done == (not any(at // PAGE in inside for at in writes))
        gone = {number for number, there in enumerate(present(address, SIZE)) if not there}
        # Where the kernel mapped 2 MiB at once, all of it goes with a page of it, and comes back when it is used.
        assert set(inside) <= gone if done else not gone
        assert not gone & {at // PAGE for at in writes}
        assert pages[:] == changed


# -- bringing


@needs_cold
@pytest.mark.parametrize("exactly", [True, False])
@pytest.mark.parametrize(("begin", "nbytes"), [(0, SIZE), (5, 1), (PAGE - 1, 2), (MIB + 17, 2 * MIB), (SIZE - 1, 1)])
def test_what_is_brought_is_in_memory_and_mapped(file: Path, begin: int, nbytes: int, exactly: bool) -> None:
    drop(file)
    with mapping(file) as (pages, address):
        assert not holds(address + begin, nbytes)
        assert not any(present(address, SIZE))
        bring(address + begin, nbytes, exactly=exactly)
        assert all(present(address + begin, nbytes))
        assert all(resident(file)[begin // PAGE : -(-(begin + nbytes) // PAGE)])
        if exactly:
            assert sum(resident(file)) == -(-(begin + nbytes) // PAGE) - begin // PAGE
        assert holds(address + begin, nbytes)
        assert not written(address, SIZE)
        assert let_go(address, SIZE)
        assert pages[begin : begin + nbytes] == file.read_bytes()[begin : begin + nbytes]


@needs_cold
@pytest.mark.parametrize("exactly", [True, False])
def test_an_older_kernel_is_asked_to_read_ahead(exactly: bool, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = mapped_pages.libc(), []

    class Older:
        mincore = real.mincore

        @staticmethod
        def madvise(address: Any, nbytes: Any, advice: int) -> int:
            asked.append((nbytes.value, advice))
            if advice == mapped_pages._POPULATE_READ:
                ctypes.set_errno(errno.EINVAL)
                return -1
            return int(real.madvise(address, nbytes, advice))

    monkeypatch.setattr(mapped_pages, "libc", Older)
    drop(file)
    with mapping(file) as (_, address):
        bring(address + 5, SIZE - 5, exactly=exactly)
        assert (asked[0][1] == mapped_pages._POPULATE_READ) is not exactly
        steps = [nbytes for nbytes, advice in asked if advice == mmap.MADV_WILLNEED]
        assert sum(steps) == -(-SIZE // PAGE) * PAGE
        assert max(steps) <= 2 * MIB


def test_a_call_that_was_interrupted_is_made_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = mapped_pages.libc(), []

    class Interrupted:
        @staticmethod
        def madvise(address: Any, nbytes: Any, advice: int) -> int:
            calls.append(advice)
            if len(calls) == 1:
                ctypes.set_errno(errno.EINTR)
                return -1
            return int(real.madvise(address, nbytes, advice))

    monkeypatch.setattr(mapped_pages, "libc", Interrupted)
    with mapping(file) as (_, address):
        bring(address, SIZE, exactly=False)
        assert all(present(address, SIZE))
    assert len(calls) == 2


def test_bringing_past_the_end_of_a_file_that_shrank_is_borne(tmp_path: Path) -> None:
    path = tmp_path / "shrinks"
    path.write_bytes(bytes(MIB))
    with mapping(path) as (_, address):
        os.truncate(path, 3 * PAGE)
        bring(address, MIB)
        assert let_go(address, MIB)


# -- whether they are there


@needs_cold
def test_pages_that_neighbours_share_say_nothing(file: Path) -> None:
    begin, nbytes = PAGE + 5, 64 * PAGE
    drop(file)
    with mapping(file) as (_, address):
        bring(address + PAGE, 1)
        bring(address + begin + nbytes - 1, 1)
        assert not holds(address + begin, nbytes, 2)
        bring(address + begin, nbytes)
        assert holds(address + begin, nbytes, 2)
        # Less than a page has no others.
        assert holds(address + begin, 7)


@needs_cold
def test_what_is_not_in_memory_is_seen_by_samples(file: Path) -> None:
    with mapping(file) as (_, address):
        warm(file)
        assert holds(address, SIZE)
        assert holds(address + 100, 1)
        assert holds(address, 0)
        drop(file, 0, MIB)
        assert not holds(address, SIZE)
        assert holds(address + 2 * MIB, MIB)
        # Asked page by page, one is enough.
        warm(file)
        drop(file, 2 * MIB, PAGE)
        pages = resident(file)
        assert holds(address + MIB, 2 * MIB, samples=10_000) == all(pages[MIB // PAGE : 3 * MIB // PAGE])


@needs_cold
def test_the_first_and_the_last_page_are_always_asked(file: Path) -> None:
    with mapping(file) as (_, address):
        for gone in (0, MIB - PAGE):
            warm(file)
            drop(file, gone, PAGE)
            if not resident(file)[gone // PAGE]:
                assert not holds(address, MIB, samples=1)


# -- where the system cannot say


def test_elsewhere_nothing_is_done_and_nothing_lost(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mapping(file) as (pages, address):
        touch(pages)
        monkeypatch.setattr(mapped_pages, "libc", lambda: None)
        bring(address, SIZE)
        assert holds(address, SIZE)
        assert written(address, SIZE)
        assert not let_go(address, SIZE)
        assert let_go(address, 5)  # no whole page
        assert all(present(address, SIZE))


@pytest.mark.parametrize("content", [None, b"", bytes(12)])
def test_what_pagemap_does_not_tell_counts_as_written(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    told = tmp_path / "pagemap"
    if content is not None:
        told.write_bytes(content)
    with mapping(file) as (pages, address):
        touch(pages)
        monkeypatch.setattr(mapped_pages, "_PAGEMAP", told)
        assert written(address, SIZE)
        assert not let_go(address, SIZE)
        assert all(present(address, SIZE))


def test_a_page_that_was_swapped_out_counts_as_written(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "pagemap"
    with mapping(file) as (_, address), told.open("wb") as opened:
        opened.truncate(address // PAGE * 8)
        opened.seek(address // PAGE * 8)
        # A page of the file, one that is nowhere, one that migrates (a swap entry of a file's page), and one swapped.
        opened.write(np.array([5 << 61, 0, 3 << 61, 1 << 62], dtype=np.uint64).tobytes())
        opened.flush()
        monkeypatch.setattr(mapped_pages, "_PAGEMAP", told)
        assert not written(address, 3 * PAGE)
        assert written(address, 4 * PAGE)


def test_nothing_stays_open(file: Path) -> None:
    with mapping(file) as (_, address):
        before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208
        for _ in range(20):
            bring(address, SIZE)
            written(address, SIZE)
            holds(address, SIZE)
            let_go(address, SIZE)
        assert sorted(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_the_address_keeps_no_hold_on_the_mapping(file: Path) -> None:
    with file.open("rb") as opened:
        pages = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    assert address_of(pages) % PAGE == 0
    pages.close()
    with pytest.raises(ValueError, match="closed"):
        address_of(pages)
