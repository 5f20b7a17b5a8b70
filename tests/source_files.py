"""Folders that sources lead to, and what they lead to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowmem import LowmemError, SourceError
from lowmem.checkpoint.selection import Selection
from lowmem.checkpoint.source import Source, resolve

ST_INDEX = "model.safetensors.index.json"
PT_INDEX = "pytorch_model.bin.index.json"


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
        resolve(source, Selection(download=download))  # type: ignore[arg-type]
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert not_in not in message
    assert len(message) < 2000
    assert type(caught.value) is error
    return message


def index_of(*shards: str) -> bytes:
    return json.dumps({"weight_map": {f"k{i}": shard for i, shard in enumerate(shards)}}).encode()
