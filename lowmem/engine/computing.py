"""Run the operations that make tensors of the model of others, and check what they give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..errors import LowmemError, ModelError
from ..modeling.alone import alone, modes_as_before
from ..modeling.conversions import REMEDY
from ..modeling.failures import refusing
from ..modeling.targets import dtype_name
from ..planner import Placement
from ..planner.records import Group
from .cleanup import large_blocks_apart, let_go
from .destinations import allocate


def compute(group: Group, sources: list[torch.Tensor], origin: str) -> Iterator[tuple[Placement, torch.Tensor]]:
    """Where each tensor goes that the operation gives, and the tensor, in memory of its own on the CPU.

    Args:
        group: the operation and its results.
        sources: what it takes; the list is empty afterwards.
        origin: where they come from, for messages.

    Raises:
        ModelError: the operation failed, or gave something else than it said.
    """
    made = _run(group, sources, f"{origin}: the operation {group.name}")
    # Freed one after the other: a result that goes into a file or to another device is not kept.
    made.reverse()
    taken: set[int] = set()
    parts = group.parts or (None,) * len(group.results)
    for places, part in zip(group.results, parts, strict=True):
        result = made.pop()
        result = _own(result if part is None else part.take(result), places[0], taken)
        for placement in places:
            yield placement, result


def _run(group: Group, sources: list[torch.Tensor], what: str) -> list[torch.Tensor]:
    try:
        # Wherever the caller has its tensors made, and of whatever kind.
        with (
            alone(),
            modes_as_before(),
            torch.inference_mode(False),
            torch.no_grad(),
            torch.device("cpu"),
            large_blocks_apart(),
            refusing(f"{what}, failed"),
        ):
            sources[:] = map(_changeable, sources)
            # One that has inference mode itself gives such tensors, of which no parameter can be.
            made = [_changeable(one) for one in group.operation(sources)]
    except LowmemError as error:
        let_go(error)
        raise
    finally:
        sources.clear()
    problem = _problem(group, made)
    if problem:
        # Whoever keeps the error keeps what is here.
        made.clear()
        raise ModelError(f"{what}: {problem}; {REMEDY}")
    return [result.detach() for result in made]


def _changeable(tensor: Any) -> Any:
    """The same memory; an inference tensor may not be changed outside of inference mode."""
    if not isinstance(tensor, torch.Tensor) or not tensor.is_inference() or tensor.device.type != "cpu":
        return tensor
    tensor = tensor.resolve_conj().resolve_neg()
    lies = tensor.storage_offset(), tensor.shape, tensor.stride()
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage(), *lies)


def _problem(group: Group, made: Sequence[object]) -> str:
    """What differs from what was planned; empty when nothing does."""
    if len(made) != len(group.results):
        return f"expected {len(group.results)} tensors, found {len(made)}"
    parts = group.parts or (None,) * len(group.results)
    for places, part, result in zip(group.results, parts, made, strict=True):
        planned, shape = places[0], places[0].shape if part is None else part.of
        given = group.dtype or planned.dtype
        expected = f"expected {planned.target!r} as {given} of shape {shape} on the CPU"
        if not isinstance(result, torch.Tensor):
            return f"{expected}, found {type(result).__name__}"
        dtype = dtype_name(result.dtype)
        if (tuple(result.shape), dtype, result.device.type) != (shape, given, "cpu"):
            return f"{expected}, found {dtype} of shape {tuple(result.shape)} on {result.device}"
    return ""


def _own(result: torch.Tensor, placement: Placement, taken: set[int]) -> torch.Tensor:
    """The result, dense and alone in its storage: what is a view of a source would keep all of it."""
    # A complex tensor may only say that it is conjugated.
    result = result.resolve_conj().resolve_neg()
    storage = result.untyped_storage()
    if dtype_name(result.dtype) != placement.dtype:
        return allocate(replace(placement, device="cpu")).copy_(result)
    alone = storage.nbytes() == result.nbytes and storage.data_ptr() not in taken
    if not alone or not result.is_contiguous():
        result = allocate(replace(placement, device="cpu")).copy_(result)
    taken.add(result.untyped_storage().data_ptr())
    return result
