"""The tensors of one source under the names of the targets that they are for, and what feeds these."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from .._patterns import name_matches
from ..checkpoint import Checkpoint, TensorEntry
from ..errors import KeysError
from ..modeling.conversions import Conversion, Renaming
from ..modeling.skeleton import Skeleton
from ..modeling.targets import Target
from ..modeling.tracing import join_conversions
from .converted import Converted, link_converted
from .evidence import NOTHING, Evidence, find_evidence
from .int8 import turned
from .made import Transforms, make_names, refuse_twice
from .names import Given, choose, collision, give_names
from .records import Computation, KeyRules, Link, Mismatch, whole

Fits = Callable[[TensorEntry, Target], bool]


@dataclass(frozen=True)
class Named:
    """Every chosen tensor under the name of the target that it is for.

    Attributes:
        given: by the names that the user's rules gave.
        renaming: changed name → target name.
        evidence: what changed given names.
        left_out: target names of tensors that the user left out, of the checkpoint or of the model.
        unreadable: target name → the key that cannot be read, and why.
        fits: whether an entry may feed a target.
        transforms: what is done to tensors that feed certain targets.
    """

    given: Given = field(repr=False)
    renaming: Renaming = field(repr=False)
    evidence: Evidence
    left_out: Collection[str]
    unreadable: Mapping[str, str]
    fits: Fits
    transforms: Transforms = field(repr=False)


def resolve(checkpoint: Checkpoint, skeleton: Skeleton, state: Mapping[str, Target], rules: KeyRules) -> Named:
    """User's names, functions, evidence, and the renames of the model's kind, in this order."""
    rules, spared = _skips_of_model(checkpoint, rules, state)
    given = make_names(give_names(checkpoint, rules), checkpoint, skeleton, rules)
    transforms = Transforms(checkpoint.source, rules.transforms, state)
    fits = _fits(checkpoint.source, state, rules, transforms)
    renaming = skeleton.rules.rename(given.entries, state)
    evidence = NOTHING
    if _leaves_both(renaming.names, state):
        evidence = find_evidence(given.entries, renaming.names, skeleton, state, fits)
    beside = {**given.left_out, **given.unreadable}
    others = _others(beside, evidence, checkpoint.folder, skeleton, state) if beside else {}
    if evidence.names or others:
        # Once more and of all keys: the model's kind remembers what it renamed.
        names = {evidence.names.get(name, name): entry for name, entry in given.entries.items()}
        renaming = skeleton.rules.rename(names, state)
    return Named(
        given,
        renaming,
        evidence,
        {*spared, *(others[name] for name in given.left_out)},
        {others[name]: f"{key!r}: {checkpoint.unreadable[key]}" for name, key in given.unreadable.items()},
        fits,
        transforms,
    )


def _skips_of_model(checkpoint: Checkpoint, rules: KeyRules, state: Mapping[str, Target]) -> tuple[KeyRules, set[str]]:
    """The rules without what `skip` says of tensors that only the model has, and these."""
    if callable(rules.skip):
        return rules, set()
    keys = [*checkpoint, *checkpoint.unreadable]
    spared: set[str] = set()
    left = []
    for pattern in rules.skip:
        fitting = [name for name in state if name_matches(name, pattern)]
        if fitting and not any(name_matches(key, pattern) for key in keys):
            spared.update(fitting)
        else:
            left.append(pattern)
    return (replace(rules, skip=tuple(left)), spared) if spared else (rules, spared)


def _leaves_both(finals: Mapping[str, str], state: Mapping[str, Target]) -> bool:
    """Whether there are names that feed nothing and targets that nothing feeds."""
    fed = set(finals.values())
    return not fed <= state.keys() and not state.keys() <= fed


def _fits(source: str, state: Mapping[str, Target], rules: KeyRules, transforms: Transforms) -> Fits:
    if not rules.reshape:
        return lambda entry, target: entry.shape == target.shape or target.name in transforms.by_target
    free = choose(source, list(state), rules.reshape, "reshape", "model")

    def fits(entry: TensorEntry, target: Target) -> bool:
        same = entry.shape == target.shape
        return same or (target.name in free and math.prod(entry.shape) == math.prod(target.shape))

    return fits


def _others(
    names: Collection[str], evidence: Evidence, folder: Path, skeleton: Skeleton, state: Mapping[str, Target]
) -> dict[str, str]:
    """Target names of tensors that are not read: name → target name."""
    entry = TensorEntry("", "", (), folder, 0, 0)
    changed = {}
    for name in names:
        new = name
        for step in evidence.steps if name not in state else ():
            new = step.apply(new)
        changed[name] = new
    finals = skeleton.rules.rename(dict.fromkeys(changed.values(), entry), state).names
    return {name: finals.get(new, new) for name, new in changed.items()}


@dataclass
class Linked:
    """What `KeyMapping` has, before ties.

    Attributes:
        elsewhere: keys that would feed what a later source feeds → the names of that.
    """

    links: list[Link] = field(default_factory=list)
    computed: list[Computation] = field(default_factory=list)
    mismatched: list[Mismatch] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)
    leads: dict[str, str] = field(default_factory=dict)
    converted: frozenset[str] = frozenset()
    elsewhere: dict[str, str] = field(default_factory=dict)

    def join(self, other: Linked, front: str) -> None:
        """What another source feeds, too; its names are those behind `front`.

        Raises:
            KeysError: both feed a tensor.
        """
        for name, key in other.sources.items():
            if front + name in self.sources:
                raise KeysError(
                    f"the model's {front + name!r}: expected one source for it, found "
                    f"{self.sources[front + name]!r} and {key!r}; give the source of the smaller module after the "
                    "other, or leave one of them out by skip= of its lowmem.Source"
                )
            self.sources[front + name] = key
        self.links += [replace(link, target=front + link.target) for link in other.links] if front else other.links
        self.computed += [replace(c, targets=tuple(front + name for name in c.targets)) for c in other.computed]
        self.mismatched += [replace(m, target=front + m.target) for m in other.mismatched]
        self.unexpected += other.unexpected
        self.leads.update({front + name: front + lead for name, lead in other.leads.items()})
        self.converted |= {front + name for name in other.converted}


def link(
    named: Named,
    state: Mapping[str, Target],
    skeleton: Skeleton,
    is_elsewhere: Callable[[str], bool] = lambda name: False,
) -> Linked:
    """Which entry feeds what.

    Args:
        named: the entries.
        state: the targets of the state dict.
        skeleton: converts what the model's kind converts.
        is_elsewhere: whether another source feeds a name.

    Raises:
        KeysError: two keys become the same target, or keys cannot be converted.
        UnsupportedError: what functions made would be converted once more.
    """
    found = Linked()
    tracing = named.given.tracing
    made = tracing.made if tracing is not None else ()
    converted: dict[str, TensorEntry] = {}
    computed: list[Conversion] = []
    names, sources, fits, changed_to = named.evidence.names, found.sources, named.fits, named.transforms.by_target
    for given, entry in named.given.entries.items():
        changed, key = names.get(given, given), entry.key
        name = named.renaming.names[changed]
        target = state.get(name)
        if target is None:
            if is_elsewhere(name):
                found.elsewhere[key] = name
            else:
                found.unexpected.append(key)
            continue
        if given in made or name in changed_to:
            refuse_twice(changed, entry, named.renaming)
            conversion, entries = named.transforms.conversion(given, entry, target, tracing)
            if conversion.parts is None and conversion.shapes == (target.shape,) and given in made:
                computed.append(conversion)
            else:
                add(found, link_converted([conversion], entries, state))
            continue
        if changed in named.renaming.converted:
            if changed in converted:
                raise KeysError(collision(entry.file, key, converted[changed].key, name))
            converted[changed] = entry
            continue
        if name in sources:
            raise KeysError(collision(entry.file, key, sources[name], name))
        sources[name] = key
        turned_link = turned(entry, target) if target.turned else None
        if turned_link is not None:
            found.links.append(turned_link)
        elif entry.shape == target.shape:
            found.links.append(Link(entry, name, whole(target.shape)))
        else:
            _link_other_shape(found, entry, target, fits)
    if computed:
        add(found, link_converted(join_conversions(computed), named.given.made_of, state))
    if converted:
        conversions = skeleton.rules.convert(converted, named.renaming, state)
        add(found, link_converted(conversions, converted, state))
    if found.converted:
        # In the checkpoint's file order again.
        order = {entry.key: i for i, entry in enumerate(named.given.made_of.values())}
        found.links.sort(key=lambda link: (order[link.entry.key], link.entry.offset))
    return found


def _link_other_shape(found: Linked, entry: TensorEntry, target: Target, fits: Fits) -> None:
    if not fits(entry, target):
        found.mismatched.append(Mismatch(entry.key, target.name, entry.shape, target.shape, entry.dtype))
        return
    # The same bytes under another shape; with strides the shape is needed to find them.
    reshaped = replace(entry, shape=target.shape) if entry.strides is None else entry
    found.links.append(Link(reshaped, target.name, whole(target.shape)))


def add(found: Linked, more: Converted) -> None:
    """What conversions feed, too.

    Raises:
        KeysError: it is fed already.
    """
    for name, key in more.sources.items():
        if name in found.sources:
            raise KeysError(collision(more.files[name], key, found.sources[name], name))
    found.sources.update(more.sources)
    found.links += more.links
    found.mismatched += more.mismatched
    found.computed += more.computed
    found.leads.update(more.leads)
    found.converted |= more.sources.keys()
