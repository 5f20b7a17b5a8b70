"""What is around the weights of a pickled file: every mapping of tensors in it, and which of them is the weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, OptionError, SourceError
from ..sizes import format_size, shown
from .incomplete import refuse_placeholders, refuse_stages
from .pickles import Inert
from .records import Candidate, Leaf

# Deeper or more than in any checkpoint; a few bytes of a pickle can describe both without end.
_DEEPEST = 64
_MOST_VISITS = 1_000_000
_LONGEST_LIST = 1024

# What trainers keep beside the weights. Some of it is keyed like the weights, and as large (averages of gradients).
_AUXILIARY = re.compile(
    r"(^|_)(optim(izers?)?|schedulers?|scaler|scaling|rng|callbacks|loops|message_hub|gradients?|momentum|"
    r"exp_avg(_sq)?|velocity|moments?|master(_params)?|grads?|adam\w*|criterion|loss|hyper_parameters|random|task_state|extra_state|buffer_names|param_shapes|"
    r"averaging_state|param_fragments)(_|$)"
)
# A word of a name that says average: `model_ema`, `params-ema`, `swa_state_dict`, `averaged_model`.
_AVERAGE = re.compile(r"(?i)(^|[-_.])(ema|swa|averaged?|shadow)([-_.\d]|$)")
# Known names, and the projects that they come from: timm, mmengine, Lightning, BasicSR, pycls, fvcore, DeepSpeed.
_WEIGHTS = re.compile(
    r"(?i)^(state_?dict|model(_?\d+)?|(current_)?model_state(_?dict)?|module|params|net(work)?|weights|"
    r"ema_state_dict|state_dict_ema|model_ema|params[-_]ema|ema(_state|_model)?|model_state_dict_ema)$"
)


@dataclass(frozen=True, slots=True)
class Wish:
    """Which mapping the user wants.

    Attributes:
        weights: its path, or None for the one that holds the weights.
        ema: averaged weights (True), those that were trained (False), or None: averages where there are both, as timm,
            BasicSR and Ultralytics load them.
    """

    weights: str | None = None
    ema: bool | None = None


NO_WISH = Wish()


def make_wish(weights: str | None, ema: bool | None) -> Wish:
    """Parse what the user said.

    Raises:
        OptionError: a value that means nothing.
    """
    if weights is not None and not isinstance(weights, str):
        raise OptionError(f"weights: expected the path of a mapping, such as 'state_dict', found {shown(weights)}")
    if ema is not None and not isinstance(ema, bool):
        raise OptionError(f"ema: expected True, False or None, found {shown(ema)}")
    if weights is not None and ema is not None:
        raise OptionError("ema: weights= names the mapping already; give one of them")
    return Wish(weights, ema)


@dataclass(frozen=True, slots=True)
class Cover:
    """How well a candidate fits a model.

    Attributes:
        fed: tensors of the model that it feeds.
        unused: tensors of its own that it would leave over.
        lacking: tensors of the model that it does not feed; tied ones count once.
    """

    fed: int
    unused: int
    lacking: int = 0


CoverOf = Callable[[Candidate], Cover]


def find_candidates(root: Any, file: Path) -> tuple[Candidate, ...]:
    """Every mapping of tensors inside of `root`, and every pickled module; the outer ones first.

    Of what trainers keep beside weights only the outermost mapping: an optimizer has one for each weight.

    Raises:
        CheckpointError: nested deeper than any checkpoint, or more mappings than any has.
    """
    found: list[Candidate] = []
    seen: set[int] = set()
    budget = _Budget(file)
    waiting: list[tuple[str, Any, int]] = [("", root, 0)]
    while waiting:
        path, value, depth = waiting.pop()
        if not _holds(value) or id(value) in seen:
            continue
        seen.add(id(value))
        if depth > _DEEPEST:
            raise budget.refusal(f"more than {_DEEPEST} mappings one inside the other")
        made = _candidate(path, value, budget)
        found.append(made)
        if not made.module and not is_auxiliary(path):
            inner = [(f"{path}.{key}" if path else key, child, depth + 1) for key, child in _children(value)]
            waiting += reversed(inner)
    return tuple(c for c in found if is_auxiliary(c.path) or c.leaves)


def _candidate(path: str, value: Any, budget: _Budget) -> Candidate:
    module = _is_module(value)
    own = module or any(isinstance(child, Leaf) for _, child in _children(value))
    return Candidate(path, lambda: _joined(path, value, budget), module, own)


def find_hollow(root: Any) -> list[str]:
    """Known names of weights that hold nothing; DeepSpeed's pipelines write `module` so, and each layer elsewhere."""
    pairs = root.items() if isinstance(root, dict) else ()
    return [key for key, value in pairs if value is None and isinstance(key, str) and _WEIGHTS.match(key)]


def find_by_path(root: Any, path: str, file: Path) -> Candidate | None:
    """The mapping at `path`, wherever it is, also inside an optimizer; None where there is none.

    Raises:
        CheckpointError: more mappings inside of it than any checkpoint has.
    """
    value, left = root, path
    while left:
        # A key may have dots itself: the longest that fits goes first.
        fitting = [
            (key, child)
            for key, child in _children(value)
            if (left == key or left.startswith(f"{key}.")) and _holds(child)
        ]
        if not fitting:
            return None
        key, value = max(fitting, key=lambda pair: len(pair[0]))
        left = left[len(key) + 1 :]
    budget = _Budget(file)
    return Candidate(path, lambda: _joined(None, value, budget)) if _holds(value) else None


class _Budget:
    """How much may still be walked over: what is shared many times is met many times."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._left = _MOST_VISITS

    def take(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise self.refusal(f"more than {_MOST_VISITS} tensors and mappings, some of them many times")

    def refusal(self, found: str) -> CheckpointError:
        return CheckpointError(f"{self._file}: expected a checkpoint, found {found}; this is none, or made to do harm")


def _holds(value: Any) -> bool:
    return isinstance(value, (dict, list, tuple, Inert))


def _is_module(value: Any) -> bool:
    """A pickled `torch.nn.Module`, told by what its state has, whatever its class."""
    state = value.state if isinstance(value, Inert) else None
    return isinstance(state, dict) and isinstance(state.get("_modules"), dict) and "_parameters" in state


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    """What a mapping or a short list holds, by the text of its keys."""
    pairs: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, Inert):
        pairs = value.pairs.items() if value.pairs is not None else ()
    elif isinstance(value, (list, tuple)) and len(value) <= _LONGEST_LIST:
        pairs = enumerate(value)
    for key, child in pairs:
        if isinstance(key, (str, int)):
            yield str(key), child


def _joined(path: str | None, value: Any, budget: _Budget) -> dict[str, Leaf]:
    """Key → tensor of everything inside of the mapping at `path`; without a path really of everything."""
    trains = path is not None and (not path or (_has_known(value) and not _WEIGHTS.match(path.rpartition(".")[2])))
    leaves: dict[str, Leaf] = {}
    for key, leaf in _flatten(value, budget, trains and not _is_module(value), path is not None):
        known = leaves.get(key)
        leaves[key] = leaf if known is None else replace(leaf, why_not="two tensors have this key, when joined by dots")
    return leaves


def _flatten(value: Any, budget: _Budget, trains: bool, selects: bool) -> Iterator[tuple[str, Leaf]]:
    """Key → tensor of everything inside, in the order of the file; without what trainers keep beside weights.

    That is left out where a mapping is a trainer's (`trains`: the outermost is one), which has weights of a known name
    in it and is not called so itself: a model may have a part called `loss`.
    """
    path = [("", value, _members(value), trains)]
    above = {id(value)}
    while path:
        prefix, holder, members, of_a_trainer = path[-1]
        for key, child in members:
            budget.take()
            if isinstance(child, Leaf):
                yield prefix + key, child
            elif _holds(child) and id(child) not in above and not (of_a_trainer and _AUXILIARY.search(key)):
                if len(path) > _DEEPEST:
                    raise budget.refusal(f"more than {_DEEPEST} mappings one inside the other")
                above.add(id(child))
                inner = selects and _has_known(child) and not _WEIGHTS.match(key)
                path.append((f"{prefix}{key}.", child, _members(child), inner))
                break
        else:
            above.discard(id(holder))
            path.pop()


def _has_known(value: Any) -> bool:
    """Whether weights of a known name are among what a mapping holds."""
    return not _is_module(value) and any(_WEIGHTS.match(key) and _holds(child) for key, child in _children(value))


def _members(value: Any) -> Iterator[tuple[str, Any]]:
    """What a mapping holds; of a module its parameters, its persistent buffers and its modules."""
    if not _is_module(value):
        yield from _children(value)
        return
    state = value.state
    transient = state.get("_non_persistent_buffers_set")
    if isinstance(transient, Inert):
        # A set as protocol 4 writes it has items; before, it was a call with a list.
        transient = list(transient.items) or (transient.args[0] if transient.args else ())
    lost = {n for n in transient if isinstance(n, str)} if isinstance(transient, (set, list, tuple)) else set()
    yield from _children(state["_parameters"])
    for key, child in _children(state.get("_buffers")):
        if key not in lost:
            yield key, child
    yield from _children(state["_modules"])


def merge(files: Sequence[tuple[Candidate, ...]]) -> tuple[Candidate, ...]:
    """The candidates of several files that are one checkpoint: those that have the same path are one.

    The leaves of each file stay apart (`Survey.open` locates them); here they tell shapes and bytes.
    """
    if len(files) == 1:
        return files[0]
    by_path: dict[str, list[Candidate]] = {}
    for candidates in files:
        for candidate in candidates:
            by_path.setdefault(candidate.path, []).append(candidate)
    return tuple(_merged(path, held) for path, held in by_path.items())


def _merged(path: str, held: Sequence[Candidate]) -> Candidate:
    def flatten() -> Mapping[str, Leaf]:
        return {key: leaf for candidate in held for key, leaf in candidate.leaves.items()}

    return Candidate(path, flatten, own=any(c.own for c in held))


def choose(
    source: str,
    candidates: Sequence[Candidate],
    wish: Wish,
    cover: CoverOf | None = None,
    hollow: Sequence[str] = (),
) -> tuple[Candidate, list[str]]:
    """The candidate that holds the weights, and what is to be said about the choice.

    With a model, the one that feeds most of it and has least left over; without, by known names. Where both averaged
    weights and others would do, `wish.ema` decides.

    Args:
        source: for messages.
        candidates: of one checkpoint, as `find_candidates` gives them.
        wish: the user's.
        cover: how well a candidate fits the model, when there is one.
        hollow: names of weights in the file that hold nothing, for messages.

    Raises:
        SourceError: none, none as wished, several that are as good (they are listed), or only a part of the weights.
    """
    if not any(c.leaves for c in candidates):
        raise SourceError(f"{source}: no tensors in it{_said_of(hollow)}; is it the file with the weights?")
    misnamed = _misnamed(candidates)
    weights = [c for c in candidates if not is_auxiliary(c.path)]
    if not weights:
        raise SourceError(
            f"{source}: expected weights, found only what trainers keep beside them{_said_of(hollow)}; weights= "
            f"(--weights) takes it all the same. It holds:\n{listed(candidates)}"
        )
    if wish.ema is not None:
        weights = [c for c in weights if _is_average(c, misnamed) == wish.ema]
        if not weights:
            what = "averaged (EMA) weights" if wish.ema else "weights that are no averages"
            kept = _kept_averages(candidates) if wish.ema else ""
            raise SourceError(f"{source}: ema={wish.ema}: no {what} in it{kept}. It holds:\n{listed(candidates)}")
    best = _fitting(weights, cover) if cover is not None else []
    best = best or _by_name(weights)
    refuse_stages(source, best, candidates, cover)
    said: list[str] = []
    if len(best) > 1:
        averages = [c for c in best if _is_average(c, misnamed)]
        if len(averages) == 1 and wish.ema is None:
            others = ", ".join(repr(c.path) for c in best if c is not averages[0])
            said.append(
                f"{averages[0].path!r} was opened, which holds averages (EMA); ema=False (--no-ema) takes {others}"
            )
            best = averages
    if len(best) > 1:
        raise SourceError(
            f"{source}: several mappings may be the weights; name one with weights= (--weights). It holds:\n"
            f"{listed(candidates)}"
        )
    refuse_placeholders(source, best[0], cover)
    return best[0], said


def not_there(source: str, path: str, candidates: Sequence[Candidate]) -> SourceError:
    """The error for a wish that names no mapping of tensors."""
    return SourceError(
        f"{source}: weights={path!r}: expected the path of a mapping of tensors, found none there. It holds:\n"
        f"{listed(candidates)}"
    )


def listed(candidates: Sequence[Candidate]) -> str:
    """The candidates, a line each, those that may be weights first, and of them the largest; for messages."""
    few = sorted(candidates, key=lambda c: (is_auxiliary(c.path), not c.path, -c.nbytes))[:12]
    lines = [
        f"  weights={c.path!r}: {len(c.leaves)} tensors, {format_size(c.nbytes)} ({next(iter(c.leaves))!r}, …)"
        for c in few
        if c.leaves
    ]
    return "\n".join(lines + (["  …"] if len(candidates) > len(few) else []))


def is_auxiliary(path: str) -> bool:
    """Whether a path leads into what trainers keep beside weights."""
    return any(_AUXILIARY.search(part) for part in path.split("."))


def _said_of(hollow: Sequence[str]) -> str:
    names = ", ".join(map(repr, hollow))
    return f" ({names} holds nothing: the weights may be in other files beside it)" if hollow else ""


def _kept_averages(candidates: Sequence[Candidate]) -> str:
    """Where trainers keep averages that no loader of theirs takes for the weights: fairseq, Lightning's SWA."""
    for c in candidates:
        for key in c.leaves if is_auxiliary(c.path) else ():
            parts = key.split(".")
            at = next((i for i, part in enumerate(parts) if _AVERAGE.search(part)), None)
            if at is not None:
                path = ".".join([c.path, *parts[: at + 1]])
                return f" (what trainers keep beside the weights may be some: weights={path!r})"
    return ""


def _is_average(candidate: Candidate, misnamed: Collection[str]) -> bool:
    average = any(_AVERAGE.search(part) for part in candidate.path.split("."))
    return average != (candidate.path in misnamed)


def _misnamed(candidates: Sequence[Candidate]) -> Collection[str]:
    """The paths of averages whose names do not say so, and of what was trained where they say that it is averages.

    mmengine's EMA hook: `state_dict` holds the averages, and `ema_state_dict` what was trained
    (`EMAHook.before_save_checkpoint`, mmengine/hooks/ema_hook.py). Lightning's WeightAveraging: `state_dict` holds the
    averages, and `current_model_state` what was trained (`on_save_checkpoint`, callbacks/weight_averaging.py).
    """
    held = {c.path: c for c in candidates}
    if held.keys() >= {"state_dict", "current_model_state", "averaging_state"}:
        return ("state_dict",)
    if "state_dict" not in held or "ema_state_dict" not in held:
        return ()
    # Others use these names as they are meant. mmengine keeps its hub beside them, and its averages are a module around
    # the model.
    raw = held["ema_state_dict"].leaves
    swapped = "message_hub" in held or any(f"module.{key}" in raw for key in held["state_dict"].leaves)
    return ("state_dict", "ema_state_dict") if swapped else ()


def _fitting(candidates: Sequence[Candidate], cover: CoverOf) -> list[Candidate]:
    """Those that feed most of the model; of one inside the other the one with less left over, then the inner one."""
    covers = {id(c): cover(c) for c in candidates}
    most = max(c.fed for c in covers.values())
    if not most:
        return []
    best = [c for c in candidates if covers[id(c)].fed == most]
    return [
        c
        for c in best
        if not any(other.is_inside(c) and covers[id(other)].unused <= covers[id(c)].unused for other in best)
    ]


def _by_name(candidates: Sequence[Candidate]) -> list[Candidate]:
    """From the whole file inwards: into mappings of known names that hold most of the bytes, or into the only mapping
    of one that holds no tensors itself.
    """
    level = _outermost(candidates)
    while True:
        level = [c for c in level if _is_known(c)] or level
        if len(level) != 1 or level[0].module:
            return level
        inner = _outermost([c for c in candidates if c.is_inside(level[0])])
        known = [c for c in inner if _is_known(c)]
        twins = [] if known or level[0].own else _twins(inner)
        if twins:
            return twins
        if known and 2 * sum(c.nbytes for c in known) > level[0].nbytes:
            level = known
        elif len(inner) == 1 and not level[0].own and not _is_known(level[0]):
            level = inner
        else:
            return level


def _twins(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Mappings that hold the same keys, each the whole path of a tensor: weights of one model several times."""
    whole = [c for c in candidates if c.own and any("." in key for key in c.leaves)]
    return [
        c
        for c in whole
        if any(2 * len(c.leaves.keys() & other.leaves.keys()) > len(c.leaves) for other in whole if other is not c)
    ]


def _is_known(candidate: Candidate) -> bool:
    return _WEIGHTS.match(candidate.path.rpartition(".")[2]) is not None


def _outermost(candidates: Sequence[Candidate]) -> list[Candidate]:
    paths = {c.path for c in candidates}
    return [c for c in candidates if not any(outer in paths for outer in _above(c.path))]


def _above(path: str) -> Iterator[str]:
    """What a path may be inside of; a key may have dots itself."""
    if path:
        yield ""
    at = path.find(".")
    while at >= 0:
        yield path[:at]
        at = path.find(".", at + 1)
