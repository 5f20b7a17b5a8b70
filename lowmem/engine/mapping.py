"""Zero copy: parameters that are pages of the file."""

from __future__ import annotations

import errno
import mmap
import platform
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from ..checkpoint import Shard, TensorEntry
from ..errors import CheckpointError
from .cleanup import close_read
from .reading import open_shard

# Python 3.10 does not export MAP_NORESERVE; this is its value on the common Linux machines.
_COMMON = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if _COMMON else 0)


def map_shard(shard: Shard) -> mmap.mmap:
    """The whole file, mapped privately: a write copies the page and not the file.

    One mapping serves all tensors of a shard and ends with the last of them. NORESERVE, or the kernel would refuse
    a private mapping larger than its memory although no page of it is memory.

    Raises:
        CheckpointError: the file is gone, changed, or cannot be mapped.
    """
    fds = open_shard(shard)
    try:
        if hasattr(mmap, "MAP_PRIVATE"):
            flags, access = mmap.MAP_PRIVATE | _NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            if sys.version_info >= (3, 13):
                # The mapping needs no open file, and a checkpoint may have more shards than a process may open.
                pages = mmap.mmap(fds[0], shard.size, flags=flags, prot=access, trackfd=False)
            else:
                pages = mmap.mmap(fds[0], shard.size, flags=flags, prot=access)
        else:
            pages = mmap.mmap(fds[0], shard.size, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        limit = "on address space (ulimit -v, ulimit -d)"
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            limit = "on open files (ulimit -n), of which each mapped shard keeps one,"
        raise CheckpointError(
            f"{shard.file}: cannot be mapped ({error}); a limit {limit} may be the reason; residency='copy' reads it "
            "instead"
        ) from error
    finally:
        close_read(fds)
    return pages


def node_of(file: Path) -> tuple[int, int] | None:
    """What names the file that a path leads to now; None where that cannot be told."""
    try:
        info = file.stat()
    except OSError:
        return None
    return info.st_dev, info.st_ino


def refuse_written(shards: Iterable[tuple[Shard, tuple[int, int] | None]]) -> None:
    """For mapped shards, each with its node: a page behind a new end would be a signal when it is touched.

    What was removed or replaced meanwhile is as it was, to whoever maps it.

    Raises:
        CheckpointError: one has another size or time than was planned.
    """
    for shard, node in shards:
        try:
            info = shard.file.stat()
        except OSError:
            continue
        if (info.st_dev, info.st_ino) == node and (info.st_size, info.st_mtime_ns) != (shard.size, shard.mtime_ns):
            raise CheckpointError(
                f"{shard.file}: changed during the load (expected {shard.size} bytes and time {shard.mtime_ns} ns, "
                f"found {info.st_size} and {info.st_mtime_ns}); wait until nothing writes to it and load again"
            )


def view_of(pages: mmap.mmap, entry: TensorEntry, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    """The tensor of `entry` inside its mapped shard, with a storage of its own, so that saving or copying it takes
    its own bytes and not the shard's. No page is touched, unless the entry does not lie at a multiple of its element
    size, where torch could not read it: then it is copied.

    Args:
        pages: the shard.
        entry: one in this machine's order of bytes and not packed.
        shape: of as many elements, instead of that of a dense entry.
    """
    dtype: torch.dtype = getattr(torch, entry.dtype)
    if entry.nbytes == 0:
        return torch.empty(entry.shape if shape is None else shape, dtype=dtype)
    count = entry.nbytes // dtype.itemsize
    if entry.offset % dtype.itemsize:
        spanned = torch.frombuffer(bytearray(memoryview(pages)[entry.offset : entry.end]), dtype=dtype)
    else:
        spanned = torch.frombuffer(pages, dtype=dtype, count=count, offset=entry.offset)
    if entry.strides is not None:
        return spanned.as_strided(entry.shape, entry.strides)
    # Resized in place: the same elements under another shape, for less than a view, and without a base to keep.
    return spanned.resize_(entry.shape if shape is None else shape)
