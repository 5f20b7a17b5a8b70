"""The records of this room: what was asked, where everything goes, and what it costs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .._mounts import is_on_local_disk
from .._records import computed_once
from ..checkpoint import Checkpoint, TensorEntry
from ..mapping import NO_RULES, KeyMapping, KeyRules, Link, whole
from ..modeling.int8_choice import NO_INT8, Int8Request
from .moves import Move, Placement, Read, cut, join
from .rank_records import RankShare, ReadBy
from .running import NOT_OFFLOADED, Dispatch, Running

if TYPE_CHECKING:
    from ..modeling.conversions import Operation
    from ..modeling.sharding import Part

IO = Literal["auto", "buffered", "direct", "mmap"]


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """What the user asked for, parsed. Sizes in bytes; `None` means that lowmem decides.

    `unused_dtypes` are the parts of the model for which a dtype of their own was given, which counts for nothing.
    """

    dtype: str = "auto"
    unused_dtypes: tuple[str, ...] = ()
    device_map: str | Mapping[str, str] | None = None
    max_memory: Mapping[str, int] | None = None
    ram: int | None = None
    staging: int | None = None
    offload_folder: Path | None = None
    keep_fp32: tuple[str, ...] = ()
    residency: Literal["map", "copy"] = "map"
    strict: bool | Literal["shapes"] = True
    no_split: tuple[str, ...] | None = None
    io: IO = "auto"
    prefetch: bool = False
    keep_cache: bool = False
    dispatch: Dispatch = "lowmem"
    keys: KeyRules = NO_RULES
    int8: Int8Request = NO_INT8
    read: ReadBy | None = None


@dataclass(frozen=True, slots=True)
class StreamRequest:
    """What the user asked of a stream, parsed."""

    keys: KeyRules = NO_RULES
    dtype: str = "auto"
    device: str = "cpu"
    staging: int | None = None
    io: IO = "auto"
    keep_cache: bool = False


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """Bytes on one device.

    Attributes:
        weights: of all weights placed here.
        mapped: those of them that are file pages (CPU only).
        resident: those that stay on the device as its own when the load is done: memory, or on disk bytes in files.
        staging: in flight there during the load.
        peak: the worst moment.
    """

    weights: int
    mapped: int
    resident: int
    staging: int
    peak: int

    def to_dict(self) -> dict[str, int]:
        """As plain values."""
        return {name: getattr(self, name) for name in ("weights", "mapped", "resident", "staging", "peak")}


@dataclass(frozen=True, slots=True)
class HostPlan:
    """Host memory of the load, in bytes.

    Attributes:
        resident: anonymous memory of weights and buffers that stays.
        mapped: weights that are file pages: reclaimable, not anonymous.
        staging: buffers in flight.
        overhead: the model's Python objects and the plan itself, estimated.
        peak: resident + staging + overhead + computing, what `ram` bounds.
        available: what the machine, its cgroups and rlimits leave.
        bound_by: which of these is the tightest.
        limit: the smaller of `ram` and `available`.
        computing: what the largest group of computed tensors takes while it is computed, and scales of int8 that
            becomes floats.
    """

    resident: int
    mapped: int
    staging: int
    overhead: int
    peak: int
    available: int
    bound_by: str
    limit: int
    computing: int = 0

    def to_dict(self) -> dict[str, int | str]:
        """As plain values."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Staging:
    """Buffers of the readers, for each of the `workers`.

    Attributes:
        workers: reader threads.
        each: bytes of the buffer for moves that change on the way; 0 when every byte is read into its place.
        bounce: bytes of the buffer for direct reads, whose ends are not where the moves' are; 0 without direct reads.
        work: bytes for the arithmetic of int8; 0 without any.
        slots: buffers of `each` bytes that a reader fills in turn: several where bytes go to an accelerator, which
            copies out of one while the next is filled.
    """

    workers: int
    each: int
    bounce: int = 0
    work: int = 0
    slots: int = 1

    @property
    def total(self) -> int:
        """Bytes of all buffers."""
        return self.workers * (self.each * self.slots + self.bounce + self.work)


@dataclass(frozen=True, slots=True)
class Reading:
    """How files are read.

    Attributes:
        io: `buffered` (through the page cache), `direct` (past it), `mmap`, or `auto`: chosen while reading.
        keep_cache: leave in the page cache what was read for copying and was not there before.
        prefetch: bytes of mapped weights that the kernel is asked to read ahead, in file order.
        in_place: whether large tensors begin in a block of memory where their bytes do in the file, so that direct
            reads end there and not in a buffer; for files that are not in the page cache.
    """

    io: IO = "auto"
    keep_cache: bool = False
    prefetch: int = 0
    in_place: bool = False


def may_read_directly(io: IO, file: Path) -> bool:
    """Whether a file may be read past the page cache: told to, or on one of this machine's disks.

    Args:
        io: what the user asked for.
        file: itself and not its folder, for a shard may be a link to another file system.
    """
    # Python has the flag where the system has it.
    return hasattr(os, "O_DIRECT") and (io == "direct" or (io == "auto" and is_on_local_disk(file)))


@dataclass(frozen=True, slots=True)
class OffloadFile:
    """One file of cast weights: its first bytes, its size, and target → (offset, bytes)."""

    name: str
    head: bytes = field(repr=False)
    size: int
    spans: Mapping[str, tuple[int, int]] = field(repr=False)


@dataclass(frozen=True, slots=True)
class OffloadPlan:
    """The weights that must be written to be on disk.

    Attributes:
        folder: the folder that is made, named after the fingerprint, inside the user's offload folder.
        fingerprint: of the source files and of what is made from them.
        files: what it holds.
        reused: a finished folder with this fingerprint is there already: nothing is read or written.
    """

    folder: Path
    fingerprint: str
    files: tuple[OffloadFile, ...]
    reused: bool

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def find(self, target: str) -> Path:
        """The file that holds `target`."""
        return next(self.folder / file.name for file in self.files if target in file.spans)


@dataclass(frozen=True, eq=False)
class Group:
    """Tensors of the model that an operation makes of others, which are in memory meanwhile.

    Attributes:
        what: the operation's name.
        operation: the operation.
        sources: in its order, each in host memory in the dtype that it is cast to.
        results: where each tensor that it gives ends up: in several places where it is tied across devices.
        scratch: bytes that it takes besides.
        dtype: of what the operation gives, where that is cast afterwards; else empty.
        parts: of each tensor that it gives, what this rank keeps, None for all; empty where nothing is divided.
    """

    what: str
    operation: Operation
    sources: tuple[Placement, ...]
    results: tuple[tuple[Placement, ...], ...]
    scratch: int
    dtype: str = ""
    parts: tuple[Part | None, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of host memory at the worst moment, besides results that stay there."""
        passing = 0
        for places in self.results:
            stays = any(p.device == "cpu" for p in places)
            passing += 0 if stays else places[0].nbytes
        return sum(source.nbytes for source in self.sources) + passing + self.scratch

    @property
    def name(self) -> str:
        """What it makes of what, for messages."""
        made = _listed([places[0].target for places in self.results])
        return f"{self.what}, which makes {made} of {_listed([source.target for source in self.sources])}"


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f", … ({len(names)} tensors)" if len(names) > 3 else "")


@dataclass(frozen=True, slots=True, eq=False)
class Shared:
    """A tensor that several ranks of a host hold alike, and one of them reads.

    Attributes:
        placement: on this rank.
        reader: the global rank that reads it, and gives it to the others.
        ranks: all that hold it.
    """

    placement: Placement
    reader: int
    ranks: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class LoadPlan:
    """Everything that a load will do, decided before the first tensor byte is read.

    Attributes:
        checkpoint: what is read.
        mapping: which key feeds which target, and the differences.
        device_map: module → device, as resolved.
        placements: where every tensor ends up: what is fed, in the checkpoint's file order, by the first of several
            parts; then what is computed; then what the model initialises.
        offload: the files that will be written, if any.
        staging: the readers' buffers.
        reading: how files are read.
        devices: bytes per device.
        host: host memory of the load.
        main_device: where offloaded layers compute.
        no_split: class names that the device map kept whole.
        warnings: what the user should know.
        groups: what is computed when all else is in its place, one after the other; their results are in `placements`
            and have no links. What is in a finished offload folder already is not computed.
        running: memory of the forward, for weights that do not stay where they compute.
        rank: what this rank and those of its host have of a divided load; None for one process alone.
        shared: what ranks of this host hold alike and read once, in the order in which it is given on. What another
            rank reads has no links here.
    """

    checkpoint: Checkpoint = field(repr=False)
    mapping: KeyMapping = field(repr=False)
    device_map: Mapping[str, str]
    placements: tuple[Placement, ...] = field(repr=False)
    offload: OffloadPlan | None = field(repr=False)
    staging: Staging
    devices: Mapping[str, DevicePlan]
    host: HostPlan
    main_device: str
    no_split: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    reading: Reading = Reading()
    groups: tuple[Group, ...] = field(default=(), repr=False)
    running: Running = NOT_OFFLOADED
    rank: RankShare | None = None
    shared: tuple[Shared, ...] = field(default=(), repr=False)

    @computed_once
    def scales(self) -> Mapping[TensorEntry | Placement, Placement]:
        """Scales of rows that are in host memory before anything else moves, and where each of them comes from.

        Those of int8 that becomes floats are found by their entry; those of floats that become int8, and whose rows do
        not come whole, by the placement that they are for: what feeds the weight is read twice.
        """
        found: dict[TensorEntry | Placement, Placement] = {}
        for placement in self.placements:
            if not self._moves_bytes(placement):
                continue
            for link in placement.links:
                entry = link.scales
                if entry is not None and entry not in found:
                    only = (Link(entry, entry.key, whole(entry.shape)),)
                    size = 4 * entry.shape[0]
                    found[entry] = Placement(entry.key, (entry.key,), entry.shape, "float32", size, "cpu", "copy", only)
            if placement.is_measured:
                made = placement.scales
                assert made is not None
                found[made] = replace(
                    made,
                    device="cpu",
                    residency="copy",
                    links=placement.links,
                    measures=placement.shape[1],
                    through=placement.through,
                )
        return found

    def scales_plan(self) -> LoadPlan:
        """The plan that brings these into memory."""
        return replace(self, placements=tuple(self.scales.values()), offload=None, groups=())

    @computed_once
    def bytes_read(self) -> int:
        """Tensor bytes that the load will read; mapped and referred ones are not read."""
        sources = sum(p.source_bytes for group in self.groups for p in group.sources)
        sources += sum(p.source_bytes for p in self.scales.values())
        return sources + sum(p.source_bytes for p in self.placements if self._moves_bytes(p))

    @property
    def dtypes(self) -> dict[str, int]:
        """Bytes of the model's tensors by dtype, the most first; scales of int8 are float32."""
        sizes: dict[str, int] = {}
        for placement in self.placements:
            sizes[placement.dtype] = sizes.get(placement.dtype, 0) + placement.nbytes
        return dict(sorted(sizes.items(), key=lambda pair: -pair[1]))

    @property
    def bytes_written(self) -> int:
        """Bytes that the load will write into the offload folder."""
        return 0 if self.offload is None or self.offload.reused else self.offload.nbytes

    def _moves_bytes(self, placement: Placement) -> bool:
        if placement.residency == "write":
            return self.offload is not None and not self.offload.reused
        return placement.residency == "copy"

    def sources_of(self, group: Group) -> LoadPlan:
        """The plan that brings the sources of a group into memory."""
        return replace(self, placements=group.sources, offload=None, groups=())

    def moves(self) -> Iterator[Move]:
        """Every move, those of groups left out, in file order.

        Written down one at a time: the plan of a terabyte stays small.
        """
        for placement, link in self._fed():
            yield from cut(placement, link, self.staging.each)

    def reads(self, most: int | None = None) -> Iterator[Read]:
        """The same moves, neighbours in one file together as long as they are no more than a chunk, or `most` bytes.

        With `most`, a part of a tensor is read alone: who waits for it must not wait for room for its neighbours too.
        """
        return join(self.moves(), self.staging.each, most)

    def _fed(self) -> Iterator[tuple[Placement, Link]]:
        """What must be read, in file order; a fused tensor is fed from several places."""
        order = {shard.file: i for i, shard in enumerate(self.checkpoint.shards)}
        fed: list[tuple[int, int, Placement, Link]] = []
        file, number = None, 0
        for placement in self.placements:
            if not self._moves_bytes(placement):
                continue
            for link in placement.links:
                # A path takes longer to look up than to be the same.
                if link.entry.file is not file:
                    file = link.entry.file
                    number = order[file]
                fed.append((number, link.entry.offset, placement, link))
        fed.sort(key=itemgetter(0, 1))
        return map(itemgetter(2, 3), fed)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, as `lowmem plan --json` prints it. Sizes in bytes."""
        return {
            "source": self.checkpoint.source,
            "opened": self.checkpoint.opened,
            "sources": [
                {"module": s.module, "source": s.source, "tensors": s.tensors, "bytes": s.nbytes}
                for s in self.mapping.shares
            ],
            "shards": [{"file": os.fspath(shard.file.name), "size": shard.size} for shard in self.checkpoint.shards],
            "device_map": dict(self.device_map),
            "devices": {name: device.to_dict() for name, device in self.devices.items()},
            "host": self.host.to_dict(),
            "reading": {name: getattr(self.reading, name) for name in ("io", "keep_cache", "prefetch")},
            "running": self.running.to_dict(),
            "rank": None if self.rank is None else self.rank.to_dict(),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "dtypes": self.dtypes,
            "offload": None if self.offload is None else _offload_dict(self.offload),
            "missing": [*self.mapping.missing, *self.mapping.excused],
            "unexpected": list(self.mapping.unexpected),
            "mismatched": [
                {"key": m.key, "target": m.target, "found": list(m.found), "expected": list(m.expected)}
                for m in self.mapping.mismatched
            ],
            "suggestions": list(self.mapping.suggestions),
            "warnings": list(self.warnings),
            "computed": [_group_dict(group) for group in self.groups],
            "tensors": [_placement_dict(p) for p in self.placements],
        }


def _placement_dict(placement: Placement) -> dict[str, Any]:
    return {
        "name": placement.target,
        "tied": list(placement.names[1:]),
        "keys": [link.entry.key for link in placement.links],
        "shape": list(placement.shape),
        "from": placement.links[0].entry.dtype if placement.links else None,
        "dtype": placement.dtype,
        "bytes": placement.nbytes,
        "device": placement.device,
        "residency": placement.residency,
    }


def _group_dict(group: Group) -> dict[str, Any]:
    return {
        "what": group.what,
        "keys": [source.target for source in group.sources],
        "tensors": [places[0].target for places in group.results],
        "dtypes": sorted({source.dtype for source in group.sources}),
        "bytes": group.nbytes,
        "scratch": group.scratch,
    }


def _offload_dict(offload: OffloadPlan) -> dict[str, Any]:
    return {
        "folder": os.fspath(offload.folder),
        "fingerprint": offload.fingerprint,
        "files": {file.name: file.size for file in offload.files},
        "reused": offload.reused,
    }


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a load is: bytes done and in all, bytes per second so far, seconds left (None while unknown)."""

    done: int
    total: int
    rate: float
    seconds_left: float | None
    file: str


ProgressCallback = Callable[[Progress], None]
