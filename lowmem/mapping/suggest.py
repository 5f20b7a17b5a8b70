"""Regular expressions that turn names that feed nothing into names that the model wants."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .groups import Group, Shape, alike, group_names, pair_of, partners
from .records import Mismatch

# Rules that are still a repair and not a table of names.
_MOST_RULES = 24
# Names of each group that are tried; the others follow the same pattern.
_TRIED = 3
# Rules that are looked at more closely.
_MOST_CHECKED = 20


@dataclass(frozen=True, slots=True)
class Rule:
    """What `re.sub` would be given."""

    pattern: re.Pattern[str]
    replacement: str

    @property
    def length(self) -> int:
        """Characters to read."""
        return len(self.pattern.pattern) + len(self.replacement)


def find_rules(
    offered: Mapping[str, Shape], wanted: Mapping[str, Shape], state: Collection[str], fed: Collection[str]
) -> list[Rule]:
    """Rules, one applied after the other, that feed what is wanted from what is offered, as far as some are found.

    Args:
        offered: names that feed nothing, with their shapes.
        wanted: names that nothing feeds, likewise; shapes may differ in dimensions of one.
        state: every name of the model.
        fed: names that feed something and must stay as they are.
    """
    left, open_ = dict(offered), dict(wanted)
    rules: list[Rule] = []
    while left and open_ and len(rules) < _MOST_RULES:
        rule = _best(left, open_, state, fed)
        if rule is None:
            break
        rules.append(rule)
        after = {name: rule.pattern.sub(rule.replacement, name) for name in left}
        done = {name for name, new in after.items() if new in open_ and alike(left[name], open_[new])}
        for name in done:
            open_.pop(after[name], None)
        left = {after[name]: shape for name, shape in left.items() if name not in done}
        fed = {*fed, *(after[name] for name in done)}
    return rules


def _best(
    left: Mapping[str, Shape], open_: Mapping[str, Shape], state: Collection[str], fed: Collection[str]
) -> Rule | None:
    """The rule that feeds most, the shortest of those, if it leaves alone what is fed."""
    offered, wanted = group_names(left), group_names(open_)
    pairs = partners(wanted, offered)
    rules: dict[tuple[str, str], Rule] = {}
    meant: dict[str, Collection[str]] = {}
    for pair in pairs:
        names = pair_of(pair.wanted, pair.offered) if pair.sure else None
        if names is not None:
            rules.update(((r.pattern.pattern, r.replacement), r) for r in candidates(names[1], names[0]))
        # What is not sure is fed by no rule, rather than from the wrong key.
        likely = set(pair.offered.names) if pair.sure else ()
        meant.update((name, likely) for name in pair.wanted.names)
    tried = _samples(offered)
    scored = [(_gain(rule, tried, left, open_, state, meant), rule) for rule in rules.values()]
    scored = sorted((s for s in scored if s[0] > 0), key=lambda s: (-s[0], s[1].length))
    # Sorting is stable: of two that feed as much and are as long, the likelier pair's.
    for _, rule in scored[:_MOST_CHECKED]:
        if _keeps_modules(rule, left, open_) and not any(
            rule.pattern.sub(rule.replacement, name) != name for name in fed
        ):
            return rule
    return None


def _keeps_modules(rule: Rule, left: Mapping[str, Shape], open_: Mapping[str, Shape]) -> bool:
    """Whether the tensors of a module go to one module together, where that has a place for them."""
    homes: dict[str, str] = {}
    after: dict[str, str] = {}
    for name, shape in left.items():
        new = after[name] = rule.pattern.sub(rule.replacement, name)
        if new != name and new in open_ and alike(shape, open_[new]):
            homes[name.rpartition(".")[0]] = new.rpartition(".")[0]
    for name, new in after.items():
        home, _, leaf = name.rpartition(".")
        there = f"{homes[home]}.{leaf}" if home in homes and homes[home] != home else None
        if there in open_ and new != there:
            return False
    return True


def _samples(groups: list[Group]) -> dict[str, float]:
    """A few names of each group, with the number of names that each stands for."""
    tried: dict[str, float] = {}
    for group in groups:
        names = group.names
        some = names[:: max(1, len(names) // _TRIED)]
        tried.update(dict.fromkeys(some, len(names) / len(some)))
    return tried


def _gain(
    rule: Rule,
    tried: Mapping[str, float],
    left: Mapping[str, Shape],
    open_: Mapping[str, Shape],
    state: Collection[str],
    meant: Mapping[str, Collection[str]],
) -> float:
    """How many names it would feed, less what it would spoil; little for a name that another is more like."""
    gain = 0.0
    seen: set[str] = set()
    for name, weight in tried.items():
        new = rule.pattern.sub(rule.replacement, name)
        if new == name:
            continue
        if new in open_ and new not in seen and alike(left[name], open_[new]):
            seen.add(new)
            likely = meant.get(new)
            gain += weight if likely is None or name in likely else -weight if not likely else 0.4 * weight
        elif new in state or new in left:
            gain -= 2 * weight
        else:
            gain -= 0.05 * weight
    return gain


def candidates(name: str, target: str) -> Iterator[Rule]:
    """Rules that make `target` of `name`: what differs alone, and with more and more of what is around it."""
    a, b = name.split("."), target.split(".")
    front = 0
    while front < min(len(a), len(b)) and a[front] == b[front]:
        front += 1
    back = 0
    while back < min(len(a), len(b)) - front and a[-1 - back] == b[-1 - back]:
        back += 1
    for before in dict.fromkeys((0, min(1, front), min(2, front), front)):
        for behind in dict.fromkeys((0, min(1, back), back)):
            old = a[front - before : len(a) - back + behind]
            new = b[front - before : len(b) - back + behind]
            for start in (False, True) if before == front else (False,):
                for end in (False, True) if behind == back else (False,):
                    rule = _rule(old, new, start, end)
                    if rule is not None and rule.pattern.sub(rule.replacement, name) == target:
                        yield rule


def _rule(old: list[str], new: list[str], start: bool, end: bool) -> Rule | None:
    if not old:
        # Put before all names, and nowhere else: without anything to look for.
        return Rule(re.compile("^"), _literal(".".join(new)) + ".") if start and not end and new else None
    groups = _shared_numbers(old, new)
    numbered = {at: i + 1 for i, (at, _) in enumerate(groups)}
    filled = {to: f"\\{i + 1}" for i, (_, to) in enumerate(groups)}
    text = r"\.".join(r"(\d+)" if at in numbered else re.escape(part) for at, part in enumerate(old))
    replacement = ".".join(filled.get(at) or _literal(part) for at, part in enumerate(new))
    if not new:
        if start and end:
            return None
        text = rf"\.{text}" if end else rf"{text}\."
    opening = "^" if start else "" if text.startswith(r"\.") else r"\b" if old[0][:1].isalnum() else r"(?<![^.])"
    closing = "$" if end else "" if text.endswith(r"\.") else r"\b" if old[-1][-1:].isalnum() else r"(?![^.])"
    return Rule(re.compile(opening + text + closing), replacement)


def _shared_numbers(old: list[str], new: list[str]) -> list[tuple[int, int]]:
    """Places of numbers that stay, in both: those are any number."""
    a = [(i, part) for i, part in enumerate(old) if part.isdecimal()]
    b = [(i, part) for i, part in enumerate(new) if part.isdecimal()]
    matcher = difflib.SequenceMatcher(None, [part for _, part in a], [part for _, part in b], False)
    return [
        (a[block.a + k][0], b[block.b + k][0]) for block in matcher.get_matching_blocks() for k in range(block.size)
    ]


def _literal(text: str) -> str:
    return text.replace("\\", r"\\")


def vocabulary_hint(mismatched: Sequence[Mismatch], vocabularies: Mapping[int, str]) -> str | None:
    """What to say where tensors differ in the number of their rows only, and the model's is that of a vocabulary.

    Args:
        mismatched: keys of another shape than their target.
        vocabularies: rows → the entry of the config that says so.
    """
    rows = [
        m
        for m in mismatched
        if m.found and m.expected and m.found[1:] == m.expected[1:] and m.expected[0] in vocabularies
    ]
    if not rows:
        return None
    first = rows[0]
    entry, found, expected = vocabularies[first.expected[0]], first.found[0], first.expected[0]
    return (
        f"the vocabularies differ: {first.target!r} has {found} rows in the checkpoint, and the config says "
        f"{entry}={expected}; load with {entry}={found} in the config, and call "
        f"model.resize_token_embeddings({expected}) after that, if {expected} are wanted"
    )


def grid_hint(mismatched: Sequence[Mismatch]) -> str | None:
    """What to say where position embeddings differ in the number of their tokens only.

    Args:
        mismatched: keys of another shape than their target.
    """
    for m in mismatched:
        tokens = (m.found[-2], m.expected[-2]) if len(m.found) == len(m.expected) > 1 else (0, 0)
        same = (*m.found[:-2], m.found[-1:]) == (*m.expected[:-2], m.expected[-1:])
        if "pos" in m.target.rpartition(".")[2] and same and tokens[0] != tokens[1]:
            return (
                f"{m.target!r} has {tokens[0]} positions in the checkpoint and {tokens[1]} in the model: "
                f"transforms={{{m.target!r}: lowmem.interpolate()}} gives it the model's grid (in Python), if they are "
                "those of an image"
            )
    return None
