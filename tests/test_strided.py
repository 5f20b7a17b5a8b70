"""Tensors that do not lie in their file as torch has them in memory: views, big-endian and packed bytes."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lowmem
from lowmem.checkpoint import Checkpoint, Shard, TensorEntry
from lowmem.checkpoint.records import Packed
from lowmem.engine import iterate, same_bytes, unpacking
from lowmem.errors import CheckpointError
from lowmem.planner import StreamRequest, make_stream_plan, moves
from lowmem.planner.moves import bytes_to_read
from lowmem.sizes import KIB, MIB


def span_of(tensor: torch.Tensor) -> int:
    """Bytes from the first element of a view to behind its last."""
    if not tensor.numel():
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((n - 1) * step for n, step in steps)) * tensor.itemsize


def entry_of(key: str, view: torch.Tensor, file: Path, begin: int = 0, **more: Any) -> TensorEntry:
    """The entry of a view whose storage begins at byte `begin` of the file."""
    dtype = str(view.dtype).removeprefix("torch.")
    offset = begin + view.storage_offset() * view.itemsize
    strides = None if view.is_contiguous() else tuple(view.stride())
    return TensorEntry(key, dtype, tuple(view.shape), file, offset, span_of(view), strides, **more)


def checkpoint_of(file: Path, entries: list[TensorEntry], packed: tuple[Packed, ...] = ()) -> Checkpoint:
    info = file.stat()
    shard = Shard(file, info.st_size, info.st_mtime_ns, 0, {}, "torch zip", packed)
    entries.sort(key=lambda e: (e.offset, e.nbytes))
    return Checkpoint(str(file), file.parent, (shard,), {e.key: e for e in entries})


def read_all(checkpoint: Checkpoint, **options: Any) -> dict[str, torch.Tensor]:
    plan, window = make_stream_plan(checkpoint, StreamRequest(**options))
    return dict(iterate(plan, window))


VIEWS = {
    "transposed": lambda t: t.view(40, 50).t(),
    "columns": lambda t: t.view(40, 50)[:, 7:19],
    "every third": lambda t: t[5::3],
    "one column": lambda t: t.view(40, 50)[:, 3],
    "expanded": lambda t: t[7:8].expand(6, 30),
    "expanded inside": lambda t: t[:40].view(40, 1).expand(40, 9),
    "windows": lambda t: t[:200].unfold(0, 16, 4),
    "permuted": lambda t: t.view(10, 20, 10).permute(2, 0, 1),
    "inner part": lambda t: t.view(10, 20, 10)[2:8, 3:17, 1:9],
    "scalar": lambda t: t[13],
    "empty": lambda t: t.view(40, 50)[:, 5:5],
}


@pytest.mark.parametrize("chunk", [None, 256, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.complex64])
def test_views_arrive_as_torch_reads_them(
    tmp_path: Path, dtype: torch.dtype, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunk is not None:
        monkeypatch.setattr(moves, "CHUNK", chunk)
    storage = (torch.arange(2000) % 251).to(dtype)
    file = tmp_path / "storage"
    file.write_bytes(bytes(96) + storage.view(torch.uint8).numpy().tobytes())
    views = {name: make(storage) for name, make in VIEWS.items()}
    found = read_all(checkpoint_of(file, [entry_of(name, view, file, 96) for name, view in views.items()]))
    assert found.keys() == views.keys()
    for name, view in views.items():
        assert found[name].is_contiguous()
        assert torch.equal(found[name], view), name


@st.composite
def strided(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    """Shape, strides and offset of a view of 4096 elements."""
    shape = draw(st.lists(st.integers(0, 9), max_size=4))
    left, strides = 4000, []
    for n in shape:
        step = draw(st.integers(0, max(0, min(600, left // max(1, n)))))
        strides.append(step)
        left -= max(0, n - 1) * step
    return shape, strides, draw(st.integers(0, 90))


@settings(deadline=None, max_examples=80)
@given(views=st.lists(strided(), min_size=1, max_size=6), chunk=st.sampled_from([16, 100, 4 * MIB]), cast=st.booleans())
def test_any_views_of_one_storage_arrive(
    tmp_path_factory: pytest.TempPathFactory, views: list[tuple[list[int], list[int], int]], chunk: int, cast: bool
) -> None:
    file = tmp_path_factory.mktemp("views") / "storage"
    storage = torch.randn(4096)
    file.write_bytes(storage.numpy().tobytes())
    wanted = {str(i): storage.as_strided(*view) for i, view in enumerate(views)}
    checkpoint = checkpoint_of(file, [entry_of(name, view, file) for name, view in wanted.items()])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moves, "CHUNK", chunk)
        patch.setattr("lowmem.planner.views._LEAST_GAP", 64)
        found = read_all(checkpoint, dtype="bfloat16" if cast else "auto")
    for name, view in wanted.items():
        assert torch.equal(found[name], view.bfloat16() if cast else view), name


def test_gaps_of_a_view_are_not_read(tmp_path: Path) -> None:
    file = tmp_path / "storage"
    storage = torch.arange(MIB, dtype=torch.float32)
    file.write_bytes(storage.numpy().tobytes())
    column = storage.view(16, 64 * KIB)[:, 5:105]
    entry = entry_of("column", column, file)
    assert entry.nbytes > 3 * MIB
    assert bytes_to_read(entry) == 16 * 400
    checkpoint = checkpoint_of(file, [entry])
    plan, window = make_stream_plan(checkpoint, StreamRequest())
    assert sum(move.nbytes for move in plan.moves()) == plan.bytes_read == 16 * 400
    assert torch.equal(dict(iterate(plan, window))["column"], column)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int16", "int64", "complex64", "complex128", "float16"])
@pytest.mark.parametrize("strides", [False, True])
def test_big_endian_bytes_are_swapped(tmp_path: Path, dtype: str, strides: bool) -> None:
    values = np.arange(600).astype(dtype).reshape(20, 30) * (1 + 2j if "complex" in dtype else 3)
    values = values.astype(dtype)
    file = tmp_path / "storage"
    file.write_bytes(values.astype(values.dtype.newbyteorder(">")).tobytes())
    tensor = torch.from_numpy(values.copy())
    view = tensor.t() if strides else tensor
    found = read_all(checkpoint_of(file, [entry_of("a", view, file, swapped=True)]))
    assert torch.equal(found["a"], view)


def deflated(raw: bytes) -> bytes:
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    return packer.compress(raw) + packer.flush()


@pytest.mark.parametrize("chunk", [None, 512])
def test_packed_bytes_are_unpacked_in_order(tmp_path: Path, chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if chunk is not None:
        monkeypatch.setattr(moves, "CHUNK", chunk)
    first, second = torch.randn(5000), torch.randint(0, 256, (3000,), dtype=torch.uint8)
    packed_first = deflated(first.numpy().tobytes())
    packed_second = "".join(map(chr, second.tolist())).encode("utf-8")
    file = tmp_path / "storage"
    file.write_bytes(b"head" + packed_first + packed_second)
    size = file.stat().st_size
    begin = size + -size % 64
    behind = begin + 20000 + -20000 % 64
    ranges = (
        Packed(begin, 20000, 4, len(packed_first), "deflate", zlib.crc32(first.numpy().tobytes())),
        Packed(behind, 3000, 4 + len(packed_first), len(packed_second), "latin1"),
    )
    views = {"whole": first, "part": first[100:900], "turned": first[:4900].view(70, 70).t()}
    entries = [entry_of(name, view, file, begin, packed=True) for name, view in views.items()]
    entries += [entry_of("bytes", second, file, behind, packed=True)]
    found = read_all(checkpoint_of(file, entries, ranges))
    for name, view in {**views, "bytes": second}.items():
        assert torch.equal(found[name], view), name


@pytest.mark.parametrize("damage", ["cut", "changed", "checksum"])
def test_damage_in_packed_bytes_is_an_error_and_no_reader_waits_for_ever(tmp_path: Path, damage: str) -> None:
    raw = torch.randn(3 * MIB // 4).numpy().tobytes()
    packed = bytearray(deflated(raw))
    crc = zlib.crc32(raw)
    if damage == "cut":
        del packed[len(packed) // 2 :]
    elif damage == "changed":
        packed[len(packed) // 2 : len(packed) // 2 + 64] = bytes(64)
    else:
        crc ^= 1
    file = tmp_path / "storage"
    file.write_bytes(packed)
    begin = len(packed) + -len(packed) % 64
    ranges = (Packed(begin, len(raw), 0, len(packed), "deflate", crc),)
    parts = torch.frombuffer(bytearray(raw), dtype=torch.float32).view(24, -1)
    entries = [entry_of(str(i), row, file, begin, packed=True) for i, row in enumerate(parts)]
    with pytest.raises(CheckpointError, match="damaged"):
        read_all(checkpoint_of(file, entries, ranges))


def test_more_text_than_the_bytes_of_an_array_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "storage"
    file.write_bytes("\xe9".encode() * 65)
    entry = entry_of("a", torch.zeros(64, dtype=torch.uint8), file, 192, packed=True)
    with pytest.raises(CheckpointError, match="expected 64 bytes, found more"):
        read_all(checkpoint_of(file, [entry], (Packed(192, 64, 0, 130, "latin1"),)))


def test_the_same_place_is_the_same_without_being_read(tmp_path: Path) -> None:
    file = tmp_path / "storage"
    file.write_bytes(bytes(400))
    entry = entry_of("a", torch.zeros(10, 10).t(), file)
    assert same_bytes(entry, entry, {})


def test_a_packed_record_that_ends_early_is_damage_at_once(tmp_path: Path) -> None:
    """What stands behind its end is not kept in memory."""
    packed = deflated(bytes(1000)) + bytes(3 * MIB)
    file = tmp_path / "storage"
    file.write_bytes(packed)
    begin = len(packed) + -len(packed) % 64
    entry = entry_of("a", torch.zeros(8 * MIB, dtype=torch.uint8), file, begin, packed=True)
    with pytest.raises(CheckpointError, match="ends too early"):
        read_all(checkpoint_of(file, [entry], (Packed(begin, 8 * MIB, 0, len(packed), "deflate", 0),)))


def test_views_across_each_other_in_a_packed_record_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would unpack the record from its beginning."""
    monkeypatch.setattr("lowmem.planner.views._LEAST_GAP", 64)
    monkeypatch.setattr(unpacking, "_FEW", 0)
    raw = torch.arange(2000, dtype=torch.float32)
    packed = deflated(raw.numpy().tobytes())
    file = tmp_path / "storage"
    file.write_bytes(packed)
    begin = len(packed) + -len(packed) % 64
    views = {str(n): raw.as_strided((2,), (1500,), n) for n in range(100)}
    ranges = (Packed(begin, 8000, 0, len(packed), "deflate", None),)
    entries = [entry_of(name, view, file, begin, packed=True) for name, view in views.items()]
    few = [entry for entry in entries if int(entry.key) < 8]
    for name, tensor in read_all(checkpoint_of(file, few, ranges)).items():
        assert torch.equal(tensor, views[name])
    with pytest.raises(CheckpointError, match="lie across each other"):
        read_all(checkpoint_of(file, entries, ranges))


def test_truth_values_of_other_bytes_than_0_and_1_keep_them(tmp_path: Path) -> None:
    """A copy of torch's makes them 1; what a file holds is what is streamed and converted."""
    odd = torch.arange(12, dtype=torch.uint8).view(torch.bool).reshape(3, 4)
    one = torch.tensor([9], dtype=torch.uint8).view(torch.bool)
    torch.save({"turned": odd.t(), "one": one}, tmp_path / "odd.bin")
    wanted = {"turned": odd.t(), "one": one}
    lowmem.convert(tmp_path / "odd.bin", tmp_path / "out")
    for source in (tmp_path / "odd.bin", tmp_path / "out"):
        for key, tensor in lowmem.stream(source):
            assert tensor.contiguous().view(torch.uint8).tolist() == wanted[key].view(torch.uint8).tolist()
