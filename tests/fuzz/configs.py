"""`config.json` and `generation_config.json` beside tiny weights: what lowmem plans with, transformers can read too."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from transformers import AutoConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

import lowmem

from . import scenes
from .damage import change
from .guard import Broken, Guard
from .targets import Target

_SIZES = {
    "vocab_size": 8,
    "hidden_size": 4,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
}
_CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "float32", **_SIZES}
_INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0, "llm_int8_skip_modules": None}
_GENERATION = {"eos_token_id": 1, "max_length": 8, "do_sample": True, "temperature": 0.5}
_made: list[bytes] = []


def _weights() -> bytes:
    if not _made:
        torch.manual_seed(0)
        _made.append(save(LlamaForCausalLM(LlamaConfig(**_SIZES)).state_dict()))
    return _made[0]


def _seeds() -> list[bytes]:
    rope = {"rope_type": "linear", "factor": 2.0}
    return [
        scenes.encode({"config.json": ["json", _CONFIG]}),
        scenes.encode({"config.json": ["json", _CONFIG], "generation_config.json": ["json", _GENERATION]}),
        scenes.encode({"config.json": ["json", {**_CONFIG, "rope_scaling": rope, "torch_dtype": "bfloat16"}]}),
    ]


def _execute(guard: Guard, data: bytes, folder: Path) -> None:
    model = folder / "model"
    scenes.elsewhere(folder)
    files = scenes.decode(data)
    if files is None:
        files = {}
        model.mkdir()
        (model / "config.json").write_bytes(data)
    # A config may be a link to another folder, as in the hub's cache.
    files = {name: node for name, node in files.items() if node[0] != "link" or node[1:] in (["/dev/zero"], ["loop"])}
    scenes.make(files, model, {}, {"$elsewhere": str(folder / "elsewhere")}, 10**18)
    if not (model / "model.safetensors").is_symlink() and not (model / "model.safetensors").exists():
        (model / "model.safetensors").write_bytes(_weights())
    plan = guard.run(lambda: lowmem.plan(model, ram="1GiB"), size=len(data), read=folder)
    if plan is None:
        return
    try:
        AutoConfig.from_pretrained(str(model), local_files_only=True)
        if (model / "generation_config.json").is_file():
            GenerationConfig.from_pretrained(str(model), local_files_only=True)
    except OSError:
        return  # No JSON counts as absent, as there.
    except Exception as error:
        raise Broken(f"planned, and transformers refuses it: {type(error).__name__}: {error}"[:2000]) from error


def _mutate(data: bytes, chance: random.Random) -> bytes:
    files = scenes.decode(data)
    node: Any = (files or {}).get("config.json")
    if files and node and node[0] == "json" and isinstance(node[1], dict) and chance.random() < 0.3:
        table = dict(node[1])
        name = chance.choice((*_CONFIG, "quantization_config", "torch_dtype", "tie_word_embeddings", "rope_scaling"))
        table[name] = change(_INT8 if name == "quantization_config" else table.get(name, "float16"), chance)
        return scenes.encode({**files, "config.json": ["json", table]})
    return scenes.mutate(data, chance, {})


TARGETS = (Target("config", _seeds, _execute, _mutate),)
