"""A source of a model's weights that is opened: which module it feeds, and what is said about its keys."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..checkpoint import Checkpoint
from ..modeling.rules import Rules
from ..modeling.skeleton import Skeleton
from ..modeling.targets import Target
from .records import NO_RULES, KeyRules


@dataclass(frozen=True, eq=False)
class Opened:
    """A checkpoint for a module of the model.

    Attributes:
        checkpoint: its tensors.
        rules: what the user said about its keys.
        path: the module; empty for the whole model.
        kind: the rules of the module; None for those of the model.
        taken: modules inside of it that later sources feed: their paths in the model, with what messages call these.
        label: what stands before its keys in messages; empty for a single source.
        dtype: what its floats become; `"auto"` for what they are, None for what the load asks.
    """

    checkpoint: Checkpoint
    rules: KeyRules = NO_RULES
    path: str = ""
    kind: Rules | None = None
    taken: tuple[tuple[str, str], ...] = ()
    label: str = ""
    dtype: str | None = None

    @property
    def front(self) -> str:
        """What stands before the names of its targets in the model."""
        return f"{self.path}." if self.path else ""

    def skeleton(self, whole: Skeleton) -> Skeleton:
        """The module that it feeds, without what others feed; names are those in the module."""
        if not self.path and not self.taken:
            return whole
        front = self.front
        targets = {
            name[len(front) :]: _inside(target, front)
            for name, target in whole.targets.items()
            if name.startswith(front) and self.taker(name) is None
        }
        model = whole.model.get_submodule(self.path) if self.path else whole.model
        return replace(whole, model=model, targets=targets, rules=self.kind or whole.rules)

    def key(self, own: str) -> str:
        """A key of the checkpoint, as its entries say it."""
        return f"{self.label}: {own}" if self.label else own

    def own_key(self, key: str) -> str:
        """What `key` made of a key, back."""
        return key.removeprefix(f"{self.label}: ") if self.label else key

    def taker(self, name: str) -> tuple[str, str] | None:
        """The later source that feeds a target of the model instead: its module, and what messages call it."""
        return next((taken for taken in self.taken if name.startswith(f"{taken[0]}.")), None)


def _inside(target: Target, front: str) -> Target:
    """A target as its module calls it; what it is tied to elsewhere has a name that no module can have."""
    if not front:
        return target
    tie = target.tie[len(front) :] if target.tie.startswith(front) else f"/{target.tie}"
    scales = target.scales.removeprefix(front)
    return replace(target, name=target.name[len(front) :], tie=tie, scales=scales)
