"""Read byte ranges of files; only when told to through a mapping, so that a file that shrinks is an error and not a
signal. Short runs with gaps between them are the exception: a call for each would take ten times as long.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import math
import mmap
import os
import stat
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np

from .._page_cache import CachedPages, give_back, look
from ..checkpoint import Shard
from ..errors import CheckpointError
from ..mapping import Region
from ..planner.moves import BLOCK, LEAST_DIRECT
from ..sizes import KIB, MIB
from .cleanup import OpenFiles, close_read, move_all, open_into
from .unpacking import PackedRanges
from .ways import Way, Ways

# Not blocking, for what became a fifo since it was planned; it changes nothing for files.
_PLAIN = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)

# Runs from here on, or behind gaps from here on, are read by a call each: copying such a run, or the page fault behind
# such a gap, takes as long as the call.
_LONG = 32 * KIB
_FAR = 64 * KIB
# Runs that the kernel is asked for before they are read.
_AHEAD = 256
# Bytes of a file that are mapped at once, for a moment. Smaller mappings spend their time on being undone.
_WINDOW = 16 * MIB
# Linux's MADV_POPULATE_READ (5.14): brings the pages, and says by an error what touching them would by a signal.
_POPULATE = 22


class ShardReader:
    """One open shard, checked to be the file that was planned. Safe from several threads.

    Args:
        shard: the file.
        ways: chooses how each range is read.
        keep_cache: leave in the page cache what was not there before.
        direct: whether the file may be read directly: its file system is one of this machine's disks, or the user
            asked for it.
    """

    def __init__(self, shard: Shard, ways: Ways, *, keep_cache: bool = True, direct: bool = False) -> None:
        self.shard = shard
        self._fds = OpenFiles()
        self._device = _open(shard, self._fds)
        self._fd = self._fds[0]
        self._ways = ways
        self._keep_cache = keep_cache
        self._direct_fd = -1
        self._can_map = True
        self._lock = threading.Lock()
        self._cached = CachedPages(True, 0)
        self._packed = PackedRanges(shard, self._read_packed) if shard.packed else None
        try:
            if direct or not keep_cache:
                self._cached = look(self._fd, shard.size)
            if direct and (ways.always_direct or not self._cached.everything):
                self._open_direct()
            ways.open(self._device, shard.size)
        except BaseException:
            self.close()
            raise

    def _open_direct(self) -> None:
        fds = OpenFiles()
        try:
            open_into(fds, self.shard.file, _PLAIN | os.O_DIRECT)
        except OSError:
            return  # not on this file system
        # What cannot be told to be the same is read through the page cache.
        with contextlib.suppress(OSError):
            if os.path.sameopenfile(fds[0], self._fd):
                self._direct_fd = fds[0]
                move_all(fds, self._fds)
        close_read(fds)

    def ticket(self, offset: int) -> int | None:
        """The place in the queue of a read at `offset` that must be unpacked; None for one that need not be.

        For readers that share this one: they ask in the order of the file, one at a time, and all of them must read.
        """
        return None if self._packed is None or offset < self.shard.size else self._packed.ticket()

    def give_back(self, ticket: int) -> None:
        """A read with this ticket has ended, or will never be; may be called again."""
        if self._packed is not None:
            self._packed.give_back(ticket)

    def fill(
        self,
        views: Sequence[memoryview],
        offset: int,
        bounce: memoryview | None = None,
        ticket: int | None = None,
        spread: Region | None = None,
    ) -> None:
        """Fill the views, one after the other, from byte `offset` on.

        Args:
            views: writable bytes.
            offset: in the file, or the address of packed bytes.
            bounce: the calling thread's buffer for direct reads, beginning at a multiple of `BLOCK`.
            ticket: what `ticket` gave for this read.
            spread: where the bytes of a single view lie from there on, if not one behind the other (see `Move`).

        Raises:
            CheckpointError: the file ended early, could not be read, or its packed bytes are damaged.
        """
        if spread is not None:
            self._fill_spread(views[0], offset, spread, bounce)
            return
        nbytes = sum(map(len, views))
        if ticket is not None:
            assert self._packed is not None
            started = time.perf_counter()
            try:
                self._packed.fill(views, offset, ticket)
            finally:
                self._packed.give_back(ticket)
            self._ways.record(self._device, "buffered", nbytes, time.perf_counter() - started, cached=True)
            return
        cached = self._cached.holds(offset, nbytes)
        can = self._direct_fd >= 0 and bounce is not None
        way = self._ways.choose(self._device, nbytes, cached=cached, direct=can)
        started = time.perf_counter()
        try:
            if way == "direct" and bounce is not None:
                way = self._fill_directly(views, offset, nbytes, bounce)
            elif way == "mmap":
                self._copy_mapped(views, offset, nbytes)
            else:
                self._fill_buffered(views, offset)
        except OSError as error:
            raise self._failed(nbytes, offset, error) from error
        if way != "direct":
            self._give_back(offset, nbytes)
        self._ways.record(self._device, way, nbytes, time.perf_counter() - started, cached=cached)

    def _read_packed(self, view: memoryview, offset: int) -> None:
        try:
            self._fill_buffered([view], offset)
        except OSError as error:
            raise self._failed(len(view), offset, error) from error
        self._give_back(offset, len(view))

    def _fill_spread(self, view: memoryview, offset: int, spread: Region, bounce: memoryview | None) -> None:
        """The runs, one behind the other: by a read each where they are long or far apart, else copied together."""
        run, gap = spread.shape[-1], spread.strides[-2] - spread.shape[-1]
        if run >= LEAST_DIRECT:
            for begin, at in _runs(spread):
                self.fill([view[begin : begin + run]], offset + at, bounce)
            return
        span = _span(spread)
        cached = self._cached.holds(offset, span)
        way = self._ways.choose(self._device, run, cached=cached, direct=False)
        started = time.perf_counter()
        try:
            if way == "mmap" or (run < _LONG and gap < _FAR and self._can_map):
                way = self._copy_or_fill_runs(view, offset, spread)
            else:
                self._fill_runs(view, offset, spread)
        except OSError as error:
            raise self._failed(len(view), offset, error) from error
        self._give_back(offset, span)
        self._ways.record(self._device, way, len(view), time.perf_counter() - started, cached=cached)

    def _copy_or_fill_runs(self, view: memoryview, offset: int, spread: Region) -> Way:
        try:
            self._copy_runs(view, offset, spread)
        except OSError as error:
            if error.errno not in (errno.ENOMEM, errno.ENODEV):
                raise
            # A limit on address space, or a file system without mappings.
            self._can_map = False
            self._fill_runs(view, offset, spread)
            return "buffered"
        return "mmap"

    def _fill_runs(self, view: memoryview, offset: int, spread: Region) -> None:
        """Many requests at once, or a disk would wait for each before it has the next."""
        run = spread.shape[-1]
        runs = _runs(spread)
        while some := list(itertools.islice(runs, _AHEAD)):
            if hasattr(os, "posix_fadvise"):
                # Advice only: a file system that cannot is no error.
                with contextlib.suppress(OSError):
                    for _, at in some:
                        os.posix_fadvise(self._fd, offset + at, run, os.POSIX_FADV_WILLNEED)
            for begin, at in some:
                self._fill_buffered([view[begin : begin + run]], offset + at)

    def _copy_runs(self, view: memoryview, offset: int, spread: Region) -> None:
        """By one strided copy for each window of the file, without the interpreter's lock."""
        (n, *inner), (step, *steps) = spread.shape, spread.strides
        size = math.prod(inner)
        far = step - _span(Region(0, tuple(inner), tuple(steps))) >= _FAR
        if inner and (far or _span(spread) > _WINDOW):
            take = 0 if far else _WINDOW // step
            for i in range(0, n, take or 1):
                shape = (min(take, n - i), *inner) if take else tuple(inner)
                part = Region(0, shape, (step, *steps) if take else tuple(steps))
                self._copy_runs(view[i * size : i * size + part.count], offset + i * step, part)
            return
        begin, span = offset - offset % mmap.ALLOCATIONGRANULARITY, _span(spread)
        with self._mapped(begin, offset, offset + span) as pages:
            self._populate(pages, offset)
            # One element a run: how they are copied is numpy's to know.
            kind, shape = np.dtype(f"V{spread.shape[-1]}"), spread.shape[:-1]
            source = np.ndarray(shape, kind, pages, offset - begin, spread.strides[:-1])
            np.copyto(np.ndarray(shape, kind, view), source)
            # The mapping ends only after what lies over it.
            del source

    def _populate(self, pages: mmap.mmap, offset: int) -> None:
        """Bring all pages; where they cannot be had, an error instead of the signal that touching them would be.

        In order, which the kernel takes as a reason to read ahead.
        """
        if sys.platform != "linux":
            return
        try:
            pages.madvise(_POPULATE)
        except OSError as error:
            if error.errno == errno.EFAULT:
                if os.fstat(self._fd).st_size < self.shard.size:
                    raise self._ended(offset) from None
                raise OSError(errno.EIO, os.strerror(errno.EIO)) from error
            # An older kernel, or one whose file system cannot: the copy brings them.

    def _fill_buffered(self, views: Sequence[memoryview], offset: int) -> None:
        left = [view for view in views if len(view)]
        at = 0
        while at < len(left):
            got = self._read(left[at:] if at else left, offset)
            if got == 0:
                raise self._ended(offset)
            offset += got
            while at < len(left) and got >= len(left[at]):
                got -= len(left[at])
                at += 1
            if got:
                left[at] = left[at][got:]

    def _read(self, views: Sequence[memoryview], offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._fd, views, offset)
        # No positional read (Windows): one thread at a time moves the file's own position.
        with self._lock, io.FileIO(self._fd, closefd=False) as file:
            file.seek(offset)
            return file.readinto(views[0]) or 0

    def _fill_directly(self, views: Sequence[memoryview], offset: int, nbytes: int, bounce: memoryview) -> Way:
        """Past the page cache, in whole blocks: into place where file and memory are aligned alike, else bounced."""
        try:
            if len(views) == 1 and _address(views[0]) % BLOCK == offset % BLOCK:
                self._read_into_place(views[0], offset, bounce)
            else:
                self._read_by_blocks(views, offset, nbytes, bounce)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            # A device that wants larger blocks, or a file system that took the flag and not the read.
            self._ways.refuse_direct(self._device)
            self._fill_buffered(views, offset)
            return "buffered"
        return "direct"

    def _read_into_place(self, view: memoryview, offset: int, bounce: memoryview) -> None:
        """One request for all of it: whole blocks into place, those at both ends by way of the buffer."""
        end = offset + len(view)
        first, last = offset + -offset % BLOCK, end - end % BLOCK
        if first >= last or len(bounce) < 2 * BLOCK:
            self._read_by_blocks([view], offset, len(view), bounce)
            return
        head, tail = bounce[:BLOCK], bounce[BLOCK : 2 * BLOCK]
        parts = [head] * (first > offset) + [view[first - offset : last - offset]] + [tail] * (last < end)
        begin = offset - offset % BLOCK
        # The last block of a file is read short.
        reached = min(begin + os.preadv(self._direct_fd, parts, begin), end)
        at = reached - reached % BLOCK if reached < end else end
        if at < first:
            self._read_by_blocks([view], offset, len(view), bounce)
            return
        view[: first - offset] = head[BLOCK - (first - offset) :]
        if at == end:
            view[last - offset :] = tail[: end - last]
        else:
            self._read_by_blocks([view[at - offset :]], at, end - at, bounce)

    def _read_by_blocks(self, views: Sequence[memoryview], offset: int, nbytes: int, bounce: memoryview) -> None:
        size = len(bounce) // BLOCK * BLOCK
        into = _Scatter(views)
        at, end = offset, offset + nbytes
        while at < end:
            begin = at - at % BLOCK
            want = min(size, end + -end % BLOCK - begin)
            got = os.preadv(self._direct_fd, [bounce[:want]], begin)
            # The last block of a file is read short; any other short read is taken up again at a whole block.
            new = min(begin + got, end)
            if new <= at:
                self._fill_buffered(into.left(), at)
                return
            into.take(bounce[at - begin : new - begin])
            at = new

    def _copy_mapped(self, views: Sequence[memoryview], offset: int, nbytes: int) -> None:
        begin = offset - offset % mmap.ALLOCATIONGRANULARITY
        with (
            self._mapped(begin, offset, offset + nbytes) as pages,
            memoryview(pages) as window,
            window[offset - begin :] as part,
        ):
            into = _Scatter(views)
            into.take(part)

    def _mapped(self, begin: int, offset: int, end: int) -> mmap.mmap:
        """The file from `begin`, at a page, to `end`; wanted from `offset` on."""
        if os.fstat(self._fd).st_size < end:
            raise self._ended(offset)
        try:
            return mmap.mmap(self._fd, end - begin, access=mmap.ACCESS_READ, offset=begin)
        except ValueError:
            raise self._ended(offset) from None  # since the look at its size

    def _give_back(self, offset: int, nbytes: int) -> None:
        if self._keep_cache or self._cached.everything:
            return
        for begin, length in self._cached.absent(offset, nbytes):
            give_back(self._fd, begin, length)

    def _ended(self, offset: int) -> CheckpointError:
        return CheckpointError(
            f"{self.shard.file}: ended at byte {offset}, expected {self.shard.size - offset} bytes more; "
            "the file changed during the load; bring it back and load again"
        )

    def _failed(self, nbytes: int, offset: int, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{self.shard.file}: reading {nbytes} bytes at byte {offset} failed: {error.strerror or error}"
        )

    def is_unchanged(self) -> bool:
        """Whether the open file is still as it was planned: size and time."""
        try:
            info = os.fstat(self._fd)
        except OSError as error:
            raise CheckpointError(
                f"{self.shard.file}: cannot be looked at behind its last read: {error.strerror or error}; "
                f"{_remedy(error)}"
            ) from error
        return (info.st_size, info.st_mtime_ns) == (self.shard.size, self.shard.mtime_ns)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._fds:
            # Once more for all: what the kernel read ahead, and blocks of pages that no single range covers.
            self._give_back(0, self.shard.size)
        close_read(self._fds)
        # A number that is used again may be another file's.
        self._fd = self._direct_fd = -1


def _span(spread: Region) -> int:
    """Bytes from the first of the first run to behind the last of the last."""
    return 1 + sum((n - 1) * step for n, step in zip(spread.shape, spread.strides, strict=True))


def _runs(spread: Region) -> Iterator[tuple[int, int]]:
    """Of each run where it goes, and where it lies."""
    ranges = [range(0, n * step, step) for n, step in zip(spread.shape[:-1], spread.strides[:-1], strict=True)]
    for i, steps in enumerate(itertools.product(*ranges)):
        yield i * spread.shape[-1], sum(steps)


class _Scatter:
    """Copies bytes into views, one after the other, without the interpreter's lock."""

    def __init__(self, views: Sequence[memoryview]) -> None:
        self._views = views
        self._index = self._at = 0

    def take(self, source: memoryview) -> None:
        """The next bytes; never more than the views have left."""
        given = np.frombuffer(source, dtype=np.uint8)
        done = 0
        while done < len(given):
            view = self._views[self._index]
            size = min(len(view) - self._at, len(given) - done)
            np.copyto(np.frombuffer(view, dtype=np.uint8)[self._at : self._at + size], given[done : done + size])
            done += size
            self._at += size
            if self._at == len(view):
                self._index, self._at = self._index + 1, 0

    def left(self) -> list[memoryview]:
        """What is not filled yet."""
        return [view[self._at if i == 0 else 0 :] for i, view in enumerate(self._views[self._index :])]


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, dtype=np.uint8).ctypes.data)


def open_shard(shard: Shard) -> OpenFiles:
    """The shard, one open file.

    Raises:
        CheckpointError: gone, or not the file that was planned (size or time differ).
    """
    fds = OpenFiles()
    _open(shard, fds)
    return fds


def _open(shard: Shard, fds: OpenFiles) -> int:
    """As `open_shard`, into `fds`; returns the device that the file is on."""
    try:
        open_into(fds, shard.file, _PLAIN)
        info = os.fstat(fds[0])
        if not stat.S_ISREG(info.st_mode) or (info.st_size, info.st_mtime_ns) != (shard.size, shard.mtime_ns):
            raise CheckpointError(
                f"{shard.file}: changed since it was planned (expected {shard.size} bytes and time "
                f"{shard.mtime_ns} ns, found {info.st_size} and {info.st_mtime_ns}); plan and load again"
            )
    except BaseException as error:
        close_read(fds)
        if isinstance(error, OSError):
            raise CheckpointError(
                f"{shard.file}: cannot be opened: {error.strerror or error}; {_remedy(error)}"
            ) from error
        raise
    return info.st_dev


def _remedy(error: OSError) -> str:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "raise the number of open files (ulimit -n)"
    return "bring it back, or check its permissions, and load again"
