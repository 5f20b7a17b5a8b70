"""How well a mapping inside a pickled file fits a model, told by names and shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..checkpoint import Cover
from ..checkpoint.records import Candidate
from ..errors import OptionError
from ..modeling.skeleton import Skeleton
from .names import renamed
from .records import NO_RULES, KeyRules

_OLD_NAMES = {"gamma": "weight", "beta": "bias"}


def cover_of(skeleton: Skeleton, rules: KeyRules = NO_RULES) -> Callable[[Candidate], Cover]:
    """A function that counts the tensors of the model that a candidate would feed.

    A key, as the user's `prefix` and `rename` have it, counts when it is a name of the model, or becomes one when a
    prefix is stripped or added, and the shapes are the same. What the keys will be mapped to in the end is `match`'s to
    decide.
    """
    state: dict[str, tuple[int, ...]] = {}
    by_tail: dict[str, list[str]] = {}
    ties: set[str] = set()

    def look() -> None:
        """At the model, when there is a candidate: most checkpoints are safetensors, and have none."""
        state.update({name: target.shape for name, target in skeleton.targets.items() if target.persistent})
        ties.update(skeleton.targets[name].tie for name in state)
        for name in state:
            for tail in _tails(name):
                by_tail.setdefault(tail, []).append(name)

    def find(key: str, shape: tuple[int, ...]) -> str | None:
        for tail in (key, *_tails(key)):
            if state.get(tail) == shape:
                return tail
        return next((name for name in by_tail.get(key, ()) if state[name] == shape), None)

    def cover(candidate: Candidate) -> Cover:
        if not state:
            look()
        fed: set[str] = set()
        used = 0
        for original, leaf in candidate.leaves.items():
            key = _by_rules(original, rules)
            name = find(key, leaf.shape)
            if name is None:
                path, _, last = key.rpartition(".")
                name = find(f"{path}.{_OLD_NAMES[last]}", leaf.shape) if last in _OLD_NAMES else None
            if name is not None:
                used += name not in fed
                fed.add(name)
        tied = {skeleton.targets[name].tie for name in fed}
        return Cover(len(fed), len(candidate.leaves) - used, len(ties - tied))

    return cover


def _by_rules(key: str, rules: KeyRules) -> str:
    stem = key.removeprefix(f"{rules.prefix}.") if rules.prefix else key
    try:
        return renamed(key, stem, rules.rename) if rules.rename else stem
    except OptionError:
        # A function may know nothing of keys that it was not meant for.
        return stem


def _tails(name: str) -> Iterator[str]:
    """The name without its first component, without its first two, and so on."""
    at = name.find(".")
    while at >= 0:
        yield name[at + 1 :]
        at = name.find(".", at + 1)
