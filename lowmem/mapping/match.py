"""Checkpoint keys to model targets, from headers alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..checkpoint import Checkpoint
from ..checkpoint.records import stored_bytes
from ..errors import KeysError, OptionError, UnsupportedError
from ..modeling.skeleton import Skeleton
from ..modeling.targets import Target
from .diff import KeyDiff, Naming, bare_diff, make_diff
from .int8 import pair
from .linking import Linked, Named, link, resolve
from .made import kind_of, odd_names
from .opened import Opened
from .records import NO_RULES, KeyMapping, KeyRules, Link, Share
from .suggest import grid_hint, vocabulary_hint


def match(
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    untied: Collection[str] = (),
    rules: KeyRules = NO_RULES,
    parts: Sequence[Opened] = (),
) -> KeyMapping:
    """Find the entry of every target.

    Args:
        checkpoint: the entries; of several sources those of all.
        skeleton: the targets and the rules that rename keys.
        untied: targets that stand for themselves although the model ties them, because their values differ from those
            that the rest of their group gets.
        rules: what the user said about keys.
        parts: the sources, where there are several, or one for a part of the model; they have rules of their own.

    Raises:
        KeysError: two keys become the same target after renaming, or a rule of the user fits nothing.
        OptionError: a function of the user fails.
    """
    state = {name: target for name, target in skeleton.targets.items() if target.persistent}
    looks = [_look(part, skeleton, state) for part in parts or (Opened(checkpoint, rules),)]
    found = looks[0].linked
    if parts:
        found = Linked()
        for look in looks:
            found.join(look.linked, look.part.front)
    left_out = {look.part.key(key) for look in looks for key in look.named.given.left_out.values()}
    pairs = pair(found.links, skeleton, checkpoint, left_out)
    links, tied, doubled = _resolve_ties(
        replace(found, links=pairs.links), state, untied, set(skeleton.rules.declared_ties().values())
    )
    # A module at several places has scales under several names.
    made = {state[name].tie for name in pairs.made}
    missing = [n for n in state if n not in found.sources and n not in tied and not (made and state[n].tie in made)]
    excused = _excused(looks, found, state, missing)
    ignored = {key for look in looks for key in look.ignored()} | pairs.companions | _of_others(looks)
    missing = [name for name in missing if name not in excused]
    unreadable = {name: why for look in looks for name, why in look.unreadable.items()}
    makers = [maker for look in looks for maker in look.makers()] if found.computed else []
    mapping = KeyMapping(
        links=tuple(links),
        tied=tied,
        doubled=doubled,
        missing=tuple(missing),
        excused=tuple(name for name in state if name in excused) if excused else (),
        unexpected=tuple(key for key in found.unexpected if key not in ignored),
        mismatched=tuple(found.mismatched),
        suggestions=(),
        sources=found.sources,
        steps=tuple(step for look in looks for step in look.steps()),
        unreadable={name: unreadable[name] for name in missing if name in unreadable},
        computed=tuple(found.computed),
        leads=found.leads,
        converted=found.converted,
        made=pairs.made,
        maker="; ".join(makers),
        apart=_apart(looks, state, tied),
        shares=tuple(look.share() for look in looks) if parts else (),
    )
    if not mapping.missing and not mapping.mismatched:
        return mapping
    diff = _explained(mapping, checkpoint, skeleton, looks)
    return replace(mapping, diff=diff, suggestions=diff.suggestions)


@dataclass(frozen=True)
class _Look:
    """A source, the module that it feeds, and what was found. Names are those of the whole model.

    Attributes:
        part: the source.
        skeleton: the module.
        state: its targets of the state dict, by their names in it.
        named: its tensors.
        linked: what they feed, by names in the module.
    """

    part: Opened
    skeleton: Skeleton
    state: Mapping[str, Target]
    named: Named
    linked: Linked

    def owns(self, name: str) -> bool:
        """Whether it is for this source to feed a target."""
        return name.startswith(self.part.front) and self.part.taker(name) is None

    @property
    def left_out(self) -> list[str]:
        """Targets whose tensors the user left out."""
        return [self.part.front + name for name in self.named.left_out]

    @property
    def unreadable(self) -> dict[str, str]:
        """Targets whose tensors cannot be read, and why."""
        return {self.part.front + name: why for name, why in self.named.unreadable.items()}

    def excused(self, missing: Collection[str]) -> set[str]:
        """Those of the missing targets that may be missing."""
        front = self.part.front
        own = [name[len(front) :] for name in missing if self.owns(name)]
        return {front + name for name in self.skeleton.rules.may_miss(own)}

    def ignored(self) -> set[str]:
        """Keys that feed nothing, which is nothing to report."""
        keys = {self.part.own_key(key): key for key in self.linked.unexpected}
        return {keys[key] for key in self.skeleton.rules.may_ignore(list(keys))}

    def steps(self) -> list[str]:
        """What was done to its keys by evidence, and by whom they are fed instead, a sentence each."""
        said = [*self.named.given.idle, *self.named.evidence.sentences]
        for path, other in self.part.taken:
            lost = [key for key, name in self.linked.elsewhere.items() if self.part.taker(name) == (path, other)]
            if lost:
                more = ", …" if len(lost) > 1 else ""
                said.append(f"{len(lost)} tensors ({lost[0]!r}{more}) are not read: {other} feeds {path!r}")
        return [f"{self.part.label}: {line}" if self.part.label else line for line in said]

    def share(self) -> Share:
        """What it feeds."""
        fed = {link.target for link in self.linked.links}
        entries = [link.entry for link in self.linked.links]
        for computation in self.linked.computed:
            fed.update(computation.targets)
            entries += computation.sources
        return Share(self.part.path, self.part.checkpoint.source, len(fed), stored_bytes(entries))

    def makers(self) -> list[str]:
        """What tells the functions that were used from others, those of a part's own kind too."""
        tracing = self.named.given.tracing
        kind = kind_of(self.skeleton) if self.part.path else ""
        made = "" if tracing is None else tracing.maker()
        return [*filter(None, (kind, made, self.named.transforms.used(self.state)))]


def _look(part: Opened, whole: Skeleton, state: Mapping[str, Target]) -> _Look:
    skeleton = part.skeleton(whole)
    if skeleton is not whole:
        state = {name: target for name, target in skeleton.targets.items() if target.persistent}
    named = resolve(part.checkpoint, skeleton, state, part.rules)
    linked = link(named, state, skeleton, lambda name: part.taker(part.front + name) is not None)
    look = _Look(part, skeleton, state, named, linked)
    if part.label and not linked.sources and not linked.elsewhere:
        if not state:
            raise KeysError(
                f"{part.checkpoint.source}: expected tensors in {part.path or 'the model'!r} to fill, found none in "
                f"that {type(skeleton.model).__name__}: where it is built later, name the module inside of it that "
                "is, with model= (or auto_class=) in its lowmem.Source"
            )
        diff = _diff_of(look, KeyMapping((), {}, {}, tuple(state), (), tuple(linked.unexpected), (), ()))
        raise KeysError(
            f"{part.checkpoint.source}: expected tensors of {part.path or 'the model'!r}, found none among its "
            f"{len(part.checkpoint)}\n{diff.text()}"
        )
    return look


def _resolve_ties(
    found: Linked, state: Mapping[str, Target], untied: Collection[str], sources: Collection[str]
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


def _excused(looks: Sequence[_Look], found: Linked, state: Mapping[str, Target], missing: Collection[str]) -> set[str]:
    """Missing targets that may be missing."""
    excused = {name for look in looks for name in look.excused(missing)}
    # What is tied to a tensor of another shape shares its fate and is not missing; so does what is tied to one that was
    # left out.
    odd = {state[m.target].tie for m in found.mismatched}
    odd.update(state[name].tie for look in looks for name in look.left_out if name in state)
    if odd:
        excused.update(name for name in missing if state[name].tie in odd)
    return excused


def _apart(looks: Sequence[_Look], state: Mapping[str, Target], tied: Mapping[str, str]) -> dict[str, str]:
    """Targets that have a dtype by their source: that of the one that feeds them, else of the smallest module's."""
    apart: dict[str, str] = {}
    if not any(look.part.path or look.part.dtype for look in looks):
        return apart
    for look in sorted(looks, key=lambda look: len(look.part.path)):
        if look.part.path or look.part.dtype:
            apart.update({name: look.part.dtype or "" for name in state if look.owns(name)})
    for look in looks:
        fed = [look.part.front + name for name in look.linked.sources]
        if look.part.path or look.part.dtype:
            apart.update(dict.fromkeys(fed, look.part.dtype or ""))
        else:
            for name in fed:
                apart.pop(name, None)
    # What is tied is what feeds it.
    apart.update({name: apart[leader] for name, leader in tied.items() if leader in apart})
    return apart


def _of_others(looks: Sequence[_Look]) -> set[str]:
    """Keys that feed nothing here, and do where the same file is asked for another module, or are named there."""
    told: dict[str, set[str]] = defaultdict(set)
    for look in looks if len(looks) > 1 else ():
        told[look.part.checkpoint.source].update(map(look.part.own_key, look.linked.sources.values()))
    ignored = set()
    for look in looks if len(looks) > 1 else ():
        seen = told[look.part.checkpoint.source]
        for key in look.linked.unexpected:
            own = look.part.own_key(key)
            if own in seen:
                ignored.add(key)
            seen.add(own)
    return ignored


def _explained(mapping: KeyMapping, checkpoint: Checkpoint, skeleton: Skeleton, looks: Sequence[_Look]) -> KeyDiff:
    """The difference; of several sources with what would mend it in each."""
    if len(looks) == 1 and not looks[0].part.label:
        return _diff_of(looks[0], mapping)
    diff = bare_diff(mapping, checkpoint, skeleton.targets)
    hints = []
    for look in looks:
        front = look.part.front
        missing = tuple(name[len(front) :] for name in mapping.missing if look.owns(name))
        odd = tuple(replace(m, target=m.target[len(front) :]) for m in mapping.mismatched if look.owns(m.target))
        if missing or odd:
            own = set(look.linked.unexpected)
            unexpected = tuple(key for key in mapping.unexpected if key in own)
            part = replace(mapping, missing=missing, mismatched=odd, unexpected=unexpected)
            hints += [f"{look.part.label}: {line}" for line in _diff_of(look, part).suggestions]
    return replace(diff, hints=(*_without_source(mapping, skeleton, looks), *diff.hints, *hints))


def _without_source(mapping: KeyMapping, skeleton: Skeleton, looks: Sequence[_Look]) -> list[str]:
    """The largest modules of which nothing is fed, and keys that name tensors of the whole model."""
    fed = {*mapping.sources, *mapping.tied}
    modules = {name.rpartition(".")[0] for name in mapping.missing}
    alone = [m for m in modules if m and not any(name.startswith(f"{m}.") for name in fed)]
    above = {m: m.split(".") for m in alone}
    largest: set[str] = set()
    for parts in above.values():
        fronts = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
        largest.add(next(f for f in fronts if not any(name.startswith(f"{f}.") for name in fed)))
    hints = [f"nothing feeds {name!r}: give it a source, if it has a file of its own" for name in sorted(largest)[:3]]
    missing = set(mapping.missing)
    for look in looks:
        whole = [key for key in map(look.part.own_key, look.linked.unexpected) if key in missing]
        if whole and look.part.path:
            hints.append(
                f"the source for {look.part.path!r} has {whole[0]!r}, which is a name in the whole model: is it the "
                "source of '', the whole?"
            )
    return hints


def _diff_of(look: _Look, mapping: KeyMapping) -> KeyDiff:
    """The difference of one source, with rules that were tried before they are offered.

    Args:
        look: the source.
        mapping: what lacks and is left over; its targets by their names in the module.
    """
    checkpoint, skeleton, state, named = look.part.checkpoint, look.skeleton, look.state, look.named

    def attempt(rules: KeyRules) -> Naming | None:
        try:
            other = resolve(checkpoint, skeleton, state, rules)
            linked = link(other, state, skeleton)
        except (KeysError, UnsupportedError, OptionError):
            # A function of the user may know nothing of names that it was not meant for.
            return None
        return Naming({link.target for link in linked.links}, linked.mismatched)

    own_key = look.part.own_key
    if look.part.label:
        mapping = replace(
            mapping,
            unexpected=tuple(map(own_key, mapping.unexpected)),
            mismatched=tuple(replace(m, key=own_key(m.key)) for m in mapping.mismatched),
        )
    given = named.given.entries
    names = {own_key(entry.key): named.evidence.names.get(name, name) for name, entry in given.items()}
    diff = make_diff(mapping, checkpoint, state, look.part.rules, named.evidence.steps, names, attempt)
    rows = vocabulary_hint(mapping.mismatched, skeleton.rules.vocabularies())
    grids = grid_hint(mapping.mismatched)
    if named.given.tracing is not None and not named.given.entries.keys() <= named.given.chosen.keys():
        # Rules would come before the functions, and were found behind them.
        changed = {name: named.evidence.names.get(name, name) for name in named.given.entries}
        finals = {name: named.renaming.names[new] for name, new in changed.items()}
        diff = replace(diff, rename={}, reshape=(), prefixes=(), hints=tuple(odd_names(named.given, finals, state)))
    diff = replace(diff, hints=(*filter(None, (rows, grids)), *diff.hints))
    # The model's kind remembers what it renamed: that of the mapping, and not of a trial.
    skeleton.rules.rename({named.evidence.names.get(name, name): entry for name, entry in given.items()}, state)
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
