"""Where tensors end up, and the moves that bring them there: how tensors are cut, and which moves are read at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .._records import cheap_init
from .._strides import row_major
from ..checkpoint import TensorEntry
from ..dtypes import itemsize
from ..mapping import Link, Region
from ..sizes import KIB, MIB
from .views import bytes_to_read, dimensions_of, in_bytes, lands_dense, pieces

# Largest move, in bytes of the source: larger ones are no faster, and several threads share a tensor.
CHUNK = 4 * MIB
# Both ends of a cast in one buffer begin at multiples of this.
ALIGNMENT = 64
# Direct I/O takes offsets, lengths and addresses that are multiples of this; what devices ask for is less or equal.
BLOCK = 4096
# Below this, direct reads gain nothing.
LEAST_DIRECT = 256 * KIB
# The heap has room for what is smaller.
_LEAST_APART = 1024 * KIB
# Moves of one read: the kernel takes 1024 buffers at once (IOV_MAX).
_MOST_MOVES = 512

# Of what changes by rows: something is kept of each while a move is worked out.
MOST_ROWS = 16 * KIB

Residency = Literal["map", "copy", "refer", "write", "init"]


@cheap_init
@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Where one tensor of the model ends up. Compared by identity: each is one destination.

    Attributes:
        target: the name it is fed under.
        names: every name of the model that shares it on this device, `target` first.
        shape: in elements.
        dtype: its final dtype, by torch's name.
        nbytes: its final size in bytes.
        device: `"cpu"`, `"cuda:0"`, …, or `"disk"`.
        residency: `map` (the parameter is file pages), `copy` (read into memory), `refer` (on disk, used where it
            lies, cast then if its dtype is another), `write` (on disk, cast into the offload folder), `init` (not in
            the checkpoint).
        links: what feeds it, one link a region; none for `init`, and for what is computed.
        scales: of int8 that floats become on the way, where the scales of its rows go; they have no links.
        through: a dtype to which floats are rounded before they become int8; empty for none.
        measures: elements of a row of the weight whose links these are: what is wanted of each row is its largest
            magnitude. 0 for all else.
    """

    target: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    device: str
    residency: Residency
    links: tuple[Link, ...]
    scales: Placement | None = None
    measures: int = 0
    through: str = ""

    @property
    def source_bytes(self) -> int:
        """Bytes in the checkpoint's files that are read to feed it."""
        total = 0
        for link in self.links:
            total += link.entry.nbytes if link.entry.strides is None else bytes_to_read(link.entry)
        return total

    @property
    def is_fed(self) -> bool:
        """Whether bytes of the checkpoint go into it."""
        return self.nbytes > 0 and bool(self.links)

    @property
    def source_elements(self) -> int:
        """Elements that feed it; a view may hold more of them than its bytes do."""
        total = 0
        for link in self.links:
            total += link.region.count
        return total

    @property
    def is_apart(self) -> bool:
        """Whether its memory is a mapping of its own."""
        return self.device == "cpu" and self.nbytes >= _LEAST_APART

    @property
    def is_staged(self) -> bool:
        """Whether any of its bytes pass through a buffer, instead of being read into their place."""
        return any(map(self.staged_element, self.links))

    def staged_element(self, link: Link) -> int:
        """Bytes in the buffer for each element of one of its links: the source, and the result too when it goes into
        a file; 0 where they are read straight into their place.
        """
        if self.measures:
            return itemsize(link.entry.dtype)
        if self.residency == "write" or (self.row_of(link) and not self._is_straight(link)):
            return itemsize(link.entry.dtype) + itemsize(self.dtype)
        if self.residency != "copy":
            return 0
        entry = link.entry
        changes = entry.dtype != self.dtype or entry.swapped or not link.region.dense or not lands_dense(entry)
        return itemsize(entry.dtype) if changes or self.device != "cpu" else 0

    def row_of(self, link: Link) -> int:
        """Elements of a row, where the bytes of a link change by rows: int8 that is made, or that becomes floats; else
        0.
        """
        if self.scales is not None:
            return self.shape[1]
        if link.scales is not None:
            return max(1, link.region.count // max(1, link.scales.shape[0]))
        return self.measures

    def _is_straight(self, link: Link) -> bool:
        """Whether rows can be worked out into their place."""
        return self.device == "cpu" and link.region.dense

    @property
    def is_measured(self) -> bool:
        """Whether the scales of its rows must be known before: its rows do not come whole."""
        return self.scales is not None and not all(has_whole_rows(link, self.shape[1]) for link in self.links)

    def least_buffer(self) -> int:
        """Bytes of buffer without which its rows do not come whole."""
        most = 0
        for link in self.links:
            row = self.row_of(link)
            if row and has_whole_rows(link, row):
                most = max(most, scratch_size(row * self.staged_element(link), row * itemsize(link.entry.dtype)))
        return most

    def buffer_size(self) -> int:
        """Bytes of buffer that its largest move uses, at full chunk size; 0 without one."""
        most = 0
        for link in self.links:
            element = self.staged_element(link)
            if element:
                size = itemsize(link.entry.dtype)
                held = max(bytes_to_read(link.entry) // size, link.region.count)
                most = max(most, min(held, CHUNK // size) * element)
        return most


def is_one(links: tuple[Link, ...], shape: tuple[int, ...], dtype: str | None = None) -> bool:
    """Whether all of a tensor of `shape` lies in one place as torch has it in memory, of `dtype` if that is given."""
    link, entry = links[0], links[0].entry
    return (
        len(links) == 1
        and entry.is_plain
        and (dtype is None or entry.dtype == dtype)
        and link.region.dense
        and link.region.count == math.prod(shape)
    )


def rounds_through(source: str, floats: str) -> str:
    """What changes floats before they become int8, where the model would have them as `floats`: bfloat16 or nothing.

    int8 is made of fp16, so that fp32 changes nothing, and fp16 is not passed twice.
    """
    return floats if floats == "bfloat16" and source != floats else ""


def has_whole_rows(link: Link, row: int) -> bool:
    """Whether rows of `row` elements lie one behind the other in the checkpoint, and no larger than a chunk."""
    region, entry = link.region, link.entry
    whole = region.dense and region.offset % row == 0 and region.count % row == 0
    if link.scales is not None and not region.dense:
        # Of int8 that becomes floats, rows may go anywhere.
        whole = len(region.shape) == 2 and region.shape[1] == row
    return whole and entry.strides is None and row * itemsize(entry.dtype) <= CHUNK


def has_parts_of_rows(link: Link, row: int) -> bool:
    """Whether a view can be cut so that each move is a grid: some rows, and the same elements of each."""
    entry, into = link.entry, link.region
    if entry.strides is None or not (into.dense or into.shape == entry.shape):
        return False
    dimensions = dimensions_of(entry.shape, entry.strides, row_major(entry.shape) if into.dense else into.strides)
    across = [step for n, _, step in dimensions if n > 1 and step % row == 0]
    along = [(n - 1) * step for n, _, step in dimensions if n > 1 and step % row]
    return len(across) <= 1 and len(along) <= 1 and into.offset % row + sum(along) < row


@cheap_init
@dataclass(frozen=True, slots=True)
class Move:
    """One byte range of one file into one region of one placement, cast on the way if the dtypes differ.

    Attributes:
        file: where the bytes are.
        offset: absolute byte offset there; of packed bytes their address (see `Packed`).
        nbytes: bytes that are read, never more than a chunk.
        dtype: of the source, by torch's name.
        placement: what it goes into.
        region: where in it; has as many elements as it takes from the source range.
        scratch: bytes of the reader's buffer that it passes through; 0 when it is read straight into its place.
        source: where in what is read its elements are, of the shape of `region`; None when they lie one behind the
            other.
        swapped: the bytes of each element are in big-endian order.
        row: elements of a row, where its bytes change by rows; else 0.
        scales: of int8 that becomes floats, the scales of its rows.
        at_row: the first of these that is the move's.
        spread: where in the file the bytes lie, from `offset` on and counted in bytes, the last dimension a run; what
            is between the runs is not read, and they land one behind the other. None when they lie so in the file.
    """

    file: Path
    offset: int
    nbytes: int
    dtype: str
    placement: Placement
    region: Region
    scratch: int
    source: Region | None = None
    swapped: bool = False
    row: int = 0
    scales: TensorEntry | None = None
    at_row: int = 0
    spread: Region | None = None


@dataclass(frozen=True, slots=True)
class Read:
    """Moves that lie one behind the other in one file and are read at once: a run of small ones, or one large one.

    One whose bytes are spread is alone.

    Attributes:
        file: where the bytes are.
        offset: absolute byte offset of the first.
        nbytes: of all, never more than a chunk.
        moves: in file order.
    """

    file: Path
    offset: int
    nbytes: int
    moves: tuple[Move, ...]


def scratch_size(nbytes: int, source: int) -> int:
    """Bytes of a buffer for a move that needs `nbytes` there, `source` of them as they come from the file."""
    return (nbytes + _slack(source)) // ALIGNMENT * ALIGNMENT


def _slack(nbytes: int) -> int:
    """What a buffer of `nbytes` holds besides: both ends aligned, and large sources where direct I/O can put them."""
    return 2 * ALIGNMENT + (BLOCK if nbytes >= LEAST_DIRECT else 0)


def cut(placement: Placement, link: Link, each: int) -> Iterator[Move]:
    """The moves of one link of a placement that is copied or written, in file order.

    Args:
        placement: where it goes.
        link: one of its links.
        each: bytes of one reader's buffer.
    """
    entry, element = link.entry, placement.staged_element(link)
    size = itemsize(entry.dtype)
    most = CHUNK // size
    if element:
        most = min(most, max(1, (each - _slack(each)) // element))
    row = placement.row_of(link)
    by_rows = row > 0 and has_whole_rows(link, row)
    if by_rows:
        most = max(1, min(most // row, MOST_ROWS)) * row
    elif most * size > BLOCK:
        most = most * size // BLOCK * BLOCK // size
    if entry.strides is not None:
        yield from _cut_strided(placement, link, most)
        return
    for before, region in link.region.pieces(most, 0 if by_rows else _first(entry.offset, size, most)):
        count = region.count
        yield Move(
            file=entry.file,
            offset=entry.offset + before * size,
            nbytes=count * size,
            dtype=entry.dtype,
            placement=placement,
            region=region,
            scratch=scratch_size(count * element, count * size) if element else 0,
            swapped=entry.swapped,
            row=row,
            scales=link.scales,
            at_row=before // row if row else 0,
        )


def _first(offset: int, size: int, most: int) -> int:
    """Elements before the first cut of a tensor at byte `offset`, so that all cuts are where direct I/O can begin."""
    if offset % size or most * size <= BLOCK:
        return 0
    return most - offset % BLOCK // size


def _cut_strided(placement: Placement, link: Link, most: int) -> Iterator[Move]:
    """The moves of a view: ranges of the file with no large gap in them, and where in them its elements are."""
    entry, into = link.entry, link.region
    size, element = itemsize(entry.dtype), placement.staged_element(link)
    assert into.dense or into.shape == entry.shape, "a view goes into all of a tensor, or into a part of its shape"
    strides = row_major(entry.shape) if into.dense else into.strides
    assert entry.strides is not None
    row = placement.row_of(link)
    for piece in pieces(entry, strides, most):
        region, count = piece.region, piece.region.count
        source: Region | None = piece.source
        if source is not None and not row and source.dense and region.dense:
            source, region = None, Region(region.offset, (count,), (1,))
        held = piece.width * size
        yield Move(
            file=entry.file,
            offset=entry.offset + piece.at * size,
            nbytes=held,
            dtype=entry.dtype,
            placement=placement,
            region=Region(into.offset + region.offset, region.shape, region.strides),
            scratch=scratch_size(held + count * (element - size), held) if element else 0,
            source=source,
            swapped=entry.swapped,
            row=row,
            spread=in_bytes(piece, size),
        )


def join(moves: Iterable[Move], each: int, most: int | None = None) -> Iterator[Read]:
    """Moves in file order, neighbours together.

    Args:
        moves: in file order.
        each: bytes of one reader's buffer.
        most: bytes of a read, if less than a chunk; a part of a tensor is then read alone.
    """
    together = CHUNK if most is None else min(CHUNK, most)
    run: list[Move] = []
    end = size = scratch = 0
    for move in moves:
        part = most is not None and move.nbytes < move.placement.source_bytes
        alone = part or move.spread is not None
        if run and (
            alone
            or move.offset != end
            or (move.file is not run[0].file and move.file != run[0].file)
            or size + move.nbytes > together
            or scratch + move.scratch > each
            or len(run) == _MOST_MOVES
        ):
            yield Read(run[0].file, run[0].offset, size, tuple(run))
            run, size, scratch = [], 0, 0
        if alone:
            yield Read(move.file, move.offset, move.nbytes, (move,))
            continue
        run.append(move)
        end = move.offset + move.nbytes
        size += move.nbytes
        scratch += move.scratch
    if run:
        yield Read(run[0].file, run[0].offset, size, tuple(run))
