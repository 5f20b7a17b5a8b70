"""What the model's kind converts, as links: fused experts are regions of one target, parts of a tensor entries."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from .._strides import columns, joined, row_major
from ..checkpoint import TensorEntry
from ..dtypes import itemsize
from ..errors import KeysError
from ..modeling.conversions import Conversion, Part
from ..modeling.following import NotFollowedError, place
from ..modeling.targets import Target
from .names import collision
from .records import Computation, Link, Mismatch, Region, whole


@dataclass
class Converted:
    """What conversions feed.

    Attributes:
        links: a link for each part.
        computed: what must be computed.
        mismatched: targets that would get another shape, under the first key that feeds them.
        sources: target → the first key that feeds it or would.
        leads: target → the one whose dtype it gets, where several are made together.
        files: target → the file of that key.
    """

    links: list[Link] = field(default_factory=list)
    computed: list[Computation] = field(default_factory=list)
    mismatched: list[Mismatch] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)
    leads: dict[str, str] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)


def link_converted(
    conversions: Iterable[Conversion], entries: Mapping[str, TensorEntry], state: Mapping[str, Target]
) -> Converted:
    """Links and computations from conversions.

    Args:
        conversions: what the model's kind makes of the keys.
        entries: the tensors by the names that the conversions have for them.
        state: the targets of the state dict.

    Raises:
        KeysError: a conversion gives something else than the model's tensors, or one of them twice.
    """
    found = Converted()
    for conversion in conversions:
        first = entries[conversion.keys[0]]
        fitting: set[str] = set()
        if len(conversion.targets) > 1 and not conversion.dtype:
            found.leads.update(dict.fromkeys(conversion.targets, conversion.targets[0]))
        for name, shape in zip(conversion.targets, conversion.shapes, strict=True):
            target = state.get(name)
            if target is None:
                raise KeysError(
                    f"{first.file}: tensor {first.key!r}: {conversion.what} makes {name!r} of it, which the "
                    "model does not have; bring the checkpoint that belongs to the config"
                )
            if name in found.sources:
                raise KeysError(collision(first.file, first.key, found.sources[name], name))
            found.sources[name], found.files[name] = first.key, first.file
            if shape == target.shape:
                fitting.add(name)
            else:
                found.mismatched.append(Mismatch(first.key, name, shape, target.shape, first.dtype))
        try:
            if conversion.parts is None:
                raise NotFollowedError
            links = [
                _link(part, entries[part.key], state[part.target])
                for part in conversion.parts
                if part.target in fitting
            ]
        except NotFollowedError:
            if len(fitting) == len(conversion.targets):
                sources = tuple(entries[key] for key in conversion.keys)
                found.computed.append(
                    Computation(conversion.what, sources, conversion.targets, conversion.operation, conversion.dtype)
                )
            else:
                # It is computed as a whole or not at all: those that would fit are missing then, and told so.
                for name in fitting:
                    del found.sources[name]
            continue
        found.links += links
        empty = fitting - {part.target for part in conversion.parts}
        found.links += [Link(first, name, whole(state[name].shape), False) for name in empty]
    return found


def _link(part: Part, entry: TensorEntry, target: Target) -> Link:
    """One part as a link.

    Raises:
        NotFollowedError: the entry is a view that the part does not follow.
    """
    shape, offset, strides, into = part.shape, part.offset, part.strides, part.into_strides
    whole_entry = strides == (1,) == into and entry.strides is None and shape[0] * itemsize(entry.dtype) == entry.nbytes
    if whole_entry and shape[0] < math.prod(target.shape):
        # One of many experts, by far the most of all parts.
        return Link(entry, part.target, Region(part.into, shape, into))
    if entry.strides is not None:
        placed = place(offset, zip(shape, strides, into, strict=True), entry.shape)
        offset = sum(map(int.__mul__, placed.starts, entry.strides))
        dimensions = joined((n, there, step * entry.strides[at]) for at, n, step, there in placed.steps)
        shape, into, strides = columns(dimensions)
    count = math.prod(shape)
    dense = strides == row_major(shape)
    region = Region(part.into, shape or (1,), into or (1,))
    if region.dense:
        region = whole(target.shape) if count == math.prod(target.shape) else Region(part.into, (count,), (1,))
    size = itemsize(entry.dtype)
    if dense and count * size == entry.nbytes and entry.strides is None and region == whole(target.shape):
        return Link(entry if entry.shape == target.shape else replace(entry, shape=target.shape), part.target, region)
    span = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    taken = replace(
        entry,
        shape=target.shape if dense and count == math.prod(target.shape) and region.dense else shape,
        strides=None if dense else strides,
        offset=entry.offset + offset * size,
        nbytes=span * size,
    )
    return Link(taken, part.target, region, dense and count * size == entry.nbytes)
