"""Code on tensors without values that goes on where it cannot be followed.

`following` tells where the elements of a result come from, as long as they are only moved. Inside of a `Deriving` any
other function of torch gives a tensor too, of which it is known only which sources it was made of: whoever wants its
values runs the code again with the values of these, and of no others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .following import HERE, Followed, derived, refuse, silently
from .meta_kernels import import_meta_kernels

# What gives no tensor but a value, or tensors whose shape depends on values.
_VALUES = frozenset(
    {"_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "unique", "_unique2", "masked_select"}
)
# What asks for the one value of a tensor, which the code made before.
_ITEMS = frozenset({"_local_scalar_dense", "item", "is_nonzero"})
# What takes nothing of a tensor but how it lies.
_FRESH = frozenset(f"{kind}{what}" for what in ("zeros", "ones", "full", "empty") for kind in ("new_", "")) | {
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
    "new_empty_strided",
}
# What leaves nothing of what was there before.
_OVERWRITES = frozenset({"copy_", "fill_", "zero_"})
# What reads memory past every dispatch.
_READS = frozenset(
    getattr(torch.Tensor, name)
    for name in ("numpy", "tolist", "__array__", "data_ptr", "__dlpack__", "apply_", "map_", "map2_")
)
# What reads the tensors of a list so.
_LISTS = frozenset({torch.tensor, torch.as_tensor, torch.asarray})
_COPIES = frozenset({torch.Tensor.__deepcopy__, torch.Tensor.__reduce_ex__, torch.Tensor.storage})
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
# The source of random numbers: they are others whenever the code is run.
RANDOM = -1
# Function and arguments → shape, strides and dtype of the result.
Known = dict[Any, tuple[torch.Size, tuple[int, ...], torch.dtype]]


class Deriving(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, every function of torch gives something of tensors without values.

    Tensors that the code makes itself go by here too: what is written into them lies in no `Followed`.
    """

    def __init__(self, device: str = "cpu", known: Known | None = None) -> None:
        """How it is run.

        Args:
            device: where tensors belong that the code makes itself.
            known: results of functions, for other runs of the same code; torch takes longer to tell them.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: Known = {} if known is None else known
        self._device = torch.device(device)
        # Sources that were written into a tensor after it was made, by its storage; all that lies there has them.
        self._written: dict[int, frozenset[int]] = {}
        # A number of a storage is another's when that is gone.
        self._kept: list[torch.UntypedStorage] = []
        # What others see as arrays.
        self._arrays: set[int] = set()
        # What is the model's own.
        self._own: frozenset[int] = frozenset()

    def __enter__(self) -> Deriving:
        self._outer = HERE.deriver
        HERE.deriver = self
        self._watching = _Watching(self)
        self._watching.__enter__()  # type: ignore[no-untyped-call]
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._watching.__exit__(*error)  # type: ignore[no-untyped-call]
        # They know each other.
        del self._watching
        HERE.deriver = self._outer

    def takes(self, tensor: torch.Tensor) -> frozenset[int]:
        """Numbers of the sources that a tensor is made of."""
        own = tensor.takes if isinstance(tensor, Followed) else frozenset()
        return own | self._written.get(_storage(tensor)._cdata, frozenset()) if self._written else own

    def is_changed(self, arguments: Any) -> bool:
        """Whether one of the tensors was written into."""
        return bool(self._written) and any(_storage(t)._cdata in self._written for t in _tensors(arguments))

    def watch(self, own: Iterable[torch.Tensor]) -> None:
        """Refuse from now on what takes the values of these tensors, or changes them."""
        with torch._C.DisableTorchFunction():
            self._own = frozenset(_storages(own))

    def is_own(self, arguments: Any) -> bool:
        """Whether the memory of one of the tensors is watched."""
        if not self._own:
            return False
        with torch._C.DisableTorchFunction():
            return not self._own.isdisjoint(_storages(_tensors(arguments)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            name = func.overloadpacket.__name__
            if name in _FRESH:
                if kwargs.get("device") is None and any(tensor.is_meta for tensor in _tensors(args)):
                    # The model's tensors are there before their memory.
                    kwargs = {**kwargs, "device": self._device}
            elif not func.is_view and self.is_own((args, kwargs)):
                raise refuse(f"the values of the model's own tensors ({name.strip('_')})")
            made = self._made(func, types, args, kwargs)
            # A generator from outside goes on from run to run, and cannot be told from one of the code's own.
            if torch.Tag.nondeterministic_seeded in func.tags:
                for tensor in _tensors(made):
                    self._write(tensor, self.takes(tensor) | {RANDOM})
            return made

    def _made(self, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if Followed in types:
            return func(*args, **kwargs)
        if self.is_changed((args, kwargs)):
            if func.overloadpacket.__name__ in _OVERWRITES and not self.is_changed(args[1:]) and _covers(args[0]):
                del self._written[_storage(args[0])._cdata]
            elif not func.is_view:
                return self.derive(func, args, kwargs)
        try:
            return func(*args, **kwargs)
        except Exception:
            if any(tensor.is_meta for tensor in _tensors((args, kwargs))):
                # On values it may do well, and the code may go on with an error.
                refuse("")
            raise

    def derive(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a function of torch gives, by tensors of the meta device.

        Raises:
            NotFollowedError: it asks for values.
        """
        name = func.overloadpacket.__name__
        if name in _VALUES:
            of = next((t.made_by for t in _tensors(args) if isinstance(t, Followed)), "") if name in _ITEMS else name
            raise refuse(f"the values of a tensor ({(of or 'item').strip('_')})")
        if name == "index" and any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1:])):
            raise refuse("which elements a mask chooses (torch's index)")
        if name.startswith("as_strided"):
            # In its file it may lie in another way, or among others.
            raise refuse(f"torch's {name}")
        import_meta_kernels()
        key = _key(func, args, kwargs)
        if key in self._known:
            shape, strides, dtype = self._known[key]
            like = silently(torch.empty_strided, shape, strides, dtype=dtype, device="meta")
            return derived(like, self._all((args, kwargs)), name)
        on_meta = {option: _like(value) for option, value in kwargs.items()}
        if on_meta.get("device") is not None:
            if torch.device(on_meta["device"]).type != "cpu":
                raise refuse(f"a tensor on {on_meta['device']}")
            on_meta["device"] = torch.device("meta")
        likes = list(map(_like, args))
        if name in _FRESH:
            return func(*likes, **{**on_meta, "device": self._device, "pin_memory": False})
        try:
            made = silently(func, *likes, **on_meta)
        except NotImplementedError as error:
            raise refuse(f"torch's {name}: {error}") from error
        except Exception:
            refuse("")
            raise
        written = [
            (args[i], likes[i]) if i < len(args) else (kwargs.get(argument.name), on_meta.get(argument.name))
            for i, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if written:
            return self._wrote(func, args, kwargs, written)
        takes = self._all((args, kwargs))
        if isinstance(made, torch.Tensor):
            if key is not None and not made.is_conj() and not made.is_neg():
                self._known[key] = made.shape, made.stride(), made.dtype
            return derived(made, takes, name)
        if not isinstance(made, (list, tuple)):
            raise refuse("the values of a tensor")
        return type(made)(derived(one, takes, name) if isinstance(one, torch.Tensor) else one for one in made)

    def _wrote(self, func: Any, args: Any, kwargs: Any, written: list[tuple[Any, Any]]) -> Any:
        """Note what was written into which tensors, which must lie as before."""
        name = func.overloadpacket.__name__
        whole = name in _OVERWRITES and _covers(args[0])
        takes = self._all(args[1:] if whole else (args, kwargs))
        tensors = [tensor for tensor, _ in written]
        for tensor, like in zip(_tensors(tensors), _tensors([like for _, like in written]), strict=True):
            if tensor.shape != like.shape or tensor.stride() != like.stride():
                raise refuse(f"torch's {name}, which changes the shape of a tensor")
            self._write(tensor, takes if whole else takes | self.takes(tensor))
        if not func._schema.returns:
            return None
        return tensors[0] if len(tensors) == 1 else tuple(tensors)

    def _all(self, arguments: Any) -> frozenset[int]:
        return frozenset[int]().union(*(self.takes(t) for t in _tensors(arguments)))

    def note_array(self, tensor: torch.Tensor) -> None:
        """Note that its memory is an array too, which tells nobody what is written into it."""
        self._kept.append(_storage(tensor))
        self._arrays.add(_storage(tensor)._cdata)

    def _write(self, tensor: torch.Tensor, takes: frozenset[int]) -> None:
        storage = _storage(tensor)
        if not isinstance(tensor, Followed) and (storage._cdata in self._arrays or not storage.resizable()):
            raise refuse("the values of a tensor in an array")
        self._kept.append(storage)
        self._written[storage._cdata] = takes


class _Watching(TorchFunctionMode):
    """Refuses what would read or replace the memory of tensors whose values are not there."""

    def __init__(self, deriving: Deriving) -> None:
        super().__init__()
        self._deriving = deriving

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS or func in _COPIES or func in _LISTS or func == _SET_DATA:
            with torch._C.DisableTorchFunction():
                self._check(func, args)
        if getattr(func, "__name__", "") != "__get__":
            # More than a look at a shape: torch is about to import what it needs for that.
            import_meta_kernels()
        if torch.is_inference_mode_enabled():
            # Of the code itself; in it others of torch's functions are seen, and views of what is followed fail.
            with torch.inference_mode(False), torch.no_grad():
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _check(self, func: Any, args: Any) -> None:
        is_changed = self._deriving.is_changed
        if func == _SET_DATA:
            if Followed in map(type, args) or is_changed(args) or self._deriving.is_own(args):
                raise refuse("other memory for a tensor (.data = …); change the tensor itself, or make a new one")
        elif func in _LISTS:
            listed = list(_tensors(args[:1] if args and isinstance(args[0], (list, tuple)) else ()))
            if Followed in map(type, listed) or is_changed(listed):
                raise refuse(f"the values of a tensor ({func.__name__})")
            self._check_own(func, listed)
        elif not isinstance(args[0], Followed):
            self._check_own(func, args[:1])
            if is_changed(args[0]) or (args[0].is_meta and func in _READS):
                raise refuse(f"the values of a tensor ({func.__name__})")
            if func in _READS:
                self._deriving.note_array(args[0])

    def _check_own(self, func: Any, tensors: Any) -> None:
        if self._deriving.is_own(tensors):
            raise refuse(f"the values of the model's own tensors ({func.__name__.strip('_')})")


def _storages(tensors: Iterable[torch.Tensor]) -> Iterator[int]:
    """Numbers of their storages, of such as have one."""
    for tensor in tensors:
        if isinstance(tensor, Followed):
            continue
        try:
            yield tensor.untyped_storage()._cdata
        except (RuntimeError, NotImplementedError):
            continue


def _storage(tensor: torch.Tensor) -> Any:
    return (tensor.like if isinstance(tensor, Followed) else tensor).untyped_storage()


def _covers(tensor: torch.Tensor) -> bool:
    """Whether nothing else lies in its storage."""
    like = tensor.like if isinstance(tensor, Followed) else tensor
    return like.is_contiguous() and bool(like.nbytes == _storage(tensor).nbytes())


def _like(value: Any) -> Any:
    """The argument with tensors of the meta device."""
    if isinstance(value, Followed):
        return value.like
    if isinstance(value, torch.Tensor):
        return (
            value
            if value.is_meta
            else silently(torch.empty_strided, value.shape, value.stride(), dtype=value.dtype, device="meta")
        )
    if isinstance(value, (list, tuple)):
        return type(value)(map(_like, value))
    return value


def _key(func: Any, args: Any, kwargs: Any) -> Any:
    """What tells how a new tensor lies that a function gives; None where it may be none, or hang on more."""
    if func.is_view or len(func._schema.returns) != 1 or func._schema.returns[0].alias_info is not None:
        return None
    if func.overloadpacket.__name__ in _FRESH:
        return None
    try:
        return func, torch.get_default_dtype(), _hashable(args), _hashable(tuple(kwargs.items()))
    except TypeError:
        return None


def _hashable(value: Any) -> Any:
    if isinstance(value, Followed):
        if value.dtype.is_complex:
            raise TypeError
        return value.shape, value.stride(), value.dtype
    if isinstance(value, torch.Tensor):
        raise TypeError
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(_hashable, value))
    hash(value)
    # -0.0 and 0.0, 1 and True are equal.
    return type(value), value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
