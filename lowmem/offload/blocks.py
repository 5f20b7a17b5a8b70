"""Products and lookups of weights that are larger than the memory to make them in, a block of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ..errors import OptionError
from ..sizes import format_size

# Makes rows begin..end of the weight in the buffer: [end - begin, in_features].
Rows = Callable[[int, int, torch.Tensor], torch.Tensor]
# Blocks of whole multiples of these are what MKL and oneDNN sum in the same order as the whole weight. The first that
# fits is taken. (Of fp32, 512 rows and 1536 are summed otherwise for 16 rows of inputs and more; 256 and 1024 are not.)
_MULTIPLES = (1024, 256, 64, 16)


def rows_at_once(nbytes: int, in_features: int, dtype: torch.dtype) -> int:
    """How many rows of a weight `linear_in_blocks` makes at once in a buffer of `nbytes`; 0 where not one fits."""
    fitting = nbytes // max(1, in_features * dtype.itemsize)
    return next((fitting // multiple * multiple for multiple in _MULTIPLES if fitting >= multiple), fitting)


def linear_in_blocks(
    x: torch.Tensor,
    rows: Rows,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    bias: torch.Tensor | None,
    buffer: torch.Tensor,
) -> torch.Tensor:
    """`torch.nn.functional.linear(x, weight, bias)` of a weight that is never whole.

    On the CPU one row of `x` (a token) gives the bits of the whole weight in fp32 and the halves, if `out_features` and
    the blocks are multiples of 16 times the number of torch's threads. Several rows mostly do; those of bf16 do not on
    a processor with AMX from 33 rows on, where it sums in another order. The difference is one of rounding: at most
    2**-7 (bf16), 2**-10 (fp16), 2**-20 (fp32) of the largest result, or of the largest sum of magnitudes where
    the results cancel out. Larger blocks differ less often.

    Args:
        x: [..., in_features].
        rows: makes rows begin..end of the weight in a buffer, in `dtype` and on the device of `x`. It is called again
            for the way back, if `x` needs a gradient; the weight gets none.
        out_features: rows of the weight.
        in_features: columns of the weight.
        dtype: of the weight.
        bias: [out_features].
        buffer: flat uint8, at least one row. What it holds afterwards means nothing.

    Raises:
        OptionError: the buffer does not hold one row.
    """
    if not out_features:
        return functional.linear(x, torch.empty(0, in_features, dtype=dtype, device=x.device), bias)
    step = rows_at_once(buffer.numel(), in_features, dtype)
    if not step:
        raise OptionError(
            f"a weight of {out_features} rows of {in_features} {dtype}: expected a buffer of at least one row "
            f"({format_size(in_features * dtype.itemsize)}), found {format_size(buffer.numel())}. Give more memory."
        )
    wanted = x.requires_grad or (bias is not None and bias.requires_grad)
    made = _Blocks(rows, out_features, step, buffer)
    if torch.is_grad_enabled() and wanted:
        found: torch.Tensor = _Linear.apply(x, bias, made)  # type: ignore[no-untyped-call]
        return found
    return made.product(x, bias)


def embedding_by_rows(
    ids: torch.Tensor, source: torch.Tensor, dtype: torch.dtype, padding_idx: int | None = None
) -> torch.Tensor:
    """`torch.nn.functional.embedding(ids, source.to(dtype))`, bit for bit, that casts only the rows it gives.

    Args:
        ids: int32 or int64 of any shape; the result is on its device.
        source: the table as it lies, [rows, columns].
        dtype: of the result.
        padding_idx: as of `torch.nn.functional.embedding`.

    Raises:
        IndexError: an id that is no row, as torch raises it.
    """
    found = functional.embedding(ids.to(source.device), source, padding_idx)
    return found.to(device=ids.device, dtype=dtype)


class _Blocks:
    """A weight that is made in blocks of rows."""

    def __init__(self, rows: Rows, out_features: int, step: int, buffer: torch.Tensor) -> None:
        self._rows = rows
        self._out_features = out_features
        self._step = step
        self._buffer = buffer

    def __iter__(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        for begin in range(0, self._out_features, self._step):
            end = min(begin + self._step, self._out_features)
            yield begin, end, self._rows(begin, end, self._buffer)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`x` times the transpose, plus `bias`."""
        result: torch.Tensor | None = None
        for begin, end, block in self:
            # `linear` and a copy: a product that writes into columns itself takes other ways than the whole one.
            part = functional.linear(x, block, None if bias is None else bias[begin:end])
            if result is None:
                # Of the first block's dtype, which autocast may have chosen.
                result = part.new_empty(*x.shape[:-1], self._out_features)
            result[..., begin:end].copy_(part)
        assert result is not None
        return result

    def product_back(self, grad: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`grad` times the weight. Sums of halves are kept in fp32 between blocks."""
        total: torch.Tensor | None = None
        for begin, end, block in self:
            part = torch.matmul(grad[..., begin:end], block.to(grad.dtype))
            if total is None:
                whole = self._step >= self._out_features
                total = part if whole or part.dtype not in (torch.bfloat16, torch.float16) else part.float()
            else:
                total += part
        assert total is not None
        return total.to(dtype)


class _Linear(torch.autograd.Function):
    """Keeps no block: of plain operations, every one would be kept for the way back, in a buffer that is used again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, blocks: _Blocks) -> torch.Tensor:
        ctx.blocks = blocks
        ctx.dtypes = x.dtype, None if bias is None else bias.dtype
        return blocks.product(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        of_x, of_bias = ctx.dtypes
        to_x = ctx.blocks.product_back(grad, of_x) if ctx.needs_input_grad[0] else None
        # Over all but the last; of nothing at all torch could not tell how many rows there are.
        summed = grad.sum(tuple(range(grad.dim() - 1))) if grad.dim() > 1 else grad
        to_bias = summed.to(of_bias) if ctx.needs_input_grad[1] else None
        return to_x, to_bias, None
