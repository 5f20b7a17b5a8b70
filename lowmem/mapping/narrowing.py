"""A mapping of whole tensors, narrowed to the parts that one rank holds."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

from .._strides import Dimension, Shape, columns, joined, row_major
from ..checkpoint import TensorEntry
from ..dtypes import itemsize
from ..errors import UnsupportedError
from ..modeling.following import NotFollowedError, Piece, cut, relaid
from ..modeling.sharding import Part, Runs
from ..modeling.targets import Target
from .records import KeyMapping, Link, Region, whole

# A piece of a link as counts and steps: first element in the source and in the part, how many, the steps in both.
_Narrow = tuple[int, int, Shape, Shape, Shape]


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
    copies: dict[str, list[str]] = defaultdict(list)
    for name in again:
        copies[mapping.tied[name]].append(name)
    links: list[Link] = []
    for link in mapping.links:
        for name in (link.target, *copies.get(link.target, ())):
            moved = link if name == link.target else replace(link, target=name)
            part = parts.get(name)
            if part is None:
                links.append(moved)
            else:
                links += narrowed(moved, targets[name].shape, part)
    local = {name: replace(t, shape=parts[name].shape) if name in parts else t for name, t in targets.items()}
    links += _empty(mapping, links, local)
    computed = tuple(replace(c, parts=tuple(map(parts.get, c.targets))) for c in mapping.computed)
    return replace(mapping, links=tuple(links), tied=tied, computed=computed), local


def _check_made(mapping: KeyMapping, targets: Mapping[str, Target], parts: Mapping[str, Part]) -> None:
    """int8 is made of whole rows, whose scales are on the rank that has the rows."""
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


def _empty(mapping: KeyMapping, links: Iterable[Link], local: Mapping[str, Target]) -> list[Link]:
    """Links of tensors of which this rank holds nothing: they are fed all the same."""
    fed = {link.target for link in links}
    found = {}
    for link in mapping.links:
        name = link.target
        if name not in fed and name not in found:
            shape = local[name].shape
            nothing = replace(link.entry, shape=shape, strides=None, nbytes=0)
            found[name] = Link(nothing, name, whole(shape), False)
    return list(found.values())


def narrowed(link: Link, shape: Shape, part: Part) -> list[Link]:
    """The links that feed one rank's part of a target.

    Args:
        link: one that feeds the target, or a region of it.
        shape: of the whole target.
        part: of the rank.
    """
    if part.shape == shape:
        return [link]
    if 0 in part.shape or not link.region.count:
        return []
    region, runs = link.region, part.runs
    inner, shift = math.prod(shape[1:]), 0
    last = region.offset + sum((n - 1) * step for n, step in zip(region.shape, region.strides, strict=True))
    first = region.offset // inner
    if first == last // inner and len(shape) > 1:
        # All of it in one row, or one expert: the others are divided alike, so that most of this was worked out.
        local = _position(runs[0], first)
        if local is None:
            return []
        region, shift = Region(region.offset - first * inner, region.shape, region.strides), local
        shape, runs = shape[1:], runs[1:]
    entry = link.entry
    held = tuple(sum(end - begin for begin, end in each) for each in runs)
    try:
        pieces = _narrowed(region, entry.shape, entry.strides, shape, runs)
    except NotFollowedError:
        raise UnsupportedError(
            f"{entry.file}: tensor {entry.key!r}: rows of it end within rows of {link.target!r}, which is divided "
            "among ranks: expected whole ones; load the model whole and save it, then load that"
        ) from None
    shift *= math.prod(held)
    return [_link(link, piece, shift, part.shape) for piece in pieces]


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
    region: Region, source: Shape, strides: Shape | None, shape: Shape, runs: tuple[Runs, ...]
) -> tuple[_Narrow, ...]:
    """The pieces of a region of a tensor of `shape` that lie in the runs of its dimensions."""
    pieces = [Piece(0, 0, region.offset, joined(_dimensions(region, source, strides)))]
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
                for one in cut(piece, outer, n, inner, begin, end):
                    found.append(
                        relaid(one, (outer, width, inner), (held * inner, inner, 1), begun * inner)
                        if width != held
                        else one
                    )
            begun += width
        pieces = found
    return tuple((p.offset, p.into, *_by_source(p)) for p in pieces)


def _dimensions(region: Region, source: Shape, strides: Shape | None) -> list[Dimension]:
    """(how many, step in the target, step in the source) of a link."""
    if strides is None:
        return list(zip(region.shape, region.strides, row_major(region.shape), strict=True))
    into = row_major(source) if region.dense else region.strides
    return list(zip(source, into, strides, strict=True))


def _by_source(piece: Piece) -> tuple[Shape, Shape, Shape]:
    """Counts, steps in the target and steps in the source, the widest step in the source first."""
    shape, into, source = columns(piece.dimensions)
    return shape or (1,), into or (1,), source or (1,)


def _link(link: Link, piece: _Narrow, shift: int, held: Shape) -> Link:
    """A piece as a link; `shift` is where it begins in the part, whose shape is `held`."""
    offset, into, shape, into_strides, strides = piece
    entry, size = link.entry, itemsize(link.entry.dtype)
    count = math.prod(shape)
    region = Region(into + shift, shape, into_strides)
    if region.dense:
        region = whole(held) if count == math.prod(held) else Region(into + shift, (count,), (1,))
    dense = strides == row_major(shape)
    span = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    taken = replace(
        entry,
        shape=held if dense and region == whole(held) else shape,
        strides=None if dense else strides,
        offset=entry.offset + offset * size,
        nbytes=span * size,
    )
    scales = link.scales
    if scales is not None:
        # Rows of the entry, which are rows of the region.
        row = link.region.count // max(1, scales.shape[0])
        if not dense or entry.strides is not None or offset % row or count % row:
            raise _across_rows(link)
        scales = _rows_of(scales, offset // row, count // row)
    return Link(taken, link.target, region, False, scales)


def _rows_of(scales: TensorEntry, begin: int, rows: int) -> TensorEntry:
    size = itemsize(scales.dtype)
    return replace(
        scales, shape=(rows, *scales.shape[1:]), offset=scales.offset + begin * size, nbytes=rows * size, strides=None
    )
