"""The file pages of one module's weights: brought by several threads, a piece at a time, and given back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from .._mapped_pages import bring, holds, let_go
from .._page_cache import give_back
from ..sizes import MIB
from .files import Files

# What a thread reads at once, so that several read one large weight.
PIECE = 4 * MIB

# Of a range: its file, its address, its bytes, and where it begins in the file.
Span = tuple[Path, int, int, int]


class Pages:
    """Mapped ranges that are used together. Whoever calls `take`, `finish` or `forget` holds one lock.

    Args:
        spans: the ranges.
    """

    def __init__(self, spans: Iterable[Span] = ()) -> None:
        self.spans: list[Span] = []
        self.nbytes = 0
        self._pieces: list[tuple[int, int]] = []
        self._taken = self._done = 0
        for span in spans:
            self.add(span)

    def add(self, span: Span) -> None:
        """A range more."""
        self.spans.append(span)
        _, address, nbytes, _ = span
        self.nbytes += nbytes
        self._pieces += pieces([(address, nbytes)])

    @property
    def are_here(self) -> bool:
        """Whether all of them were brought, as far as is known."""
        return self._done == len(self._pieces)

    def take(self) -> tuple[int, int] | None:
        """Address and bytes of a piece that nobody has brought, or is bringing; None when there is none left."""
        if self._taken == len(self._pieces):
            return None
        self._taken += 1
        return self._pieces[self._taken - 1]

    def finish(self) -> bool:
        """A piece that was taken is there; whether all are now."""
        self._done += 1
        return self.are_here

    def forget(self) -> None:
        """They may be gone; unless they are being brought just now."""
        if self._taken == self._done:
            self._taken = self._done = 0

    def unmap(self) -> None:
        """Take them out of this process, but for what was written to. They may still be in the page cache.

        For the thread that computes: a write while it is looked whether there was one would be lost.
        """
        for _, address, nbytes, _ in self.spans:
            let_go(address, nbytes)
        self.forget()

    def give_back(self, files: Files) -> None:
        """Let the kernel drop those from the page cache that were not in it when the model was loaded."""
        for file, _, nbytes, offset in self.spans:
            with contextlib.suppress(OSError), file.open("rb", buffering=0) as opened:
                for begin, length in files.cached(file).absent(offset, nbytes):
                    give_back(opened.fileno(), begin, length)

    def seem_cached(self) -> bool:
        """Whether the first of them is in the page cache."""
        return all(holds(address, nbytes, 1) for _, address, nbytes, _ in self.spans[:1])


def pieces(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Ranges of mapped files, by address and bytes, as what a thread reads at once."""
    for address, nbytes in ranges:
        yield from ((address + at, min(PIECE, nbytes - at)) for at in range(0, nbytes, PIECE))


def joined_ranges(ranges: Iterable[tuple[int, int] | None]) -> list[tuple[int, int]]:
    """They, with those that follow one another as one."""
    found: list[tuple[int, int]] = []
    for one in ranges:
        if one is None or not one[1]:
            continue
        if found and sum(found[-1]) == one[0]:
            found[-1] = found[-1][0], found[-1][1] + one[1]
        else:
            found.append(one)
    return found


def bring_range(address: int, nbytes: int, *, exactly: bool) -> None:
    """Read what is missing of a range, and map it; see `_mapped_pages.bring`."""
    bring(address, nbytes, exactly=exactly and not holds(address, nbytes, 2))
