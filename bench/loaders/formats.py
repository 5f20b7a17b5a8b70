"""Loaders that need the weights in a format of their own, written beforehand and not timed: FlashPack, tensorizer."""

from __future__ import annotations

import os

import torch

from bench.cases import Case
from bench.loaders.base import Job, MemoryLoader, Model, install
from bench.models import empty_model, tie
from bench.phases import Phases

_NOTE = "reads a file of its own format, written beforehand and not timed"


class Flashpack(MemoryLoader):
    """`assign_from_file`: maps by default; copies with its parallel reader, which an environment variable turns on.

    It has no cast on load, so mapped weights are cast afterwards.
    """

    name = "flashpack"
    title = "FlashPack"
    packages = ("flashpack",)
    converts = True

    def note(self, case: Case) -> str:
        return _NOTE + (", and casts the whole model afterwards" if case.casts else "")

    def imports(self, job: Job) -> None:
        super().imports(job)
        import flashpack  # noqa: F401

    def convert(self, job: Job) -> None:
        from flashpack import pack_to_file

        assert job.converted is not None
        pack_to_file(_whole_state(job), str(job.converted / "model.flashpack"), target_dtype=None)

    def load(self, job: Job, phases: Phases) -> Model:
        from flashpack import assign_from_file

        with phases.building():
            model = empty_model(job.case, job.source, job.shapes)
        copies = job.case.residency == "copy" and not job.case.casts
        os.environ["FLASHPACK_CPU_PARALLEL_READ"] = "1" if copies else "0"
        assign_from_file(model, str(job.files[0]), device="cpu")
        tie(model)
        if job.case.casts:
            model.to(job.dtype)
        model.eval()
        return model


class Tensorizer(MemoryLoader):
    """`TensorDeserializer`, with as many readers as it likes, then `load_into_module`."""

    name = "tensorizer"
    title = "tensorizer"
    packages = ("tensorizer",)
    converts = True

    def note(self, case: Case) -> str:
        return _NOTE

    def imports(self, job: Job) -> None:
        super().imports(job)
        import tensorizer  # noqa: F401

    def convert(self, job: Job) -> None:
        from tensorizer import TensorSerializer

        assert job.converted is not None
        model = empty_model(job.case, job.source, job.shapes)
        install(model, _whole_state(job))
        serializer = TensorSerializer(str(job.converted / "model.tensors"))
        serializer.write_module(model)
        serializer.close()

    def load(self, job: Job, phases: Phases) -> Model:
        from tensorizer import TensorDeserializer

        with phases.building():
            model = empty_model(job.case, job.source, job.shapes)
        dtype = job.dtype if job.case.casts else None
        with TensorDeserializer(str(job.files[0]), device="cpu", dtype=dtype) as deserializer:
            deserializer.load_into_module(model)
        tie(model)
        model.eval()
        return model


def _whole_state(job: Job) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    state: dict[str, torch.Tensor] = {}
    for shard in job.shards:
        state.update(load_file(shard))
    return state
