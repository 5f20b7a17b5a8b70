"""A folder leads to the weights that a careful reader of it would choose, or to a message that says why not."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_files import PT_INDEX, ST_INDEX, chosen, put, put_index, read_index, refused

from lowmem import SourceError, UnsupportedError
from lowmem.checkpoint.file_names import canonical_name, is_index, is_pickled, is_weights, variant_of
from lowmem.checkpoint.source import resolve

CANONICAL = ["model.safetensors", ST_INDEX, "pytorch_model.bin", PT_INDEX]


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
    put(tmp_path, "adapter_model.safetensors", "adapter_model.bin", "adapter_model.md")
    put_index(tmp_path, PT_INDEX, "pytorch_model-00001-of-00002.bin")
    found = resolve(tmp_path)
    assert chosen(found) == [ST_INDEX]
    assert found.warnings == (
        f"mm_projector.bin: beside {ST_INDEX}, which was believed",
        "adapter_model.bin, adapter_model.safetensors: an adapter, which was left alone; "
        "peft.PeftModel.from_pretrained(result.model, FOLDER) puts it on the model",
    )


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
        left = [n for n in names if is_weights(n, False) or (is_index(n) and not is_pickled(n))]
        assert all(variant_of(n) for n in left), "only a variant of what there is goes after pickles"


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
