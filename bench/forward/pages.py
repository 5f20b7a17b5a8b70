"""Give back the mapped pages of files, so that the kernel can drop them from the page cache."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

_HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \d+\s*(.*)")
# asm-generic/mman-common.h
_MADV_DONTNEED = 4


def give_back_mapped(files: Iterable[Path], smaps: Path = Path("/proc/self/smaps")) -> int:
    """Empty this process's page tables of `files`; returns the bytes of mappings that had to stay.

    A page that any process has mapped is in use and cannot be dropped. The next access brings it again, from the
    file: so a mapping that holds pages of its own, which were written to, stays as it is. No other thread may unmap
    any of these meanwhile.

    Raises:
        OSError: the kernel refuses, or does not say what is mapped.
    """
    names = {os.path.realpath(file) for file in files}
    libc = ctypes.CDLL(None, use_errno=True)
    kept = 0
    for start, stop, own in _mappings(smaps.read_text(encoding="utf-8", errors="surrogateescape"), names):
        if own:
            kept += stop - start
        elif libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _MADV_DONTNEED):
            raise OSError(ctypes.get_errno(), "madvise")
    return kept


def _mappings(text: str, names: set[str]) -> Iterator[tuple[int, int, int]]:
    """(start, stop, KiB of anonymous pages) of each mapping of a file in `names`, as in proc_pid_smaps(5)."""
    span: tuple[int, int] | None = None
    for line in text.splitlines():
        if head := _HEAD.fullmatch(line):
            span = (int(head[1], 16), int(head[2], 16)) if head[3] in names else None
        elif span is not None and line.startswith("Anonymous:"):
            yield (*span, int(line.split()[1]))
