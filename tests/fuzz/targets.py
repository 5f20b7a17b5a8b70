"""What is fuzzed: each target makes files of its input and gives them to lowmem and to the reference reader."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .guard import Guard

CORPUS = Path(__file__).parent / "corpus"


@dataclass(frozen=True)
class Target:
    """One format.

    Attributes:
        name: also of its folder in the corpus.
        seeds: sound inputs, from which all others descend.
        execute: gives the input to lowmem, under guard, in an empty folder; raises `Broken` where the result is not the
            reference reader's.
        mutate: a new input that keeps the structure, but for what it breaks on purpose; of equal seeds the same.
    """

    name: str
    seeds: Callable[[], Sequence[bytes]]
    execute: Callable[[Guard, bytes, Path], None]
    mutate: Callable[[bytes, random.Random], bytes]

    def run(self, guard: Guard, data: bytes, folder: Path) -> None:
        """One execution; nothing is left in `folder`."""
        try:
            self.execute(guard, data, folder)
        finally:
            for path in folder.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def kept(self) -> list[bytes]:
        """The corpus: inputs that once reached something new, and those that once broke something."""
        folder = CORPUS / self.name
        return [file.read_bytes() for file in sorted(folder.iterdir())] if folder.is_dir() else []


def find(name: str) -> Target:
    """The target of this name."""
    return all_targets()[name]


def all_targets() -> dict[str, Target]:
    """By name."""
    from . import (
        configs,
        conversions,
        device_maps,
        index_files,
        manifests,
        offload_folders,
        pickled_files,
        safetensors_files,
    )

    files = (safetensors_files, index_files, pickled_files)
    folders = (configs, conversions, device_maps, manifests, offload_folders)
    return {target.name: target for module in (*files, *folders) for target in module.TARGETS}
