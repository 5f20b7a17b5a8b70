"""One weight that is elsewhere, and the ways in which an operation can have it: whole, some rows, some parts."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from .._mapped_pages import let_go
from .._records import computed_once
from ..checkpoint import TensorEntry
from ..engine.destinations import address_space
from ..mapping import Link
from ..modeling.targets import Uses
from ..planner import Placement
from ..planner.running import comes_by_rows, parts_of
from ..sizes import KIB
from .blocks import embedding_by_rows, linear_in_blocks
from .making import View, is_whole, links_of_parts, make, make_part, make_rows
from .observing import Range
from .pages import bring_range, joined_ranges
from .units import Unit

if TYPE_CHECKING:
    from .runtime import Runtime

# Less than this is read with its neighbours.
_WORTH_READING = 256 * KIB


class Weight:
    """A weight that is made, or copied to another device, whenever it is used.

    Args:
        placement: what it is, and where it comes from.
        view: gives the pages of an entry's file as a tensor, or what waits in memory (see `waiting`).
        runtime: holds it for as long as it is used, and sees that it is there before.
        uses: how the model uses its weights.
    """

    is_scratch = is_turned = False

    def __init__(self, placement: Placement, view: View, runtime: Runtime, uses: Uses) -> None:
        self.name = placement.target
        self.shape = placement.shape
        self.dtype: torch.dtype = getattr(torch, placement.dtype)
        self.device = runtime.place.device
        self.nbytes = placement.nbytes
        self.parts = parts_of(placement, uses)
        self.by_rows = comes_by_rows(placement)
        self._placement = placement
        self._view = view
        self._runtime = runtime
        self._address: torch.UntypedStorage | None = None
        # What is brought by need is not brought ahead.
        ahead = self.parts == 1 and not self.is_too_large
        # The runtime ends with the last weight, and must not keep it.
        bring = weakref.WeakMethod(self._bring_ahead)
        self._unit: Unit = runtime.add(self.nbytes if ahead else 0, make=bring)
        if self.has_rows and uses.looked_up.issuperset(placement.names):
            # Of a table only rows are used, as long as nobody asks for all of it.
            self._unit.nbytes = 0

    @property
    def is_too_large(self) -> bool:
        """Whether the buffers do not hold it, and it comes by rows."""
        return self.by_rows and self.nbytes > self._runtime.running.buffers

    @property
    def is_whole(self) -> bool:
        """Whether all of it lies in one place, though perhaps in another dtype."""
        return is_whole(self._placement)

    @property
    def has_rows(self) -> bool:
        """Whether single rows can be looked up where they lie."""
        return len(self.shape) == 2 and self.is_whole

    def make(self, into: torch.Tensor) -> None:
        """All of it, in host memory."""
        with self._reading(whole=True) as view:
            make(self._placement, view, into)

    def make_rows(self, begin: int, end: int, into: torch.Tensor) -> None:
        """Some rows of it, in host memory."""
        with self._reading() as view:
            make_rows(self._placement, begin, end, view, into)

    def whole(self) -> torch.Tensor:
        """All of it, where it computes, until the tensor is dropped."""
        if self.nbytes <= self._runtime.running.buffers:
            # Whoever takes all of it is likely to do so again.
            self._unit.nbytes = self.nbytes
        self._runtime.use(self._unit)
        return self._runtime.get(self._unit.number, self)

    def forget(self) -> None:
        """Make it anew at the next use."""
        self._runtime.forget(self._unit.number)

    def hold(self, tensor: torch.Tensor) -> None:
        """Keep what was brought until another one is to be kept."""
        self._runtime.pointed_at = tensor

    def address(self) -> torch.UntypedStorage:
        """Address space that is this weight's alone, and no memory: reading it would end the process."""
        if self._address is None:
            self._address = torch.frombuffer(address_space(max(1, self.nbytes)), dtype=torch.uint8).untyped_storage()
        return self._address

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows with these numbers, as `torch.nn.functional.embedding` gives them."""
        self._runtime.use(self._unit)
        return embedding_by_rows(ids, self._view(self._placement.links[0].entry, self.shape), self.dtype)

    def part(self, index: int) -> Part:
        """`weight[index]`, not brought yet."""
        return Part(self, index)

    def part_whole(self, index: int) -> torch.Tensor:
        """`weight[index]`, where it computes."""
        self._runtime.use(self._unit)
        return self._runtime.get((self._unit.number, index), self.part(index), is_part=True)

    def forget_part(self, index: int) -> None:
        """Make `weight[index]` anew at the next use."""
        self._runtime.forget((self._unit.number, index))

    def part_ranges(self, index: int) -> Sequence[Range]:
        """Address and bytes of the file pages that `weight[index]` is made of; none where it is not made of pages."""
        return self._parts_lie[index]

    def part_to_expect(self, index: int) -> Sequence[Range]:
        """Those of them that its next use reads: none if it is in a buffer."""
        ring = self._runtime.ring
        number = self._unit.number
        is_held = ring.find((number, index)) is not None or ring.find(number) is not None
        return () if is_held else self.part_ranges(index)

    @computed_once
    def _parts_lie(self) -> list[list[Range]]:
        ranges = self._runtime.files.range_of
        if not self.is_whole:
            return [joined_ranges(ranges(link.entry) for link in links) for links in self._links_of_parts]
        lies = ranges(self._placement.links[0].entry)
        if lies is None:
            return [[] for _ in range(self.parts)]
        step = lies[1] // self.parts
        return [[(lies[0] + index * step, step)] for index in range(self.parts)]

    @computed_once
    def _links_of_parts(self) -> list[list[Link]]:
        return [[] for _ in range(self.parts)] if self.is_whole else links_of_parts(self._placement)

    def make_part(self, index: int, into: torch.Tensor) -> None:
        """`weight[index]`, in host memory."""
        ranges = self.part_ranges(index)
        self._bring(ranges)
        make_part(self._placement, index, self._links_of_parts[index], self._view, into)
        self._give_back(ranges)

    def make_part_rows(self, index: int, begin: int, end: int, into: torch.Tensor) -> None:
        """`weight[index][begin:end]`, likewise, of a weight that lies in one place."""
        ranges = [
            (address + nbytes // self.shape[1] * begin, nbytes // self.shape[1] * (end - begin))
            for address, nbytes in self.part_ranges(index)
        ]
        self._bring(ranges)
        into.copy_(self._view(self._placement.links[0].entry, self.shape)[index][begin:end])
        self._give_back(ranges)

    @staticmethod
    def _bring(ranges: Iterable[Range]) -> None:
        for address, nbytes in ranges:
            if nbytes >= _WORTH_READING:
                bring_range(address, nbytes, exactly=True)

    def _give_back(self, ranges: Iterable[Range]) -> None:
        if self._runtime.is_tight:
            for address, nbytes in ranges:
                let_go(address, nbytes)

    @contextmanager
    def _reading(self, *, whole: bool = False) -> Iterator[View]:
        """Gives the files' pages; read at once where all of them are taken, and given back where memory is tight."""
        taken: list[Range] = []

        def view(entry: TensorEntry, shape: tuple[int, ...] | None = None) -> torch.Tensor:
            lies = self._runtime.files.range_of(entry)
            if lies is not None and lies[1] >= _WORTH_READING:
                taken.append(lies)
                if whole:
                    bring_range(*lies, exactly=self._runtime.reads_exactly)
            return self._view(entry, shape)

        yield view
        self._give_back(taken)

    def gather(self, index: torch.Tensor) -> torch.Tensor:
        """`weight[index]` of some numbers: a copy, as torch gives it."""
        numbers = index.reshape(-1).tolist()
        for number in numbers:
            if not -self.parts <= number < self.parts:
                raise IndexError(f"index {number} is out of bounds for dimension 0 with size {self.parts}")
        found = torch.empty((len(numbers), *self.shape[1:]), dtype=self.dtype, device=self.device)
        places: dict[int, list[int]] = {}
        for at, number in enumerate(numbers):
            places.setdefault(number % self.parts, []).append(at)
        for number, where in sorted(places.items()):
            part = self.part_whole(number)
            for at in where:
                found[at] = part
            del part
        return found.view(*index.shape, *self.shape[1:])

    def grouped(self, x: torch.Tensor, offsets: torch.Tensor, *, turned: bool = False) -> torch.Tensor:
        """As `torch.nn.functional.grouped_mm(x, weight, offs=offsets)`, of the parts that have rows of `x` alone.

        Args:
            x: [rows, width], sorted by part.
            offsets: [parts], behind the last row of each part.
            turned: multiply with each part's transpose.
        """
        ends = offsets.tolist()
        width = self.shape[1 if turned else 2]
        out = torch.empty((x.shape[0], width), dtype=x.dtype, device=x.device)
        if ends and ends[-1] < x.shape[0]:
            out[ends[-1] :] = 0
        begin = 0
        for number, end in enumerate(ends):
            if end > begin:
                part = self.part_whole(number).unsqueeze(0)
                part = part.transpose(-2, -1) if turned else part
                only = torch.tensor([end - begin], dtype=offsets.dtype, device=offsets.device)
                out[begin:end] = functional.grouped_mm(x[begin:end], part, offs=only)
                del part
            begin = max(begin, end)
        return out

    @property
    def comes_in_turn(self) -> bool:
        """Whether the buffers do not hold it, and its parts can be used one after the other."""
        return self.parts > 1 and self.nbytes > self._runtime.running.buffers

    def batched(self, x: torch.Tensor, *, turned: bool = False) -> torch.Tensor:
        """As `torch.bmm(x, weight)`, one part after the other; `turned`: with each part's transpose."""
        if x.shape[0] != self.parts:
            raise RuntimeError(f"expected a batch of {self.parts} matrices for {self.name!r}, found {x.shape[0]}")
        found = []
        for number in range(self.parts):
            part = self.part_whole(number).unsqueeze(0)
            found.append(torch.bmm(x[number : number + 1], part.transpose(-2, -1) if turned else part))
            del part
        return torch.cat(found)

    def turned(self) -> Turned:
        """With its last two dimensions exchanged, not brought yet."""
        return Turned(self)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """As `torch.nn.functional.linear`, in blocks of rows."""
        self._runtime.use(self._unit)
        room = self._runtime.running.largest
        # Each thread has its own.
        buffer = self._runtime.get(("block", room, threading.get_ident()), Block(room))
        return linear_in_blocks(x, self._rows_into, self.shape[0], self.shape[1], self.dtype, bias, buffer)

    def _rows_into(self, begin: int, end: int, buffer: torch.Tensor) -> torch.Tensor:
        count = (end - begin) * self.shape[1]
        rows = buffer[: count * self.dtype.itemsize].view(self.dtype).view(end - begin, self.shape[1])
        place = self._runtime.place
        with torch.no_grad():
            # The rows before them may still be at work.
            place.wait(place.bring(RowsOf(self, begin, end), rows, place.stamp(place.user())))
        return rows

    def _bring_ahead(self) -> bool:
        return self._runtime.get_ahead(self._unit.number, self)


def waiting(tensor: torch.Tensor) -> View:
    """What gives a weight that waits in memory, whose placement is `planner.running.in_one_piece`."""

    def view(entry: TensorEntry, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        return tensor if shape is None else tensor.view(shape)

    return view


class Turned:
    """Experts with their last two dimensions exchanged: as a weight by itself."""

    is_scratch = False
    is_turned = True
    is_too_large = has_rows = by_rows = False

    def __init__(self, weight: Weight) -> None:
        count, rows, columns = weight.shape
        self.name = weight.name
        self.shape = (count, columns, rows)
        self.dtype = weight.dtype
        self.device = weight.device
        self.parts = weight.parts
        self._weight = weight

    @property
    def comes_in_turn(self) -> bool:
        """As the weight."""
        return self._weight.comes_in_turn

    def whole(self) -> torch.Tensor:
        """All of it, where it computes, until the tensor is dropped."""
        return self._weight.whole().transpose(-2, -1)

    def forget(self) -> None:
        """As the weight."""
        self._weight.forget()

    def address(self) -> torch.UntypedStorage:
        """As the weight."""
        return self._weight.address()

    def grouped(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """As that of the weight."""
        return self._weight.grouped(x, offsets, turned=True)

    def batched(self, x: torch.Tensor) -> torch.Tensor:
        """As that of the weight."""
        return self._weight.batched(x, turned=True)

    def turned(self) -> Weight:
        """As it was."""
        return self._weight


class Part:
    """`weight[index]`: as a weight by itself."""

    is_turned = comes_in_turn = False

    is_too_large = has_rows = is_scratch = False
    parts = 1

    def __init__(self, weight: Weight, index: int) -> None:
        self.name = f"{weight.name}[{index}]"
        self.shape = weight.shape[1:]
        self.dtype = weight.dtype
        self.device = weight.device
        self.by_rows = weight.is_whole and len(self.shape) == 2
        self._weight = weight
        self._index = index

    def whole(self) -> torch.Tensor:
        """It, where it computes, until the tensor is dropped."""
        return self._weight.part_whole(self._index)

    def forget(self) -> None:
        """Make it anew at the next use."""
        self._weight.forget_part(self._index)

    def address(self) -> torch.UntypedStorage:
        """That of the weight: what is asked for is whether memory is shared."""
        return self._weight.address()

    def make(self, into: torch.Tensor) -> None:
        """It, in host memory."""
        self._weight.make_part(self._index, into)

    def make_rows(self, begin: int, end: int, into: torch.Tensor) -> None:
        """Some rows of it, if `by_rows`."""
        self._weight.make_part_rows(self._index, begin, end, into)


class RowsOf:
    """Some rows of a weight."""

    is_scratch = False
    by_rows = True

    def __init__(self, weight: Weight, begin: int, end: int) -> None:
        self.name = weight.name
        self.shape: tuple[int, ...] = (end - begin, weight.shape[1])
        self.dtype = weight.dtype
        self._weight, self._begin = weight, begin

    def make(self, into: torch.Tensor) -> None:
        """They, in host memory."""
        self._weight.make_rows(self._begin, self._begin + self.shape[0], into)

    def make_rows(self, begin: int, end: int, into: torch.Tensor) -> None:
        """Some of them."""
        self._weight.make_rows(self._begin + begin, self._begin + end, into)


class Block:
    """Room for rows of what is too large for one buffer."""

    by_rows = is_scratch = True
    dtype = torch.uint8
    name = "a block of rows"

    def __init__(self, nbytes: int) -> None:
        self.shape: tuple[int, ...] = (nbytes,)

    def make(self, into: torch.Tensor) -> None:
        """Nothing yet."""

    def make_rows(self, begin: int, end: int, into: torch.Tensor) -> None:
        """Nothing yet."""
