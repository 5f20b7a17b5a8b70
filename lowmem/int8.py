"""Row-wise int8 as bitsandbytes has it (LLM.int8, arXiv:2208.07339): each row of a weight by its largest magnitude.

A weight of shape [out, in] is int8 `weight` [out, in] and fp32 `SCB` [out]: `SCB` is the row's largest magnitude, and
an element of the row is `weight * SCB / 127`. The arithmetic is that of `int8_vectorwise_quant` and
`int8_vectorwise_dequant` in bitsandbytes 0.50 (backends/default/ops.py), bit for bit: values are rounded to fp16 first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# Elements that are worked on at once, if a row has no more: their copies stay in the processor's caches.
_AT_ONCE = 64 * 1024
# Bytes of work for each: one in fp16, one in fp32.
_WORK = 6
# 1/127 as bitsandbytes writes it down.
_STEP = 7.874015718698502e-3


def work_size(columns: int) -> int:
    """Bytes of scratch memory for the functions below, for rows of so many elements."""
    return _WORK * max(columns, _AT_ONCE)


def quantise(source: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, work: torch.Tensor) -> None:
    """Rows of floats to int8.

    Args:
        source: floats [rows, columns], of any strides.
        values: int8 [rows, columns], filled.
        scales: fp32 [rows], filled. What is not finite there says that the row cannot be quantised.
        work: uint8, at least `work_size(columns)`.
    """
    for part, half, full in _blocks(source, work):
        _rounded(source[part], half, full)
        torch.amax(full.abs(), 1, out=scales[part])
        _scale(full, scales[part], values[part])


def measure(source: torch.Tensor, scales: torch.Tensor, work: torch.Tensor) -> None:
    """Raise `scales` to the largest magnitudes of these rows, for rows that come in several parts; as `quantise`."""
    for part, half, full in _blocks(source, work):
        _rounded(source[part], half, full)
        torch.maximum(scales[part], full.abs().amax(1), out=scales[part])


def quantise_by(source: torch.Tensor, scales: torch.Tensor, values: torch.Tensor, work: torch.Tensor) -> None:
    """Parts of rows to int8, by `scales` that are known; as `quantise`."""
    for part, half, full in _blocks(source, work):
        _rounded(source[part], half, full)
        _scale(full, scales[part], values[part])


def dequantise(values: torch.Tensor, scales: torch.Tensor, into: torch.Tensor, work: torch.Tensor) -> None:
    """Rows of int8 back to floats.

    Args:
        values: int8 [rows, columns].
        scales: fp32 [rows].
        into: floats [rows, columns] of any dtype and strides, filled.
        work: uint8, at least `work_size(columns)`.
    """
    for part, _, full in _blocks(values, work):
        full.copy_(values[part])
        full.mul_(scales[part].unsqueeze(1)).mul_(_STEP)
        into[part].copy_(full)


def _blocks(source: torch.Tensor, work: torch.Tensor) -> Any:
    """Slices of rows, with the part of `work` that is theirs in fp16 and in fp32."""
    rows, columns = source.shape
    if not rows or not columns:
        return
    step = max(1, _AT_ONCE // columns)
    count = step * columns
    full = work[: 4 * count].view(torch.float32)
    half = work[4 * count : 6 * count].view(torch.float16)
    for at in range(0, rows, step):
        size = min(step, rows - at)
        shape = (size, columns)
        yield slice(at, at + size), half[: size * columns].view(shape), full[: size * columns].view(shape)


def _rounded(source: torch.Tensor, half: torch.Tensor, full: torch.Tensor) -> None:
    """`source` as fp16 has it, in fp32."""
    half.copy_(source)
    full.copy_(half)


def _scale(full: torch.Tensor, scales: torch.Tensor, values: torch.Tensor) -> None:
    # Of a row of zeros alone the product is no number; bitsandbytes' conversion to int8 makes 0 of it.
    full.mul_((127.0 / scales).unsqueeze(1)).round_().nan_to_num_(0.0)
    values.copy_(full)


class Int8Linear(nn.Module):
    """A linear layer whose weight is int8; the product of bitsandbytes' `Linear8bitLt` without it.

    Attributes:
        weight: int8 [out_features, in_features].
        SCB: fp32 [out_features], the largest magnitude of each row.
        bias: floats [out_features], or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        weight = torch.empty(out_features, in_features, dtype=torch.int8, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.SCB = nn.Parameter(torch.empty(out_features, dtype=torch.float32, device=device), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [..., in_features] to [..., out_features], in the dtype of `x`."""
        weight = (self.weight.float() * self.SCB.unsqueeze(1) * _STEP).to(x.dtype)
        return nn.functional.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))
