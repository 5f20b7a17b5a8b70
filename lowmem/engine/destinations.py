"""Where moves end: a tensor in memory, or a file of the offload folder."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
from typing import Any, Protocol

import numpy as np
import torch

from ..dtypes import itemsize
from ..errors import BudgetError, LowmemError, OffloadError
from ..mapping import Region
from ..planner import Move, Placement
from ..planner.moves import ALIGNMENT, BLOCK, LEAST_DIRECT
from ..sizes import format_size

_HUGE = 2 * 1024 * 1024
# PyBUF_WRITE of Python's C API.
_WRITABLE = 0x200
# From here on a huge page of address space is small change, where a limit counts it.
_WORTH_A_PAGE = 16 * _HUGE


class Scratch:
    """A reader's buffer, in a mapping of its own: the kernel gets every page back at once, a heap might keep some.

    Args:
        size: bytes of the buffer.
        work: bytes of another, for arithmetic.
        memory: the buffer, where it is part of another one.
    """

    def __init__(self, size: int, work: int = 0, memory: Any = None) -> None:
        if memory is None:
            memory = anonymous_map(size) if size else bytearray()
        # Of the mapping and not of the tensor, so that whoever has the one keeps the other.
        self.memory = memoryview(memory)
        self.tensor = torch.frombuffer(memory, dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)
        self.address = self.tensor.data_ptr()
        self.work = torch.frombuffer(anonymous_map(work), dtype=torch.uint8) if work else self.tensor[:0]

    def place_of(self, move: Move, begin: int) -> int:
        """Where in the buffer the bytes of `move` go that may lie from `begin` on.

        Those of a large one where direct I/O can put them: as far behind a multiple of a block as in the file.
        """
        begin += -begin % ALIGNMENT
        if move.nbytes >= LEAST_DIRECT and move.offset % itemsize(move.dtype) == 0:
            begin += (move.offset - self.address - begin) % BLOCK
        return begin

    def elements(self, move: Move, begin: int) -> torch.Tensor:
        """The bytes of `move`, which lie at `begin`, as elements of its dtype: all that it spans."""
        dtype: torch.dtype = getattr(torch, move.dtype)
        if move.swapped:
            # The parts of a complex number are swapped each for itself.
            word = dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize
            np.frombuffer(self.memory[begin : begin + move.nbytes], dtype=f"u{word}").byteswap(inplace=True)
        return torch.frombuffer(self.memory, dtype=dtype, count=move.nbytes // dtype.itemsize, offset=begin)


class Destination(Protocol):
    """Takes moves from several threads; regions never overlap, so no lock is needed.

    From `at` on, the move has its own part of the calling thread's buffer, the same in both calls.
    """

    def begin(self, move: Move, scratch: Scratch, at: int) -> memoryview:
        """Where the move's bytes are to be read to."""

    def end(self, move: Move, scratch: Scratch, at: int) -> None:
        """They are there: put them in their place."""

    def put(self, region: Region, source: torch.Tensor, scratch: Scratch | None = None) -> None:
        """Elements of the final dtype, dense and on the CPU, into a region that is dense or of their shape.

        With `scratch`, the elements are in this buffer of the calling thread, and stay there while they are needed.
        """


class MemoryDestination:
    """A tensor, allocated once at its final dtype on its final device."""

    def __init__(self, placement: Placement, *, in_place: bool = False) -> None:
        self.tensor = allocate(placement, in_place=in_place)
        self._bytes: memoryview | None = None

    def begin(self, move: Move, scratch: Scratch, at: int) -> memoryview:
        """Its place in the tensor when nothing changes, else the buffer."""
        if move.scratch:
            begin = scratch.place_of(move, at)
            return scratch.memory[begin : begin + move.nbytes]
        if self._bytes is None:
            self._bytes = memory_of(self.tensor)
        start = move.region.offset * self.tensor.itemsize
        return self._bytes[start : start + move.nbytes]

    def end(self, move: Move, scratch: Scratch, at: int) -> None:
        """Cast or copy out of the buffer."""
        if not move.scratch:
            return
        fill(self.tensor, move.region, viewed(scratch.elements(move, scratch.place_of(move, at)), move.source))

    def put(self, region: Region, source: torch.Tensor, scratch: Scratch | None = None) -> None:
        """Copy."""
        fill(self.tensor, region, source)

    def order(self) -> None:
        """What the calling thread asks for from now on finds the values: they are there when `end` comes back."""

    def finish(self) -> None:
        """Wait for the values."""


class FileDestination:
    """A range of a file of the offload folder; the cast happens in the thread's buffer."""

    def __init__(self, placement: Placement, fd: int, offset: int, path: str) -> None:
        self._dtype: torch.dtype = getattr(torch, placement.dtype)
        self._fd = fd
        self._offset = offset
        self._nbytes = placement.nbytes
        self._path = path
        self._pages: mmap.mmap | None = None

    def begin(self, move: Move, scratch: Scratch, at: int) -> memoryview:
        """Behind the room for the result."""
        begin = scratch.place_of(move, at + self._size(move))
        return scratch.memory[begin : begin + move.nbytes]

    def end(self, move: Move, scratch: Scratch, at: int) -> None:
        """Cast and write. The result lies in front of the source."""
        size = self._size(move)
        cast = scratch.tensor[at : at + size].view(self._dtype)
        source = viewed(scratch.elements(move, scratch.place_of(move, at + size)), move.source)
        if move.region.dense:
            _copy(cast.view(source.shape), source)
            self._write(scratch.memory[at : at + size], self._offset + move.region.offset * self._dtype.itemsize)
        else:
            self._scatter(move.region, source)

    def put(self, region: Region, source: torch.Tensor, scratch: Scratch | None = None) -> None:
        """Write."""
        if region.dense:
            self._write(memory_of(source), self._offset + region.offset * self._dtype.itemsize)
        else:
            self._scatter(region, source)

    def store(self, tensor: torch.Tensor) -> None:
        """All of it at once, from a dense tensor of its dtype on the CPU."""
        if self._nbytes:
            self._write(memory_of(tensor), self._offset)

    def _size(self, move: Move) -> int:
        return move.region.count * self._dtype.itemsize

    def _write(self, view: memoryview, offset: int) -> None:
        try:
            write_at(self._fd, view, offset)
        except OSError as error:
            raise self._failed(f"writing failed: {error.strerror or error}") from error

    def _failed(self, what: str) -> LowmemError:
        return OffloadError(f"{self._path}: {what}; give offload_folder on another disk, or raise the limit")

    def _scatter(self, region: Region, source: torch.Tensor) -> None:
        """Elements that do not lie one behind the other in the file: through a mapping, or each would be a write."""
        try:
            if self._pages is None:
                begin = self._offset - self._offset % mmap.ALLOCATIONGRANULARITY
                self._pages = mmap.mmap(self._fd, self._offset + self._nbytes - begin, offset=begin)
        except (OSError, ValueError) as error:
            raise self._failed(f"cannot be mapped for writing: {error}") from error
        begin = self._offset % mmap.ALLOCATIONGRANULARITY
        whole = torch.frombuffer(
            self._pages, dtype=self._dtype, count=self._nbytes // self._dtype.itemsize, offset=begin
        )
        fill(whole, region, source)


def viewed(spanned: torch.Tensor, source: Region | None) -> torch.Tensor:
    """Those of the elements of a range that are a move's."""
    return spanned if source is None else spanned.as_strided(source.shape, source.strides)


def fill(tensor: torch.Tensor, region: Region, source: torch.Tensor) -> None:
    """Put the elements of `source`, in row-major order, into a region of a dense tensor, cast to its dtype.

    A source that is not contiguous has the shape of the region, or the region is dense.
    """
    _copy(*matched(tensor, region, source))


def _copy(into: torch.Tensor, source: torch.Tensor) -> None:
    if into.dtype == source.dtype == torch.bool:
        # As bytes: a copy of truth values makes each of them 0 or 1, and a file may hold others.
        into, source = into.view(torch.uint8), source.view(torch.uint8)
    into.copy_(source)


def matched(tensor: torch.Tensor, region: Region, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The region and the source, as `fill` takes them, as views of one shape."""
    # torch counts from the beginning of the memory, and the tensor may lie behind others there.
    offset = tensor.storage_offset() + region.offset
    if source.shape == region.shape:
        return tensor.as_strided(region.shape, region.strides, offset), source
    if source.is_contiguous():
        return tensor.as_strided(region.shape, region.strides, offset), source.view(region.shape)
    return tensor.as_strided((region.count,), (1,), offset).view(source.shape), source


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a dense tensor on the CPU, writable, as long as the tensor lives.

    By address: by way of numpy it takes four times as long, which is felt with tens of thousands of tensors.
    """
    view: memoryview = _memory_at()(tensor.data_ptr(), tensor.nbytes, _WRITABLE)
    return view


@functools.cache
def _memory_at() -> Any:
    function = ctypes.pythonapi.PyMemoryView_FromMemory
    function.restype, function.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
    return function


def write_at(fd: int, view: memoryview, offset: int) -> None:
    """All of `view` into the file, however often the kernel takes only a part."""
    done = 0
    while done < len(view):
        done += _pwrite(fd, view[done:], offset + done)


def _pwrite(fd: int, view: memoryview, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, view, offset)
    os.lseek(fd, offset, os.SEEK_SET)
    return os.write(fd, view)


def allocate(placement: Placement, *, in_place: bool = False) -> torch.Tensor:
    """An uninitialised tensor for `placement`.

    A large one on the CPU is a mapping of its own: huge pages from end to end, and the kernel has every byte back when
    the tensor ends, where the heap of a thread would keep some. Its storage cannot be resized, as that of a mapped one.

    Args:
        placement: whose tensor.
        in_place: let a large one begin in a block where its bytes do in the file.

    Raises:
        BudgetError: the device or the host refuses the memory.
    """
    try:
        if placement.is_apart:
            return _map_apart(placement, _begin_in_block(placement) if in_place else 0)
        return torch.empty(placement.shape, dtype=getattr(torch, placement.dtype), device=placement.device)
    except (MemoryError, RuntimeError, OSError) as error:
        raise refusal(placement, error) from error


def refusal(placement: Placement, error: Exception) -> BudgetError:
    """What is said when there is no memory for a tensor."""
    return BudgetError(
        f"tensor {placement.target!r}: {placement.device} refused {format_size(placement.nbytes)}: {error}; "
        "others took memory since the plan was made; lower ram or max_memory, or free memory",
        required=placement.nbytes,
        limit=0,
    )


def _map_apart(placement: Placement, begin: int) -> torch.Tensor:
    """Begins behind the first byte only where no limit counts address space."""
    dtype: torch.dtype = getattr(torch, placement.dtype)
    memory = huge_map(begin + placement.nbytes, rounded=begin > 0)
    count = placement.nbytes // dtype.itemsize
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=begin).view(placement.shape)


def huge_map(nbytes: int, *, rounded: bool = False) -> mmap.mmap:
    """Fresh memory of whole huge pages as far as it goes, because filling fresh memory is bound by page faults.

    The kernel begins mappings of whole huge pages at one. The rest of the last is address space and never memory.

    Args:
        nbytes: bytes that are wanted.
        rounded: whether there may be a huge page more of address space, though it is not large beside them.
    """
    rounded = nbytes >= (_HUGE if rounded else _WORTH_A_PAGE)
    memory = anonymous_map(nbytes + -nbytes % _HUGE if rounded else nbytes)
    huge = nbytes // _HUGE * _HUGE
    if hasattr(mmap, "MADV_HUGEPAGE") and huge:
        # Advice only; a kernel without huge pages refuses it.
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE, 0, huge)
            if huge < len(memory):
                memory.madvise(mmap.MADV_NOHUGEPAGE, huge, len(memory) - huge)
    return memory


def _begin_in_block(placement: Placement) -> int:
    """How far behind the beginning of a block its bytes begin in the file, or 0 where direct reads cannot end in it.

    Products with weights that begin at any element were as fast as with those that begin at a cache line.
    """
    if placement.is_staged or not placement.links:
        return 0
    link, size = placement.links[0], itemsize(placement.dtype)
    begin = (link.entry.offset - link.region.offset * size) % BLOCK
    return 0 if begin % size else begin


def address_space(size: int) -> mmap.mmap:
    """Addresses that nobody else has, and no memory behind them.

    Raises:
        OSError: a limit on address space.
    """
    if hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=0)
    return mmap.mmap(-1, size)


def anonymous_map(size: int) -> mmap.mmap:
    """Fresh memory that no heap keeps."""
    if hasattr(mmap, "MAP_ANONYMOUS"):
        # Private: the default is shared memory, which no measure of anonymous memory would show.
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, size)
