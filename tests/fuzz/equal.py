"""Whether lowmem's tensors are the reference reader's."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .guard import Broken


def check_equal(made: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    """Same names, dtypes, shapes and bytes.

    Raises:
        Broken: they differ.
    """
    if made.keys() != wanted.keys():
        raise Broken(f"other tensors: {sorted(made.keys() ^ wanted.keys())[:4]!r}")
    for name, tensor in made.items():
        problem = check_same(tensor, wanted[name])
        if problem:
            raise Broken(f"{name!r}: {problem}")


def check_same(tensor: torch.Tensor, other: torch.Tensor) -> str:
    """What differs in dtype, shape or bytes; empty where nothing does."""
    if tensor.dtype != other.dtype or tensor.shape != other.shape:
        return f"{tensor.dtype} {tuple(tensor.shape)}, not {other.dtype} {tuple(other.shape)}"
    if not tensor.numel() or torch.equal(_bits(tensor), _bits(other)):
        return ""
    return "other values"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    # Not `contiguous`: what has one element is that, whatever its stride, and `view` is particular.
    return tensor.detach().flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)
