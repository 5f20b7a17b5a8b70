"""Where moves end: a tensor in memory, or a file of the offload folder."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from typing import Any, Protocol

import torch

from ..errors import BudgetError, OffloadError
from ..planner import Move, Placement
from ..planner.records import ALIGNMENT
from ..sizes import format_size
from .reading import ShardReader

_HUGE = 2 * 1024 * 1024
_MADV_HUGEPAGE = 14


class Destination(Protocol):
    """Takes moves from several threads; regions never overlap, so no lock is needed."""

    def take(self, move: Move, reader: ShardReader, buffer: torch.Tensor) -> None:
        """Read the move's bytes and put them in their place; `buffer` is the calling thread's own."""


class MemoryDestination:
    """A tensor, allocated once at its final dtype on its final device."""

    def __init__(self, placement: Placement) -> None:
        self.tensor = allocate(placement)
        self._dtype = self.tensor.dtype
        flat = self.tensor.reshape(-1)
        # Bytes of the destination, for reads that need no cast; another device's memory cannot be read into.
        self._bytes = _memory_of(flat.view(torch.uint8)) if placement.device == "cpu" and flat.numel() else None

    def take(self, move: Move, reader: ShardReader, buffer: torch.Tensor) -> None:
        """Straight into place when nothing changes; else through the thread's buffer."""
        source: torch.dtype = getattr(torch, move.dtype)
        if self._bytes is not None and source == self._dtype and move.region.dense:
            start = move.region.offset * self._dtype.itemsize
            reader.read_into(self._bytes[start : start + move.nbytes], move.offset)
            return
        staged = buffer[: move.nbytes]
        reader.read_into(_memory_of(staged), move.offset)
        region = move.region
        into = self.tensor.as_strided(region.shape, region.strides, region.offset)
        into.copy_(staged.view(source).view(region.shape))


class FileDestination:
    """A range of a file of the offload folder; the cast happens in the thread's buffer."""

    def __init__(self, placement: Placement, fd: int, offset: int, path: str) -> None:
        self._dtype: torch.dtype = getattr(torch, placement.dtype)
        self._fd = fd
        self._offset = offset
        self._path = path

    def take(self, move: Move, reader: ShardReader, buffer: torch.Tensor) -> None:
        """Read, cast, write. The result lies in front of the source, at the buffer's aligned beginning."""
        source: torch.dtype = getattr(torch, move.dtype)
        size = move.region.count * self._dtype.itemsize
        begin = size + -size % ALIGNMENT
        staged = buffer[begin : begin + move.nbytes]
        reader.read_into(_memory_of(staged), move.offset)
        cast = buffer[:size].view(self._dtype)
        cast.copy_(staged.view(source))
        self._write(_memory_of(buffer[:size]), self._offset + move.region.offset * self._dtype.itemsize)

    def _write(self, view: memoryview, offset: int) -> None:
        try:
            write_at(self._fd, view, offset)
        except OSError as error:
            raise OffloadError(f"{self._path}: writing failed: {error.strerror or error}") from error


def _memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a uint8 tensor on the CPU, writable."""
    array: Any = tensor.numpy()
    return memoryview(array)


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


def allocate(placement: Placement) -> torch.Tensor:
    """An uninitialised tensor for `placement`.

    Raises:
        BudgetError: the device or the host refuses the memory.
    """
    try:
        tensor = torch.empty(placement.shape, dtype=getattr(torch, placement.dtype), device=placement.device)
    except (MemoryError, RuntimeError) as error:
        raise BudgetError(
            f"tensor {placement.target!r}: {placement.device} refused {format_size(placement.nbytes)}: {error}; "
            "others took memory since the plan was made; lower ram or max_memory, or free memory",
            required=placement.nbytes,
            limit=0,
        ) from error
    if placement.device == "cpu" and placement.nbytes >= _HUGE:
        _advise_huge(tensor.data_ptr(), placement.nbytes)
    return tensor


def _advise_huge(address: int, size: int) -> None:
    """Ask for huge pages: filling fresh memory is bound by page faults. Advice only; a refusal changes nothing."""
    madvise = _madvise()
    if madvise is None:
        return
    begin = address + -address % _HUGE
    length = (address + size - begin) // _HUGE * _HUGE
    if length > 0:
        madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), _MADV_HUGEPAGE)


@functools.cache
def _madvise() -> Any:
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None, use_errno=True), "madvise", None)
