"""Names in groups: numbers become ranges, and each group finds the one on the other side that it most likely means."""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Shape = tuple[int, ...]
_NUMBER = re.compile(r"(?<![^.])(?:0|[1-9][0-9]*)(?![^.])")
# More groups than this on a side are compared by nobody: names without order.
_MOST = 200
# Only between names that are as like: safetensors files are in the order of the alphabet.
_ORDER = 0.03
# Of a likeness from 0 to 4: q_linear is q_proj rather than o_proj.
_CLEARLY = 0.1


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


@dataclass(frozen=True)
class Pair:
    """A wanted group and the offered one that it is likely called.

    Attributes:
        wanted: of the model.
        offered: of the checkpoint.
        sure: no other pairs of the same shapes are about as like.
    """

    wanted: Group
    offered: Group
    sure: bool


def partners(wanted: Sequence[Group], offered: Sequence[Group]) -> list[Pair]:
    """Wanted groups with the offered ones that they are likely called, each in one pair, the likeliest first.

    By shape first; then by the same numbers, the same last components, the edit distance, and the place in the order.
    """
    return _Pairing(wanted[:_MOST], offered[:_MOST]).pairs()


class _Pairing:
    """Every wanted group beside every offered one: how the shapes fit, and how alike the names are."""

    def __init__(self, wanted: Sequence[Group], offered: Sequence[Group]) -> None:
        self.wanted, self.offered = wanted, offered
        self.scores: dict[tuple[int, int], tuple[float, float]] = {}
        ends = {_leaf(group) for group in wanted} & {_leaf(group) for group in offered}
        for i, group in enumerate(wanted):
            for j, other in enumerate(offered):
                # A weight is a weight where both sides know weights.
                if _leaf(group) != _leaf(other) and (_leaf(group) in ends or _leaf(other) in ends):
                    continue
                shape = _same_shapes(group, other)
                if shape:
                    fit = 4 * shape + 2 * (group.members.keys() == other.members.keys())
                    self.scores[i, j] = fit, _likeness(group.stem, other.stem)
        self.there: dict[int, int] = {}
        self.back: dict[int, int] = {}
        for i, j in sorted(self.scores, key=self._place):
            if i not in self.there and j not in self.back:
                self.there[i], self.back[j] = j, i
        self.ours = [_squeezed_shapes(group) for group in wanted]
        self.theirs = [_squeezed_shapes(group) for group in offered]

    def _place(self, at: tuple[int, int]) -> tuple[float, int, int]:
        order = 1 - abs(at[0] / len(self.wanted) - at[1] / len(self.offered))
        return -sum(self.scores[at]) - _ORDER * order, *at

    def pairs(self) -> list[Pair]:
        """Each group at most once."""
        return [Pair(self.wanted[i], self.offered[j], self._is_sure(i, j)) for i, j in self.there.items()]

    def _is_sure(self, i: int, j: int) -> bool:
        """Whether the pair is clearly more alike than what there would be if it changed partners with any other."""
        ways = [(i, b) for b, shapes in enumerate(self.theirs) if b != j and shapes & self.theirs[j]]
        ways += [(a, j) for a, shapes in enumerate(self.ours) if a != i and shapes & self.ours[i]]
        return all(self._loss(i, j, a, b) >= _CLEARLY for a, b in ways)

    def _loss(self, i: int, j: int, a: int, b: int) -> float:
        """How much less alike names would be if `i` went with `b`, or `a` with `j`, and their partners changed too."""
        fit, now = self.scores[i, j]
        other_fit, then = self.scores.get((a, b), (-1.0, 0.0))
        if other_fit < fit:
            return math.inf
        pair = (self.back.get(b, -1), b) if a == i else (a, self.there.get(a, -1))
        if pair in self.scores:
            swapped = self.scores.get((pair[0], j) if a == i else (i, pair[1]))
            if swapped is None or swapped[0] < self.scores[pair][0]:
                return math.inf
            now, then = now + self.scores[pair][1], then + swapped[1]
        return now - then


def _squeezed_shapes(group: Group) -> set[Shape]:
    return {squeezed(shape) for shape in group.distinct}


def _leaf(group: Group) -> str:
    return group.stem.rpartition(".")[2]


def _likeness(a: str, b: str) -> float:
    """How alike two stems are, 0 to 4."""
    left, right = a.split("."), b.split(".")
    front = _common(left, right)
    back = _common(left[front:][::-1], right[front:][::-1])
    suffix = _common(left[::-1], right[::-1]) / max(len(left), len(right))
    # What differs tells more than what is the same in all of them.
    old, new = ".".join(left[front : len(left) - back]), ".".join(right[front : len(right) - back])
    return suffix + _ratio(a, b) + 2 * (_ratio(old, new) if old and new else 1.0)


def _common(left: Sequence[str], right: Sequence[str]) -> int:
    """How many components are the same from the beginning."""
    return next((i for i, (x, y) in enumerate(zip(left, right, strict=False)) if x != y), min(len(left), len(right)))


@functools.lru_cache(maxsize=1 << 16)
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
