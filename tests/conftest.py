"""Shared fixtures: tiny checkpoints on disk, made once a session."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before anything imports huggingface_hub: a test that needs the network is a wrong test.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`saved("llama", "bfloat16", shard="20KB")`: a folder that transformers wrote. Read it, do not change it."""
    pytest.importorskip("transformers")
    from tiny_models import new_model

    made: dict[tuple[str, str, str], Path] = {}

    def save(kind: str, dtype: str = "float32", shard: str = "20KB") -> Path:
        key = (kind, dtype, shard)
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{kind}-{dtype}")
            new_model(kind, dtype).save_pretrained(folder, max_shard_size=shard)
            made[key] = folder
        return made[key]

    return save


@pytest.fixture
def own(saved: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """The same as `saved`, in a copy that the test may change."""

    def copy(*args: Any, **options: Any) -> Path:
        folder = tmp_path / "checkpoint"
        shutil.copytree(saved(*args, **options), folder)
        return folder

    return copy


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads that wait for each other cost more than they compute, and results may depend on them."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def quiet() -> Iterator[None]:
    """transformers without its warnings and progress bars."""
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(before)
    transformers.logging.enable_progress_bar()
