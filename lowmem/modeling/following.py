"""Tensors without values that know where their elements come from.

Code that only moves elements about (stack, cat, chunk, transpose, reshape, …) is run on `Followed` tensors, and what it
gives tells which part of which source goes where. So code that nobody here has seen can be written down as moves: it
is not the operation that is known but the dozen of torch's functions that it is made of. Anything else raises
`NotFollowedError`, and the code must be run on values.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .._records import cheap_init
from .._strides import Dimension, Shape, joined, row_major


class NotFollowedError(Exception):
    """Where the elements of a result come from cannot be told."""


@cheap_init
@dataclass(frozen=True, slots=True)
class Piece:
    """Elements of one source, and where they lie in a result; both count elements in row-major order.

    Attributes:
        source: number of the source.
        offset: its first element there.
        into: its first element in the result.
        dimensions: how it goes on from there.
    """

    source: int
    offset: int
    into: int
    dimensions: tuple[Dimension, ...]


@dataclass(frozen=True, slots=True)
class _Placed:
    """A piece whose dimensions each lie in one dimension of a shape.

    Attributes:
        starts: index of its first element, a dimension of the shape each.
        steps: (dimension of the shape, how many, step there, step in the source).
    """

    starts: Shape
    steps: tuple[tuple[int, int, int, int], ...]


def place(offset: int, dimensions: Iterable[Dimension], shape: Shape) -> _Placed:
    """Divide dimensions that count through all of `shape` into such that lie in one dimension of it each.

    Args:
        offset: of the first element, counted through all of `shape` in row-major order.
        dimensions: of the piece.
        shape: without a zero.

    Raises:
        NotFollowedError: rows of the piece end within rows of the shape.
    """
    strides = row_major(shape)
    starts = tuple(offset // stride % n for n, stride in zip(shape, strides, strict=True))
    reach = list(starts)
    steps: list[tuple[int, int, int, int]] = []
    waiting = [d for d in dimensions if d[0] != 1]
    while waiting:
        n, step, there = waiting.pop()
        at = next(i for i, stride in enumerate(strides) if stride <= step and shape[i] > 1)
        stride, room = strides[at], strides[at] * shape[at]
        if step % stride:
            raise NotFollowedError
        if n * step > room and (n - 1) * step + reach[at] * stride >= room:
            # It counts on in the dimensions before: the inner rows here, whole ones of them there.
            inner = room // step
            if room % step or n % inner:
                raise NotFollowedError
            waiting.append((n // inner, room, there * inner))
            n = inner
        if n == 1:
            continue
        reach[at] += (n - 1) * (step // stride)
        if reach[at] >= shape[at]:
            raise NotFollowedError
        steps.append((at, n, step // stride, there))
    return _Placed(starts, tuple(steps))


def relaid(piece: Piece, shape: Shape, strides: Shape, shift: int) -> Piece:
    """The piece of a result of `shape`, in one where the dimensions of `shape` have other strides.

    Args:
        piece: in a dense tensor of `shape`.
        shape: of the tensor that it is a piece of, or one that it can be viewed as.
        strides: of the same dimensions in the new one, in elements.
        shift: first element of the old tensor in the new one.
    """
    placed = place(piece.into, piece.dimensions, shape)
    into = shift + sum(map(int.__mul__, placed.starts, strides))
    dimensions = joined((n, step * strides[at], there) for at, n, step, there in placed.steps)
    return Piece(piece.source, piece.offset, into, dimensions)


def cut(piece: Piece, outer: int, length: int, inner: int, begin: int, end: int) -> list[Piece]:
    """What of a piece of a tensor of (outer, length, inner) lies in [begin, end) of the middle, as pieces of that."""
    placed = place(piece.into, piece.dimensions, (outer, length, inner))
    first = placed.starts[1]
    middle = sorted(((n, step, there) for at, n, step, there in placed.steps if at == 1), reverse=True, key=_by_step)
    width = (end - begin) * inner
    others = [(n, step * (width if at == 0 else 1), there) for at, n, step, there in placed.steps if at != 1]
    base = placed.starts[0] * width + placed.starts[2]
    found = []
    for at, moved, inside in _within(tuple(middle), first, 0, begin, end):
        dimensions = joined([*others, *((n, step * inner, there) for n, step, there in inside)])
        found.append(Piece(piece.source, piece.offset + moved, base + (at - begin) * inner, dimensions))
    return found


def _by_step(dimension: Dimension) -> int:
    return dimension[1]


def _within(
    dimensions: tuple[Dimension, ...], at: int, moved: int, begin: int, end: int
) -> list[tuple[int, int, tuple[Dimension, ...]]]:
    """The parts of a line of elements that lie in a range: (first element, how far it is in the source, dimensions)."""
    last = at + sum((n - 1) * step for n, step, _ in dimensions)
    if last < begin or at >= end:
        return []
    if begin <= at and last < end:
        return [(at, moved, dimensions)]
    (n, step, there), inner = dimensions[0], dimensions[1:]
    span = last - at - (n - 1) * step
    # Rows that are wholly inside stay one part.
    low = max(0, -((at - begin) // step))
    high = min(n, max(low, (end - 1 - span - at) // step + 1))
    # Of those that are partly inside; all others have nothing there.
    first, stop = max(0, -((at + span - begin) // step)), min(n, -((at - end) // step))
    rows = [*range(first, low), *range(high, stop)]
    parts = [part for i in rows for part in _within(inner, at + i * step, moved + i * there, begin, end)]
    if high > low:
        parts.append((at + low * step, moved + low * there, ((high - low, step, there), *inner)))
    return parts


class Deriver(Protocol):
    """Goes on where a step cannot be followed."""

    def is_changed(self, arguments: Any) -> bool:
        """Whether one of the tensors has other values than its pieces say."""

    def derive(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a function of torch gives, without pieces."""


class _Here(threading.local):
    # How often this thread could not follow: code that catches every error would hide one.
    refusals = 0
    deriver: Deriver | None = None
    # What is made now will never take memory.
    silent = False


HERE = _Here()


def refusals() -> int:
    """How often this thread could not follow yet; what was made while it rose is not what values would make."""
    return HERE.refusals


def refuse(what: str) -> NotFollowedError:
    """The error for what cannot be followed, which is counted."""
    HERE.refusals += 1
    return NotFollowedError(what)


def silently(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a function gives of tensors that only tell how others lie: nobody counts their memory."""
    before, HERE.silent = HERE.silent, True
    try:
        return function(*args, **kwargs)
    finally:
        HERE.silent = before


def _has_no_values(name: str) -> Any:
    """A method that would read them."""

    def method(self: Any, *_: Any, **__: Any) -> Any:
        raise refuse(f"the values of a tensor ({self.made_by or name})")

    return method


class Followed(torch.Tensor):
    """A tensor that has no values and knows where they come from.

    Its pieces count as if it lay dense. Where it would lie else, it says so as torch does, by a tensor `like` it on the
    meta device, to which everything is done too: so shapes, strides and errors are torch's own.
    """

    # None where only the sources are known that it takes (see `deriving`).
    pieces: tuple[Piece, ...]
    takes: frozenset[int]
    # The function of torch, where there are no pieces; for messages.
    made_by: str = ""
    _lies: torch.Tensor | None = None

    # What is made of it must be dispatched, not merely bear its class.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Followed({tuple(self.shape)}, {self.pieces})"

    @property
    def like(self) -> torch.Tensor:
        """The tensor on the meta device, made when it is asked for: most sources are only renamed."""
        if self._lies is None:
            with torch._C.DisableTorchFunction(), _disable_current_modes():
                self._lies = torch.empty(self.shape, dtype=self.dtype, device="meta")
        return self._lies

    @like.setter
    def like(self, lies: torch.Tensor) -> None:
        """What torch says of how it lies."""
        self._lies = lies

    # What torch refuses for every tensor of a class of its own, and not for the checkpoint's.
    numpy = __array__ = _has_no_values("numpy")
    tolist = _has_no_values("tolist")
    data_ptr = untyped_storage = __dlpack__ = _has_no_values("its memory")
    apply_ = map_ = map2_ = _has_no_values("apply_")

    def __deepcopy__(self, memo: Any) -> Any:
        # torch's copies share memory where the tensors do.
        storage = self.like.untyped_storage()
        if ("lowmem", storage._cdata) in memo:
            raise refuse("copies of tensors that share memory")
        memo["lowmem", storage._cdata] = storage
        return self.clone()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        step = _STEPS.get(name)
        kwargs = kwargs or {}
        deriver = HERE.deriver
        if deriver is not None and deriver.is_changed((args, kwargs)):
            step = None
        if step is None or kwargs.get("out") is not None or kwargs.get("device") not in (None, torch.device("cpu")):
            if deriver is not None:
                return deriver.derive(func, args, kwargs)
            raise refuse(f"torch's {name}")
        here = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory", "non_blocking")}
        try:
            made = step(*args, **here)
            likes = list(map(_like, args))
        except (NotFollowedError, TypeError):
            if deriver is not None:
                return deriver.derive(func, args, kwargs)
            raise refuse(f"torch's {name}") from None
        like = func(*likes, **here)
        ends = [made] if isinstance(made, Followed) else made
        for one in ends:
            if not one.pieces:
                # Without elements it is made of its tensors still: without these it would not be there.
                listed = args[0] if isinstance(args[0], (list, tuple)) else args[:1]
                one.takes = frozenset[int]().union(*(tensor.takes for tensor in listed))
        if isinstance(made, Followed):
            return _settled(made, like)
        return [_settled(one, other) for one, other in zip(made, like, strict=True)]


def _like(value: Any) -> Any:
    if isinstance(value, Followed):
        return value.like
    if isinstance(value, torch.Tensor):
        raise NotFollowedError("a tensor that is no source")
    return list(map(_like, value)) if isinstance(value, (list, tuple)) else value


def _settled(made: Followed, like: torch.Tensor) -> Followed:
    """What a step made, lying as torch would have it."""
    if made.shape != like.shape or made.dtype != like.dtype:
        raise refuse("a result of another shape")
    if made.stride() != like.stride():
        takes = made.takes
        made = _made(made.shape, made.dtype, made.pieces, like.stride())
        made.takes = takes
    made.like = like
    return made


def _made(
    shape: Sequence[int], dtype: torch.dtype, pieces: tuple[Piece, ...], strides: Sequence[int] | None = None
) -> Followed:
    made: Followed = torch.Tensor._make_wrapper_subclass(
        Followed, tuple(shape), strides=strides, dtype=dtype, device=torch.device("cpu")
    )
    made.pieces = pieces
    made.takes = frozenset(piece.source for piece in pieces)
    return made


def derived(like: torch.Tensor, takes: frozenset[int], made_by: str) -> Followed:
    """A tensor that lies as `like` does, without values or pieces, made of these sources by a function of torch."""
    made: Followed = torch.Tensor._make_wrapper_subclass(
        Followed, tuple(like.shape), strides=like.stride(), dtype=like.dtype, device=torch.device("cpu")
    )
    made.pieces = None  # type: ignore[assignment]
    made.takes = takes
    made.made_by = made_by
    made.like = like
    return made


def follow(number: int, shape: Shape, dtype: torch.dtype) -> Followed:
    """The source of this number, all of it."""
    count = math.prod(shape)
    pieces = (Piece(number, 0, 0, joined([(count, 1, 1)])),) if count else ()
    made = _made(shape, dtype, pieces)
    made.takes = frozenset((number,))
    return made


def _moved(tensor: Followed, shape: Sequence[int], pieces: Iterable[Piece]) -> Followed:
    return _made(shape, tensor.dtype, tuple(pieces))


def _view(tensor: Followed, shape: Sequence[Any], *_: Any) -> Followed:
    if isinstance(shape, torch.dtype):
        raise NotFollowedError("torch's view of another dtype")
    sizes = list(shape)
    if -1 in sizes:
        rest = -math.prod(sizes)
        sizes[sizes.index(-1)] = tensor.numel() // rest if rest else 0
    if math.prod(sizes) != tensor.numel():
        raise RuntimeError(f"a tensor of shape {list(tensor.shape)} cannot have shape {list(shape)}")
    return _moved(tensor, sizes, tensor.pieces)


def _same(tensor: Followed, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Followed:
    if dtype is not None and dtype != tensor.dtype:
        raise NotFollowedError("a cast")
    return _moved(tensor, tensor.shape, tensor.pieces)


def _permute(tensor: Followed, order: Sequence[int]) -> Followed:
    order = [d % tensor.ndim for d in order]
    shape = [tensor.shape[d] for d in order]
    strides = [0] * tensor.ndim
    for d, stride in zip(order, row_major(shape), strict=True):
        strides[d] = stride
    before = tuple(tensor.shape)
    return _moved(tensor, shape, (relaid(p, before, tuple(strides), 0) for p in tensor.pieces))


def _transpose(tensor: Followed, first: int, second: int) -> Followed:
    order = list(range(tensor.ndim))
    if order:
        order[first], order[second] = order[second], order[first]
    return _permute(tensor, order)


def _t(tensor: Followed) -> Followed:
    return _transpose(tensor, 0, 1) if tensor.ndim == 2 else _same(tensor)


def _unsqueeze(tensor: Followed, dim: int) -> Followed:
    shape = list(tensor.shape)
    shape.insert(dim % (tensor.ndim + 1), 1)
    return _moved(tensor, shape, tensor.pieces)


def _squeeze(tensor: Followed, dims: int | Sequence[int] | None = None) -> Followed:
    chosen = range(tensor.ndim) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {d % tensor.ndim for d in chosen if tensor.ndim}
    shape = [n for d, n in enumerate(tensor.shape) if d not in gone or n != 1]
    return _moved(tensor, shape, tensor.pieces)


def _slice(tensor: Followed, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Followed:
    if step != 1:
        raise NotFollowedError("a slice with a step")
    dim %= tensor.ndim
    shape = list(tensor.shape)
    length = shape[dim]
    begin, stop, _ = slice(start, end).indices(length)
    shape[dim] = max(0, stop - begin)
    if shape[dim] == length or not math.prod(shape):
        return _moved(tensor, shape, tensor.pieces if math.prod(shape) else ())
    outer, inner = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
    pieces = [part for piece in tensor.pieces for part in cut(piece, outer, length, inner, begin, stop)]
    return _moved(tensor, shape, pieces)


def _select(tensor: Followed, dim: int, index: int) -> Followed:
    dim, index = dim % tensor.ndim, index % tensor.shape[dim]
    return _squeeze(_slice(tensor, dim, index, index + 1), dim)


def _unbind(tensor: Followed, dim: int = 0) -> list[Followed]:
    return [_select(tensor, dim, i) for i in range(tensor.shape[dim])]


def _split(tensor: Followed, sizes: int | Sequence[int], dim: int = 0) -> list[Followed]:
    length = tensor.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, length - i) for i in range(0, length, sizes)] if sizes and length else [length]
    if sum(sizes) != length:
        raise RuntimeError(f"a dimension of {length} cannot be split into {list(sizes)}")
    parts, begin = [], 0
    for size in sizes:
        parts.append(_slice(tensor, dim, begin, begin + size))
        begin += size
    return parts


def _cat(tensors: Sequence[torch.Tensor], dim: int = 0) -> Followed:
    # As torch.cat has it, an empty tensor of one dimension goes with everything.
    held = [t for t in tensors if t.ndim != 1 or t.numel()] or list(tensors[:1])
    first = held[0]
    dim %= first.ndim
    length = 0
    begins = []
    for tensor in held:
        if not isinstance(tensor, Followed):
            raise NotFollowedError("a tensor that is no source")
        if tensor.dtype != first.dtype:
            raise NotFollowedError("a cast")
        rest = [*tensor.shape[:dim], *tensor.shape[dim + 1 :]]
        if tensor.ndim != first.ndim or rest != [*first.shape[:dim], *first.shape[dim + 1 :]]:
            raise RuntimeError(
                f"tensors of shapes {list(first.shape)} and {list(tensor.shape)} cannot be put together along "
                f"dimension {dim}"
            )
        begins.append(length)
        length += tensor.shape[dim]
    inner = math.prod(first.shape[dim + 1 :])
    outer = math.prod(first.shape[:dim])
    pieces: list[Piece] = []
    for begin, tensor in zip(begins, held, strict=True):
        assert isinstance(tensor, Followed)
        block = tensor.shape[dim] * inner
        if outer == 1:
            pieces += [Piece(p.source, p.offset, p.into + begin * inner, p.dimensions) for p in tensor.pieces]
        else:
            strides = (length * inner, 1)
            pieces += [relaid(p, (outer, block), strides, begin * inner) for p in tensor.pieces]
    assert isinstance(first, Followed)
    return _moved(first, (*first.shape[:dim], length, *first.shape[dim + 1 :]), pieces)


def _stack(tensors: Sequence[Followed], dim: int = 0) -> Followed:
    if any(not isinstance(tensor, Followed) for tensor in tensors):
        raise NotFollowedError("a tensor that is no source")
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1:
        raise RuntimeError(f"tensors of shapes {', '.join(str(list(s)) for s in sorted(shapes))} cannot be stacked")
    return _cat([_unsqueeze(tensor, dim) for tensor in tensors], dim)


_STEPS: dict[str, Callable[..., Any]] = {
    "view": _view,
    "_unsafe_view": _view,
    "reshape": _view,
    "_reshape_alias": _view,
    "clone": _same,
    "contiguous": _same,
    "detach": _same,
    "alias": _same,
    "lift_fresh": _same,
    "_to_copy": _same,
    "permute": _permute,
    "transpose": _transpose,
    "t": _t,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "slice": _slice,
    "select": _select,
    "unbind": _unbind,
    "split": _split,
    "split_with_sizes": _split,
    "cat": _cat,
    "stack": _stack,
}
