"""Checkpoint keys to model targets, from headers alone."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ..checkpoint import Checkpoint, TensorEntry
from ..errors import KeysError, OptionError, UnsupportedError
from ..modeling.conversions import Renaming
from ..modeling.skeleton import Skeleton
from ..modeling.targets import Target
from .converted import Converted, link_converted
from .diff import KeyDiff, Naming, make_diff
from .evidence import NOTHING, Evidence, find_evidence
from .int8 import pair, turned
from .made import Transforms, make_names, refuse_twice
from .names import Given, choose, collision, give_names
from .records import NO_RULES, Computation, KeyMapping, KeyRules, Link, Mismatch, whole
from .suggest import vocabulary_hint

Fits = Callable[[TensorEntry, Target], bool]


def match(
    checkpoint: Checkpoint, skeleton: Skeleton, untied: Collection[str] = (), rules: KeyRules = NO_RULES
) -> KeyMapping:
    """Find the entry of every target.

    Args:
        checkpoint: the entries.
        skeleton: the targets and the rules that rename keys.
        untied: targets that stand for themselves although the model ties them, because their values differ from those
            that the rest of their group gets.
        rules: what the user said about keys.

    Raises:
        KeysError: two keys become the same target after renaming, or a rule of the user fits nothing.
        OptionError: a function of the user fails.
    """
    state = {name: target for name, target in skeleton.targets.items() if target.persistent}
    named = _resolve(checkpoint, skeleton, state, rules)
    found = _link(named, state, skeleton)
    tracing, changed = named.given.tracing, named.transforms.used(found.sources)
    makers = [changed] if tracing is None else [tracing.maker(), changed]
    pairs = pair(found.links, skeleton, checkpoint, set(named.given.left_out.values()))
    links, tied, doubled = _resolve_ties(
        replace(found, links=pairs.links), state, untied, set(skeleton.rules.declared_ties().values())
    )
    # A module at several places has scales under several names.
    made = {state[name].tie for name in pairs.made}
    missing = [n for n in state if n not in found.sources and n not in tied and not (made and state[n].tie in made)]
    excused = skeleton.rules.may_miss(missing)
    if found.mismatched:
        # What is tied to a tensor of another shape shares its fate and is not missing.
        odd = {state[m.target].tie for m in found.mismatched}
        excused = {*excused, *(name for name in missing if state[name].tie in odd)}
    if named.left_out:
        # What is tied to a tensor that was left out is left out with it.
        ties = {state[name].tie for name in named.left_out if name in state}
        excused = {*excused, *(name for name in missing if state[name].tie in ties)}
    ignored = skeleton.rules.may_ignore(found.unexpected)
    missing = [name for name in missing if name not in excused]
    mapping = KeyMapping(
        links=tuple(links),
        tied=tied,
        doubled=doubled,
        missing=tuple(missing),
        excused=tuple(name for name in state if name in excused) if excused else (),
        unexpected=tuple(key for key in found.unexpected if key not in ignored and key not in pairs.companions),
        mismatched=tuple(found.mismatched),
        suggestions=(),
        sources=found.sources,
        steps=(*named.given.idle, *named.evidence.sentences),
        unreadable={name: named.unreadable[name] for name in missing if name in named.unreadable},
        computed=tuple(found.computed),
        leads=found.leads,
        converted=found.converted,
        made=pairs.made,
        maker="; ".join(filter(None, makers)) if found.computed else "",
    )
    if not mapping.missing and not mapping.mismatched:
        return mapping
    diff = _explain(mapping, checkpoint, skeleton, state, rules, named)
    return replace(mapping, diff=diff, suggestions=diff.suggestions)


@dataclass(frozen=True)
class _Named:
    """Every chosen tensor under the name of the target that it is for.

    Attributes:
        given: by the names that the user's rules gave.
        renaming: changed name → target name.
        evidence: what changed given names.
        left_out: target names of tensors that the user left out.
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


def _resolve(checkpoint: Checkpoint, skeleton: Skeleton, state: Mapping[str, Target], rules: KeyRules) -> _Named:
    """User's names, functions, evidence, and the renames of the model's kind, in this order."""
    given = make_names(give_names(checkpoint, rules), checkpoint, skeleton, rules)
    fits = _fits(checkpoint.source, state, rules)
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
    return _Named(
        given,
        renaming,
        evidence,
        {others[name] for name in given.left_out},
        {others[name]: f"{key!r}: {checkpoint.unreadable[key]}" for name, key in given.unreadable.items()},
        fits,
        Transforms(checkpoint.source, rules.transforms, state),
    )


def _leaves_both(finals: Mapping[str, str], state: Mapping[str, Target]) -> bool:
    """Whether there are names that feed nothing and targets that nothing feeds."""
    fed = set(finals.values())
    return not fed <= state.keys() and not state.keys() <= fed


def _fits(source: str, state: Mapping[str, Target], rules: KeyRules) -> Fits:
    if not rules.reshape:
        return lambda entry, target: entry.shape == target.shape
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
class _Linked:
    """What `KeyMapping` has, before ties."""

    links: list[Link] = field(default_factory=list)
    computed: list[Computation] = field(default_factory=list)
    mismatched: list[Mismatch] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)
    leads: dict[str, str] = field(default_factory=dict)
    converted: frozenset[str] = frozenset()


def _link(named: _Named, state: Mapping[str, Target], skeleton: Skeleton) -> _Linked:
    """Which entry feeds what.

    Raises:
        KeysError: two keys become the same target, or keys cannot be converted.
        UnsupportedError: what functions made would be converted once more.
    """
    found = _Linked()
    tracing = named.given.tracing
    made = tracing.made if tracing is not None else ()
    converted: dict[str, TensorEntry] = {}
    names, sources, fits = named.evidence.names, found.sources, named.fits
    for given, entry in named.given.entries.items():
        changed, key = names.get(given, given), entry.key
        name = named.renaming.names[changed]
        target = state.get(name)
        if target is None:
            found.unexpected.append(key)
            continue
        if given in made or name in named.transforms:
            refuse_twice(changed, entry, named.renaming)
            conversion, entries = named.transforms.conversion(given, entry, target, tracing)
            _add(found, link_converted([conversion], entries, state))
            continue
        if changed in named.renaming.converted:
            if changed in converted:
                raise KeysError(collision(entry.file, key, converted[changed].key, name))
            converted[changed] = entry
            continue
        if name in sources:
            raise KeysError(collision(entry.file, key, sources[name], name))
        sources[name] = key
        link = turned(entry, target) if target.turned else None
        if link is not None:
            found.links.append(link)
        elif entry.shape == target.shape:
            found.links.append(Link(entry, name, whole(target.shape)))
        elif not fits(entry, target):
            found.mismatched.append(Mismatch(key, name, entry.shape, target.shape, entry.dtype))
        else:
            # The same bytes under another shape; with strides the shape is needed to find them.
            reshaped = replace(entry, shape=target.shape) if entry.strides is None else entry
            found.links.append(Link(reshaped, name, whole(target.shape)))
    if converted:
        conversions = skeleton.rules.convert(converted, named.renaming, state)
        _add(found, link_converted(conversions, converted, state))
    if found.converted:
        # In the checkpoint's file order again.
        order = {entry.key: i for i, entry in enumerate(named.given.sources)}
        found.links.sort(key=lambda link: (order[link.entry.key], link.entry.offset))
    return found


def _add(found: _Linked, more: Converted) -> None:
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


def _resolve_ties(
    found: _Linked, state: Mapping[str, Target], untied: Collection[str], sources: Collection[str]
) -> tuple[list[Link], dict[str, str], dict[str, str]]:
    """One link feeds a tie group, that of its declared source if there is one.

    Returns the links, the followers, and the followers that had a key of their own.
    """
    # Most models tie nothing or little, and one of a group bears its name.
    shared = {target.tie for name, target in state.items() if target.tie != name and name not in untied}
    if not shared:
        return found.links, {}, {}
    groups: dict[str, list[str]] = defaultdict(list)
    for name, target in state.items():
        if target.tie in shared and name not in untied:
            groups[target.tie].append(name)
    computed = {name for computation in found.computed for name in computation.targets}
    fed = {link.target for link in found.links} | computed
    dropped: set[str] = set()
    tied: dict[str, str] = {}
    doubled: dict[str, str] = {}
    for members in groups.values():
        candidates = [name for name in members if name in fed] if len(members) > 1 else []
        if not candidates:
            continue
        leader = next((name for name in candidates if name in computed or name in sources), candidates[0])
        for name in members:
            if name != leader:
                tied[name] = leader
                if name in fed:
                    doubled[name] = leader
                    dropped.add(name)
    return [link for link in found.links if link.target not in dropped], tied, doubled


def _explain(
    mapping: KeyMapping,
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    state: Mapping[str, Target],
    rules: KeyRules,
    named: _Named,
) -> KeyDiff:
    """The difference, with rules that were tried before they are offered."""

    def attempt(rules: KeyRules) -> Naming | None:
        try:
            other = _resolve(checkpoint, skeleton, state, rules)
            linked = _link(other, state, skeleton)
        except (KeysError, UnsupportedError, OptionError):
            # A function of the user may know nothing of names that it was not meant for.
            return None
        return Naming({link.target for link in linked.links}, linked.mismatched)

    given = named.given.entries
    names = {entry.key: named.evidence.names.get(name, name) for name, entry in given.items()}
    diff = make_diff(mapping, checkpoint, state, rules, named.evidence.steps, names, attempt)
    rows = vocabulary_hint(mapping.mismatched, skeleton.rules.vocabularies())
    if rows is not None:
        diff = replace(diff, hints=(rows, *diff.hints))
    # The model's kind remembers what it renamed: that of the mapping, and not of a trial.
    skeleton.rules.rename({names[entry.key]: entry for entry in given.values()}, state)
    return diff


def refuse(
    mapping: KeyMapping, source: str, strict: bool | Literal["shapes"] = True, rules: KeyRules = NO_RULES
) -> None:
    """Refuse a mapping that lacks too much.

    Args:
        mapping: what `match` found.
        source: the checkpoint, for messages.
        strict: refuse whatever is missing or mismatched, or mismatched ones only; otherwise only next to nothing.
        rules: what the user said about keys.

    Raises:
        KeysError: something is missing or mismatched; says what, and what would help.
        UnsupportedError: a tensor that the model needs cannot be read.
    """
    if strict is True and mapping.unreadable:
        name, why = next(iter(mapping.unreadable.items()))
        more = f" ({len(mapping.unreadable)} such)" if len(mapping.unreadable) > 1 else ""
        raise UnsupportedError(
            f"{source}: tensor {why}{more}; expected a tensor that can be read for the model's {name!r}; leave it out "
            f"by skip= (--skip), or give strict=False (--no-strict): the model's own rule initialises it then"
        )
    bad_shapes = mapping.mismatched and not rules.ignore_mismatched_sizes
    if (strict and bad_shapes) or (strict is True and mapping.missing):
        remedy = "ignore_mismatched_sizes=True" if strict == "shapes" else "strict=False (--no-strict)"
        raise KeysError(
            f"{source}: the checkpoint does not fit the model\n{_text(mapping)}\n"
            f"with {remedy} these are initialised by the model's own rule and named in the report"
        )
    if _is_next_to_nothing(mapping):
        fed = len(mapping.fed)
        keys = fed + len(mapping.doubled) + len(mapping.unexpected) + len(mapping.mismatched)
        raise KeysError(
            f"{source}: next to nothing of the checkpoint fits the model ({fed} of {keys} keys), which is refused "
            f"whatever strict says: the model would be as good as untrained\n{_text(mapping)}"
        )


def _text(mapping: KeyMapping) -> str:
    assert mapping.diff is not None
    return mapping.diff.text()


def _is_next_to_nothing(mapping: KeyMapping) -> bool:
    """None, or less than a tenth of the model and of the keys: a head or an adapter is small in the one only."""
    lacking = len(mapping.missing) + len(mapping.mismatched)
    if not lacking:
        return False
    fed = len(mapping.fed) + len(mapping.tied)
    keys = len(mapping.links) + len(mapping.doubled)
    unused = len(mapping.unexpected) + len(mapping.mismatched)
    return not mapping.fed or (10 * fed < fed + lacking and 10 * keys < keys + unused)
