"""Headers and indexes made to do harm: every way in ends in a load or in a refusal, in little time and memory."""

from __future__ import annotations

import json
import os
import struct
import sys
import unicodedata
from pathlib import Path

import pytest
from hostile_ways import ENTRY, KINDS, LIBRARY, SOUND, WAYS, folder_of, one, refused, safetensors, special, tried

from lowmem import CheckpointError, inspect
from lowmem.checkpoint.safetensors import MAX_HEADER

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="memory and kinds of files are looked at as Linux has them"
)

INDEX = "model.safetensors.index.json"
# Looks, and does not make tensors of it: for cases that differ only in how much there is to look at.
LOOKS = ("inspect", "plan", "lowmem check")
DEEP = 100_000

HEADERS: dict[str, bytes] = {
    "a length of 2**63": safetensors({}, b"", 2**63),
    "a length of 2**64 - 1": safetensors({}, b"", 2**64 - 1),
    "a length of one more than the most": safetensors({}, b"", MAX_HEADER + 1),
    "a length of nothing": safetensors({}, b"", 0),
    "lists in lists": safetensors(b"[" * DEEP, b""),
    "tables in tables": safetensors(b'{"a":' * DEEP + b"1" + b"}" * DEEP, b""),
    "depth in the metadata": safetensors(b'{"__metadata__":' + b'{"a":' * DEEP + b"1" + b"}" * (DEEP + 1), b""),
    "depth in a shape": safetensors(b'{"a":{"shape":' + b"[" * DEEP + b"]" * DEEP + b"}}", b""),
    "a number of 100,000 digits": safetensors(b'{"a":{"dtype":"F32","shape":[' + b"9" * DEEP + b"]}}"),
    "a number of 4,000 digits": safetensors(
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 4000 + b'],"data_offsets":[0,36]}}'
    ),
    "NaN": safetensors(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,36]}}'),
    "Infinity": safetensors(b'{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,36]}}'),
    "1e999": safetensors(b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,36]}}'),
    "a tensor twice": safetensors(b'{"a":%s,"a":%s}' % ((json.dumps({**ENTRY, "shape": [9]}).encode(),) * 2)),
    "a byte order mark": safetensors(b"\xef\xbb\xbf" + json.dumps(SOUND).encode()),
    "UTF-16": safetensors(json.dumps(SOUND).encode("utf-16")),
    "half a surrogate pair": safetensors(b'{"\\ud800":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'),
    "half a surrogate pair in the metadata": safetensors(b'{"__metadata__":{"a":"\\udfff"}}', b""),
    "no object": safetensors(b"null", b""),
    "elements of 2**64": safetensors(one(shape=[2**32, 2**32])),
    "elements of 2**65": safetensors(one(shape=[2**62, 2, 4])),
    "bytes of 2**64": safetensors(one(shape=[2**62])),
    "two sizes below zero": safetensors(one(shape=[-2, -3])),
    "offsets below zero": safetensors(one(data_offsets=[-24, 0])),
    "offsets of 2**64": safetensors(one(data_offsets=[0, 2**64])),
    "data behind the end": safetensors(one(shape=[2**40], data_offsets=[0, 2**42])),
    "a shape of true": safetensors(one(shape=[True, 6])),
    "a dtype of a megabyte": safetensors(one(dtype="x" * 10**6)),
    "a name of five megabytes": safetensors({"a" * 5_000_000: {**ENTRY, "shape": [9], "data_offsets": [0, 36]}}),
    "a key of the metadata of five megabytes, and no text": safetensors({"__metadata__": {"a" * 5_000_000: 1}}, b""),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie_are_refused(name: str, tmp_path: Path) -> None:
    refused_but_checked(folder_of(tmp_path, HEADERS[name]), "model.safetensors")


def refused_but_checked(source: Path, match: str, ways: tuple[str, ...] = WAYS) -> None:
    """Refused by every way but `check`, which reports it."""
    refused(source, match, ways=[way for way in ways if way != "check"], model="linear")
    came = tried(source, ways=["check"])["check"]
    assert "fine" not in came["outcome"] or "[]" not in came["text"], came


SHAPES = {
    "a zero before what overflows": one(shape=[0, *[2**62] * 50], data_offsets=[0, 0]),
    "a zero behind what overflows": one(shape=[2**62, 0], data_offsets=[0, 0]),
    "100,000 sizes": one(shape=[*[1] * 100_000, 6]),
    "65 sizes": one(shape=[*[1] * 64, 6]),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_that_no_tensor_has_are_loaded_or_refused(name: str, tmp_path: Path) -> None:
    """What holds no bytes may be believed; what would fill every message with sizes is refused."""
    table = SHAPES[name]
    folder = folder_of(tmp_path, safetensors(table, bytes(table["weight"]["data_offsets"][1])))
    if name.endswith(" sizes"):
        refused_but_checked(folder, "at most 64 sizes")
    else:
        tried(folder, model="linear")


def test_a_million_tensors_of_nothing_are_refused_before_they_are_made(tmp_path: Path) -> None:
    """They would take fifteen times the bytes of their header."""
    each = b",".join(b'"a%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(1_000_000))
    folder_of(tmp_path, safetensors(b"{" + each + b"}", b""))
    refused(tmp_path, "bytes of memory to decode it", ways=LOOKS)


def test_a_header_may_take_as_much_memory_as_its_file_has_bytes(tmp_path: Path) -> None:
    """As many tensors that hold something are no attack: what they take is little beside what they hold."""
    count = 100_000
    each = b",".join(b'"a%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(count))
    header = b"{" + each + b',"b":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (1 << 30, 1 << 30)
    file = folder_of(tmp_path, safetensors(header, b"")) / "model.safetensors"
    with pytest.raises(CheckpointError, match="bytes of memory"):
        inspect(folder_of(tmp_path / "small", safetensors(b"{" + each + b"}", b"")))
    os.truncate(file, file.stat().st_size + (1 << 30))
    assert len(inspect(file)) == count + 1


@pytest.mark.parametrize(
    "raw",
    [b"[" + b"[]," * 10_000_000 + b"0]", b"{" + b",".join(b'"%d":{}' % i for i in range(1_000_000)) + b"}"],
    ids=["lists", "tables"],
)
def test_json_that_swells_is_refused_before_it_is_decoded(raw: bytes, tmp_path: Path) -> None:
    """Ten million empty lists are 30 MB of text and 770 MB of memory."""
    refused(folder_of(tmp_path / "header", safetensors(raw, b"")), "bytes of memory to decode it", ways=LOOKS)
    refused(folder_of(tmp_path / "index", raw, INDEX), "bytes of memory to decode it", ways=LOOKS)


def test_a_header_of_the_greatest_length_is_weighed_before_it_is_decoded(tmp_path: Path) -> None:
    """A name of 100 MB would be in memory as bytes, as text, and as a name."""
    name = b'{"' + b"a" * (MAX_HEADER - 70) + b'":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'
    refused(folder_of(tmp_path, safetensors(name.ljust(MAX_HEADER))), "of memory to decode it", ways=LOOKS)
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", MAX_HEADER))
    os.truncate(file, 8 + MAX_HEADER)
    with pytest.raises(CheckpointError, match="of memory to decode it"):
        inspect(tmp_path)


# Files that are none


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_another_kind_are_refused(kind: str, tmp_path: Path) -> None:
    file = special(tmp_path / "model.safetensors", kind)
    refused(tmp_path, "", ways=[way for way in WAYS if way != "check"], model="linear")
    refused(file, "", ways=LIBRARY[2:], model="linear")


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_of_another_kind_is_refused(kind: str, tmp_path: Path) -> None:
    folder_of(tmp_path, safetensors(SOUND), "a.safetensors")
    special(tmp_path / INDEX, kind)
    came = tried(tmp_path, model="linear")
    if kind == "folder":
        return  # a name like any other, and the weights beside it are whole
    assert came["load"]["outcome"] == "refused"


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_of_another_kind_is_refused(kind: str, tmp_path: Path) -> None:
    special(tmp_path / "a.safetensors", kind)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"weight": "a.safetensors"}}))
    refused_but_checked(tmp_path, "a.safetensors")


# Indexes

NAMES = {
    "a device": "/dev/zero",
    "above": "../other/a.safetensors",
    "above from below": "sub/../../a.safetensors",
    "absolute": "/etc/passwd",
    "nothing": "",
    "itself": ".",
    "NUL": "a\0.safetensors",
    "five kilobytes": "a" * 5000,
    "five megabytes": "a" * 5_000_000,
    "an escape": "\x1b]52;c;aGk=\x07\x9b31m\u202e\n.safetensors",
    "other case": "A.SAFETENSORS",
    "a lookalike": "\u0430.safetensors",
    "the other form of unicode": unicodedata.normalize("NFD", "\u00e9.safetensors"),
    "reserved elsewhere": "CON",
    "reserved elsewhere, with a suffix": "nul.safetensors",
    "the other slash": "..\\..\\a.safetensors",
    "a stream of a file": "a.safetensors::$DATA",
    "half a surrogate pair": "\ud800.safetensors",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_shard_is_only_what_lies_in_the_folder_under_exactly_that_name(name: str, tmp_path: Path) -> None:
    """Neither a file outside nor one of a similar name stands for it."""
    folder = folder_of(tmp_path / "model", safetensors(SOUND), "a.safetensors")
    folder_of(tmp_path / "other", safetensors(SOUND), "a.safetensors")
    (folder / "\u00e9.safetensors").write_bytes(safetensors(SOUND))
    (folder / INDEX).write_text(json.dumps({"weight_map": {"weight": NAMES[name], "bias": "a.safetensors"}}))
    refused_but_checked(folder, "")


INDEXES: dict[str, bytes] = {
    "depth": b'{"weight_map":' * DEEP + b"1" + b"}" * DEEP,
    "a long number": b'{"weight_map":' + b"9" * 5000 + b"}",
    "NaN": b'{"weight_map":{"weight":"a.safetensors"},"metadata":{"total_size":NaN}}',
    "1e999": b'{"weight_map":1e999}',
    "a key twice": b'{"weight_map":{"weight":"a.safetensors","weight":"a.safetensors"}}',
    "a byte order mark": b'\xef\xbb\xbf{"weight_map":{"weight":"a.safetensors"}}',
    "UTF-16": '{"weight_map":{"weight":"a.safetensors"}}'.encode("utf-16"),
    "half a surrogate pair": b'{"weight_map":{"\\ud800":"a.safetensors"}}',
    "nothing": b"",
    "zeros": bytes(1000),
    "numbers for names": b'{"weight_map":{"weight":1}}',
    "a name of a megabyte": json.dumps({"weight_map": {"w" * 10**6: "a.safetensors"}}).encode(),
}


@pytest.mark.parametrize("name", INDEXES)
def test_indexes_that_are_none_are_refused(name: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, safetensors(SOUND), "a.safetensors")
    (folder / INDEX).write_bytes(INDEXES[name])
    refused_but_checked(folder, INDEX)


@pytest.mark.parametrize("size", [b"1e300", b"-1", b"9" * 4000, b'"\\u001b[2J"', b'"' + b"x" * 10**6 + b'"', b"[[]]"])
def test_a_total_size_may_be_anything(size: bytes, tmp_path: Path) -> None:
    """It is said in a warning at most."""
    folder = folder_of(tmp_path, safetensors(SOUND), "a.safetensors")
    names = b'"weight_map":{"weight":"a.safetensors","bias":"a.safetensors"}'
    (folder / INDEX).write_bytes(b'{"metadata":{"total_size":%s},%s}' % (size, names))
    for way, came in tried(folder, model="linear").items():
        assert came["outcome"] == "fine", (way, came)


def test_what_is_sound_is_loaded_by_every_way(tmp_path: Path) -> None:
    """Else it would mean nothing that all the others are refused."""
    for way, came in tried(folder_of(tmp_path, safetensors(SOUND)), model="linear").items():
        assert came["outcome"] == "fine", (way, came)
