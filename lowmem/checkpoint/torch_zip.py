"""Files of `torch.save` since torch 1.6: a zip with a pickle and a record for each storage.

Format (`_save` and `_load` in torch's `serialization.py`, `caffe2/serialize/inline_container.cc`): `<name>/data.pkl`,
`<name>/data/<key>`, `<name>/version`, and `<name>/byteorder`, which old files lack: they are little-endian. torch
stores records without compression; other programs may pack them. The zip itself: PKWARE's APPNOTE.TXT.
"""

from __future__ import annotations

import errno
import os
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO

from .._collector import paused_collector
from ..errors import CheckpointError, UnsupportedError
from .pickle_bytes import Stream
from .pickled_tensors import Storage, Tensors
from .pickles import MEMORY_OF_A_STEP
from .places import FileRange, Locator, Place, place_of_array, read_at
from .records import Packed, PickledFile, Shard

SIGNATURE = b"PK\x03\x04"
# A zip of 100,000 storages has a directory of about 8 MB. A hostile one of this size takes 250 MB when read.
_MAX_DIRECTORY = 1 << 24
# Unpacked: a few MB in practice. A larger one would take long to pass over, and only a packed one must be.
_MAX_PACKED_PICKLE = 1 << 29
# No byte of deflate stands for more: zlib's technical notes.
_DEFLATE_RATIO = 1032
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_DEFLATED = {zipfile.ZIP_STORED: False, zipfile.ZIP_DEFLATED: True}

# Bytes, beside the opcodes that name its storage.
_MEMORY_OF_A_RECORD = 160


def read_torch_zip(file: Path, f: BinaryIO, status: os.stat_result) -> PickledFile:
    """Look at a zip that is open as `f`.

    Raises:
        CheckpointError: damaged, truncated, ambiguous, or it contradicts itself.
        UnsupportedError: a zip of something else, such as TorchScript; or it is encrypted.
    """
    with paused_collector():
        records = _directory(file, f, status.st_size)
        prefix = _prefix(file, records)
        archive = _Zip(file, status.st_size, prefix, records, _is_big_endian(file, f, status.st_size, prefix, records))
        where, packed = archive.range_of(f, records[f"{prefix}data.pkl"])
        stream: Stream = FileRange(f, where, records[f"{prefix}data.pkl"].compress_size)
        name = f"{file}: {prefix}data.pkl"
        if packed is not None:
            if packed.size > _MAX_PACKED_PICKLE:
                raise UnsupportedError(
                    f"{name}: expected a compressed pickle of at most {_MAX_PACKED_PICKLE} bytes, found {packed.size}; "
                    "unzip the file and zip it without compression"
                )
            stream = _Inflated(stream, name, packed.size)
        tensors = Tensors(stream, 0 if packed else where, name)
        tensors.limit(status.st_size)
        root = tensors.run()
    shard = Shard(file, status.st_size, status.st_mtime_ns, where, {}, "torch zip")
    archive = _Zip(file, status.st_size, prefix, records, archive.swapped, packed)
    locator = Locator(shard, tensors.storages, archive)
    described = MEMORY_OF_A_STEP * tensors.steps + _MEMORY_OF_A_RECORD * len(records)
    return PickledFile(shard, root, locator.locate, len(tensors.storages), described)


@dataclass(frozen=True, slots=True, eq=False)
class _Zip:
    """The records of a zip: where each lies, as its own header says."""

    file: Path
    size: int
    prefix: str
    records: dict[str, zipfile.ZipInfo]
    swapped: bool
    pickle: Packed | None = None

    def place(self, f: BinaryIO, storage: Storage) -> Place:
        """Where a storage lies."""
        array = place_of_array(self.file, storage, self.pickle)
        if array is not None:
            return array
        record = self.records.get(f"{self.prefix}data/{storage.key}")
        if record is None:
            raise CheckpointError(
                f"{self.file}: expected a record {self.prefix}data/{storage.key[:80]}, found none; download it again"
            )
        offset, packed = self.range_of(f, record)
        if packed is not None:
            return Place(0, packed.size, packed, self.swapped)
        return Place(offset, record.file_size, None, self.swapped)

    def range_of(self, f: BinaryIO, record: zipfile.ZipInfo) -> tuple[int, Packed | None]:
        """Where the bytes of a record begin in the file, and how to unpack them if that is needed."""
        _check_kind(self.file, record)
        expected = _raw_name(record)
        head = read_at(f, record.header_offset, _LOCAL_HEADER.size + len(expected))
        if len(head) >= _LOCAL_HEADER.size:
            signature, name_length, extra = _LOCAL_HEADER.unpack_from(head)
            if signature == SIGNATURE and head[_LOCAL_HEADER.size :] == expected and name_length == len(expected):
                offset = record.header_offset + _LOCAL_HEADER.size + name_length + extra
                if offset + record.compress_size <= self.size:
                    if not _DEFLATED[record.compress_type]:
                        return offset, None
                    return offset, Packed(
                        0, record.file_size, offset, record.compress_size, "deflate", record.CRC & 0xFFFFFFFF
                    )
        raise CheckpointError(
            f"{self.file}: record {record.filename[:200]!r}: expected its header at byte {record.header_offset} and "
            f"{record.compress_size} bytes behind it, found something else; download it again"
        )


def _check_kind(file: Path, record: zipfile.ZipInfo) -> None:
    if record.flag_bits & 1:
        raise UnsupportedError(
            f"{file}: record {record.filename[:200]!r}: expected plain bytes, found an encrypted record; unzip it first"
        )
    if record.compress_type not in _DEFLATED:
        known = zipfile.compressor_names.get(record.compress_type, str(record.compress_type))  # type: ignore[attr-defined]
        raise UnsupportedError(
            f"{file}: record {record.filename[:200]!r}: expected it stored or deflated, found the method {known}; "
            "unzip the file and zip it without compression"
        )
    most = record.compress_size * (_DEFLATE_RATIO if _DEFLATED[record.compress_type] else 1)
    least = 0 if _DEFLATED[record.compress_type] else most
    if not least <= record.file_size <= most:
        raise CheckpointError(
            f"{file}: record {record.filename[:200]!r}: expected {least} to {most} bytes in {record.compress_size} of "
            f"the file, found a claim of {record.file_size}; download it again"
        )


def _raw_name(record: zipfile.ZipInfo) -> bytes:
    """The name as it is in the file: the flag says how it is encoded."""
    return record.orig_filename.encode("utf-8" if record.flag_bits & 0x800 else "cp437", "replace")


class _Guarded:
    """A file for `zipfile` that gives no more than a directory of sane size."""

    def __init__(self, file: Path, f: BinaryIO, size: int) -> None:
        self._file, self._f, self._size = file, f, size
        self.seek, self.tell = f.seek, f.tell

    def read(self, n: int = -1) -> bytes:
        """`n` bytes from here, or all."""
        here = self._f.tell()
        left = max(self._size - here, 0)
        n = left if n < 0 else min(n, left)
        if n > _MAX_DIRECTORY:
            raise CheckpointError(
                f"{self._file}: expected a zip directory of at most {_MAX_DIRECTORY} bytes, found one of {n}; "
                "download it again"
            )
        return read_at(self._f, here, n)

    def seekable(self) -> bool:
        """Always."""
        return True


def _directory(file: Path, f: BinaryIO, size: int) -> dict[str, zipfile.ZipInfo]:
    """Name → record, of a directory without double names and overlaps."""
    guarded: Any = _Guarded(file, f, size)
    try:
        with zipfile.ZipFile(guarded) as archive:
            found, end = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error, EOFError) as error:
        # zipfile takes a disk that fails for a file that is no zip; a seek to before the beginning is the file's fault.
        if isinstance(error.__context__, OSError) and error.__context__.errno != errno.EINVAL:
            raise error.__context__ from None
        raise CheckpointError(
            f"{file}: expected a whole zip of torch.save, found a damaged or truncated one ({error}); download it again"
        ) from error
    records = {record.filename: record for record in found}
    if len(records) != len(found):
        twice = Counter(record.filename for record in found).most_common(1)[0][0]
        raise CheckpointError(
            f"{file}: expected each record once, found {twice[:200]!r} several times; save it again with torch.save"
        )
    found.sort(key=attrgetter("header_offset"))
    for record, following in zip(found, [*(r.header_offset for r in found[1:]), end], strict=False):
        least = record.header_offset + _LOCAL_HEADER.size + len(record.orig_filename) + record.compress_size
        if record.header_offset < 0 or least > following:
            raise CheckpointError(
                f"{file}: record {record.filename[:200]!r}: expected it to end before byte {following}, found it up to "
                f"byte {least} at least, over what follows; the file is damaged, download it again"
            )
    return records


def _prefix(file: Path, records: dict[str, zipfile.ZipInfo]) -> str:
    """What stands before `data.pkl`: a folder and a slash, or nothing."""
    prefixes = [name[: -len("data.pkl")] for name in records if name == "data.pkl" or name.endswith("/data.pkl")]
    depth = min((prefix.count("/") for prefix in prefixes), default=0)
    highest = [prefix for prefix in prefixes if prefix.count("/") == depth]
    if len(highest) > 1:
        raise CheckpointError(
            f"{file}: expected one data.pkl, found {len(highest)}, first {highest[0][:80]}data.pkl and "
            f"{highest[1][:80]}data.pkl; save it again with torch.save"
        )
    what, remedy = _other_kind(records, highest[0] if highest else "")
    if what or not highest:
        shown = ", ".join(name[:40] for name in list(records)[:4]) or "nothing"
        raise UnsupportedError(
            f"{file}: expected a file of torch.save, found {what or f'a zip of other things ({shown})'}; "
            f"{remedy or 'give the file of the weights'}"
        )
    return highest[0]


def _other_kind(records: Iterable[str], prefix: str) -> tuple[str, str]:
    """What else a zip is, and what to do about it; empty for a file of torch.save."""
    state = "load it there and save its state_dict() with torch.save"
    names = set(records)
    if f"{prefix}constants.pkl" in names or any(name.startswith(f"{prefix}code/") for name in names):
        return "a TorchScript program (it has constants.pkl or code/)", f"torch.jit.load reads it: {state}"
    tails = {name.rpartition("/")[2] for name in names}
    if "archive_format" in tails or "serialized_exported_program.json" in tails:
        return "a program of torch.export", f"torch.export.load reads it: {state}"
    if "extern_modules" in tails:
        return "a package of torch.package", f"torch.package.PackageImporter reads it: {state}"
    if "model.weights.h5" in tails:
        return "a Keras model", "keras.saving.load_model reads it"
    if names and all(name.endswith(".npy") for name in names):
        return "arrays of numpy (.npz)", "numpy.load reads it: save them as tensors with safetensors"
    return "", ""


def _is_big_endian(file: Path, f: BinaryIO, size: int, prefix: str, records: dict[str, zipfile.ZipInfo]) -> bool:
    record = records.get(f"{prefix}byteorder")
    if record is None:
        return False
    where, packed = _Zip(file, size, prefix, records, False).range_of(f, record)
    stream: Stream = FileRange(f, where, record.compress_size)
    text = (_Inflated(stream, str(file), packed.size) if packed else stream).read(16)
    if text not in (b"little", b"big"):
        raise CheckpointError(f"{file}: byteorder: expected 'little' or 'big', found {text!r}; download it again")
    return text == b"big"


class _Inflated:
    """A deflated record as a stream for a pickle: no more of it than the `size` bytes that it claims."""

    def __init__(self, packed: Stream, name: str, size: int) -> None:
        self._packed, self._name, self._left = packed, name, size
        self._inflate = zlib.decompressobj(-zlib.MAX_WBITS)

    def read(self, n: int, /) -> bytes:
        """The next `n` bytes, or less at the end."""
        pieces = []
        n = min(n, self._left)
        try:
            while n and not self._inflate.eof:
                data = self._inflate.unconsumed_tail or self._packed.read(1 << 16)
                piece = self._inflate.decompress(data, n)
                if not piece and not data:
                    break
                pieces.append(piece)
                n -= len(piece)
                self._left -= len(piece)
        except zlib.error as error:
            raise CheckpointError(
                f"{self._name}: expected deflated bytes, found damage ({error}); download it again"
            ) from error
        return b"".join(pieces)

    def skip(self, n: int, /) -> int:
        """Pass over `n` bytes, or less at the end; how many."""
        passed = 0
        while passed < n and (piece := self.read(min(n - passed, 1 << 18))):
            passed += len(piece)
        return passed
