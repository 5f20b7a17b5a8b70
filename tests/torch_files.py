"""What the tests of pickled files share: files written in every way, their tensors read by numpy."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowmem.checkpoint.pickled import read_pickled
from lowmem.checkpoint.records import Leaf, PickledFile, Shard, TensorEntry


def save(value: Any, file: Path, legacy: bool = False, protocol: int = 2) -> Path:
    torch.save(value, file, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    return file


def loaded(file: Path) -> Any:
    return torch.load(file, weights_only=False, map_location="cpu")


def leaves_of(root: Any) -> dict[str, Leaf]:
    """Every leaf of dicts, lists and tuples, by its path."""
    found: dict[str, Leaf] = {}

    def walk(value: Any, path: str, depth: int) -> None:
        if isinstance(value, Leaf):
            found[path] = value
        elif depth < 20 and isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                walk(item, f"{path}.{i}".lstrip("."), depth + 1)
        elif depth < 20 and isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{path}.{key}".lstrip("."), depth + 1)

    walk(root, "", 0)
    return found


def unpacked(shard: Shard, offset: int, nbytes: int) -> bytes:
    """Bytes at an address of a packed range."""
    packed = next(p for p in shard.packed if p.address <= offset and offset + nbytes <= p.address + p.size)
    with shard.file.open("rb") as f:
        f.seek(packed.offset)
        raw = f.read(packed.nbytes)
    data = raw.decode().encode("latin1") if packed.method == "latin1" else zlib.decompress(raw, -zlib.MAX_WBITS)
    assert len(data) == packed.size
    assert packed.crc is None or zlib.crc32(data) == packed.crc
    return data[offset - packed.address :][:nbytes]


def bytes_of(entry: TensorEntry, shard: Shard) -> bytes:
    """The elements of an entry in row-major order and this machine's byte order, taken from the file by numpy."""
    size = getattr(torch, entry.dtype).itemsize
    if not entry.nbytes:
        return b""
    if entry.packed:
        assert entry.offset >= shard.size
        raw = unpacked(shard, entry.offset, entry.nbytes)
    else:
        assert entry.end <= shard.size
        with entry.file.open("rb") as f:
            f.seek(entry.offset)
            raw = f.read(entry.nbytes)
    assert len(raw) == entry.nbytes
    elements: np.ndarray[Any, Any] = np.frombuffer(raw, np.dtype((np.void, size)))
    if entry.strides is not None:
        steps = tuple(s * size for s in entry.strides)
        elements = np.lib.stride_tricks.as_strided(elements, entry.shape, steps)
    data = np.ascontiguousarray(elements).tobytes()
    if entry.swapped:
        part = size // 2 if entry.dtype.startswith("complex") else size
        data = np.frombuffer(data, np.uint8).reshape(-1, part)[:, ::-1].tobytes()
    return data


def torch_bytes(value: Any) -> bytes:
    """The same of a tensor or array that was loaded."""
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value.astype(value.dtype.newbyteorder("="))).tobytes()
    # A tensor of one element may count as contiguous with any stride.
    flat = value.detach().contiguous().clone().as_strided((value.numel(),), (1,))
    return b"" if not flat.numel() else flat.view(torch.uint8).numpy().tobytes()


def assert_same(value: Any, root: Any, picked: PickledFile) -> dict[str, TensorEntry]:
    """Every tensor of `value`, as torch.load gave it, is in `root`, with its dtype, shape and bytes."""
    pairs = list(tensors_of(value))
    leaves = leaves_of(root)
    assert list(leaves) == [path for path, _ in pairs]
    entries, shard = picked.locate(leaves)
    assert list(entries) == list(leaves)
    for path, tensor in pairs:
        entry = entries[path]
        assert entry.key == path
        assert (
            entry.dtype
            == str(tensor.dtype.newbyteorder("=") if isinstance(tensor, np.ndarray) else tensor.dtype)[
                0 if isinstance(tensor, np.ndarray) else len("torch.") :
            ]
        )
        assert entry.shape == tuple(tensor.shape)
        assert bytes_of(entry, shard) == torch_bytes(tensor), path
        if isinstance(tensor, torch.Tensor):
            assert (entry.strides is None) == (tensor.is_contiguous() or not tensor.numel())
            assert entry.strides is None or entry.strides == tensor.stride()
    return entries


def tensors_of(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        yield path, value
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from tensors_of(item, f"{path}.{i}".lstrip("."))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors_of(item, f"{path}.{key}".lstrip("."))


def check(file: Path) -> dict[str, TensorEntry]:
    """The file holds for us what it holds for torch.load."""
    picked = read_pickled(file)
    return assert_same(loaded(file), picked.root, picked)


def rewritten(
    source: Path, target: Path, change: Callable[[str, bytes], bytes | None] | None = None, method: int = 0
) -> Path:
    """The zip anew by Python's zipfile, each record changed, or left out for None, and compressed by `method`."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        for name in old.namelist():
            data = old.read(name)
            changed = change(name, data) if change else data
            if changed is not None:
                new.writestr(name, changed)
    return target


def pickle_in_zip(file: Path, pickle: bytes, **records: bytes) -> Path:
    """A zip as torch.save writes it, around any pickle."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle)
        archive.writestr("archive/version", b"3\n")
        for name, data in records.items():
            archive.writestr(f"archive/data/{name.strip('_')}", data)
    return file


def pickle_in_legacy(file: Path, pickle: bytes) -> Path:
    """A legacy file around any pickle."""
    buffer = io.BytesIO()
    torch.save(0, buffer, _use_new_zipfile_serialization=False)
    whole = buffer.getvalue()
    # `0` as an object is a pickle of its own, before the empty list of storages.
    tail = b"\x80\x02K\x00.\x80\x02]q\x00."
    assert whole.endswith(tail)
    file.write_bytes(whole[: -len(tail)] + pickle + tail[5:])
    return file
