"""The plan of a conversion: the files that will be written, and for each of them the moves of a load that writes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._page_cache import cached_share
from ..checkpoint import Checkpoint, TensorEntry
from ..checkpoint.index import SHARED
from ..checkpoint.int8 import check_float, check_formats, check_pair, companions_of, is_int8_weight
from ..checkpoint.records import origin_of
from ..checkpoint.safetensors import layout
from ..dtypes import is_floating, itemsize
from ..errors import KeysError
from ..limits import host_memory
from ..mapping import KeyMapping, KeyRules, Link, Region, whole
from ..mapping.int8 import ToInt8, transposed
from ..mapping.names import named_entries
from ..sizes import KIB, MIB, format_size
from . import budget
from .final_dtypes import check_cast, nbytes_of
from .moves import Placement, rounds_through
from .placing import check_rows, passing_scales
from .records import IO, DevicePlan, HostPlan, LoadPlan, OffloadFile, OffloadPlan, Reading, Staging

FORMAT = "lowmem-convert/1"
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What save_pretrained of transformers writes into each header (modeling_utils.py): whose tensors these are.
_METADATA = {"format": "pt"}
# Python objects, and buffers of those who read back: in all, and for each tensor.
_OVERHEAD = 12 * MIB
_PER_ENTRY = 4 * KIB


@dataclass(frozen=True, slots=True)
class ConvertRequest:
    """What the user asked of a conversion, parsed. Sizes in bytes; `staging` None means that lowmem decides.

    `to_int8` are the keys of weights that become int8, and how; `from_int8` is the dtype of the floats that int8
    becomes, None where it stays int8, and `turned` the keys of those that are transposed for it; `in_fp32` are the keys
    of floats that are fp32 then.
    """

    dtype: str = "auto"
    max_shard_size: int = 5 * 1024**3
    to_int8: Mapping[str, ToInt8] = field(default_factory=dict)
    from_int8: str | None = None
    turned: Collection[str] = ()
    in_fp32: Collection[str] = ()
    rules: KeyRules = field(default_factory=KeyRules)
    staging: int | None = None
    io: IO = "auto"
    keep_cache: bool = False


@dataclass(frozen=True, eq=False)
class ConvertPlan:
    """Everything that a conversion will write, decided before the first tensor byte is read.

    Attributes:
        checkpoint: what is read.
        folder: where the result will lie.
        fingerprint: of the source files and of every tensor made from them.
        shards: a plan for each file, whose placements all go into that file.
        files: those files: name, first bytes, size.
        shared: name that is left out → name under which its bytes are stored.
        staging: the readers' buffers, the same for every file.
        host: host memory of the conversion.
        dtype: what was asked for; `"auto"` when every tensor keeps its own.
    """

    checkpoint: Checkpoint = field(repr=False)
    folder: Path
    fingerprint: str
    shards: tuple[LoadPlan, ...] = field(repr=False)
    files: tuple[OffloadFile, ...]
    shared: Mapping[str, str] = field(repr=False)
    staging: Staging
    host: HostPlan
    dtype: str

    @property
    def bytes_read(self) -> int:
        """Tensor bytes that will be read."""
        return sum(shard.bytes_read for shard in self.shards)

    @property
    def bytes_written(self) -> int:
        """Bytes of all weight files."""
        return sum(file.size for file in self.files)

    @property
    def tensors(self) -> int:
        """Tensors that are stored; names that share one are counted once."""
        return sum(len(file.spans) for file in self.files)

    def index(self) -> dict[str, Any] | None:
        """The index, as transformers' save_pretrained writes it; None where there is one file, which needs none."""
        if len(self.files) == 1:
            return None
        stored = sum(nbytes for file in self.files for _, nbytes in file.spans.values())
        metadata: dict[str, Any] = {"total_size": stored}
        if self.shared:
            metadata[SHARED] = dict(self.shared)
        return {"metadata": metadata, "weight_map": {key: file.name for file in self.files for key in file.spans}}


def make_convert_plan(checkpoint: Checkpoint, folder: Path, request: ConvertRequest) -> ConvertPlan:
    """Decide a conversion into `folder`.

    Raises:
        KeysError: a rule names nothing, nothing is left, or two keys would have one name.
        UnsupportedError: a dtype that torch or safetensors does not have, or a cast that would change the meaning.
        BudgetError: the least staging is more than the machine has.
    """
    named = named_entries(checkpoint, request.rules)
    if not named:
        raise KeysError(f"{checkpoint.source}: no tensor is left to convert; check only, skip and prefix")
    order = {shard.file: number for number, shard in enumerate(checkpoint.shards)}
    # As stable as the source: names of one range stay in its own order.
    rows = sorted(named.items(), key=lambda row: (order[row[1].file], row[1].offset))
    kept, shared = _share(rows)
    placements = _place_all(checkpoint, kept, request)
    check_rows(placements)
    groups = list(_groups(placements, request.max_shard_size))
    files = tuple(_file(number, len(groups), group, shared) for number, group in enumerate(groups, start=1))
    staging, host = _fit(checkpoint, placements, request)
    fingerprint = _fingerprint(checkpoint, placements, files)
    reading = Reading(request.io, request.keep_cache)
    plans = tuple(
        _plan(checkpoint, tuple(group), OffloadPlan(folder, fingerprint, (file,), reused=False), staging, host, reading)
        for group, file in zip(groups, files, strict=True)
    )
    return ConvertPlan(checkpoint, folder, fingerprint, plans, files, shared, staging, host, request.dtype)


def _share(rows: list[tuple[str, TensorEntry]]) -> tuple[list[tuple[str, TensorEntry]], dict[str, str]]:
    """What is stored, and name → stored name for tensors that are the same range of the same file.

    The first in the source's order is stored: of tied weights transformers expects the embedding, not the head.
    """
    first: dict[Any, str] = {}
    kept, shared = [], {}
    for name, entry in rows:
        place = (entry.file, entry.offset, entry.nbytes, entry.dtype, entry.shape, entry.strides, entry.swapped)
        # The metadata of a header has one key that is not a tensor's name.
        if entry.nbytes and name not in _METADATA and place in first:
            shared[name] = first[place]
            continue
        first.setdefault(place, name)
        kept.append((name, entry))
    return kept, shared


def _place_all(checkpoint: Checkpoint, kept: list[tuple[str, TensorEntry]], request: ConvertRequest) -> list[Placement]:
    """What is written; int8 with its scales and the number of its format right behind it."""
    int8 = {entry.key for _, entry in kept if is_int8_weight(checkpoint, entry)}
    check_formats(checkpoint, [entry for _, entry in kept if entry.key in int8])
    beside = {key for weight in int8 for key in companions_of(checkpoint, weight)}
    taken = {name for name, _ in kept}
    placements = []
    for name, entry in kept:
        if entry.key in beside:
            if request.from_int8 is None:
                # These belong to int8, whatever is asked for the rest.
                placements.append(_place(name, entry, "auto"))
        elif request.from_int8 is not None and entry.key in int8:
            scales = check_pair(checkpoint, entry)
            placements.append(_place(name, entry, request.from_int8, scales, entry.key in request.turned))
        elif entry.key in request.to_int8:
            placements += _place_int8(name, entry, request.to_int8[entry.key], taken)
        else:
            if request.to_int8 and entry.dtype != "int8":
                check_float(checkpoint, entry)
            placements.append(_place(name, entry, "float32" if entry.key in request.in_fp32 else request.dtype))
    return placements


def _place(
    name: str, entry: TensorEntry, wanted: str, scales: TensorEntry | None = None, turned: bool = False
) -> Placement:
    floats = is_floating(entry.dtype) or scales is not None
    dtype = wanted if wanted != "auto" and floats else entry.dtype
    if scales is None:
        check_cast(entry.key, entry.dtype, dtype)
    shape, region = entry.shape, whole(entry.shape)
    if turned:
        shape, region = shape[::-1], Region(0, shape, (1, shape[0]))
    links = (Link(entry, name, region, scales=scales),)
    return Placement(name, (name,), shape, dtype, nbytes_of(shape, dtype), "disk", "write", links)


def _place_int8(name: str, entry: TensorEntry, how: ToInt8, taken: Collection[str]) -> Iterator[Placement]:
    """A weight as bitsandbytes saves it (`Linear8bitLt._save_to_state_dict`): itself, its scales, its format.

    Raises:
        KeysError: another tensor has the name of one of these.
    """
    stem = name.removesuffix("weight")
    names = f"{stem}SCB", f"{stem}weight_format"
    for other in names:
        if other in taken or stem == name:
            what = f"another tensor is {other!r} already" if other in taken else "its name does not end in 'weight'"
            raise KeysError(
                f"{entry.file}: tensor {entry.key!r}: expected a name beside which its scales can be {names[0]!r}, and "
                f"{what}; rename it by rename= (--rename)"
            )
    if how.turned:
        entry = transposed(entry)
    rows = entry.shape[:1]
    scales = Placement(names[0], names[:1], rows, "float32", nbytes_of(rows, "float32"), "disk", "write", ())
    links = (Link(entry, name, whole(entry.shape)),)
    size, through = nbytes_of(entry.shape, "int8"), rounds_through(entry.dtype, how.floats)
    yield Placement(name, (name,), entry.shape, "int8", size, "disk", "write", links, scales, through=through)
    yield scales
    # Fresh files are zeros, and 0 says that rows lie as torch has them.
    yield Placement(names[1], names[1:], (), "uint8", 1, "disk", "write", ())


def _groups(placements: list[Placement], most: int) -> Iterator[list[Placement]]:
    """Filled in order up to `most` bytes of tensors; one that is larger alone."""
    group: list[Placement] = []
    size = 0
    for placement in placements:
        # What nothing feeds belongs to the weight before it.
        if group and placement.links and size + placement.nbytes > most:
            yield group
            group, size = [], 0
        group.append(placement)
        size += placement.nbytes
    yield group


def _file(number: int, count: int, group: list[Placement], shared: Mapping[str, str]) -> OffloadFile:
    """The names of save_pretrained; shared names in the header as safetensors.torch.save_model records them."""
    name = WHOLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
    here = {placement.target for placement in group}
    if any(p.scales is not None for p in group):
        # Behind rows of int8 the scales might begin where torch cannot read them.
        group = sorted(group, key=lambda p: -itemsize(p.dtype))
    metadata = {**_METADATA, **{left_out: kept for left_out, kept in shared.items() if kept in here}}
    head, spans, size = layout([(p.target, p.dtype, p.shape) for p in group], metadata)
    return OffloadFile(name, head, size, spans)


def _fit(checkpoint: Checkpoint, placements: list[Placement], request: ConvertRequest) -> tuple[Staging, HostPlan]:
    memory = host_memory()
    overhead = _OVERHEAD + _PER_ENTRY * len(checkpoint) + checkpoint.described + passing_scales(placements)
    need = budget.needs_of(placements, request.io, cached_share, free_address_space=not memory.rlimits)
    # The rlimits count the stacks of the readers, of the sealer and of those that read back.
    stacks = budget.thread_stacks(need.workers + 4) if memory.rlimits else 0
    room, bound_by = min(
        [(memory.available, memory.bound_by), *((left - stacks, name) for name, left in memory.rlimits.items())]
    )
    staging = budget.fit_staging(room - overhead, request.staging, need)
    host = _host(staging, overhead, room, bound_by)
    if host.peak > host.limit:
        remedies = [] if request.staging is None else [f"a smaller staging (now {format_size(request.staging)})"]
        budget.refuse(host.peak, host.limit, host.bound_by, remedies, what="conversion")
    return staging, host


def _host(staging: Staging, overhead: int, room: int, bound_by: str) -> HostPlan:
    """Nothing is resident: what is made goes into files."""
    return HostPlan(
        resident=0,
        mapped=0,
        staging=staging.total,
        overhead=overhead,
        peak=staging.total + overhead,
        available=room,
        bound_by=bound_by,
        limit=room,
    )


def _plan(
    checkpoint: Checkpoint,
    placements: tuple[Placement, ...],
    offload: OffloadPlan,
    staging: Staging,
    host: HostPlan,
    reading: Reading,
) -> LoadPlan:
    weights = sum(placement.nbytes for placement in placements)
    links = tuple(link for placement in placements for link in placement.links)
    return LoadPlan(
        checkpoint=checkpoint,
        mapping=KeyMapping(links, {}, {}, (), (), (), (), ()),
        device_map={"": "disk"},
        placements=placements,
        offload=offload,
        staging=staging,
        devices={"disk": DevicePlan(weights, 0, offload.nbytes, 0, offload.nbytes)},
        host=host,
        main_device="cpu",
        reading=reading,
    )


def _fingerprint(checkpoint: Checkpoint, placements: list[Placement], files: tuple[OffloadFile, ...]) -> str:
    """SHA-256 over the source files (path, size, time) and every tensor, where it comes from and where it goes."""
    # What nothing feeds is told by the header.
    links = [placement.links[0] for placement in placements if placement.links]
    shards = {shard.file: shard for shard in checkpoint.shards}
    table: Any = {
        "format": FORMAT,
        "sources": [[str(s.file.resolve()), s.size, s.mtime_ns] for s in checkpoint.shards],
        "tensors": [
            [e.key, e.dtype, e.file.name, origin_of(e, shards[e.file]), e.strides, e.swapped]
            for e in (link.entry for link in links)
        ],
        "files": [[file.name, file.size, hashlib.sha256(file.head).hexdigest()] for file in files],
    }
    through = sorted({p.through for p in placements if p.through})
    if through:
        table["through"] = through
    return hashlib.sha256(json.dumps(table, separators=(",", ":")).encode()).hexdigest()
