"""The records of this room: which entry feeds which region of which target."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .._records import cheap_init, computed_once
from ..checkpoint import TensorEntry

if TYPE_CHECKING:
    from ..modeling.conversions import Operation
    from ..modeling.sharding import Part
    from .diff import KeyDiff
    from .presets import Preset
    from .transforms import Transform


@cheap_init
@dataclass(frozen=True, slots=True)
class Region:
    """A part of a target, as torch's `as_strided` takes it: offset, shape and strides in elements of the target.

    A source tensor is read in row-major order and written through these strides, so that a slice of a fused tensor
    or a transposed part needs no scratch memory.
    """

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def count(self) -> int:
        """Elements in the region."""
        return math.prod(self.shape)

    @property
    def dense(self) -> bool:
        """Whether the elements lie one behind the other."""
        if self.strides == (1,):
            return True
        step = 1
        for n, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if n != 1 and stride != step:
                return False
            step *= n
        return True

    def pieces(self, most: int, first: int = 0) -> Iterator[tuple[int, Region]]:
        """Cut into regions of at most `most` elements, in row-major order: (elements before it, piece).

        Args:
            most: elements of a piece.
            first: elements of the first piece of a dense region that is cut, if not 0: at most `most`.
        """
        count = self.count
        if count <= most:
            if count:
                yield 0, self if self.strides == (1,) or not self.dense else Region(self.offset, (count,), (1,))
        elif self.dense:
            at, size = 0, first or most
            while at < count:
                size = min(size, count - at)
                yield at, Region(self.offset + at, (size,), (1,))
                at, size = at + size, most
        else:
            yield from self._rows(most)

    def _rows(self, most: int) -> Iterator[tuple[int, Region]]:
        row = math.prod(self.shape[1:])
        take = max(1, most // row)
        for at in range(0, self.shape[0], take):
            shape = (min(take, self.shape[0] - at), *self.shape[1:])
            part = Region(self.offset + at * self.strides[0], shape, self.strides)
            if part.count <= most:
                yield at * row, part
            else:
                # One row is more than a piece: cut inside it.
                inner = Region(part.offset, self.shape[1:], self.strides[1:])
                for before, piece in inner.pieces(most):
                    yield at * row + before, piece


@functools.lru_cache(maxsize=1024)
def whole(shape: tuple[int, ...]) -> Region:
    """The region that is all of a dense target. Models have few shapes, so that most tensors share theirs."""
    count = math.prod(shape)
    return Region(0, (count,), (1,))


@cheap_init
@dataclass(frozen=True, slots=True)
class Link:
    """One entry that feeds one region of one target; both have as many elements.

    A part of a tensor in the checkpoint is an entry of its own: the same key, with the offset, shape and strides of
    the part. One with strides feeds all of a dense target, or a region of its own shape.

    Attributes:
        entry: what is read.
        target: name of the model's tensor.
        region: the part of it that is fed.
        whole: whether the entry is all of the tensor that its key names, as it lies.
        scales: of int8 that becomes floats, the scales of its rows; None for all else.
    """

    entry: TensorEntry
    target: str
    region: Region
    whole: bool = True
    scales: TensorEntry | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Computation:
    """Targets that an operation computes, because nobody could write it down as moves.

    Attributes:
        what: the operation's name, for messages.
        sources: what it takes, in order. Each is cast to the final dtype of the first target before, unless `dtype`
            is given.
        targets: names of the model's tensors that it gives, in order.
        operation: the operation.
        dtype: of what the operation gives, where its sources come as they are and the results are cast. Else empty.
        parts: of each target, what this rank keeps of it, None for all; empty where nothing is divided.
    """

    what: str
    sources: tuple[TensorEntry, ...]
    targets: tuple[str, ...]
    operation: Operation
    dtype: str = ""
    parts: tuple[Part | None, ...] = ()


RenameRule = tuple[re.Pattern[str], str] | Callable[[str], str]


@dataclass(frozen=True, slots=True)
class KeyRules:
    """What the user said about keys. In this order: `prefix`, `only` and `skip`, `rename`, `preset`, `filter_fn`.

    Attributes:
        prefix: take only the keys inside this module, without it: `"backbone"` makes `backbone.a` into `a`.
        only: the keys to take, by names or patterns or a function; None for all.
        skip: the keys to leave, likewise.
        rename: regular expressions with their replacements, or functions of a key, one applied after the other.
        reshape: names of the model's tensors, or patterns, that may be fed from another shape of as many elements.
        ignore_mismatched_sizes: what has another shape is initialised by the model's own rule.
        preset: a known change of names and shapes from one library's layout to another's.
        filter_fn: a function of a state dict, or of one and the model, that gives the state dict to load.
        transforms: names of the model's tensors, or patterns, with what is done to a tensor that feeds them.
    """

    prefix: str | None = None
    only: tuple[str, ...] | Callable[[str], bool] | None = None
    skip: tuple[str, ...] | Callable[[str], bool] = ()
    rename: tuple[RenameRule, ...] = ()
    reshape: tuple[str, ...] = ()
    ignore_mismatched_sizes: bool = False
    preset: Preset | None = None
    filter_fn: Callable[..., Mapping[str, Any]] | None = None
    transforms: tuple[tuple[str, Transform], ...] = ()


NO_RULES = KeyRules()


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A key whose tensor does not fit its target.

    Attributes:
        key: the checkpoint's key.
        target: the model's name.
        found: shape in the checkpoint.
        expected: shape in the model.
        dtype: name of the torch dtype in the checkpoint.
    """

    key: str
    target: str
    found: tuple[int, ...]
    expected: tuple[int, ...]
    dtype: str = ""


@dataclass(frozen=True, slots=True)
class Share:
    """What one of several sources feeds.

    Attributes:
        module: of the model; empty for all that no other source has a module for.
        source: as the user gave it.
        tensors: of the model that it feeds.
        nbytes: in the checkpoint, of those that feed them; a range that several share is counted once.
    """

    module: str
    source: str
    tensors: int
    nbytes: int


@dataclass(frozen=True)
class KeyMapping:
    """Which entry feeds which target, and what is left over.

    Attributes:
        links: in the checkpoint's file order. The entry of a reshaped one has the shape of its target. A target may
            be fed by several, a region each.
        computed: what operations compute; none of their targets is fed by a link.
        tied: target → the target of its tie group that is fed in its stead.
        doubled: targets of a tie group that the checkpoint holds more than once: name → the name that is fed.
        missing: targets of the state dict that nothing feeds.
        excused: missing ones that the model's kind allows to be missing, or whose key the user left out.
        unexpected: keys that feed nothing.
        mismatched: keys of another shape than their target.
        suggestions: what would probably mend the differences, a sentence each.
        sources: target → the key that feeds it or would, tied and mismatched ones too.
        steps: what was done to keys by evidence, a sentence each.
        unreadable: missing target → why the tensor of its key cannot be read.
        diff: the difference with what would mend it, where something is missing or mismatched.
        leads: target → the one whose dtype the model's kind gives it, where one tensor becomes several.
        converted: targets that are not the tensor of their key as it is.
        made: targets with the row scales of weights that become int8 on the way: scales → weight.
        apart: targets of modules that have a source of their own, with what their floats become; empty where that is
            what the load asks. They do not have to be what the model as a whole is.
        shares: of several sources, what each feeds; empty for a single one.
        maker: what tells functions that compute tensors from others, beside the model's own; empty without them.
    """

    links: tuple[Link, ...]
    tied: Mapping[str, str]
    doubled: Mapping[str, str]
    missing: tuple[str, ...]
    excused: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[Mismatch, ...]
    suggestions: tuple[str, ...]
    sources: Mapping[str, str] = field(default_factory=dict)
    steps: tuple[str, ...] = ()
    unreadable: Mapping[str, str] = field(default_factory=dict)
    diff: KeyDiff | None = None
    computed: tuple[Computation, ...] = ()
    leads: Mapping[str, str] = field(default_factory=dict)
    converted: frozenset[str] = frozenset()
    made: Mapping[str, str] = field(default_factory=dict)
    maker: str = ""
    apart: Mapping[str, str] = field(default_factory=dict)
    shares: tuple[Share, ...] = ()

    @computed_once
    def fed(self) -> frozenset[str]:
        """Targets that the checkpoint feeds, without those that are tied to one."""
        computed = (name for computation in self.computed for name in computation.targets)
        return frozenset({*(link.target for link in self.links), *computed})
