"""One tensor after the other, for people who place weights themselves."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import torch

from ._collector import paused_collector
from .checkpoint import inspect
from .engine import iterate
from .loader import check_present
from .planner import make_stream_plan
from .planner.request import Names, Renames, checks_names, make_stream_request


@checks_names
def stream(
    source: str | os.PathLike[str],
    *,
    prefix: str | None = None,
    only: Names = None,
    skip: Names = None,
    rename: Renames = None,
    dtype: Any = "auto",
    device: Any = "cpu",
    staging: int | str | None = None,
    io: str = "auto",
    keep_cache: bool = False,
    weights: str | None = None,
    ema: bool | None = None,
    variant: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    download: bool = False,
) -> Generator[tuple[str, torch.Tensor], None, None]:
    """Iterate over the tensors of a checkpoint, in file order, read ahead by several threads.

    A tensor that was given out is the caller's own: it is never overwritten, and its memory ends with the caller's
    last reference. What is read ahead and the readers' buffers take at most `staging`, or, where one tensor and a MiB
    are more than that, the tensor and the buffers.

    Args:
        source: what `load` takes.
        prefix: take only the keys inside this module, without it.
        only: the tensors to give: names of tensors or modules, patterns with `*`, or a function of the key. Bytes of
            the others are not read.
        skip: those to leave, likewise.
        rename: regular expression → replacement, a function of a key, or a list of these, one after the other.
        dtype: `"auto"` (as the checkpoint has it), or a float dtype; floating tensors only.
        device: where the tensors are made: `"cpu"`, `"cuda:0"`, ….
        staging: bytes that may be in flight, at least 1 MiB. Default: 64 MiB.
        io: how files are read, as in `load`.
        keep_cache: leave in the page cache what was not there before.
        weights: path of the mapping inside a pickled file, as in `inspect`.
        ema: averaged weights or others, as in `inspect`.
        variant: take the files with this word in their names, such as `"fp16"`.
        subfolder: a folder inside the source that is meant.
        revision: a branch, tag or commit of a model of the hub, as after `@` in the source.
        download: whether a model of the hub may be fetched.

    Returns:
        A generator of (key, tensor). Everything is decided when it is made; its threads start with the first tensor
        and end with it, however it ends. Which mapping of a pickled file it gives, `inspect` says.

    Raises:
        LowmemError: see `lowmem.errors`. A file that changes while it is read is known only at the end.
    """
    request = make_stream_request(
        prefix=prefix,
        only=only,
        skip=skip,
        rename=rename,
        dtype=dtype,
        device=device,
        staging=staging,
        io=io,
        keep_cache=keep_cache,
    )
    checkpoint = inspect(
        source,
        weights=weights,
        ema=ema,
        variant=variant,
        subfolder=subfolder,
        revision=revision,
        download=download,
    )
    with paused_collector():
        plan, window = make_stream_plan(checkpoint, request)
    check_present(plan, "device")
    return iterate(plan, window)
