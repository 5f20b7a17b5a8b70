"""What is loaded, and by whom. Without torch, so that `--help` is quick."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

TITLES = {
    "lowmem": "lowmem",
    "lowmem-copy": "lowmem, residency=copy",
    "lowmem-once": "lowmem, copy, read=once",
    "lowmem-each": "lowmem, copy, read=each",
    "transformers": "transformers from_pretrained",
    "torch": "torch: rank 0 reads all, set_model_state_dict",
    "accelerate": "accelerate: fsdp2_load_full_state_dict",
    "torch-each": "torch: each rank load_file, load_state_dict",
}


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: for the command line and the JSON.
        title: for tables.
        division: `fsdp`, `tp` or `replicated`: what divides the model.
        dtype: torch name of what it is loaded as; the checkpoint is bfloat16.
        ways: names of `ways.WAYS`.
    """

    name: str
    title: str
    division: str
    dtype: str
    ways: tuple[str, ...]


CASES = (
    Case(
        "fsdp-bf16", "FSDP, bf16", "fsdp", "bfloat16", ("lowmem", "lowmem-copy", "transformers", "torch", "accelerate")
    ),
    Case("fsdp-fp32", "FSDP, bf16 → fp32", "fsdp", "float32", ("lowmem", "transformers", "torch", "accelerate")),
    Case("tp-bf16", "TP, bf16", "tp", "bfloat16", ("lowmem", "lowmem-copy", "transformers")),
    Case("tp-fp32", "TP, bf16 → fp32", "tp", "float32", ("lowmem", "transformers")),
    Case(
        "replicated",
        "the whole on each rank, bf16",
        "replicated",
        "bfloat16",
        ("lowmem-once", "lowmem-each", "lowmem", "transformers", "torch", "torch-each"),
    ),
)


@dataclass(frozen=True)
class Member:
    """A process of a group.

    Attributes:
        rank: its number.
        count: how many there are.
        port: of the store of the bench.
        seconds: limit of each collective.
    """

    rank: int
    count: int
    port: int
    seconds: float


@dataclass(frozen=True)
class Order:
    """What each rank loads.

    Attributes:
        way: a name of `ways.WAYS`.
        division: as of a case.
        dtype: as of a case.
        folder: the checkpoint's.
        ram: the budget that lowmem is given, in bytes.
    """

    way: str
    division: str
    dtype: str
    folder: Path
    ram: int | None = None


def find_cases(names: Iterable[str]) -> tuple[Case, ...]:
    """The cases of these names, or whose names begin so; all of them without names.

    Raises:
        KeyError: no case has this name.
    """
    names = tuple(names)
    for name in names:
        if not any(case.name.startswith(name) for case in CASES):
            raise KeyError(name)
    return tuple(case for case in CASES if not names or case.name.startswith(names))
