"""A checkpoint fitted to a model: built without weights, opened for it, and which key feeds what."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from .checkpoint import Checkpoint, Survey, TensorEntry, Wish
from .engine import same_bytes
from .errors import KeysError
from .mapping import KeyMapping, Link, check_stays_int8, choose_layers, cover_of, match
from .mapping.int8 import check_formats
from .modeling.int8 import says_int8
from .modeling.int8_choice import Int8Request
from .modeling.skeleton import Origin, Skeleton, make_skeleton, with_int8
from .planner import LoadRequest
from .planner.placing import layers_not_by_rows


class Phases:
    """Seconds of each phase of a load."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.begin()

    def begin(self) -> None:
        """What was before belongs to no phase."""
        self._last = time.perf_counter()

    def end(self, phase: str) -> None:
        """What was since the last call belongs to `phase`."""
        now = time.perf_counter()
        self.seconds[phase] = now - self._last
        self._last = now


def fit(
    found: Survey, wish: Wish, origin: Origin, request: LoadRequest, undo: ExitStack, clock: Phases
) -> tuple[Skeleton, Checkpoint, KeyMapping]:
    """The model without weights, the checkpoint opened for it, and which key feeds what."""
    skeleton = make_skeleton(origin, found.glance(wish), request.dtype)
    clock.end("build")
    checkpoint = found.open(wish, cover_of(skeleton, request.keys))
    mapping = match(checkpoint, skeleton, rules=request.keys)
    choice = choose_layers(checkpoint, skeleton, mapping, request.int8, request.keep_fp32)
    plain, names, warnings = skeleton, list(choice.names), [*skeleton.warnings, *choice.warnings]
    while names:
        skeleton = with_int8(plain, names)
        assert skeleton.int8 is not None
        undo.callback(skeleton.int8.undo)
        mapping = match(checkpoint, skeleton, rules=request.keys)
        odd = layers_not_by_rows(skeleton, mapping)
        if not odd:
            break
        # Once more without these, whose weights come in another order than that of rows.
        undo.close()
        skeleton, names = plain, [name for name in names if name not in odd]
        mapping = match(checkpoint, skeleton, rules=request.keys)
        warnings.append(
            f"{len(odd)} layers stay floats, because their rows are not in the checkpoint as they are in the model "
            f"({odd[0]!r}{', …' if len(odd) > 1 else ''})"
        )
    check_stays_int8(checkpoint, mapping, request.int8)
    check_formats(checkpoint, mapping)
    warnings += _about_int8(skeleton, mapping, request.int8)
    return replace(skeleton, warnings=tuple(warnings)), checkpoint, mapping


def _about_int8(skeleton: Skeleton, mapping: KeyMapping, request: Int8Request) -> list[str]:
    """What was said about int8 and means nothing here."""
    warnings = []
    if skeleton.int8 is None and request.threshold is not None:
        warnings.append("int8_threshold: no layer is int8, so it does nothing (quantize='int8' makes layers int8)")
    if request.dequantize and not any(link.scales for link in mapping.links):
        warnings.append("dequantize: nothing in the checkpoint is int8, so it does nothing")
    elif skeleton.int8 is None and not request.dequantize and says_int8(skeleton.model):
        warnings.append(
            "the config says that the weights are int8, and none is: they are floats, as the model says then"
        )
    return warnings


def differing(checkpoint: Checkpoint, skeleton: Skeleton, mapping: KeyMapping, request: LoadRequest) -> set[str]:
    """Names that are tied in the model but have values of their own in the checkpoint.

    Raises:
        KeysError: a plain module cannot hold two values in one tensor.
    """
    keys = mapping.sources
    shards = {shard.file: shard for shard in checkpoint.shards}
    differing: set[str] = set()
    parts: dict[str, list[Link]] = defaultdict(list)
    if not mapping.converted.isdisjoint((*mapping.doubled, *mapping.doubled.values())):
        for link in match(checkpoint, skeleton, set(mapping.doubled), request.keys).links:
            parts[link.target].append(link)
    for name, leader in mapping.doubled.items():
        a, b = checkpoint[keys[name]], checkpoint[keys[leader]]
        pairs = [(a, b)]
        if not mapping.converted.isdisjoint((name, leader)):
            pairs = _paired(parts[name], parts[leader])
        if not pairs or not all(same_bytes(*pair, shards, keep_cache=request.keep_cache) for pair in pairs):
            if not skeleton.rules.unties:
                raise KeysError(
                    f"{a.file}: {a.key!r} and {b.key!r} differ, and the model ties them to one tensor; "
                    "untie them in the model, or bring the checkpoint that belongs to it"
                )
            differing.add(name)
    return differing


def _paired(some: Sequence[Link], others: Sequence[Link]) -> list[tuple[TensorEntry, TensorEntry]]:
    """What feeds the same regions of two targets; nothing where they are made in other ways, or computed."""
    regions = [[link.region for link in links] for links in (some, others)]
    return [(a.entry, b.entry) for a, b in zip(some, others, strict=True)] if regions[0] == regions[1] else []


__all__ = ["Phases", "differing", "fit"]
