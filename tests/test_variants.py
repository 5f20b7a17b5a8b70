"""`variant`, `subfolder` and `revision` take the files that `from_pretrained` takes, or say which there are.

What `config.json` names in `transformers_weights` comes before them all, and what is no model in one folder (an
adapter, the ranks of a distributed checkpoint) is called by its name.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import COMMIT, Hub, repository
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from source_files import PT_INDEX, ST_INDEX, chosen, index_of, put, put_index
from tiny_models import assert_same_model, change_config, model_class, new_model
from torch import nn

import lowmem
from lowmem import OptionError, SourceError, UnsupportedError
from lowmem.checkpoint.file_names import canonical_index, canonical_name, is_index, is_of_variant, variant_of
from lowmem.checkpoint.schemes import register_scheme
from lowmem.checkpoint.selection import Selection, make_selection
from lowmem.checkpoint.source import resolve
from lowmem.cli import main

OTHER = "f" * 40
FP16 = Selection(variant="fp16")


def save_pickled(model: nn.Module, folder: Path, variant: str | None, shards: int = 1) -> None:
    """As `save_pretrained` of transformers 4 wrote it."""
    folder.mkdir(parents=True, exist_ok=True)
    state = dict(model.state_dict())
    if shards == 1:
        torch.save(state, folder / canonical_name(True, variant))
        return
    weight_map = {}
    keys = list(state)
    for number in range(shards):
        stem = canonical_name(True, variant).removesuffix(".bin")
        name = f"{stem}-{number + 1:05}-of-{shards:05}.bin"
        part = {key: state[key] for key in keys[number::shards]}
        torch.save(part, folder / name)
        weight_map.update(dict.fromkeys(part, name))
    (folder / canonical_index(True, variant)).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def scaled(model: Any, factor: float) -> Any:
    """The same model with other values, so that a wrong file shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


def save(folder: Path, variant: str | None, layout: str, factor: float) -> None:
    """One set of weights, with its config; its values tell it from others."""
    model = scaled(new_model("llama"), factor)
    if layout.startswith("safetensors"):
        # Into a folder of its own: save_pretrained removes the shards of others.
        with tempfile.TemporaryDirectory() as own:
            model.save_pretrained(own, variant=variant, max_shard_size="20KB" if "sharded" in layout else "1GB")
            shutil.copytree(own, folder, dirs_exist_ok=True)
    else:
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        save_pickled(model, folder, variant, 2 if "sharded" in layout else 1)


LAYOUTS = ["safetensors", "safetensors sharded", "pickled", "pickled sharded"]


def both(source: Any, ours: dict[str, Any], **options: Any) -> None:
    """Ours and theirs are one model; `options` are theirs, and `ours` those of ours."""
    found = lowmem.load(source, **ours)
    cls = getattr(__import__("transformers"), type(found.model).__name__)
    theirs = cls.from_pretrained(source, dtype="auto", **options).eval()
    # Where the files lie, which is inside of what was given.
    theirs.name_or_path = theirs.config.name_or_path = found.model.name_or_path
    assert_same_model(found.model, theirs)


# Variants


@pytest.mark.parametrize("plain", [None, *LAYOUTS])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_variant_is_what_from_pretrained_loads(layout: str, plain: str | None, tmp_path: Path) -> None:
    """Alone, or beside plain weights of the same and of the other format; other variants are never looked at."""
    save(tmp_path, "fp16", layout, 2.0)
    save(tmp_path, "bf16", "safetensors", 3.0)
    if plain is not None:
        save(tmp_path, None, plain, 4.0)
        both(tmp_path, {})
    both(tmp_path, {"variant": "fp16"}, variant="fp16")


NAMES = [
    name
    for variant in (None, "fp16")
    for pickled in (False, True)
    for name in (canonical_name(pickled, variant), canonical_index(pickled, variant))
]


def lay(folder: Path, names: tuple[str, ...]) -> None:
    """Empty weights, and indexes with all of their shards."""
    for name in names:
        if is_index(name):
            stem, suffix = ("pytorch_model", "bin") if ".bin" in name else ("model", "safetensors")
            stem += ".fp16" if "fp16" in name else ""
            shards = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
            put_index(folder, name, *shards)
            put(folder, *shards)
        else:
            put(folder, name)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("names", [names for n in range(1, 5) for names in combinations(NAMES, n)])
def test_transformers_chooses_the_same_files(names: tuple[str, ...], variant: str | None, tmp_path: Path) -> None:
    """But for an index beside a whole file, which goes before here (see test_folders), and what only a variant has."""
    modeling = pytest.importorskip("transformers.modeling_utils")
    lay(tmp_path, names)
    try:
        files, _ = modeling._get_resolved_checkpoint_files(str(tmp_path), variant, None, None, {}, False)
    except OSError:
        if variant is not None:
            with pytest.raises(SourceError, match="no weights of the variant fp16; variants that are here: none"):
                resolve(tmp_path, FP16)
        else:
            # transformers refuses what has variants only; here the only one that there is goes without saying.
            assert all(variant_of(name) == "fp16" for name in chosen(resolve(tmp_path)))
        return
    found = resolve(tmp_path, Selection(variant=variant))
    whole, index = canonical_name(found.pickled, variant), canonical_index(found.pickled, variant)
    assert found.pickled == files[0].endswith(".bin")
    if {whole, index} <= {*names}:
        assert chosen(found) == [index]
    elif found.index:
        named = json.loads(found.index.read_text())["weight_map"].values()
        assert sorted(Path(f).name for f in files) == sorted(named)
    else:
        assert chosen(found) == [Path(f).name for f in files]


@pytest.mark.parametrize(
    ("names", "variant", "expected"),
    [
        (["model.safetensors", "model.fp16.safetensors"], "fp16", ["model.fp16.safetensors"]),
        (["pytorch_model.fp16.bin", "model.bf16.safetensors"], "fp16", ["pytorch_model.fp16.bin"]),
        (["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"], "fp16",
         ["diffusion_pytorch_model.fp16.safetensors"]),
        (["net.ema.pth", "net.pth"], "ema", ["net.ema.pth"]),
        (["model.non_ema.safetensors", "model.safetensors"], "non_ema", ["model.non_ema.safetensors"]),
        (["model.v1.5.safetensors", "model.safetensors"], "v1.5", ["model.v1.5.safetensors"]),
        (["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors", "model.safetensors"],
         "fp16", ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"]),
        (["model.fp16.safetensors", "other.fp16.safetensors"], "fp16", ["model.fp16.safetensors"]),
    ],
)  # fmt: skip
def test_a_variant_is_chosen_by_its_name(names: list[str], variant: str, expected: list[str], tmp_path: Path) -> None:
    found = resolve(put(tmp_path, *names), Selection(variant=variant))
    assert chosen(found) == expected
    assert all(is_of_variant(name, variant) for name in expected)
    others = [name for name in names if is_of_variant(name, variant) and name not in expected]
    assert [w for w in found.warnings if "believed" in w and "index" not in w] == [
        f"{name}: beside {expected[0]}, which was believed" for name in others
    ]


@pytest.mark.parametrize(
    ("names", "believed", "beside"),
    [
        (["pytorch_model.bin", "model.fp16.safetensors"], "pytorch_model.bin", ["model.fp16.safetensors"]),
        (["model.safetensors", "pytorch_model.fp16.bin"], "model.safetensors", []),
        (["net.pth", "net.fp16.safetensors"], "net.pth", ["net.fp16.safetensors"]),
    ],
)
def test_without_a_variant_plain_files_of_either_format_go_first(
    names: list[str], believed: str, beside: list[str], tmp_path: Path
) -> None:
    found = resolve(put(tmp_path, *names))
    assert chosen(found) == [believed]
    assert found.warnings == tuple(f"{name}: beside {believed}, which was believed" for name in beside)


def test_a_plain_file_goes_before_the_index_of_a_variant(tmp_path: Path) -> None:
    lay(tmp_path, ("model.safetensors.index.fp16.json", "pytorch_model.bin"))
    assert chosen(resolve(tmp_path)) == ["pytorch_model.bin"]
    assert chosen(resolve(tmp_path, FP16)) == ["model.safetensors.index.fp16.json"]


def test_the_only_variant_is_taken_and_of_several_one_must_be_named(tmp_path: Path) -> None:
    put(tmp_path, "model.fp16.safetensors")
    assert chosen(resolve(tmp_path)) == ["model.fp16.safetensors"]
    put(tmp_path, "model.bf16.safetensors")
    with pytest.raises(SourceError) as refused:
        resolve(tmp_path)
    for words in ("several weight files: model.bf16.safetensors, model.fp16.safetensors", "variants bf16, fp16",
                  "variant= (--variant)", "give the path of the one you mean"):  # fmt: skip
        assert words in str(refused.value)
    assert chosen(resolve(tmp_path, FP16)) == ["model.fp16.safetensors"]


def test_a_variant_that_is_not_there_lists_those_that_are(tmp_path: Path) -> None:
    put(tmp_path, "model.bf16.safetensors", "pytorch_model.bin", "pytorch_model.ema.bin")
    with pytest.raises(SourceError) as refused:
        lowmem.inspect(tmp_path, variant="fp16")
    message = str(refused.value)
    assert f"{tmp_path}: no weights of the variant fp16" in message
    assert "bf16 (model.bf16.safetensors); ema (pytorch_model.ema.bin); none (pytorch_model.bin)" in message
    assert "leave variant= (--variant) out" in message
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(SourceError, match=r"give one of them$"):
        lowmem.inspect(tmp_path, variant="fp16")
    with pytest.raises(SourceError, match=r"no \.safetensors file, no pickled weights"):
        lowmem.inspect(put(tmp_path / "empty", "config.json"), variant="fp16")


def test_an_index_of_a_variant_whose_shards_are_gone_gives_way_to_the_whole_file_of_that_variant(
    tmp_path: Path,
) -> None:
    index = "model.safetensors.index.fp16.json"
    put_index(tmp_path, index, "gone.safetensors")
    put(tmp_path, "model.safetensors")
    assert chosen(resolve(tmp_path / index)) == [index], "plain weights are not that variant's"
    put(tmp_path, "model.fp16.safetensors")
    for found in (resolve(tmp_path / index), resolve(tmp_path, FP16)):
        assert chosen(found) == ["model.fp16.safetensors"]
        assert found.warnings == (f"{index} names shards that are gone: model.fp16.safetensors beside it was believed",)


@pytest.mark.parametrize("value", ["", "a/b", "..", ".fp16", "fp16.", "a b", 3, True, b"fp16", "a\0"])
def test_what_cannot_be_a_variant_is_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="variant: expected a word such as 'fp16'"):
        lowmem.inspect(put(tmp_path, "model.safetensors"), variant=value)


def test_a_file_leaves_nothing_to_choose(tmp_path: Path) -> None:
    put(tmp_path, "model.safetensors", "model.fp16.safetensors")
    put_index(tmp_path, ST_INDEX, "model.safetensors")
    for name in ("model.safetensors", "model.fp16.safetensors", ST_INDEX):
        with pytest.raises(OptionError, match=r"variant: .* is a file, and 'fp16' chooses among those of a folder"):
            resolve(tmp_path / name, FP16)
        with pytest.raises(OptionError, match=r"subfolder: .* is a file"):
            resolve(tmp_path / name, make_selection(subfolder="sub"))


# Subfolders


@pytest.mark.parametrize("subfolder", ["text_encoder", "a/b/", "./text_encoder"])
def test_a_subfolder_is_what_from_pretrained_loads(subfolder: str, tmp_path: Path) -> None:
    """Its weights, its config and its generation config, and nothing of the folder around it."""
    save(tmp_path, None, "safetensors", 5.0)
    (tmp_path / "generation_config.json").unlink()
    inner = tmp_path / subfolder
    save(inner, None, "safetensors sharded", 2.0)
    save(inner, "fp16", "pickled", 3.0)
    change_config(inner, max_position_embeddings=32, rms_norm_eps=1e-3)
    (inner / "generation_config.json").write_text(json.dumps({"max_length": 17, "bos_token_id": 3}))
    both(tmp_path, {"subfolder": subfolder}, subfolder=subfolder)
    both(tmp_path, {"subfolder": subfolder, "variant": "fp16"}, subfolder=subfolder, variant="fp16")
    both(tmp_path, {"subfolder": ""}, subfolder="")
    outer = {"max_length": 23}
    (tmp_path / "generation_config.json").write_text(json.dumps(outer))
    # Of an absolute path transformers 5 takes the outer one, of a relative path and of the hub the inner one.
    assert lowmem.load(tmp_path, subfolder=subfolder).model.generation_config.max_length == 17


def test_a_part_of_a_pipeline_is_named_by_its_subfolder(tmp_path: Path) -> None:
    put(tmp_path, "model_index.json", "unet/model.safetensors", "vae/m.bin")
    with pytest.raises(
        SourceError, match=r"give one of them, such as .*/unet, or say subfolder='unet' \(--subfolder\)"
    ):
        resolve(tmp_path)
    found = resolve(tmp_path, make_selection(subfolder="vae"))
    assert (chosen(found), found.folder, found.path) == (["m.bin"], tmp_path / "vae", tmp_path / "vae")
    assert found.text == str(tmp_path)


def test_folders_below_a_subfolder_are_named_from_the_source(tmp_path: Path) -> None:
    put(tmp_path, "a/b/model.safetensors")
    with pytest.raises(SourceError, match=rf"^{re.escape(str(tmp_path))}/a: no weights in this.*say subfolder='a/b'"):
        resolve(tmp_path, make_selection(subfolder="a"))
    with pytest.raises(SourceError, match=r"subfolder c: no such folder in .* \(folders there: a\)"):
        resolve(tmp_path, make_selection(subfolder="c"))
    with pytest.raises(SourceError, match=r"subfolder xxx.*: no such folder"):
        resolve(tmp_path, make_selection(subfolder="x" * 5000))
    put(tmp_path, "config.json")
    with pytest.raises(SourceError, match=r"subfolder config.json: no such folder"):
        resolve(tmp_path, make_selection(subfolder="config.json"))


@pytest.mark.parametrize("value", ["..", "../x", "a/../../x", "/etc", "C:/x", "\\x", "a\0b", 3, b"a", "a/..", "..\\x"])
def test_a_subfolder_cannot_lead_out(value: Any, tmp_path: Path) -> None:
    put(tmp_path / "inner", "model.safetensors")
    with pytest.raises(OptionError, match="subfolder: expected a folder inside the source"):
        lowmem.inspect(tmp_path / "inner", subfolder=value)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab./\\~:", max_size=8))
def test_whatever_the_subfolder_it_stays_inside(text: str) -> None:
    try:
        inside = make_selection(subfolder=text).subfolder
    except OptionError:
        return
    outer = Path("/outer/folder")
    assert Path(os.path.normpath(outer / inside)).is_relative_to(outer)


# Revisions


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_revision_is_what_from_pretrained_loads(cache: Path, tmp_path: Path) -> None:
    for number, (commit, ref) in enumerate([(COMMIT, "main"), (OTHER, "v1"), ("a" * 40, "refs/pr/4")]):
        made = tmp_path / commit
        save(made, None, "safetensors", number + 2.0)
        save(made / "sub", None, "safetensors sharded", number + 5.0)
        save(made / "sub", "fp16", "pickled", number + 8.0)
        repository(cache, "org/name", files_of(made), commit, ref)
    theirs = {"cache_dir": str(cache), "local_files_only": True}
    for revision in (None, "main", "v1", "refs/pr/4", OTHER):
        both("org/name", {"revision": revision}, revision=revision or "main", **theirs)
    both("org/name", {"revision": "v1", "subfolder": "sub"}, revision="v1", subfolder="sub", **theirs)
    both(
        "org/name",
        {"revision": "v1", "subfolder": "sub", "variant": "fp16"},
        revision="v1",
        subfolder="sub",
        variant="fp16",
        **theirs,
    )
    found = {source: resolve(*source) for source in [("org/name@v1", make_selection(revision="v1")),
             ("org/name@v1", Selection()), ("hf-hub:org/name", make_selection(revision="ffff"))]}  # fmt: skip
    assert {source.folder.name for source in found.values()} == {OTHER}


def test_two_revisions_are_refused(cache: Path) -> None:
    repository(cache, "org/name", {"model.safetensors": b""})
    for source in ("org/name@main", "hf-hub:org/name@main"):
        with pytest.raises(OptionError, match=r"revision: .*org/name@main names the revision main already.*\(v1\)"):
            lowmem.inspect(source, revision="v1")
    with pytest.raises(SourceError, match=r"revision v2 not in the hub's cache .*--revision v2` brings it"):
        lowmem.inspect("org/name", revision="v2")


def test_what_has_no_revisions_refuses_them_but_for_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowmem.checkpoint import schemes

    monkeypatch.setattr(schemes, "_SCHEMES", dict(schemes._SCHEMES))
    register_scheme("shelf", lambda rest, download: tmp_path / rest)
    put(tmp_path, "x/model.safetensors")
    for source in (tmp_path / "x", tmp_path / "x/model.safetensors", f"local:{tmp_path}/x", "shelf:x"):
        assert chosen(resolve(source, make_selection(revision="main"))) == ["model.safetensors"]
        with pytest.raises(OptionError, match=r"^revision: .* which has no revisions; leave 'v1' out"):
            resolve(source, make_selection(revision="v1"))
    assert chosen(resolve("shelf:", make_selection(subfolder="x"))) == ["model.safetensors"]


@pytest.mark.parametrize("value", ["", "../x", "/etc", "a\\b", "a\nb", 3, b"main", "a/../b"])
def test_what_cannot_be_a_revision_is_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="revision: expected a branch, tag or commit"):
        lowmem.inspect("org/name", revision=value)


def test_a_cached_subfolder_of_which_a_part_is_missing_says_so(cache: Path) -> None:
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    folder = repository(cache, "org/name", {f"sub/{ST_INDEX}": index_of(*shards), f"sub/{shards[0]}": b""})
    remedy = "download=True (--download) or `hf download org/name` brings it"
    cases = {"sub": f"of 2 weight files 1 are missing in {folder}/sub ({shards[1]}); {remedy}",
             "vae": f"no folder vae in what is cached of it ({folder}); {remedy}"}  # fmt: skip
    for subfolder, words in cases.items():
        with pytest.raises(SourceError) as refused:
            lowmem.inspect("org/name", subfolder=subfolder)
        assert words in str(refused.value)
    with pytest.raises(SourceError, match="no weights of the variant fp16"):
        lowmem.inspect("org/name", subfolder="sub", variant="fp16")


REMOTE: dict[str, dict[str, bytes]] = {
    "org/pipe": {
        "model_index.json": b"{}", "unet/config.json": b"{}", "unet/model.safetensors": b"u",
        "unet/model.fp16.safetensors": b"f", "unet/deep/x.json": b"{}", "unet/README.md": b"",
        "vae/pytorch_model.bin": b"", "vae/merges.txt": b"", "config.json": b"{}",
    },
    "org/named": {
        "config.json": b'{"transformers_weights": "sub/real.safetensors"}', "model.safetensors": b"m",
        "sub/real.safetensors": b"r",
    },
}  # fmt: skip
ASKED: list[tuple[str, dict[str, str]]] = [
    ("org/pipe", {"subfolder": "unet"}),
    ("org/pipe", {"subfolder": "unet", "variant": "fp16"}),
    ("org/pipe", {"subfolder": "vae", "revision": "v1"}),
    ("org/pipe", {"subfolder": "vae", "variant": "fp16"}),
    ("org/pipe", {"subfolder": "nothing"}),
    ("org/pipe", {"revision": "nope", "subfolder": "vae"}),
    ("org/named", {}),
]
DOWNLOAD = """
import json, sys
from pathlib import Path
from lowmem import LowmemError
from lowmem.checkpoint.survey import find

def told(source, options):
    try:
        found = find(source, download=True, **options)
        assert find(source, **options) == found
    except LowmemError as error:
        return f"{type(error).__name__}: {error}"
    return [path.name for path in found.shards], str(found.folder)

print(json.dumps([told(*asked) for asked in json.loads(sys.argv[1])]))
"""


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of ASKED leads to, in a fresh process with an empty cache."""
    home = tmp_path_factory.mktemp("home")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Hub.repositories, Hub.asked = REMOTE, []
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
    for name in ("HF_HUB_CACHE", "TRANSFORMERS_OFFLINE", "http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        environment.pop(name, None)
    command = [sys.executable, "-c", DOWNLOAD, json.dumps(ASKED)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout)
    return found


def test_a_download_brings_what_was_asked_for_and_nothing_else(downloads: list[Any]) -> None:
    unet, fp16, vae, *_, named = downloads
    assert (unet[0], fp16[0], vae[0], named[0]) == (
        ["model.safetensors"], ["model.fp16.safetensors"], ["pytorch_model.bin"], ["real.safetensors"]
    )  # fmt: skip
    assert (Path(unet[1]).name, Path(vae[1]).name, Path(named[1]).name) == ("unet", "vae", COMMIT)
    assert {name for name in Hub.asked if name.startswith("org/pipe")} == {
        *(f"org/pipe: unet/{name}" for name in ("model.safetensors", "model.fp16.safetensors", "config.json")),
        "org/pipe: vae/pytorch_model.bin", "org/pipe: vae/merges.txt",
    }  # fmt: skip
    assert "org/named: model.safetensors" not in Hub.asked


def test_a_download_of_what_is_not_there_says_so(downloads: list[Any]) -> None:
    no_variant, no_folder, no_revision = downloads[3:6]
    assert no_variant.startswith(
        "SourceError: org/pipe/vae: no weights of the variant fp16; variants that are here: none"
    )
    assert "no folder nothing in the repository (folders there: unet, vae)" in no_folder
    assert "no revision nope at http" in no_revision


# What config.json names


@pytest.mark.parametrize("layout", ["safetensors", "safetensors sharded"])
@pytest.mark.parametrize("subfolder", ["", "sub"])
def test_what_the_config_names_goes_first(layout: str, subfolder: str, tmp_path: Path) -> None:
    inner = tmp_path / subfolder
    save(inner, "own", layout, 2.0)
    save(inner, "fp16", "safetensors", 3.0)
    save(inner, None, "safetensors", 4.0)
    index = "sharded" in layout
    own = canonical_index(False, "own") if index else canonical_name(False, "own")
    # from_pretrained takes an index only under a name that ends as the plain one's does.
    name = "own.safetensors.index.json" if index else own
    (inner / own).rename(inner / name)
    change_config(inner, transformers_weights=name)
    both(tmp_path, {"subfolder": subfolder}, subfolder=subfolder)
    both(tmp_path, {"subfolder": subfolder, "variant": "fp16"}, subfolder=subfolder, variant="fp16")
    found = resolve(tmp_path, make_selection("fp16", subfolder))
    assert found.warnings == (
        f"{name} was believed, which config.json names in transformers_weights, whatever the variant",
    )


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "x.bin", 3, "", "a\0.safetensors"])
def test_a_bad_name_in_the_config_is_refused_as_from_pretrained_refuses_it(name: Any, tmp_path: Path) -> None:
    save(tmp_path / "m", None, "safetensors", 2.0)
    put(tmp_path, "x.safetensors")
    change_config(tmp_path / "m", transformers_weights=name)
    with pytest.raises(SourceError, match=r"config.json: transformers_weights: expected"):
        lowmem.inspect(tmp_path / "m")
    with pytest.raises((ValueError, AttributeError, OSError)):
        model_class(tmp_path / "m").from_pretrained(tmp_path / "m")


def test_a_name_in_the_config_of_a_file_that_is_gone(tmp_path: Path) -> None:
    put(tmp_path, "model.safetensors")
    (tmp_path / "config.json").write_text('{"transformers_weights": "gone.safetensors"}')
    with pytest.raises(SourceError, match=r"transformers_weights names 'gone.safetensors', which is not there"):
        lowmem.inspect(tmp_path)
    (tmp_path / "config.json").write_text('{"transformers_weights": null, "a": NaN}')
    assert chosen(resolve(tmp_path)) == ["model.safetensors"]


def test_a_converted_checkpoint_is_found_under_its_new_name(tmp_path: Path) -> None:
    save(tmp_path / "m" / "sub", "own", "safetensors", 2.0)
    change_config(tmp_path / "m" / "sub", transformers_weights=canonical_name(False, "own"))
    lowmem.convert(tmp_path / "m", tmp_path / "out", subfolder="sub")
    assert "transformers_weights" not in json.loads((tmp_path / "out/config.json").read_text())
    before, after = lowmem.load(tmp_path / "m", subfolder="sub").model, lowmem.load(tmp_path / "out").model
    after.name_or_path = after.config.name_or_path = before.name_or_path
    before.config.transformers_weights = after.config.transformers_weights = None
    assert_same_model(after, before)


# What is no model in one folder


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_alone_names_its_base_model(name: str, tmp_path: Path) -> None:
    put(tmp_path, name)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base", "peft_type": "LORA"}')
    with pytest.raises(SourceError) as refused:
        lowmem.inspect(tmp_path)
    for words in (f"only an adapter ({name})", "load the base model 'org/base', which its adapter_config.json names",
                  "then peft.PeftModel.from_pretrained(model, FOLDER)", f"the path of {name}"):  # fmt: skip
        assert words in str(refused.value)


def test_an_adapter_beside_weights_is_left_alone_and_said(tmp_path: Path) -> None:
    save(tmp_path, None, "safetensors", 2.0)
    save_file({"a": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    warnings = lowmem.load(tmp_path).plan.warnings
    assert any(w.startswith("adapter_model.safetensors: an adapter, which was left alone; peft.") for w in warnings)


def test_the_ranks_of_a_distributed_checkpoint_are_refused_by_name(tmp_path: Path) -> None:
    """As `_save_model_checkpoint_distributed` of transformers names them; a consolidated model beside them is taken."""
    names = [f"shard-0000{i}-model-00001-of-00001.safetensors" for i in (1, 2)]
    put(tmp_path, *names, "config.json")
    for source in (tmp_path, tmp_path / names[0]):
        with pytest.raises(
            UnsupportedError, match=r"a distributed checkpoint of transformers.*consolidate_distributed"
        ):
            lowmem.inspect(source)
    sharded = pytest.importorskip("transformers.distributed.checkpoint")
    assert sharded.is_sharded_checkpoint(tmp_path)
    shutil.copy(tmp_path / names[0], tmp_path / "model-00001-of-00001.safetensors")
    put_index(tmp_path, ST_INDEX, "model-00001-of-00001.safetensors")
    found = resolve(tmp_path)
    assert (chosen(found), found.warnings) == ([ST_INDEX], ())


def test_a_torch_distributed_checkpoint_and_gguf_are_refused_by_name(tmp_path: Path) -> None:
    put(tmp_path / "dcp", ".metadata", "__0_0.distcp", "__1_0.distcp", "config.json")
    with pytest.raises(UnsupportedError, match=r"torch.distributed.checkpoint\); make one file: .*dcp_to_torch"):
        lowmem.inspect(tmp_path / "dcp")
    put(tmp_path / "gguf", "model.q4.gguf", "config.json")
    for source in (tmp_path / "gguf", tmp_path / "gguf" / "model.q4.gguf"):
        with pytest.raises(UnsupportedError, match=r"model.q4.gguf \(GGUF\); .*gguf_file=NAME"):
            lowmem.inspect(source)


# Every verb, and the shell


def verbs(tmp_path: Path) -> dict[str, Callable[..., Any]]:
    def make() -> nn.Module:
        return nn.Linear(2, 3)

    return {
        "inspect": lambda source, **o: lowmem.inspect(source, **o)["weight"].file,
        "plan": lambda source, **o: lowmem.plan(source, model=make, **o).checkpoint.shards[0].file,
        "load": lambda source, **o: lowmem.load(source, model=make, **o).plan.checkpoint.shards[0].file,
        "diff": lambda source, **o: lowmem.diff(source, model=make, **o),
        "stream": lambda source, **o: dict(lowmem.stream(source, **o))["weight"],
        "convert": lambda source, **o: lowmem.convert(source, tmp_path / "out", **o).files,
        "check": lambda source, **o: lowmem.check(source, **o).files,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, value in (("model", 1.0), ("sub/model", 2.0), ("sub/model.fp16", 3.0)):
        (tmp_path / "m" / "sub").mkdir(parents=True, exist_ok=True)
        state = {"weight": torch.full((3, 2), value), "bias": torch.zeros(3)}
        save_file(state, tmp_path / "m" / f"{name}.safetensors")
    return tmp_path / "m"


@pytest.mark.parametrize("verb", ["inspect", "plan", "load", "diff", "stream", "convert", "check"])
def test_every_verb_takes_them(verb: str, folder: Path, tmp_path: Path) -> None:
    run = verbs(tmp_path)[verb]
    found = run(folder, subfolder="sub", variant="fp16", revision="main")
    if verb in ("inspect", "plan", "load"):
        assert found == folder / "sub" / "model.fp16.safetensors"
    elif verb == "stream":
        assert found.unique().tolist() == [3.0]
    elif verb == "diff":
        assert not found.missing
    elif verb == "convert":
        assert next(iter(lowmem.stream(tmp_path / "out", only=["weight"])))[1].unique().tolist() == [3.0]
    else:
        assert {Path(name).parent for name in found} == {folder / "sub"}
    with pytest.raises(OptionError, match=r"^subfolder: "):
        run(folder, subfolder="..")
    with pytest.raises(OptionError, match=r"^variant: "):
        run(folder, variant="")
    with pytest.raises(OptionError, match=r"^revision: .* no revisions"):
        run(folder, revision="v1")


@pytest.mark.parametrize("verb", ["inspect", "plan", "load", "diff", "convert", "check"])
def test_the_shell_takes_them(
    verb: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_model.py").write_text("import torch\n\ndef make():\n    return torch.nn.Linear(2, 3)\n")
    monkeypatch.chdir(tmp_path)
    out = [str(tmp_path / "out")] if verb == "convert" else []
    model = ["--model", "own_model:make"] if verb in ("plan", "load", "diff") else []
    choice = ["--subfolder", "sub", "--variant", "fp16", "--revision", "main"]
    assert main([verb, str(folder), *out, *model, *choice, "--json"]) == 0
    capsys.readouterr()
    assert main([verb, str(folder), *out, *model, "--subfolder", "../m", "--json"]) == 2
    assert "subfolder: expected a folder inside the source" in capsys.readouterr().err


def test_a_pickled_variant_keeps_its_index(tmp_path: Path) -> None:
    save(tmp_path, "fp16", "pickled sharded", 2.0)
    found = lowmem.inspect(tmp_path, variant="fp16")
    assert found.index == tmp_path / "pytorch_model.bin.index.fp16.json"
    assert PT_INDEX not in {path.name for path in tmp_path.iterdir()}
