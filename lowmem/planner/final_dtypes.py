"""The final dtype of every target: the request, the model's own rule, and the fp32 keep-lists."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch

from .._patterns import name_matches
from ..checkpoint import TensorEntry
from ..dtypes import is_floating, itemsize
from ..errors import UnsupportedError
from ..mapping import KeyMapping
from ..modeling.skeleton import Skeleton

_HALVES = ("float16", "bfloat16")


def final_dtypes(
    skeleton: Skeleton, mapping: KeyMapping, dtype: str, keep_fp32: tuple[str, ...]
) -> tuple[dict[str, str], list[str]]:
    """Target → dtype, and warnings.

    What is computed has here the dtype that its sources are cast to.

    A transformers model that lowmem built has its dtypes already; elsewhere `"auto"` takes the checkpoint's, and a
    named dtype applies to floats only. What a keep-list names is fp32 where it would be fp16 or bf16. Tensors that
    are tied share one dtype.

    Raises:
        UnsupportedError: a dtype that torch does not have, or a cast that would change the meaning.
    """
    # Parts of one tensor are of one dtype, or the first decides.
    entries = {link.target: link.entry for link in reversed(mapping.links)}
    made = _made_of(mapping)
    owns, apart, tied = skeleton.rules.owns_dtypes, mapping.apart, mapping.tied
    final: dict[str, str] = {}
    scales = {target.scales for target in skeleton.targets.values() if target.scales}
    floats = {link.target for link in mapping.links if link.scales is not None}
    beside = next((link.entry.dtype for link in mapping.links if is_floating(link.entry.dtype)), "") if floats else ""
    for name, target in skeleton.targets.items():
        if target.scales or name in scales:
            # These are int8 and its scales, whatever is asked for the rest.
            final[name] = target.dtype
            continue
        leader = tied.get(name, name)
        # A module with a source of its own is what that is, whatever the rest was built as.
        owned = owns and name not in apart
        asked = apart.get(name) or dtype if apart else dtype
        entry = entries.get(leader) or made.get(leader)
        lead = skeleton.targets[mapping.leads.get(leader, leader)]
        own = lead.dtype if entry is None or owned else entry.dtype
        if leader in floats and not owned:
            # As the rest of the checkpoint has it.
            own = beside or lead.dtype
        if asked != "auto" and is_floating(own):
            # What has values and is not in the checkpoint stays as it is.
            settled = owned or not target.persistent or (entry is None and target.real)
            own = own if settled else asked
        final[name] = own
    filled = {*entries, *(target for computation in mapping.computed for target in computation.targets)}
    fed = {name for name in final if tied.get(name, name) in filled}
    warnings = _keep(skeleton, final, dtype, keep_fp32, fed, mapping.leads)
    checked: set[tuple[str, str]] = set()
    for link in mapping.links:
        cast = link.entry.dtype, final[link.target]
        if cast not in checked and link.scales is None:
            check_cast(link.target, *cast)
            checked.add(cast)
    for computation in mapping.computed:
        for source in computation.sources:
            check_cast(source.key, computation.dtype or source.dtype, final[computation.targets[0]])
    for name, entry in reversed(entries.items()):
        own = skeleton.targets[name].dtype
        by_rows = name in floats or skeleton.targets[name].scales
        owned = owns and name not in apart
        if own != entry.dtype and not owned and not by_rows and not (is_floating(own) and is_floating(entry.dtype)):
            warnings.append(
                f"{name!r} is {own} in the model and {entry.dtype} in the checkpoint: it becomes {final[name]}"
            )
    for name, leader in mapping.tied.items():
        final[name] = final[leader]
    return final, warnings


def _made_of(mapping: KeyMapping) -> dict[str, TensorEntry]:
    """Computed target → the source whose dtype it would have."""
    made = {}
    for computation in mapping.computed:
        if computation.dtype:
            source = replace(computation.sources[0], dtype=computation.dtype)
            made.update(dict.fromkeys(computation.targets, source))
            continue
        floats = [source for source in computation.sources if is_floating(source.dtype)]
        if floats:
            made.update(dict.fromkeys(computation.targets, floats[0]))
    return made


def _keep(
    skeleton: Skeleton,
    final: dict[str, str],
    dtype: str,
    keep_fp32: tuple[str, ...],
    fed: Collection[str],
    leads: Mapping[str, str],
) -> list[str]:
    """Turn what the keep-lists name into fp32, in place; returns warnings.

    The model's own list is about what the checkpoint has: `from_pretrained` initialises the rest at the dtype that it
    was built with. It knows tensors that are made of one by the name of the first.
    """
    warnings = []
    halves = [name for name, d in final.items() if d in _HALVES and skeleton.targets[name].persistent]
    kept: set[str] = set()
    # The model's list depends on the dtype that the model as a whole has.
    for half in _HALVES:
        if half == dtype or dtype == "auto":
            names = [name for name in halves if final[name] == half and name in fed]
            listed = skeleton.rules.keep_fp32(half, {leads.get(name, name) for name in names})
            kept.update(name for name in names if leads.get(name, name) in listed)
    for pattern in keep_fp32:
        named = [name for name in skeleton.targets if name_matches(name, pattern)]
        if not named:
            warnings.append(f"keep_fp32: {pattern!r} names no module or parameter of this model")
        kept.update(name for name in named if final[name] in _HALVES)
    if not kept:
        return warnings
    groups: dict[str, list[str]] = defaultdict(list)
    for name in halves:
        groups[skeleton.targets[name].tie].append(name)
    for name in sorted(kept):
        final[name] = "float32"
        for other in groups[skeleton.targets[name].tie]:
            if other not in kept and final[other] != "float32":
                warnings.append(f"keep_fp32: {other!r} is tied to {name!r}, so it stays in fp32 too")
                final[other] = "float32"
    return warnings


def check_cast(name: str, source: str, final: str) -> None:
    """Refuse a cast that torch cannot do or that would mean nothing.

    Raises:
        UnsupportedError: torch lacks one of the dtypes, or one holds packed values or scales.
    """
    for dtype in (source, final):
        if not hasattr(torch, dtype):
            raise UnsupportedError(
                f"tensor {name!r}: torch {torch.__version__} has no dtype {dtype}; a later torch may, "
                "until then lowmem can only inspect it"
            )
    if source == final or (is_floating(source) and is_floating(final)):
        return
    if "float4" in source or "e8m0" in source:
        raise UnsupportedError(
            f"tensor {name!r}: {source} holds packed values or scales; a cast to {final} has no meaning"
        )


@functools.lru_cache(maxsize=1024)
def nbytes_of(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of a dense tensor."""
    count = itemsize(dtype)
    for n in shape:
        count *= n
    return count
