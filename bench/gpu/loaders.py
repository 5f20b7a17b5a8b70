"""Who loads: each takes a folder, a dtype and a device, and gives tensors that are there when it comes back."""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lowmem

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Loader:
    """One of them, and the package without which it cannot be."""

    name: str
    load: Callable[[Path, str, str], State]
    package: str = "torch"

    @property
    def is_here(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _lowmem(folder: Path, dtype: str, device: str) -> State:
    state: State = lowmem.load(folder, device_map=device, dtype=dtype).model.state_dict()
    return state


def _lowmem_stream(folder: Path, dtype: str, device: str) -> State:
    return dict(lowmem.stream(folder, dtype=dtype, device=device))


def _transformers(folder: Path, dtype: str, device: str) -> State:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=device)
    state: State = model.state_dict()
    return state


def _safetensors(folder: Path, dtype: str, device: str) -> State:
    from safetensors.torch import load_file

    state: State = {}
    for shard in shards(folder):
        state.update(_cast(load_file(shard, device=device), dtype))
    return state


def _safetensors_ahead(folder: Path, dtype: str, device: str) -> State:
    """Threads read the files into the page cache meanwhile."""
    threads = [threading.Thread(target=_read, args=(shard,)) for shard in shards(folder)]
    for thread in threads:
        thread.start()
    try:
        return _safetensors(folder, dtype, device)
    finally:
        for thread in threads:
            thread.join()


def _read(file: Path) -> None:
    buffer = bytearray(16 << 20)
    with file.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass


def _fastsafetensors(folder: Path, dtype: str, device: str) -> State:
    module: Any = importlib.import_module("fastsafetensors")
    loader = module.SafeTensorsFileLoader(pg=None, device=device, nogds=True)
    try:
        loader.add_filenames({0: [str(shard) for shard in shards(folder)]})
        buffers = loader.copy_files_to_device()
        state = _cast({key: buffers.get_tensor(key) for key in loader.get_keys()}, dtype)
        buffers.close()
    finally:
        loader.close()
    return state


def _instanttensor(folder: Path, dtype: str, device: str) -> State:
    module: Any = importlib.import_module("instanttensor")
    with module.safe_open(
        [str(shard) for shard in shards(folder)], framework="pt", device=torch.device(device)
    ) as file:
        # Versions differ in whether theirs is a tensor of its own or a part of a buffer that is used again.
        return {key: _cast({key: tensor}, dtype, copy=True)[key] for key, tensor in file.tensors()}


def _cast(state: State, dtype: str, *, copy: bool = False) -> State:
    if dtype == "auto":
        return {key: tensor.clone() for key, tensor in state.items()} if copy else state
    return {key: tensor.to(getattr(torch, dtype), copy=copy) for key, tensor in state.items()}


LOADERS = (
    Loader("lowmem", _lowmem),
    Loader("lowmem stream", _lowmem_stream),
    Loader("transformers", _transformers, "transformers"),
    Loader("safetensors", _safetensors, "safetensors"),
    Loader("safetensors, read ahead", _safetensors_ahead, "safetensors"),
    Loader("fastsafetensors", _fastsafetensors, "fastsafetensors"),
    Loader("InstantTensor", _instanttensor, "instanttensor"),
)
