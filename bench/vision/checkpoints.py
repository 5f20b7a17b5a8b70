"""Checkpoints with random weights at real shapes, written once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bench.sources import settle

from .cases import Sizes
from .model import FILE_GRID, make_model

State = dict[str, torch.Tensor]
_SHARDS = 5


def make(folder: Path, name: str, sizes: Sizes) -> Path:
    """The folder of this checkpoint, written when it is not there; one that was half written never looks whole."""
    target = folder / _folder_name(name, sizes)
    if not target.exists():
        half = target.with_name(f"{target.name}.part")
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(parents=True)
        WRITERS[name](half, folder, sizes)
        half.rename(target)
        settle()
    return target


def files_of(folder: Path) -> list[Path]:
    """All files with weights."""
    return sorted(file for file in folder.rglob("*") if file.suffix in (".safetensors", ".pth", ".bin"))


def _folder_name(name: str, sizes: Sizes) -> str:
    if name == "sources":
        return f"llava-{sizes.width}x{sizes.layers}"
    base, _, form = name.partition("-")
    architecture = sizes.vit if base == "vit" else sizes.convnext
    return f"{architecture}-{form}" if form else architecture


def _write_timm(target: Path, architecture: str) -> None:
    import timm
    from timm.models._hub import save_for_hf

    model = timm.create_model(architecture)
    _randomise(model)
    save_for_hf(model, str(target), safe_serialization=True)


def _randomise(module: nn.Module) -> None:
    """All tensors differ, so that none can stand for another."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.normal_(0, 0.05, generator=generator)


def _write_pth(target: Path, folder: Path, sizes: Sizes) -> None:
    source = make(folder, "vit", sizes)
    torch.save(load_file(source / "model.safetensors"), target / "model.pth")
    shutil.copy(source / "config.json", target)


def _write_shards(target: Path, folder: Path, sizes: Sizes) -> None:
    source = make(folder, "vit", sizes)
    state = load_file(source / "model.safetensors")
    _write_parts(target, "model", "safetensors", _divided(state, _SHARDS), lambda part, file: save_file(part, file))
    shutil.copy(source / "config.json", target)


def _write_sources(target: Path, folder: Path, sizes: Sizes) -> None:
    model = make_model(sizes, FILE_GRID)
    _randomise(model)
    state: State = model.state_dict()
    tower = {key: value for key, value in state.items() if ".vision_tower." in key}
    projector = {key: value for key, value in state.items() if ".mm_projector." in key}
    llm = {key: value for key, value in state.items() if key not in tower and key not in projector}
    (target / "llm").mkdir()
    count = -(-sum(value.nbytes for value in llm.values()) // sizes.shard)
    _write_parts(target / "llm", "pytorch_model", "bin", _divided(llm, count), torch.save)
    torch.save({key.partition("vision_tower.")[2]: value for key, value in tower.items()}, target / "tower.pth")
    torch.save(projector, target / "mm_projector.bin")


def _divided(state: State, count: int) -> list[State]:
    """In order, into so many parts of about as many bytes."""
    total, before = sum(value.nbytes for value in state.values()), 0
    parts: list[State] = [{} for _ in range(count)]
    for key, value in state.items():
        parts[before * count // total][key] = value
        before += value.nbytes
    return [part for part in parts if part]


def _write_parts(
    target: Path, stem: str, suffix: str, parts: list[State], save: Callable[[State, Path], object]
) -> None:
    names = [f"{stem}-{n:05}-of-{len(parts):05}.{suffix}" for n in range(1, len(parts) + 1)]
    for name, part in zip(names, parts, strict=True):
        save(part, target / name)
    where = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    index = {"metadata": {}, "weight_map": where}
    (target / f"{stem}.{suffix}.index.json").write_text(json.dumps(index), encoding="utf-8")


WRITERS: dict[str, Callable[[Path, Path, Sizes], None]] = {
    "vit": lambda target, _, sizes: _write_timm(target, sizes.vit),
    "convnextv2": lambda target, _, sizes: _write_timm(target, sizes.convnext),
    "vit-pth": _write_pth,
    "vit-shards": _write_shards,
    "sources": _write_sources,
}
