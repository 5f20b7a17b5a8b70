"""The arithmetic of int8 rows, with all memory handed in.

The engine runs it in each of its readers, a block of rows at a time: nothing here allocates more than a few KiB, since
fresh memory costs more than the arithmetic. It is that of `int8_vectorwise_quant` and `int8_vectorwise_dequant` in
bitsandbytes 0.50 (backends/default/ops.py), bit for bit: values are rounded to fp16 first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

# 1/127 as bitsandbytes writes it down.
STEP = 7.874015718698502e-3
# Elements that are worked on at once, if a row has no more: their copies stay in the processor's caches.
_AT_ONCE = 128 * 1024
# Rows that are worked on at once: what is kept of each is allocated, and must stay small.
_ROWS_AT_ONCE = 1024
# Bytes of work for each element: one in fp32, one in fp16.
_WORK = 6
# A row of bfloat16 with its largest magnitude between these becomes the same int8 without being rounded to fp16: fp16
# has those of its values that are 2**-14 and above, and what is smaller is less than half a step (127 * 2**-14 / 2**-6
# is 0.4961), rounded or not.
_FP16_IS_EXACT = (2.0**-6, 65504.0)


def work_size(columns: int) -> int:
    """Bytes of scratch memory for the functions below, for rows of so many elements, with which they are at their best.

    `least_work` is enough.
    """
    return _WORK * max(columns, _AT_ONCE)


def least_work(columns: int) -> int:
    """Bytes of scratch memory without which rows of so many elements cannot be worked on."""
    return _WORK * columns


def quantise(
    source: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    work: torch.Tensor,
    through: torch.dtype | None = None,
) -> None:
    """Rows of floats to int8.

    Args:
        source: floats [rows, columns], of any strides.
        values: int8 [rows, columns], filled. 0 stands for what is no number, so where its row is all 0.
        scales: fp32 [rows], filled: the largest magnitude of each row, in fp16. It is not finite if the row has a NaN
            or what is infinite in fp16 (65520 and above); such a row cannot be quantised, and its values mean nothing.
        work: uint8, at least `least_work(columns)`.
        through: bfloat16 where the model has the weight so: the source is rounded to it before all else.
    """
    rounded = torch.bfloat16 not in (source.dtype, through)
    for half, full, rows, found, into in _blocks(work, source, scales, values):
        _floats(rows, half, full, rounded=rounded, through=through)
        _largest(full, found)
        low, high = _range(found)
        if not rounded and not _FP16_IS_EXACT[0] <= low <= high <= _FP16_IS_EXACT[1]:
            full.copy_(half.copy_(full))
            found.copy_(found.half())
            low, high = _range(found)
        _scale(full, found, into, exact=0 < low <= high < math.inf)


def measure(source: torch.Tensor, scales: torch.Tensor, work: torch.Tensor, through: torch.dtype | None = None) -> None:
    """Raise `scales` to the largest magnitudes of these rows, for rows that come in several parts.

    Args:
        source: floats [rows, columns], some of the columns of the rows.
        scales: fp32 [rows], zeros before the first part. What is not finite stays so; see `quantise`.
        work: uint8, at least `least_work(columns)`.
        through: as of `quantise`.
    """
    for half, full, rows, known in _blocks(work, source, scales):
        _floats(rows, half, full, rounded=False, through=through)
        found = torch.empty_like(known)
        _largest(full, found)
        # Rounding keeps the order, so the largest stays it.
        found.copy_(found.half())
        torch.maximum(known, found, out=known)


def quantise_by(
    source: torch.Tensor,
    scales: torch.Tensor,
    values: torch.Tensor,
    work: torch.Tensor,
    through: torch.dtype | None = None,
) -> None:
    """Parts of rows to int8, by the `scales` that `measure` found in all the parts.

    Args:
        source: floats [rows, columns], some of the columns of the rows.
        scales: fp32 [rows].
        values: int8 [rows, columns], filled as by `quantise`.
        work: uint8, at least `least_work(columns)`.
        through: as of `quantise`.
    """
    by_fp16 = torch.bfloat16 not in (source.dtype, through)
    for half, full, rows, known, into in _blocks(work, source, scales, values):
        low, high = _range(known)
        exact = _FP16_IS_EXACT[0] <= low <= high <= _FP16_IS_EXACT[1]
        _floats(rows, half, full, rounded=by_fp16 or not exact, through=through)
        _scale(full, known, into, exact=0 < low <= high < math.inf)


def dequantise(values: torch.Tensor, scales: torch.Tensor, into: torch.Tensor, work: torch.Tensor) -> None:
    """Rows of int8 back to floats.

    Args:
        values: int8 [rows, columns].
        scales: fp32 [rows].
        into: floats [rows, columns] of any dtype and strides, filled.
        work: uint8, at least `least_work(columns)`.
    """
    in_place = into.dtype == torch.float32 and into.is_contiguous()
    for _, full, rows, known, floats in _blocks(work, values, scales, into):
        out = floats if in_place else full
        out.copy_(rows)
        out.mul_(known.unsqueeze(1)).mul_(STEP)
        if not in_place:
            floats.copy_(out)


def _blocks(work: torch.Tensor, *of: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The part of `work` that is in fp16 and the one that is in fp32, and a block of rows of each of the tensors."""
    rows, columns = of[0].shape
    if not rows or not columns:
        return
    step = min(max(1, min(_AT_ONCE, len(work) // _WORK) // columns), _ROWS_AT_ONCE, rows)
    count = step * columns
    full = work[: 4 * count].view(torch.float32).view(step, columns)
    half = work[4 * count : 6 * count].view(torch.float16).view(step, columns)
    for blocks in zip(*(torch.split(tensor, step) for tensor in of), strict=True):
        size = blocks[0].shape[0]
        yield (half, full, *blocks) if size == step else (half[:size], full[:size], *blocks)


def _floats(
    source: torch.Tensor, half: torch.Tensor, full: torch.Tensor, *, rounded: bool, through: torch.dtype | None
) -> None:
    """`source` in fp32, as `through` has it, and as fp16 has that if `rounded`."""
    if rounded and through is None and source.dtype not in (torch.bfloat16, torch.float16):
        half.copy_(source)
        full.copy_(half)
        return
    # PyTorch converts bfloat16 to fp16 an element at a time; by way of fp32 it takes a quarter of the time.
    full.copy_(source)
    if through is not None:
        full.copy_(half.view(through).copy_(full))
    if rounded and source.dtype != torch.float16:
        full.copy_(half.copy_(full))


def _largest(full: torch.Tensor, scales: torch.Tensor) -> None:
    """The largest magnitude of each row."""
    torch.amax(full, 1, out=scales)
    torch.maximum(scales, torch.amin(full, 1).neg_(), out=scales)
    # A row of zeros may have left a sign.
    scales.abs_()


def _range(scales: torch.Tensor) -> tuple[float, float]:
    """The least and the largest; two NaN if one of them is."""
    found = scales.tolist()
    if math.isnan(sum(found)):
        return math.nan, math.nan
    return min(found), max(found)


def _scale(full: torch.Tensor, scales: torch.Tensor, values: torch.Tensor, *, exact: bool) -> None:
    """`full` times 127 / `scales`, rounded to int8; unless `exact`, some of the products are no numbers."""
    # What `127.0 / scales` does, and so bitsandbytes; a true division has other last bits.
    factors = torch.reciprocal(scales).mul_(127.0)
    full.mul_(factors.unsqueeze(1)).round_()
    if not exact:
        # Of a row of zeros alone; bitsandbytes' conversion to int8 makes 0 of it.
        full.nan_to_num_(0.0)
    values.copy_(full)
