"""Where the weights of a model come from: one source, or several, each for a module of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from .checkpoint import Checkpoint, Survey, Wish, make_wish, survey
from .checkpoint.joining import join_checkpoints, labelled
from .checkpoint.wrappers import NO_WISH
from .dtypes import parse_dtype
from .errors import OptionError
from .mapping import NO_RULES, KeyRules, cover_of
from .mapping.opened import Opened
from .modeling.holding import Holding
from .modeling.request import ModelRequest, make_model_request
from .modeling.rules import Rules
from .modeling.skeleton import Origin, Skeleton, build, find_origin, rules_of
from .planner.request import FilterFunction, Names, Renames, TransformsOption, make_key_rules
from .sizes import shown

Path = str | os.PathLike[str]


@dataclass(frozen=True, eq=False)
class Source:
    """A source of weights with options of its own, for a module of the model.

    Everything is relative to the module: what `rename` gives, and what `skip` and `transforms` name, are names in it.

    Attributes:
        path: what `load` takes as a source: a folder, an index, a weights file, or a model of the hub in its cache.
        model: the module that is to be there, or a callable that makes one, where the model builds it later.
        auto_class: a class of transformers that makes it by the `config.json` beside the weights, or its name.
        dtype: what its floats become. Default: what the load asks; where that is `"auto"`, what they are.
        prefix, only, skip, rename, reshape, preset, filter_fn, transforms: as `load` has them, for this source. `skip`
            may also name tensors of the module that the source does not have: the model's own rule initialises these.
        weights, ema, variant, subfolder, revision: likewise.
    """

    path: Path
    model: nn.Module | Callable[[], nn.Module] | None = None
    auto_class: Any = None
    dtype: Any = None
    prefix: str | None = None
    only: Names = None
    skip: Names = None
    rename: Renames = None
    reshape: str | Iterable[str] | None = None
    preset: str | None = None
    filter_fn: FilterFunction = None
    transforms: TransformsOption = None
    weights: str | None = None
    ema: bool | None = None
    variant: str | None = None
    subfolder: str | None = None
    revision: str | None = None

    def rules(self) -> KeyRules:
        """What is said about its keys.

        Raises:
            OptionError: a value that means nothing.
        """
        return make_key_rules(
            prefix=self.prefix,
            only=self.only,
            skip=self.skip,
            rename=self.rename,
            reshape=self.reshape,
            preset=self.preset,
            filter_fn=self.filter_fn,
            transforms=self.transforms,
        )


Sources = Path | Source | Mapping[str, "Path | Source | Sequence[Path | Source]"]


@dataclass(frozen=True, eq=False)
class _Part:
    """A source that was looked at.

    Attributes:
        module: the module that it feeds; empty for the whole model.
        source: as the user gave it.
        label: what stands before its keys.
        found: what is there.
        wish: which mapping of a pickled file is wanted.
        rules: what is said about its keys.
        origin: what its module is made from, where the model does not have it.
    """

    module: str
    source: Source
    label: str
    found: Survey
    wish: Wish
    rules: KeyRules
    origin: Origin | None = None


@dataclass(eq=False)
class Found:
    """The sources of a load, looked at.

    Attributes:
        parts: each of them, in the user's order.
        several: they were given with the modules that they are for, even if it is one.
        holding: what was put into the model for them.
    """

    parts: tuple[_Part, ...]
    several: bool
    holding: Holding = field(default_factory=Holding)

    def glance(self) -> Checkpoint:
        """The likeliest checkpoint of the whole model, for what must be known before there is one."""
        root = next((part for part in self.parts if not part.module), None)
        if root is not None:
            return root.found.glance(root.wish)
        # What lies beside the weights of a part is not about the whole.
        first = self.parts[0]
        return replace(first.found.glance(first.wish), config=None)

    def glances(self) -> list[Checkpoint]:
        """The likeliest checkpoint of each."""
        return [part.found.glance(part.wish) for part in self.parts]

    def find_origins(self) -> None:
        """Settle what modules are made from that the model does not have; imports happen here.

        Raises:
            ModelError, OptionError: they cannot be made.
        """
        self.parts = tuple(
            replace(part, origin=find_origin(part.found.glance(part.wish), _asked(part.source)))
            if part.source.model is not None or part.source.auto_class is not None
            else part
            for part in self.parts
        )

    def arrange(self, model: nn.Module) -> None:
        """Put what the sources feed where a load can reach it.

        Raises:
            ModelError: a module is not there, or cannot be made.
        """
        for part in self.parts:
            if part.module:
                made = None
                if part.origin is not None:
                    made = build(part.origin, part.found.glance(part.wish), "auto")
                    self.holding.is_borrowed |= isinstance(part.origin.model, nn.Module)
                self.holding.hold(model, part.module, made)

    def _kind(self, skeleton: Skeleton, part: _Part) -> Rules | None:
        """The rules of the module of a part; one that lowmem makes is finished by them."""
        if not part.module:
            return None
        module = skeleton.model.get_submodule(part.module)
        kind = rules_of(module, part.origin, part.found.glance(part.wish))
        if part.origin is not None:
            self.holding.finish_by(f"{part.module}.", kind)
        return kind

    def open(self, skeleton: Skeleton, rules: KeyRules) -> tuple[Checkpoint, tuple[Opened, ...]]:
        """All tensors as one checkpoint, and what of them feeds what; nothing of the latter for a single source.

        Args:
            skeleton: the model.
            rules: what the load says about keys: those of the source of the whole model.

        Raises:
            SourceError, CheckpointError: as `Survey.open`.
            UnsupportedError: compressed tensors of one file that two sources open in other ways.
        """
        if not self.several:
            part = self.parts[0]
            return part.found.open(part.wish, cover_of(skeleton, rules)), ()
        opened, held = [], []
        for number, part in enumerate(self.parts):
            taken = tuple(
                (later.module, later.found.found.text)
                for later in self.parts[number + 1 :]
                if later.module != part.module and later.module.startswith(f"{part.module}." if part.module else "")
            )
            kind = self._kind(skeleton, part)
            here = Opened(
                part.found.glance(part.wish), part.rules, part.module, kind, taken, part.label, part.source.dtype
            )
            checkpoint = labelled(part.found.open(part.wish, cover_of(here.skeleton(skeleton), part.rules)), part.label)
            opened.append(replace(here, checkpoint=checkpoint))
            held.append((part.label, checkpoint))
        text = ", ".join(f"{p.module}: {p.found.found.text}" if p.module else p.found.found.text for p in self.parts)
        return join_checkpoints(text, held), tuple(opened)


def look_at(
    source: Sources,
    *,
    rules: KeyRules,
    wish: Wish,
    variant: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    download: bool = False,
) -> Found:
    """Look at every source: headers and pickles, and no tensor byte.

    Args:
        source: what `load` takes.
        rules: what the load says about keys: of the source of the whole model, where that says nothing itself.
        wish: likewise, which mapping of a pickled file is wanted.
        variant: likewise, and so on.
        subfolder: a folder inside the source.
        revision: of a model of the hub.
        download: whether a model of the hub may be fetched.

    Raises:
        OptionError: a value that means nothing.
        SourceError, CheckpointError, UnsupportedError: as `survey`.
    """
    if isinstance(source, (list, tuple, set)):
        raise OptionError(
            "source: expected a path, or modules with their sources, such as {'': 'llm', 'model.vision_tower': "
            f"'tower.pth'}}, found {shown(source)}"
        )
    if not isinstance(source, (Mapping, Source)):
        found = survey(source, variant=variant, subfolder=subfolder, revision=revision, download=download)
        return Found((_Part("", Source(source), "", found, wish, rules),), False)
    given = _listed(source)
    own = replace(rules, ignore_mismatched_sizes=False) != NO_RULES or wish != NO_WISH
    if not any(not module and bare for module, _, bare in given) and (own or variant or subfolder or revision):
        raise OptionError(
            "prefix, only, skip, rename, reshape, preset, filter_fn, transforms, weights, ema, variant, subfolder, "
            "revision: expected a path for the whole model ('') that they are about, found none; give them to the "
            "lowmem.Source of each"
        )
    parts = []
    labels: set[str] = set()
    for module, one, bare in given:
        outer = not module and bare
        if outer:
            one = replace(one, variant=variant, subfolder=subfolder, revision=revision)
        if one.dtype is not None:
            one = replace(one, dtype=parse_dtype(one.dtype, f"Source for {module!r}: dtype"))
        label = _label(module, os.fsdecode(one.path), labels)
        labels.add(label)
        found = survey(one.path, variant=one.variant, subfolder=one.subfolder, revision=one.revision, download=download)
        if outer:
            parts.append(_Part(module, one, label, found, wish, rules))
        else:
            parts.append(_Part(module, one, label, found, make_wish(one.weights, one.ema), one.rules()))
    return Found(tuple(parts), True)


def _label(module: str, path: str, taken: Collection[str]) -> str:
    """What stands before the keys of a source: its module, and its path where the module has several."""
    label = module
    while label in taken:
        label = f"{label}'" if label != module else f"{module} ({path})" if module else path
    return label


def _listed(source: Sources) -> list[tuple[str, Source, bool]]:
    """Module, source, and whether it was given as a mere path.

    Raises:
        OptionError: something else than modules and their sources, or a model in the source of the whole.
    """
    found = []
    for module, value in (source if isinstance(source, Mapping) else {"": source}).items():
        if not isinstance(module, str) or module.startswith(".") or module.endswith(".") or ".." in module:
            raise OptionError(f"source: expected names of modules, such as 'model.vision_tower', found {shown(module)}")
        several = list(value) if isinstance(value, (list, tuple)) else [value]
        if not several:
            raise OptionError(f"source: {module!r}: expected a path or several, found none")
        for one in several:
            if not isinstance(one, (str, os.PathLike, Source)):
                raise OptionError(f"source: {module!r}: expected a path or a lowmem.Source, found {shown(one)}")
            if not module and isinstance(one, Source) and (one.model, one.auto_class) != (None, None):
                raise OptionError("Source: model= and auto_class= are of a module; give those of the whole to load")
            found.append((module, one if isinstance(one, Source) else Source(one), not isinstance(one, Source)))
    if not found:
        raise OptionError("source: expected a path, or modules with their sources, found an empty mapping")
    return found


def whole_of(source: Sources, options: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The path of the source of the whole model, and which of its files are meant.

    Args:
        source: what `load` takes.
        options: those of `load`; `variant`, `subfolder`, `revision` and `download` of them count.

    Raises:
        OptionError: there is none.
    """
    selection = {name: options[name] for name in ("variant", "subfolder", "revision", "download") if name in options}
    for module, one, bare in _listed(source):
        if not module:
            own = {} if bare else {name: getattr(one, name) for name in ("variant", "subfolder", "revision")}
            return one.path, {**selection, **own}
    raise OptionError("source: expected one of the whole model (''), found modules only; add it")


def _asked(source: Source) -> ModelRequest:
    return make_model_request(source.model, auto_class=source.auto_class)


__all__ = ["Found", "Source", "Sources", "look_at", "whole_of"]
