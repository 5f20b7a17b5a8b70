"""A source that was looked at, before it is settled which of the mappings in it are the weights."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from .._collector import paused_collector
from .._records import computed_once
from ..errors import CheckpointError, SourceError
from .incomplete import placeholders
from .index import Listing, check_keys, oddities, read_listing
from .pickled import read_pickled
from .records import Candidate, Checkpoint, Leaf, PickledFile, Shard, TensorEntry
from .safetensors import read_shard
from .selection import make_selection
from .source import Source, resolve
from .wrappers import (
    NO_WISH,
    CoverOf,
    Wish,
    choose,
    find_by_path,
    find_candidates,
    find_hollow,
    is_auxiliary,
    make_wish,
    merge,
    not_there,
)


@dataclass(frozen=True, slots=True)
class _Located:
    """Where the tensors of one mapping are: files, readable and unreadable ones, sentences, keys in order."""

    shards: tuple[Shard, ...]
    entries: dict[str, TensorEntry]
    unreadable: Mapping[str, str]
    said: tuple[str, ...]
    order: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Survey:
    """What was found at a source.

    Attributes:
        found: the source, and its files.
        listing: what its index says, if it has one.
        shards: its safetensors files, and
        entries: their tensors.
        pickled: its pickled files, and for each the candidates in it.
        located: what was opened before, by its path: most are opened once without a model and once with it.
    """

    found: Source
    listing: Listing | None
    shards: tuple[Shard, ...] = ()
    entries: dict[str, TensorEntry] = field(default_factory=dict, repr=False)
    pickled: tuple[tuple[PickledFile, tuple[Candidate, ...]], ...] = field(default=(), repr=False)
    located: dict[str, _Located] = field(default_factory=dict, repr=False)

    def open(self, wish: Wish = NO_WISH, cover: CoverOf | None = None) -> Checkpoint:
        """The checkpoint: of pickled files the mapping that holds the weights.

        Args:
            wish: which mapping the user wants.
            cover: how well a candidate fits the model, when there is one.

        Raises:
            SourceError: no mapping holds weights, or several may, or `wish` names one that is not there.
            CheckpointError: a tensor does not fit the file, or index and files contradict each other.
        """
        if not self.pickled:
            if wish.weights:
                raise SourceError(
                    f"{self.found.text}: weights={wish.weights!r} names a mapping inside a pickled file, and these are "
                    "safetensors, which hold tensors only; leave it out, or use prefix="
                )
            if wish.ema:
                raise SourceError(
                    f"{self.found.text}: ema=True prefers averaged weights inside a pickled file, and these are "
                    "safetensors, which do not say what they hold; leave it out"
                )
            return self._whole
        candidates = merge([held for _, held in self.pickled])
        if wish.weights is not None:
            return self._named(wish.weights, candidates)
        hollow = [name for file, _ in self.pickled for name in find_hollow(file.root)]
        chosen, said = choose(self.found.text, candidates, wish, cover, hollow)
        return self._unwrapped(chosen.path, [*_told(chosen, candidates), *said])

    def glance(self, wish: Wish = NO_WISH) -> Checkpoint:
        """The likeliest checkpoint, for what must be known before there is a model.

        Raises:
            SourceError: there are no tensors, or `wish` names what is not there.
            CheckpointError: as `open`.
        """
        if not self.pickled or wish.weights is not None:
            return self.open(wish)
        try:
            return self.open(wish)
        except SourceError:
            candidates = [c for c in merge([held for _, held in self.pickled]) if not is_auxiliary(c.path)]
            if wish.ema is not None or not candidates:
                raise
            return self._unwrapped(max(candidates, key=lambda c: c.nbytes).path, [])

    @computed_once
    def _whole(self) -> Checkpoint:
        return self._checkpoint(self.shards, self.entries)

    def _named(self, path: str, candidates: Sequence[Candidate]) -> Checkpoint:
        """The mapping at `path`, which need be no candidate."""
        held = [find_by_path(file.root, path, file.shard.file) for file, _ in self.pickled]
        if not any(found is not None and found.leaves for found in held):
            raise not_there(self.found.text, path, candidates)
        empty = [said for found in held if found is not None and (said := placeholders(found))]
        return self._unwrapped(path, empty, [found.leaves if found is not None else {} for found in held])

    def _unwrapped(
        self, path: str, said: Sequence[str], leaves_of: Sequence[Mapping[str, Leaf]] | None = None
    ) -> Checkpoint:
        """What the mapping at `path` holds in each file; all of it where `leaves_of` gives the leaves of each."""
        if leaves_of is not None:
            located = self._locate(path, leaves_of)
        elif path in self.located:
            located = self.located[path]
        else:
            leaves_of = [next((c.leaves for c in held if c.path == path), {}) for _, held in self.pickled]
            located = self.located[path] = self._locate(path, leaves_of)
        said = [*said, *located.said]
        made = self._checkpoint(located.shards, located.entries, said, path, dict(located.unreadable))
        return replace(made, order=located.order)

    def _locate(self, path: str, leaves_of: Sequence[Mapping[str, Leaf]]) -> _Located:
        shards: list[Shard] = []
        said: list[str] = []
        entries: dict[str, TensorEntry] = {}
        unreadable: dict[str, str] = {}
        for (file, _), leaves in zip(self.pickled, leaves_of, strict=True):
            held, shard = file.locate({key: leaf for key, leaf in leaves.items() if leaf.why_not is None})
            unreadable.update({key: leaf.why_not for key, leaf in leaves.items() if leaf.why_not is not None})
            shards.append(shard)
            if not leaves and file.storages:
                said.append(f"{shard.file.name}: nothing of it is used: it has no mapping {path!r}")
            _add(entries, sorted(held.values(), key=lambda e: (e.offset, e.nbytes)), shard.file)
        if unreadable:
            key, why = next(iter(unreadable.items()))
            more = f", and {len(unreadable) - 1} more" if len(unreadable) > 1 else ""
            said.append(f"{key!r} cannot be read ({why}){more}: an error only for who wants it")
        order = tuple(key for leaves in leaves_of for key in leaves if key in entries)
        return _Located(tuple(shards), entries, unreadable, tuple(said), order)

    def _checkpoint(
        self,
        shards: Sequence[Shard],
        entries: dict[str, TensorEntry],
        said: Iterable[str] = (),
        opened: str = "",
        unreadable: dict[str, str] | None = None,
    ) -> Checkpoint:
        warnings = [*self.found.warnings, *said]
        if self.listing is not None:
            unlisted = check_keys(self.listing, entries, unreadable or {})
            warnings += oddities(self.found, self.listing, entries, unlisted)
        return Checkpoint(
            source=self.found.text,
            folder=self.found.folder,
            shards=tuple(shards),
            entries=entries,
            index=self.found.index,
            config=self.found.config,
            warnings=tuple(warnings),
            opened=opened,
            unreadable=unreadable or {},
            described=sum(file.described for file, _ in self.pickled),
        )


def find(
    source: str | os.PathLike[str],
    *,
    variant: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    download: bool = False,
) -> Source:
    """Where the files of a source are; none of them is opened. Takes the options of `inspect` that choose files.

    Raises:
        OptionError: an option that means nothing, or nothing for this source.
        SourceError: nothing that can be loaded is there.
        UnsupportedError: only weights of kinds that lowmem does not read.
    """
    return resolve(source, make_selection(variant, subfolder, revision, download))


def survey(
    source: str | os.PathLike[str] | Source,
    *,
    variant: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    download: bool = False,
) -> Survey:
    """Look at a source: headers and pickles, and no tensor byte. Imports no torch. Takes the options of `find`.

    Raises:
        OptionError: an option that means nothing, or nothing for this source.
        SourceError: nothing that can be loaded is there.
        CheckpointError: a file is damaged.
        UnsupportedError: the weights are of a kind that lowmem does not read.
    """
    if isinstance(source, Source):
        found = source
    else:
        found = find(source, variant=variant, subfolder=subfolder, revision=revision, download=download)
    with paused_collector():
        listing = read_listing(found)
        files = tuple(listing.files.values()) if listing is not None else found.shards
        if found.pickled:
            opened = [read_pickled(file) for file in files]
            return Survey(found, listing, pickled=tuple((f, find_candidates(f.root, f.shard.file)) for f in opened))
        shards: list[Shard] = []
        entries: dict[str, TensorEntry] = {}
        for file in files:
            shard, held = read_shard(file)
            shards.append(shard)
            _add(entries, held, file)
        return Survey(found, listing, tuple(shards), _with_shared(shards, entries))


def inspect(
    source: str | os.PathLike[str],
    *,
    weights: str | None = None,
    ema: bool | None = None,
    variant: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    download: bool = False,
) -> Checkpoint:
    """Read the headers of a checkpoint, and nothing else: no tensor byte, no torch; pickles are not executed.

    Args:
        source: a folder, an index file, a weights file (`.safetensors`, `.bin`, `.pt`, `.pth`, `.ckpt`), or a model of
            the hub that is in its cache.
        weights: the path of the mapping that holds the weights inside a pickled file, such as `"state_dict"`. Default:
            the one that does by its name.
        ema: prefer averaged weights (True) or those that were trained (False) where a file has both.
        variant: take the files with this word in their names: `"fp16"` those of `model.fp16.safetensors`. Default:
            those without one, or the only ones.
        subfolder: a folder inside the source that is meant, with its own config.
        revision: a branch, tag or commit of a model of the hub, as after `@` in the source.
        download: whether a model of the hub may be fetched.

    Returns:
        The checkpoint: a mapping of key to `TensorEntry`.

    Raises:
        SourceError: nothing that can be loaded is there, or several mappings may be the weights.
        OptionError: an option that means nothing, or nothing for this source.
        CheckpointError: index and headers contradict each other, or a file is damaged.
        UnsupportedError: the weights are of a kind that lowmem does not read.
    """
    wish = make_wish(weights, ema)
    found = survey(source, variant=variant, subfolder=subfolder, revision=revision, download=download)
    return found.open(wish)


def _told(chosen: Candidate, candidates: Sequence[Candidate]) -> list[str]:
    """What was opened, when there was something to choose."""
    beside = [c for c in candidates if not c.is_inside(chosen) and not chosen.is_inside(c) and c is not chosen]
    # An optimizer beside the weights is nothing to choose; what is called so among them may be a part of the model.
    named = [c for c in beside if not is_auxiliary(c.path) or "." in c.path]
    outer = [c for c in named if not any(c.is_inside(other) for other in named)]
    if not outer:
        return []
    others = f"{', '.join(repr(c.path) for c in outer[:6])}{', …' if len(outer) > 6 else ''}"
    return [f"{chosen.path!r} was opened: {len(chosen.leaves)} tensors; beside it: {others}"]


def _with_shared(shards: Sequence[Shard], entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """With the names that share the bytes of another, each behind the one that is stored.

    `safetensors.torch.save_model` (safetensors/torch.py) records them in the header: left out → stored. Only where
    the second is a tensor of that file and the first is no tensor at all; metadata may hold anything.
    """
    sharing: dict[str, list[str]] = {}
    for shard in shards:
        for name, stored in shard.metadata.items():
            # `format` is there in nearly every file, and says whose tensors they are.
            if name == "format" or name in entries:
                continue
            if stored in entries and entries[stored].file is shard.file:
                sharing.setdefault(stored, []).append(name)
    if not sharing:
        return entries
    joined: dict[str, TensorEntry] = {}
    for key, entry in entries.items():
        joined[key] = entry
        joined.update((name, replace(entry, key=name)) for name in sharing.get(key, ()))
    return joined


def _add(entries: dict[str, TensorEntry], held: Iterable[TensorEntry], file: Path) -> None:
    found = {entry.key: entry for entry in held}
    for key in entries.keys() & found.keys():
        raise CheckpointError(
            f"{file}: tensor {key!r}: expected in one shard, found also in {entries[key].file.name}; "
            "remove the shard that does not belong, or download both again"
        )
    entries.update(found)
