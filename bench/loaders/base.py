"""What a loader of the bench is."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from bench.cases import Case
from bench.models import import_model, tie
from bench.phases import Phases

Model = nn.Module | Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Job:
    """One load to do.

    Attributes:
        case: what to load.
        source: the checkpoint.
        converted: the same weights in the loader's own format; None for a loader that reads safetensors.
        offload: an empty folder for weights on disk.
        shapes: names and shapes of the checkpoint, for models that are made from them.
        variant: one of the loader's `variants`.
    """

    case: Case
    source: Path
    converted: Path | None
    offload: Path
    shapes: Sequence[tuple[str, tuple[int, ...]]]
    variant: str = ""

    @property
    def shards(self) -> list[Path]:
        """The safetensors files, in order."""
        return sorted(self.source.glob("*.safetensors"))

    @property
    def dtype(self) -> torch.dtype:
        """What to load at; of int8 cases, all but the linear layers."""
        dtype: torch.dtype = getattr(torch, self.case.float_dtype)
        return dtype

    @property
    def files(self) -> list[Path]:
        """The files that the load reads."""
        return self.shards if self.converted is None else sorted(p for p in self.converted.iterdir() if p.is_file())


class Loader:
    """A way to load a checkpoint. `name` is for the command line, `title` for tables.

    Attributes:
        packages: distributions whose versions belong to the result.
        converts: whether it reads a format of its own, written beforehand and not timed.
        has_staging: whether it takes a bound on its buffers, so that the cases of that are its own.
        has_int8: whether it makes and reads int8 layers as bitsandbytes does.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    converts: ClassVar[bool] = False
    has_staging: ClassVar[bool] = False
    has_int8: ClassVar[bool] = False

    def can(self, case: Case) -> str | None:
        """Why it cannot do the case, None when it may; what shows only in the doing is not asked here."""
        return "it casts at each use" if case.written else None

    def note(self, case: Case) -> str:
        """What a reader of the case's table must know, as the rest of a sentence that its title begins."""
        return ""

    def variants(self, case: Case) -> tuple[str, ...]:
        """Ways that it tries one after another, of which the best counts."""
        return ("",)

    def convert(self, job: Job) -> None:
        """Write the checkpoint's weights into `job.converted` in the loader's own format."""
        raise AssertionError(f"{self.name} reads safetensors")

    def imports(self, job: Job) -> None:
        """Import all that `load` will use."""
        import_model(job.case, job.source)
        if job.case.is_int8:
            # With its absence the cases would be others: whoever loads computes with it.
            import bitsandbytes  # noqa: F401
            import transformers.integrations.bitsandbytes
            import transformers.quantizers.quantizer_bnb_8bit  # noqa: F401

    def load(self, job: Job, phases: Phases) -> Model:
        """Load, and say in `phases` what building the model took."""
        raise AssertionError(self.name)


class MemoryLoader(Loader):
    """A loader that has no place for weights but memory."""

    def can(self, case: Case) -> str | None:
        return "it leaves nothing on disk" if case.on_disk else None


def versions(loader: Loader) -> dict[str, str]:
    """Versions of a loader's packages, `not installed` for one that is not there."""
    found: dict[str, str] = {}
    for package in loader.packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def assign(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Put `state` into `model` without a copy, as torch's `load_state_dict(assign=True)` does it, and tie again.

    Raises:
        KeyError: a key that the model lacks, or a parameter that got no weight.
    """
    found = model.load_state_dict(state, strict=False, assign=True)
    if found.unexpected_keys:
        raise KeyError(f"the model has no {found.unexpected_keys[0]} ({len(found.unexpected_keys)} such keys)")
    _finish(model)


def install(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """As `assign`, parameter by parameter, for loaders that leave that to their user: the quickest way there is.

    Raises:
        KeyError: as `assign`.
    """
    modules = dict(model.named_modules())
    for key, tensor in state.items():
        path, _, name = key.rpartition(".")
        if path not in modules or name not in modules[path]._parameters:
            raise KeyError(f"the model has no {key}")
        modules[path]._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    _finish(model)


def _finish(model: nn.Module) -> None:
    tie(model)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise KeyError(f"{name} got no weight")
    model.eval()
