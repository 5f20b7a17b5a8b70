"""Compare tensors that a checkpoint holds twice, and leave the page cache as it was found."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path

from ..checkpoint import Shard, TensorEntry
from . import reading
from .reading import ShardReader
from .ways import Ways


def same_bytes(a: TensorEntry, b: TensorEntry, shards: dict[Path, Shard], *, keep_cache: bool = False) -> bool:
    """Whether two entries hold the same values.

    Args:
        a: one tensor.
        b: the other.
        shards: the files that they lie in.
        keep_cache: leave in the page cache what was read and was not there before.

    Raises:
        CheckpointError: a file changed since it was looked at, or cannot be read.
    """
    with ExitStack() as opened:
        if not keep_cache:
            # A reader looks at the page cache when it opens, and when it closes gives back what was not there.
            for file in dict.fromkeys((a.file, b.file)):
                opened.enter_context(closing(ShardReader(shards[file], Ways("buffered"), keep_cache=False)))
        return reading.same_bytes(a, b, shards)
