"""Views of what lies in files: how they are cut, and which gaps between their rows are not read."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .._strides import joined, row_major
from ..checkpoint import TensorEntry
from ..dtypes import itemsize
from ..mapping import Region
from ..sizes import KIB

# Between the rows of a strided tensor, more bytes than these are not worth being read.
_LEAST_GAP = 64 * KIB
# Where both rows and gaps are of fewer bytes all of it is read: skipping single elements costs more than it saves, and
# a read that skips is not as safe as one that does not (see `engine.reading`).
_LEAST_SKIPPED = 8
# What is read whole may hold gaps of one part in so many of what is wanted.
_WASTED = 50

# A dimension of a view: how many, the step in the source, the step in the destination, in elements.
_Dimension = tuple[int, int, int]


def dimensions_of(shape: tuple[int, ...], source: tuple[int, ...], into: tuple[int, ...]) -> list[_Dimension]:
    """The dimensions in the order in which the source lies, the widest step first, those that are one joined."""
    return [(n, step, at) for n, at, step in joined(zip(shape, into, source, strict=True))]


def _span(dimensions: Sequence[_Dimension]) -> int:
    """Elements of the source from the first of these to the last."""
    return 1 + sum((n - 1) * step for n, step, _ in dimensions)


def _is_compact(dimensions: Sequence[_Dimension], size: int) -> bool:
    """Whether there is no gap between the rows that would be worth skipping."""
    return all((step - _span(dimensions[i + 1 :])) * size < _LEAST_GAP for i, (_, step, _) in enumerate(dimensions))


# The parts of many tensors are alike.
@functools.lru_cache(maxsize=1024)
def _least_step(shape: tuple[int, ...], strides: tuple[int, ...], size: int) -> int:
    """The least step of a dimension between whose rows nothing is read, 0 if all is read.

    Nothing is read in gaps of more than a fiftieth of what is wanted, between rows that do not overlap. By the source
    alone, so that it is the same wherever it goes.
    """
    least = 0
    # Elements spanned by the dimensions so far, and those of them that are wanted.
    width = held = 1
    for n, step, _ in reversed(dimensions_of(shape, strides, strides)):
        gap, end = step - width, width + (n - 1) * step
        if gap < 0:
            least, held = 0, end
        elif not least:
            few = (step - held) * _WASTED <= held and gap * size < _LEAST_GAP
            if few or max(width, gap) * size < _LEAST_SKIPPED:
                held = n * held if few else end
            else:
                least = step
        width = end
    return least


def _parted(
    shape: tuple[int, ...], strides: tuple[int, ...], into: tuple[int, ...], least: int
) -> tuple[list[_Dimension], list[_Dimension]]:
    """The dimensions of a view between whose rows nothing is read, from the step `least` on if it is not 0, and those
    that are read whole.
    """
    dimensions = dimensions_of(shape, strides, into)
    first = sum(step >= least for _, step, _ in dimensions) if least else 0
    return dimensions[:first], dimensions[first:]


@dataclass(frozen=True, slots=True)
class Piece:
    """What of a view one move takes, in elements: the first, how many are read, where they are in these, where they go,
    and the dimensions between whose rows nothing is read, those of the widest step first.
    """

    at: int
    width: int
    source: Region
    region: Region
    rows: tuple[_Dimension, ...] = ()


def pieces(entry: TensorEntry, into: tuple[int, ...], most: int) -> Iterator[Piece]:
    """Cut a view, as far as its elements lie apart.

    Args:
        entry: the view.
        into: strides in the destination.
        most: elements of a piece, and of what is read for it.
    """
    if 0 in entry.shape:
        return
    assert entry.strides is not None
    size = itemsize(entry.dtype)
    # What is packed is unpacked with its gaps.
    least = 0 if entry.packed else _least_step(entry.shape, entry.strides, size)
    rows, inner = _parted(entry.shape, entry.strides, into, least)
    # A path of explicit frames would be longer: no view has more than a few dimensions.
    yield from _skip(rows, inner, 0, 0, most, size)


def _skip(rows: list[_Dimension], inner: list[_Dimension], at: int, to: int, most: int, size: int) -> Iterator[Piece]:
    """Cut the rows so that each piece takes as many as it can, without the gaps between them."""
    width, each = _span(inner), math.prod(n for n, _, _ in inner)
    if not rows or width > most or each > most or not _is_compact(inner, size):
        if not rows:
            yield from _divide(inner, at, to, most, size)
            return
        take = 0
    else:
        take = most // (max(width, each) * math.prod(n for n, _, _ in rows[1:]))
    (n, step, into_step), others = rows[0], rows[1:]
    if take < 1:
        for i in range(n):
            yield from _skip(others, inner, at + i * step, to + i * into_step, most, size)
        return
    for i in range(0, n, take):
        yield _spread([(min(take, n - i), step, into_step), *others], inner, at + i * step, to + i * into_step)


def _spread(rows: list[_Dimension], inner: list[_Dimension], at: int, to: int) -> Piece:
    """The piece that is these rows: in memory one behind the other."""
    rows = [row for row in rows if row[0] > 1]
    width = _span(inner)
    steps = row_major([*(n for n, _, _ in rows), width])[:-1]
    dimensions = [*rows, *inner]
    shape = tuple(n for n, _, _ in dimensions) or (1,)
    source = (*steps, *(step for _, step, _ in inner)) or (1,)
    into = tuple(step for _, _, step in dimensions) or (1,)
    held = width * math.prod(n for n, _, _ in rows)
    return Piece(at, held, Region(0, shape, source), Region(to, shape, into), tuple(rows))


def in_bytes(piece: Piece, size: int) -> Region | None:
    """Where the bytes of a piece lie in the file, if not one behind the other."""
    if not piece.rows:
        return None
    counts = [n for n, _, _ in piece.rows]
    run = piece.width // math.prod(counts) * size
    return Region(0, (*counts, run), (*(step * size for _, step, _ in piece.rows), 1))


def _divide(dimensions: list[_Dimension], at: int, to: int, most: int, size: int) -> Iterator[Piece]:
    """Cut what is read with its gaps, but for large ones."""
    span, count = _span(dimensions), 1
    for n, _, _ in dimensions:
        count *= n
    if span <= most and count <= most and _is_compact(dimensions, size):
        shape = tuple(n for n, _, _ in dimensions) or (1,)
        source = tuple(step for _, step, _ in dimensions) or (1,)
        into = tuple(step for _, _, step in dimensions) or (1,)
        yield Piece(at, span, Region(0, shape, source), Region(to, shape, into))
        return
    (n, step, into_step), inner = dimensions[0], dimensions[1:]
    width, held = _span(inner), count // n
    take = 0
    if width <= most and held <= most and (step - width) * size < _LEAST_GAP and _is_compact(inner, size):
        take = min(most // held, 1 + (most - width) // step if step else n)
    if take < 1:
        for i in range(n):
            yield from _divide(inner, at + i * step, to + i * into_step, most, size)
        return
    for i in range(0, n, take):
        rows = [(min(take, n - i), step, into_step), *inner]
        yield from _divide(rows, at + i * step, to + i * into_step, most, size)


def bytes_to_read(entry: TensorEntry) -> int:
    """Bytes of the file that a tensor takes: those that it spans, without the gaps of a view that are skipped."""
    if entry.strides is None or not entry.nbytes:
        return entry.nbytes
    size = itemsize(entry.dtype)
    least = 0 if entry.packed else _least_step(entry.shape, entry.strides, size)
    return min(_needed(entry.shape, entry.strides, size, least), entry.nbytes)


@functools.lru_cache(maxsize=1024)
def _needed(shape: tuple[int, ...], strides: tuple[int, ...], size: int, least: int) -> int:
    width = needed = 1
    for n, step, _ in reversed(dimensions_of(shape, strides, strides)):
        apart = (step - width) * size >= _LEAST_GAP or (least and step >= least)
        needed = n * needed if apart else needed + (n - 1) * max(step - width + needed, 0)
        width += (n - 1) * step
    return needed * size


def lands_dense(entry: TensorEntry) -> bool:
    """Whether what is read of a tensor is the tensor, row-major."""
    if entry.strides is None:
        return True
    if entry.packed or 0 in entry.shape:
        return False
    return _lands_dense(entry.shape, entry.strides, itemsize(entry.dtype))


# Each link of a plan asks, and those of experts are alike.
@functools.lru_cache(maxsize=1024)
def _lands_dense(shape: tuple[int, ...], strides: tuple[int, ...], size: int) -> bool:
    rows, inner = _parted(shape, strides, row_major(shape), _least_step(shape, strides, size))
    dimensions = [*rows, *inner]
    in_order = Region(0, tuple(n for n, _, _ in dimensions), tuple(step for _, _, step in dimensions)).dense
    return in_order and _span(inner) == math.prod(n for n, _, _ in inner)
