"""A linear layer whose weight is int8: the product of bitsandbytes' `Linear8bitLt`, where that package is not there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .rows import STEP

# Elements of the weight that are made floats at once: 4 MiB in fp32.
_AT_ONCE = 1024 * 1024
# Elements of the product, or of inputs in another dtype, that are made at once.
_PRODUCT = 256 * 1024
# Inputs of fewer rows take less time than making floats of the weight, which is quicker for fp32 than for bfloat16.
_FEW = 8
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FORMAT = "weight_format"


class FrozenParameter(nn.Parameter):
    """A parameter that stays as it is when a whole model is made to require gradients: int8 cannot have them."""

    def __new__(cls, data: torch.Tensor, requires_grad: bool = False) -> FrozenParameter:
        """`requires_grad` is for those who make a parameter like another, and is not looked at."""
        return super().__new__(cls, data, requires_grad=False)

    def requires_grad_(self, requires_grad: bool = True) -> FrozenParameter:
        """Nothing."""
        return self


class Int8Linear(nn.Module):
    """A linear layer whose weight is int8, by rows.

    Its memory beside inputs and outputs is at most 8 MiB, forward and backward, for rows up to 1 Mi elements (16 MiB in
    float64), and what the libraries of products pack for themselves: the weight is made floats some rows at a time. It
    has gradients for its input and its bias. A cast of the model leaves weight and scales as they are; they move
    between devices. A state dict of it is one of `Linear8bitLt`, and the other way round.

    Attributes:
        weight: int8 [out_features, in_features], without gradient.
        SCB: fp32 [out_features], the largest magnitude of each row, without gradient.
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
        self.weight = FrozenParameter(torch.empty(out_features, in_features, dtype=torch.int8, device=device))
        self.SCB = FrozenParameter(torch.empty(out_features, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [..., in_features] to [..., out_features], in the dtype of `x`, or that of autocast where it is on.

        The error of an element is at most eps of that dtype times the sum of the magnitudes of what it sums up, and
        as much of it again as sums in fp32 lose. Raises RuntimeError, as `nn.Linear` does, for an `x` of another width
        or of integers.
        """
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(kind))
        if x.dtype not in _DTYPES or not x.dim() or x.shape[-1] != self.weight.shape[1]:
            raise _refusal(x, self.weight)
        # Named in full: a tensor without elements cannot guess a size.
        flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        # As a function of torch takes it: a parameter that is elsewhere brings its values here, once.
        bias = None if self.bias is None else self.bias.view(self.bias.shape)
        y: torch.Tensor = _Product.apply(flat, self.weight, self.SCB, bias)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], y.shape[1])

    def extra_repr(self) -> str:
        """As of `nn.Linear`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def requires_grad_(self, requires_grad: bool = True) -> Int8Linear:
        """For the bias alone."""
        if self.bias is not None:
            self.bias.requires_grad_(requires_grad)
        return self

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of every module; weight and scales stay frozen, whoever sets them."""
        super().register_parameter(name, param)
        self._freeze()

    def _freeze(self) -> None:
        for name in ("weight", "SCB"):
            found = self._parameters.get(name)
            if type(found) is nn.Parameter:
                # The object stays, so modules that share it go on doing so.
                found.requires_grad = False
                found.__class__ = FrozenParameter

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A pickle makes plain parameters of all.
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._freeze()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Int8Linear:
        own = (self.weight, self.SCB)

        def kept(tensor: torch.Tensor) -> torch.Tensor:
            found = fn(tensor)
            if found.dtype != tensor.dtype and any(tensor is one for one in own):
                return tensor.to(found.device)
            return found

        super()._apply(kept, recurse)  # type: ignore[no-untyped-call]
        self._freeze()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Row by row; bitsandbytes writes it too.
        destination[prefix + _FORMAT] = torch.tensor(0, dtype=torch.uint8, device="cpu")

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        wrong = list(_wrong(state_dict, prefix))
        if wrong:
            error_msgs.extend(wrong)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if prefix + _FORMAT in unexpected_keys:
            unexpected_keys.remove(prefix + _FORMAT)


def _wrong(state_dict: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """What of a state dict is not row-wise int8; a copy would round floats to it without a word."""
    for name, dtype in (("weight", torch.int8), ("SCB", torch.float32)):
        found = state_dict.get(prefix + name)
        if isinstance(found, torch.Tensor) and found.dtype != dtype:
            yield f"{prefix}{name}: expected {dtype}, found {found.dtype}. Load a state dict of int8 layers."
    layout = state_dict.get(prefix + _FORMAT, 0)
    if isinstance(layout, torch.Tensor):
        layout = 0 if layout.is_meta else layout.item()
    if layout not in (0, "row"):
        yield (
            f"{prefix}{_FORMAT}: expected 0 (row by row), found {layout!r}. "
            "Save the model again with bitsandbytes 0.45 or later, which writes rows."
        )


def _refusal(x: torch.Tensor, weight: torch.Tensor) -> Exception:
    """What `nn.Linear` says of such an `x`, with a weight that takes no memory."""
    dtype = x.dtype if x.dtype in _DTYPES else torch.float32
    try:
        nn.functional.linear(x, torch.zeros((), dtype=dtype, device=x.device).expand(weight.shape))
    except RuntimeError as error:
        return RuntimeError(str(error))
    return RuntimeError(f"expected floats [..., {weight.shape[1]}], found {x.dtype} {list(x.shape)}")


class _Product(torch.autograd.Function):
    """Keeps the int8 weight for the way back: of plain operations, every block of floats would be kept."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, scales)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _multiply(x, weight, scales, bias, over=0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, None, torch.Tensor | None]:
        weight, scales = ctx.saved_tensors
        to_x = _multiply(grad, weight, scales, None, over=1) if ctx.needs_input_grad[0] else None
        to_bias = grad.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[3] else None
        return to_x, None, None, to_bias


def _multiply(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, *, over: int
) -> torch.Tensor:
    """`x` times the weight's transpose (`over` 0: its rows are the outputs) or times the weight (`over` 1)."""
    # Parameters that are elsewhere bring their values here, and not for each of the blocks.
    weight, scales = weight.view(weight.shape), scales.view(scales.shape)
    y = x.new_empty(x.shape[0], weight.shape[over])
    dtype = _computed_in(x)
    # Integers to 127 are exact in these, so the scales can wait for the product. In fp16 the sums would overflow.
    later = over == 0 and dtype in (torch.float32, torch.bfloat16)
    with torch.autocast(x.device.type, enabled=False):
        for at, block in _blocks(weight, None if later else scales, dtype, over):
            size = block.shape[over]
            right = block.t() if over == 0 else block
            step = max(1, _PRODUCT // max(size, x.shape[1] if dtype != x.dtype else 1))
            for inputs, outputs in zip(torch.split(x, step), torch.split(y.narrow(1, at, size), step), strict=True):
                product = torch.mm(inputs.to(dtype), right)
                if later:
                    product = product.float().mul_(scales[at : at + size] * STEP)
                if bias is not None:
                    product += bias[at : at + size]
                outputs.copy_(product)
    return y


def _computed_in(x: torch.Tensor) -> torch.dtype:
    if x.device.type != "cpu":
        return x.dtype
    # Most processors have no product in fp16, and those that have are little faster for it.
    few = x.dtype == torch.bfloat16 and x.shape[0] < _FEW
    return torch.float32 if few or x.dtype == torch.float16 else x.dtype


def _blocks(
    weight: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype, over: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Rows (`over` 0) or columns (1) of the weight as floats, times the scales if they are given, in one buffer."""
    total, others = weight.shape[over], weight.shape[1 - over]
    step = min(max(1, _AT_ONCE // max(1, others)), max(1, total))
    last = torch.empty(step * others, dtype=dtype, device=weight.device)
    # The scales are fp32, and so is what they scale.
    first = last if scales is None or dtype == torch.float32 else last.to(torch.float32)
    for at in range(0, total, step):
        part = weight.narrow(over, at, min(step, total - at))
        block = first[: part.numel()].view(part.shape).copy_(part)
        if scales is not None:
            block.mul_((scales[at : at + step] if over == 0 else scales).unsqueeze(1)).mul_(STEP)
        yield at, block if first is last else last[: part.numel()].view(part.shape).copy_(block)
