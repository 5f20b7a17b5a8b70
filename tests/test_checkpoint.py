"""Inspecting agrees with safetensors' own reader on what is sound, and refuses the rest with a message that helps."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from lowmem import (
    Checkpoint,
    CheckpointError,
    LowmemError,
    SourceError,
    TensorEntry,
    UnsupportedError,
    inspect,
)
from lowmem.checkpoint.safetensors import ALIGNMENT, MAX_HEADER, layout
from lowmem.dtypes import NOT_IN_TORCH, SAFETENSORS_DTYPES, SAFETENSORS_NAMES

TORCH_DTYPES = sorted(SAFETENSORS_NAMES.keys() - NOT_IN_TORCH)
F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def f32(**changes: Any) -> dict[str, Any]:
    return {**F32, **changes}


def prefixed(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


def write(file: Path, header: Any, data: bytes = b"") -> Path:
    """A safetensors file with any header: a table, or text or bytes as they are."""
    if not isinstance(header, (str, bytes)):
        header = json.dumps(header, separators=(",", ":"))
    text = header.encode() if isinstance(header, str) else header
    file.write_bytes(prefixed(text) + data)
    return file


def write_tensors(file: Path, *keys: str) -> Path:
    """A sound file with one F32 tensor of one element for each key."""
    table = {key: f32(data_offsets=[4 * i, 4 * i + 4]) for i, key in enumerate(keys)}
    return write(file, table, bytes(4 * len(keys)))


def write_index(folder: Path, weight_map: Any, **rest: Any) -> Path:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({**rest, "weight_map": weight_map}))
    return index


def zeros(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Counting bytes in disguise: neither float4 nor float8_e8m0 can be filled in any other way."""
    kind = getattr(torch, dtype)
    count = torch.Size(shape).numel() * kind.itemsize
    return (torch.arange(count) % 251).to(torch.uint8).view(kind).reshape(shape)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).tolist())


def on_disk(entry: TensorEntry) -> bytes:
    with entry.file.open("rb") as f:
        f.seek(entry.offset)
        return f.read(entry.nbytes)


def reference(file: Path) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    """key → (torch's dtype, shape) as safetensors reads them; None when it refuses the file."""
    try:
        with safe_open(file, "pt") as f:
            slices = {key: f.get_slice(key) for key in f.keys()}  # noqa: SIM118
            found = {key: (s.get_dtype(), s.get_shape()) for key, s in slices.items()}
    except Exception:
        return None
    return {
        key: (SAFETENSORS_DTYPES[name][0], (*shape[:-1], shape[-1] // 2) if name == "F4" else tuple(shape))
        for key, (name, shape) in found.items()
    }


def assert_equal_to_reader(file: Path) -> Checkpoint:
    found = inspect(file)
    with safe_open(file, "pt") as f:
        stored, metadata = set(f.keys()), f.metadata() or {}
        # Metadata that says what save_model says of tensors that share memory: the name left out, the name kept.
        sharing = {name: key for name, key in metadata.items() if key in stored and name not in stored}
        assert set(found) == stored | set(sharing)
        assert dict(found.shards[0].metadata) == metadata
        for key, entry in found.items():
            tensor = f.get_tensor(sharing.get(key, key))
            assert str(tensor.dtype) == f"torch.{entry.dtype}"
            assert tuple(tensor.shape) == entry.shape
            assert on_disk(entry) == bytes_of(tensor)
    return found


def refused(source: object, *words: str, error: type[LowmemError] = CheckpointError) -> str:
    """The message of the refusal, which names all of `words`."""
    with pytest.raises(error) as caught:
        inspect(source)  # type: ignore[arg-type]
    message = str(caught.value)
    for word in words:
        assert word in message
    assert len(message) < 2000
    return message


def skip_if_readable(file: Path) -> None:
    if os.access(file, os.R_OK):
        pytest.skip("root may read everything")


class TestAgreement:
    @pytest.mark.parametrize("dtype", TORCH_DTYPES)
    def test_every_dtype_reads_as_safetensors_reads_it(self, dtype: str, tmp_path: Path) -> None:
        tensors = {"matrix": zeros(dtype, (3, 4)), "empty": zeros(dtype, (0, 6)), "deep": zeros(dtype, (2, 1, 3, 2))}
        if dtype != "float4_e2m1fn_x2":  # safetensors writes no half of a pair
            tensors["scalar"] = zeros(dtype, ())
        save_file(tensors, tmp_path / "x.safetensors")
        assert len(assert_equal_to_reader(tmp_path / "x.safetensors")) == len(tensors)

    def test_all_dtypes_in_one_file_with_metadata(self, tmp_path: Path) -> None:
        tensors = {f"layer.{name}": zeros(name, (5, 2)) for name in TORCH_DTYPES}
        save_file(tensors, tmp_path / "x.safetensors", {"format": "pt", "ключ": "значение"})
        found = assert_equal_to_reader(tmp_path / "x.safetensors")
        assert found.nbytes == sum(t.nbytes for t in tensors.values())
        assert found.dtypes() == {name: (1, t.nbytes) for name, t in zip(TORCH_DTYPES, tensors.values(), strict=True)}
        assert list(found) == sorted(found, key=lambda key: found[key].offset)

    def test_no_dtype_that_safetensors_knows_is_unknown(self, tmp_path: Path) -> None:
        """The reference reader lists its dtypes when it meets a wrong one."""
        file = write(tmp_path / "x.safetensors", {"a": f32(dtype="F1")}, bytes(4))
        with pytest.raises(Exception, match="unknown variant") as caught, safe_open(file, "pt"):
            pass
        known = re.findall(r"`(\w+)`", str(caught.value).partition("expected one of")[2])
        assert set(known) <= set(SAFETENSORS_DTYPES)
        assert len(known) >= 20

    def test_tensors_come_in_file_order_whatever_the_order_of_the_header(self, tmp_path: Path) -> None:
        table = {"late": f32(data_offsets=[4, 8]), "none": f32(shape=[0], data_offsets=[4, 4]), "early": f32()}
        write(tmp_path / "x.safetensors", table, b"abcdefgh")
        assert list(assert_equal_to_reader(tmp_path / "x.safetensors")) == ["early", "none", "late"]

    @pytest.mark.parametrize("name", ["F6_E2M3", "F6_E3M2"])
    def test_float6_can_be_inspected_though_torch_has_none(self, name: str, tmp_path: Path) -> None:
        table = {"a": {"dtype": name, "shape": [2, 4], "data_offsets": [0, 6]}}
        file = write(tmp_path / "x.safetensors", table, b"abcdef")
        entry = inspect(file)["a"]
        assert reference(file) == {"a": (entry.dtype, entry.shape)}
        assert (entry.dtype, entry.shape) == (name.lower().replace("f6", "float6"), (2, 4))
        assert on_disk(entry) == b"abcdef"

    def test_a_file_without_tensors_is_an_empty_checkpoint(self, tmp_path: Path) -> None:
        save_file({}, tmp_path / "x.safetensors")
        assert len(assert_equal_to_reader(tmp_path / "x.safetensors")) == 0

    def test_fields_of_a_later_format_are_passed_over(self, tmp_path: Path) -> None:
        file = write(tmp_path / "x.safetensors", {"a": f32(checksum="00")}, bytes(4))
        assert reference(file) == {"a": ("float32", (1,))}
        assert inspect(file)["a"].shape == (1,)

    def test_a_checkpoint_is_a_mapping_that_cannot_be_written(self, tmp_path: Path) -> None:
        found = inspect(write_tensors(tmp_path / "x.safetensors", "a", "b"))
        assert (len(found), list(found), "a" in found, "c" in found) == (2, ["a", "b"], True, False)
        with pytest.raises(KeyError):
            found["c"]
        with pytest.raises(TypeError):
            found["c"] = found["a"]  # type: ignore[index]
        with pytest.raises(AttributeError):
            found["a"].offset = 0  # type: ignore[misc]
        assert found["a"].end == found["b"].offset

    def test_it_can_be_told_as_json(self, tmp_path: Path) -> None:
        write_tensors(tmp_path / "s.safetensors", "a", "b")
        write_index(tmp_path, {"a": "s.safetensors", "b": "s.safetensors"}, metadata={"total_size": 8})
        (tmp_path / "config.json").write_text("{}")
        told = json.loads(json.dumps(inspect(tmp_path).to_dict()))
        assert (told["bytes"], told["index"], told["config"]) == (8, "model.safetensors.index.json", "config.json")
        assert told["dtypes"] == {"float32": {"tensors": 2, "bytes": 8}}
        assert [(s["file"], s["tensors"]) for s in told["shards"]] == [("s.safetensors", 2)]
        assert told["tensors"]["b"]["bytes"] == 4
        assert told["warnings"] == []


class TestSources:
    def test_index_folder_and_index_file_mean_the_same(self, tmp_path: Path) -> None:
        write_tensors(tmp_path / "model-00001-of-00002.safetensors", "a")
        write_tensors(tmp_path / "model-00002-of-00002.safetensors", "b", "c")
        index = write_index(
            tmp_path,
            {"c": "model-00002-of-00002.safetensors", "a": "model-00001-of-00002.safetensors"}
            | {"b": "model-00002-of-00002.safetensors"},
            metadata={"total_size": 12},
        )
        for source in (tmp_path, str(tmp_path), os.fsencode(tmp_path), index):
            found = inspect(source)  # type: ignore[arg-type]
            assert list(found) == ["a", "b", "c"]
            assert [found[key].file.name[6:11] for key in found] == ["00001", "00002", "00002"]
            assert [shard.file.name[6:11] for shard in found.shards] == ["00001", "00002"]
            assert (found.index, found.folder, found.warnings) == (index, tmp_path, ())

    def test_a_single_file_and_the_folder_of_one_file(self, tmp_path: Path) -> None:
        file = write_tensors(tmp_path / "weights.safetensors", "a")
        for source in (tmp_path, file):
            found = inspect(source)
            assert (list(found), found["a"].file, found.index, found.warnings) == (["a"], file, None, ())

    def test_the_shards_of_an_index_may_lie_in_a_folder_below(self, tmp_path: Path) -> None:
        (tmp_path / "sub").mkdir()
        file = write_tensors(tmp_path / "sub" / "s.safetensors", "a")
        write_index(tmp_path, {"a": "sub/s.safetensors"})
        assert inspect(tmp_path)["a"].file == file

    def test_a_whole_numbered_set_needs_no_index(self, tmp_path: Path) -> None:
        for i in (1, 2, 3):
            write_tensors(tmp_path / f"model-0000{i}-of-00003.safetensors", f"key{i}")
        found = inspect(tmp_path)
        assert list(found) == ["key1", "key2", "key3"]
        assert found.warnings == (
            "no index beside model-00001-of-00003.safetensors: the shards' own headers were believed",
        )

    @pytest.mark.parametrize(
        "names",
        [
            ["model-00001-of-00003", "model-00003-of-00003"],
            ["model-00001-of-00002"],
            ["model-00001-of-00002", "model-00002-of-00003"],
            ["model-00001-of-00002", "other-00002-of-00002"],
            ["model-00000-of-00002", "model-00001-of-00002"],
            ["model-00001-of-999999999999999"],
        ],
    )
    def test_numbered_shards_that_are_not_one_whole_set_are_refused(self, names: list[str], tmp_path: Path) -> None:
        for i, name in enumerate(names):
            write_tensors(tmp_path / f"{name}.safetensors", f"key{i}")
        refused(tmp_path, str(tmp_path), "not one whole set", *names, "bring the index", error=SourceError)

    def test_a_key_in_two_shards_of_a_numbered_set_is_refused(self, tmp_path: Path) -> None:
        write_tensors(tmp_path / "model-00001-of-00002.safetensors", "a", "b")
        write_tensors(tmp_path / "model-00002-of-00002.safetensors", "b")
        refused(tmp_path, "00002-of-00002", "'b'", "expected in one shard", "also in model-00001-of", "remove")

    def test_model_is_preferred_and_what_lies_beside_is_said(self, tmp_path: Path) -> None:
        write_tensors(tmp_path / "model.safetensors", "a")
        write_tensors(tmp_path / "adapter.safetensors", "b")
        found = inspect(tmp_path)
        assert list(found) == ["a"]
        assert found.warnings == ("adapter.safetensors: beside model.safetensors, which was believed",)

    def test_several_candidates_are_listed(self, tmp_path: Path) -> None:
        write_tensors(tmp_path / "one.safetensors", "a")
        write_tensors(tmp_path / "two.safetensors", "a")
        refused(
            tmp_path, str(tmp_path), "several weight files", "one.safetensors, two.safetensors", "give the path",
            error=SourceError,
        )  # fmt: skip

    def test_several_indexes_are_listed_unless_one_is_the_model(self, tmp_path: Path) -> None:
        write_tensors(tmp_path / "s.safetensors", "a")
        for name in ("a", "b"):
            (tmp_path / f"{name}.safetensors.index.json").write_text('{"weight_map": {"a": "s.safetensors"}}')
        refused(tmp_path, "several indexes", "a.safetensors.index.json, b.saf", "give the path", error=SourceError)
        index = write_index(tmp_path, {"a": "s.safetensors"})
        assert inspect(tmp_path).index == index

    @pytest.mark.parametrize("names", [[], ["config.json"], ["README.md", "tokenizer.json"]])
    def test_a_folder_without_weights_is_refused(self, names: list[str], tmp_path: Path) -> None:
        for name in names:
            (tmp_path / name).write_text("{}")
        refused(tmp_path, str(tmp_path), "no .safetensors file, no pickled weights", "no index", error=SourceError)

    @pytest.mark.parametrize("name", ["config.json", "notes.txt"])
    def test_a_file_of_another_kind_is_refused(self, name: str, tmp_path: Path) -> None:
        (tmp_path / name).write_text("{}")
        refused(tmp_path / name, name, ".safetensors", error=SourceError)

    @pytest.mark.parametrize("source", ["missing", "", "a" * 5000, "~no-such-user-here/x", "nul\0byte", None, 3, b"no"])
    def test_a_source_that_leads_nowhere_is_refused(
        self, source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        write_tensors(tmp_path / "model.safetensors", "a")
        with pytest.raises(SourceError):
            inspect(source)

    def test_a_home_folder_is_expanded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        write_tensors(tmp_path / "x.safetensors", "a")
        assert list(inspect("~/x.safetensors")) == ["a"]


class TestIndex:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """Two shards and their index, all sound; the tests do one thing to it."""
        folder = tmp_path / "model"
        folder.mkdir()
        write_tensors(folder / "one.safetensors", "a", "b")
        write_tensors(folder / "two.safetensors", "c")
        write_index(folder, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"})
        assert inspect(folder).warnings == ()
        return folder

    def test_missing_shard(self, folder: Path) -> None:
        (folder / "two.safetensors").unlink()
        refused(folder, "index.json", "'c'", "expected in 'two.safetensors'", "missing in", "download it again")

    def test_truncated_shard(self, folder: Path) -> None:
        shard = folder / "one.safetensors"
        os.truncate(shard, shard.stat().st_size - 3)
        size = shard.stat().st_size
        refused(folder, str(shard), "truncated", "'b'", f"expected {size + 3} bytes", f"found {size}", "download")

    def test_shard_cut_inside_its_header(self, folder: Path) -> None:
        os.truncate(folder / "one.safetensors", 40)
        refused(folder, "one.safetensors", "header claims", "has 40", "download it again")

    def test_key_in_another_shard(self, folder: Path) -> None:
        write_index(folder, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
        refused(folder, "index.json", "'b'", "expected in two.safetensors", "found in one.safetensors", "bring the")

    def test_key_nowhere(self, folder: Path) -> None:
        write_index(folder, {"a": "one.safetensors", "z": "one.safetensors", "c": "two.safetensors"})
        refused(folder, "one.safetensors", "'z'", "expected here", "found in no shard", "bring the matching index")

    def test_key_in_two_shards(self, folder: Path) -> None:
        write_tensors(folder / "two.safetensors", "c", "a")
        refused(folder, "two.safetensors", "'a'", "expected in one shard", "also in one.safetensors", "remove")

    def test_key_twice_in_the_index(self, folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "two.safetensors", "a": "one.safetensors"}}'
        )
        refused(folder, "index.json", "'a' appears twice", "download it again")

    @pytest.mark.parametrize("name", ["../out.safetensors", "sub/../../out.safetensors", "..", "/out.safetensors", ""])
    def test_a_name_that_leaves_the_folder(self, name: str, folder: Path) -> None:
        write_tensors(folder.parent / "out.safetensors", "a")
        if name.startswith("/"):
            name = str(folder.parent / name[1:])
        write_index(folder, {"a": name})
        refused(folder, "index.json", "'a'", f"expected a file inside {folder}", f"found {name[:20]!r}"[:20], "bring")

    @pytest.mark.parametrize("name", ["nul\0byte", "\ud800", "n" * 300])
    def test_a_name_that_no_file_can_have(self, name: str, folder: Path) -> None:
        write_index(folder, {"a": name})
        refused(folder, "index.json")

    def test_link_out_of_the_folder(self, folder: Path) -> None:
        target = write_tensors(folder.parent / "out.safetensors", "c")
        (folder / "two.safetensors").unlink()
        (folder / "two.safetensors").symlink_to(target)
        refused(
            folder, "two.safetensors", "'c'", "inside", f"found a link to {target.resolve()}", "put the file itself"
        )

    def test_link_of_a_folder_out_of_the_folder(self, folder: Path) -> None:
        outside = folder.parent / "outside"
        outside.mkdir()
        write_tensors(outside / "s.safetensors", "a")
        (folder / "sub").symlink_to(outside)
        write_index(folder, {"a": "sub/s.safetensors"})
        refused(folder, "'a'", "found a link to", "put the file itself")

    def test_link_to_a_device(self, folder: Path) -> None:
        (folder / "two.safetensors").unlink()
        (folder / "two.safetensors").symlink_to("/dev/zero")
        refused(folder, "two.safetensors", "'c'", "found a link to /dev/zero")

    def test_link_inside_the_folder_is_followed(self, folder: Path) -> None:
        (folder / "two.safetensors").rename(folder / "data")
        (folder / "two.safetensors").symlink_to("data")
        assert inspect(folder)["c"].file.name == "two.safetensors"

    def test_a_linked_folder_is_as_good_as_the_folder(self, folder: Path) -> None:
        link = folder.parent / "link"
        link.symlink_to(folder)
        assert list(inspect(link)) == ["a", "b", "c"]

    @pytest.mark.parametrize("target", ["nowhere", "two.safetensors"], ids=["dangling", "loop"])
    def test_link_that_leads_nowhere(self, target: str, folder: Path) -> None:
        (folder / "two.safetensors").unlink()
        (folder / "two.safetensors").symlink_to(target)
        refused(folder, "two.safetensors", "'c'", "expected a file", "a link that leads nowhere", "download it again")

    @pytest.mark.parametrize("below", [".", "transformer"])
    def test_the_hub_cache_links_to_its_blobs(self, below: str, tmp_path: Path) -> None:
        repo = tmp_path / "models--org--name"
        revision = repo / "snapshots" / "0123abc"
        folder = revision / below
        folder.mkdir(parents=True)
        (repo / "blobs").mkdir()
        write_index(folder, {"a": "s.safetensors"}).rename(repo / "blobs" / "i")
        write_tensors(repo / "blobs" / "y", "a")
        for name, blob in (("model.safetensors.index.json", "i"), ("s.safetensors", "y")):
            (folder / name).symlink_to(os.path.relpath(repo / "blobs" / blob, folder))
        found = inspect(folder)
        assert found["a"].file == folder / "s.safetensors"
        assert found.warnings == ()
        other = tmp_path / "models--org--other" / "blobs"
        other.mkdir(parents=True)
        (folder / "s.safetensors").unlink()
        (folder / "s.safetensors").symlink_to(write_tensors(other / "y", "a"))
        refused(folder, "found a link to", "put the file itself")

    @pytest.mark.timeout(20)
    def test_fifo_instead_of_a_shard_does_not_hang(self, folder: Path) -> None:
        (folder / "two.safetensors").unlink()
        os.mkfifo(folder / "two.safetensors")
        refused(folder, "two.safetensors", "expected a regular file", "found another kind", "give the path")

    @pytest.mark.timeout(20)
    def test_fifo_instead_of_the_index_does_not_hang(self, folder: Path) -> None:
        (folder / "model.safetensors.index.json").unlink()
        os.mkfifo(folder / "model.safetensors.index.json")
        refused(folder, "index.json", "expected a regular file", "found another kind", "download it again")

    def test_directory_instead_of_a_shard(self, folder: Path) -> None:
        (folder / "two.safetensors").unlink()
        (folder / "two.safetensors").mkdir()
        refused(folder, "two.safetensors", "expected a regular file", "found another kind", "give the path")

    def test_device_instead_of_a_single_file(self, tmp_path: Path) -> None:
        (tmp_path / "x.safetensors").symlink_to("/dev/zero")
        refused(tmp_path / "x.safetensors", "x.safetensors", "expected a regular file", "found another kind")

    def test_directory_instead_of_the_index(self, folder: Path) -> None:
        (folder / "model.safetensors.index.json").unlink()
        (folder / "model.safetensors.index.json").mkdir()
        refused(folder, "index.json", "expected a regular file", "found another kind")

    @pytest.mark.parametrize("weight_map", [None, [], "one.safetensors", 3])
    def test_weight_map_that_is_no_map(self, weight_map: Any, folder: Path) -> None:
        write_index(folder, weight_map)
        refused(folder, "index.json", "expected a 'weight_map' of key to file name", "found", "download it again")

    @pytest.mark.parametrize("name", [None, 3, ["one.safetensors"]])
    def test_weight_map_with_a_name_that_is_no_text(self, name: Any, folder: Path) -> None:
        write_index(folder, {"a": "one.safetensors", "b": name})
        refused(folder, "index.json", "'b'", "expected a file name", f"found {name!r}", "download it again")

    @pytest.mark.parametrize("table", [[], {}, None, {"metadata": {}}, {"weight-map": {}}])
    def test_index_without_a_weight_map(self, table: Any, folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps(table))
        refused(folder, "index.json", "expected a 'weight_map'", f"found {table!r}", "download it again")

    def test_empty_weight_map(self, folder: Path) -> None:
        write_index(folder, {})
        refused(folder, "index.json", "expected tensors", "found none", "download it again")

    @pytest.mark.parametrize(
        "raw",
        [b"", b"<html>", b'{"weight_map": {', b"\xff\xfe", b'{"weight_map": {"a": "\xff"}}', b"[" * 200_000, b"NaN"],
    )
    def test_index_that_is_not_json(self, raw: bytes, folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_bytes(raw)
        refused(folder, "index.json", "not valid JSON", "download it again")

    def test_index_too_big(self, folder: Path) -> None:
        os.truncate(folder / "model.safetensors.index.json", MAX_HEADER + 1)
        refused(folder, "index.json", f"at most {MAX_HEADER} bytes", f"found {MAX_HEADER + 1} bytes", "download")

    @pytest.mark.parametrize("claimed", [11, 13, 11.5, 0])
    def test_wrong_total_size_is_a_warning(self, claimed: float, folder: Path) -> None:
        write_index(folder, json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"],
                    metadata={"total_size": claimed})  # fmt: skip
        warnings = (f"the index claims {claimed} bytes, the shards hold 12; the shards were believed",)
        assert inspect(folder).warnings == warnings

    @pytest.mark.parametrize("metadata", [{"total_size": 12}, {"total_size": 12.0}, {"total_size": "?"}, {}, None, []])
    def test_right_or_absent_total_size_is_none(self, metadata: Any, folder: Path) -> None:
        weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        write_index(folder, weight_map, metadata=metadata)
        assert inspect(folder).warnings == ()

    @pytest.mark.parametrize("name", ["model-00001-of-00001.safetensors", "model.safetensors"])
    def test_weights_beside_the_index_are_a_warning(self, name: str, folder: Path) -> None:
        write_tensors(folder / name, "z")
        for source in (folder, folder / "model.safetensors.index.json"):
            found = inspect(source)
            assert list(found) == ["a", "b", "c"]
            assert found.warnings == (f"{name}: beside the index, which does not name it; the index was believed",)

    def test_tensors_that_the_index_does_not_mention_are_used_and_said(self, folder: Path) -> None:
        write_index(folder, {"a": "one.safetensors", "c": "two.safetensors"}, metadata={"total_size": 12})
        found = inspect(folder)
        assert list(found) == ["a", "b", "c"]
        assert found.warnings == ("1 tensors are in the shards but not in the index (b, …); they are used",)


TWO = {"a": f32(), "b": f32(data_offsets=[4, 8])}
# What is wrong with it: header, data, what the message says.
DAMAGED: dict[str, tuple[Any, bytes, list[str]]] = {
    "gap": ({"a": f32(), "b": f32(data_offsets=[5, 9])}, bytes(9), ["'b'", "gap", "expected", "found", "download"]),
    "gap at the start": ({"a": f32(data_offsets=[1, 5])}, bytes(5), ["'a'", "gap", "download"]),
    "overlap": ({"a": f32(), "b": f32(data_offsets=[3, 7])}, bytes(7), ["'b'", "overlaps", "expected", "download"]),
    "same place": ({"a": f32(), "b": f32()}, bytes(4), ["'b'", "overlaps", "expected", "found", "download"]),
    "bytes behind": (TWO, bytes(9), ["behind the last tensor", "expected", "found", "download"]),
    "bytes behind no tensor": ({}, bytes(1), ["behind the last tensor", "download"]),
    "cut": (TWO, bytes(7), ["truncated", "'b'", "expected", "found", "download"]),
    "negative": ({"a": f32(data_offsets=[-4, 0])}, b"", ["'a'", "expected", "[-4, 0]", "download"]),
    "backwards": ({"a": f32(data_offsets=[4, 0])}, bytes(4), ["'a'", "expected", "[4, 0]", "download"]),
    "minus zero": ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}', bytes(4), ["'a'", "-0", "download"]),
    "float": ({"a": f32(data_offsets=[0.0, 4.0])}, bytes(4), ["'a'", "expected", "[0.0, 4.0]", "download"]),
    "bool": ({"a": f32(data_offsets=[False, 4])}, bytes(4), ["'a'", "expected", "[False, 4]", "download"]),
    "text": ({"a": f32(data_offsets=["0", "4"])}, bytes(4), ["'a'", "expected", "['0', '4']", "download"]),
    "three offsets": ({"a": f32(data_offsets=[0, 4, 8])}, bytes(4), ["'a'", "expected", "[0, 4, 8]", "download"]),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, bytes(4), ["'a'", "data_offsets", "download"]),
    "not an entry": ({"a": 3}, b"", ["'a'", "expected dtype, shape and data_offsets", "found 3", "download"]),
    "list as entry": ({"a": ["F32", [1], [0, 4]]}, bytes(4), ["'a'", "expected dtype", "found ['F32'", "download"]),
    "negative shape": ({"a": f32(shape=[-1, -1])}, bytes(4), ["'a'", "[-1, -1]", "download"]),
    "shape of floats": ({"a": f32(shape=[1.0])}, bytes(4), ["'a'", "[1.0]", "download"]),
    "shape of bools": ({"a": f32(shape=[True])}, bytes(4), ["'a'", "[True]", "download"]),
    "shape as object": ({"a": f32(shape={})}, bytes(4), ["'a'", "{}", "download"]),
    "shape as text": ({"a": f32(shape="")}, bytes(4), ["'a'", "''", "download"]),
    "shape beyond 64 bits": ({"a": f32(shape=[2**64])}, bytes(4), ["'a'", "2**63", "download"]),
    "shape product overflows": ({"a": f32(shape=[2**32, 2**32])}, bytes(4), ["'a'", "2**63", "download"]),
    "overflow hidden by zero": ({"a": f32(shape=[2**62, 4, 0], data_offsets=[0, 0])}, b"", ["'a'", "download"]),
    "shape beyond floats": ({"a": f32(shape=[10**300] * 40)}, bytes(4), ["'a'", "download"]),
    "shape of 100,000 large numbers": ({"a": f32(shape=[2**62] * 100_000)}, bytes(4), ["'a'", "download"]),
    "offset beyond text": ({"a": f32(data_offsets=[10**4299, 10**4299 + 4])}, bytes(4), ["'a'", "download"]),
    "too many digits": ('{"a":{"dtype":"F32","shape":[%s]}}' % ("9" * 5000), b"", ["JSON", "digits", "download"]),
    "shape too small": ({"a": f32(shape=[2])}, bytes(4), ["'a'", "needs 8", "hold 4", "download"]),
    "shape too large": ({"a": f32(shape=[0])}, bytes(4), ["'a'", "[0] needs 0", "hold 4", "download"]),
    "unknown dtype": ({"a": f32(dtype="F1")}, bytes(4), ["'a'", "expected one of", "BF16", "dtype 'F1'", "later"]),
    "dtype in lower case": ({"a": f32(dtype="f32")}, bytes(4), ["'a'", "expected one of", "found dtype 'f32'"]),
    "dtype of wrong type": ({"a": f32(dtype=["F32"])}, bytes(4), ["'a'", "expected one of", "found dtype ['F32']"]),
    "half a byte": ({"a": f32(dtype="F6_E2M3", data_offsets=[0, 1])}, bytes(1), ["'a'", "needs 0.75", "hold 1"]),
    "half a pair": ({"a": f32(dtype="F4", shape=[2, 3], data_offsets=[0, 3])}, bytes(3), ["'a'", "even", "[2, 3]"]),
    "metadata not text": ({"__metadata__": {"x": 1}}, b"", ["__metadata__", "text to text", "{'x': 1}", "download"]),
    "metadata not a table": ({"__metadata__": ["x"]}, b"", ["__metadata__", "text to text", "['x']", "download"]),
    "not an object": ([TWO], bytes(8), ["expected a JSON object", "found [{", "not a safetensors file"]),
    "not JSON": ("{'a': 1}", b"", ["not valid JSON", "download"]),
    "empty header": ("", b"", ["not valid JSON", "download"]),
    "NaN": ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":NaN}}', bytes(4), ["JSON", "NaN", "download"]),
    "invalid UTF-8": (b'{"a\xff":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4), ["JSON", "download"]),
    "UTF-16": (json.dumps({"a": f32()}).encode("utf-16-le"), bytes(4), ["JSON", "download"]),
    "byte order mark": (json.dumps({"a": f32()}).encode("utf-8-sig"), bytes(4), ["JSON", "download"]),
    "half a surrogate pair": ({"\ud800": f32()}, bytes(4), ["JSON", "surrogate", "download"]),
    "deep nesting": ("[" * 100_000 + "]" * 100_000, b"", ["JSON", "recursion", "download"]),
    "deep nesting in an entry": ({"a": json.loads("[" * 500 + "]" * 500)}, b"", ["'a'", "expected dtype", "download"]),
    "deep nesting in a dtype": (f'{{"a":{json.dumps(F32).replace(chr(34) + "F32" + chr(34), "[" * 500 + "]" * 500)}}}',
                                bytes(4), ["'a'", "expected one of"]),
    "key twice": (f'{{"a":{json.dumps(F32)},"a":{json.dumps(F32)}}}', bytes(4), ["JSON", "'a' appears twice"]),
    "key twice, once empty": (
        f'{{"a":{json.dumps(f32(shape=[0], data_offsets=[0, 0]))},"a":{json.dumps(F32)}}}',
        bytes(4), ["JSON", "'a' appears twice", "download"],
    ),
    "field twice": ('{"a":{"dtype":"F64","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4), ["'dtype'"]),
}  # fmt: skip


class TestHeader:
    @pytest.mark.parametrize("case", DAMAGED)
    @pytest.mark.timeout(20)
    def test_damage_is_refused_and_explained(self, case: str, tmp_path: Path) -> None:
        header, data, words = DAMAGED[case]
        file = write(tmp_path / "x.safetensors", header, data)
        refused(file, str(file), *words)

    @pytest.mark.parametrize("length", [3, 2**32, 2**63, 2**64 - 1])
    def test_length_that_cannot_be(self, length: int, tmp_path: Path) -> None:
        file = tmp_path / "x.safetensors"
        file.write_bytes(length.to_bytes(8, "little") + b"{}")
        refused(file, str(file), f"header claims {length} bytes", "the file has 10", "download it again")

    def test_length_beyond_the_limit_of_the_reference(self, tmp_path: Path) -> None:
        file = tmp_path / "x.safetensors"
        file.write_bytes((MAX_HEADER + 1).to_bytes(8, "little") + b"{}")
        os.truncate(file, 2 * MAX_HEADER)
        refused(file, f"header claims {MAX_HEADER + 1} bytes", "download it again")

    @pytest.mark.parametrize("size", [0, 1, 7])
    def test_file_too_small_for_a_length(self, size: int, tmp_path: Path) -> None:
        file = tmp_path / "x.safetensors"
        file.write_bytes(bytes(size))
        refused(file, str(file), "expected a safetensors header", f"found a file of {size} bytes", "download it again")

    def test_a_pickle_under_a_wrong_name(self, tmp_path: Path) -> None:
        torch.save({"a": torch.zeros(3)}, tmp_path / "x.safetensors")
        refused(tmp_path, "x.safetensors", "header claims", "not a safetensors file")

    @pytest.mark.parametrize("name", ["s.safetensors", "model.safetensors.index.json"])
    def test_file_that_may_not_be_read(self, name: str, tmp_path: Path) -> None:
        write_tensors(tmp_path / "s.safetensors", "a")
        write_index(tmp_path, {"a": "s.safetensors"})
        (tmp_path / name).chmod(0)
        skip_if_readable(tmp_path / name)
        refused(tmp_path, name, "cannot be read: Permission denied", "permissions")

    @pytest.mark.parametrize("mode", [0o000, 0o400])
    def test_folder_that_may_not_be_searched(self, mode: int, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        folder.mkdir()
        file = write_tensors(folder / "model.safetensors", "a")
        folder.chmod(mode)
        try:
            skip_if_readable(file)
            for source in (folder, file):
                with pytest.raises(LowmemError, match="ermission"):
                    inspect(source)
        finally:
            folder.chmod(0o700)


keys = st.text(max_size=12).filter(lambda key: key != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@st.composite
def tensors(draw: st.DrawFn) -> list[tuple[str, str, tuple[int, ...]]]:
    """(key, dtype, shape) in any order, with any key."""
    names = draw(st.lists(keys, max_size=6, unique=True))
    found = [(key, draw(st.sampled_from(TORCH_DTYPES)), draw(shapes)) for key in names]
    return [(k, d, shape or (1,)) if d == "float4_e2m1fn_x2" else (k, d, shape) for k, d, shape in found]


@pytest.fixture(scope="module")
def file() -> Iterator[Path]:
    """A file to be written again and again by examples."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "x.safetensors"


class TestLayout:
    @settings(deadline=None)
    @given(held=tensors(), metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
    def test_safetensors_reads_what_is_laid_out(
        self, held: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str], file: Path
    ) -> None:
        # What names a tensor is a name for it, which is another test's.
        metadata = {name: text for name, text in metadata.items() if text not in {key for key, _, _ in held}}
        head, spans, size = layout(held, metadata)
        file.write_bytes(head + bytes(i % 251 for i in range(size - len(head))))
        found = assert_equal_to_reader(file)
        entries = [entry for entry in found.values() if entry.key in spans]
        assert [(e.key, e.dtype, e.shape) for e in sorted(entries, key=lambda e: list(spans).index(e.key))] == held
        assert {entry.key: (entry.offset, entry.nbytes) for entry in entries} == spans
        assert found.shards[0].metadata == metadata
        assert found.shards[0].data_offset % ALIGNMENT == 0

    @pytest.mark.parametrize(
        ("dtype", "shape"), [("complex128", (2,)), ("float6_e2m3", (4,)), ("float4_e2m1fn_x2", ()), ("qint8", (2,))]
    )
    def test_what_safetensors_cannot_hold_is_refused(self, dtype: str, shape: tuple[int, ...]) -> None:
        with pytest.raises(UnsupportedError) as caught:
            layout([("a.b", dtype, shape)])
        assert "'a.b'" in str(caught.value)
        assert dtype in str(caught.value)
        assert "cast" in str(caught.value)


NUMBERS = st.one_of(
    st.integers(-9, 99).map(str),
    st.integers(0, 2**70).map(str),
    st.sampled_from(
        ["-0", "1.0", "1e2", "null", "true", '"1"', "[]", "{}", "00", str(10**400), str(2**63), str(2**64)]
    ),
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A sound file, and up to three things done to it."""
    held = draw(tensors().filter(len))
    head, _, size = layout(held, {"format": "pt"})
    header, data = head[8:], bytes(size - len(head))
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["flip", "insert", "delete", "number", "dtype", "resize"]))
        if kind in ("flip", "insert", "delete"):
            at = draw(st.integers(0, len(header) - 1))
            new = b"" if kind == "delete" else draw(st.binary(min_size=1, max_size=1))
            header = header[:at] + new + header[at + (kind != "insert") :]
        elif kind == "resize":
            data = data[: draw(st.integers(0, len(data)))] + bytes(draw(st.integers(0, 4)))
        else:
            pattern = rb"(?<=[\[,:])\d+" if kind == "number" else rb'(?<="dtype":)"\w+"'
            places = list(re.finditer(pattern, header))
            if places:
                place = draw(st.sampled_from(places))
                names = st.sampled_from([*SAFETENSORS_DTYPES, "F1", "f32", ""]).map('"{}"'.format)
                new = draw(NUMBERS if kind == "number" else names).encode()
                header = header[: place.start()] + new + header[place.end() :]
    return prefixed(header) + data


class TestDamage:
    @settings(max_examples=500, deadline=None)
    @given(raw=st.one_of(damaged(), st.binary(max_size=64), st.binary(max_size=64).map(prefixed)))
    def test_what_is_accepted_reads_as_safetensors_reads_it(self, raw: bytes, file: Path) -> None:
        """No mutation gets through that the reference refuses, and none raises anything but our own errors."""
        file.write_bytes(raw)
        try:
            found = inspect(file)
        except LowmemError:
            return
        assert {entry.key: (entry.dtype, entry.shape) for entry in found.values()} == reference(file)
