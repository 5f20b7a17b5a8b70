"""Computed tensors, planned: what operations give and take, and in which dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from ..errors import KeysError, ModelError, UnsupportedError
from ..mapping import Link, whole
from ..mapping.made import kind_of
from ..mapping.records import Computation, KeyMapping
from ..modeling.conversions import REMEDY, Cost
from ..modeling.failures import refusing
from ..modeling.skeleton import Skeleton
from ..sizes import format_size
from .final_dtypes import nbytes_of
from .moves import Placement
from .records import Group


def price(skeleton: Skeleton, mapping: KeyMapping, final: Mapping[str, str]) -> tuple[list[Cost], dict[str, str]]:
    """What each computation gives and takes, and the dtypes of what it gives: target → dtype, tied names too.

    Args:
        skeleton: the targets.
        mapping: the computations.
        final: target → the dtype that sources are cast to.

    Raises:
        KeysError: an operation would give a tensor of another shape than the model's.
        ModelError: an operation cannot say what it gives.
        UnsupportedError: it would give a dtype that torch does not have.
    """
    costs, dtypes = [], {}
    for computation in mapping.computed:
        with refusing(f"{_where(computation)}: the operation {computation.what} failed"):
            cost = computation.operation.cost(final[computation.targets[0]])
            given = [(tuple(shape), dtype) for shape, dtype in cost.results]
        if len(given) != len(computation.targets):
            raise ModelError(
                f"{_where(computation)}: the operation {computation.what} gives {len(given)} tensors; expected one for "
                f"each of {', '.join(map(repr, computation.targets))}; {REMEDY}"
            )
        parts = computation.parts or (None,) * len(given)
        for name, part, (shape, dtype) in zip(computation.targets, parts, given, strict=True):
            expected = skeleton.targets[name].shape if part is None else part.of
            if shape != expected:
                raise KeysError(
                    f"{_where(computation)}: the operation {computation.what} makes {name!r} of shape {shape}; "
                    f"expected {expected}, the model's; check that the checkpoint and its config belong together"
                )
            if not hasattr(torch, dtype):
                raise UnsupportedError(
                    f"{_where(computation)}: the operation {computation.what} makes {name!r} of dtype {dtype}, which "
                    f"torch {torch.__version__} does not have; a later torch may"
                )
            if not computation.dtype:
                dtypes[name] = dtype
            elif dtype != final[name]:
                # Both are there while the one is cast to the other.
                cost = replace(cost, scratch=cost.scratch + nbytes_of(shape, dtype))
            if part is not None:
                # All of it is made, and the part taken.
                cost = replace(cost, scratch=cost.scratch + nbytes_of(shape, dtype))
        costs.append(cost)
    dtypes.update({name: dtypes[leader] for name, leader in mapping.tied.items() if leader in dtypes})
    return costs, dtypes


def _where(computation: Computation) -> str:
    source = computation.sources[0]
    more = f" and {len(computation.sources) - 1} more" if len(computation.sources) > 1 else ""
    return f"{source.file}: tensor {source.key!r}{more}"


def group_of(computation: Computation, cost: Cost, dtype: str, results: Sequence[tuple[Placement, ...]]) -> Group:
    """The group of a computation.

    Args:
        computation: what is computed.
        cost: what it takes.
        dtype: what its sources are cast to, if it is not one that takes them as they are.
        results: where each tensor that it gives goes.
    """
    sources = []
    for entry in computation.sources:
        link = Link(entry, entry.key, whole(entry.shape))
        held = entry.dtype if computation.dtype else dtype
        nbytes = nbytes_of(entry.shape, held)
        sources.append(Placement(entry.key, (entry.key,), entry.shape, held, nbytes, "cpu", "copy", (link,)))
    return Group(
        computation.what,
        computation.operation,
        tuple(sources),
        tuple(results),
        cost.scratch,
        computation.dtype,
        computation.parts,
    )


def about(groups: Sequence[Group]) -> list[str]:
    """What the user should know of computed tensors."""
    if not groups:
        return []
    count = sum(len(group.results) for group in groups)
    most = max(group.nbytes for group in groups)
    kinds = ", ".join(dict.fromkeys(group.what for group in groups))
    first = groups[0].results[0][0].target
    names = repr(first) if count == 1 else f"{count} tensors ({first!r}, …)"
    are, turns = ("is", "") if count == 1 else ("are", f", in {len(groups)} groups one after the other")
    return [
        f"{names} {are} computed ({kinds}) from whole tensors in memory{turns if len(groups) > 1 else ''}, which takes "
        f"up to {format_size(most)} at a time"
    ]


def maker_of(skeleton: Skeleton, mapping: KeyMapping) -> str:
    """What tells a computing model from others: its class, its config, by which an operation may work, and those."""
    return f"torch {torch.__version__}: {kind_of(skeleton)}{mapping.maker}"
