"""Who loads: each takes a folder, a dtype and a device, and gives tensors that are there when it comes back."""

from __future__ import annotations

import contextlib
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
    # What of it only some versions have: the name of a class, and of a method of it.
    needs: tuple[str, str] | None = None

    @property
    def is_here(self) -> bool:
        if importlib.util.find_spec(self.package) is None:
            return False
        if self.needs is None:
            return True
        found = getattr(importlib.import_module(self.package), self.needs[0], None)
        return hasattr(found, self.needs[1])


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


def _safetensors_prefetch(folder: Path, dtype: str, device: str) -> State:
    """Its own threads, from version 0.9 on. Those of all files begin at once; they share their pinned memory."""
    opened: Any = importlib.import_module("safetensors").safe_open
    state: State = {}
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(opened(shard, framework="pt", device=device)) for shard in shards(folder)]
        loaders = [stack.enter_context(file.prefetch()) for file in files]
        for loader in loaders:
            for key, tensor in loader:
                state[key] = _cast({key: tensor}, dtype)[key]
    return state


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
    Loader("safetensors, prefetch", _safetensors_prefetch, "safetensors", ("safe_open", "prefetch")),
    Loader("fastsafetensors", _fastsafetensors, "fastsafetensors"),
    Loader("InstantTensor", _instanttensor, "instanttensor"),
)
