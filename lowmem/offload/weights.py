"""Parameters whose values are elsewhere: they say what they are, and bring what an operation takes of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn
from torch.utils._pytree import tree_map

from .._strides import row_major
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

    def forget(self) -> None:
        """Nothing to forget."""

    def address(self) -> NoReturn:
        """There is none."""
        self.whole()

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

    # Whether it is the model's own, and not one that stands for it in a state dict or an expression.
    is_registered: bool
    # The values, since someone asked where they are.
    held: torch.Tensor | None
    # A `Weight`, a `Part` of one, one that is `Turned`, or a `ReleasedWeight`.
    weight: Any

    @property
    def is_released(self) -> bool:
        """Whether it has no values any more."""
        return isinstance(self.weight, ReleasedWeight)

    @staticmethod
    def __new__(  # noqa: D102
        cls, weight: Weight | Part | Turned, requires_grad: bool, *, is_registered: bool = False
    ) -> OffloadedParameter:
        make: Any = torch.Tensor._make_wrapper_subclass
        rows, columns = weight.shape[1:] if weight.is_turned else (0, 0)
        strides = (rows * columns, 1, rows) if weight.is_turned else row_major(weight.shape)
        made: OffloadedParameter = make(
            cls, weight.shape, strides=strides, dtype=weight.dtype, device=weight.device, requires_grad=requires_grad
        )
        made.is_registered, made.held = is_registered, None
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
        # They know this class.
        from .functions import specially

        found = specially(func, args, kwargs)
        return compute(func, args, kwargs) if found is NotImplemented else found

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


def is_on_disk(parameter: torch.Tensor | None) -> bool:
    """Whether a parameter is pages of a file on disk, of an int8 layer too, or brings its values when it is used."""
    known = isinstance(parameter, (MappedParameter, OffloadedParameter))
    return known or bool(getattr(parameter, "lies_on_disk", False))


def compute(func: _Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call a function with the weights themselves.

    Raises:
        RunningError: it would change one, or ask for its gradient.
    """
    _refuse_change(func, args, kwargs)
    brought: list[tuple[OffloadedParameter, torch.Tensor, int]] = []

    def bring(value: Any) -> Any:
        if not isinstance(value, OffloadedParameter):
            return value
        real = value.weight.whole()
        brought.append((value, real, real._version))
        if value.requires_grad and not torch.is_grad_enabled():
            # Torch multiplies in another way where nothing requires a gradient (`should_fold`), and rounds otherwise.
            return real.requires_grad_()
        return joined(real, value)

    args, kwargs = tree_map(bring, tuple(args)), tree_map(bring, dict(kwargs))
    with torch._C.DisableTorchFunctionSubclass():
        if not torch.is_grad_enabled() or not _needs_grad(args, kwargs):
            found = func(*args, **kwargs)
        else:
            # What a graph keeps of a weight is the weight's name.
            places = {real.untyped_storage().data_ptr(): weight for weight, real, _ in brought if real.numel()}
            with torch.autograd.graph.saved_tensors_hooks(functools.partial(_pack, places), _unpack):
                found = func(*args, **kwargs)
    for weight, real, version in brought:
        if real._version != version:
            # Made anew at the next use.
            weight.weight.forget()
            _refuse(weight, func)
    return found


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
        # As torch does it itself where nobody packs: what was changed meanwhile is no good for a gradient.
        return tensor.detach(), tensor._version
    return weight, tuple(tensor.shape), tensor.stride(), tensor.storage_offset()


def _unpack(kept: Any) -> torch.Tensor:
    if isinstance(kept, torch.Tensor):
        return kept
    if len(kept) == 2:
        tensor: torch.Tensor = kept[0]
        if tensor._version != kept[1]:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{tuple(tensor.shape)} is at version {tensor._version}; expected version {kept[1]} instead"
            )
        return tensor
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


def joined(real: torch.Tensor, weight: OffloadedParameter) -> torch.Tensor:
    """What was brought of a weight, or computed with it: a gradient that reaches the weight by it is refused."""
    if not torch.is_grad_enabled() or not weight.requires_grad:
        return real
    edge = torch.empty(0, requires_grad=True)
    refusing: torch.Tensor = _Joined.apply(real, edge, weight.weight.name)  # type: ignore[no-untyped-call]
    return refusing


def _refuse_change(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    name = getattr(func, "__name__", "")
    out = kwargs.get("out")
    changed = out if isinstance(out, OffloadedParameter) else None
    inplace = name.endswith("_") and not name.endswith("__")
    if args and isinstance(args[0], OffloadedParameter) and (inplace or func in _CHANGING):
        changed = args[0]
    schema = getattr(func, "_schema", None)
    if schema is not None and schema.is_mutable and args and isinstance(args[0], OffloadedParameter):
        changed = args[0]
    if changed is not None:
        _refuse(changed, func)


def _refuse(weight: OffloadedParameter, func: Any) -> NoReturn:
    name = getattr(func, "__name__", "") or str(func)
    how = "an assignment" if name.startswith("__set") else name
    raise RunningError(
        f"{weight.weight.name!r} is on disk, made anew whenever it is used, and cannot be changed ({how}); load the "
        "model with it in memory (device_map=), give offload_folder=, whose pages take changes in memory, or change "
        "the checkpoint"
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
