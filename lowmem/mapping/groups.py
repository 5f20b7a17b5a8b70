"""Names in groups: numbers become ranges, and each group finds the one on the other side that it most likely means."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Shape = tuple[int, ...]
_NUMBER = re.compile(r"(?<![^.])(?:0|[1-9][0-9]*)(?![^.])")
# More groups than this on a side are compared by nobody: names without order.
_MOST = 80
# Only between names that are as like: safetensors files are in the order of the alphabet.
_ORDER = 0.03


@dataclass(frozen=True)
class Group:
    """Names that differ in numbers only.

    Attributes:
        stem: the names with `{}` for each number that stands alone between dots.
        members: numbers → name.
        shapes: name → shape.
    """

    stem: str
    members: Mapping[tuple[int, ...], str] = field(repr=False)
    shapes: Mapping[str, Shape] = field(repr=False)

    @property
    def names(self) -> list[str]:
        """In the order they came in."""
        return list(self.members.values())

    @property
    def pattern(self) -> str:
        """Such as `layers.{0..31}.attn.{q,k}.weight` would be for numbers: ranges, or what there is."""
        columns = list(zip(*self.members, strict=True))
        return self.stem.format(*map(_range, columns)) if columns else self.stem.format()

    @property
    def distinct(self) -> list[Shape]:
        """Each shape once."""
        return list(dict.fromkeys(self.shapes[name] for name in self.members.values()))


def _range(values: Sequence[int]) -> str:
    found = sorted(set(values))
    if len(found) == 1:
        return str(found[0])
    if len(found) > 2 and found[-1] - found[0] == len(found) - 1:
        return f"{{{found[0]}..{found[-1]}}}"
    return "{" + ",".join(map(str, found)) + "}"


def group_names(shapes: Mapping[str, Shape]) -> list[Group]:
    """Names with their shapes in groups, in the order of their first members."""
    held: dict[str, dict[tuple[int, ...], str]] = {}
    for name in shapes:
        stem = _NUMBER.sub("{}", name.replace("{", "{{").replace("}", "}}"))
        held.setdefault(stem, {})[tuple(map(int, _NUMBER.findall(name)))] = name
    return [Group(stem, members, shapes) for stem, members in held.items()]


def squeezed(shape: Shape) -> Shape:
    """Without dimensions of one."""
    return tuple(n for n in shape if n != 1)


def alike(a: Shape, b: Shape) -> bool:
    """The same shape, but for dimensions of one."""
    return a == b or squeezed(a) == squeezed(b)


def partners(wanted: Sequence[Group], offered: Sequence[Group]) -> list[tuple[Group, Group]]:
    """Wanted groups with the offered ones that they are likely called: each has one partner, the likeliest pairs first.

    By shape first; then by the same numbers, the same last components, the edit distance, and the place in the order.
    """
    scored = []
    for i, group in enumerate(wanted[:_MOST]):
        for j, other in enumerate(offered[:_MOST]):
            score = _score(group, other)
            if score > 0:
                order = 1 - abs(i / len(wanted) - j / len(offered))
                scored.append((-score - _ORDER * order, i, j))
    scored.sort()
    pairs: dict[int, int] = {}
    taken: set[int] = set()
    for _, i, j in scored:
        if i not in pairs and j not in taken:
            pairs[i] = j
            taken.add(j)
    return [(wanted[i], offered[j]) for i, j in pairs.items()]


def _score(a: Group, b: Group) -> float:
    shape = _same_shapes(a, b)
    if not shape:
        return 0.0
    numbers = a.members.keys() == b.members.keys()
    left, right = a.stem.split("."), b.stem.split(".")
    front = _common(left, right)
    back = _common(left[front:][::-1], right[front:][::-1])
    suffix = _common(left[::-1], right[::-1]) / max(len(left), len(right))
    # What differs tells more than what is the same in all of them.
    old, new = ".".join(left[front : len(left) - back]), ".".join(right[front : len(right) - back])
    parts = _ratio(old, new) if old and new else 1.0
    return 4 * shape + 2 * numbers + suffix + _ratio(a.stem, b.stem) + 2 * parts


def _common(left: Sequence[str], right: Sequence[str]) -> int:
    """How many components are the same from the beginning."""
    return next((i for i, (x, y) in enumerate(zip(left, right, strict=False)) if x != y), min(len(left), len(right)))


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b, False).ratio()


def _same_shapes(a: Group, b: Group) -> float:
    """How much of the smaller group has its shape in the other: under the same numbers, in order, or anywhere."""
    common = a.members.keys() & b.members.keys()
    if common:
        fit = sum(alike(a.shapes[a.members[n]], b.shapes[b.members[n]]) for n in common)
        return fit / len(common)
    if len(a.members) == len(b.members):
        pairs = list(zip(a.names, b.names, strict=True))
        fit = sum(alike(a.shapes[x], b.shapes[y]) for x, y in pairs)
        if fit:
            return fit / len(pairs)
    there = {squeezed(shape) for shape in b.distinct}
    return 0.5 * sum(squeezed(shape) in there for shape in a.distinct) / len(a.distinct)


def pair_of(wanted: Group, offered: Group) -> tuple[str, str] | None:
    """A name of each that would be a pair: of the same numbers, else the first of equal shape."""
    for numbers, name in wanted.members.items():
        other = offered.members.get(numbers)
        if other is not None and alike(wanted.shapes[name], offered.shapes[other]):
            return name, other
    for name in wanted.members.values():
        for other in offered.members.values():
            if alike(wanted.shapes[name], offered.shapes[other]):
                return name, other
    return None
