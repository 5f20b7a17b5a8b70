"""How the elements of tensors lie, in counts of elements."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Shape = tuple[int, ...]
# Elements that go from one tensor into another: how many, the step in the result, the step in the source.
Dimension = tuple[int, int, int]


def row_major(shape: Sequence[int]) -> Shape:
    """Strides of a dense tensor."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


def joined(dimensions: Iterable[Dimension]) -> tuple[Dimension, ...]:
    """The same elements in the order in which they lie in the source, those dimensions as one that are one."""
    apart = sorted((d for d in dimensions if d[0] != 1), key=lambda d: -d[2])
    found: list[Dimension] = []
    for n, step, there in apart:
        if found and found[-1][1] == n * step and found[-1][2] == n * there:
            found[-1] = (found[-1][0] * n, step, there)
        else:
            found.append((n, step, there))
    return tuple(found)


def columns(dimensions: Iterable[Dimension]) -> tuple[Shape, Shape, Shape]:
    """All counts, all steps in the result, all steps in the source."""
    listed = list(dimensions)
    return tuple(d[0] for d in listed), tuple(d[1] for d in listed), tuple(d[2] for d in listed)
