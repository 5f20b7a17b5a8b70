"""What pickled files hold by two other readers: torch's own, and Python's pickle with classes that do nothing."""

from __future__ import annotations

import collections
import io
import pickle
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import _reconstruct
from numpy._core.numeric import _frombuffer

from .equal import check_same
from .guard import Broken

# How many files were compared with which reader.
compared: Counter[str] = Counter()
_MOST = 20_000
_SAFE = [_reconstruct, np.ndarray, np.dtype, *{type(np.dtype(code)) for code in "?bhilqBHILQefdFDO"}]


def check_pickled(file: Path, opened: str, made: Mapping[str, torch.Tensor], unreadable: Set[str]) -> None:
    """Each tensor of `made` is what the reference gives at `opened` and its key.

    Where torch refuses the file (a class that it does not know, beside the weights), Python's pickle is asked, and
    where that fails too, nobody. What lowmem says it cannot read need not be in `made`.

    Raises:
        Broken: a tensor is another, is not there, or one is missing.
    """
    for name, read in (("torch", _by_torch), ("pickle", _by_pickle)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                root = read(file)
        except Exception:  # Of a stranger's file a reader may say anything.
            continue
        compared[name] += 1
        try:
            _check(root, opened, made, unreadable)
        except Broken as broken:
            raise Broken(f"by {name}: {broken}") from broken
        return
    compared["none"] += 1


def _by_torch(file: Path) -> Any:
    with torch.serialization.safe_globals(_SAFE):
        return torch.load(file, map_location="cpu", weights_only=True, mmap=False)


def _check(root: Any, opened: str, made: Mapping[str, torch.Tensor], unreadable: Set[str]) -> None:
    held: dict[str, list[torch.Tensor]] = {}
    for at, (key, tensor) in enumerate(_tensors(root, "", ())):
        if at > _MOST:
            return
        held.setdefault(key, []).append(tensor)
    prefix = f"{opened}." if opened else ""
    for key, tensor in made.items():
        others = held.get(prefix + key, ())
        if not others:
            raise Broken(f"{prefix + key!r}: not there, of {sorted(held)[:5]!r}")
        problems = [problem for other in others if (problem := check_same(tensor, other))]
        if len(problems) == len(others):
            raise Broken(f"{prefix + key!r}: {problems[0]}")
    if not opened and type(root) in (dict, collections.OrderedDict):
        names = {
            str(key) for key, value in root.items() if isinstance(key, str | int) and _as_tensor(value) is not None
        }
        if missing := names - made.keys() - unreadable:
            raise Broken(f"tensors are missing: {sorted(missing)[:4]!r}")


def _tensors(value: Any, path: str, above: tuple[int, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    """Path → tensor, of whatever holds tensors; a path may be met many times."""
    tensor = _as_tensor(value)
    if tensor is not None:
        yield path, tensor
    if id(value) in above or len(above) > 80:
        return
    for key, child in _members(value):
        yield from _tensors(child, f"{path}.{key!s}" if above else str(key), (*above, id(value)))


def _members(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list | tuple):
        yield from enumerate(value)
    if isinstance(value, Stub) and isinstance(value.state, dict):
        for name in ("_parameters", "_buffers", "_modules"):
            yield from _members(value.state.get(name))


def _as_tensor(value: Any) -> torch.Tensor | None:
    if isinstance(value, torch.Tensor):
        return value.detach()
    if type(value) is np.ndarray and value.dtype.kind in "biufc":
        return torch.from_numpy(np.array(value.astype(value.dtype.newbyteorder("=")), order="C"))
    return None


class Stub(dict[Any, Any]):
    """Stands for any class: takes whatever a pickle gives it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.args, self.state = args, None

    def __new__(cls, *args: Any, **kwargs: Any) -> Stub:
        """Of whatever is given."""
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Kept."""
        self.state = state

    def __hash__(self) -> int:
        """By identity."""
        return id(self)

    def append(self, item: Any) -> None:
        """Nothing is looked for in lists of strange classes."""

    def extend(self, items: Any) -> None:
        """Likewise."""

    def add(self, item: Any) -> None:
        """Likewise."""


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(encoding)
    return text.encode("latin-1")


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _encode,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("torch", "Size"): tuple,
    ("builtins", "set"): set,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
    **{
        ("torch._utils", name): getattr(torch._utils, name)
        for name in ("_rebuild_tensor_v2", "_rebuild_tensor", "_rebuild_tensor_v3", "_rebuild_parameter")
    },
    **{("torch", str(dtype)[6:]): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)},
}


class _Plain(pickle._Unpickler):  # type: ignore[name-defined,misc]
    """Python's own machine, the slow one: the fast one takes memory by the numbers in the memo."""

    def __init__(self, data: bytes, storages: Mapping[str, bytes]) -> None:
        super().__init__(io.BytesIO(data))
        self._storages = storages
        self._made: dict[str, Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        """What stands for it; nothing is imported."""
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module == "torch" and name.endswith("Storage") and hasattr(torch, name):
            return getattr(torch, name)
        return type("Stub", (Stub,), {})

    def persistent_load(self, pid: Any) -> Any:
        """The storage of that key."""
        kind, cls, key, _, count = pid
        if kind != "storage":
            raise ValueError(kind)
        dtype = torch.uint8 if cls is torch.UntypedStorage else cls.dtype
        if key not in self._made:
            nbytes = count * torch.empty(0, dtype=dtype).element_size()
            raw = self._storages[key][:nbytes]
            if len(raw) < nbytes:
                raise ValueError("a short storage")
            self._made[key] = (
                torch.UntypedStorage.from_buffer(raw, byte_order="little", dtype=torch.uint8)
                if raw
                else (torch.UntypedStorage(0))
            )
        return torch.storage.TypedStorage(wrap_storage=self._made[key], dtype=dtype, _internal=True)


def _by_pickle(file: Path) -> Any:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        at = min(
            (name for name in names if name == "data.pkl" or name.endswith("/data.pkl")), key=lambda n: n.count("/")
        )
        prefix = at[: -len("data.pkl")]
        if f"{prefix}byteorder" in names and archive.read(f"{prefix}byteorder") != b"little":
            raise ValueError("another byte order")
        begin = f"{prefix}data/"
        storages = {name[len(begin) :]: archive.read(name) for name in names if name.startswith(begin)}
        return _Plain(archive.read(at), storages).load()
