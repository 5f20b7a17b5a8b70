"""Who loads: each a class, found by name."""

from __future__ import annotations

from bench.loaders.base import Job, Loader, Model
from bench.loaders.formats import Flashpack, Tensorizer
from bench.loaders.huggingface import Accelerate, Transformers
from bench.loaders.limit import Limit
from bench.loaders.lowmem import Lowmem
from bench.loaders.streamers import Fastsafetensors, Runai
from bench.loaders.torch_files import Safetensors, TorchLoad

_CLASSES: tuple[type[Loader], ...] = (
    Lowmem,
    Transformers,
    Accelerate,
    Safetensors,
    TorchLoad,
    Fastsafetensors,
    Runai,
    Flashpack,
    Tensorizer,
    Limit,
)
LOADERS: dict[str, Loader] = {made.name: made() for made in _CLASSES}

__all__ = ["LOADERS", "Job", "Loader", "Model"]
