"""Models of int8 as transformers makes them, and the comparison with ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import model_class, outputs_of, same
from torch import nn

import lowmem
from bench.comparison import differences_of


def theirs_of(folder: Path, quantise: bool = True, **options: Any) -> Any:
    """What transformers makes of a checkpoint; with `quantise` as int8."""
    if quantise:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_skip_modules=options.pop("skip_modules", None)
        )
    return model_class(folder).from_pretrained(folder, **options).eval()


def int8_of(model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Name of each int8 layer → weight and scales, before its first forward."""
    return {
        name: (m.weight.data, m.weight.SCB) for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear8bitLt)
    }


def assert_same_int8(ours: Any, theirs: Any, *, ignore: tuple[str, ...] = ("quantization_config",)) -> None:
    """Every tensor, every scale, what the model computes and what it would save."""
    differences = [line for line in differences_of(ours, theirs) if not any(word in line for word in ignore)]
    assert not differences, "\n".join(differences[:10])
    found, expected = int8_of(ours), int8_of(theirs)
    assert list(found) == list(expected)
    assert found
    for name, (weight, scales) in expected.items():
        assert same(found[name][0], weight), name
        assert same(found[name][1], scales), name
    assert same(outputs_of(ours), outputs_of(theirs))


def assert_bytes_as_planned(result: lowmem.LoadResult) -> None:
    """What the plan says of each device is what the loaded tensors take there."""
    held: dict[int, int] = {}
    for tensor in result.model.state_dict(keep_vars=True).values():
        held[id(tensor)] = tensor.nbytes if tensor.dtype != torch.uint8 else 0
    planned = sum(device.weights for device in result.plan.devices.values())
    assert planned == sum(held.values())
    assert planned == sum(placement.nbytes for placement in result.plan.placements)


def as_bin(folder: Path, into: Path, shards: int = 1) -> Path:
    """The same checkpoint as pickled files, dealt out to several."""
    into.mkdir()
    for file in folder.glob("*.json"):
        if "index" not in file.name:
            shutil.copy(file, into)
    state = {
        key: tensor.clone() for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()
    }
    write_shards(state, into, shards, "bin")
    return into


def write_shards(state: dict[str, torch.Tensor], folder: Path, shards: int, ending: str = "safetensors") -> None:
    """Keys in turn into one file or several, so that neighbours are in different ones."""
    name = {"bin": "pytorch_model", "safetensors": "model"}[ending]
    save = torch.save if ending == "bin" else lambda part, file: save_file(part, file, {"format": "pt"})
    if shards == 1:
        save(state, folder / f"{name}.{ending}")
        return
    table: dict[str, str] = {}
    for number in range(shards):
        part = {key: state[key] for i, key in enumerate(state) if i % shards == number}
        file = f"{name}-{number + 1:05d}-of-{shards:05d}.{ending}"
        save(part, folder / file)
        table.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": table}
    (folder / f"{name}.{ending}.index.json").write_text(json.dumps(index))


class Holder(nn.Module):
    """A linear layer of any size in a module."""

    def __init__(self, rows: int, columns: int, bias: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(columns, rows, bias=bias)
        self.norm = nn.LayerNorm(4)


def expected_of(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bitsandbytes' own rounding."""
    values, scales, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))
    return values, scales
