"""Where moves end that change by rows: floats that become int8 and scales, int8 that becomes floats."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch

from ..checkpoint import TensorEntry
from ..errors import UnsupportedError
from ..int8 import dequantise, measure, quantise, quantise_by
from ..mapping import Region
from ..planner import Move, Placement
from .destinations import Destination, MemoryDestination, Scratch, viewed

# Of int8 by its entry, of floats by the placement of their scales: see `LoadPlan.scales`.
Scales = Mapping[TensorEntry | Placement, torch.Tensor]


class RowsDestination:
    """A weight that becomes int8 or floats on the way.

    Args:
        placement: the weight's.
        base: takes the result.
        made: takes the scales of rows that become int8; None for int8 that becomes floats.
        known: scales that are known before.
    """

    def __init__(self, placement: Placement, base: Destination, made: Destination | None, known: Scales) -> None:
        self._placement = placement
        self._base = base
        self._made = made
        self._known = known
        self._dtype: torch.dtype = getattr(torch, placement.dtype)
        self._through: torch.dtype | None = getattr(torch, placement.through) if placement.through else None
        self._tensor = base.tensor if isinstance(base, MemoryDestination) and placement.device == "cpu" else None
        if placement.is_measured:
            assert placement.scales is not None
            assert made is not None
            scales = known[placement.scales]
            made.put(Region(0, (scales.numel(),), (1,)), scales)

    @property
    def places(self) -> list[Destination]:
        """What takes results."""
        return [self._base] if self._made is None else [self._base, self._made]

    def tensors(self) -> list[tuple[Placement, torch.Tensor]]:
        """Those of the results that are in memory."""
        pairs = zip([self._placement, self._placement.scales], self.places, strict=False)
        return [(p, place.tensor) for p, place in pairs if p is not None and isinstance(place, MemoryDestination)]

    def order(self) -> None:
        """What the calling thread asks for from now on finds the values."""
        for place in self.places:
            if isinstance(place, MemoryDestination):
                place.order()

    def begin(self, move: Move, scratch: Scratch, at: int) -> memoryview:
        """Behind the room for the result, if that is not worked out into its place."""
        if not move.row:
            return self._base.begin(move, scratch, at)
        begin = scratch.place_of(move, at + self._room(move))
        return scratch.memory[begin : begin + move.nbytes]

    def end(self, move: Move, scratch: Scratch, at: int) -> None:
        """Work the rows out.

        Raises:
            UnsupportedError: a row has no scale, because a value of it is not finite in fp16.
        """
        if not move.row:
            self._base.end(move, scratch, at)
            return
        room = self._room(move)
        source = viewed(scratch.elements(move, scratch.place_of(move, at + room)), move.source)
        grid = _Grid(move, source)
        if room:
            result = scratch.tensor[at : at + room].view(self._dtype).view(grid.source.shape)
        else:
            assert self._tensor is not None
            result = self._tensor.as_strided(grid.region.shape, grid.region.strides, grid.region.offset)
        if move.scales is not None:
            rows = self._known[move.scales][move.at_row : move.at_row + len(grid.source)]
            dequantise(grid.source, rows, result, scratch.work)
        elif self._placement.is_measured:
            assert self._placement.scales is not None
            rows = self._known[self._placement.scales][grid.rows]
            self._check(move, rows, grid)
            quantise_by(grid.source, rows, result, scratch.work, self._through)
        else:
            assert self._made is not None
            # Planned: see `budget.needs_of`.
            rows = torch.empty(len(grid.source), dtype=torch.float32)
            quantise(grid.source, result, rows, scratch.work, self._through)
            self._check(move, rows, grid)
            self._made.put(Region(grid.rows.start, tuple(rows.shape), (1,)), rows)
        if room:
            self._base.put(grid.region, result, scratch)

    def put(self, region: Region, source: torch.Tensor, scratch: Scratch | None = None) -> None:
        """Results that are there already."""
        self._base.put(region, source, scratch)

    def _room(self, move: Move) -> int:
        """Bytes of the buffer for the result."""
        if self._tensor is not None and (move.scales is None or move.region.dense):
            return 0
        return move.region.count * self._dtype.itemsize

    def _check(self, move: Move, scales: torch.Tensor, grid: _Grid) -> None:
        fine = torch.isfinite(scales)
        if bool(fine.all()):
            return
        row = range(self._placement.shape[0])[grid.rows][int(fine.logical_not().nonzero()[0])]
        keys = ", ".join(repr(link.entry.key) for link in self._placement.links)
        raise UnsupportedError(
            f"{move.file}: tensor {keys}: row {row} holds a value that is not finite in fp16, by way of which it would "
            f"become int8: expected magnitudes up to 65504; leave {self._placement.target.removesuffix('.weight')!r} "
            "out by skip_modules= (--skip-modules)"
        )


class MeasuringDestination(MemoryDestination):
    """The largest magnitude of each row, of rows that come in parts."""

    def __init__(self, placement: Placement) -> None:
        super().__init__(placement)
        self.tensor.zero_()
        self._through: torch.dtype | None = getattr(torch, placement.through) if placement.through else None
        self._turn = threading.Lock()

    def end(self, move: Move, scratch: Scratch, at: int) -> None:
        """Look at the rows."""
        grid = _Grid(move, viewed(scratch.elements(move, scratch.place_of(move, at)), move.source))
        found = torch.zeros(len(grid.source))
        measure(grid.source, found, scratch.work, self._through)
        with self._turn:
            rows = self.tensor[grid.rows]
            torch.maximum(rows, found, out=rows)


class _Grid:
    """The elements of a move as [rows, the same elements of each].

    Attributes:
        source: those elements.
        rows: which rows of the weight they are of.
        region: where they are in the weight.
    """

    def __init__(self, move: Move, source: torch.Tensor) -> None:
        region, row = move.region, move.row
        if region.dense and region.count % row == 0 and region.offset % row == 0:
            self.source = source.reshape(-1, row)
            first, step, along = region.offset // row, 1, 1
        elif move.scales is not None:
            self.source, self.region = source.view(region.shape), region
            self.rows = slice(move.at_row, move.at_row + region.shape[0])
            return
        else:
            across = [(i, n, stride) for i, (n, stride) in enumerate(_sides(region)) if n > 1 and stride % row == 0]
            inside = [(i, n, stride) for i, (n, stride) in enumerate(_sides(region)) if n > 1 and stride % row]
            count, step = (across[0][1], across[0][2] // row) if across else (1, 1)
            width, along = (inside[0][1], inside[0][2]) if inside else (1, 1)
            order = [i for i, _, _ in across + inside]
            order = [*(i for i in range(source.dim()) if i not in order), *order]
            self.source = source.permute(order).reshape(count, width)
            first = region.offset // row
        self.rows = slice(first, first + (len(self.source) - 1) * step + 1, step)
        self.region = Region(region.offset, tuple(self.source.shape), (step * row, along))


def _sides(region: Region) -> list[tuple[int, int]]:
    return list(zip(region.shape, region.strides, strict=True))
