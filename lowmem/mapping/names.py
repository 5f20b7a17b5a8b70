"""The checkpoint's keys under the names that the user gives them: `prefix`, `only`, `skip` and `rename`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .._patterns import name_matches
from ..checkpoint import Checkpoint, TensorEntry
from ..errors import KeysError, OptionError, UnsupportedError
from ..modeling.tracing import Tracing
from ..sizes import shown
from .records import KeyRules, RenameRule


@dataclass(frozen=True)
class Given:
    """What the user's rules make of a checkpoint.

    Attributes:
        entries: the chosen tensors under their new names, in file order.
        left_out: new name → key of tensors that `only` and `skip` leave.
        unreadable: new name → key of chosen tensors that cannot be read.
        idle: rules that changed no name, and tensors that functions leave out, a sentence each.
        tracing: what functions made of the tensors, if there are any; `entries` is what they gave then.
        chosen: what the functions were given, in file order.
    """

    entries: Mapping[str, TensorEntry] = field(repr=False)
    left_out: Mapping[str, str] = field(repr=False)
    unreadable: Mapping[str, str] = field(repr=False)
    idle: tuple[str, ...] = ()
    tracing: Tracing | None = field(default=None, repr=False)
    chosen: Mapping[str, TensorEntry] = field(default_factory=dict, repr=False)

    @property
    def made_of(self) -> Mapping[str, TensorEntry]:
        """The chosen tensors of the checkpoint, before functions made others of them."""
        return self.entries if self.tracing is None else self.chosen


def give_names(checkpoint: Checkpoint, rules: KeyRules) -> Given:
    """Apply the user's rules.

    Raises:
        KeysError: a rule fits no key, or two keys become one name.
        OptionError: a function fails, or gives something else than it should.
    """
    if rules.prefix is None and rules.only is None and not rules.skip and not rules.rename:
        return Given(checkpoint.entries, {}, {key: key for key in checkpoint.unreadable})
    keys = [*checkpoint, *(key for key in checkpoint.unreadable if key not in checkpoint)]
    chosen = _chosen(checkpoint, keys, rules)
    inside = _inside(checkpoint, keys, rules.prefix)
    entries: dict[str, TensorEntry] = {}
    left_out: dict[str, str] = {}
    unreadable: dict[str, str] = {}
    for key, stem in inside.items():
        if key not in chosen:
            try:
                left_out[renamed(key, stem, rules.rename)] = key
            except OptionError:
                # A function may know nothing of what it was not meant for.
                left_out[stem] = key
            continue
        name = renamed(key, stem, rules.rename)
        if name in entries or name in unreadable:
            other = entries[name].key if name in entries else unreadable[name]
            raise KeysError(collision(checkpoint.source, key, other, name))
        if key in checkpoint:
            entries[name] = checkpoint[key]
        else:
            unreadable[name] = key
    return Given(entries, left_out, unreadable, _idle([inside[key] for key in inside if key in chosen], rules.rename))


def named_entries(checkpoint: Checkpoint, rules: KeyRules) -> Mapping[str, TensorEntry]:
    """New name → entry, in file order, for who wants all that was chosen.

    Raises:
        KeysError: a rule fits no key, or two keys become one name.
        OptionError: a function fails, or gives something else than it should.
        UnsupportedError: a tensor that cannot be read was chosen.
    """
    given = give_names(checkpoint, rules)
    for key in given.unreadable.values():
        raise UnsupportedError(
            f"{checkpoint.source}: tensor {key!r}: {checkpoint.unreadable[key]}; leave it out by skip= (--skip)"
        )
    return given.entries


def _idle(names: list[str], rules: Sequence[RenameRule]) -> tuple[str, ...]:
    said = []
    for rule in rules:
        if callable(rule):
            break  # what it makes of names is not asked twice
        changed = [rule[0].sub(rule[1], name) for name in names]
        if changed == names:
            said.append(f"rename: {rule[0].pattern!r} changed no key")
        names = changed
    return tuple(said)


def collision(file: object, key: str, other: str, name: str) -> str:
    """The sentence for two keys that become one name."""
    return (
        f"{file}: tensor {key!r} and tensor {other!r} both become {name!r}; expected one key each; "
        f"leave one of them out by skip=[{key!r}] (--skip)"
    )


def _chosen(checkpoint: Checkpoint, keys: list[str], rules: KeyRules) -> set[str]:
    """The keys that `only` names and `skip` does not."""
    chosen = set(keys) if rules.only is None else choose(checkpoint.source, keys, rules.only, "only")
    return chosen - choose(checkpoint.source, keys, rules.skip, "skip") if rules.skip else chosen


def choose(
    source: str, names: list[str], wanted: tuple[str, ...] | Callable[[str], bool], what: str, whose: str = "checkpoint"
) -> set[str]:
    """Those of `names` that are named, or that a function says yes to.

    Args:
        source: for messages.
        names: keys of the checkpoint, or names of the model.
        wanted: names, modules and patterns as `name_matches` takes them, or a function of a name.
        what: the option, for messages.
        whose: whose names they are, for messages.

    Raises:
        KeysError: a name or pattern that fits nothing.
        OptionError: the function fails.
    """
    if callable(wanted):
        return {name for name in names if _called(wanted, name, what)}
    lists = "; lowmem inspect SRC --tensors lists them" if whose == "checkpoint" else "; it names the model's tensors"
    found: set[str] = set()
    all_names = set(names)
    for pattern in wanted:
        fitting = [pattern] if pattern in all_names else [name for name in names if name_matches(name, pattern)]
        if not fitting:
            raise KeysError(
                f"{source}: {what}={shown(pattern)}: expected a tensor, a module or a pattern with *, found no such "
                f"name in the {whose}{lists}"
            )
        found.update(fitting)
    return found


def _inside(checkpoint: Checkpoint, keys: list[str], prefix: str | None) -> dict[str, str]:
    """Key → the key without the prefix, of those that have it.

    Raises:
        KeysError: none has it.
    """
    if prefix is None:
        return {key: key for key in keys}
    front = f"{prefix}."
    inside = {key: key[len(front) :] for key in keys if key.startswith(front)}
    if inside:
        return inside
    deeper = Counter(key[: key.index(f".{front}") + len(front)] for key in keys if f".{front}" in key)
    fronts = Counter(key.partition(".")[0] for key in keys if "." in key)
    listed = ", ".join(f"{name!r} ({count})" for name, count in fronts.most_common(12))
    hint = f"; try prefix={deeper.most_common(1)[0][0]!r}" if deeper else ""
    raise KeysError(
        f"{checkpoint.source}: prefix={shown(prefix)}: expected keys that begin with {front!r}, found none; keys begin "
        f"with {listed or 'nothing that a dot ends'}{', …' if len(fronts) > 12 else ''}{hint}"
    )


def renamed(key: str, name: str, rules: Sequence[RenameRule]) -> str:
    """What the rules make of `name`, one after the other.

    Raises:
        OptionError: a function fails, or gives no text.
    """
    for rule in rules:
        if callable(rule):
            changed = _called(rule, name, "rename")
            if not isinstance(changed, str):
                raise OptionError(
                    f"rename: expected {_named(rule)} to give a name, found {shown(changed)} for key {key!r}"
                )
            name = changed
        else:
            pattern, replacement = rule
            name = pattern.sub(replacement, name)
    return name


def _called(function: Callable[[str], object], name: str, what: str) -> object:
    # Whatever the user's function raises, it is the option that is wrong.
    try:
        return function(name)
    except Exception as error:
        raise OptionError(f"{what}: {_named(function)} failed for {name!r}: {type(error).__name__}: {error}") from error


def _named(function: object) -> str:
    return f"the function {getattr(function, '__qualname__', None) or repr(function)}"
