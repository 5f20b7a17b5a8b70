"""Files of torch.save that are damaged, ambiguous or something else: an error that says what, where, and what to do."""

from __future__ import annotations

import os
import struct
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_files import check, leaves_of, pickle_in_zip, rewritten, save

from lowmem import CheckpointError, UnsupportedError
from lowmem.checkpoint.pickled import read_pickled

BOTH = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "weights.pth"


# Damage


def test_a_storage_that_is_too_short_or_missing(tmp_path: Path) -> None:
    original = save({"a": torch.arange(40.0)}, tmp_path / "a.pt")
    short = rewritten(original, tmp_path / "b.pt", lambda n, data: data[:-4] if "/data/0" in n else data)
    picked = read_pickled(short)
    with pytest.raises(CheckpointError, match="tensor 'a': expected a storage of 160 bytes, found 156"):
        picked.locate(leaves_of(picked.root))
    missing = read_pickled(rewritten(original, tmp_path / "c.pt", lambda n, d: None if "/data/0" in n else d))
    with pytest.raises(CheckpointError, match="expected a record a/data/0, found none"):
        missing.locate(leaves_of(missing.root))


def test_a_view_beyond_its_storage(file: Path) -> None:
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQ"
    head = b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor\n("
    pickle_in_zip(file, head + storage + b"K\x05K\x02\x85K\x01\x85tRs.", _0=bytes(24))
    picked = read_pickled(file)
    with pytest.raises(
        CheckpointError, match="tensor 'a': expected bytes 20 to 28 of its storage, found a storage of 24"
    ):
        picked.locate(leaves_of(picked.root))
    for odd in (b"J\xff\xff\xff\xffK\x02\x85K\x01\x85", b"K\x00K\x02\x85J\xff\xff\xff\xff\x85", b"K\x00K\x02\x85)"):
        with pytest.raises(CheckpointError, match="a tensor"):
            read_pickled(pickle_in_zip(file, head + storage + odd + b"tRs.", _0=bytes(24)))
    large = b"\x8a\x08" + b"\xff" * 7 + b"\x7f"
    with pytest.raises(CheckpointError, match="larger than anything"):
        read_pickled(
            pickle_in_zip(file, head + storage + b"K\x00" + large * 2 + b"\x86K\x01K\x01\x86tRs.", _0=bytes(24))
        )


def test_a_tensor_beyond_what_the_pickle_says_of_its_storage(file: Path) -> None:
    """Although the record is longer; torch refuses it too."""
    torch.save({"a": torch.arange(6.0)}, file)
    claimed = rewritten(file, file.with_suffix(".odd"), lambda n, d: d.replace(b"cpuq\x06K\x06", b"cpuq\x06K\x05"))
    picked = read_pickled(claimed)
    with pytest.raises(CheckpointError, match="expected bytes 0 to 24 of its storage, found a storage of 20"):
        picked.locate(leaves_of(picked.root))


HALF = b"X\x03\x00\x00\x00\xed\xb2\x80"  # "\udc80", as Python's pickles keep it
LINE = b"V\\udc80\n"


@pytest.mark.parametrize("half", [HALF, LINE, b"X\x01\x00\x10\x00" + b"n" * 0x100001], ids=["", "line", "too long"])
def test_a_name_that_is_no_text_is_refused(file: Path, half: bytes) -> None:
    """It would be lost, or escaped and then perhaps be the name of another."""
    with pytest.raises(CheckpointError, match="a name that is too long, or no text"):
        read_pickled(pickle_in_zip(file, b"\x80\x02}(" + half + b"K\x01X\x06\x00\x00\x00\\udc80K\x02u."))


def test_a_value_that_is_no_text_is_passed_over(tmp_path: Path) -> None:
    values = {"weight": torch.ones(3), "caf\xe9": "caf\udce9", "args": ["\ud800", "x"]}
    path = save(values, tmp_path / "a.pt")
    picked = read_pickled(path)
    assert list(leaves_of(picked.root)) == ["weight"]
    assert "caf\xe9" in picked.root
    check(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_ambiguous_zips_are_refused(tmp_path: Path) -> None:
    file = save({"a": torch.arange(4.0)}, tmp_path / "a.pt")
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("a/data/0", bytes(16))
    with pytest.raises(CheckpointError, match=r"expected each record once, found 'a/data/0' several times"):
        read_pickled(file)
    file = save({"a": torch.arange(4.0)}, tmp_path / "a.pt")
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("b/data.pkl", b"N.")
    with pytest.raises(CheckpointError, match=r"expected one data\.pkl, found 2"):
        read_pickled(file)


def test_a_zip_with_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"PK\x03\x04" + bytes(30) + b"PK\x05\x06" + bytes(18))
    with pytest.raises(UnsupportedError, match=r"a\.pt: .*a zip of other things \(nothing\)"):
        read_pickled(tmp_path / "a.pt")


def test_overlapping_records_are_refused(tmp_path: Path) -> None:
    file = save({"a": torch.arange(4.0)}, tmp_path / "a.pt")
    raw = bytearray(file.read_bytes())
    at = raw.index(b"PK\x01\x02")
    raw[at + 20 : at + 28] = struct.pack("<II", 5000, 5000)
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match="over what follows"):
        read_pickled(file)


def test_encrypted_records_are_refused(tmp_path: Path) -> None:
    file = save({"a": torch.arange(4.0)}, tmp_path / "a.pt")
    raw = bytearray(file.read_bytes())
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    file.write_bytes(raw)
    with pytest.raises(UnsupportedError, match="encrypted"):
        read_pickled(file)


def test_legacy_counts_must_agree(tmp_path: Path) -> None:
    file = save({"a": torch.arange(4.0), "b": torch.arange(5.0)}, tmp_path / "a.pt", legacy=True)
    entries = check(file)
    raw = bytearray(file.read_bytes())
    raw[entries["b"].offset - 8] += 1
    file.write_bytes(raw)
    picked = read_pickled(file)
    leaves = leaves_of(picked.root)
    picked.locate({"a": leaves["a"]})
    with pytest.raises(CheckpointError, match=r"expected 5 elements of float32, found 6"):
        picked.locate({"b": leaves["b"]})
    file.write_bytes(raw[:-1])
    with pytest.raises(CheckpointError, match=r"truncated: expected \d+ bytes by the sizes of its 2 storages"):
        read_pickled(file)


def test_a_legacy_file_with_views_of_storages(file: Path) -> None:
    """Very old files name a part of a storage, in elements: torch writes none today and reads them."""
    whole = save({"a": torch.arange(9.0)}, file, legacy=True).read_bytes()
    # The part of elements 2 to 7: the tensor of nine becomes one of five.
    before, after = b"NtQK\x00K\t\x85", b"X\x01\x00\x00\x00vK\x02K\x05\x87tQK\x00K\x05\x85"
    cleaned = b"".join(whole.split(b"q\x08")) if before not in whole else whole
    at = cleaned.find(b"Nt")
    end = cleaned.index(b"K\t\x85", at) + 3
    middle = cleaned[at:end]
    assert middle.startswith(b"Nt")
    file.write_bytes(cleaned[:at] + after + cleaned[end:])
    assert check(file)["a"].nbytes == 20


def test_a_file_that_changed_since_is_refused(tmp_path: Path) -> None:
    file = save({"a": torch.arange(4.0)}, tmp_path / "a.pt")
    picked = read_pickled(file)
    with file.open("ab") as f:
        f.write(b"more")
    with pytest.raises(CheckpointError, match="written since"):
        picked.locate(leaves_of(picked.root))


@BOTH
def test_truncated_anywhere_is_an_error_that_names_the_file(legacy: bool, tmp_path: Path) -> None:
    whole = save({"a": torch.arange(6.0), "n": np.ones(2)}, tmp_path / "a.pt", legacy).read_bytes()
    file = tmp_path / "cut.pt"
    for n in range(0, len(whole), 1 if legacy else 7):
        file.write_bytes(whole[:n])
        with pytest.raises((CheckpointError, UnsupportedError), match=r"cut\.pt"):
            read_pickled(file)


# What else a file may be


def test_torchscript_and_programs_are_named(tmp_path: Path) -> None:
    file = tmp_path / "a.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(file))
    with pytest.raises(UnsupportedError, match=r"TorchScript.*torch\.jit\.load reads it: load it there"):
        read_pickled(file)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["x/archive_format", "x/models/model.json"], "torch.export"),
        (["x/.data/extern_modules", "x/code.py"], "torch.package"),
        (["config.json", "model.weights.h5"], "Keras"),
        (["a.npy", "b.npy"], "numpy"),
        (["readme.txt"], r"a zip of other things \(readme.txt\)"),
    ],
)
def test_zips_of_other_things_are_named(names: list[str], found: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.bin", "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    with pytest.raises(UnsupportedError, match=f"a.bin: expected a file of torch.save, found .*{found}"):
        read_pickled(tmp_path / "a.bin")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b"\n<html><body>404</body></html>", "a web page"),
        (b"Not found: model.bin", "text that begins with 'Not found: model.bin'"),
        (b"\x80\x04\x95\x03\x00\x00\x00\x00\x00\x00\x00]q\x00.", "a plain pickle, as pickle.dump or joblib write"),
        (b"\x80\x02K\x01.", "a plain pickle"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"\x93NUMPY\x01\x00", "numpy"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"GGUF\x03\x00\x00\x00", "GGUF"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00{}", r"safetensors file by its header; name it \*.safetensors"),
        (b"storages".ljust(257, b"\0") + b"ustar  \x00".ljust(255, b"\0"), "tar"),
        (bytes(100), "bytes that begin with 00 00"),
        (b"\x80", "bytes that begin with 80"),
    ],
)
def test_files_of_other_kinds_are_named(content: bytes, found: str, file: Path) -> None:
    file.write_bytes(content)
    with pytest.raises((CheckpointError, UnsupportedError), match=rf"weights\.pth: expected .*{found}"):
        read_pickled(file)


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.pt")
    for path in (tmp_path, tmp_path / "fifo.pt", Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="expected a regular file"):
            read_pickled(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_pickled(tmp_path / "missing.pt")
