"""Loaders that stream safetensors files through several threads: fastsafetensors and Run:ai's model streamer."""

from __future__ import annotations

import torch

from bench.loaders.base import Job, MemoryLoader, Model, install
from bench.models import empty_model
from bench.phases import Phases


class Fastsafetensors(MemoryLoader):
    """`SafeTensorsFileLoader(nogds=True)`, which reads each file into one buffer; tensors are views of it."""

    name = "fastsafetensors"
    title = "fastsafetensors"
    packages = ("fastsafetensors",)

    def imports(self, job: Job) -> None:
        super().imports(job)
        import fastsafetensors  # noqa: F401

    def load(self, job: Job, phases: Phases) -> Model:
        from fastsafetensors import SafeTensorsFileLoader

        with phases.building():
            model = empty_model(job.case, job.source, job.shapes)
        loader = SafeTensorsFileLoader(pg=None, device="cpu", nogds=True)
        loader.add_filenames({0: [str(file) for file in job.shards]})
        buffers = loader.copy_files_to_device()
        state: dict[str, torch.Tensor] = {}
        for key in loader.get_keys():
            tensor = buffers.get_tensor(key)
            state[key] = tensor.to(job.dtype) if job.case.casts else tensor
        buffers.close()
        loader.close()
        install(model, state)
        return model


class Runai(MemoryLoader):
    """`SafetensorsStreamer` to the CPU.

    Copies are the streamer's own tensors (`owned=True`), which need no clone. For a cast its buffers are reused
    (`owned=False`), because a tensor is cast before the next one is asked for.
    """

    name = "runai"
    title = "Run:ai streamer"
    packages = ("runai-model-streamer",)

    def imports(self, job: Job) -> None:
        super().imports(job)
        import runai_model_streamer  # noqa: F401

    def load(self, job: Job, phases: Phases) -> Model:
        from runai_model_streamer import SafetensorsStreamer

        with phases.building():
            model = empty_model(job.case, job.source, job.shapes)
        state: dict[str, torch.Tensor] = {}
        casts = job.case.casts
        with SafetensorsStreamer() as streamer:
            streamer.stream_files([str(file) for file in job.shards], device="cpu", owned=not casts)
            for key, tensor in streamer.get_tensors():
                state[key] = tensor.to(job.dtype) if casts else tensor
        install(model, state)
        return model
