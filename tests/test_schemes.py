"""A source is a path, what a scheme makes of it, or the name of a model in the cache; else it is refused with a reason.

The hub's cache is laid out here as huggingface_hub lays it out; the hub itself is a small server on this machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from fake_hub import COMMIT, REPOSITORIES, SMALL, TWO, Hub, repository
from huggingface_hub import constants, snapshot_download
from huggingface_hub import errors as hub_errors
from source_files import ST_INDEX, chosen, index_of, put, put_index, refused

from lowmem import OptionError, SourceError, UnsupportedError, inspect
from lowmem.checkpoint import hub, schemes
from lowmem.checkpoint.schemes import register_scheme
from lowmem.checkpoint.selection import Selection
from lowmem.checkpoint.source import resolve

OTHER = "0123fff" + "1" * 33


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
    assert resolve("SHELF:p.bin", Selection(download=True)).pickled
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


def test_the_shards_of_a_cached_model_are_read_where_they_lie(cache: Path) -> None:
    header = b'{"KEY":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}'
    keys = {name: f"k{i:02}".encode() for i, name in enumerate(TWO)}
    files = {name: len(header).to_bytes(8, "little") + header.replace(b"KEY", key) for name, key in keys.items()}
    folder = repository(cache, "org/name", {ST_INDEX: index_of(*TWO).replace(b'"k', b'"k0')})
    repository(cache, "org/name", {name: data + b"abc" for name, data in files.items()})
    found = inspect("org/name")
    assert {key: entry.file for key, entry in found.items()} == {f"k0{i}": folder / name for i, name in enumerate(TWO)}
    assert (found.source, found.folder, found.warnings) == ("org/name", folder, ())


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


ASKED = [
    "org/single", "hf-hub:org/sharded@v1", "org/pickled", f"org/pickled@{COMMIT}", "org/brackets", "org/stale",
    "org/lacking", "org/no-shards", "org/several", "org/pipe", "org/empty", "org/gguf", "org/none", "org/single@nope",
]  # fmt: skip
DOWNLOAD = """
import json, sys
from lowmem import LowmemError
from lowmem.checkpoint.selection import Selection
from lowmem.checkpoint.source import resolve

def told(source, download):
    try:
        found = resolve(source, Selection(download=download))
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
        ("org/pipe", ["SourceError", "a pipeline of several models, in unet, vae", "subfolder='unet' (--subfolder)"]),
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
