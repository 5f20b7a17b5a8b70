"""The disk's own time for the bytes of files: what no loader can be quicker than, when they are cold."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.cases import find_cases
from bench.loaders.limit import Reader, readers, takes_direct_reads
from bench.page_cache import drop


class WarmError(Exception):
    """Pages of the files stayed in the page cache."""


def ways(file: Path) -> dict[str, Reader]:
    """Buffered and direct reads with several numbers of threads, by name; those that the file system of `file` has."""
    (case,) = find_cases(["cold-copy-bf16"], quick=False)
    direct = takes_direct_reads(file)
    return {name: reader for name, reader in readers(case).items() if direct or not reader.direct}


def read_time(files: Sequence[Path], reader: Reader) -> float:
    """Seconds to read all of the cold `files` into one small buffer per thread.

    Raises:
        WarmError: they cannot be made cold.
        OSError: a read failed or was short.
    """
    stayed = drop(files)
    if stayed:
        raise WarmError(f"{stayed} pages of the files stayed in the page cache")
    with contextlib.ExitStack() as stack:
        flags = os.O_RDONLY | (os.O_DIRECT if reader.direct else 0)
        chunks = []
        for file in files:
            opened = os.open(file, flags)
            stack.callback(os.close, opened)
            chunks += [(opened, at) for at in range(0, file.stat().st_size, reader.request)]
        own = threading.local()

        def read(chunk: tuple[int, int]) -> int:
            if not hasattr(own, "buffer"):
                own.buffer = mmap.mmap(-1, reader.request)
            return os.preadv(chunk[0], [own.buffer], chunk[1])

        pool = stack.enter_context(ThreadPoolExecutor(reader.threads))
        started = time.perf_counter()
        count = sum(pool.map(read, chunks))
        seconds = time.perf_counter() - started
    expected = sum(file.stat().st_size for file in files)
    if count != expected:
        raise OSError(f"{reader.name}: {count} bytes were read, expected {expected}")
    return seconds
