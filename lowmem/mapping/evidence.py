"""Wrappers and prefixes that a checkpoint's keys have and the model's names have not, or the other way round.

Nothing is done to keys that fit as they are. What is done to the others must feed more of the model than leaving them
alone, and most of the checkpoint or of the model; it is told.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..checkpoint import TensorEntry
from ..modeling.skeleton import Skeleton
from ..modeling.targets import Target

# Modules that wrap others: of torch.compile, FSDP and activation checkpointing, and of DistributedDataParallel.
_PRIVATE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WRAPPERS = (*_PRIVATE, "module")
# Fronts met in the wild, tried although nothing may vote for them: the model's kind may change the rest of the key.
_FRONTS = ("module.", "module.module.", "model.", "net.", "backbone.", "encoder.", "base_model.model.")
# Normalisations once called their weight and bias so (tensor2tensor, and after it BERT).
_OLD = {"gamma": "weight", "beta": "bias"}
_ROUNDS = 3
# Keys of a first look at each candidate, and candidates that get a second.
_SAMPLE = 200
_FINALISTS = 4


@dataclass(frozen=True, slots=True)
class Step:
    """One change of keys, as `re.sub` makes it.

    Attributes:
        pattern: what is looked for.
        replacement: what takes its place.
        sentence: what it does, with `{}` for the number of keys.
    """

    pattern: re.Pattern[str]
    replacement: str
    sentence: str

    def apply(self, name: str) -> str:
        """The name after this step."""
        return self.pattern.sub(self.replacement, name)


@dataclass(frozen=True)
class Evidence:
    """What was done to names.

    Attributes:
        names: name → changed name, of those that changed.
        steps: what was done, in order.
        sentences: the same for the reader.
    """

    names: Mapping[str, str]
    steps: tuple[Step, ...]
    sentences: tuple[str, ...]


NOTHING = Evidence({}, (), ())


def strip(front: str) -> Step:
    """Take `front` off the names that begin with it."""
    return Step(re.compile(f"^{re.escape(front)}"), "", f"{front!r} was stripped from {{}} keys")


def put(front: str, heads: Iterable[str] = ()) -> Step:
    """Put `front` before names; `heads`: only those whose first component is one of these."""
    listed = "|".join(sorted(map(re.escape, heads)))
    pattern = rf"^(?=(?:{listed})(?:\.|$))" if listed else "^"
    return Step(re.compile(pattern), _literal(front), f"{front!r} was put before {{}} keys")


def unwrap(wrappers: Sequence[str]) -> Step:
    """Leave out the components `wrappers`, wherever they stand."""
    listed = " and ".join(f"{w + '.'!r}" for w in wrappers)
    pattern = re.compile(rf"(?<![^.])(?:{'|'.join(map(re.escape, wrappers))})\.")
    return Step(pattern, "", f"{listed} was left out of {{}} keys")


def _literal(text: str) -> str:
    return text.replace("\\", r"\\")


@dataclass(frozen=True)
class _Trial:
    """Steps tried on names: name → what they make of it, and target → the name that would newly feed it."""

    steps: tuple[Step, ...]
    names: Mapping[str, str]
    feeds: Mapping[str, str]
    old: int = 0

    @property
    def cost(self) -> tuple[int, int, int]:
        """Less is simpler: the front alone before anywhere."""
        patterns = [step.pattern.pattern for step in self.steps]
        return len(patterns), sum(p[0] != "^" for p in patterns), sum(map(len, patterns))


class _Search:
    """The names that feed nothing, and the targets that nothing feeds."""

    def __init__(
        self,
        given: Mapping[str, TensorEntry],
        finals: Mapping[str, str],
        skeleton: Skeleton,
        state: Mapping[str, Target],
        fits: Callable[[TensorEntry, Target], bool],
    ) -> None:
        self.given, self.state, self.fits, self.skeleton = given, state, fits, skeleton
        named = {finals[name] for name in given}
        # A target that is tied to a fed one is fed.
        ties = {state[name].tie for name in named if name in state}
        self.unfed = {name: t for name, t in state.items() if name not in named and t.tie not in ties}
        self.unused = [name for name in given if finals[name] not in state]
        self.fed = len(state) - len(self.unfed)

    def attempt(self, steps: tuple[Step, ...], names: Sequence[str]) -> _Trial:
        """What `steps` would feed of the unfed targets."""
        changed: dict[str, str] = {}
        for name in names:
            new = name
            for step in steps:
                new = step.apply(new)
            changed[name] = new
        renaming = self.skeleton.rules.rename({changed[name]: self.given[name] for name in names}, self.state)
        finals = renaming.names
        feeds: dict[str, str] = {}
        old = 0
        for name, new in changed.items():
            final = finals[new]
            if final not in self.state:
                modern = self._modern(final, self.given[name])
                if modern is None:
                    continue
                changed[name] = final = modern
                old += 1
            target = self.unfed.get(final)
            # What is converted has other shapes.
            if target is not None and (new in renaming.converted or self.fits(self.given[name], target)):
                feeds.setdefault(final, name)
        return _Trial(steps, changed, feeds, old)

    def _modern(self, name: str, entry: TensorEntry) -> str | None:
        """The target that an old name of a norm's weight or bias means."""
        owner, _, leaf = name.rpartition(".")
        if leaf not in _OLD or not owner:
            return None
        new = f"{owner}.{_OLD[leaf]}"
        target = self.unfed.get(new)
        return new if target is not None and entry.shape == target.shape else None

    def best(self) -> _Trial | None:
        """The trial to take, or None."""
        if not self.unused or not self.unfed:
            return None
        # Not every n-th: keys come in turns.
        few = len(self.unused) <= _SAMPLE
        sample = self.unused if few else random.Random(0).sample(self.unused, _SAMPLE)
        first = [self.attempt(steps, sample) for steps in self._candidates()]
        first = sorted((t for t in first if t.feeds), key=lambda t: (-len(t.feeds), t.cost))[:_FINALISTS]
        whole = first if few else [self.attempt(t.steps, self.unused) for t in first]
        whole.sort(key=lambda t: (-len(t.feeds), t.cost))
        if not whole:
            return None
        taken = whole[0]
        # Two that feed as much from different keys: no evidence for either.
        if any(len(t.feeds) == len(taken.feeds) and t.feeds != taken.feeds for t in whole[1:]):
            return None
        return taken if self._convinces(taken) else None

    def _convinces(self, trial: _Trial) -> bool:
        gain = len(trial.feeds)
        most = 2 * (self.fed + gain) >= min(len(self.given), len(self.state))
        # Old names say themselves what they mean; prefixes need the company of others.
        return most and (not trial.steps or 2 * gain >= min(len(self.unused), len(self.unfed)))

    def _candidates(self) -> Iterator[tuple[Step, ...]]:
        """Every way worth a look, each once."""
        seen: set[tuple[Step, ...]] = set()
        for wrappers in self._wrappers():
            base = (unwrap(wrappers),) if wrappers else ()
            names = {name: base[0].apply(name) if base else name for name in self.unused}
            for steps in (base, *((*base, front) for front in self._fronts(names))):
                if steps not in seen:
                    seen.add(steps)
                    yield steps

    def _wrappers(self) -> list[tuple[str, ...]]:
        present: set[str] = set()
        for name in self.unused:
            present.update(part for part in name.split(".") if part in _WRAPPERS)
        options: list[tuple[str, ...]] = [()]
        for family in (_PRIVATE, _WRAPPERS):
            found = tuple(w for w in family if w in present)
            if found and found not in options:
                options.append(found)
        return options

    def _fronts(self, names: Mapping[str, str]) -> list[Step]:
        """Prefixes that suffixes of equal shape vote for, and the usual ones."""
        strips: Counter[str] = Counter()
        heads: Counter[str] = Counter()
        for name, new in names.items():
            heads[new[: new.find(".") + 1]] += 1
            for at in _dots(new):
                target = self.unfed.get(new[at:])
                if target is not None and self.fits(self.given[name], target):
                    strips[new[:at]] += 1
        by_name = {new: name for name, new in names.items()}
        puts: Counter[str] = Counter()
        begins: dict[str, set[str]] = defaultdict(set)
        for full, target in self.unfed.items():
            for at in _dots(full):
                found = by_name.get(full[at:])
                if found is not None:
                    # One of another shape goes along, and is told with both.
                    puts[full[:at]] += self.fits(self.given[found], target)
                    begins[full[:at]].add(full[at:].partition(".")[0])
        fronts = [front for front, _ in strips.most_common(_FINALISTS)]
        usual = [front for front in _FRONTS if any(new.startswith(front) for new in names.values())]
        usual += [front for front, _ in heads.most_common(3) if front]
        steps = [strip(front) for front in dict.fromkeys([*fronts, *usual])]
        every = {new.partition(".")[0] for new in names.values()}
        return steps + [
            put(front, () if begins[front] == every and not self.fed else begins[front])
            for front, count in puts.most_common(_FINALISTS)
            if count
        ]


def _dots(name: str) -> Iterator[int]:
    """Where each component but the first begins."""
    at = name.find(".") + 1
    while at:
        yield at
        at = name.find(".", at) + 1


def find_evidence(
    given: Mapping[str, TensorEntry],
    finals: Mapping[str, str],
    skeleton: Skeleton,
    state: Mapping[str, Target],
    fits: Callable[[TensorEntry, Target], bool],
) -> Evidence:
    """What must be done to keys so that they feed the model, as far as names and shapes prove it.

    Args:
        given: the tensors by the names that the user's rules gave.
        finals: name → target name, as the model's kind renames them.
        skeleton: the model.
        state: its targets that belong to the state dict.
        fits: whether an entry may feed a target.
    """
    names: dict[str, str] = {}
    steps: list[Step] = []
    sentences: list[str] = []
    now, origin = dict(given), {name: name for name in given}
    for _ in range(_ROUNDS):
        search = _Search(now, finals, skeleton, state, fits)
        trial = search.best()
        if trial is None:
            break
        renamed: dict[str, str] = {}
        for step in trial.steps:
            touched = 0
            for name in search.unused:
                before = renamed.get(name, name)
                renamed[name] = step.apply(before)
                touched += renamed[name] != before
            steps.append(step)
            sentences.append(_counted(step.sentence, touched))
        if trial.old:
            sentences.append(_counted("'gamma' and 'beta' were read as 'weight' and 'bias' in {} keys", trial.old))
            renamed.update(trial.names)
            steps += [Step(re.compile(rf"\.{a}$"), f".{b}", "") for a, b in _OLD.items()]
        moved = {name: renamed.get(name, name) for name in now}
        names = {first: moved[last] for first, last in origin.items()}
        origin = names
        # Names that fell together are the caller's to refuse; here one of them is enough.
        now = {moved[name]: entry for name, entry in now.items()}
        finals = skeleton.rules.rename(now, state).names
    return Evidence({a: b for a, b in names.items() if a != b}, tuple(steps), tuple(sentences))


def _counted(sentence: str, count: int) -> str:
    text = sentence.format(count)
    return text.replace(" keys", " key") if count == 1 else text
