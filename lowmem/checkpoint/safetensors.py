"""The safetensors container: header to entries, and the header of a file still to be written.

Format (https://github.com/huggingface/safetensors#format): 8 bytes little-endian header length N, N bytes of JSON
`{"key": {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {text: text}}`, then the data without gaps.
"""

from __future__ import annotations

import io
import json
import os
import reprlib
import stat
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from .._files import LONGEST_NAME, MOST, MOST_SIZES, TooHeavyError, check_weight
from ..dtypes import NOT_IN_TORCH, SAFETENSORS_DTYPES, SAFETENSORS_NAMES, itemsize
from ..errors import CheckpointError, UnsupportedError
from .records import Shard, TensorEntry

# The limit of the reference reader: a longer header is damage or malice.
MAX_HEADER = MOST
# More elements or bytes than any tensor has; checked at each step, so that no product grows for ever.
_TOO_MANY = 2**63
# Where data begins; more than any dtype needs, so that a written file can always be mapped.
ALIGNMENT = 64


def read_shard(file: Path) -> tuple[Shard, list[TensorEntry]]:
    """Read the header of one `.safetensors` file; entries come in file order.

    Raises:
        CheckpointError: not a regular file, truncated, or a header that contradicts itself or the file's size.
    """
    header, size, mtime_ns = _read_header(file)
    start = 8 + len(header)
    table = _parse_json(file, header, size - start)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(
            f"{file}: __metadata__ in the header: expected text to text, found {short(metadata)}; download it again"
        )
    entries = [_entry(file, key, info, start) for key, info in table.items()]
    entries.sort(key=attrgetter("offset", "nbytes"))
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
            head = _read(f, 8)
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
            header = _read(f, length)
            if len(header) < length:
                raise CheckpointError(f"{file}: the header ended early; the file changed while it was read")
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be read: {error.strerror or error}; check the path and its permissions"
        ) from error
    return header, info.st_size, info.st_mtime_ns


def _read(f: io.FileIO, n: int) -> bytes:
    """The next `n` bytes, however often the system gives a part; less at the end of the file."""
    data = b""
    while len(data) < n and (piece := f.read(n - len(data))):
        data += piece
    return data


def _parse_json(file: Path, header: bytes, behind: int) -> dict[str, Any]:
    try:
        table = decode_json(header, unique=False, more=behind)
        if isinstance(table, dict) and _may_repeat(header, table):
            del table
            table = decode_json(header, more=behind)
    except TooHeavyError as error:
        raise CheckpointError(f"{file}: the header: {error}; the file is damaged, download it again") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: the header is not valid JSON ({error}); download the file again") from error
    if not isinstance(table, dict):
        raise CheckpointError(
            f"{file}: expected a JSON object as header, found {short(table)}; this is not a safetensors file"
        )
    return table


def _may_repeat(header: bytes, table: dict[str, Any]) -> bool:
    """Whether a key may stand twice: every pair has a colon, and a lost one is a colon too many.

    An entry has three fields, or is refused later. Counting is ten times faster than looking at every pair.
    """
    metadata = table.get("__metadata__")
    if "__metadata__" not in table:
        return header.count(b":") != 4 * len(table)
    return not isinstance(metadata, dict) or header.count(b":") != 4 * len(table) - 3 + len(metadata)


def decode_json(raw: bytes, unique: bool = True, more: int = 0) -> Any:
    """JSON as the reference reader takes it: UTF-8, no NaN, no half of a surrogate pair; and no key twice.

    Args:
        raw: the text.
        unique: whether to look for keys that appear twice.
        more: bytes of memory that it may take beside as many as the text has.

    Raises:
        ValueError, RecursionError: anything else, or what would take much memory.
    """
    check_weight(raw, more)
    text = raw.decode("utf-8")
    # The hook for integers is slow and seldom needed. (One character is found ten times faster than two.)
    integer = _integer if "-" in text and "-0" in text else None
    hook = _unique if unique else None
    value = json.loads(text, object_pairs_hook=hook, parse_constant=_no_constant, parse_int=integer)
    if "\\" in text and "\\u" in text:
        # Only an escape can make half a pair, which no encoder takes.
        _encode_each(value)
    return value


def _encode_each(value: Any) -> None:
    """Encode every text in `value`, one by one: all together would take its memory several times over."""
    left = [value]
    while left:
        here = left.pop()
        if isinstance(here, str):
            here.encode("utf-8")
        elif isinstance(here, dict):
            left += here.keys()
            left += here.values()
        elif isinstance(here, list):
            left += here


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"{counts.most_common(1)[0][0]!r} appears twice")
    return table


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _integer(text: str) -> int | float:
    # -0 is a float to the reference reader, which therefore takes it for no size.
    return -0.0 if text == "-0" else int(text)


def check_extent(file: Path, key: str, shape: Sequence[int] = ()) -> None:
    """Refuse a name that is longer than any, or a shape of more sizes than torch can compute with.

    They would be in every message and table.

    Raises:
        CheckpointError: it is longer, or has more.
    """
    if len(key) > LONGEST_NAME:
        raise CheckpointError(
            f"{file}: tensor {short(key)}: expected a name of at most {LONGEST_NAME} characters, found {len(key)}; "
            "the file is damaged, download it again"
        )
    if len(shape) > MOST_SIZES:
        raise CheckpointError(
            f"{file}: tensor {key!r}: expected a shape of at most {MOST_SIZES} sizes, found {len(shape)}; "
            "the file is damaged, download it again"
        )


def _entry(file: Path, key: str, info: Any, start: int) -> TensorEntry:
    if len(key) > LONGEST_NAME:
        check_extent(file, key)
    try:
        name, shape, (begin, end) = info["dtype"], info["shape"], info["data_offsets"]
        # `type is int` keeps out True, 1.0 and friends.
        sound = type(shape) is list and type(begin) is type(end) is int and 0 <= begin <= end < _TOO_MANY
    except (TypeError, KeyError, ValueError):
        sound = False
    count = _count(shape) if sound else -1
    if count < 0:
        raise CheckpointError(
            f"{file}: tensor {key!r}: expected dtype, shape and data_offsets in whole numbers from 0 to 2**63, "
            f"found {short(info)}; the file is damaged, download it again"
        )
    if len(shape) > MOST_SIZES:
        check_extent(file, key, shape)
    element = SAFETENSORS_DTYPES.get(name) if type(name) is str else None
    if element is None:
        known = ", ".join(SAFETENSORS_DTYPES)
        raise CheckpointError(
            f"{file}: tensor {key!r}: expected one of {known}, found dtype {short(name)}; "
            "the file is damaged, or needs a later lowmem"
        )
    dtype, bits = element
    if count * bits != (end - begin) * 8:
        raise CheckpointError(
            f"{file}: tensor {key!r}: {name} of shape {short(shape)} needs {count * bits / 8:.15g} bytes, "
            f"its data_offsets hold {end - begin}; the file is damaged, download it again"
        )
    if bits == 4:
        # torch packs two 4-bit values into one element, along the last dimension.
        if not shape or shape[-1] % 2:
            raise CheckpointError(
                f"{file}: tensor {key!r}: F4 needs an even last dimension, found shape {short(shape)}; "
                "write it again in pairs"
            )
        shape = [*shape[:-1], shape[-1] // 2]
    return TensorEntry(key, dtype, tuple(shape), file, start + begin, end - begin)


def _count(shape: list[Any]) -> int:
    """Elements of `shape`, or -1 for what is no shape."""
    count = 1
    for n in shape:
        if type(n) is not int or not 0 <= n < _TOO_MANY:
            return -1
        count *= n
        if count >= _TOO_MANY:
            return -1
    return count


def _check_tiling(file: Path, entries: list[TensorEntry], start: int, size: int) -> None:
    """Entries in file order must cover the data exactly: no gap, no overlap, nothing behind the end."""
    at = start
    for entry in entries:
        if entry.offset != at:
            problem = "overlaps the tensor before it" if entry.offset < at else "leaves a gap before it"
            raise CheckpointError(
                f"{file}: tensor {entry.key!r} {problem}: expected to begin at byte {at}, found {entry.offset}; "
                "the file is damaged, download it again"
            )
        at += entry.nbytes
    if at > size:
        cut = next(entry.key for entry in entries if entry.end > size)
        raise CheckpointError(
            f"{file}: truncated in tensor {cut!r}: expected {at} bytes, found {size}; download it again"
        )
    if at < size:
        raise CheckpointError(
            f"{file}: bytes behind the last tensor: expected {at} bytes, found {size}; download it again"
        )


_SHORT = reprlib.Repr()
_SHORT.maxlist = 16
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def short(value: Any) -> str:
    """`repr(value)` for a message: bounded in length and depth, whatever a file holds."""
    return _SHORT.repr(value)


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

    Raises:
        UnsupportedError: a dtype that safetensors has no name for, half a byte, or the name of its metadata.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    spans: dict[str, tuple[int, int]] = {}
    at = 0
    for key, dtype, shape in tensors:
        if key == "__metadata__":
            raise UnsupportedError(
                "tensor '__metadata__': safetensors keeps its metadata under that name; rename it, or leave it out"
            )
        packed = dtype == "float4_e2m1fn_x2"
        if dtype not in SAFETENSORS_NAMES or dtype in NOT_IN_TORCH or (packed and not shape):
            raise UnsupportedError(
                f"tensor {key!r}: safetensors cannot hold {dtype} of shape {tuple(shape)}; cast it to another dtype"
            )
        nbytes = itemsize(dtype)
        for n in shape:
            nbytes *= n
        named = [*shape[:-1], shape[-1] * 2] if packed else list(shape)
        table[key] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": named, "data_offsets": [at, at + nbytes]}
        spans[key] = (at, nbytes)
        at += nbytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    start = 8 + len(text)
    head = len(text).to_bytes(8, "little") + text
    return head, {key: (start + begin, n) for key, (begin, n) in spans.items()}, start + at
