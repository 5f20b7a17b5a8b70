"""A function of a state dict, written down: which of its results are sources, parts of them, or must be computed.

It is run once on tensors without values (`deriving`). What it gives as it came in stays a tensor of the checkpoint,
what it only moves about becomes parts, and for anything else it is run again while loading, with the values of just the
tensors that the result is made of.
"""

from __future__ import annotations

import hashlib
import math
import traceback
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .._strides import Shape, columns
from ..checkpoint import TensorEntry
from ..dtypes import itemsize
from ..errors import KeysError, LowmemError, UnsupportedError
from ..sizes import MIB
from .conversions import Conversion, Cost, Part, StateFunction
from .deriving import RANDOM, Deriving, Known
from .describing import described
from .failures import describe
from .following import Followed, NotFollowedError, follow, refusals
from .foreign import line_of, watch_chance
from .rehearsing import Counting, rehearse
from .targets import dtype_name

# Bytes of sources and results that may be in memory at once, for the functions to be run once for several results.
_TOGETHER = 32 * MIB
# Of one tensor, to one: what is done to a result at last.
Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Step:
    """A function that is one of several in a row.

    Attributes:
        what: its name, for messages.
        function: of a state dict, to one.
        maker: what tells it from others, if its own source does not: equal texts mean equal results.
        owner: the model whose tensors it may see, and neither give nor take values of: these change with the load.
    """

    what: str
    function: StateFunction
    maker: str = ""
    owner: weakref.ref[nn.Module] | None = None

    def described(self) -> str:
        """What tells it from others; another text each time where that cannot be told."""
        text = self.maker or described(self.function) or uuid.uuid4().hex
        return f"{self.what} {hashlib.sha256(text.encode()).hexdigest()}"

    def own(self) -> list[torch.Tensor]:
        """Tensors of the model that owns them."""
        model = None if self.owner is None else self.owner()
        return [] if model is None else [*model.parameters(), *model.buffers()]


class Tracing:
    """What functions make of tensors of a checkpoint.

    Attributes:
        entries: name → result. One that is a tensor of the checkpoint as it lies is that; any other has the shape and
            dtype of the result, and the place of the first tensor that it is made of.
        made: names of the others.
        left_out: names of tensors of the checkpoint that no result is made of.
        given: tensors of the checkpoint, by the names that the first function is given them under.
        what: names of the functions, for messages.
        own: names under which functions gave tensors of the model itself, which count as not given.
    """

    @torch.inference_mode(False)  # or others of torch's functions would be seen
    def __init__(self, steps: tuple[Step, ...], entries: Mapping[str, TensorEntry], source: str) -> None:
        """Run the functions, one after the other.

        Args:
            steps: the functions.
            entries: tensors of the checkpoint, by the names that the first function is given them under, in the order
                in which a program has them that loads the file.
            source: the checkpoint, for messages.

        Raises:
            KeysError: a function fails, or gives something else than tensors.
            UnsupportedError: it asks for the values of tensors.
        """
        self.what = " and ".join(step.what for step in steps)
        self._steps = steps
        self._source = source
        # What torch has no dtype for goes by.
        self.given = entries
        self._given = {name: entry for name, entry in entries.items() if hasattr(torch, entry.dtype)}
        self._names = tuple(self._given)
        self.known: Known = {}
        # Made once: a function may be run for each of its results.
        self._followed: tuple[Followed, ...] | None = None
        # Of each function.
        self._own: dict[int, frozenset[str]] = {}
        results, self._deriving = self._traced()
        self.entries = {name: entry for name, entry in entries.items() if name not in self._given}
        self.made: set[str] = set()
        used: set[int] = set()
        for name, result in results.items():
            takes = self._takes(self.what, result)
            used |= takes
            as_it_lies = self._as_it_lies(result)
            if as_it_lies is None:
                self.made.add(name)
                self.entries[name] = self._described(result, takes)
            else:
                self.entries[name] = self._given[as_it_lies]
        self._results = {name: result for name, result in results.items() if name in self.made}
        self.left_out = tuple(name for i, name in enumerate(self._names) if i not in used)
        self.own = tuple(name for names in self._own.values() for name in sorted(names))

    def maker(self) -> str:
        """What tells these functions from others: equal texts mean equal results."""
        return "; ".join(step.described() for step in self._steps)

    @torch.inference_mode(False)
    def conversion(self, name: str, target: str, change: Change | None = None, what: str = "") -> Conversion:
        """How a result becomes a target of the model.

        Args:
            name: of the result.
            target: the target's.
            change: what is done to it at last.
            what: the name of that, for messages.

        Raises:
            KeysError, UnsupportedError: as when the functions are run.
        """
        # Without functions, or where they give it as it came in, it is a tensor of the checkpoint.
        result = self._results.get(name)
        if result is None:
            result = follow(self._names.index(name), *self.shape_and_dtype(name))
        what = " and ".join(filter(None, (self.what, what)))
        if change is not None:
            with self._without_chance(what), self._deriving, torch.no_grad():
                result = self._refusing(what, change, result)
        takes = sorted(self._takes(what, result))
        keys = tuple(self._names[i] for i in takes) or self._smallest()
        made = Conversion(what, keys, (target,), (tuple(result.shape),), _Again(self, ((name, change),), keys))
        if not isinstance(result, Followed) or result.pieces is None or self._deriving.is_changed(result):
            return replace(made, dtype=dtype_name(result.dtype))
        parts = []
        for piece in result.pieces:
            shape, into, strides = columns(piece.dimensions)
            source = self._names[piece.source]
            parts.append(Part(source, piece.offset, strides, target, piece.into, into, shape))
        return replace(made, parts=tuple(parts))

    def run(self, tensors: Mapping[str, torch.Tensor], planning: Deriving | None = None) -> dict[str, torch.Tensor]:
        """Name → result, from these tensors; all others have no values.

        Args:
            tensors: those with values.
            planning: what sees tensors of the model, when it is run first: later their memory may be the file's.
        """
        followed = self._followed or self._sources()
        state: dict[str, Any] = {**dict(zip(self._names, followed, strict=True)), **tensors}
        for i, step in enumerate(self._steps):
            if planning is not None:
                planning.watch(step.own())
            state = self._refusing(step.what, _run, step, state)
            if planning is not None:
                self._own[i] = frozenset(name for name, result in state.items() if planning.is_own(result))
                planning.watch(())
            for name in self._own[i]:
                state.pop(name, None)
        return state

    def shape_and_dtype(self, name: str) -> tuple[Shape, torch.dtype]:
        """Of a tensor that the first function is given."""
        entry = self._given[name]
        return entry.shape, getattr(torch, entry.dtype)

    def _sources(self) -> tuple[Followed, ...]:
        return tuple(follow(i, *self.shape_and_dtype(name)) for i, name in enumerate(self._names))

    def _traced(self) -> tuple[dict[str, torch.Tensor], Deriving]:
        refusal: LowmemError | None = None
        try:
            # What a function makes itself needs no memory; but the numbers by which it indexes may have to be there.
            for device, surrounding in (("meta", torch.device("meta")), ("cpu", nullcontext())):
                deriving, self._followed = Deriving(device, self.known), self._sources()
                before = refusals()
                try:
                    with self._without_chance(self.what), surrounding, deriving, torch.no_grad():
                        results = self.run({}, deriving)
                    if refusals() == before:
                        self._check_sources(deriving)
                        return results, deriving
                    raise UnsupportedError(
                        _asks(self._source, self.what, "goes on where its error was one of missing values")
                    )
                except LowmemError as error:
                    traceback.clear_frames(error.__traceback__)
                    refusal = error
            assert refusal is not None
            raise refusal
        finally:
            # It knows this frame, which would be kept until the collector runs.
            del refusal

    @contextmanager
    def _without_chance(self, what: str) -> Iterator[None]:
        with watch_chance() as chance:
            yield
        if chance.drawn:
            raise UnsupportedError(_draws(self._source, what))

    def _check_sources(self, deriving: Deriving) -> None:
        """Refuse a change of what lies in the file under another name too; and see what can be used again."""
        assert self._followed is not None
        changed = [
            name for name, source in zip(self._names, self._followed, strict=True) if deriving.is_changed(source)
        ]
        shared = shared_memory(self._given) if changed else frozenset()
        for name in changed:
            if name in shared:
                raise UnsupportedError(
                    f"{self._source}: {self.what} changes {name!r} in place, which shares its memory with others or "
                    "itself in the file: expected a function that changes a copy (.clone())"
                )
        # Foreign code may have changed more of a tensor than its values.
        if any(
            source.takes != {i} or source.requires_grad or len(source.__dict__) > 3
            for i, source in enumerate(self._followed)
        ):
            self._followed = None

    def _takes(self, what: str, result: torch.Tensor) -> frozenset[int]:
        takes = self._deriving.takes(result)
        if RANDOM in takes:
            raise UnsupportedError(_draws(self._source, what))
        return takes

    def _refusing(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (LowmemError, MemoryError):
            raise
        except NotFollowedError as error:
            raise UnsupportedError(_asks(self._source, what, f"asks for {error}{line_of(error)}")) from error
        except Exception as error:
            raise KeysError(
                f"{self._source}: {what} failed: {describe(error)}; "
                f"check that it is meant for this checkpoint and this model"
            ) from error

    def _as_it_lies(self, result: torch.Tensor) -> str | None:
        """The tensor of the checkpoint that a result is, or None."""
        if not isinstance(result, Followed) or len(result.takes) != 1 or self._deriving.is_changed(result):
            return None
        number = next(iter(result.takes))
        source = follow(number, *self.shape_and_dtype(self._names[number]))
        same = (result.shape, result.dtype, result.pieces) == (source.shape, source.dtype, source.pieces)
        return self._names[number] if same else None

    def _described(self, result: torch.Tensor, takes: frozenset[int]) -> TensorEntry:
        key = self._names[min(takes)] if takes else self._smallest()[0]
        return replace(self._given[key], shape=tuple(result.shape), dtype=dtype_name(result.dtype), strides=None)

    def _smallest(self) -> tuple[str, ...]:
        """What is read beside a result that is made of nothing."""
        return (min(self._names, key=lambda name: self._given[name].nbytes),)


@dataclass(frozen=True, slots=True, eq=False)
class _Again:
    """The functions, run again for some results.

    Attributes:
        tracing: the functions.
        ends: the results, and what is done to each at last.
        keys: the tensors that they are made of.
    """

    tracing: Tracing
    ends: tuple[tuple[str, Change | None], ...]
    keys: tuple[str, ...]

    def cost(self, dtype: str) -> Cost:
        """What it gives and takes; the sources come as they are, whatever `dtype` is.

        Functions are run for this too: results of the same shapes may be made in other ways.
        """
        counting = Counting()
        results = rehearse(counting, self._empty, self)
        made = tuple((tuple(result.shape), dtype_name(result.dtype)) for result in results)
        scratch = max(0, counting.most - sum(result.nbytes for result in results))
        return Cost(made, scratch)

    def __call__(self, sources: list[torch.Tensor]) -> list[torch.Tensor]:
        """The results; `sources` is empty afterwards."""
        tensors = dict(zip(self.keys, sources, strict=True))
        sources.clear()
        deriving = Deriving(next(iter(tensors.values())).device.type, self.tracing.known)
        with deriving, torch.no_grad():
            results = self.tracing.run(tensors)
            tensors.clear()
            found = []
            for name, change in self.ends:
                result = results.pop(name)
                found.append(result if change is None else change(result))
            results.clear()
        for (name, _), result in zip(self.ends, found, strict=True):
            if isinstance(result, Followed) or deriving.takes(result):
                raise NotFollowedError(f"{name!r} is made of other tensors than when it was planned")
        return found

    def _empty(self, device: str) -> list[torch.Tensor]:
        ends = map(self.tracing.shape_and_dtype, self.keys)
        return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in ends]


def join_conversions(conversions: Iterable[Conversion]) -> Iterator[Conversion]:
    """Results that are computed by one run of the same functions, as far as they are small together.

    Args:
        conversions: as `Tracing.conversion` gives them, without parts.
    """
    waiting: list[Conversion] = []
    size = 0
    for conversion in conversions:
        more = _size(conversion)
        first = waiting[0] if waiting else conversion
        if waiting and (size + more > _TOGETHER or not _goes_with(first, conversion)):
            yield _joined(waiting)
            waiting, size = [], 0
        waiting.append(conversion)
        size += more
    if waiting:
        yield _joined(waiting)


def _goes_with(a: Conversion, b: Conversion) -> bool:
    assert isinstance(a.operation, _Again)
    assert isinstance(b.operation, _Again)
    return (a.what, a.dtype) == (b.what, b.dtype) and a.operation.tracing is b.operation.tracing


def _size(conversion: Conversion) -> int:
    """Bytes that are in memory for it."""
    assert isinstance(conversion.operation, _Again)
    ends = [conversion.operation.tracing.shape_and_dtype(key) for key in conversion.keys]
    sources = sum(math.prod(shape) * dtype.itemsize for shape, dtype in ends)
    return sources + math.prod(conversion.shapes[0]) * itemsize(conversion.dtype)


def _joined(conversions: Sequence[Conversion]) -> Conversion:
    first = conversions[0]
    if len(conversions) == 1:
        return first
    operations = [conversion.operation for conversion in conversions]
    keys = tuple(dict.fromkeys(key for conversion in conversions for key in conversion.keys))
    ends = tuple(end for operation in operations if isinstance(operation, _Again) for end in operation.ends)
    assert isinstance(first.operation, _Again)
    return replace(
        first,
        keys=keys,
        targets=tuple(target for conversion in conversions for target in conversion.targets),
        shapes=tuple(shape for conversion in conversions for shape in conversion.shapes),
        operation=_Again(first.operation.tracing, ends, keys),
    )


def shared_memory(entries: Mapping[str, TensorEntry]) -> frozenset[str]:
    """Names of tensors in the bytes of which others lie too, or several of their own elements."""
    found = {name for name, entry in entries.items() if entry.nbytes < math.prod(entry.shape) * itemsize(entry.dtype)}
    ordered = sorted((entry.file, entry.offset, entry.end, name) for name, entry in entries.items() if entry.nbytes)
    widest = None
    for file, offset, end, name in ordered:
        if widest is not None and widest[0] == file and offset < widest[1]:
            found |= {name, widest[2]}
        if widest is None or widest[0] != file or end > widest[1]:
            widest = file, end, name
    return frozenset(found)


def _run(step: Step, state: dict[str, Any]) -> dict[str, Any]:
    results = step.function(state)
    if not isinstance(results, Mapping):
        raise TypeError(f"expected a mapping of names to tensors, it gave {type(results).__name__}")
    for name, result in results.items():
        if not isinstance(name, str) or not isinstance(result, torch.Tensor):
            raise TypeError(f"expected names and tensors, it gave {name!r} as {type(result).__name__}")
    return dict(results)


def _draws(source: str, what: str) -> str:
    return (
        f"{source}: {what} draws random numbers, others each time that it is run: expected the same result whenever it "
        "is run; draw them once, save them and load them with the others, or make fixed ones by arithmetic "
        "(torch.linspace)"
    )


def _asks(source: str, what: str, why: str) -> str:
    return (
        f"{source}: {what} {why}, and there are none before anything is read: expected a function that can be planned; "
        "say what it does by rename= and transforms=, which need none, or run it once on the checkpoint with torch and "
        "save what it gives"
    )
