"""The least program that reads these bytes: what the machine can do, without headers, names or a model.

Copying, it reads with `preadv` from several threads straight into fresh memory that is advised huge pages; casting,
it reads into a small buffer per thread and casts from there. Mapping, it maps the files and no more. Where layers go
to disk with a cast, it writes them to one file per shard, or maps them to be cast at use. Cold, it tries buffered and
direct reads with several numbers of threads and sizes of requests; the best of them is the limit.
"""

from __future__ import annotations

import itertools
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

import lowmem
from bench.cases import Case, is_layer
from bench.loaders.base import Job, Loader, Model
from bench.phases import Phases
from lowmem.dtypes import itemsize
from lowmem.sizes import MIB

_PAGE = mmap.PAGESIZE


@dataclass(frozen=True)
class Reader:
    """A way to read: buffered or direct, with so many threads and bytes per request."""

    direct: bool
    threads: int
    request: int

    @property
    def name(self) -> str:
        """For tables."""
        kind = "O_DIRECT" if self.direct else "buffered"
        return f"{kind}, {self.threads} threads, {self.request // MIB} MiB"


@dataclass
class Run:
    """Neighbouring tensors of one file with one destination: memory, or a file at `written`."""

    file: Path
    start: int
    stop: int
    on_disk: bool
    memory: mmap.mmap | None = None
    written: Path | None = None
    at_use: bool = False
    keys: dict[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)

    @property
    def base(self) -> int:
        """The page of the file at which it starts."""
        return self.start // _PAGE * _PAGE


class Limit(Loader):
    """See the module."""

    name = "limit"
    title = "limit"

    def __init__(self) -> None:
        self._runs: list[Run] = []
        self._direct = True

    def can(self, case: Case) -> str | None:
        return None

    def imports(self, job: Job) -> None:
        self._runs = find_runs(job.case, job.source)
        self._direct = takes_direct_reads(job.shards[0])

    def variants(self, case: Case) -> tuple[str, ...]:
        return tuple(name for name, reader in readers(case).items() if self._direct or not reader.direct)

    def load(self, job: Job, phases: Phases) -> Model:
        case = job.case
        runs = [Run(r.file, r.start, r.stop, r.on_disk, keys=r.keys) for r in self._runs]
        if not case.casts and case.residency == "map":
            for run in runs:
                run.memory = _map(run.file)
            return Image(case, runs, whole_files=True)
        reader = readers(case)[job.variant]
        before = torch.get_num_threads()
        # One thread per reader: the readers are the parallel part.
        torch.set_num_threads(1)
        try:
            moved = []
            for number, run in enumerate(runs):
                if run.on_disk and not case.written:
                    run.memory, run.at_use = _map(run.file), True
                    continue
                _allocate(case, run, job.offload / f"limit-{number}.bin")
                moved.append(run)
            _read(case, moved, reader)
        finally:
            torch.set_num_threads(before)
        return Image(case, runs, whole_files=False)


def readers(case: Case) -> dict[str, Reader]:
    """The readers to try for a case, by name."""
    if not case.casts and case.residency == "map":
        return {"mmap": Reader(False, 1, 4 * MIB)}
    cores = len(os.sched_getaffinity(0))
    found = [Reader(False, n, size * MIB) for n in (cores, 2 * cores) for size in (4, 8)]
    if case.cold:
        found = [Reader(direct, n, 4 * MIB) for direct in (False, True) for n in (1, 2, 4, 8)]
        found += [Reader(True, 4, size * MIB) for size in (1, 8)]
    return {reader.name: reader for reader in found}


def takes_direct_reads(file: Path) -> bool:
    """Whether the file system of `file` reads past the page cache; memory file systems do not."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return False
    try:
        with mmap.mmap(-1, _PAGE) as page:
            return os.preadv(descriptor, [page], 0) > 0
    except OSError:
        return False
    finally:
        os.close(descriptor)


def find_runs(case: Case, source: Path) -> list[Run]:
    """The bytes to read: whole data sections, or stretches with one destination where layers go to disk."""
    runs: list[Run] = []
    for key, entry in sorted(lowmem.inspect(source).items(), key=lambda item: (item[1].file, item[1].offset)):
        on_disk = case.on_disk and is_layer(key)
        last = runs[-1] if runs else None
        if last is None or last.file != entry.file or last.on_disk != on_disk or last.stop != entry.offset:
            last = Run(entry.file, entry.offset, entry.offset, on_disk)
            runs.append(last)
        last.stop = entry.offset + entry.nbytes
        last.keys[key] = (entry.offset, entry.shape)
    return runs


def _map(file: Path) -> mmap.mmap:
    with file.open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)


def _fresh(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE") and size >= 2 * MIB:
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _allocate(case: Case, run: Run, file: Path) -> None:
    if run.on_disk:
        run.written = file
        return
    size = run.stop - run.start
    if case.casts:
        run.memory = _fresh(max(1, size // itemsize(case.stored) * itemsize(case.dtype)))
    else:
        # As the file's pages lie, so that a direct read needs no copy.
        run.memory = _fresh(-(-(run.stop - run.base) // _PAGE) * _PAGE)


def _read(case: Case, runs: list[Run], reader: Reader) -> None:
    flags = os.O_RDONLY | (os.O_DIRECT if reader.direct else 0)
    descriptors = {run.file: os.open(run.file, flags) for run in runs}
    outputs = {run.written: os.open(run.written, os.O_WRONLY | os.O_CREAT) for run in runs if run.written}
    errors: list[BaseException] = []

    def work(chunks: Iterator[tuple[Run, int]]) -> None:
        try:
            move = _mover(case, reader, descriptors, outputs)
            for run, start in chunks:
                move(run, start)
        except BaseException as error:
            errors.append(error)

    chunks = _Shared((run, start) for run in runs for start in range(run.base, run.stop, reader.request))
    threads = [threading.Thread(target=work, args=(chunks,)) for _ in range(reader.threads)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for descriptor in itertools.chain(descriptors.values(), outputs.values()):
            os.close(descriptor)
    if errors:
        raise errors[0]


class _Shared:
    """An iterator that several threads may ask."""

    def __init__(self, items: Iterator[tuple[Run, int]]) -> None:
        self._items = items
        self._lock = threading.Lock()

    def __iter__(self) -> _Shared:
        return self

    def __next__(self) -> tuple[Run, int]:
        with self._lock:
            return next(self._items)


def _mover(
    case: Case, reader: Reader, descriptors: Mapping[Path, int], outputs: Mapping[Path, int]
) -> Callable[[Run, int], None]:
    """What one thread does with a chunk of a run that starts at a byte of its file."""
    source, target = getattr(torch, case.stored), getattr(torch, case.dtype)
    buffer = _fresh(reader.request)
    raw = torch.frombuffer(buffer, dtype=torch.uint8)
    factor = target.itemsize / source.itemsize
    cast = torch.empty(reader.request // source.itemsize, dtype=target) if case.on_disk else torch.empty(0)
    # Made once: a view of a run's memory per chunk would be a cost of its own.
    whole: dict[int, torch.Tensor] = {}

    def move(run: Run, start: int) -> None:
        low, high = max(start, run.start), min(start + reader.request, run.stop)
        end = -(-high // _PAGE) * _PAGE if reader.direct else high
        if not case.casts and run.memory is not None:
            view = memoryview(run.memory)[start - run.base : end - run.base]
            _fill(descriptors[run.file], view, start, high)
            return
        _fill(descriptors[run.file], memoryview(buffer)[: end - start], start, high)
        values = raw[low - start : high - start].view(source)
        first = (low - run.start) // source.itemsize
        if run.written is not None:
            cast[: values.numel()].copy_(values)
            data = cast[: values.numel()].view(torch.uint8).numpy().data
            os.pwrite(outputs[run.written], data, int((low - run.start) * factor))
            return
        if id(run) not in whole:
            assert run.memory is not None
            whole[id(run)] = torch.frombuffer(run.memory, dtype=target)
        whole[id(run)][first : first + values.numel()].copy_(values)

    return move


def _fill(descriptor: int, view: memoryview, start: int, stop: int) -> None:
    """Read at least up to `stop` of the file; a direct read may end behind it."""
    done = 0
    while start + done < stop:
        count = os.preadv(descriptor, [view[done:]], start + done)
        if not count:
            raise EOFError(f"the file ended at {start + done}, expected {stop}")
        done += count


class Image(Mapping[str, torch.Tensor]):
    """What was read, as tensors, made when they are asked for: after the timing."""

    def __init__(self, case: Case, runs: list[Run], *, whole_files: bool) -> None:
        self._case = case
        self._whole_files = whole_files
        self._keys = {key: run for run in runs for key in run.keys}

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __getitem__(self, key: str) -> torch.Tensor:
        run = self._keys[key]
        offset, shape = run.keys[key]
        dtype = getattr(torch, self._case.dtype)
        count = 1
        for length in shape:
            count *= length
        if run.at_use:
            assert run.memory is not None
            stored = getattr(torch, self._case.stored)
            return torch.frombuffer(run.memory, dtype=stored, count=count, offset=offset).reshape(shape).to(dtype)
        if self._whole_files:
            at = offset
        elif self._case.casts or run.on_disk:
            at = (offset - run.start) // itemsize(self._case.stored) * dtype.itemsize
        else:
            at = offset - run.base
        if run.written is not None:
            memory: mmap.mmap | bytearray = bytearray(count * dtype.itemsize)
            with run.written.open("rb") as stream:
                stream.seek(at)
                stream.readinto(memory)
            return torch.frombuffer(memory, dtype=dtype).reshape(shape)
        assert run.memory is not None
        return torch.frombuffer(run.memory, dtype=dtype, count=count, offset=at).reshape(shape)
