"""What the calls in a checkpoint's pickle mean: tensors become `Leaf`s when they are met, and are not made.

Sources: torch's `_utils.py` (`_rebuild_*`), `_tensor.py` (`_reduce_ex_internal`, `_rebuild_from_type_v2`), `storage.py`
(`_dtype_to_storage_type_map`) and `serialization.py` (`persistent_id`); numpy's `_core/src/multiarray/methods.c`
(`array_setstate`) and `_core/numeric.py` (`_frombuffer`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..dtypes import SAFETENSORS_NAMES, itemsize
from ..errors import UnsupportedError
from .pickle_bytes import Span, Stream
from .pickles import Global, Inert, Machine
from .records import Leaf

# More than any size, and than any tensor's number of elements.
_TOO_MANY = 1 << 63
# numpy's limit; torch's own files have a dozen at most.
_MAX_DIMENSIONS = 64

STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
    "QInt8Storage": "qint8",
    "QInt32Storage": "qint32",
    "QUInt8Storage": "quint8",
    "QUInt4x2Storage": "quint4x2",
    "QUInt2x4Storage": "quint2x4",
    # Storages of bytes: the tensor says what they are.
    "UntypedStorage": "uint8",
    "_UntypedStorage": "uint8",
}
_ALIASES = {
    "half": "float16",
    "float": "float32",
    "double": "float64",
    "short": "int16",
    "int": "int32",
    "long": "int64",
}
_NUMPY = {
    **{f"i{n}": f"int{8 * n}" for n in (1, 2, 4, 8)},
    **{f"u{n}": f"uint{8 * n}" for n in (1, 2, 4, 8)},
    **{f"f{n}": f"float{8 * n}" for n in (2, 4, 8)},
    "c8": "complex64",
    "c16": "complex128",
    "b1": "bool",
    "bool": "bool",
}
# Tensors of these classes are nothing but tensors.
_PLAIN = frozenset(
    {
        "torch.Tensor",
        "torch._tensor.Tensor",
        "torch.nn.parameter.Parameter",
        "torch.nn.parameter.Buffer",
        "torch.nn.Parameter",
    }
)


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """Bytes that tensors share.

    Attributes:
        name: of the storage in the file; no other has it.
        key: the record in a zip, or the key in a legacy file; empty for an array within the pickle.
        dtype: of its elements, as it was pickled.
        nbytes: its size, as the pickle claims.
        location: the device that it was on.
        shift: where its first byte is in the storage `name`, in bytes: very old files have views of storages.
        span: where an array within the pickle lies.
        swapped: an array of big-endian elements.
    """

    name: str
    key: str
    dtype: str
    nbytes: int
    location: str = "cpu"
    shift: int = 0
    span: Span | None = None
    swapped: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class _NumpyType:
    """A numpy dtype: the torch dtype it is, or None, its name, and whether its elements are big-endian."""

    dtype: str | None
    name: str
    swapped: bool


class Tensors(Machine):
    """Decodes a checkpoint's pickle.

    Attributes:
        storages: every storage that was named, by its name.
    """

    def __init__(self, stream: Stream, offset: int, name: str) -> None:
        super().__init__(stream, offset, name)
        self.storages: dict[str, Storage] = {}
        rebuilds = {
            "_rebuild_tensor": self._tensor,
            "_rebuild_tensor_v2": self._tensor,
            "_rebuild_tensor_v3": self._tensor_v3,
            "_rebuild_parameter": self._parameter,
            "_rebuild_parameter_with_state": self._parameter,
            "_rebuild_sparse_tensor": self._sparse,
            "_rebuild_sparse_csr_tensor": self._sparse,
            "_rebuild_nested_tensor": self._nested,
            "_rebuild_qtensor": self._quantised,
            "_rebuild_meta_tensor_no_storage": self._meta,
            "_rebuild_wrapper_subclass": self._wrapper,
            "_rebuild_device_tensor_from_numpy": self._from_device,
            "_rebuild_device_tensor_from_cpu_tensor": self._from_device,
            "_rebuild_xla_tensor": self._from_device,
        }
        self._rebuilds: dict[str, Callable[[Global, tuple[Any, ...]], Any]] = {
            f"torch._utils.{name}": rebuild for name, rebuild in rebuilds.items()
        }
        self.meanings.update(self._rebuilds)
        for room in ("torch._tensor", "torch.tensor"):
            self.meanings[f"{room}._rebuild_from_type"] = self.meanings[f"{room}._rebuild_from_type_v2"] = (
                self._of_class
            )
        self.meanings["torch.Size"] = self._size
        self.meanings["numpy.dtype"] = self._numpy_dtype
        for core in ("numpy.core", "numpy._core"):
            self.meanings[f"{core}.numeric._frombuffer"] = self._from_buffer

    def persist(self, value: Any) -> Any:
        """A storage, or the class of a pickled module, whose source legacy files keep beside it."""
        kind = _ascii(value[0]) if type(value) is tuple and value else None
        if kind == "module" and len(value) > 1:
            return value[1]
        if kind != "storage" or type(value) is not tuple or len(value) not in (5, 6):
            return super().persist(value)
        cls, key, location, count = value[1:5]
        dtype = STORAGES.get(cls.name) if type(cls) is Global else None
        if dtype is None:
            self.refuse(f"a storage of the class {cls!r}" if type(cls) is Global else "a storage of no class")
        if type(key) not in (str, int) or not _is_size(count):
            self.refuse("a storage without a key or a size")
        return self._storage(str(key), dtype, count * itemsize(dtype), _ascii(location), value[5:])

    def _storage(self, key: str, dtype: str, nbytes: int, location: str | None, view: tuple[Any, ...]) -> Storage:
        name = f"data/{key}"
        known = self.storages.get(name)
        if known is None:
            known = self.storages[name] = Storage(name, key, dtype, nbytes, location or "")
        elif known.nbytes != nbytes or (known.dtype != dtype and nbytes):
            self.refuse(
                f"storage {key[:80]!r} of {nbytes} bytes of {dtype}, and before of {known.nbytes} of {known.dtype}"
            )
        if not view or view[0] is None:
            return known
        parts = view[0]
        if type(parts) is not tuple or len(parts) != 3 or not _is_size(parts[1]) or not _is_size(parts[2]):
            self.refuse(f"storage {key[:80]!r} with a view that is none")
        shift, held = parts[1] * itemsize(dtype), parts[2] * itemsize(dtype)
        if shift + held > nbytes:
            self.refuse(f"storage {key[:80]!r} of {nbytes} bytes with a view up to {shift + held}")
        return Storage(name, key, dtype, held, known.location, shift)

    # Tensors of torch. Each takes the name that was called and its arguments, and gives a leaf, or an inert call.

    def _tensor(self, what: Global, args: tuple[Any, ...]) -> Any:
        if len(args) < 4 or type(args[0]) is not Storage:
            return Inert(what, args)
        return self._leaf(args[0], args[0].dtype, args, args[6] if len(args) > 6 else None)

    def _tensor_v3(self, what: Global, args: tuple[Any, ...]) -> Any:
        dtype = _dtype(args[6]) if len(args) > 6 else None
        if dtype is None or type(args[0]) is not Storage:
            return Inert(what, args)
        return self._leaf(args[0], dtype, args, args[7] if len(args) > 7 else None)

    def _leaf(self, storage: Storage, dtype: str, args: tuple[Any, ...], metadata: Any = None) -> Leaf:
        """A strided tensor: its arguments are the storage, the offset in elements, shape and strides."""
        shape, strides = self._dimensions(args[2]), self._dimensions(args[3])
        if not _is_size(args[1]) or len(shape) != len(strides):
            self.refuse(f"a tensor of shape {shape} with strides {strides} at {_number(args[1])}")
        size = itemsize(dtype)
        strides_or_none, nbytes = self._span_of_view(shape, strides, size)
        offset = args[1] * size if nbytes else 0
        if offset + nbytes >= _TOO_MANY:
            self.refuse(f"a tensor of shape {shape} that ends at byte {offset + nbytes} of its storage")
        why_not = "it is on the meta device, without data" if storage.location == "meta" else None
        if metadata and isinstance(metadata, dict):
            lazy = [name for name in ("conj", "neg") if metadata.get(name)]
            why_not = f"its {' and '.join(lazy)} bit is set: save it after resolving it" if lazy else why_not
        if dtype.startswith("q"):
            why_not = "it is quantised"
        return Leaf(dtype, shape, strides_or_none, storage.name, storage.shift + offset, nbytes, why_not)

    def _dimensions(self, value: Any) -> tuple[int, ...]:
        sound = type(value) in (tuple, list) and len(value) <= _MAX_DIMENSIONS
        for n in value if sound else ():
            if type(n) is not int or not 0 <= n < _TOO_MANY:
                sound = False
        if not sound:
            self.refuse("a tensor whose shape or strides are not whole numbers from 0 to 2**63")
        return tuple(value)

    def _span_of_view(
        self, shape: tuple[int, ...], strides: tuple[int, ...], size: int
    ) -> tuple[tuple[int, ...] | None, int]:
        """Strides, or None when dense and row-major; bytes from the first element to behind the last."""
        count, last, dense = 1, 0, True
        for n, stride in zip(reversed(shape), reversed(strides), strict=True):
            if n != 1 and stride != count:
                dense = False
            count *= n
            last += (n - 1) * stride
            if count >= _TOO_MANY or last >= _TOO_MANY:
                self.refuse(f"a tensor of shape {shape} and strides {strides}: larger than anything")
        if not count:
            return None, 0
        if dense:
            return None, count * size
        return strides, (last + 1) * size

    def _parameter(self, what: Global, args: tuple[Any, ...]) -> Any:
        return args[0] if args and type(args[0]) is Leaf else Inert(what, args)

    def _of_class(self, what: Global, args: tuple[Any, ...]) -> Any:
        """`_rebuild_from_type(function, class, its arguments, state)`."""
        if len(args) != 4 or type(args[0]) is not Global or type(args[2]) is not tuple:
            return Inert(what, args)
        rebuild = self._rebuilds.get(args[0].path)
        made = rebuild(args[0], args[2]) if rebuild is not None else None
        if type(made) is not Leaf:
            return Inert(what, args)
        if type(args[1]) is Global and args[1].path in _PLAIN:
            return made
        name = args[1].path if type(args[1]) is Global else "unknown"
        return _unreadable(made, f"it is of the class {name[:200]}, which may mean anything by its data")

    def _sparse(self, what: Global, args: tuple[Any, ...]) -> Any:
        """`_rebuild_sparse_tensor(layout, (indices…, values, size, …))`."""
        data = args[1] if len(args) > 1 and type(args[1]) is tuple else ()
        # Of COO: indices, values, size, and since torch 2.1 is_coalesced; of the others: two of indices, values, size.
        at = 2 if len(data) == 4 and type(data[2]) is Leaf else 1
        values = data[at] if len(data) > at else None
        if type(values) is not Leaf:
            return Inert(what, args)
        size = data[at + 1] if len(data) > at + 1 else ()
        shape = self._dimensions(size) if type(size) in (tuple, list) else ()
        return Leaf(values.dtype, shape, None, values.storage, 0, 0, "it is sparse")

    def _nested(self, what: Global, args: tuple[Any, ...]) -> Any:
        held = args[0] if args else None
        return _unreadable(held, "it is a nested tensor") if type(held) is Leaf else Inert(what, args)

    def _quantised(self, what: Global, args: tuple[Any, ...]) -> Any:
        made = self._tensor(what, args[:4])
        return _unreadable(made, "it is quantised") if type(made) is Leaf else made

    def _meta(self, what: Global, args: tuple[Any, ...]) -> Any:
        dtype = _dtype(args[0]) if len(args) > 1 else None
        if dtype is None:
            return Inert(what, args)
        return Leaf(dtype, self._dimensions(args[1]), None, "", 0, 0, "it is on the meta device, without data")

    def _wrapper(self, what: Global, args: tuple[Any, ...]) -> Any:
        dtype = _dtype(args[1]) if len(args) > 2 else None
        if dtype is None:
            return Inert(what, args)
        name = args[0].path if type(args[0]) is Global else "unknown"
        return Leaf(dtype, self._dimensions(args[2]), None, "", 0, 0, f"it is of the class {name[:200]}, without data")

    def _from_device(self, what: Global, args: tuple[Any, ...]) -> Any:
        """Tensors of devices without storages, such as XLA's: a copy on the CPU, and the dtype it had."""
        dtype = _dtype(args[1]) if len(args) > 1 else None
        if dtype is None or type(args[0]) is not Leaf:
            return Inert(what, args)
        held: Leaf = args[0]
        return held if held.dtype == dtype else _unreadable(held, f"it was kept as {held.dtype} for a {dtype}")

    def _size(self, what: Global, args: tuple[Any, ...]) -> Any:
        return args[0] if len(args) == 1 and type(args[0]) is tuple else Inert(what, args)

    # Arrays of numpy.

    def _numpy_dtype(self, what: Global, args: tuple[Any, ...]) -> Any:
        """`numpy.dtype(name, align, copy)`; ml_dtypes gives its class for a name.

        What is not a copy is one of numpy's own types, which take no state.
        """
        name = args[0] if args else None
        if type(name) is Global and name.module == "ml_dtypes" and name.name in SAFETENSORS_NAMES:
            return _NumpyType(name.name, name.name, False)
        if type(name) is not str:
            return Inert(what, args)
        order = name[:1] if name[:1] in ("<", ">", "|", "=") else ""
        code = name[len(order) :]
        kind = _NumpyType(_NUMPY.get(code), code[:40], order == ">")
        if len(args) > 2 and type(args[2]) not in (bool, int):
            self.refuse("a numpy type that is neither a copy nor none")
        return _NumpyDraft(what, args, kind) if order == ">" or (len(args) > 2 and args[2]) else kind

    def build(self, thing: Inert, state: Any) -> Any:
        """Arrays and their dtypes get what they are by their state; so did tensors before torch 0.4."""
        if type(thing) is _NumpyDraft:
            return thing.built(state)
        if type(thing.what) is Global and type(state) is tuple:
            if thing.what.path in ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"):
                return self._array(thing, state)
            if len(state) == 4 and type(state[0]) is Storage and thing.what.name.endswith("Tensor"):
                return self._leaf(state[0], state[0].dtype, state)
            if len(state) == 5 and type(state[0]) is Leaf and thing.what.name in ("Parameter", "Variable"):
                return state[0]
        return super().build(thing, state)

    def _array(self, thing: Inert, state: tuple[Any, ...]) -> Any:
        """State of an array: version (before numpy 1.0 none), shape, dtype, whether column-major, its bytes."""
        if len(state) not in (4, 5):
            return super().build(thing, state)
        size, kind, columns, data = state[-4:]
        data = self.span_of(data) if type(data) is str else data
        return self._leaf_of_array(data, kind, size, bool(columns)) or super().build(thing, state)

    def _from_buffer(self, what: Global, args: tuple[Any, ...]) -> Any:
        """`_frombuffer(bytes, dtype, shape, order, axes)`: with axes it is of that shape before they are permuted."""
        made = self._leaf_of_array(args[0], args[1], args[2], args[3] == "F") if len(args) > 3 else None
        if made is None or made.why_not is not None or args[3] != "K":
            return made or Inert(what, args)
        axes: Any = args[4] if len(args) > 4 else None
        if type(axes) not in (tuple, list) or sorted(map(_axis, axes)) != list(range(len(made.shape))):
            return _unreadable(made, "it is a numpy array whose axes are not told")
        strides, step = [0] * len(made.shape), 1
        for i in range(len(made.shape) - 1, -1, -1):
            strides[i] = step
            step = min(step * made.shape[i], _TOO_MANY)
        shape = tuple(made.shape[axis] for axis in axes)
        normal, _ = self._span_of_view(shape, tuple(strides[axis] for axis in axes), itemsize(made.dtype))
        return replace(made, shape=shape, strides=normal)

    def _leaf_of_array(self, data: Any, kind: Any, size: Any, columns: bool) -> Leaf | None:
        if type(kind) is _NumpyDraft:
            kind = kind.kind
        if type(kind) is not _NumpyType:
            return None
        shape = self._dimensions(size)
        strides, step = [0] * len(shape), 1
        for i in range(len(shape)) if columns else range(len(shape) - 1, -1, -1):
            strides[i] = step
            step = min(step * shape[i], _TOO_MANY)
        if kind.dtype is None:
            return Leaf(f"numpy {kind.name}", shape, None, "", 0, 0, f"it is a numpy array of {kind.name}")
        normal, nbytes = self._span_of_view(shape, tuple(strides), itemsize(kind.dtype))
        if not nbytes:
            return Leaf(kind.dtype, shape, None, "", 0, 0)
        if type(data) is not Span or data.kind not in ("bytes", "latin1"):
            return Leaf(kind.dtype, shape, normal, "", 0, nbytes, "it is an array written as text; save it as a tensor")
        if not nbytes <= data.nbytes <= (nbytes if data.kind == "bytes" else 2 * nbytes):
            self.refuse(f"an array of shape {shape} and {nbytes} bytes, with {data.nbytes}")
        # One range may be named by arrays of either order.
        swapped = kind.swapped and itemsize(kind.dtype) > 1
        name = f"array/{data.offset}{'>' if swapped else ''}"
        self.storages[name] = Storage(name, "", kind.dtype, nbytes, span=data, swapped=swapped)
        return Leaf(kind.dtype, shape, normal, name, 0, nbytes)


class _NumpyDraft(Inert):
    """A numpy dtype before it is told its byte order."""

    __slots__ = ("kind",)

    def __init__(self, what: Global, args: tuple[Any, ...], kind: _NumpyType) -> None:
        super().__init__(what, args)
        self.kind = kind

    def built(self, state: Any) -> _NumpyType:
        """State: version, byte order, fields and more."""
        order = state[1] if type(state) is tuple and len(state) > 4 else None
        structured = order is None or state[2] is not None or state[3] is not None or state[4] is not None
        dtype = None if structured else self.kind.dtype
        return _NumpyType(dtype, self.kind.name, order == ">")


def _unreadable(leaf: Leaf, why_not: str) -> Leaf:
    return Leaf(leaf.dtype, leaf.shape, leaf.strides, leaf.storage, leaf.offset, leaf.nbytes, why_not)


def _axis(value: Any) -> int:
    return value if type(value) is int else -1


def _is_size(value: Any) -> bool:
    # `type is int` keeps out True.
    return type(value) is int and 0 <= value < _TOO_MANY


def _number(value: Any) -> str:
    return str(value) if type(value) is int else type(value).__name__


def _ascii(value: Any) -> str | None:
    return value if type(value) is str else None


def _dtype(value: Any) -> str | None:
    """The name of a pickled torch dtype whose size is known."""
    if type(value) is not Global or value.module != "torch":
        return None
    name = _ALIASES.get(value.name, value.name)
    try:
        itemsize(name)
    except UnsupportedError:
        return None
    return name
