"""Parameters whose values are elsewhere: they say what they are, and bring what an operation takes of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_map

from ..errors import RunningError

if TYPE_CHECKING:
    from .bringing import Part, Turned, Weight

_Function = Callable[..., Any]


def _of_tensor(names: str) -> Iterator[Any]:
    """Methods of torch's tensors, as far as this torch has them."""
    return (getattr(torch.Tensor, name) for name in names.split() if hasattr(torch.Tensor, name))


# What they answer themselves.
_DESCRIBING: frozenset[Any] = frozenset(
    attribute.__get__
    for attribute in _of_tensor(
        "shape dtype device layout requires_grad grad grad_fn is_leaf ndim names is_meta is_cuda is_cpu is_xpu is_mps "
        "is_quantized is_sparse is_mkldnn is_nested itemsize nbytes _version _backward_hooks _base output_nr "
        "_post_accumulate_grad_hooks retains_grad"
    )
) | frozenset(
    _of_tensor(
        "size stride dim ndimension numel nelement element_size storage_offset is_contiguous is_floating_point "
        "is_complex is_signed is_inference get_device __len__ __hash__ is_same_size requires_grad_ register_hook "
        "register_post_accumulate_grad_hook has_names is_pinned is_shared is_conj is_neg retain_grad"
    )
)
_SETTING: frozenset[Any] = frozenset(
    attribute.__set__ for attribute in _of_tensor("requires_grad grad _backward_hooks _post_accumulate_grad_hooks")
)
# Of functions of a name without an underscore at its end, those that change what they are given.
_CHANGING: frozenset[Any] = frozenset({torch.Tensor.__setitem__, torch.Tensor.data.__set__})  # type: ignore[attr-defined]


class ReleasedWeight:
    """What is left of a weight whose model was released."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, source: str) -> None:
        self.name = name
        self.shape = shape
        self.dtype = dtype
        # As whatever has no values.
        self.device = torch.device("meta")
        self.parts = 1
        self.is_too_large = self.has_rows = self.is_turned = self.comes_in_turn = False
        self._source = source

    def whole(self) -> NoReturn:
        """There is none."""
        raise RunningError(
            f"{self.name!r}: the model was released (lowmem.release), and its weights that lie in files with it; load "
            f"{self._source} again"
        )


class MappedParameter(nn.Parameter):
    """A parameter on disk that is used where it lies: pages of a file. It computes as any other."""

    def __deepcopy__(self, memo: Any) -> NoReturn:
        """Refused."""
        refuse_copy(getattr(self, "name_on_disk", "a weight"))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As an ordinary parameter, with its values."""
        return nn.Parameter, (self.detach(), self.requires_grad)


class OffloadedParameter(torch.Tensor):
    """A parameter without values in memory: shape, final dtype, and the device that computes.

    An operation that takes it gets the weight itself, or the rows or parts that it uses, for as long as it lasts. It is
    a `torch.nn.Parameter` to `isinstance`. What would change it is refused, and so is a gradient of it; pickled, it is
    an ordinary parameter with its values.
    """

    # A `Weight`, a `Part` of one, one that is `Turned`, or a `ReleasedWeight`.
    weight: Any

    @property
    def is_released(self) -> bool:
        """Whether it has no values any more."""
        return isinstance(self.weight, ReleasedWeight)

    @staticmethod
    def __new__(cls, weight: Weight | Part | Turned, requires_grad: bool) -> OffloadedParameter:  # noqa: D102
        make: Any = torch.Tensor._make_wrapper_subclass
        made: OffloadedParameter = make(
            cls, weight.shape, dtype=weight.dtype, device=weight.device, requires_grad=requires_grad
        )
        made._is_param = True
        made.weight = weight
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Answer what describes it; for all else bring the values."""
        kwargs = kwargs or {}
        if func in _DESCRIBING or func in _SETTING:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        special = _special().get(func)
        if special is not None and (func in _named() or (args and not _any_away(kwargs.values()))):
            found = special(*args, **kwargs)
            if found is not NotImplemented:
                return found
        return compute(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """What reaches torch's own code without a function of Python."""
        return compute(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """What it is; its values are not brought to be shown."""
        return f"OffloadedParameter({self.weight.name!r}, shape={tuple(self.shape)}, dtype={self.dtype}, on disk)"

    def __deepcopy__(self, memo: Any) -> NoReturn:
        """Refused."""
        refuse_copy(self.weight.name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As an ordinary parameter, with its values."""
        return nn.Parameter, (self.weight.whole().clone(), self.requires_grad)


def compute(func: _Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call a function with the weights themselves.

    Raises:
        RunningError: it would change one, or ask for its gradient.
    """
    _refuse_change(func, args, kwargs)
    brought: list[tuple[OffloadedParameter, torch.Tensor]] = []

    def bring(value: Any) -> Any:
        if not isinstance(value, OffloadedParameter):
            return value
        real = value.weight.whole()
        brought.append((value, real))
        return _joined(real, value)

    args, kwargs = tree_map(bring, tuple(args)), tree_map(bring, dict(kwargs))
    with torch._C.DisableTorchFunctionSubclass():
        if not torch.is_grad_enabled() or not _needs_grad(args, kwargs):
            return func(*args, **kwargs)
        # What a graph keeps of a weight is the weight's name.
        places = {real.untyped_storage().data_ptr(): weight for weight, real in brought if real.numel()}
        brought.clear()
        with torch.autograd.graph.saved_tensors_hooks(functools.partial(_pack, places), _unpack):
            return func(*args, **kwargs)


def _needs_grad(*values: Any) -> bool:
    found = False

    def look(value: Any) -> Any:
        nonlocal found
        found = found or (isinstance(value, torch.Tensor) and value.requires_grad)
        return value

    tree_map(look, values)
    return found


def _pack(places: Mapping[int, OffloadedParameter], tensor: torch.Tensor) -> Any:
    if type(tensor) is not torch.Tensor or not tensor.numel():
        return tensor
    weight = places.get(tensor.untyped_storage().data_ptr())
    if weight is None:
        return tensor
    return weight, tuple(tensor.shape), tensor.stride(), tensor.storage_offset()


def _unpack(kept: Any) -> torch.Tensor:
    if isinstance(kept, torch.Tensor):
        return kept
    weight, shape, strides, offset = kept
    again: torch.Tensor = weight.weight.whole()
    return again.as_strided(shape, strides, offset)


class _Joined(torch.autograd.Function):
    """The weight itself, where a gradient of it would be computed: the backward refuses."""

    @staticmethod
    def forward(ctx: Any, real: torch.Tensor, edge: torch.Tensor, name: str) -> torch.Tensor:
        ctx.name = name
        return real.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> NoReturn:
        refuse_gradient(ctx.name)


def _joined(real: torch.Tensor, weight: OffloadedParameter) -> torch.Tensor:
    if not torch.is_grad_enabled() or not weight.requires_grad:
        return real
    edge = torch.empty(0, requires_grad=True)
    joined: torch.Tensor = _Joined.apply(real, edge, weight.weight.name)  # type: ignore[no-untyped-call]
    return joined


def _refuse_change(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    name = getattr(func, "__name__", "")
    out = kwargs.get("out")
    changed = out if isinstance(out, OffloadedParameter) else None
    inplace = name.endswith("_") and not name.endswith("__")
    if args and isinstance(args[0], OffloadedParameter) and (inplace or func in _CHANGING):
        changed = args[0]
    if changed is not None:
        raise RunningError(
            f"{changed.weight.name!r} is on disk and cannot be changed ({name or func}); load the model with it in "
            "memory (device_map=), or change the checkpoint"
        )


def refuse_copy(name: str) -> NoReturn:
    """Refuse a deep copy.

    Raises:
        RunningError: always.
    """
    raise RunningError(
        f"{name!r} is on disk, and a copy of it would be in memory as a whole; load the checkpoint once more instead "
        "(lowmem.load), or with residency='copy' and without 'disk' in device_map to have it in memory"
    )


def refuse_gradient(name: str) -> NoReturn:
    """Refuse training.

    Raises:
        RunningError: always.
    """
    raise RunningError(
        f"{name!r} is on disk and cannot be trained: a gradient of it was asked for; freeze what is on disk "
        "(requires_grad_(False)) and train what is in memory, such as adapters, or load the model without 'disk' in "
        "device_map"
    )


def _detach(weight: OffloadedParameter) -> Any:
    return OffloadedParameter(weight.weight, requires_grad=False)


def _get_data(weight: OffloadedParameter) -> Any:
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


def _like(func: _Function) -> _Function:
    """A function that asks only for shape, dtype and device."""

    def call(*args: Any, **kwargs: Any) -> Any:
        def stand_in(value: Any) -> Any:
            if not isinstance(value, OffloadedParameter):
                return value
            return torch.empty((), dtype=value.weight.dtype, device=value.weight.device).expand(tuple(value.shape))

        return func(*tree_map(stand_in, args), **tree_map(stand_in, kwargs))

    return call


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if not isinstance(weight, OffloadedParameter) or not weight.weight.is_too_large:
        return NotImplemented
    if isinstance(bias, OffloadedParameter):
        bias = _joined(bias.weight.whole(), bias)
    return _joined(weight.weight.linear(input, bias), weight)


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
    return _joined(weight.weight.rows(input), weight)


def _getitem(weight: Any, index: Any) -> Any:
    if weight.weight.parts == 1 or weight.weight.is_turned:
        return NotImplemented
    if isinstance(index, torch.Tensor) and index.dtype in (torch.int64, torch.int32):
        if index.dim():
            return _joined(weight.weight.gather(index), weight)
        index = int(index)
    if isinstance(index, int) and -weight.weight.parts <= index < weight.weight.parts:
        return OffloadedParameter(weight.weight.part(index % weight.weight.parts), weight.requires_grad)
    return NotImplemented


def _turned(weight: Any, dim0: int, dim1: int) -> Any:
    """Transposed, and only brought when it is multiplied with."""
    if weight.weight.parts == 1 or {d % 3 for d in (dim0, dim1)} != {1, 2}:
        return NotImplemented
    return OffloadedParameter(weight.weight.turned(), weight.requires_grad)


def _grouped(x: Any, weight: Any, offs: Any = None, **named: Any) -> Any:
    """Of experts that lie one behind the other in `weight`, those that have rows of `x`."""
    if offs is None or any(value is not None for value in named.values()) or x.dim() != 2:
        return NotImplemented
    if not isinstance(weight, OffloadedParameter) or weight.weight.parts == 1:
        return NotImplemented
    made: torch.Tensor = _Grouped.apply(x, weight.weight, offs)  # type: ignore[no-untyped-call]
    return _joined(made, weight)


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
    return _joined(made, weight)


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
        torch.Tensor.detach: _detach,
        torch.Tensor.data.__get__: _get_data,  # type: ignore[attr-defined]
        functional.linear: _linear,
        functional.embedding: _embedding,
        torch.Tensor.__getitem__: _getitem,
        torch.Tensor.transpose: _turned,
        torch.transpose: _turned,
        **dict.fromkeys((torch.bmm, torch.matmul, torch.Tensor.bmm, torch.Tensor.matmul), _batched),
        torch.Tensor.__matmul__: _batched,
        **dict.fromkeys(_grouping(), _grouped),
    }
