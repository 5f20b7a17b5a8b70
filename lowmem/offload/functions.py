"""Operations that need less than a whole weight, or none of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from .weights import OffloadedParameter, joined

if TYPE_CHECKING:
    from .bringing import Turned, Weight

_Function = Callable[..., Any]


def specially(func: _Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What an operation gives that is known here, or `NotImplemented`: then it takes the weights themselves."""
    special = _special().get(func)
    if special is None or not (func in _named() or (args and not _any_away(kwargs.values()))):
        return NotImplemented
    return special(*args, **kwargs)


def _detach(weight: OffloadedParameter) -> Any:
    return OffloadedParameter(weight.weight, requires_grad=False)


def _to(weight: Any, *args: Any, **kwargs: Any) -> Any:
    """Itself where nothing would change, and nothing but a shape on the meta device."""
    if not isinstance(weight, OffloadedParameter) or kwargs.pop("copy", False):
        return NotImplemented
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    if device is not None and device.type == "meta":
        return torch.empty(weight.weight.shape, dtype=dtype or weight.weight.dtype, device=device)
    same = device is None or device == weight.weight.device
    return weight if same and dtype in (None, weight.weight.dtype) else NotImplemented


def _storage(weight: Any) -> Any:
    """By which tensors that share memory are known: where its values are, if someone asked for that; else an address of
    its own, behind which nothing is.
    """
    return weight.weight.address() if weight.held is None else weight.held.untyped_storage()


def _typed_storage(weight: Any) -> Any:
    typed: Any = torch.storage.TypedStorage
    return typed(wrap_storage=_storage(weight), dtype=weight.weight.dtype, _internal=True)


def _data_ptr(weight: Any) -> int:
    """Where its values are, as long as this tensor lives; of a parameter of the model, until the next one is asked."""
    real: torch.Tensor = weight.weight.whole() if weight.held is None else weight.held
    if weight.is_registered:
        weight.weight.hold(real)
    else:
        weight.held = real
    return real.data_ptr()


def _of_a_copy(func: _Function, weight: Any, *args: Any, **kwargs: Any) -> Any:
    return func(weight.weight.whole().clone(), *args, **kwargs)


def _like(func: _Function) -> _Function:
    """A function that asks only for shape, dtype and device."""

    def call(*args: Any, **kwargs: Any) -> Any:
        def stand_in(value: Any) -> Any:
            if not isinstance(value, OffloadedParameter):
                return value
            return torch.empty((), dtype=value.weight.dtype, device=value.weight.device).expand(tuple(value.shape))

        if _any_away([*args[1:], *kwargs.values()]):
            return NotImplemented
        return func(*map(stand_in, args[:1]), *args[1:], **kwargs)

    return call


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if not isinstance(weight, OffloadedParameter) or not weight.weight.is_too_large:
        return NotImplemented
    if isinstance(bias, OffloadedParameter):
        bias = joined(bias.weight.whole(), bias)
    return joined(weight.weight.linear(input, bias), weight)


def _embedding(
    input: Any,
    weight: Any,
    padding_idx: Any = None,
    max_norm: Any = None,
    *others: Any,
    **named: Any,
) -> Any:
    if not isinstance(weight, OffloadedParameter) or max_norm is not None or not weight.weight.has_rows:
        return NotImplemented
    return joined(weight.weight.rows(input), weight)


def _getitem(weight: Any, index: Any) -> Any:
    if weight.weight.parts == 1 or weight.weight.is_turned:
        return NotImplemented
    if isinstance(index, torch.Tensor) and index.dtype in (torch.int64, torch.int32):
        if index.dim():
            return joined(weight.weight.gather(index), weight)
        index = int(index)
    if type(index) is int and -weight.weight.parts <= index < weight.weight.parts:
        return OffloadedParameter(weight.weight.part(index % weight.weight.parts), weight.requires_grad)
    return NotImplemented


def _turned(weight: Any, dim0: int, dim1: int) -> Any:
    """Transposed, and only brought when it is multiplied with."""
    if weight.weight.parts == 1 or (dim0, dim1) not in _LAST_TWO:
        return NotImplemented
    return OffloadedParameter(weight.weight.turned(), weight.requires_grad)


def _grouped(x: Any, weight: Any, offs: Any = None, **named: Any) -> Any:
    """Of experts that lie one behind the other in `weight`, those that have rows of `x`."""
    if offs is None or any(value is not None for value in named.values()) or x.dim() != 2:
        return NotImplemented
    if not isinstance(weight, OffloadedParameter) or weight.weight.parts == 1:
        return NotImplemented
    ends = offs.tolist() if offs.dim() == 1 else []
    fits = len(ends) == weight.weight.parts and x.dtype == weight.weight.dtype and x.shape[1] == weight.shape[1]
    if not fits or sorted(ends) != ends or ends[0] < 0 or ends[-1] > x.shape[0]:
        return NotImplemented  # torch says what is wrong
    made: torch.Tensor = _Grouped.apply(x, weight.weight, offs)  # type: ignore[no-untyped-call]
    return joined(made, weight)


# The last two of three dimensions.
_LAST_TWO = frozenset((a, b) for one, other in ((1, 2), (2, 1)) for a in (one, one - 3) for b in (other, other - 3))


class _Grouped(torch.autograd.Function):
    """Rows of `x` times the expert that each group of them belongs to."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Weight | Turned, offsets: torch.Tensor) -> torch.Tensor:
        ctx.weight, ctx.offsets = weight, offsets
        return weight.grouped(x, offsets)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return ctx.weight.turned().grouped(gradient.contiguous(), ctx.offsets), None, None


def _batched(x: Any, weight: Any) -> Any:
    """Experts that are all used at once, and do not fit at once."""
    if not isinstance(x, torch.Tensor) or isinstance(x, OffloadedParameter) or x.dim() != 3:
        return NotImplemented
    if not isinstance(weight, OffloadedParameter) or not weight.weight.comes_in_turn:
        return NotImplemented
    made: torch.Tensor = _Batched.apply(x, weight.weight)  # type: ignore[no-untyped-call]
    return joined(made, weight)


class _Batched(torch.autograd.Function):
    """`torch.bmm(x, weight)`, one matrix after the other."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Weight | Turned) -> torch.Tensor:
        ctx.weight = weight
        return weight.batched(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return ctx.weight.turned().batched(gradient), None


def _any_away(values: Iterable[Any]) -> bool:
    return any(isinstance(value, OffloadedParameter) for value in values)


@functools.cache
def _named() -> frozenset[Any]:
    """Functions whose parameters are named here as torch names them, so that they may be called by keyword."""
    return frozenset({functional.linear, functional.embedding, *_asking(), torch.Tensor.to})


@functools.cache
def _asking() -> frozenset[Any]:
    """Functions that take of a tensor nothing but what it is."""
    likes = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like")
    news = ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor")
    return frozenset([getattr(torch, name) for name in likes] + [getattr(torch.Tensor, name) for name in news])


@functools.cache
def _grouping() -> frozenset[Any]:
    names = ((functional, "grouped_mm"), (torch, "_grouped_mm"))
    return frozenset(getattr(room, name) for room, name in names if hasattr(room, name))


@functools.cache
def _special() -> Mapping[Any, _Function]:
    """What needs less than the whole weight, or none of it."""
    return {
        **{function: _like(function) for function in _asking()},
        torch.Tensor.to: _to,
        torch.Tensor.untyped_storage: _storage,
        torch.Tensor.storage: _typed_storage,
        torch.Tensor.data_ptr: _data_ptr,
        # What is not torch's is not seen when it is let go, nor what it writes.
        **{
            function: functools.partial(_of_a_copy, function)
            for function in (torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.__dlpack__)
        },
        torch.Tensor.detach: _detach,
        torch.Tensor.data.__get__: _detach,  # type: ignore[attr-defined]
        functional.linear: _linear,
        functional.embedding: _embedding,
        torch.Tensor.__getitem__: _getitem,
        torch.Tensor.transpose: _turned,
        torch.transpose: _turned,
        **dict.fromkeys((torch.bmm, torch.matmul, torch.Tensor.bmm, torch.Tensor.matmul), _batched),
        torch.Tensor.__matmul__: _batched,
        **dict.fromkeys(_grouping(), _grouped),
    }
