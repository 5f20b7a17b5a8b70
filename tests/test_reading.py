"""Bytes of a file by every way of reading are the file's bytes, and a file that changes is an error, never a signal."""

from __future__ import annotations

import errno
import mmap
import os
import random
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from cold_files import drop, needs_cold, needs_direct, patched, shard_of, why_not_direct
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowmem.engine import reading
from lowmem.engine.reading import ShardReader
from lowmem.engine.ways import Ways
from lowmem.errors import CheckpointError
from lowmem.planner.moves import BLOCK
from lowmem.planner.records import IO
from lowmem.sizes import KIB, MIB

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(not hasattr(os, "preadv"), reason="needs positional reads"),
]
SIZE = 3 * MIB + 1234
WAYS: list[IO] = ["buffered", "direct", "mmap", "auto"]
counted = contextmanager(patched)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reading") / "shard"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    drop(path)
    return path


@pytest.fixture(autouse=True)
def small_is_direct_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads of any size may be direct, so that small files test it."""
    monkeypatch.setattr("lowmem.engine.ways.LEAST_DIRECT", 1)


def bounce_of(size: int = 64 * KIB) -> memoryview:
    return memoryview(mmap.mmap(-1, size))


def views_of(lengths: list[int], phase: int) -> tuple[list[memoryview], memoryview]:
    """Neighbouring views into memory that begins `phase` bytes behind a block, and 32 guarding bytes at both ends."""
    memory = memoryview(mmap.mmap(-1, BLOCK + sum(lengths) + phase + 32))
    begin = BLOCK + phase
    memory[begin - 32 : begin] = memory[begin + sum(lengths) : begin + sum(lengths) + 32] = b"\xa5" * 32
    views = []
    at = begin
    for length in lengths:
        views.append(memory[at : at + length])
        at += length
    return views, memory[begin - 32 : at + 32]


def check(path: Path, views: list[memoryview], guarded: memoryview, offset: int) -> None:
    nbytes = sum(map(len, views))
    with path.open("rb") as file:
        file.seek(offset)
        assert bytes(guarded[32:-32]) == file.read(nbytes)
    assert bytes(guarded[:32]) == bytes(guarded[-32:]) == b"\xa5" * 32


def read_and_check(
    path: Path, io: IO, offset: int, lengths: list[int], phase: int = 0, bounce: int = 64 * KIB
) -> dict[str, int]:
    """Read by `io` into memory at `phase`, compare, and return bytes by way."""
    ways = Ways(io)
    views, guarded = views_of(lengths, phase)
    with closing(ShardReader(shard_of(path), ways, direct=True)) as reader:
        reader.fill(views, offset, bounce_of(bounce))
    check(path, views, guarded, offset)
    assert sum(ways.read.values()) == sum(lengths)
    return ways.read


OFFSETS = st.one_of(
    st.integers(0, SIZE - 1),
    st.integers(0, SIZE // BLOCK).map(lambda n: n * BLOCK),
    st.integers(1, 3 * BLOCK).map(lambda n: SIZE - n),
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    offset=OFFSETS,
    lengths=st.lists(st.one_of(st.integers(1, 200), st.integers(1, 300 * KIB)), min_size=1, max_size=6),
    aligned=st.booleans(),
    phase=st.integers(0, BLOCK - 1),
    bounce=st.sampled_from([BLOCK, 64 * KIB, MIB]),
)
def test_every_way_gives_the_bytes_of_the_file(
    file: Path, offset: int, lengths: list[int], aligned: bool, phase: int, bounce: int
) -> None:
    lengths = fitted(lengths, SIZE - offset)
    for io in WAYS:
        read_and_check(file, io, offset, lengths, offset % BLOCK if aligned else phase, bounce)


def fitted(lengths: list[int], room: int) -> list[int]:
    """The lengths, as far as there are bytes for them."""
    fit: list[int] = []
    for length in lengths:
        if room > sum(fit):
            fit.append(min(length, room - sum(fit)))
    return fit


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(size=st.one_of(st.integers(1, 3 * BLOCK), st.integers(1, 40).map(lambda n: n * 512)), io=st.sampled_from(WAYS))
def test_a_file_of_any_size_is_read_to_its_end(tmp_path_factory: pytest.TempPathFactory, size: int, io: IO) -> None:
    path = tmp_path_factory.mktemp("size") / "shard"
    path.write_bytes(random.Random(size).randbytes(size))
    drop(path)
    read_and_check(path, io, 0, [size])
    read_and_check(path, io, size - 1, [1], 7)


@needs_direct
@needs_cold
def test_memory_that_lies_as_the_file_does_is_read_into_without_a_copy(file: Path) -> None:
    """All in one request, with only the blocks at the ends through the bounce buffer."""
    drop(file)
    with counted() as seen:
        assert read_and_check(file, "direct", 5000, [MIB], 5000 % BLOCK) == {"direct": MIB}
    assert [(offset, got) for _, direct, offset, got in seen.calls] == [(BLOCK, MIB + BLOCK)]
    assert all(call[1] for call in seen.calls)
    with counted() as seen:
        read_and_check(file, "direct", 5000, [MIB], 5000 % BLOCK + 8)
    assert len(seen.calls) >= MIB // (64 * KIB)


@needs_direct
@needs_cold
@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize(("phase", "after"), [(0, 0), (0, 1), (1, 0), (1, 1), (1, 3)])
def test_refused_direct_reads_become_buffered_ones(file: Path, code: int, phase: int, after: int) -> None:
    """At once, or in the midst of a range, which is then read again from its beginning."""
    left = after

    def refuse(real: Any, fd: int, views: Any, offset: int, direct: bool) -> int:
        nonlocal left
        if direct:
            left -= 1
            if left < 0:
                raise OSError(code, os.strerror(code))
        return int(real(fd, views, offset))

    drop(file)
    ways = Ways("direct")
    with counted(refuse) as seen, closing(ShardReader(shard_of(file), ways, direct=True)) as reader:
        for begin in (100, MIB):
            views, guarded = views_of([MIB // 2], (begin + phase) % BLOCK)
            reader.fill(views, begin, bounce_of())
            check(file, views, guarded, begin)
    assert ways.read["buffered"] >= MIB // 2
    assert len([call for call in seen.calls if call[1]]) <= after + 3


def test_a_file_system_that_refuses_the_flag_is_read_through_the_page_cache(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.open

    def refusing(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return original(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refusing)
    assert read_and_check(file, "direct", 17, [MIB, 5, 4000]) == {"buffered": MIB + 4005}
    assert read_and_check(file, "auto", 17, [MIB, 5, 4000]) == {"buffered": MIB + 4005}


@needs_direct
def test_another_error_of_a_direct_read_is_an_error(file: Path) -> None:
    def fail(real: Any, fd: int, views: Any, offset: int, direct: bool) -> int:
        if direct:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return int(real(fd, views, offset))

    drop(file)
    with (
        counted(fail),
        closing(ShardReader(shard_of(file), Ways("direct"), direct=True)) as reader,
        pytest.raises(CheckpointError, match=f"{MIB} bytes at byte 0 failed: {os.strerror(errno.EIO)}"),
    ):
        reader.fill(views_of([MIB], 0)[0], 0, bounce_of())


SHARES = st.lists(st.integers(1, 64), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    offset=OFFSETS,
    lengths=st.lists(st.integers(1, 100 * KIB), min_size=1, max_size=4),
    phase=st.one_of(st.none(), st.integers(0, BLOCK - 1)),
    shares=SHARES,
)
def test_short_reads_are_taken_up_where_they_ended(
    file: Path, offset: int, lengths: list[int], phase: int | None, shares: list[int]
) -> None:
    """The kernel may give less than was asked: any number of bytes, or of sectors (512 bytes) when read directly."""
    turn = 0

    def less(real: Any, fd: int, views: Any, offset: int, direct: bool) -> int:
        nonlocal turn
        turn += 1
        share = shares[turn % len(shares)]
        most = share * 512 if direct else share * 997
        short: list[memoryview] = []
        for view in views:
            short.append(view[: most - sum(map(len, short))])
        if not direct:
            return int(real(fd, [view for view in short if len(view)], offset))
        # The kernel itself takes whole blocks only.
        whole = memoryview(mmap.mmap(-1, most + -most % BLOCK))
        got = min(int(real(fd, [whole], offset)), most, sum(map(len, views)))
        at = 0
        for view in views:
            part = whole[at : min(got, at + len(view))]
            view[: len(part)] = part
            at += len(part)
        return got

    lengths = fitted(lengths, SIZE - offset)
    drop(file)
    for io in WAYS:
        with counted(less):
            read_and_check(file, io, offset, lengths, offset % BLOCK if phase is None else phase)


@pytest.mark.parametrize("io", WAYS)
@pytest.mark.parametrize("size", [0, 100, BLOCK, BLOCK + 513, 2 * MIB, 2 * MIB + 7])
@pytest.mark.parametrize("phase", [0, 3])
def test_a_truncated_file_is_an_error(tmp_path: Path, io: IO, size: int, phase: int) -> None:
    path = tmp_path / "shard"
    path.write_bytes(bytes(SIZE))
    drop(path)
    with closing(ShardReader(shard_of(path), Ways(io), direct=True)) as reader:
        os.truncate(path, size)
        with pytest.raises(
            CheckpointError, match=r"shard: ended at byte \d+, expected \d+ bytes more; the file changed"
        ):
            reader.fill(views_of([SIZE - 11], phase)[0], 11, bounce_of())
        assert not reader.is_unchanged()


@pytest.mark.parametrize("lead", [-1, 0, 1])
def test_a_file_truncated_between_look_and_map_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lead: int
) -> None:
    """Also one that is cut after its size was looked at, to less than where the range begins."""
    path = tmp_path / "shard"
    path.write_bytes(bytes(SIZE))
    original = mmap.mmap

    def late(*arguments: Any, **options: Any) -> Any:
        os.truncate(path, MIB + lead)
        return original(*arguments, **options)

    with closing(ShardReader(shard_of(path), Ways("mmap"))) as reader:
        views = views_of([MIB], 0)[0]
        monkeypatch.setattr(reading.mmap, "mmap", late)
        with pytest.raises(CheckpointError, match="shard"):
            reader.fill(views, MIB, None)


def test_a_file_that_is_not_the_planned_one_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(bytes(SIZE))
    shard = shard_of(path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(CheckpointError, match="changed since it was planned"):
        ShardReader(shard, Ways())
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be opened"):
        ShardReader(shard, Ways())


@pytest.fixture
def descriptors() -> Iterator[None]:
    """No file may be open after the test that was not before."""
    folder = Path("/proc/self/fd")
    if not folder.exists():
        pytest.skip("needs Linux's /proc")
    before = len(list(folder.iterdir()))
    yield
    assert len(list(folder.iterdir())) == before


@pytest.mark.usefixtures("descriptors")
@pytest.mark.parametrize("io", WAYS)
def test_closing_leaves_no_file_open_and_may_be_repeated(file: Path, io: IO) -> None:
    reader = ShardReader(shard_of(file), Ways(io), keep_cache=False, direct=True)
    reader.fill(views_of([MIB], 0)[0], 0, bounce_of())
    reader.close()
    reader.close()


@pytest.mark.usefixtures("descriptors")
def test_a_reader_that_cannot_be_made_leaves_no_file_open(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(reading, "look", fail)
    with pytest.raises(MemoryError):
        ShardReader(shard_of(file), Ways(), keep_cache=False)


@pytest.mark.skipif(why_not_direct() is not None, reason=str(why_not_direct()))
def test_the_file_behind_a_name_that_changed_meanwhile_is_not_read_directly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second open finds another file: the bytes are those of the first."""
    path, other = tmp_path / "shard", tmp_path / "other"
    path.write_bytes(b"\1" * MIB)
    other.write_bytes(b"\2" * MIB)
    drop(path)
    original = ShardReader._open_direct

    def swapped(self: ShardReader) -> None:
        other.replace(path)
        original(self)

    monkeypatch.setattr(ShardReader, "_open_direct", swapped)
    ways = Ways("direct")
    with closing(ShardReader(shard_of(path), ways, direct=True)) as reader:
        views, guarded = views_of([MIB], 0)
        reader.fill(views, 0, bounce_of())
    assert bytes(guarded[32:-32]) == b"\1" * MIB
    assert ways.read == {"buffered": MIB}
