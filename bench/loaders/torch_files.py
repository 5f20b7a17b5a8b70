"""torch's `load_state_dict(assign=True)`, from safetensors files and from pickled ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from bench.cases import Case
from bench.loaders.base import Job, MemoryLoader, Model, assign
from bench.models import empty_model
from bench.phases import Phases

Reader = Callable[[Path], Mapping[str, torch.Tensor]]


def _load_files(job: Job, phases: Phases, read: Reader) -> Model:
    """File by file: read, clone or cast as the case wants, and assign all of it to the model."""
    with phases.building():
        model = empty_model(job.case, job.source, job.shapes)
    state: dict[str, torch.Tensor] = {}
    for file in job.files:
        part = read(file)
        if job.case.casts:
            part = {key: tensor.to(job.dtype) for key, tensor in part.items()}
        elif job.case.residency == "copy":
            part = {key: tensor.clone() for key, tensor in part.items()}
        state.update(part)
    assign(model, state)
    return model


class Safetensors(MemoryLoader):
    """`safetensors.torch.load_file`, which maps; a copy is a clone."""

    name = "safetensors"
    title = "safetensors"
    packages = ("safetensors",)

    def imports(self, job: Job) -> None:
        super().imports(job)
        import safetensors.torch  # noqa: F401

    def load(self, job: Job, phases: Phases) -> Model:
        from safetensors.torch import load_file

        return _load_files(job, phases, load_file)


class TorchLoad(MemoryLoader):
    """`torch.load(mmap=True)` of `.bin` files with the same tensors in the same shards; a copy is a clone."""

    name = "torch"
    title = "torch.load"
    packages = ("torch",)
    converts = True

    def note(self, case: Case) -> str:
        return "reads `.bin` files with the same weights, written beforehand and not timed"

    def convert(self, job: Job) -> None:
        from safetensors.torch import load_file

        assert job.converted is not None
        for shard in job.shards:
            torch.save(load_file(shard), job.converted / f"{shard.stem}.bin")

    def load(self, job: Job, phases: Phases) -> Model:
        return _load_files(job, phases, lambda file: torch.load(file, mmap=True, weights_only=True))
