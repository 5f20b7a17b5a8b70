"""Divided models, loaded by all their ranks at once, are the whole model: by gloo, with 2 and 4 processes.

The cases are in rank_cases.py. All of them run in the same processes, which cost seconds to start.
"""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pickled_checkpoints import pickle_folder
from safetensors.torch import save_file
from tiny_models import new_model
from torch import nn

import lowmem

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.xdist_group("ranks"),
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"),
]
pytest.importorskip("transformers")
pytest.importorskip("torch.distributed.fsdp")
if dist.is_available():
    from tests.rank_cases import OF_FOUR, OF_TWO, Block, Odd
    from tests.rank_models import run_cases
    from tests.rank_processes import run_ranks
else:
    OF_FOUR, OF_TWO = [], []

Answers = list[Any]


def _random(model: nn.Module, seed: int, prefix: str = "") -> dict[str, torch.Tensor]:
    """A state dict of a module's shapes and dtypes."""
    generator = torch.Generator().manual_seed(seed)

    def values(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() or tensor.is_complex():
            return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        top = 2 if tensor.dtype == torch.bool else 1000
        return torch.randint(0, top, tensor.shape, generator=generator).to(tensor.dtype)

    return {prefix + name: values(tensor) for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("ranks")
    found = {}
    for name, kind, dtype in (
        ("llama", "llama", "float32"),
        ("llama-bf16", "llama", "bfloat16"),
        ("llama-tied", "llama-tied", "float32"),
        ("moe", "qwen3-moe", "float32"),
        ("gpt2", "gpt2", "float32"),
    ):
        found[name] = base / name
        new_model(kind, dtype).save_pretrained(found[name], max_shard_size="20KB")
    found["llama-bin"] = pickle_folder(found["llama"], base / "llama-bin")
    found["llama-int8"] = base / "llama-int8"
    lowmem.convert(found["llama"], found["llama-int8"], quantize="int8")
    for name, module, prefix in (("odd", Odd(), ""), ("odd-2", Odd(), "inner."), ("block", Block(), "")):
        found[name] = base / f"{name}.safetensors"
        save_file(_random(module, len(name), prefix), found[name])
    found["large"] = base / "large.safetensors"
    save_file(_random(nn.Sequential(*[nn.Linear(2048, 2048) for _ in range(12)]), 1), found["large"])
    return found


@pytest.fixture(scope="module")
def of_four(folders: dict[str, Path]) -> Answers:
    return run_ranks(4, run_cases, OF_FOUR, folders, timeout=600)


@pytest.fixture(scope="module")
def of_two(folders: dict[str, Path]) -> Answers:
    return run_ranks(2, run_cases, OF_TWO, folders, timeout=300)


def check(answers: Answers, name: str) -> None:
    for rank, answer in enumerate(answers):
        assert isinstance(answer, dict), f"rank {rank}: {answer!r}"
    problems = [f"rank {rank}: {problem}" for rank, answer in enumerate(answers) for problem in answer[name]]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("name", OF_FOUR)
def test_four_ranks(of_four: Answers, name: str) -> None:
    check(of_four, name)


@pytest.mark.parametrize("name", OF_TWO)
def test_two_ranks(of_two: Answers, name: str) -> None:
    check(of_two, name)


def test_no_process_is_left(of_four: Answers, of_two: Answers) -> None:
    assert not multiprocessing.active_children()
