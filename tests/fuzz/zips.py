"""Zips taken apart, changed, and written again: sound ones, and such as no program would write."""

from __future__ import annotations

import io
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from .damage import NUMBERS, TEXTS, damage


@dataclass(frozen=True)
class Record:
    """One record of a zip.

    Attributes:
        name: as it is written.
        data: unpacked.
        deflated: whether it is written so.
        lies: field → what is written instead of the truth: `local_…` before the data, `central_…` in the directory.
        zip64: whether its sizes stand in the field for large ones.
        descriptor: whether sizes and checksum stand behind the data.
        extra: bytes of padding before the data, as torch aligns it.
    """

    name: bytes
    data: bytes
    deflated: bool = False
    lies: dict[str, int] = field(default_factory=dict)
    zip64: bool = False
    descriptor: bool = False
    extra: bytes = b""


def read_records(data: bytes) -> list[Record] | None:
    """What is in a zip, or None where it cannot be told."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return [
                Record(
                    info.orig_filename.encode("utf-8", "replace"),
                    archive.read(info),
                    info.compress_type == zipfile.ZIP_DEFLATED,
                    zip64=info.extra[:2] == b"\x01\x00",
                    descriptor=bool(info.flag_bits & 8),
                )
                for info in archive.infolist()
                if info.file_size < 1 << 16
            ]
    except Exception:  # Whatever else zipfile finds wrong: then it is damaged as bytes.
        return None


def write_records(records: Sequence[Record], lies: dict[str, int] | None = None, comment: bytes = b"") -> bytes:
    """The zip; `lies` are of the record at its end."""
    made, directory = bytearray(), bytearray()
    for record in records:
        directory += _local(made, record)
    lies = lies or {}
    start = lies.get("start", len(made))
    made += directory
    count, size = lies.get("count", len(records)), lies.get("size", len(directory))
    if lies.get("zip64"):
        where = len(made)
        made += b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, *_wide(count, count, size, start))
        made += b"PK\x06\x07" + struct.pack("<IQI", 0, *_wide(lies.get("where", where)), 1)
        start = count = size = 2**32 - 1
    made += b"PK\x05\x06" + _packed("<HHHHIIH", 0, 0, count, count, size, start, len(comment)) + comment
    return bytes(made)


def _local(made: bytearray, record: Record) -> bytes:
    """Write the record; what the directory says of it."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    body = packer.compress(record.data) + packer.flush() if record.deflated else record.data
    truth = {
        "flags": 0x800 | (8 if record.descriptor else 0),
        "method": 8 if record.deflated else 0,
        "crc": zlib.crc32(record.data),
        "packed": len(body),
        "size": len(record.data),
        "offset": len(made),
    }
    local = {key: record.lies.get(f"local_{key}", value) for key, value in truth.items()}
    central = {key: record.lies.get(f"central_{key}", value) for key, value in truth.items()}
    if record.zip64:
        local_extra = b"\x01\x00\x10\x00" + _packed("<QQ", local["size"], local["packed"])
        central_extra = b"\x01\x00\x18\x00" + _packed("<QQQ", central["size"], central["packed"], central["offset"])
        local["size"] = local["packed"] = central["size"] = central["packed"] = central["offset"] = 2**32 - 1
    else:
        local_extra = central_extra = b""
    if record.descriptor:
        local["crc"] = local["packed"] = local["size"] = 0
    padding = record.extra
    if padding:
        padding = b"FB" + len(padding).to_bytes(2, "little") + padding
    name = record.name
    made += b"PK\x03\x04" + _packed("<HHHHHIII", 45, local["flags"], local["method"], 0, 33, *_sizes(local))
    made += _packed("<HH", len(name), len(local_extra + padding)) + name + local_extra + padding + body
    if record.descriptor:
        made += b"PK\x07\x08" + _packed("<III", truth["crc"], truth["packed"], truth["size"])
    head = _packed("<HHHHHHIII", 45, 45, central["flags"], central["method"], 0, 33, *_sizes(central))
    tail = _packed("<HHHHHII", len(name), len(central_extra), 0, 0, 0, 0, central["offset"])
    return b"PK\x01\x02" + head + tail + name + central_extra


def _sizes(fields: dict[str, int]) -> tuple[int, int, int]:
    return fields["crc"], fields["packed"], fields["size"]


def _packed(form: str, *numbers: int) -> bytes:
    """Numbers as they fit: the rest is cut off."""
    widths = {"H": 16, "I": 32, "Q": 64}
    return struct.pack(form, *(n % (1 << widths[c]) for n, c in zip(numbers, form[1:], strict=True)))


def _wide(*numbers: int) -> tuple[int, ...]:
    return tuple(n % 2**64 for n in numbers)


def mutate_zip(
    data: bytes, chance: random.Random, mutate_record: Callable[[bytes, bytes, random.Random], bytes]
) -> bytes:
    """Another zip: `mutate_record(name, data, chance)` gives what is in a record."""
    records = read_records(data)
    if not records or chance.random() < 0.03:
        return damage(data, chance)
    lies: dict[str, int] = {}
    comment = b""
    for _ in range(chance.choice((1, 1, 1, 2))):
        at = chance.randrange(len(records))
        kind = chance.randrange(20)
        if kind < 10:
            # The pickle more often than the others.
            pickles = [i for i, record in enumerate(records) if record.name.endswith(b".pkl")]
            at = chance.choice(pickles) if pickles and chance.random() < 0.8 else at
            records[at] = replace(records[at], data=mutate_record(records[at].name, records[at].data, chance))
        elif kind < 13:
            records[at] = _dressed(records[at], chance)
        elif kind == 13:
            records[at] = replace(records[at], lies=_lies(chance))
        elif kind == 14:
            lies = {chance.choice(("start", "count", "size", "zip64", "where")): chance.choice((1, *NUMBERS))}
        elif kind == 15:
            lies, comment = {"zip64": chance.randrange(2)}, chance.choice((b"", b"x", b"PK\x05\x06" + bytes(18)))
        else:
            _rearrange(records, at, kind, chance)
            if not records:
                return damage(data, chance)
    made = write_records(records, lies, comment)
    if chance.random() < 0.03:
        made = chance.choice((b"PK\x03\x04", b"x", made[:50])) + made
    return made


def _dressed(record: Record, chance: random.Random) -> Record:
    """The same record, written otherwise."""
    kind = chance.randrange(4)
    if kind == 0:
        return replace(record, deflated=not record.deflated)
    if kind == 1:
        return replace(record, zip64=not record.zip64)
    if kind == 2:
        return replace(record, descriptor=not record.descriptor)
    return replace(record, extra=bytes(chance.randrange(64)))


def _lies(chance: random.Random) -> dict[str, int]:
    field_ = chance.choice(("flags", "method", "crc", "packed", "size", "offset"))
    number = chance.choice((0, 1, 8, 9, 12, 14, 0x801, 0x808, 64, 200, *NUMBERS))
    where = chance.choice((("local_",), ("central_",), ("local_", "central_")))
    return {prefix + field_: number for prefix in where}


def _rearrange(records: list[Record], at: int, kind: int, chance: random.Random) -> None:
    if kind == 16:
        chance.shuffle(records)
    elif kind == 17:
        del records[at]
    elif kind == 18:
        records.insert(at, chance.choice(records))
    else:
        old = records[at].name
        names = [record.name for record in records]
        new = chance.choice((*names, old + b"x", old.upper(), chance.choice(TEXTS).encode("utf-8", "surrogatepass")))
        records[at] = replace(records[at], name=new)
