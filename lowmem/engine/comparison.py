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
    if (a.file, a.offset, a.strides, a.swapped) == (b.file, b.offset, b.strides, b.swapped):
        return True
    with ExitStack() as opened:
        ways = Ways("buffered")
        # One reader for both where they share a file: a second would find the pages that the first has read.
        readers = {
            file: opened.enter_context(closing(ShardReader(shards[file], ways, keep_cache=keep_cache)))
            for file in dict.fromkeys((a.file, b.file))
        }
        buffers = bytearray(min(_STEP, a.nbytes)), bytearray(min(_STEP, a.nbytes))
        for at in range(0, a.nbytes, _STEP):
            size = min(_STEP, a.nbytes - at)
            views = [memoryview(buffer)[:size] for buffer in buffers]
            readers[a.file].fill(views[:1], a.offset + at)
            readers[b.file].fill(views[1:], b.offset + at)
            if views[0] != views[1]:
                return False
    return True
