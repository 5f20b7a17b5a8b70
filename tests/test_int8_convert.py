"""int8 in `lowmem convert`: what transformers loads with bitsandbytes as its own, and floats again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

bnb = pytest.importorskip("bitsandbytes", reason="compares with bitsandbytes")
transformers = pytest.importorskip("transformers")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key


def load_theirs(folder: Path, **options: object) -> torch.nn.Module:
    return transformers.AutoModel.from_pretrained(folder, **options)


def quantised_by_transformers(folder: Path, out: Path, skip: list[str] | None = None) -> dict[str, torch.Tensor]:
    config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    cls = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    cls.from_pretrained(folder, quantization_config=config).save_pretrained(out)
    return tensors_of(out)
