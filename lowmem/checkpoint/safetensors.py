"""The safetensors container: header to entries, and the header of a file still to be written.

Format (https://github.com/huggingface/safetensors#format): 8 bytes little-endian header length N, N bytes of JSON
`{"key": {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {text: text}}`, then the data without gaps.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..dtypes import SAFETENSORS_DTYPES, SAFETENSORS_NAMES, itemsize
from ..errors import CheckpointError
from .records import Shard, TensorEntry

# The limit of the reference reader: a longer header is damage or malice.
MAX_HEADER = 100_000_000
# Where data begins; more than any dtype needs, so that a written file can always be mapped.
ALIGNMENT = 64


def read_shard(file: Path) -> tuple[Shard, list[TensorEntry]]:
    """Read the header of one `.safetensors` file; entries come in file order.

    Raises:
        CheckpointError: not a regular file, truncated, or a header that contradicts itself or the file's size.
    """
    header, size, mtime_ns = _read_header(file)
    start = 8 + len(header)
    table = _parse_json(file, header)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{file}: __metadata__ in the header: expected text to text, found something else")
    entries = [_entry(file, key, info, start) for key, info in table.items()]
    entries.sort(key=lambda e: (e.offset, e.nbytes))
    _check_tiling(file, entries, start, size)
    return Shard(file=file, size=size, mtime_ns=mtime_ns, data_offset=start, metadata=metadata), entries


def _read_header(file: Path) -> tuple[bytes, int, int]:
    """The header's bytes, the file's size, its modification time."""
    try:
        # Ask before opening: opening a fifo would hang, a device could do anything.
        if not stat.S_ISREG(file.stat().st_mode):
            raise CheckpointError(f"{file}: expected a regular file, found another kind; give the path of the weights")
        with file.open("rb", buffering=0) as f:
            info = os.fstat(f.fileno())
            head = f.read(8) or b""
            if len(head) < 8:
                raise CheckpointError(
                    f"{file}: expected a safetensors header, found a file of {info.st_size} bytes; download it again"
                )
            length = int.from_bytes(head, "little")
            if length > min(MAX_HEADER, info.st_size - 8):
                raise CheckpointError(
                    f"{file}: the header claims {length} bytes, the file has {info.st_size}; "
                    "it is truncated or not a safetensors file; download it again"
                )
            header = b""
            while len(header) < length:
                piece = f.read(length - len(header))
                if not piece:
                    raise CheckpointError(f"{file}: the header ended early; the file changed while it was read")
                header += piece
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error
    return header, info.st_size, info.st_mtime_ns


def _parse_json(file: Path, header: bytes) -> dict[str, Any]:
    try:
        # A key that appears twice needs no check of its own: the bytes of the lost one are a gap in the tiling.
        table = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: the header is not valid JSON ({error}); download the file again") from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{file}: the header is not a JSON object; this is not a safetensors file")
    return table


def _entry(file: Path, key: str, info: Any, start: int) -> TensorEntry:
    try:
        name, shape, (begin, end) = info["dtype"], info["shape"], info["data_offsets"]
        # `type is int` keeps out True, 1.0 and friends; min() keeps out negatives.
        sound = {int}.issuperset(map(type, shape)) and type(begin) is type(end) is int
        sound = sound and 0 <= begin <= end and min(shape, default=0) >= 0
        count = math.prod(shape)
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(f"{file}: tensor {key!r}: expected dtype, shape and data_offsets, found {_short(info)}")
    if type(name) is not str or name not in SAFETENSORS_DTYPES:
        known = ", ".join(SAFETENSORS_DTYPES)
        raise CheckpointError(f"{file}: tensor {key!r}: unknown dtype {_short(name)}; known: {known}")
    dtype, bits = SAFETENSORS_DTYPES[name]
    if count * bits != (end - begin) * 8:
        raise CheckpointError(
            f"{file}: tensor {key!r}: {name} of shape {shape} needs {count * bits / 8:g} bytes, "
            f"its data_offsets hold {end - begin}; the file is damaged"
        )
    if bits == 4:
        # torch packs two 4-bit values into one element, along the last dimension.
        if not shape or shape[-1] % 2:
            raise CheckpointError(f"{file}: tensor {key!r}: F4 needs an even last dimension, found shape {shape}")
        shape = [*shape[:-1], shape[-1] // 2]
    return TensorEntry(key, dtype, tuple(shape), file, start + begin, end - begin)


def _check_tiling(file: Path, entries: list[TensorEntry], start: int, size: int) -> None:
    """Entries in file order must cover the data exactly: no gap, no overlap, nothing behind the end."""
    at = start
    for entry in entries:
        if entry.offset != at:
            problem = "overlaps the tensor before it" if entry.offset < at else "leaves a gap before it"
            raise CheckpointError(
                f"{file}: tensor {entry.key!r} {problem}: expected to begin at byte {at}, found {entry.offset}; "
                "the file is damaged"
            )
        at = entry.end
    if at != size:
        problem = "truncated" if at > size else "followed by bytes that no tensor owns"
        raise CheckpointError(
            f"{file}: {problem}: the header describes {at} bytes, the file has {size}; download it again"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def layout(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, tuple[int, int]], int]:
    """Lay out a file that is still to be written.

    Args:
        tensors: (key, dtype, shape) in the order they will lie in.
        metadata: text to text, kept under `__metadata__`.

    Returns:
        The file's first bytes, key → (absolute offset, length in bytes), and the whole file's size in bytes.
        The data begins at a multiple of 64 bytes.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    spans: dict[str, tuple[int, int]] = {}
    at = 0
    for key, dtype, shape in tensors:
        nbytes = itemsize(dtype)
        for n in shape:
            nbytes *= n
        named = [*shape[:-1], shape[-1] * 2] if dtype == "float4_e2m1fn_x2" else list(shape)
        table[key] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": named, "data_offsets": [at, at + nbytes]}
        spans[key] = (at, nbytes)
        at += nbytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    start = 8 + len(text)
    head = len(text).to_bytes(8, "little") + text
    return head, {key: (start + begin, n) for key, (begin, n) in spans.items()}, start + at
