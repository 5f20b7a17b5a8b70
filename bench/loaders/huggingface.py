"""transformers' `from_pretrained` and accelerate's `load_checkpoint_and_dispatch`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from bench.cases import Case
from bench.device_maps import DISJOINT
from bench.loaders.base import Job, Loader, Model
from bench.models import empty_model, plain_module
from bench.phases import Phases


class Transformers(Loader):
    """`from_pretrained`.

    The cut: what comes before `PreTrainedModel._load_pretrained_model` (configuration, finding files, the model on
    meta) is its build, except making the rules by which keys are converted; so is reading the generation
    configuration afterwards. Weights are all the rest. That is kind to it: lowmem's headers and plan count as weights.
    """

    name = "transformers"
    title = "transformers"
    packages = ("transformers", "bitsandbytes")
    has_int8 = True

    def note(self, case: Case) -> str:
        if case.stored == "int8" != case.dtype:
            return "loads int8, and makes floats of it by `dequantize()`"
        return "copies with `disable_mmap=True`" if case.residency == "copy" and not case.casts else ""

    def imports(self, job: Job) -> None:
        super().imports(job)
        if not job.case.has_config:
            _plain_class(job)

    def load(self, job: Job, phases: Phases) -> Model:
        import transformers

        case = job.case
        options: dict[str, Any] = {"dtype": job.dtype}
        if case.on_disk:
            options.update(device_map=dict(DISJOINT), offload_folder=str(job.offload))
        elif case.residency == "copy" and not case.casts:
            # It reads the files into memory instead of mapping them.
            options["disable_mmap"] = True
        if case.dtype == "int8" != case.stored:
            make: Any = transformers.BitsAndBytesConfig
            options["quantization_config"] = make(load_in_8bit=True)
        if case.has_config:
            name = transformers.AutoConfig.from_pretrained(job.source).architectures[0]
            architecture = getattr(transformers, name)
        else:
            architecture, options["config"] = _plain_class(job)
        with _cut(architecture, phases):
            model: Any = architecture.from_pretrained(job.source, **options)
            if case.stored == "int8" != case.dtype:
                model.dequantize()
        loaded: Model = model
        return loaded


@contextmanager
def _cut(architecture: Any, phases: Phases) -> Iterator[None]:
    """Count as build what is not weights in `architecture.from_pretrained`."""
    from transformers import PreTrainedModel, modeling_utils

    load: Callable[..., Any] = vars(PreTrainedModel)["_load_pretrained_model"].__func__
    rules = modeling_utils.get_model_conversion_mapping
    generation = getattr(architecture, "adjust_generation_fn", None)

    def timed_load(*args: Any, **options: Any) -> Any:
        phases.build += phases.elapsed
        return load(*args, **options)

    def timed_rules(*args: Any, **options: Any) -> Any:
        started = phases.elapsed
        try:
            return rules(*args, **options)
        finally:
            phases.build -= phases.elapsed - started

    def timed_generation(*args: Any, **options: Any) -> Any:
        assert generation is not None
        with phases.building():
            return generation(*args, **options)

    patched: list[tuple[Any, str, Any]] = [
        (PreTrainedModel, "_load_pretrained_model", staticmethod(timed_load)),
        (modeling_utils, "get_model_conversion_mapping", timed_rules),
    ]
    if generation is not None:
        patched.append((architecture, "adjust_generation_fn", timed_generation))
    with contextlib.ExitStack() as stack:
        for owner, name, value in patched:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def _plain_class(job: Job) -> tuple[Any, Any]:
    """A minimal PreTrainedModel around the parameters of a checkpoint without config.json, and its configuration."""
    import transformers

    # Untyped where it matters: what subclasses must call has no annotations.
    config_base: Any = transformers.PretrainedConfig
    model_base: Any = transformers.PreTrainedModel
    shapes = job.shapes

    class PlainConfig(config_base):  # type: ignore[misc]
        model_type = "plain"

    class PlainModel(model_base):  # type: ignore[misc]
        config_class = PlainConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            made = plain_module(shapes).to(torch.get_default_dtype())
            for name, child in made.named_children():
                self.add_module(name, child)
            for name, parameter in list(made.named_parameters(recurse=False)):
                self.register_parameter(name, parameter)
            self.post_init()

        def _init_weights(self, module: Any) -> None:
            return None

    return PlainModel, PlainConfig()


class Accelerate(Loader):
    """`load_checkpoint_and_dispatch` into a model that `init_empty_weights` made."""

    name = "accelerate"
    title = "accelerate"
    packages = ("accelerate",)

    def note(self, case: Case) -> str:
        return "keeps the checkpoint's dtype on disk and casts at every forward" if case.on_disk and case.casts else ""

    def imports(self, job: Job) -> None:
        super().imports(job)
        import accelerate  # noqa: F401

    def load(self, job: Job, phases: Phases) -> Model:
        import accelerate

        with phases.building():
            model = empty_model(job.case, job.source, job.shapes)
        options: dict[str, Any] = {"device_map": {"": "cpu"}}
        if job.case.on_disk:
            options = {"device_map": dict(DISJOINT), "offload_folder": str(job.offload)}
        target = job.source if len(job.shards) > 1 else job.shards[0]
        loaded: Model = accelerate.load_checkpoint_and_dispatch(model, str(target), dtype=job.dtype, **options)
        return loaded
