"""The checkpoints of safetensors that tests make, written as pickles."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def pickle_folder(source: Path, out: Path, *, legacy: bool = False, tied: bool = False, **around: Any) -> Path:
    """The same checkpoint as `pytorch_model*.bin`, with its index, if it has one.

    Args:
        source: a folder of safetensors.
        out: a new folder.
        legacy: in the format of before torch 1.6.
        tied: with `lm_head.weight` as a second name of the embedding's storage.
        around: what else stands beside `model` in each file; without it the files are bare state dicts.
    """
    out.mkdir()
    names = {}
    for file in sorted(source.glob("*.safetensors")):
        state: dict[str, Any] = load_file(file)
        embeddings = [value for key, value in state.items() if key.endswith("embed_tokens.weight")]
        if tied and embeddings:
            state["lm_head.weight"] = embeddings[0]
        name = file.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        names.update(dict.fromkeys(state, name))
        whole = {**around, "model": state} if around else state
        torch.save(whole, out / name, _use_new_zipfile_serialization=not legacy)
    if len(set(names.values())) > 1:
        total = json.loads((source / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
        index = {"metadata": {"total_size": total}, "weight_map": names}
        (out / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for beside in source.glob("*.json"):
        if not beside.name.endswith(".index.json"):
            shutil.copy(beside, out)
    return out
