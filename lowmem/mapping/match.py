"""Checkpoint keys to model targets, from headers alone."""

from __future__ import annotations

import difflib
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence

from ..checkpoint import Checkpoint, TensorEntry
from ..errors import KeysError
from ..modeling.skeleton import Skeleton
from ..modeling.targets import Target
from .records import KeyMapping, Link, Mismatch, whole


def match(checkpoint: Checkpoint, skeleton: Skeleton, untied: Collection[str] = ()) -> KeyMapping:
    """Find the entry of every target.

    Args:
        checkpoint: the entries.
        skeleton: the targets and the rules that rename keys.
        untied: targets that stand for themselves although the model ties them, because their values differ from those
            that the rest of their group gets.

    Raises:
        KeysError: two keys become the same target after renaming.
    """
    targets = skeleton.targets
    state = {name: target for name, target in targets.items() if target.persistent}
    names = skeleton.rules.rename(checkpoint, targets)
    links: list[Link] = []
    mismatched: list[Mismatch] = []
    unexpected: list[str] = []
    feeds: dict[str, str] = {}
    for key, entry in checkpoint.entries.items():
        name = names[key]
        target = state.get(name)
        if target is None:
            unexpected.append(key)
            continue
        if name in feeds:
            raise KeysError(
                f"{entry.file}: tensor {key!r} and tensor {feeds[name]!r} both become {name!r}; expected one key each"
            )
        feeds[name] = key
        if entry.shape != target.shape:
            mismatched.append(Mismatch(key, name, entry.shape, target.shape))
        else:
            links.append(Link(entry, name, whole(target.shape)))
    links, tied, doubled = _resolve_ties(links, state, untied, set(skeleton.rules.declared_ties().values()))
    missing = [name for name in state if name not in feeds and name not in tied]
    excused = skeleton.rules.may_miss(missing)
    ignored = skeleton.rules.may_ignore(unexpected)
    left_over = [key for key in unexpected if key not in ignored]
    missing = [name for name in missing if name not in excused]
    return KeyMapping(
        links=tuple(links),
        tied=tied,
        doubled=doubled,
        missing=tuple(missing),
        excused=tuple(name for name in state if name in excused) if excused else (),
        unexpected=tuple(left_over),
        mismatched=tuple(mismatched),
        suggestions=tuple(_suggest(checkpoint, state, missing, left_over)),
    )


def _resolve_ties(
    links: Sequence[Link], state: Mapping[str, Target], untied: Collection[str], sources: Collection[str]
) -> tuple[list[Link], dict[str, str], dict[str, str]]:
    """One link feeds a tie group, that of its declared source if there is one.

    Returns the links, the followers, and the followers that had a key of their own.
    """
    # Most models tie nothing or little, and one of a group bears its name.
    shared = {target.tie for name, target in state.items() if target.tie != name and name not in untied}
    if not shared:
        return list(links), {}, {}
    groups: dict[str, list[str]] = defaultdict(list)
    for name, target in state.items():
        if target.tie in shared and name not in untied:
            groups[target.tie].append(name)
    fed = {link.target for link in links}
    dropped: set[str] = set()
    tied: dict[str, str] = {}
    doubled: dict[str, str] = {}
    for members in groups.values():
        candidates = [name for name in members if name in fed] if len(members) > 1 else []
        if not candidates:
            continue
        leader = next((name for name in candidates if name in sources), candidates[0])
        for name in members:
            if name != leader:
                tied[name] = leader
                if name in fed:
                    doubled[name] = leader
                    dropped.add(name)
    return [link for link in links if link.target not in dropped], tied, doubled


def _suggest(
    checkpoint: Checkpoint, state: Mapping[str, Target], missing: Sequence[str], unexpected: Sequence[str]
) -> list[str]:
    """Sentences that name the likely cause, when keys are both missing and left over."""
    if not missing or not unexpected:
        return []
    prefix = _common_prefix(checkpoint, state, missing, unexpected)
    if prefix is not None:
        return [prefix]
    keys = {key: checkpoint[key] for key in unexpected}
    hints = []
    for name in missing[:3]:
        close = _closest(name, state[name], keys)
        if close is not None:
            hints.append(f"{name!r} may be the checkpoint's {close!r}")
    return hints


def _common_prefix(
    checkpoint: Checkpoint, state: Mapping[str, Target], missing: Sequence[str], unexpected: Sequence[str]
) -> str | None:
    """A prefix that, stripped or added, explains most of the keys left over, shapes included."""
    wanted = set(missing)
    votes: Counter[tuple[str, str]] = Counter()
    for key in unexpected:
        shape = checkpoint[key].shape
        for at in (i for i, c in enumerate(key) if c == "."):
            if key[at + 1 :] in wanted and state[key[at + 1 :]].shape == shape:
                votes["strip", key[: at + 1]] += 1
    by_tail = {name[at + 1 :]: name for name in missing for at in (i for i, c in enumerate(name) if c == ".")}
    for key in unexpected:
        name = by_tail.get(key)
        if name is not None and state[name].shape == checkpoint[key].shape:
            votes["add", name[: -len(key)]] += 1
    if not votes:
        return None
    (action, prefix), count = votes.most_common(1)[0]
    if count * 2 < len(unexpected):
        return None
    if action == "strip":
        return f"{count} keys of the checkpoint begin with {prefix!r}, which the model's names lack"
    return f"{count} names of the model begin with {prefix!r}, which the checkpoint's keys lack"


def _closest(name: str, target: Target, keys: Mapping[str, TensorEntry]) -> str | None:
    same_shape = [key for key, entry in keys.items() if entry.shape == target.shape]
    close = difflib.get_close_matches(name, same_shape[:2000], n=1, cutoff=0.6)
    return close[0] if close else None


def refuse(mapping: KeyMapping, source: str) -> None:
    """The strict rule.

    Raises:
        KeysError: something is missing or mismatched; says what, and what would help.
    """
    if not mapping.missing and not mapping.mismatched:
        return
    lines = [f"{source}: the checkpoint does not fit the model"]
    if mapping.mismatched:
        lines.append(f"{len(mapping.mismatched)} tensors have another shape:")
        lines += [f"  {m.key!r}: expected {list(m.expected)}, found {list(m.found)}" for m in mapping.mismatched[:5]]
    if mapping.missing:
        lines.append(
            f"{len(mapping.missing)} of the model's tensors are not in the checkpoint: {_few(mapping.missing)}"
        )
    if mapping.unexpected:
        lines.append(
            f"{len(mapping.unexpected)} keys of the checkpoint are not in the model: {_few(mapping.unexpected)}"
        )
    lines += mapping.suggestions
    lines.append(
        "with strict=False (--no-strict) these are initialised by the model's own rule and named in the report"
    )
    raise KeysError("\n".join(lines))


def _few(names: Sequence[str]) -> str:
    return ", ".join(repr(n) for n in names[:5]) + (", …" if len(names) > 5 else "")
