"""This package."""

from __future__ import annotations

from typing import Any

from bench.cases import Case
from bench.device_maps import LAYERS_TO_DISK
from bench.loaders.base import Job, Loader, Model
from bench.models import plain_module
from bench.phases import Phases


class Lowmem(Loader):
    """`lowmem.load`; its weights phase is all but the model and its config: headers, plan, reading, installing."""

    name = "lowmem"
    title = "lowmem"
    packages = ("lowmem",)
    has_staging = True
    has_int8 = True

    def can(self, case: Case) -> str | None:
        return None

    def imports(self, job: Job) -> None:
        super().imports(job)
        import accelerate  # noqa: F401

        import lowmem.loader  # noqa: F401

    def load(self, job: Job, phases: Phases) -> Model:
        import lowmem

        case = job.case
        residency = "copy" if case.residency == "copy" else "map"
        options: dict[str, Any] = {"dtype": case.float_dtype, "residency": residency, "staging": case.staging}
        if case.on_disk:
            # Without a folder, what must be cast is cast at each use, as the others do it.
            options.update(device_map=LAYERS_TO_DISK, offload_folder=job.offload if case.written else None)
        if case.is_int8 and case.casts:
            options.update({"quantize": "int8"} if case.dtype == "int8" else {"dequantize": True})
        if not case.has_config:
            options["model"] = lambda: plain_module(job.shapes)
        result = lowmem.load(job.source, **options)
        spent = result.report.phases
        phases.build = spent["import"] + spent["build"]
        return result.model
