"""A mapping of whole tensors, narrowed to the parts that one rank holds."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from .._records import cheap_init
from .._strides import Dimension, Shape, columns, joined, row_major
from ..checkpoint import TensorEntry
from ..dtypes import itemsize
from ..errors import UnsupportedError
from ..modeling.following import NotFollowedError, Piece, cut, relaid
from ..modeling.sharding import Part, Runs
from ..modeling.targets import Target
from .records import KeyMapping, Link, Region, whole


@cheap_init
@dataclass(frozen=True, slots=True)
class _Narrow:
    """A piece of a link, as many links have it, counted in elements.

    Attributes:
        offset: its first element in the source.
        span: elements of the source from the first to the last.
        shape: of the piece in the source.
        strides: of the piece in the source, None where it is dense there.
        into: where it begins in the part.
        counts: its shape in the part.
        steps: its strides in the part.
        count: how many they are.
        fills: whether it is all of the part.
    """

    offset: int
    span: int
    shape: Shape
    strides: Shape | None
    into: int
    counts: Shape
    steps: Shape
    count: int
    fills: bool


def narrow(mapping: KeyMapping, targets: Mapping[str, Target], rank: int) -> tuple[KeyMapping, dict[str, Target]]:
    """What feeds the parts of one rank.

    What an operation computes is computed whole, and its part taken.

    Args:
        mapping: of whole tensors.
        targets: the model's, some of them divided.
        rank: whose parts.

    Returns:
        The mapping, and the targets with the shapes of the parts.

    Raises:
        UnsupportedError: rows are divided of which int8 or floats are made, or rows of the checkpoint and those of the
            model end elsewhere.
    """
    parts = {name: t.sharding.part(t.shape, rank) for name, t in targets.items() if t.sharding is not None}
    if not parts:
        return mapping, dict(targets)
    _check_made(mapping, targets, parts)
    tied, again = _still_tied(mapping, targets)
    local = {name: replace(t, shape=parts[name].shape) if name in parts else t for name, t in targets.items()}
    cutters = {name: Cutter(targets[name].shape, part) for name, part in parts.items()}
    links: list[Link] = []
    first: dict[str, Link] = {}
    for link in _links_of(mapping, again):
        name = link.target
        first.setdefault(name, link)
        cutter = cutters.get(name)
        if cutter is None:
            links.append(link)
        else:
            links += cutter.cut(link)
    links += _empty(first, links, local)
    computed = tuple(replace(c, parts=tuple(map(parts.get, c.targets))) for c in mapping.computed)
    return replace(mapping, links=tuple(links), tied=tied, computed=computed), local


def _links_of(mapping: KeyMapping, again: Iterable[str]) -> Iterable[Link]:
    """The links, each of them again for the names that are not tied to its target here."""
    copies: dict[str, list[str]] = defaultdict(list)
    for name in again:
        copies[mapping.tied[name]].append(name)
    if not copies:
        return mapping.links
    return (
        link if name == link.target else replace(link, target=name)
        for link in mapping.links
        for name in (link.target, *copies.get(link.target, ()))
    )


def _check_made(mapping: KeyMapping, targets: Mapping[str, Target], parts: Mapping[str, Part]) -> None:
    """int8 is made of whole rows, whose scales are on the rank that has the rows."""
    if not mapping.made:
        return
    for link in mapping.links:
        target, part = targets[link.target], parts.get(link.target)
        if part is None or not target.scales or target.scales not in mapping.made:
            continue
        rows = parts.get(target.scales)
        if part.shape[1] != target.shape[1] or rows is None or rows.runs[0] != part.runs[0]:
            raise _across_rows(link)


def _across_rows(link: Link) -> UnsupportedError:
    return UnsupportedError(
        f"{link.entry.file}: tensor {link.entry.key!r}: {link.target!r} is divided across its rows, and int8 is made "
        "of floats, and floats of int8, by whole rows: expected it divided along dimension 0, with its scales; divide "
        "it so, or bring the checkpoint to what the model has first (lowmem convert)"
    )


def _still_tied(mapping: KeyMapping, targets: Mapping[str, Target]) -> tuple[dict[str, str], list[str]]:
    """The ties among tensors that are divided alike, and the names that must be fed for themselves."""
    tied, again = {}, []
    for name, leader in mapping.tied.items():
        if targets[name].sharding == targets[leader].sharding:
            tied[name] = leader
        else:
            again.append(name)
    return tied, again


def _empty(first: Mapping[str, Link], links: Iterable[Link], local: Mapping[str, Target]) -> list[Link]:
    """Links of tensors of which this rank holds nothing: they are fed all the same."""
    fed = {link.target for link in links}
    found = []
    for name, link in first.items():
        if name not in fed:
            shape = local[name].shape
            nothing = replace(link.entry, shape=shape, strides=None, nbytes=0)
            found.append(Link(nothing, name, whole(shape), False))
    return found


class Cutter:
    """Takes from the links of one target what feeds the part of one rank.

    A target has hundreds of links where experts are fused, most of them of other ranks: what is the same for all of
    them is worked out once.

    Args:
        shape: of the whole target.
        part: of the rank.
    """

    def __init__(self, shape: Shape, part: Part) -> None:
        self._shape, self._part = shape, part
        self._is_all, self._is_none = part.shape == shape, 0 in part.shape
        if self._is_none:
            return
        runs = part.runs[0] if shape else ((0, 1),)
        self._inner, self._held = math.prod(shape[1:]), math.prod(part.shape[1:])
        # Before and behind these, in elements, nothing is this rank's.
        self._begin, self._end = runs[0][0] * self._inner, runs[-1][1] * self._inner

    def cut(self, link: Link) -> Sequence[Link]:
        """The links that feed the part, of one that feeds the target or a region of it.

        Raises:
            UnsupportedError: rows of the checkpoint and those of the model end elsewhere.
        """
        if self._is_all:
            return (link,)
        region, entry = link.region, link.entry
        offset, counts = region.offset, region.shape
        if self._is_none or offset >= self._end or 0 in counts:
            return ()
        last = offset + _reach(counts, region.strides)
        if last < self._begin:
            return ()
        shape, runs, shift = self._shape, self._part.runs, 0
        first = offset // self._inner
        if first == last // self._inner and len(shape) > 1:
            # All of it in one row, or one expert: the others are divided alike, so that most of this was worked out.
            local = _position(runs[0], first)
            if local is None:
                return ()
            offset, shift = offset - first * self._inner, local * self._held
            shape, runs = shape[1:], runs[1:]
        try:
            pieces = _narrowed(
                offset, counts, region.strides, entry.shape, entry.strides, shape, runs, self._part.shape
            )
        except NotFollowedError:
            raise UnsupportedError(
                f"{entry.file}: tensor {entry.key!r}: rows of it end within rows of {link.target!r}, which is divided "
                "among ranks: expected whole ones; load the model whole and save it, then load that"
            ) from None
        return [_link(link, piece, shift, self._part.shape) for piece in pieces]


@functools.lru_cache(maxsize=4096)
def _reach(shape: Shape, strides: Shape) -> int:
    """Elements from the first to the last."""
    return sum((n - 1) * step for n, step in zip(shape, strides, strict=True))


def _position(runs: Runs, index: int) -> int | None:
    """The how manyth of the indices it is, None for one that is not among them."""
    at = 0
    for begin, end in runs:
        if begin <= index < end:
            return at + index - begin
        at += end - begin
    return None


@functools.lru_cache(maxsize=4096)
def _narrowed(
    offset: int,
    counts: Shape,
    steps: Shape,
    source: Shape,
    strides: Shape | None,
    shape: Shape,
    runs: tuple[Runs, ...],
    part: Shape,
) -> tuple[_Narrow, ...]:
    """The pieces of a region of a tensor of `shape` that lie in the runs of its dimensions.

    Args:
        offset: of the region, where those of a row are alike in that row.
        counts: its shape.
        steps: its strides.
        source: shape of what feeds it.
        strides: of this, None where it is dense.
        shape: of the tensor, or of a row of it.
        runs: of its dimensions.
        part: shape of all that the rank holds.
    """
    pieces = [Piece(0, 0, offset, joined(_dimensions(Region(offset, counts, steps), source, strides)))]
    for at, (n, kept) in enumerate(zip(shape, runs, strict=True)):
        if kept == ((0, n),):
            continue
        held = sum(end - begin for begin, end in kept)
        # Dimensions before this one are cut already.
        outer = math.prod(sum(end - begin for begin, end in runs[i]) for i in range(at))
        inner = math.prod(shape[at + 1 :])
        found, begun = [], 0
        for begin, end in kept:
            width = end - begin
            for piece in pieces:
                for one in _cut(piece, outer, n, inner, begin, end):
                    found.append(
                        relaid(one, (outer, width, inner), (held * inner, inner, 1), begun * inner)
                        if width != held
                        else one
                    )
            begun += width
        pieces = found
    return tuple(_settled(piece, math.prod(part)) for piece in pieces)


def _cut(piece: Piece, outer: int, length: int, inner: int, begin: int, end: int) -> list[Piece]:
    """As `cut`, which looks at each row: most pieces lie one behind the other, and need no look."""
    dense = len(piece.dimensions) == 1 and piece.dimensions[0][1:] == (1, 1)
    count = piece.dimensions[0][0] if dense else 0
    if dense and outer == 1:
        low, high = max(piece.into, begin * inner), min(piece.into + count, end * inner)
        if low >= high:
            return []
        dimensions = joined([(high - low, 1, 1)])
        return [Piece(piece.source, piece.offset + low - piece.into, low - begin * inner, dimensions)]
    if dense and count == outer * length * inner:
        width = (end - begin) * inner
        dimensions = joined([(outer, width, length * inner), (width, 1, 1)])
        return [Piece(piece.source, piece.offset + begin * inner, 0, dimensions)]
    return cut(piece, outer, length, inner, begin, end)


def _settled(piece: Piece, held: int) -> _Narrow:
    """A piece as links have it, the widest step in the source first; `held` elements are all that the rank has."""
    columned = columns(piece.dimensions)
    counts, steps, strides = columned[0] or (1,), columned[1] or (1,), columned[2] or (1,)
    count, shape = math.prod(counts), counts
    dense = strides == row_major(shape)
    span = 1 + _reach(shape, strides)
    if Region(0, counts, steps).dense:
        counts, steps = (count,), (1,)
    fills = steps == (1,) and count == held
    return _Narrow(piece.offset, span, shape, None if dense else strides, piece.into, counts, steps, count, fills)


def _dimensions(region: Region, source: Shape, strides: Shape | None) -> list[Dimension]:
    """(how many, step in the target, step in the source) of a link."""
    if strides is None:
        return list(zip(region.shape, region.strides, row_major(region.shape), strict=True))
    into = row_major(source) if region.dense else region.strides
    return list(zip(source, into, strides, strict=True))


def _link(link: Link, piece: _Narrow, shift: int, held: Shape) -> Link:
    """A piece as a link; `shift` is where it begins in the part, whose shape is `held`."""
    entry, size = link.entry, itemsize(link.entry.dtype)
    taken = TensorEntry(
        entry.key,
        entry.dtype,
        held if piece.fills and piece.strides is None else piece.shape,
        entry.file,
        entry.offset + piece.offset * size,
        piece.span * size,
        piece.strides,
        entry.swapped,
        entry.packed,
    )
    region = whole(held) if piece.fills else Region(piece.into + shift, piece.counts, piece.steps)
    scales = link.scales
    if scales is not None:
        # Rows of the entry, which are rows of the region.
        row = link.region.count // max(1, scales.shape[0])
        if piece.strides is not None or entry.strides is not None or piece.offset % row or piece.count % row:
            raise _across_rows(link)
        scales = _rows_of(scales, piece.offset // row, piece.count // row)
    return Link(taken, link.target, region, False, scales)


def _rows_of(scales: TensorEntry, begin: int, rows: int) -> TensorEntry:
    size = itemsize(scales.dtype)
    return replace(
        scales, shape=(rows, *scales.shape[1:]), offset=scales.offset + begin * size, nbytes=rows * size, strides=None
    )
