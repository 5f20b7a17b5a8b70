"""A checkpoint fitted to a model: built without weights, opened for it, and which key feeds what."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from .checkpoint import Checkpoint, TensorEntry
from .engine import same_bytes
from .errors import KeysError, UnsupportedError
from .mapping import KeyMapping, Link, check_stays_int8, choose_layers, match, whole
from .mapping.int8 import check_formats
from .mapping.narrowing import Cutter, narrow
from .mapping.opened import Opened
from .modeling.int8 import says_int8
from .modeling.int8_choice import Int8Request
from .modeling.skeleton import Origin, Skeleton, make_skeleton, with_int8
from .modeling.targets import Target
from .planner import LoadRequest
from .planner.placing import layers_not_by_rows
from .sources import Found


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


@dataclass(frozen=True, eq=False)
class Fit:
    """A model and what feeds it.

    Attributes:
        skeleton: the model without weights.
        checkpoint: opened for it; of several sources all.
        mapping: which key feeds what.
        parts: the sources, where there are several.
    """

    skeleton: Skeleton
    checkpoint: Checkpoint
    mapping: KeyMapping
    parts: tuple[Opened, ...]

    def without_ties(
        self, request: LoadRequest, rank: int | None = None, agree: Callable[[list[str]], list[list[str]]] | None = None
    ) -> Fit:
        """With tied tensors apart that the checkpoint holds twice, with other values: they are read to be compared.

        Args:
            request: how files are read.
            rank: of several, which each compare the parts that they hold; None for all of the tensors.
            agree: tells the other ranks what differs here, and gives what differs on each.

        Raises:
            KeysError: a plain module cannot hold two values in one tensor.
        """
        if not self.mapping.doubled:
            return self
        untied = _differing(self, request, rank)
        if agree is not None:
            untied = {name for names in agree(sorted(untied)) for name in names}
            _check_unties(self, untied, "differ")
        return replace(self, mapping=match(self.checkpoint, self.skeleton, untied, request.keys, self.parts))

    def on_rank(self, rank: int) -> Fit:
        """What one of several ranks holds of it.

        Raises:
            UnsupportedError: rows are divided that belong together.
        """
        mapping, targets = narrow(self.mapping, self.skeleton.targets, rank)
        return replace(self, mapping=mapping, skeleton=replace(self.skeleton, targets=targets))


def fit(found: Found, origin: Origin, request: LoadRequest, undo: ExitStack, clock: Phases) -> Fit:
    """The model without weights, the checkpoint opened for it, and which key feeds what."""
    undo.callback(found.holding.undo)
    skeleton = make_skeleton(origin, found.glance(), request.dtype, found.arrange if found.several else None)
    clock.end("build")
    checkpoint, parts = found.open(skeleton, request.keys)

    def match_with(skeleton: Skeleton) -> KeyMapping:
        return match(checkpoint, skeleton, rules=request.keys, parts=parts)

    mapping = match_with(skeleton)
    choice = choose_layers(checkpoint, skeleton, mapping, request.int8, request.keep_fp32)
    plain, names, warnings = skeleton, list(choice.names), [*skeleton.warnings, *choice.warnings]
    _refuse_divided(skeleton, names, request.int8.quantize)
    while names:
        skeleton = with_int8(plain, names)
        assert skeleton.int8 is not None
        undo.callback(skeleton.int8.undo)
        mapping = match_with(skeleton)
        odd = layers_not_by_rows(skeleton, mapping)
        if not odd:
            break
        # Once more without these, whose weights come in another order than that of rows.
        skeleton.int8.undo()
        skeleton, names = plain, [name for name in names if name not in odd]
        mapping = match_with(skeleton)
        warnings.append(
            f"{len(odd)} layers stay floats, because their rows are not in the checkpoint as they are in the model "
            f"({odd[0]!r}{', …' if len(odd) > 1 else ''})"
        )
    check_stays_int8(checkpoint, mapping, request.int8)
    check_formats(checkpoint, mapping)
    warnings += _about_int8(skeleton, mapping, request.int8)
    return Fit(replace(skeleton, warnings=tuple(warnings)), checkpoint, mapping, parts)


def _refuse_divided(skeleton: Skeleton, names: Sequence[str], quantize: bool) -> None:
    """Layers become int8 by an exchange of modules, of which those that divide a model among ranks know nothing.

    Raises:
        UnsupportedError: one of them is divided.
    """
    divided = [name for name, target in skeleton.targets.items() if target.sharding is not None and not target.scales]
    wanted = {f"{name}.weight" for name in names}
    # Of layers whose forward is replaced, as transformers' plans do it, nobody would choose one.
    found = divided[:1] if quantize else [name for name in divided if name in wanted]
    if found:
        raise UnsupportedError(
            f"{found[0]!r} would become int8, or layers beside it, and it is divided among ranks already: expected "
            "lowmem.Int8Linear there before the model is divided, with a checkpoint that is int8 (lowmem convert "
            "--quantize int8 writes one); or give dequantize=True, or leave out quantize"
        )


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


def _differing(fit: Fit, request: LoadRequest, rank: int | None) -> set[str]:
    """Names that are tied in the model but have values of their own in the checkpoint, where this rank looks."""
    checkpoint, skeleton, mapping = fit.checkpoint, fit.skeleton, fit.mapping
    keys = mapping.sources
    shards = {shard.file: shard for shard in checkpoint.shards}
    differing: set[str] = set()
    parts: dict[str, list[Link]] = defaultdict(list)
    if not mapping.converted.isdisjoint((*mapping.doubled, *mapping.doubled.values())):
        for link in match(checkpoint, skeleton, set(mapping.doubled), request.keys, fit.parts).links:
            parts[link.target].append(link)
    for name, leader in mapping.doubled.items():
        a, b = checkpoint[keys[name]], checkpoint[keys[leader]]
        pairs = [(a, b)] if rank is None else _parts_of(a, b, skeleton.targets[leader], rank)
        if not mapping.converted.isdisjoint((name, leader)):
            pairs = _paired(parts[name], parts[leader])
        if not pairs or not all(same_bytes(*pair, shards, keep_cache=request.keep_cache) for pair in pairs):
            _check_unties(fit, {name}, "differ" if pairs else "are made in ways that cannot be compared")
            differing.add(name)
    return differing


def _check_unties(fit: Fit, names: Iterable[str], why: str) -> None:
    """Refuse values of their own where the model cannot have them.

    Raises:
        KeysError: it is no model of transformers.
    """
    for name in () if fit.skeleton.rules.unties else sorted(names):
        keys = fit.mapping.sources
        a, b = (fit.checkpoint[keys[n]] for n in (name, fit.mapping.doubled[name]))
        raise KeysError(
            f"{a.file}: {a.key!r} and {b.key!r} {why}, and the model ties them to one tensor; untie them in "
            "the model, bring the checkpoint that belongs to it, or leave one of them out by skip="
        )


def _parts_of(a: TensorEntry, b: TensorEntry, target: Target, rank: int) -> list[tuple[TensorEntry, TensorEntry]]:
    """What one rank holds of two entries that would feed the same target."""
    if target.sharding is None or not a.shape == b.shape == target.shape:
        return [(a, b)]
    cutter = Cutter(target.shape, target.sharding.part(target.shape, rank))
    some, others = (cutter.cut(Link(one, target.name, whole(target.shape))) for one in (a, b))
    empty = replace(a, shape=(0,), strides=None, nbytes=0)
    return _paired(some, others) if some else [(empty, empty)]


def _paired(some: Sequence[Link], others: Sequence[Link]) -> list[tuple[TensorEntry, TensorEntry]]:
    """What feeds the same regions of two targets; nothing where they are made in other ways, or computed."""
    regions = [[link.region for link in links] for links in (some, others)]
    return [(a.entry, b.entry) for a, b in zip(some, others, strict=True)] if regions[0] == regions[1] else []


__all__ = ["Fit", "Phases", "fit"]
