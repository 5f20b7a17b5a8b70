"""Files that hold a part of a model's weights only, told by what is in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Protocol

from ..errors import SourceError
from .records import Candidate

# Megatron's (`generate_state_dict` in megatron/training/checkpointing.py).
_STAGE = re.compile(r"model(\d{1,3})$")
# Candidates that are as good: more are refused whatever they are.
_FEW = 16
_SHOWN = 8
# A model may have some empty tensors of its own: less than one in so many.
_OWN = 4


class _Fit(Protocol):
    """What is asked of a `wrappers.Cover`."""

    @property
    def unused(self) -> int: ...

    @property
    def lacking(self) -> int: ...


_FitOf = Callable[[Candidate], _Fit] | None


def refuse_stages(source: str, best: Sequence[Candidate], candidates: Sequence[Candidate], fit: _FitOf) -> None:
    """Refuse `model0`, `model1`, … as the weights, unless what was chosen of them is all that a model needs.

    Each counts its layers from zero, so that one of them looks like the beginning of the model, and all together like
    a smaller one.

    Raises:
        SourceError: they may be stages of one model.
    """
    stages = _stages(candidates)
    if not any(c is stage or stage.is_inside(c) for c in best[:_FEW] for stage in stages):
        return
    if fit is not None and len(best) == 1:
        cover = fit(best[0])
        if not cover.lacking and (best[0] in stages or not cover.unused):
            return
    few = [stage.path for stage in stages[:_SHOWN]]
    more = ", …" if len(stages) > _SHOWN else ""
    raise SourceError(
        f"{source}: {', '.join(map(repr, few))}{more}: several models, or parts of one, as Megatron keeps the stages "
        "of a virtual pipeline; make one of its parts with Megatron-LM's tools/checkpoint/convert.py "
        "(--target-pipeline-parallel-size 1), say by rename= (--rename) which layers these are, or name one with "
        "weights= (--weights): "
        f"{', '.join(f'weights={path!r}' for path in few)}{more}"
    )


def _stages(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Mappings beside each other that are numbered from zero, the first two of which have keys in common."""
    by_parent: dict[str, dict[int, Candidate]] = {}
    for c in candidates:
        parent, _, name = c.path.rpartition(".")
        if found := _STAGE.match(name):
            by_parent.setdefault(parent, {})[int(found[1])] = c
    return [
        stage
        for held in by_parent.values()
        if 0 in held and 1 in held and held[0].leaves.keys() & held[1].leaves.keys()
        for stage in held.values()
    ]


def refuse_placeholders(source: str, chosen: Candidate, fit: _FitOf) -> None:
    """Refuse weights of which many are empty, unless the model's are as well.

    Raises:
        SourceError: they stand for what is elsewhere.
    """
    empty = placeholders(chosen)
    if empty and (fit is None or fit(chosen).lacking):
        raise SourceError(f"{source}: {empty}; weights={chosen.path!r} (--weights) takes them as they are")


def placeholders(candidate: Candidate) -> str:
    """What is to be said of tensors without elements, where they are too many to be a model's own.

    ZeRO-3 leaves them in the place of parameters that are divided among processes.
    """
    leaves = candidate.leaves
    empty = [key for key, leaf in leaves.items() if leaf.shape == (0,) and "float" in leaf.dtype]
    if _OWN * len(empty) < len(leaves) or not empty:
        return ""
    return (
        f"{len(empty)} of {len(leaves)} tensors are empty ({empty[0]!r}, …), as DeepSpeed's ZeRO-3 leaves them where "
        "the weights are divided among processes; make one file of the whole checkpoint with the zero_to_fp32.py "
        "beside it (python zero_to_fp32.py FOLDER OUT), and load that"
    )
