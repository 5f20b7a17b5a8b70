"""Limits against hostile files let the largest honest ones pass: many labels, many tensors in an index or on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowmem
from lowmem import _files
from lowmem.checkpoint.location import shards_named
from lowmem.errors import ModelError
from lowmem.modeling import demands


def classifier(folder: Path, labels: int, **said: Any) -> Path:
    """A model with a row of its last layer for each label."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(**sizes, vocab_size=100, num_labels=labels)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    file = folder / "config.json"
    table = json.loads(file.read_bytes())
    if said:
        del table["id2label"], table["label2id"]
    file.write_text(json.dumps({**table, **said}, indent=2))
    return folder


def test_a_config_with_the_names_of_the_labels_of_imagenet_22k_is_read(tmp_path: Path) -> None:
    """Each name stands twice in it."""
    model = lowmem.load(classifier(tmp_path, 21_841)).model
    assert model.config.id2label[21_840] == "LABEL_21840"


def test_as_many_labels_as_the_weights_have_rows_for_are_no_attack(tmp_path: Path) -> None:
    """Nor is a label whose name ends like the name of a count."""
    labels = 120_000
    folder = classifier(tmp_path, labels, num_labels=labels, label2id={"religious groups": labels - 1})
    assert lowmem.plan(folder).checkpoint.nbytes > labels * 64 * 4
    table = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps({**table, "num_labels": 10**6}))
    with pytest.raises(ModelError, match="'num_labels': expected at most"):
        lowmem.plan(folder)


def test_a_short_config_is_weighed_as_often_as_it_is_copied(tmp_path: Path) -> None:
    """300 KB of empty lists take 15 MB each time."""
    file = tmp_path / "config.json"
    file.write_bytes(b'{"a":[' + b"[]," * 100_000 + b"0]}")
    with pytest.raises(_files.TooHeavyError):
        _files.read_config(file)


def test_an_index_of_160_000_tensors_is_read_before_its_shards_are_there(tmp_path: Path) -> None:
    """A download begins with it, and asks it for the names of the shards."""
    index = tmp_path / "model.safetensors.index.json"
    keys = [f"model.layers.{i // 2000}.mlp.experts.{i % 2000}.down_proj.weight_scale_inv" for i in range(160_000)]
    table = {key: f"model-{i // 1000 + 1:05}-of-00160.safetensors" for i, key in enumerate(keys)}
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}, indent=2))
    assert len(shards_named(index) or ()) == 160


def test_an_index_on_disk_may_take_as_much_memory_as_its_files_have_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or what was written for many tensors would never be found again."""
    source = tmp_path / "model.bin"
    torch.save(nn.Linear(64, 64).state_dict(), source)
    options: dict[str, Any] = {"dtype": "bfloat16", "device_map": {"": "disk"}, "offload_folder": tmp_path / "offload"}

    def load() -> lowmem.LoadResult:
        return lowmem.load(source, model=lambda: nn.Linear(64, 64), **options)

    load()
    monkeypatch.setattr(_files, "ROOM", 0)
    second = load()
    assert second.plan.offload is not None
    assert second.plan.offload.reused


def test_modules_are_not_counted_any_more_when_a_build_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the program's own models would be refused later."""
    weights = tmp_path / "model.bin"
    torch.save(nn.Linear(2, 2).state_dict(), weights)

    def interrupted(hook: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demands.hooks, "register_module_module_registration_hook", interrupted)
    with pytest.raises(KeyboardInterrupt), demands.counted("here", lowmem.inspect(weights)):
        pass
    assert not demands.hooks._global_parameter_registration_hooks
