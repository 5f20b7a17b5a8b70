"""What lies beside weights, made to do harm: configs, manifests, device maps, folders of offloads and conversions."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import fresh
import pytest
from hostile_ways import IMPORTS, KINDS, SOUND, folder_of, refused, safetensors, special, tried

import lowmem
from lowmem.checkpoint.hub import _held

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory and files are looked at as Linux has them")

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
DEEP = 100_000


def model(path: Path, config: dict[str, Any] | bytes | None = None, name: str = "config.json") -> Path:
    folder = folder_of(path, safetensors(SOUND))
    if config is not None:
        (folder / name).write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
    return folder


# Configs


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_of_another_kind_is_no_config(kind: str, tmp_path: Path) -> None:
    """It hangs nobody and is not read into memory; 4 GB of it took 9 GB in a conversion."""
    folder = model(tmp_path)
    special(folder / "config.json", kind)
    refused(folder, "", ways=["plan", "load", "lowmem plan"])
    tried(folder, ways=["inspect", "check", "convert", "load"], model="linear")


CONFIGS: dict[str, Any] = {
    "depth": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "a long number": b'{"model_type":' + b"9" * 5000 + b"}",
    "UTF-16": json.dumps(LLAMA).encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf" + json.dumps(LLAMA).encode(),
    "lists that swell": b'{"a":[' + b"[]," * 3_000_000 + b"0]}",
    "2**40 layers": {**LLAMA, "num_hidden_layers": 2**40},
    "ten million layers": {**LLAMA, "num_hidden_layers": 10**7},
    "20,000 layers": {**LLAMA, "num_hidden_layers": 20_000},
    "1e300 layers": {**LLAMA, "num_hidden_layers": 1e300},
    "layers below zero": {**LLAMA, "num_hidden_layers": -1, "hidden_size": -32},
    "layers in text": {**LLAMA, "num_hidden_layers": "3"},
    "no heads": {**LLAMA, "num_attention_heads": 0},
    "half a layer": {**LLAMA, "num_hidden_layers": 1.5},
    "2**40 heads": {**LLAMA, "num_attention_heads": 2**40},
    "2**40 labels": {**LLAMA, "num_labels": 2**40},
    "layers within": {"model_type": "llava", "text_config": {**LLAMA, "num_hidden_layers": 10**9}},
    "experts": {"model_type": "mixtral", "num_local_experts": 10**7},
    "depths": {"model_type": "swin", "depths": [2, 10**7], "num_heads": [2, 2]},
    "a size of 2**62": {**LLAMA, "hidden_size": 2**62},
    "a vocabulary of 2**64": {**LLAMA, "vocab_size": 2**64},
    "a type that is a path": {**LLAMA, "architectures": None, "model_type": "../../x"},
    "a type that steers": {"model_type": "\x1b]52;c;aGk=\x07\u202e"},
    "a type of a megabyte": {"model_type": "x" * 10**6},
    "a type that is none": {"model_type": 5},
    "a class that steers": {**LLAMA, "architectures": ["\x1b[31mEvil\ud800"]},
    "a class of a megabyte": {**LLAMA, "architectures": ["A" * 10**6]},
    "classes of no text": {**LLAMA, "architectures": [[1]]},
    "a dtype of half a pair": {**LLAMA, "torch_dtype": "\ud800"},
    "a dtype that is a function": {**LLAMA, "dtype": "load"},
    "quantised by a number": {**LLAMA, "quantization_config": 5},
    "an activation that is code": {**LLAMA, "hidden_act": "__import__('os').system('true')"},
    "weights outside": {**LLAMA, "transformers_weights": "../../etc/x.safetensors"},
    "rope of a number": {**LLAMA, "rope_parameters": 5},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_demand_the_impossible_are_refused(name: str, tmp_path: Path) -> None:
    """Whatever transformers would raise of it, or for however long it would build."""
    refused(model(tmp_path, CONFIGS[name]), "", ways=["plan", "lowmem plan"])


@pytest.mark.parametrize("where", ["auto_map", "custom_generate", "architectures"])
def test_code_beside_the_weights_runs_only_where_it_is_allowed(where: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w').close()\n"
    names = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForCausalLM": "evil.Model"}
    config = {**LLAMA, "auto_map": names, "trust_remote_code": True}
    if where == "architectures":
        config = {"model_type": "evil", "architectures": ["Model"], "auto_map": names}
    folder = model(tmp_path / "model", config)
    for name in ("evil.py", "modeling_evil.py", "configuration_evil.py", "__init__.py", "sitecustomize.py"):
        (folder / name).write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    tried(folder)
    assert not marker.exists()


GENERATION: dict[str, bytes] = {
    "depth": b"[" * DEEP,
    "NaN": b'{"temperature":NaN}',
    "other types": b'{"max_length":"x","do_sample":5,"stop_strings":[1]}',
    "a list": b"[]",
    "swelling": b'{"a":[' + b"[]," * 3_000_000 + b"0]}",
    "code": b'{"custom_generate":"evil/code","trust_remote_code":true}',
}


@pytest.mark.parametrize("name", GENERATION)
def test_generation_configs_end_in_a_load_or_a_refusal(name: str, tmp_path: Path) -> None:
    tried(model(model(tmp_path, LLAMA), GENERATION[name], "generation_config.json"), ways=["plan", "load"])


def test_a_link_is_not_copied_into_a_conversion(tmp_path: Path) -> None:
    """Else a link that came with the weights puts a file of the user's into what he publishes."""
    secret = tmp_path / "secret"
    secret.write_text('{"token": "secret"}')
    for name in ("config.json", "tokenizer.json"):
        folder = model(tmp_path / name)
        (folder / name).symlink_to(secret)
        with pytest.raises(lowmem.CheckpointError, match="put the file itself into the folder"):
            lowmem.convert(folder, tmp_path / f"out-{name}")
        inner = model(tmp_path / f"inner-{name}")
        (inner / "kept").write_text("{}")
        (inner / name).symlink_to("kept")
        lowmem.convert(inner, tmp_path / f"out-inner-{name}")


# Manifests

ZEROS = b"0" * 64
MANIFESTS: dict[str, bytes] = {
    "outside": ZEROS + b"  ../x\n",
    "absolute": ZEROS + b"  /etc/passwd\n",
    "NUL": ZEROS + b"  a\0b\n",
    "two hashes of one file": ZEROS + b"  model.safetensors\n" + b"1" * 64 + b"  model.safetensors\n",
    "another hash": ZEROS + b"  model.safetensors\n",
    "no hex": b"z" * 64 + b"  model.safetensors\n",
    "a line of ten megabytes": b"0" * 10_000_000 + b"\n",
    "a name of ten megabytes": ZEROS + b"  " + b"x" * 10_000_000 + b"\n",
    "escapes": ZEROS + b"  \x1b[31m\x9b\xff\n",
    "a new line in a name": b"\\" + ZEROS + b"  a\\nlowmem: fine\n",
    "a fifo": ZEROS + b"  fifo\n",
    "a device": ZEROS + b"  zero\n",
    "a folder": ZEROS + b"  sub\n",
    "itself": ZEROS + b"  .\n",
    "a loop": ZEROS + b"  loop\n",
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_lies_is_refused_or_reported(name: str, tmp_path: Path) -> None:
    """It neither hangs a check nor lets it read what is not of the folder."""
    folder, sums = model(tmp_path / "model"), tmp_path / "sums"
    sums.write_bytes(MANIFESTS[name])
    special(folder / "fifo", "fifo")
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "loop").symlink_to("loop")
    (folder / "sub").mkdir()
    for way, came in tried(
        folder, ways=["check", "lowmem check"], options={"manifest": str(sums)}, allowed=[sums]
    ).items():
        assert came["outcome"] == "refused" or not came["text"].endswith("[])"), (way, came)


@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_or_a_device_map_of_another_kind_is_refused(kind: str, tmp_path: Path) -> None:
    folder, file = model(tmp_path / "model"), tmp_path / "file.json"
    special(file, kind)
    for options in ({"manifest": str(file)}, {"write_manifest": str(file)}):
        tried(folder, ways=["check", "lowmem check"], options=options, allowed=[file, tmp_path])
    refused(folder, "", ways=["lowmem plan"], model="linear", options={"device_map": str(file)}, allowed=[file])


@pytest.mark.parametrize(
    "raw",
    [
        b"[" * DEEP,
        b'{"":' + b"9" * 5000 + b"}",
        b'{"\\u001b[2J":"\\u009b31m"}',
        b"{" + b",".join(b'"a%d":"cpu"' % i for i in range(30_000)) + b',"a1":"cpu"}',
        b"\xff\xfe",
        b"",
        b'{"":"' + b"x" * 10**6 + b'"}',
    ],
    ids=["depth", "a long number", "escapes", "one of many twice", "no text", "nothing", "a device of a megabyte"],
)
def test_device_maps_that_mean_nothing_are_refused(raw: bytes, tmp_path: Path) -> None:
    """One name twice among 30,000 was looked for in a time that grows with the square of them."""
    folder, file = model(tmp_path / "model"), tmp_path / "map.json"
    file.write_bytes(raw)
    refused(folder, "", ways=["lowmem plan"], model="linear", options={"device_map": str(file)}, allowed=[file])


# Folders that lowmem writes and reads again


@pytest.mark.parametrize("kind", KINDS)
def test_an_offload_folder_with_an_index_of_another_kind_is_not_believed(kind: str, tmp_path: Path) -> None:
    folder, offload = model(tmp_path / "model"), tmp_path / "offload"
    options = {"device_map": "disk", "offload_folder": str(offload), "dtype": "float16"}
    tried(folder, ways=["load"], model="linear", options=options, allowed=[offload])
    for file in offload.glob("*.json"):
        file.unlink()
        special(file, kind)
    tried(folder, ways=["load"], model="linear", options=options, allowed=[tmp_path])


_CONVERT = """
import signal
import lowmem
signal.alarm(60)
try:
    lowmem.convert(**args)
except lowmem.LowmemError:
    pass
"""


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversion_with_a_state_of_another_kind_is_not_taken_up(kind: str, tmp_path: Path) -> None:
    folder, out = model(tmp_path / "model"), tmp_path / "out"
    hidden = out / ".lowmem-convert"
    hidden.mkdir(parents=True)
    for name in ("state.json", "model.safetensors.json", "model.safetensors"):
        special(hidden / name, kind)
    fresh.server(*IMPORTS).run(_CONVERT, source=str(folder), out=str(out))


def test_names_in_the_hubs_cache_are_small_files(tmp_path: Path) -> None:
    """What names the commits there is no fifo, and no file of gigabytes."""
    (tmp_path / "snapshots" / "0123abc").mkdir(parents=True)
    (tmp_path / "refs").mkdir()
    (tmp_path / "refs" / "main").write_text("0123abc")
    assert _held(tmp_path) == "main (0123abc)"
    os.truncate(tmp_path / "refs" / "main", 4 << 30)
    assert _held(tmp_path) == ""
