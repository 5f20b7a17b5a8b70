"""What is run: which checkpoint, where its weights lie, and who takes turns."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

# Whose logits the others' must be: it comes first in each case that compares.
REFERENCE = "loaded"
LOADED = ("loaded", "loaded-map", "loaded-copy")


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: for the command line and the JSON; the word before its dash is the name of its group.
        title: for tables.
        kind: `steps` (loaders take turns with tokens), `limit` (a generation under a kernel limit) or `steady`
            (many forwards of one model).
        loaders: names, in the order in which they load.
        checkpoint: a name of `bench.make_checkpoint`.
        dtype: what the bf16 checkpoint is loaded as.
        on_disk: `everything` or `half`, as in `device_map`.
        cold: whether the files leave the page cache before each token.
    """

    name: str
    title: str
    kind: str
    loaders: tuple[str, ...]
    checkpoint: str = "llama-1b"
    dtype: str = "bfloat16"
    on_disk: str = "everything"
    cold: bool = False


_WARM = (*LOADED, "lowmem", "accelerate", "accelerate-dat")
_EXPERTS = ("loaded", "lowmem", "lowmem-folder", "accelerate")
CASES = (
    Case("warm-all", "everything on disk, bf16, warm", "steps", _WARM),
    Case("warm-half", "half of it on disk, bf16, warm", "steps", _WARM, on_disk="half"),
    Case(
        "cast",
        "everything on disk, bf16 to fp32, warm",
        "steps",
        ("loaded", "lowmem", "lowmem-folder", "accelerate", "accelerate-dat"),
        dtype="float32",
    ),
    Case("cold", "everything on disk, bf16, cold", "steps", ("loaded", "lowmem", "accelerate"), cold=True),
    Case("experts-warm", "8 of 64 experts, everything on disk, bf16, warm", "steps", _EXPERTS, "qwen3-moe"),
    Case("experts-cold", "8 of 64 experts, everything on disk, bf16, cold", "steps", _EXPERTS, "qwen3-moe", cold=True),
    Case(
        "limit",
        "everything on disk, bf16, a generation under a kernel limit",
        "limit",
        ("lowmem",),
        checkpoint="llama-3b",
    ),
    Case("steady-dense", "many forwards, dense", "steady", ("lowmem",)),
    Case("steady-experts", "many forwards, experts", "steady", ("lowmem",), checkpoint="few-experts"),
    Case("steady-cast", "many forwards, experts cast", "steady", ("lowmem",), "few-experts", "float32"),
)


def find_cases(names: Iterable[str], loaders: Iterable[str] = (), *, quick: bool = False) -> tuple[Case, ...]:
    """The cases of these names or groups, all of them without names.

    Args:
        names: of cases (`warm-all`) or of groups (`warm`).
        loaders: those to keep; all without any.
        quick: on a checkpoint of 250 MB.

    Raises:
        KeyError: no case or loader has this name.
    """
    names, loaders = tuple(names), tuple(loaders)
    for name in names:
        if not any(_is_called(case, name) for case in CASES):
            raise KeyError(name)
    for loader in loaders:
        if not any(loader in case.loaders for case in CASES):
            raise KeyError(loader)
    found = [case for case in CASES if not names or any(_is_called(case, name) for name in names)]
    if loaders:
        found = [replace(case, loaders=tuple(one for one in case.loaders if one in loaders)) for case in found]
    if quick:
        found = [replace(case, checkpoint=_small(case.checkpoint)) for case in found]
    return tuple(case for case in found if case.loaders)


def _is_called(case: Case, name: str) -> bool:
    return name in (case.name, case.name.partition("-")[0])


def _small(checkpoint: str) -> str:
    return "llama-125m" if checkpoint.startswith("llama") else "few-experts"


def device_map(source: Path, on_disk: str) -> dict[str, str]:
    """Module → `cpu` or `disk`, the same for every loader: no module inside another, which accelerate would not take.

    `half` keeps in memory the embedding, the head, the last norm and the first half of the layers.
    """
    if on_disk == "everything":
        return {"": "disk"}
    layers = json.loads((source / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    kept = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    placed = {f"model.layers.{n}": "cpu" if n < layers // 2 else "disk" for n in range(layers)}
    return {**dict.fromkeys(kept, "cpu"), **placed}
