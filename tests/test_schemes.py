"""A source leads to the weights that a careful reader of the folder would choose, or to a message that says why not.

The hub's cache is laid out here as huggingface_hub lays it out; the hub itself is a small server on this machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import combinations
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import huggingface_hub
import pytest
from huggingface_hub import constants, snapshot_download
from huggingface_hub import errors as hub_errors
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem import LowmemError, OptionError, SourceError, UnsupportedError
from lowmem.checkpoint import hub, schemes
from lowmem.checkpoint.folder import canonical_name, is_index, is_pickled, is_weights
from lowmem.checkpoint.schemes import register_scheme
from lowmem.checkpoint.source import Source, resolve

COMMIT = "0123abc" + "0" * 33
OTHER = "0123fff" + "1" * 33
ST_INDEX = "model.safetensors.index.json"
PT_INDEX = "pytorch_model.bin.index.json"
CANONICAL = ["model.safetensors", ST_INDEX, "pytorch_model.bin", PT_INDEX]


def put(folder: Path, *names: str) -> Path:
    """Empty files: what a source leads to is told by names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def put_index(folder: Path, name: str, *shards: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {f"key{i}": shard for i, shard in enumerate(shards)}
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder / name


def read_index(index: Path) -> set[str]:
    return set(json.loads(index.read_text())["weight_map"].values())


def chosen(source: Source) -> list[str]:
    """The index, or the shards, by name."""
    return [source.index.name] if source.index else [shard.name for shard in source.shards]


def refused(
    source: object, *words: str, error: type[LowmemError] = SourceError, not_in: str = "\n", download: bool = False
) -> str:
    """The message of the refusal, which names all of `words`."""
    with pytest.raises(error) as caught:
        resolve(source, download=download)  # type: ignore[arg-type]
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert not_in not in message
    assert len(message) < 2000
    assert type(caught.value) is error
    return message


# Folders


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["pytorch_model.bin"], ["pytorch_model.bin"]),
        (["model.safetensors"], ["model.safetensors"]),
        (["net.pt"], ["net.pt"]),
        (["net.pth"], ["net.pth"]),
        (["net.PTH"], ["net.PTH"]),
        (["last.ckpt"], ["last.ckpt"]),
        (["model_best.pth.tar"], ["model_best.pth.tar"]),
        (["NET.SAFETENSORS"], ["NET.SAFETENSORS"]),
        (["training_args.bin", "weights.bin"], ["weights.bin"]),
        (["pytorch_model.bin", "model.safetensors"], ["model.safetensors"]),
        (["diffusion_pytorch_model.bin", "diffusion_model.safetensors"], ["diffusion_model.safetensors"]),
        (["open_clip_pytorch_model.bin", "open_clip_model.safetensors"], ["open_clip_model.safetensors"]),
        (["net.pth", "net.safetensors"], ["net.safetensors"]),
        (["model.fp16.safetensors"], ["model.fp16.safetensors"]),
        (["pytorch_model.fp16.bin"], ["pytorch_model.fp16.bin"]),
        (["model-00001-of-00001.safetensors", "pytorch_model.bin"], ["model-00001-of-00001.safetensors"]),
        (["mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_optim_states.pt"], ["mp_rank_00_model_states.pt"]),
        (["model_optim_rng.pt", "distrib_optim.pt"], ["model_optim_rng.pt"]),
    ],
)  # fmt: skip
def test_a_folder_leads_to_its_weights_without_a_warning(names: list[str], expected: list[str], tmp_path: Path) -> None:
    put(tmp_path, *names, "config.json", "tokenizer.json", "README.md")
    found = resolve(tmp_path)
    assert chosen(found) == expected
    assert found.pickled == (not expected[0].lower().endswith(".safetensors"))
    assert found.config == tmp_path / "config.json"
    assert found.folder == tmp_path
    odd = ("no index beside model-00001-of-00001.safetensors: the shards' own headers were believed",)
    assert found.warnings == (odd if "-of-" in expected[0] else ())


@pytest.mark.parametrize(
    "name",
    [
        "training_args.bin", "optimizer.pt", "optimizer.bin", "optimizer_1.bin", "optim.pth", "scheduler.pt",
        "lr_scheduler.pt", "scaler.pt", "grad_scaler.pth", "rng_state.pth", "rng_state_0.pth", "random_states_0.pt",
        "zero_pp_rank_0_mp_rank_00_optim_states.pt", "trainer_state.pt", "sampler.bin", "dl_state_dict.bin",
        "distrib_optim.pt", "optimizer.safetensors", "Optimizer.PT", "optimizer_states.pt",
        "._model.safetensors", ".hidden.pt",
    ],
)  # fmt: skip
def test_what_a_trainer_leaves_is_never_the_weights(name: str, tmp_path: Path) -> None:
    put(tmp_path, name)
    refused(
        tmp_path, str(tmp_path), "no .safetensors file", "no pickled weights (.bin, .pt", "is it the model's folder"
    )
    put(tmp_path, "weights.pth")
    assert chosen(resolve(tmp_path)) == ["weights.pth"]
    assert resolve(tmp_path).warnings == ()
    assert chosen(resolve(tmp_path / name)) == [name], "who gives its path means it"


@pytest.mark.parametrize("name", ["optimus.pth", "scheduler_net.pth", "scaler_v2_net.bin", "samplernet.pt"])
def test_a_name_that_only_begins_like_a_trainers_is_weights(name: str, tmp_path: Path) -> None:
    assert chosen(resolve(put(tmp_path, name))) == [name]


@pytest.mark.parametrize(
    ("names", "listed"),
    [
        (["a.pth", "b.pth"], "a.pth, b.pth"),
        (["epoch_1.pth", "epoch_12.pth", "latest.pth"], "epoch_1.pth, epoch_12.pth, latest.pth"),
        (["a.bin", "b.ckpt"], "a.bin, b.ckpt"),
        (["a.safetensors", "b.pth"], "a.safetensors, b.pth"),
        (["lora.safetensors", "pytorch_model.bin"], "lora.safetensors, pytorch_model.bin"),
        (["net.ema.pth", "net.fp16.pth"], "net.ema.pth, net.fp16.pth"),
        (["sd-v1.ckpt", "sd-v1.5.ckpt"], "sd-v1.5.ckpt, sd-v1.ckpt"),
        ([f"{i:02}.pth" for i in range(40)], "09.pth and 30 more"),
    ],
)
def test_several_candidates_are_listed(names: list[str], listed: str, tmp_path: Path) -> None:
    put(tmp_path, *names)
    refused(tmp_path, str(tmp_path), "several weight files: ", listed, "give the path of the one you mean")


@pytest.mark.parametrize("index", [ST_INDEX, PT_INDEX, "model.safetensors.index.fp16.json", "net.bin.index.json"])
def test_an_index_is_believed_first(index: str, tmp_path: Path) -> None:
    pickled = "bin" in index
    shard = "shard.bin" if pickled else "shard.safetensors"
    put_index(tmp_path, index, shard)
    put(tmp_path, shard)
    for source in (tmp_path, tmp_path / index):
        found = resolve(source)
        assert (found.index, found.shards, found.pickled) == (tmp_path / index, (), pickled)
        assert found.warnings == ()


def test_the_order_of_belief_among_everything_at_once(tmp_path: Path) -> None:
    """Take away what was believed, and the next is believed."""
    st_set = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    pt_set = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    put(tmp_path, *st_set, *pt_set, "model.safetensors", "pytorch_model.bin", "other.safetensors", "other.bin")
    for index, shards in ((ST_INDEX, st_set), ("z.safetensors.index.json", st_set), (PT_INDEX, pt_set)):
        put_index(tmp_path, index, *shards)
    order = []
    while True:
        try:
            found = resolve(tmp_path)
        except SourceError:
            break
        order.append(chosen(found))
        for name in chosen(found):
            (tmp_path / name).unlink()
    assert (
        order
        == [
            [ST_INDEX],
            ["z.safetensors.index.json"],
            ["model.safetensors"],
            st_set,
            ["other.safetensors"],
            [PT_INDEX],
            ["pytorch_model.bin"],
            pt_set,
            ["other.bin"],
        ][: len(order)]
    )
    assert len(order) == 4, "other.safetensors beside pytorch_model.bin is not known to be the same model"
    (tmp_path / "other.safetensors").unlink()
    assert chosen(resolve(tmp_path)) == [PT_INDEX]
    (tmp_path / PT_INDEX).unlink()
    assert chosen(resolve(tmp_path)) == ["pytorch_model.bin"]
    (tmp_path / "pytorch_model.bin").unlink()
    assert chosen(resolve(tmp_path)) == pt_set


@pytest.mark.parametrize(
    ("names", "believed", "odd"),
    [
        (["model.safetensors", "mm_projector.bin"], "model.safetensors", ["mm_projector.bin"]),
        (["pytorch_model.bin", "mm_projector.bin"], "pytorch_model.bin", ["mm_projector.bin"]),
        (["model.safetensors", "model.fp16.safetensors"], "model.safetensors", ["model.fp16.safetensors"]),
        (["net.pth", "net.ema.pth"], "net.pth", ["net.ema.pth"]),
        (["pytorch_model.bin", "adapter_model.bin"], "pytorch_model.bin", ["adapter_model.bin"]),
        (["model.safetensors", "adapter_model.bin"], "model.safetensors", ["adapter_model.bin"]),
        (["pytorch_model.bin", "adapter_model.safetensors"], "pytorch_model.bin", ["adapter_model.safetensors"]),
        (["model.safetensors", "pytorch_model.fp16.bin"], "model.safetensors", []),
    ],
)
def test_what_lies_beside_is_said(names: list[str], believed: str, odd: list[str], tmp_path: Path) -> None:
    found = resolve(put(tmp_path, *names))
    assert chosen(found) == [believed]
    assert found.warnings == tuple(f"{name}: beside {believed}, which was believed" for name in odd)


def test_pickles_beside_an_index_of_safetensors_are_said_unless_they_are_the_same_model(tmp_path: Path) -> None:
    put_index(tmp_path, ST_INDEX, "model-00001-of-00001.safetensors")
    put(tmp_path, "model-00001-of-00001.safetensors", "pytorch_model-00001-of-00002.bin", "mm_projector.bin")
    put_index(tmp_path, PT_INDEX, "pytorch_model-00001-of-00002.bin")
    found = resolve(tmp_path)
    assert chosen(found) == [ST_INDEX]
    assert found.warnings == (f"mm_projector.bin: beside {ST_INDEX}, which was believed",)


def test_a_whole_numbered_set_of_pickles_needs_no_index(tmp_path: Path) -> None:
    names = [f"pytorch_model-0000{i}-of-00003.bin" for i in (1, 2, 3)]
    found = resolve(put(tmp_path, *names, "training_args.bin", "mm_projector.bin"))
    assert chosen(found) == names
    assert found.warnings == (
        f"no index beside {names[0]}: the shards' own headers were believed",
        f"mm_projector.bin: beside {names[0]}, which was believed",
    )
    (tmp_path / names[1]).unlink()
    refused(tmp_path, str(tmp_path), "not one whole set", names[0], "bring the index")


def test_a_numbered_set_with_a_variant_of_it(tmp_path: Path) -> None:
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    put(tmp_path, *names, *(name.replace("model", "model.fp16") for name in names))
    assert chosen(resolve(tmp_path)) == names


@pytest.mark.parametrize(("index", "whole"), [(ST_INDEX, "model.safetensors"), (PT_INDEX, "pytorch_model.bin")])
def test_a_stale_index_beside_a_consolidated_file(index: str, whole: str, tmp_path: Path) -> None:
    """As save_pretrained leaves it in a folder that held shards."""
    put_index(tmp_path, index, "one.bin", "two.bin")
    put(tmp_path, whole, "notes.txt")
    for source in (tmp_path, tmp_path / index):
        found = resolve(source)
        assert (chosen(found), found.index) == ([whole], None)
        assert found.warnings == (f"{index} names shards that are gone: {whole} beside it was believed",)
    put(tmp_path, "one.bin", "two.bin")
    assert {*chosen(resolve(tmp_path)), *chosen(resolve(tmp_path / index))} == {index}


def test_an_index_that_came_without_its_shards_gives_way_to_the_other_format(tmp_path: Path) -> None:
    """As `hf download --include '*.json' '*.bin'` leaves it."""
    put_index(tmp_path, ST_INDEX, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    put(tmp_path, "pytorch_model.bin")
    found = resolve(tmp_path)
    assert chosen(found) == ["pytorch_model.bin"]
    assert found.warnings == (f"{ST_INDEX} names shards of which none is there: it was not believed",)
    put(tmp_path, "model-00002-of-00002.safetensors")
    assert chosen(resolve(tmp_path)) == [ST_INDEX], "a part of the shards is a broken download, for its reader to say"


@pytest.mark.parametrize(
    "table", ["", "[]", '{"weight_map": 3}', '{"weight_map": {}}', "\xff", '{"weight_map": {"a": 3}}']
)
def test_an_index_that_cannot_be_read_is_believed_and_left_to_its_reader(table: str, tmp_path: Path) -> None:
    (tmp_path / ST_INDEX).write_text(table, encoding="latin-1")
    put(tmp_path, "model.safetensors")
    assert chosen(resolve(tmp_path)) == [ST_INDEX]
    (tmp_path / ST_INDEX).unlink()
    (tmp_path / ST_INDEX).mkdir()
    assert chosen(resolve(tmp_path)) == [ST_INDEX]


def test_a_name_in_an_index_that_no_file_can_have_is_not_there(tmp_path: Path) -> None:
    put_index(tmp_path, ST_INDEX, "nul\0byte", "x" * 5000)
    put(tmp_path, "pytorch_model.bin")
    assert chosen(resolve(tmp_path)) == ["pytorch_model.bin"]


def test_several_indexes_are_listed_unless_one_is_the_models_or_the_plain_one(tmp_path: Path) -> None:
    for name in ("a", "b"):
        put_index(tmp_path, f"{name}.bin.index.json", "s.bin")
    refused(tmp_path, "several indexes", "a.bin.index.json, b.bin.index.json", "give the path")
    put_index(tmp_path, PT_INDEX, "s.bin")
    assert chosen(resolve(tmp_path)) == [PT_INDEX]
    for variant in ("", "fp16."):
        put_index(tmp_path / "unet", f"diffusion_pytorch_model.safetensors.index.{variant}json", "s.safetensors")
    assert chosen(resolve(tmp_path / "unet")) == ["diffusion_pytorch_model.safetensors.index.json"]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors"])
def test_an_adapter_alone_is_called_an_adapter(name: str, tmp_path: Path) -> None:
    put(tmp_path, name, "adapter_config.json", "optimizer.pt")
    refused(tmp_path, str(tmp_path), f"only an adapter ({name})", "base model", "adapter_config.json")
    assert chosen(resolve(tmp_path / name)) == [name]


def test_a_pipeline_names_its_parts(tmp_path: Path) -> None:
    put(tmp_path, "model_index.json", "unet/model.safetensors", "vae/m.bin", "tokenizer/vocab.json", ".cache/m.bin")
    expected = ["model_index.json: a pipeline of several models, in unet, vae", f"such as {tmp_path / 'unet'}"]
    refused(tmp_path, str(tmp_path), *expected)
    put(tmp_path, "v1-5.safetensors")
    refused(tmp_path, str(tmp_path), *expected)
    assert chosen(resolve(tmp_path / "unet")) == ["model.safetensors"]


def test_weights_in_folders_below_are_named(tmp_path: Path) -> None:
    put(tmp_path, "trainer_state.json", "checkpoint-10/model.safetensors", "checkpoint-20/optimizer.pt", "runs/events")
    put_index(tmp_path / "checkpoint-30", PT_INDEX, "x.bin")
    refused(tmp_path, "no weights in this folder itself, but in checkpoint-10, checkpoint-30", "give one of them")
    put(tmp_path, "model.bin/data.pkl")
    refused(tmp_path, "but in checkpoint-10, checkpoint-30")


def test_deepspeed_and_megatron_say_what_they_are(tmp_path: Path) -> None:
    deep = put(tmp_path / "d", "latest", "zero_to_fp32.py", "global_step8/mp_rank_00_model_states.pt")
    refused(deep, "a DeepSpeed checkpoint: its weights are in global_step8", "`latest` names the newest")
    put(deep, "global_step8/mp_rank_01_model_states.pt", "global_step8/mp_rank_01_optim_states.pt")
    words = ["divided among processes (mp_rank_00_model_states.pt, mp_rank_01_model_states.pt)", "zero_to_fp32.py"]
    refused(deep / "global_step8", *words, error=UnsupportedError)
    zero3 = put(tmp_path / "z", "zero_pp_rank_0_mp_rank_00_model_states.pt")
    refused(zero3, "divided among processes", error=UnsupportedError)
    mega = put(tmp_path / "m", "latest_checkpointed_iteration.txt", "iter_0000010/mp_rank_00/model_optim_rng.pt")
    refused(mega, "a Megatron checkpoint", "iter_*/mp_rank_*/model_optim_rng.pt")
    refused(mega / "iter_0000010", "but in mp_rank_00")


@pytest.mark.parametrize(
    ("name", "kind", "remedy"),
    [
        ("tf_model.h5", "TensorFlow", "safetensors"),
        ("flax_model.msgpack", "Flax", "safetensors"),
        ("model.q4.gguf", "GGUF", "safetensors"),
        ("model.onnx", "ONNX", "safetensors"),
        ("weights.npz", "numpy", "save_file(dict(numpy.load(FILE))"),
        ("weights.npy", "numpy", "numpy.load"),
        ("__0_0.distcp", "torch.distributed.checkpoint", "dcp_to_torch"),
        ("bert_model.ckpt.index", "TensorFlow", "safetensors"),
        ("bert_model.ckpt.data-00000-of-00001", "TensorFlow", "safetensors"),
        ("model_final.pkl", "plain pickle", "safetensors"),
    ],
)
def test_weights_of_others_are_called_by_their_name(name: str, kind: str, remedy: str, tmp_path: Path) -> None:
    put(tmp_path, name, "config.json")
    for source in (tmp_path, tmp_path / name):
        words = [str(source), "a kind that lowmem does not read", f"{name} ({kind})", remedy]
        refused(source, *words, error=UnsupportedError)


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x.pt", "x.pth", "x.ckpt", "x.pth.tar", "x.Bin"])
def test_a_file_is_believed_as_it_is(name: str, tmp_path: Path) -> None:
    put(tmp_path, name, "config.json", "another.bin")
    found = resolve(str(tmp_path / name))
    assert (found.shards, found.index, found.folder) == ((tmp_path / name,), None, tmp_path)
    assert (found.config, found.warnings, found.pickled) == (tmp_path / "config.json", (), "safe" not in name)


@pytest.mark.parametrize("name", ["config.json", "pytorch_model.bin.json", "notes.txt", "x.index.json", "model"])
def test_a_file_that_is_no_weights_is_refused(name: str, tmp_path: Path) -> None:
    refused(put(tmp_path, name) / name, name, ".safetensors", ".bin")


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no(self: Path) -> Iterator[Path]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", no)
    refused(tmp_path, str(tmp_path), "cannot be listed: Permission denied")


NAMES = st.sampled_from(
    ["model", "pytorch_model", "net", "a.fp16", "model.fp16", "model-00001-of-00002", "model-00002-of-00002",
     "training_args", "optimizer", "adapter_model", "tf_model", "x.index"]
)  # fmt: skip
SUFFIXES = st.sampled_from(
    [".safetensors", ".bin", ".pt", ".h5", ".safetensors.index.json", ".bin.index.json", ".json"]
)


@settings(max_examples=300, deadline=None)
@given(names=st.lists(st.builds(str.__add__, NAMES, SUFFIXES), unique=True, max_size=7))
def test_any_folder_leads_to_what_is_in_it_or_to_an_error_that_names_it(
    names: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = put(tmp_path_factory.mktemp("any"), *names)
    found, message = None, ""
    try:
        found = resolve(folder)
    except (SourceError, UnsupportedError) as error:
        message = str(error)
    if found is None:
        assert str(folder) in message
        assert "several indexes" in message or not {canonical_name(False), ST_INDEX} & {*names}
        return
    assert {*chosen(found)} <= {*names}
    assert all(is_index(n) or is_weights(n, found.pickled) for n in chosen(found))
    assert {is_pickled(n) for n in chosen(found)} == {found.pickled}
    if found.pickled:
        assert not any(is_weights(n, False) or (is_index(n) and not is_pickled(n)) for n in names)


@pytest.mark.parametrize("names", [names for n in range(1, 5) for names in combinations(CANONICAL, n)])
def test_transformers_believes_the_same_but_for_an_index_beside_a_whole_file(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    """There the index goes before, as `shared/CHECKPOINTS.md` wants it; transformers never looks at it."""
    modeling = pytest.importorskip("transformers.modeling_utils")
    for name in names:
        shards = [f"{name.partition('.')[0]}-0000{i}-of-00002{Path(name[:-11]).suffix}" for i in (1, 2)]
        if is_index(name):
            put_index(tmp_path, name, *shards)
        put(tmp_path, *(shards if is_index(name) else [name]))
    files, _ = modeling._get_resolved_checkpoint_files(str(tmp_path), None, None, None, {}, False)
    found = resolve(tmp_path)
    assert found.pickled == files[0].endswith(".bin")
    whole = canonical_name(found.pickled)
    if {whole, f"{whole}.index.json"} <= {*names}:
        assert chosen(found) == [f"{whole}.index.json"]
    else:
        assert [Path(f).name for f in files] == (sorted(read_index(found.index)) if found.index else chosen(found))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", ST_INDEX, PT_INDEX])
def test_the_variants_that_transformers_writes_are_known(name: str, tmp_path: Path) -> None:
    hub_utils = pytest.importorskip("transformers.modeling_utils")
    variant = hub_utils._add_variant(name, "fp16")
    assert (is_index(variant), is_pickled(variant)) == (is_index(name), is_pickled(name))
    for other in (variant, name):
        if is_index(other):
            put_index(tmp_path, other, "s.bin", "s.safetensors")
        else:
            put(tmp_path, other)
        assert chosen(resolve(tmp_path)) == [other]


# Schemes


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The schemes, as they were when the test is over."""
    copy = dict(schemes._SCHEMES)
    monkeypatch.setattr(schemes, "_SCHEMES", copy)
    return copy


@pytest.mark.parametrize("scheme", ["local:", "local-dir:", "Local:"])
def test_local_schemes_lead_where_the_path_leads(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "org" / "name", "m.safetensors")
    plain = resolve(tmp_path / "org" / "name")
    for folder in (f"{tmp_path}/org/name", "org/name", "~/org/name"):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        found = resolve(scheme + folder)
        assert found.text == scheme + folder
        assert [shard.resolve() for shard in found.shards] == list(plain.shards)
    assert chosen(resolve(f"{scheme}{tmp_path}/org/name/m.safetensors")) == ["m.safetensors"]
    refused(f"{scheme}org/nam", f"{scheme}org/nam", "leads to 'org/nam'", "where nothing is", "check what stands after")
    refused(scheme, "expected a path after the colon, found nothing")
    refused(f"{scheme}~no-such-user-here/x", "leads to", "not a path that can be followed")
    refused(f"{scheme}nul\0byte", scheme)


def test_a_path_that_exists_wins_over_a_scheme_and_over_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    repository(cache, "org/name", {"model.safetensors": b"hub"})
    assert "snapshots" in str(resolve("org/name").folder)
    put(tmp_path, "org/name/local.bin", "local:x/here.pt", "x/there.pt")
    assert chosen(resolve("org/name")) == ["local.bin"]
    assert chosen(resolve("hf-hub:org/name")) == ["model.safetensors"]
    assert chosen(resolve("local:x")) == ["here.pt"]
    assert chosen(resolve("local-dir:x")) == ["there.pt"]


@pytest.mark.parametrize("text", ["s3://bucket/x", "timm:resnet", "hfhub:org/name", "https://huggingface.co/org/name"])
def test_an_unknown_scheme_lists_those_that_are_known(text: str) -> None:
    refused(text, text, "no such file or folder", f"{text.split(':')[0]}: is no scheme", "hf-hub:, local:, local-dir:")


@pytest.mark.parametrize("text", ["C:\\models\\x", "C:x", "a/b:c", "models/a:b/c", ":x", "9x:y", "ä:b", "x y:z"])
def test_what_is_no_scheme_is_a_path_that_is_not_there(text: str) -> None:
    refused(text, text, "no such file or folder; give a folder, an index file", not_in="scheme")


def test_a_path_object_is_only_ever_a_path(cache: Path, tmp_path: Path) -> None:
    repository(cache, "org/name", {"model.safetensors": b""})
    refused(Path("org/name"), "org/name: no such file or folder; give")
    refused(Path("hf-hub:org/name"), "no such file or folder; give")
    assert chosen(resolve(os.fsencode(put(tmp_path / "m", "x.pt")))) == ["x.pt"]  # type: ignore[arg-type]


def test_a_registered_scheme_is_followed(registry: dict[str, Any], tmp_path: Path) -> None:
    put(tmp_path, "m.safetensors", "p.bin")
    asked: list[tuple[str, bool]] = []

    def shelf(rest: str, download: bool) -> str:
        asked.append((rest, download))
        return str(tmp_path / rest)

    register_scheme("shelf", shelf)
    assert chosen(resolve("shelf:m.safetensors")) == ["m.safetensors"]
    assert resolve("SHELF:p.bin", download=True).pickled
    assert asked == [("m.safetensors", False), ("p.bin", True)]
    refused("shelf:gone", "shelf:gone", "leads to", "where nothing is")
    refused("shelve:gone", "hf-hub:, local:, local-dir:, shelf:")
    with pytest.raises(OptionError, match=r"scheme 'shelf': is there already; .*replace=True"):
        register_scheme("shelf", shelf)
    register_scheme("shelf", lambda rest, download: tmp_path / "p.bin", replace=True)
    assert chosen(resolve("shelf:whatever")) == ["p.bin"]


@pytest.mark.parametrize("name", ["", "c", "Shelf", "9shelf", "a:b", "a/b", "ä-b", "shelf ", None, 3])
def test_a_name_that_cannot_be_a_scheme_is_refused(name: Any, registry: dict[str, Any]) -> None:
    before = dict(registry)
    with pytest.raises(OptionError, match="a letter first"):
        register_scheme(name, lambda rest, download: rest)
    with pytest.raises(OptionError, match="expected a function"):
        register_scheme("shelf", "no function")  # type: ignore[arg-type]
    assert registry == before


def test_what_goes_wrong_in_a_scheme_is_told_with_the_source(registry: dict[str, Any]) -> None:
    def fails(error: Exception) -> Any:
        def function(rest: str, download: bool) -> str:
            raise error

        return function

    register_scheme("disk", fails(OSError("no medium")))
    refused("disk:x", "disk:x: cannot be followed: no medium", "check what stands after disk:")
    register_scheme("none", lambda rest, download: None)  # type: ignore[arg-type, return-value]
    refused("none:x", "expected none: to lead to a path, found None")
    register_scheme("own", fails(UnsupportedError("own words")))
    refused("own:x", "own words", error=UnsupportedError)
    register_scheme("bug", fails(KeyError("a bug of the function")))
    with pytest.raises(KeyError):
        resolve("bug:x")


# The hub's cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))

    def network(*args: object, **options: object) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr("socket.socket.connect", network)
    return folder


def repository(cache: Path, repo: str, files: dict[str, bytes], commit: str = COMMIT, ref: str | None = "main") -> Path:
    """A snapshot as huggingface_hub lays it out: links into blobs. Returns the snapshot's folder."""
    root = cache / ("models--" + repo.replace("/", "--"))
    folder = root / "snapshots" / commit
    folder.mkdir(parents=True, exist_ok=True)
    (root / "blobs").mkdir(exist_ok=True)
    for name, data in files.items():
        blob = root / "blobs" / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(os.path.relpath(blob, (folder / name).parent))
    if ref:
        (root / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (root / "refs" / ref).write_text(commit)
    return folder


def index_of(*shards: str) -> bytes:
    return json.dumps({"weight_map": {f"k{i}": shard for i, shard in enumerate(shards)}}).encode()


def test_a_cached_model_is_found_where_huggingface_hub_finds_it(cache: Path) -> None:
    files = {"config.json": b"{}", "model.safetensors": b"1", "pytorch_model.bin": b"2"}
    repository(cache, "org/na-me_1.5", files)
    repository(cache, "org/na-me_1.5", files, OTHER, "v1")
    repository(cache, "org/na-me_1.5", files, "f" * 40, "refs/pr/4")
    repository(cache, "gpt2", files)
    asked = [
        ("org/na-me_1.5", None),
        ("org/na-me_1.5", "main"),
        ("org/na-me_1.5", "v1"),
        ("org/na-me_1.5", "refs/pr/4"),
        ("org/na-me_1.5", OTHER),
        ("gpt2", None),
        ("gpt2", "main"),
    ]
    for repo, revision in asked:
        folder = snapshot_download(repo, revision=revision, local_files_only=True)
        text = f"{repo}@{revision}" if revision else repo
        for source in (text, f"hf-hub:{text}"):
            found = resolve(source)
            assert found.text == source
            assert str(found.folder) == folder
            assert chosen(found) == ["model.safetensors"]
            assert found.config == Path(folder, "config.json")
            assert found.warnings == ()


def test_a_commit_may_be_abbreviated_while_it_is_one(cache: Path) -> None:
    folder = repository(cache, "org/name", {"m.bin": b""})
    assert resolve("org/name@0123abc").folder == folder
    assert resolve("hf-hub:org/name@0123").folder == folder
    repository(cache, "org/name", {"m.bin": b""}, OTHER, None)
    refused("org/name@0123", "revision 0123 not in the hub's cache", "main (0123abc), 0123fff")
    assert resolve("org/name@0123ff").folder.name == OTHER
    tag = repository(cache, "org/name", {"m.bin": b""}, "e" * 40, "0123")
    assert resolve("org/name@0123").folder == tag, "a tag goes before a commit"


def test_what_is_not_cached_says_where_it_looked_and_what_would_bring_it(cache: Path) -> None:
    remedy = "download=True (--download) or `hf download org/name"
    refused("hf-hub:org/name", f"hf-hub:org/name: not in the hub's cache ({cache}); {remedy}` brings it")
    refused("org/name", f"org/name: no such file or folder, and not in the hub's cache ({cache}); {remedy}`")
    repository(cache, "org/name", {"m.bin": b""})
    refused(
        "org/name@v2",
        f"revision v2 not in the hub's cache ({cache}, where org/name is at main (0123abc))",
        f"{remedy} --revision v2`",
    )
    refused("gpt2", "gpt2: no such file or folder; give", not_in="hub")
    refused("hf-hub:gpt2", "hf-hub:gpt2: not in the hub's cache")


@pytest.mark.parametrize(
    "text",
    ["../name", "org/..", "a--b/c", "org/name/x", "-x/y", "org/name.git", "org/", "/org", "o" * 97 + "/x", "org/n@",
     "org/name@../../etc", "org/name@/etc/passwd", "org/name@a\\b", "org/name@a\nb", "örg/name", "org name/x"],
)  # fmt: skip
def test_what_cannot_be_a_name_of_the_hub_is_none(text: str, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file or folder; give"):
        resolve(text)
    with pytest.raises(SourceError, match=r"expected org/name or org/name@revision after the colon"):
        resolve(f"hf-hub:{text}")


@pytest.mark.parametrize("name", ["x/model.safetensors", "x/pytorch_model.bin", "x/a.pth", f"x/{ST_INDEX}", "x.ckpt"])
def test_the_name_of_a_file_that_is_not_there_is_not_taken_for_a_model(name: str, cache: Path) -> None:
    repository(cache, name, {"m.bin": b""})
    refused(name, f"{name}: no such file or folder; give", not_in="hub")
    assert chosen(resolve(f"hf-hub:{name}")) == ["m.bin"]


def test_a_snapshot_of_which_a_part_is_cached_names_what_is_missing(cache: Path) -> None:
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    folder = repository(cache, "org/name", {"config.json": b"{}"})
    remedy = "download=True (--download) or `hf download org/name` brings it"
    refused("org/name", "org/name: no .safetensors file", f"a part of it is cached in {folder}", remedy)
    repository(cache, "org/name", {shards[1]: b"2"})
    refused("org/name", "not one whole set", str(folder), remedy)
    repository(cache, "org/name", {ST_INDEX: index_of(*shards)})
    missing = f"of 3 weight files 2 are missing in {folder} ({shards[0]}, {shards[2]})"
    refused("org/name", "not all of it is cached", missing, remedy)
    repository(cache, "org/name", {shards[0]: b"1", shards[2]: b"3"})
    assert chosen(resolve("org/name")) == [ST_INDEX]
    (folder / shards[0]).resolve().unlink()
    refused("org/name", f"of 3 weight files 1 are missing in {folder} ({shards[0]})", remedy)


def test_a_part_is_enough_when_it_holds_the_weights(cache: Path) -> None:
    """huggingface_hub calls a snapshot incomplete that lacks any file of the repository, a picture too."""
    folder = repository(cache, "org/name", {"model.safetensors": b""})
    entry = {"size": 1, "blob_id": "0" * 40}
    tree = cache / "models--org--name" / "trees" / f"{COMMIT}.json"
    tree.parent.mkdir()
    tree.write_text(json.dumps({"format_version": 1, "files": {"model.safetensors": entry, "tf_model.h5": entry}}))
    if hasattr(hub_errors, "IncompleteSnapshotError"):
        with pytest.raises(hub_errors.IncompleteSnapshotError):
            snapshot_download("org/name", local_files_only=True)
    assert resolve("org/name").folder == folder
    (folder / "model.safetensors").unlink()
    refused("org/name", "a part of it is cached")


def test_what_a_cached_repository_is_instead_is_said_as_of_a_folder(cache: Path) -> None:
    pipeline = repository(cache, "org/pipe", {"model_index.json": b"{}", "unet/model.safetensors": b""})
    refused("org/pipe", "org/pipe: model_index.json: a pipeline", f"such as {pipeline / 'unet'}")
    assert chosen(resolve(pipeline / "unet")) == ["model.safetensors"]
    repository(cache, "org/lora", {"adapter_model.safetensors": b""})
    refused("org/lora", "org/lora: only an adapter")
    repository(cache, "org/gguf", {"model.gguf": b""})
    refused("org/gguf", "GGUF", error=UnsupportedError)


def test_a_ref_that_leads_nowhere_is_not_cached(cache: Path) -> None:
    repository(cache, "org/name", {"m.bin": b""}, ref=None)
    (cache / "models--org--name" / "refs").mkdir()
    (cache / "models--org--name" / "refs" / "main").write_text("9" * 40)
    refused("org/name", "not in the hub's cache", "where org/name is at 0123abc")


def test_without_huggingface_hub_the_message_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(name: str, package: str | None = None) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(hub.importlib, "import_module", missing)
    refused("hf-hub:org/name", "hf-hub:org/name: models of the hub need huggingface_hub; pip install huggingface_hub")
    refused("org/name", "org/name: no such file or folder; if it is a model of the hub, pip install huggingface_hub")
    refused("gpt2", "gpt2: no such file or folder; give")
    assert chosen(resolve(put(tmp_path, "x.pt"))) == ["x.pt"]


def test_a_local_path_imports_no_huggingface_hub(tmp_path: Path) -> None:
    put(tmp_path, "model.safetensors")
    script = (
        "import sys\nfrom lowmem.checkpoint.source import resolve\n"
        f"resolve({str(tmp_path)!r}); resolve('local:{tmp_path}')\n"
        "print(*(name for name in ('huggingface_hub', 'httpx', 'torch') if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == []


# The hub


def response_error(kind: str) -> Exception:
    """One of huggingface_hub's errors of an answer, without the answer: its classes differ by version."""
    cls = getattr(hub_errors, kind)
    error: Exception = cls.__new__(cls)
    error.args = (f"{kind}: said\n\n  the server   (Request ID: 1)",)
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (response_error("GatedRepoError"), ["asks for consent", "/org/name", "hf auth login"]),
        (response_error("RepositoryNotFoundError"), ["not found at http", "/org/name", "check the name", "private"]),
        (response_error("RevisionNotFoundError"), ["no revision v2 at http", "check the branch, tag or commit"]),
        (hub_errors.OfflineModeIsEnabled("off"), ["HF_HUB_OFFLINE forbids the network", "unset it", "is cached"]),
        (hub_errors.LocalEntryNotFoundError("a\nb"), ["cannot be fetched: a b", "check the network"]),
        (RuntimeError("connection\nlost"), ["cannot be fetched: connection lost", "check the network", "the cache"]),
        (ConnectionError(), ["cannot be fetched: ConnectionError", "check the network"]),
        (RuntimeError("x" * 5000), ["cannot be fetched: xxx", "x…", "check the network"]),
        (ConnectionRefusedError(111, "refused"), ["cannot be fetched: [Errno 111] refused", "check the network"]),
        (OSError(28, "No space left on device"), ["No space left on device", "check", "hub and its disk"]),
    ],
)
@pytest.mark.parametrize("step", ["list_repo_files", "hf_hub_download", "snapshot_download"])
def test_what_the_network_refuses_is_one_line_with_a_remedy(
    step: str, error: Exception, words: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise error

    steps = {
        "list_repo_files": lambda repo, revision: [ST_INDEX, "s.safetensors"],
        "hf_hub_download": lambda repo, name, revision: put_index(cache, ST_INDEX, "s.safetensors"),
        "snapshot_download": refuse,
        step: refuse,
    }
    for name, function in steps.items():
        monkeypatch.setattr(huggingface_hub, name, function)
    refused("hf-hub:org/name@v2", "hf-hub:org/name@v2: ", *words, download=True)
    refused("org/name@v2", "org/name@v2: ", *words, download=True)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as huggingface_hub asks: the tree of a repository, and its files."""

    repositories: dict[str, dict[str, bytes]] = {}  # noqa: RUF012
    asked: list[str] = []  # noqa: RUF012

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].removeprefix("/api/models/").lstrip("/")
        repo = "/".join(path.split("/")[:2])
        files = self.repositories.get(repo)
        if files is None:
            self.answer(404, b"", **{"X-Error-Code": "RepoNotFound"})
            return
        verb, revision, *rest = path.split("/")[2:]
        if revision not in ("main", "v1", COMMIT):
            self.answer(404, b"", **{"X-Error-Code": "RevisionNotFound"})
        elif verb == "tree":
            tree = [{"type": "file", "path": n, "size": len(d), "oid": blob_id(d)} for n, d in files.items()]
            self.answer(200, json.dumps(tree).encode())
        elif verb == "revision":
            siblings = [{"rfilename": name} for name in files]
            self.answer(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())
        else:
            name = unquote("/".join(rest))
            self.asked.append(f"{repo}: {name}")
            self.answer(200, files[name], ETag=f'"{blob_id(files[name])}"', **{"X-Repo-Commit": COMMIT})

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


SMALL = {"config.json": b"{}", "tokenizer.json": b"{}", "tokenizer.model": b"t", "vocab.txt": b"v", "modeling.py": b"#"}
REST = {
    "README.md": b"r", ".gitattributes": b"g", "tf_model.h5": b"h", "flax_model.msgpack": b"f", "model.onnx": b"o",
    "optimizer.pt": b"o", "training_args.bin": b"t", "trainer_state.json": b"{}", "onnx/model.onnx": b"o",
    "rust_model.ot": b"r", "coreml/x.mlmodel": b"c", "picture.png": b"p", "sub/config.json": b"{}",
}  # fmt: skip
TWO = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
REPOSITORIES = {
    "org/single": {
        **SMALL, **REST, "model.safetensors": b"s", "pytorch_model.bin": b"p", "model.fp16.safetensors": b"v",
    },
    "org/sharded": {
        **SMALL, **REST, ST_INDEX: index_of(*TWO, "deep/extra.safetensors"), TWO[0]: b"1", TWO[1]: b"2",
        "deep/extra.safetensors": b"3", "deep/other.safetensors": b"4", PT_INDEX: index_of("p.bin"), "p.bin": b"p",
    },
    "org/pickled": {**SMALL, **REST, "pytorch_model.bin": b"p"},
    "org/brackets": {"config.json": b"{}", "a[0].safetensors": b"a", "a0.png": b"0"},
    "org/stale": {"config.json": b"{}", ST_INDEX: index_of(*TWO), "pytorch_model.bin": b"p"},
    "org/lacking": {"config.json": b"{}", ST_INDEX: index_of(*TWO), TWO[0]: b"1"},
    "org/no-shards": {"config.json": b"{}", ST_INDEX: b"[]", TWO[0]: b"1"},
    "org/several": {"a.pth": b"a", "b.pth": b"b"},
    "org/pipe": {"model_index.json": b"{}", "unet/model.safetensors": b"u", "vae/model.safetensors": b"v"},
    "org/empty": {"README.md": b"r"},
    "org/gguf": {"model.gguf": b"g"},
}  # fmt: skip
ASKED = [
    "org/single", "hf-hub:org/sharded@v1", "org/pickled", f"org/pickled@{COMMIT}", "org/brackets", "org/stale",
    "org/lacking", "org/no-shards", "org/several", "org/pipe", "org/empty", "org/gguf", "org/none", "org/single@nope",
]  # fmt: skip
DOWNLOAD = """
import json, sys
from lowmem import LowmemError
from lowmem.checkpoint.source import resolve

def told(source, download):
    try:
        found = resolve(source, download=download)
    except LowmemError as error:
        return f"{type(error).__name__}: {error}"
    return str(found.folder)

print(json.dumps({source: [told(source, flag) for flag in (False, True, False)] for source in sys.argv[1:]}))
"""


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Each of ASKED without, with and again without `download`, in a fresh process with an empty cache."""
    home = tmp_path_factory.mktemp("home")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Hub.repositories, Hub.asked = REPOSITORIES, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    caches = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_OFFLINE")
    for name in (*caches, "http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        environment.pop(name, None)
    command = [sys.executable, "-c", DOWNLOAD, *ASKED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout), "cache": home / "hub"}


def fetched(folder: str) -> set[str]:
    root = Path(folder)
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("source", "weights"),
    [
        ("org/single", {"model.safetensors"}),
        ("hf-hub:org/sharded@v1", {ST_INDEX, *TWO, "deep/extra.safetensors"}),
        ("org/pickled", {"pytorch_model.bin"}),
    ],
)
def test_a_download_brings_one_set_of_weights_and_the_small_files(
    source: str, weights: set[str], downloads: dict[str, Any]
) -> None:
    before, during, after = downloads[source]
    assert before.startswith(f"SourceError: {source}: ")
    assert f"not in the hub's cache ({downloads['cache']})" in before
    assert during == after
    assert fetched(during) == {*SMALL, *weights}
    assert Path(during).name == COMMIT
    assert Path(during).is_relative_to(downloads["cache"])


def test_a_download_by_commit_and_of_names_with_brackets(downloads: dict[str, Any]) -> None:
    assert downloads[f"org/pickled@{COMMIT}"] == [downloads["org/pickled"][1]] * 3
    assert fetched(downloads["org/brackets"][1]) == {"config.json", "a[0].safetensors"}


def test_a_repository_with_an_index_without_shards_gives_its_other_weights(downloads: dict[str, Any]) -> None:
    _, during, after = downloads["org/stale"]
    assert during == after
    assert {"pytorch_model.bin", "config.json"} <= fetched(during) <= {"pytorch_model.bin", "config.json", ST_INDEX}


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("org/lacking", ["SourceError", f"names shards that the repository lacks ({TWO[1]})"]),
        ("org/no-shards", ["SourceError", f"{ST_INDEX} names no shards"]),
        ("org/several", ["SourceError", "several weight files: a.pth, b.pth"]),
        ("org/pipe", ["SourceError", "a pipeline of several models, in unet, vae", "hf download org/pipe --local-dir"]),
        ("org/empty", ["SourceError", "no .safetensors file", "the repository of something else"]),
        ("org/gguf", ["UnsupportedError", "model.gguf (GGUF)"]),
        ("org/none", ["SourceError", "org/none: not found at http", "check the name"]),
        ("org/single@nope", ["SourceError", "no revision nope at http", "check the branch"]),
    ],
)
def test_a_download_that_cannot_be_says_why(source: str, words: list[str], downloads: dict[str, Any]) -> None:
    _, during, _ = downloads[source]
    for word in words:
        assert word in during
    assert "\n" not in during


def test_nothing_else_was_asked_of_the_hub(downloads: dict[str, Any]) -> None:
    """Weights of other formats, variants and optimizers are not fetched, nor those of models that are refused."""
    asked = {name for name in Hub.asked if not name.endswith((".json", ".txt", ".model", ".py"))}
    assert asked == {
        "org/single: model.safetensors",
        *(f"org/sharded: {name}" for name in [*TWO, "deep/extra.safetensors"]),
        "org/pickled: pytorch_model.bin",
        "org/brackets: a[0].safetensors",
        "org/stale: pytorch_model.bin",
    }
