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
        other = wanted[name]
        if tensor.dtype != other.dtype or tensor.shape != other.shape:
            raise Broken(f"{name!r}: {tensor.dtype} {tuple(tensor.shape)}, not {other.dtype} {tuple(other.shape)}")
        if not torch.equal(_bits(tensor), _bits(other)):
            raise Broken(f"{name!r}: other values")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)
