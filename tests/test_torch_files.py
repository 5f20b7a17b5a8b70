"""Files of torch.save, zip and legacy: every tensor where torch.load finds it, bit for bit."""

from __future__ import annotations

import argparse
import struct
import sys
import tempfile
import warnings
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_files import (
    assert_same,
    bytes_of,
    check,
    leaves_of,
    loaded,
    pickle_in_zip,
    rewritten,
    save,
    torch_bytes,
)

from lowmem import CheckpointError, UnsupportedError
from lowmem.checkpoint.pickled import read_pickled
from lowmem.checkpoint.pickles import Dict, Global, Inert
from lowmem.checkpoint.records import Leaf

OLD = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64"]
OLD += ["complex128"]
# These are written as bytes beside a dtype. In a legacy file torch 2.13 writes them so and cannot read them.
NEW = ["complex32", "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"]
NEW += ["float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"]
BOTH = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "weights.pth"


def counting(dtype: str, *shape: int) -> torch.Tensor:
    kind = getattr(torch, dtype)
    count = torch.Size(shape).numel() * kind.itemsize
    if dtype == "bool":
        return (torch.arange(count) % 3 == 0).reshape(shape)
    return (torch.arange(count) % 251).to(torch.uint8).view(kind).reshape(shape)


def views() -> dict[str, torch.Tensor]:
    base = torch.arange(120, dtype=torch.float32)
    square = base[:100].view(10, 10)
    return {
        "whole": base,
        "narrow": base.narrow(0, 7, 9),
        "rows": square[2:5],
        "columns": square[:, 2:5],
        "transposed": square.t(),
        "every other": base[::2],
        "permuted": base.view(4, 5, 6).permute(2, 0, 1),
        "expanded": base[:5].expand(3, 5),
        "one expanded": base[3:4].expand(8),
        "overlapping": base.as_strided((4, 3), (2, 1), 1),
        "of ones": base.as_strided((1, 3, 1), (77, 1, 55), 2),
        "one element": base[119:],
        "channels last": torch.arange(48.0).view(1, 3, 4, 4).to(memory_format=torch.channels_last),
        "scalar": base[11],
        "own scalar": torch.tensor(2.5),
        "empty": torch.empty(0),
        "empty view": base[5:5],
        "empty of many": torch.empty(3, 0, 5),
    }


# Equal to torch.load


@BOTH
@pytest.mark.parametrize("dtype", OLD + NEW)
def test_every_dtype(dtype: str, legacy: bool, file: Path) -> None:
    value = {"a": counting(dtype, 3, 4), "b": counting(dtype, 2)}
    picked = read_pickled(save(value, file, legacy))
    entries = assert_same(value if legacy and dtype in NEW else loaded(file), picked.root, picked)
    assert entries["a"].is_plain


@BOTH
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_views_of_every_kind(protocol: int, legacy: bool, file: Path) -> None:
    entries = check(save(views(), file, legacy, protocol))
    assert entries["narrow"].offset == entries["whole"].offset + 28
    assert entries["expanded"].strides == (0, 1)
    assert entries["expanded"].nbytes == 20
    assert entries["of ones"].strides is None
    assert entries["transposed"].strides == (1, 10)


@BOTH
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_parameters_and_state_dicts(protocol: int, legacy: bool, file: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    marked = torch.nn.Parameter(torch.ones(3))
    marked.note = "kept elsewhere"  # type: ignore[attr-defined]
    state = OrderedDict(module.state_dict())
    state._metadata = module.state_dict()._metadata  # type: ignore[attr-defined]
    check(save({"model": state, "own": [marked, torch.nn.Parameter(torch.ones(2), False)]}, file, legacy, protocol))
    root = read_pickled(file).root
    assert type(root["model"]) is Dict
    assert root["model"].what == Global("collections", "OrderedDict")
    assert root["model"].state["_metadata"][""] == {"version": 1}


@BOTH
def test_a_training_checkpoint(legacy: bool, file: Path) -> None:
    module = torch.nn.Linear(3, 4)
    moments = {i: {"step": torch.tensor(1.0), "exp_avg": torch.ones_like(p)} for i, p in enumerate(module.parameters())}
    value = {
        "model": module.state_dict(),
        "optimizer": {"state": moments, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0, 1]}]},
        "args": argparse.Namespace(lr=0.1, nested=argparse.Namespace(path=Path("x"))),
        "epoch": 7,
        "best": 0.25,
        "big": 1 << 200,
        "history": defaultdict(list, {"loss": [1.0, -2.5]}),
        "tags": {"a", "b"},
        "key": {(1, 2): 3, 2.5: 4, None: 5, True: 6},
        "rng": torch.get_rng_state(),
        "shape": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "text": "é漢😀",
        "raw": b"bytes",
    }
    check(save(value, file, legacy))
    root = read_pickled(file).root
    assert (root["epoch"], root["best"], root["big"], root["text"]) == (7, 0.25, 1 << 200, "é漢😀")
    assert root["args"].what == Global("argparse", "Namespace")
    assert root["args"].state["lr"] == 0.1
    assert root["args"].state["nested"].what.name == "Namespace"
    assert root["history"] == {"loss": [1.0, -2.5]}
    assert root["shape"] == (2, 3)
    assert root["dtype"] == Global("torch", "bfloat16")
    assert list(root["key"].values()) == [3, 4, 5, 6]
    assert sorted(root["tags"].args[0]) == ["a", "b"]


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(2, 3)
        self.register_buffer("steps", torch.arange(4))
        self.tied = self.inner.weight


@BOTH
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_a_whole_module_is_inert_and_its_parameters_are_found(legacy: bool, file: Path) -> None:
    module = Small()
    save({"ema": module}, file, legacy)
    picked = read_pickled(file)
    inert = picked.root["ema"]
    assert isinstance(inert, Inert)
    assert inert.what == Global(Small.__module__, "Small")
    inner = inert.state["_modules"]["inner"].state["_parameters"]
    leaves = {"w": inner["weight"], "b": inner["bias"], "s": inert.state["_buffers"]["steps"]}
    leaves["t"] = inert.state["_parameters"]["tied"]
    entries, shard = picked.locate(leaves)
    assert bytes_of(entries["w"], shard) == module.inner.weight.detach().numpy().tobytes()
    assert bytes_of(entries["s"], shard) == module.steps.numpy().tobytes()  # type: ignore[operator]
    assert entries["t"].offset == entries["w"].offset


@BOTH
def test_shared_storages_stay_shared(legacy: bool, file: Path) -> None:
    base = torch.arange(10.0)
    entries = check(save({"a": base, "b": base, "c": base[4:]}, file, legacy))
    assert entries["a"].offset == entries["b"].offset == entries["c"].offset - 16


def arrays() -> dict[str, Any]:
    grid = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    return {
        "rows": grid,
        "columns": np.asfortranarray(grid),
        "transposed": grid.T,
        "sliced": grid[:, ::2, 1:],
        "big-endian": grid.astype(">f4"),
        "big-endian columns": np.asfortranarray(grid.astype(">f8")),
        "big-endian complex": (grid + 1j).astype(">c8"),
        "large": np.arange(70_000, dtype=np.int32) % 251,
        "bytes of every value": np.arange(256, dtype=np.uint8),
        "one byte": np.array([200], np.uint8),
        "the same byte": np.array([[200]], np.uint8),
        "zero": np.array([0], np.uint8),
        "again zero": np.array([0], np.uint8),
        "half": grid.astype(np.float16),
        "bool": grid > 4,
        "scalar": np.array(2.5),
        "empty": np.empty((0, 3), np.float32),
    }


@BOTH
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_numpy_arrays(protocol: int, legacy: bool, file: Path) -> None:
    entries = check(save(arrays() | {"number": np.float32(2)}, file, legacy, protocol))
    assert entries["rows"].packed == (protocol == 2)
    assert entries["big-endian"].swapped
    assert not entries["rows"].swapped


@pytest.mark.parametrize(
    ("kind", "order", "swapped"),
    [("i2", ">", True), (">i2", "<", False), (">i2", ">", True), ("<i2", ">", True)],
    ids=str,
)
@pytest.mark.parametrize("copied", [True, False], ids=["copied", "its own"])
def test_the_byte_order_of_a_numpy_type_is_what_its_state_says(
    kind: str, order: str, swapped: bool, copied: bool, file: Path
) -> None:
    """Unless the type is numpy's own and no copy: that takes no state."""
    save({"a": np.arange(4, dtype=">i2")}, file, protocol=3)

    def change(name: str, data: bytes) -> bytes:
        text = kind.encode()
        data = data.replace(b"X\x02\x00\x00\x00i2", b"X" + len(text).to_bytes(4, "little") + text)
        data = data.replace(b"X\x01\x00\x00\x00>", b"X\x01\x00\x00\x00" + order.encode())
        return data if copied else data.replace(b"\x89\x88\x87", b"\x89\x89\x87")

    entries = check(rewritten(file, file.with_suffix(".odd"), change))
    assert entries["a"].swapped == (swapped if copied or kind == ">i2" else False)


def test_an_array_whose_state_has_no_version(file: Path) -> None:
    """numpy takes it still."""
    values = np.arange(4, dtype="<i2")
    _, _, state = values.__reduce__()

    class Old:
        def __reduce__(self) -> Any:
            return (*values.__reduce__()[:2], state[1:])

    save({"y": Old()}, file)
    assert np.array_equal(loaded(file)["y"], values)
    assert list(check(file)) == ["y"]


def test_a_numpy_type_that_is_perhaps_a_copy_is_refused(file: Path) -> None:
    save({"a": np.arange(4, dtype="<i2")}, file, protocol=3)
    odd = rewritten(file, file.with_suffix(".odd"), lambda name, data: data.replace(b"\x89\x88\x87", b"\x89]\x87"))
    with pytest.raises(CheckpointError, match="a numpy type that is neither a copy nor none"):
        read_pickled(odd)


@BOTH
@pytest.mark.parametrize("protocol", [2, 4])
def test_arrays_that_are_named_twice_are_found_twice(protocol: int, legacy: bool, file: Path) -> None:
    array = np.arange(5.0)
    entries = check(save({"a": array, "b": [array, (array,)]}, file, legacy, protocol))
    assert len({entry.offset for entry in entries.values()}) == 1


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_that_are_no_tensors_say_why_not(protocol: int, file: Path) -> None:
    odd = {
        "objects": np.array([None, "x"], object),
        "text": np.array(["abc", "de"]),
        "fields": np.zeros(3, [("a", "f4"), ("b", "i2")]),
        "dates": np.array(["2020-01-01"], "datetime64[D]"),
        "long double": np.zeros(2, np.longdouble),
    }
    picked = read_pickled(save(odd | {"good": np.ones(2)}, file, protocol=protocol))
    leaves = leaves_of(picked.root)
    assert [key for key, leaf in leaves.items() if leaf.why_not] == list(odd)
    with pytest.raises(UnsupportedError, match=r"weights\.pth: tensor 'text': .*numpy array of U3"):
        picked.locate({"text": leaves["text"]})
    picked.locate({"good": leaves["good"]})


def test_kinds_of_tensors_that_cannot_be_read_say_why_not(file: Path) -> None:
    coo = torch.eye(3).to_sparse()
    odd: dict[str, tuple[Any, str]] = {
        "coo": (coo, "sparse"),
        "csr": (torch.eye(3).to_sparse_csr(), "sparse"),
        "quantised": (torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8), "quantised"),
        "by channel": (
            torch.quantize_per_channel(torch.ones(2, 2), torch.ones(2), torch.zeros(2), 0, torch.quint8),
            "quantised",
        ),
        "nested": (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
        "meta": (torch.ones(3, device="meta"), "meta"),
        "conjugate": (torch.ones(2, dtype=torch.complex64).conj(), "conj"),
        "negative": (torch.ones(2, dtype=torch.complex64).conj().imag, "neg"),
        "subclass": (torch.ones(2).as_subclass(Own), "Own"),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save({key: value for key, (value, _) in odd.items()} | {"good": torch.ones(2)}, file)
    picked = read_pickled(file)
    leaves = leaves_of(picked.root)
    assert list(leaves) == [*odd, "good"]
    for key, (_, why) in odd.items():
        assert why in (leaves[key].why_not or ""), key
        with pytest.raises(UnsupportedError, match=f"tensor '{key}'"):
            picked.locate({key: leaves[key]})
    assert (leaves["coo"].dtype, leaves["coo"].shape) == ("float32", (3, 3))
    assert (leaves["quantised"].dtype, leaves["quantised"].shape) == ("qint8", (4,))
    assert list(picked.locate({"good": leaves["good"]})[0]) == ["good"]


class Own(torch.Tensor):
    pass


def test_the_old_ways_to_build_tensors(file: Path) -> None:
    """Before torch 0.4: without gradients, and by a state of four."""
    storage = b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQ"
    old = b"\x80\x02}(X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor\n" + storage + b"K\x01K\x02\x85K\x01\x85tR"
    on_gpu = storage.replace(b"ctorch\n", b"ctorch.cuda\n").replace(b"\x03\x00\x00\x00cpu", b"\x06\x00\x00\x00cuda:0")
    older = b"X\x01\x00\x00\x00bctorch\nFloatTensor\n)R" + on_gpu + b"K\x02K\x01K\x02\x86K\x02K\x01\x86tb"
    pickle_in_zip(file, old + older + b"u.", _0=np.arange(6, dtype=np.float32).tobytes())
    picked = read_pickled(file)
    entries, shard = picked.locate(leaves_of(picked.root))
    assert np.frombuffer(bytes_of(entries["a"], shard), np.float32).tolist() == [1, 2]
    assert np.frombuffer(bytes_of(entries["b"], shard), np.float32).tolist() == [2, 3]


@pytest.mark.parametrize("raw", [bytes(8), b"\x00\x00\x80?\x00\x00\x00@", b"abcdefgh"])
def test_arrays_of_python_2(raw: bytes, file: Path) -> None:
    """Their bytes were written as a text may be."""
    head = b"\x80\x02}U\x01acnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02\x85"
    kind = b"cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    picked = read_pickled(pickle_in_zip(file, head + kind + b"\x89U\x08" + raw + b"tbs."))
    entries, shard = picked.locate(leaves_of(picked.root))
    assert entries["a"].is_plain
    assert (entries["a"].dtype, entries["a"].shape, bytes_of(entries["a"], shard)) == ("float32", (2,), raw)


def test_tensors_of_xla_are_read_where_nothing_was_cast(file: Path) -> None:
    class Device:
        def __init__(self, tensor: torch.Tensor, dtype: torch.dtype) -> None:
            self.held = tensor, dtype

        def __reduce__(self) -> Any:
            return torch._utils._rebuild_device_tensor_from_cpu_tensor, (*self.held, "cpu", False)

    save({"a": Device(torch.ones(3), torch.float32)}, file)
    check(file)
    save({"a": Device(torch.ones(3), torch.bfloat16)}, file)
    assert "float32 for a bfloat16" in (leaves_of(read_pickled(file).root)["a"].why_not or "")


# Big-endian, compressed, large


def swapping(name: str, data: bytes, size: int) -> bytes:
    if name.endswith("/byteorder"):
        return b"big"
    if "/data/" in name:
        return np.frombuffer(data, np.uint8).reshape(-1, size)[:, ::-1].tobytes()
    return data


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64", "uint8", "complex64", "float64", "bool"])
def test_big_endian_zips(dtype: str, tmp_path: Path) -> None:
    base = counting(dtype, 4, 6)
    original = save({"a": base, "t": base.t(), "n": np.arange(3.0)}, tmp_path / "little.pt")
    size = base.itemsize // (2 if base.is_complex() else 1)
    file = rewritten(original, tmp_path / "big.pt", lambda name, data: swapping(name, data, size))
    entries = check(file)
    assert entries["a"].swapped == (base.itemsize > 1)
    assert not entries["n"].swapped


def test_a_zip_without_a_byte_order_is_little_endian(tmp_path: Path) -> None:
    original = save({"a": torch.arange(5.0)}, tmp_path / "a.pt")
    file = rewritten(original, tmp_path / "b.pt", lambda name, data: None if name.endswith("byteorder") else data)
    assert not check(file)["a"].swapped
    odd = rewritten(original, tmp_path / "c.pt", lambda n, data: b"middle" if n.endswith("byteorder") else data)
    with pytest.raises(CheckpointError, match="byteorder: expected 'little' or 'big', found b'middle'"):
        read_pickled(odd)


def in_memory(file: Path) -> Any:
    """What torch.load would give, of a zip that it refuses because it is compressed."""
    return loaded(rewritten(file, file.with_suffix(".stored")))


@pytest.mark.parametrize("protocol", [2, 3, 5])
def test_compressed_zips(protocol: int, tmp_path: Path) -> None:
    value: dict[str, Any] = views() | {"more": torch.arange(999)}
    if protocol > 2:
        value |= arrays()
    original = save(value, tmp_path / "stored.pt", protocol=protocol)
    file = rewritten(original, tmp_path / "deflated.pt", method=zipfile.ZIP_DEFLATED)
    picked = read_pickled(file)
    entries = assert_same(in_memory(file), picked.root, picked)
    assert entries["whole"].packed
    _, shard = picked.locate(leaves_of(picked.root))
    addresses = [p.address for p in shard.packed]
    assert addresses == sorted(set(addresses))
    assert all(address % 64 == 0 and address >= shard.size for address in addresses)
    one, alone = picked.locate({"more": leaves_of(picked.root)["more"]})
    assert len(alone.packed) == 1
    assert bytes_of(one["more"], alone) == torch.arange(999).numpy().tobytes()


def test_an_array_packed_twice_is_refused_by_name(tmp_path: Path) -> None:
    original = save({"n": np.arange(500.0), "t": torch.ones(3)}, tmp_path / "a.pt", protocol=2)
    picked = read_pickled(rewritten(original, tmp_path / "b.pt", method=zipfile.ZIP_DEFLATED))
    leaves = leaves_of(picked.root)
    picked.locate({"t": leaves["t"]})
    with pytest.raises(UnsupportedError, match="zip it without compression"):
        picked.locate(leaves)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_are_refused_by_name(method: int, tmp_path: Path) -> None:
    original = save({"t": torch.ones(3)}, tmp_path / "a.pt")
    with pytest.raises(
        UnsupportedError, match=r"record .*expected it stored or deflated, found the method (bzip2|lzma)"
    ):
        read_pickled(rewritten(original, tmp_path / "b.pt", method=method))


def test_a_zip_of_more_than_4_gib(tmp_path: Path) -> None:
    """A sparse file with its second storage behind 5 GiB, so that only zip64 can say where."""
    original = save({"a": torch.arange(4.0), "b": torch.arange(5.0)}, tmp_path / "a.pt")
    file, directory = tmp_path / "large.pt", b""
    with zipfile.ZipFile(original) as old, file.open("wb") as f:
        for name in sorted(old.namelist(), key=lambda n: n.endswith("data/1")):
            if name.endswith("data/1"):
                f.seek(5 << 30)
            data, at, raw = old.read(name), f.tell(), name.encode()
            shared = struct.pack("<HHHHIIIHH", 0, 0, 0, 0, 0, len(data), len(data), len(raw), 0)
            f.write(b"PK\x03\x04" + struct.pack("<H", 45) + shared + raw + data)
            extra = struct.pack("<HHQQQ", 1, 24, len(data), len(data), at)
            directory += b"PK\x01\x02" + struct.pack("<HHHHHHI", 45, 45, 0, 0, 0, 0, 0) + b"\xff" * 8
            directory += struct.pack("<HHHHHI", len(raw), len(extra), 0, 0, 0, 0) + b"\xff" * 4 + raw + extra
        start = f.tell()
        f.write(directory)
        end, count = f.tell(), len(old.namelist())
        f.write(b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, len(directory), start))
        f.write(b"PK\x06\x07" + struct.pack("<IQI", 0, end, 1))
        f.write(b"PK\x05\x06" + b"\xff" * 16 + b"\0\0")
    picked = read_pickled(file)
    entries, shard = picked.locate(leaves_of(picked.root))
    assert entries["b"].offset > 5 << 30
    assert np.frombuffer(bytes_of(entries["b"], shard), np.float32).tolist() == [0, 1, 2, 3, 4]
    assert np.frombuffer(bytes_of(entries["a"], shard), np.float32).tolist() == [0, 1, 2, 3]


def test_only_the_wanted_storages_are_looked_at(tmp_path: Path) -> None:
    file = save({"a": torch.arange(4.0), "b": torch.arange(5.0)}, tmp_path / "a.pt")
    with zipfile.ZipFile(file) as archive:
        at = next(r.header_offset for r in archive.infolist() if r.filename.endswith("data/1"))
    raw = bytearray(file.read_bytes())
    raw[at] ^= 255
    file.write_bytes(raw)
    picked = read_pickled(file)
    leaves = leaves_of(picked.root)
    picked.locate({"a": leaves["a"]})
    with pytest.raises(CheckpointError, match="data/1': expected its header at byte"):
        picked.locate({"b": leaves["b"]})


# Any views at all


@st.composite
def strided(draw: st.DrawFn) -> torch.Tensor:
    """A view of a storage, with any strides, overlaps and broadcasts."""
    dtype = draw(st.sampled_from(["float32", "uint8", "bfloat16", "complex64", "float8_e5m2", "int64"]))
    base = counting(dtype, draw(st.integers(0, 40)))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    strides = draw(st.lists(st.integers(0, 12), min_size=len(shape), max_size=len(shape)))
    offset = draw(st.integers(0, 6))
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if all(shape) and last >= len(base):
        base = counting(dtype, last + draw(st.integers(1, 3)))
    return base.as_strided(shape, strides, offset)


@given(st.lists(strided(), max_size=5), st.booleans(), st.integers(2, 5), st.data())
@settings(max_examples=60, deadline=None)
def test_any_views_over_shared_storages(tensors: list[torch.Tensor], legacy: bool, protocol: int, data: Any) -> None:
    shared = [t.view(-1)[1:] for t in tensors if t.is_contiguous() and t.numel() > 1]
    order = data.draw(st.permutations([*tensors, *shared]))
    value = {str(i): t for i, t in enumerate(order)}
    with tempfile.TemporaryDirectory() as folder:
        picked = read_pickled(save(value, Path(folder) / "a.pt", legacy, protocol))
        leaves = leaves_of(picked.root)
        entries, shard = picked.locate(leaves)
        for key, tensor in value.items():
            assert leaves[key].shape == tuple(tensor.shape)
            assert bytes_of(entries[key], shard) == torch_bytes(tensor)


def test_reading_needs_no_torch() -> None:
    """Neither torch nor numpy is imported by what reads pickles."""
    import subprocess

    script = "import sys, lowmem.checkpoint.pickled; print(*[m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == []


def test_leaves_tell_what_they_are(file: Path) -> None:
    base = torch.arange(20, dtype=torch.int16).view(4, 5)
    picked = read_pickled(save({"t": base.t()[1:]}, file))
    assert picked.root == {"t": Leaf("int16", (4, 4), (1, 5), "data/0", 2, 38)}
    assert picked.shard.container == "torch zip"
    assert picked.shard.size == file.stat().st_size
