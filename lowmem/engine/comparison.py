"""Compare tensors that a checkpoint holds twice."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path

from ..checkpoint import Shard, TensorEntry
from .reading import ShardReader
from .ways import Ways

_STEP = 4 * 1024 * 1024


def same_bytes(a: TensorEntry, b: TensorEntry, shards: dict[Path, Shard], *, keep_cache: bool = False) -> bool:
    """Whether two entries hold the same values, compared piece by piece.

    Args:
        a: one tensor.
        b: the other.
        shards: the files that they lie in.
        keep_cache: leave in the page cache what was read and was not there before.

    Raises:
        CheckpointError: a file changed since it was looked at, or cannot be read.
    """
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if (a.file, a.offset, a.strides) == (b.file, b.offset, b.strides):
        return True
    if a.strides != b.strides or a.swapped != b.swapped:
        # Compared as they lie in their files; what lies otherwise counts as different.
        return False
    with ExitStack() as opened:
        ways = Ways("buffered")
        # One reader for both where they share a file: a second would find the pages that the first has read. But what
        # is packed is unpacked in order.
        places = [(entry.file, entry.key if entry.packed else "") for entry in (a, b)]
        readers = {
            place: opened.enter_context(closing(ShardReader(shards[place[0]], ways, keep_cache=keep_cache)))
            for place in dict.fromkeys(places)
        }
        buffers = bytearray(min(_STEP, a.nbytes)), bytearray(min(_STEP, a.nbytes))
        for at in range(0, a.nbytes, _STEP):
            size = min(_STEP, a.nbytes - at)
            views = [memoryview(buffer)[:size] for buffer in buffers]
            for entry, place, view in zip((a, b), places, views, strict=True):
                reader = readers[place]
                reader.fill([view], entry.offset + at, None, reader.ticket(entry.offset))
            if views[0] != views[1]:
                return False
    return True
