"""The difference between a checkpoint's keys and a model's names, in groups, with rules that would mend it."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .._patterns import name_matches
from ..checkpoint import Checkpoint
from ..modeling.skeleton import Skeleton
from ..modeling.targets import Target
from .evidence import Step
from .groups import Group, Shape, alike, group_names, partners
from .records import KeyMapping, KeyRules, Mismatch
from .suggest import find_rules

# Lines of a section of the text; the whole is in `groups`.
_LINES = 12
_MOST_PREFIXES = 3
# How alike a key must be to be named, and how many are looked at.
_LIKE = 0.6
_LOOKED_AT = 2000


@dataclass(frozen=True)
class KeyGroup:
    """Names that differ in numbers only and have the same fate.

    Attributes:
        kind: `"missing"` (of the model), `"unexpected"` or `"mismatched"` (of the checkpoint).
        pattern: the names, with numbers as ranges, such as `layers.{0..31}.attn.qkv.weight`.
        names: all of them.
        shapes: their shapes, each once.
        expected: of mismatched ones the shapes in the model, each once.
        dtypes: of mismatched ones the dtypes in the checkpoint, each once.
        partner: the pattern of the group on the other side that they most likely mean, or None.
    """

    kind: Literal["missing", "unexpected", "mismatched"]
    pattern: str
    names: tuple[str, ...] = field(repr=False)
    shapes: tuple[Shape, ...]
    expected: tuple[Shape, ...] = ()
    dtypes: tuple[str, ...] = ()
    partner: str | None = None

    def text(self) -> str:
        """One line."""
        count = len(self.names)
        name = repr(self.names[0]) if count == 1 else _printable(self.pattern)
        if self.kind == "mismatched":
            dtypes = ", ".join(self.dtypes)
            return f"{name}: expected {_shapes(self.expected)}, found {_shapes(self.shapes)} {dtypes}".rstrip()
        many = f" ({count})" if count > 1 else ""
        like = f"; likely {_printable(self.partner)}" if self.partner is not None else ""
        return f"{name}{many}: {_shapes(self.shapes)}{like}"

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "kind": self.kind,
            "pattern": self.pattern,
            "count": len(self.names),
            "shapes": [list(shape) for shape in self.shapes],
            "expected": [list(shape) for shape in self.expected],
            "dtypes": list(self.dtypes),
            "partner": self.partner,
        }


@dataclass(frozen=True)
class KeyDiff:
    """What differs between a checkpoint and a model, and what would mend it.

    Attributes:
        missing: the model's tensors that nothing feeds.
        unexpected: the checkpoint's keys that feed nothing.
        mismatched: keys of another shape than their target.
        matched: how many of the model's tensors are fed.
        groups: missing, unexpected and mismatched names, as few lines as there are patterns.
        rename: regular expression → replacement, in order: what would feed more; tried before it is offered.
        reshape: names for `reshape=`: shapes that differ in dimensions of one only; tried likewise.
        prefixes: modules for `prefix=`, each of which would feed more; tried likewise.
        mended: how many more of the model's tensors `rename` and `reshape`, or else the first prefix, would feed.
        steps: what evidence did to the keys already.
        opened: the mapping inside a pickled file whose keys these are; empty for the whole file.
        hints: what single names may be called, where no rule was found, a sentence each.
        after_own: the user has functions of his own, which `rename` follows.
    """

    missing: tuple[str, ...] = field(repr=False)
    unexpected: tuple[str, ...] = field(repr=False)
    mismatched: tuple[Mismatch, ...] = field(repr=False)
    matched: int
    groups: tuple[KeyGroup, ...]
    rename: Mapping[str, str] = field(default_factory=dict)
    reshape: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    mended: int = 0
    steps: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    after_own: bool = False
    opened: str = ""

    @property
    def is_empty(self) -> bool:
        """Whether every key feeds a tensor and every tensor is fed."""
        return not self.missing and not self.unexpected and not self.mismatched

    @property
    def rules(self) -> tuple[str, ...]:
        """The options that would mend it, as arguments to paste into a Python call."""
        if self.rename or self.reshape:
            lines = []
            if self.rename:
                table = ", ".join(f"{_raw(old)}: {_raw(new)}" for old, new in self.rename.items())
                lines.append(f"rename={{{table}}}")
            if self.reshape:
                lines.append(f"reshape=[{', '.join(map(repr, self.reshape))}]")
            return tuple(lines)
        return tuple(f"prefix={prefix!r}" for prefix in self.prefixes)

    @property
    def advice(self) -> str:
        """What stands before `rules`; empty without any."""
        if not self.rules:
            return ""
        which = "this" if self.rename or self.reshape or len(self.prefixes) == 1 else "one of these"
        own = ", after your own functions" if self.after_own and self.rename else ""
        guess = " (names and shapes say so: compare the pairs)" if self.rename else ""
        return f"{which} would feed {self.mended} more{own}{guess}; paste it into the call:"

    @property
    def suggestions(self) -> tuple[str, ...]:
        """What would probably mend it, a sentence each."""
        return (*((f"{self.advice} {', '.join(self.rules)}",) if self.rules else ()), *self.hints)

    def text(self) -> str:
        """For messages and the shell: counts, groups, and the rules to paste."""
        lines = [f"of {self.opened!r} inside of the file"] if self.opened else []
        shapes = [group for group in self.groups if group.kind == "mismatched"]
        if self.mismatched:
            have = "tensor has" if len(self.mismatched) == 1 else "tensors have"
            lines += [f"{len(self.mismatched)} {have} another shape:", *_lines(shapes)]
        for names, kind, what in (
            (self.missing, "missing", "of the model's tensors are not in the checkpoint"),
            (self.unexpected, "unexpected", "keys of the checkpoint are not in the model"),
        ):
            if names:
                few = ": " + ", ".join(map(repr, names)) if len(names) <= 5 else ":"
                lines.append(f"{len(names)} {what}{few}")
                if len(names) > 5 or (self.missing and self.unexpected):
                    lines += _lines([group for group in self.groups if group.kind == kind])
        lines += self.steps
        if self.rules:
            between = "," if self.rename or self.reshape else ""
            lines += [self.advice, *(rule + between for rule in self.rules[:-1]), self.rules[-1]]
        lines += self.hints
        if self.is_empty:
            lines.append(f"no difference: {self.matched} tensors match")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "opened": self.opened,
            "matched": self.matched,
            "missing": list(self.missing),
            "unexpected": list(self.unexpected),
            "mismatched": [
                {
                    "key": m.key,
                    "target": m.target,
                    "found": list(m.found),
                    "expected": list(m.expected),
                    "dtype": m.dtype,
                }
                for m in self.mismatched
            ],
            "groups": [group.to_dict() for group in self.groups],
            "rename": dict(self.rename),
            "reshape": list(self.reshape),
            "prefixes": list(self.prefixes),
            "mended": self.mended,
            "steps": list(self.steps),
            "suggestions": list(self.suggestions),
        }


def _printable(pattern: str) -> str:
    return pattern if pattern.isprintable() else repr(pattern)


def _lines(groups: Sequence[KeyGroup]) -> list[str]:
    more = [f"  … and {len(groups) - _LINES} more groups"] if len(groups) > _LINES else []
    return [f"  {group.text()}" for group in groups[:_LINES]] + more


def _shapes(shapes: Sequence[Shape]) -> str:
    return ", ".join(str(list(shape)) for shape in shapes[:3]) + (", …" if len(shapes) > 3 else "")


def _raw(text: str) -> str:
    """A raw string where one can be written."""
    plain = text.isprintable() and '"' not in text and not text.endswith("\\")
    return f'r"{text}"' if plain else repr(text)


@dataclass(frozen=True)
class Naming:
    """What a trial of rules came to: the targets that it feeds, and the keys of another shape."""

    targets: set[str]
    mismatched: Sequence[Mismatch]


Attempt = Callable[[KeyRules], Naming | None]


def diff_of(mapping: KeyMapping, checkpoint: Checkpoint, skeleton: Skeleton) -> KeyDiff:
    """The difference that `match` found.

    Args:
        mapping: what `match` gave.
        checkpoint: the entries.
        skeleton: the targets.
    """
    if mapping.diff is not None:
        return mapping.diff
    # Nothing is missing: there is nothing to mend.
    return bare_diff(mapping, checkpoint, skeleton.targets)


def bare_diff(mapping: KeyMapping, checkpoint: Checkpoint, targets: Mapping[str, Target]) -> KeyDiff:
    """Names and groups, without what would mend it."""
    missing = group_names({name: targets[name].shape for name in mapping.missing})
    unexpected = group_names({key: checkpoint[key].shape for key in mapping.unexpected})
    odd = {m.target: m for m in mapping.mismatched}
    groups = [_other_shape(group, odd) for group in group_names({m.target: m.found for m in odd.values()})]
    pairs = partners(missing, unexpected)
    groups += _sided("missing", missing, {pair.wanted.stem: pair.offered.pattern for pair in pairs})
    groups += _sided("unexpected", unexpected, {pair.offered.stem: pair.wanted.pattern for pair in pairs})
    return KeyDiff(
        missing=mapping.missing,
        unexpected=mapping.unexpected,
        mismatched=mapping.mismatched,
        matched=len(mapping.fed) + len(mapping.tied),
        groups=tuple(groups),
        steps=mapping.steps,
    )


def _sided(kind: Literal["missing", "unexpected"], own: list[Group], like: Mapping[str, str]) -> list[KeyGroup]:
    groups: dict[tuple[object, ...], list[tuple[Group, str | None]]] = {}
    for group in own:
        partner = like.get(group.stem)
        stem, _, leaf = group.stem.rpartition(".")
        other, _, there = (partner or "").rpartition(".")
        # Weight and bias of one module are one line, if their partners are those of one module too.
        apart = "" if partner is None or there == leaf else partner
        groups.setdefault((stem or leaf, tuple(group.members), partner is None, other, apart), []).append(
            (group, partner)
        )
    return [_joined(kind, held) for held in groups.values()]


def _joined(kind: Literal["missing", "unexpected"], held: Sequence[tuple[Group, str | None]]) -> KeyGroup:
    """Groups that differ in their last component only."""
    patterns, partner = [group.pattern for group, _ in held], held[0][1]
    return KeyGroup(
        kind,
        _leaves(patterns),
        tuple(name for group, _ in held for name in group.names),
        tuple(dict.fromkeys(shape for group, _ in held for shape in group.distinct)),
        partner=None if partner is None else _leaves([other for _, other in held if other is not None]),
    )


def _leaves(patterns: Sequence[str]) -> str:
    """Patterns of one module as one."""
    last = list(dict.fromkeys(pattern.rpartition(".")[2] for pattern in patterns))
    if len(last) == 1:
        return patterns[0]
    stem = patterns[0].rpartition(".")[0]
    return f"{stem}.{{{','.join(last)}}}" if stem else f"{{{','.join(last)}}}"


def _other_shape(group: Group, odd: Mapping[str, Mismatch]) -> KeyGroup:
    held = [odd[name] for name in group.names]
    return KeyGroup(
        "mismatched",
        group.pattern,
        tuple(group.names),
        tuple(group.distinct),
        tuple(dict.fromkeys(m.expected for m in held)),
        tuple(dict.fromkeys(m.dtype for m in held)),
    )


def make_diff(
    mapping: KeyMapping,
    checkpoint: Checkpoint,
    state: Mapping[str, Target],
    rules: KeyRules,
    steps: Sequence[Step],
    names: Mapping[str, str],
    attempt: Attempt,
) -> KeyDiff:
    """The difference with what would mend it.

    Args:
        mapping: without its diff.
        checkpoint: the entries.
        state: the targets that belong to the state dict.
        rules: what the user said.
        steps: what evidence did after that.
        names: key → name after both.
        attempt: what other rules would come to, or None where they are an error.
    """
    diff = bare_diff(mapping, checkpoint, state)
    fed = mapping.fed
    rename = _rename(mapping, checkpoint, state, rules, steps, names) if diff.unexpected and diff.missing else {}
    trial = _with(rules, rename, ())
    naming = attempt(trial) if rename else None
    reshape = _reshape(state, mapping.mismatched if naming is None else naming.mismatched)
    if reshape:
        naming = attempt(_with(rules, rename, reshape))
    mended = 0 if naming is None else len(naming.targets - fed)
    # A table that mends a small part only is more likely an accident.
    few = 2 * mended < min(len(diff.missing), len(diff.unexpected)) if rename else not mended
    if naming is None or few or not fed <= naming.targets:
        rename, reshape, mended = {}, (), 0
    prefixes, more = _prefixes(mapping, checkpoint, state, rules, attempt)
    if more and more >= mended:
        rename, reshape, mended = {}, (), more
    diff = replace(diff, rename=rename, reshape=reshape, prefixes=prefixes, mended=mended)
    return replace(diff, hints=_hints(diff, checkpoint, state), after_own=any(map(callable, rules.rename)))


def _with(rules: KeyRules, rename: Mapping[str, str], reshape: tuple[str, ...]) -> KeyRules:
    """The user's rules with those that are pasted over them: functions stay, a table is replaced by one with it."""
    functions = tuple(rule for rule in rules.rename if callable(rule))
    pasted = tuple((re.compile(old), new) for old, new in rename.items())
    kept = functions if rename else rules.rename
    return replace(rules, rename=(*kept, *pasted), reshape=(*rules.reshape, *reshape))


def _rename(
    mapping: KeyMapping,
    checkpoint: Checkpoint,
    state: Mapping[str, Target],
    rules: KeyRules,
    steps: Sequence[Step],
    names: Mapping[str, str],
) -> dict[str, str]:
    """The whole table: the user's own expressions, what evidence did, and what feeds more."""
    offered = {names[key]: checkpoint[key].shape for key in mapping.unexpected if key in names}
    wanted = {name: state[name].shape for name in mapping.missing}
    fed = {names[key] for key in mapping.sources.values() if key in names}
    found = find_rules(offered, wanted, state, fed)
    if not found:
        return {}
    own = [(rule[0].pattern, rule[1]) for rule in rules.rename if not callable(rule)]
    done = [(step.pattern.pattern, step.replacement) for step in steps]
    return dict([*own, *done, *((rule.pattern.pattern, rule.replacement) for rule in found)])


def _reshape(state: Mapping[str, Target], mismatched: Iterable[Mismatch]) -> tuple[str, ...]:
    """The fewest names that fit all mismatched tensors whose shapes differ in dimensions of one, and no other."""
    free = {m.target for m in mismatched if alike(m.found, m.expected)}
    patterns: list[str] = []
    open_ = set(free)
    while open_:
        name = min(open_)
        best = max(_tails(name, free, state), key=lambda tail: (len(_fitting(tail, open_)), -len(tail)), default=name)
        patterns.append(best)
        open_ -= _fitting(best, open_) | {name}
    return tuple(patterns)


def _tails(name: str, free: Collection[str], state: Mapping[str, Target]) -> list[str]:
    """Runs of components of a name that fit only what is free."""
    parts = name.split(".")
    runs = {".".join(parts[i:j]) for i in range(len(parts)) for j in (len(parts) - 1, len(parts)) if i < j}
    return sorted(run for run in runs if not run.isdecimal() and _fitting(run, state) <= set(free))


def _fitting(pattern: str, names: Iterable[str]) -> set[str]:
    return {name for name in names if name_matches(name, pattern)}


def _prefixes(
    mapping: KeyMapping, checkpoint: Checkpoint, state: Mapping[str, Target], rules: KeyRules, attempt: Attempt
) -> tuple[tuple[str, ...], int]:
    """Modules of the checkpoint, each of which would feed most of what is missing, and how much the first would."""
    wanted = set(mapping.missing)
    if rules.prefix is not None or not wanted:
        return (), 0
    votes: Counter[str] = Counter()
    for key in mapping.unexpected:
        at = key.find(".")
        while at > 0:
            rest = key[at + 1 :]
            if rest in wanted and alike(checkpoint[key].shape, state[rest].shape):
                votes[key[:at]] += 1
            at = key.find(".", at + 1)
    fed = mapping.fed
    gains: dict[str, int] = {}
    for prefix, count in votes.most_common(_MOST_PREFIXES):
        if 2 * count < len(wanted):
            continue
        naming = attempt(replace(rules, prefix=prefix))
        gain = 0 if naming is None or not fed <= naming.targets else len(naming.targets - fed)
        if gain:
            gains[prefix] = gain
    ranked = sorted(gains, key=lambda prefix: -gains[prefix])
    return tuple(ranked), gains[ranked[0]] if ranked else 0


def _hints(diff: KeyDiff, checkpoint: Checkpoint, state: Mapping[str, Target]) -> tuple[str, ...]:
    """What single names may be called, where no rule was found."""
    hints: list[str] = []
    pool = {key: checkpoint[key].shape for key in diff.unexpected[:_LOOKED_AT]}
    for name in diff.missing[:3] if pool and not diff.rules else ():
        same = [key for key, shape in pool.items() if shape == state[name].shape]
        close = difflib.get_close_matches(name, same, n=1, cutoff=_LIKE)
        hints += [f"{name!r} may be the checkpoint's {key!r}" for key in close]
    return tuple(hints)
