"""Which of the files in a folder are the model's weights, told by their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from ..errors import SourceError
from ..sizes import shown
from .file_names import (
    SAFETENSORS,
    are_alike,
    canonical_index,
    canonical_name,
    is_index,
    is_of_variant,
    is_pickled,
    is_weights,
    listed,
    numbered,
    stem,
    variant_of,
    without_variants,
)
from .instead import left_adapters, nothing, refuse_pipeline, refuse_ranks, refuse_unfinished
from .location import Place

# transformers takes an adapter under this name for weights when `transformers_weights` says so.
_NAMED = (SAFETENSORS, f"{SAFETENSORS}.index.json", "adapter_model.bin")


@dataclass(frozen=True, slots=True)
class Choice:
    """The weights of a place: an index, or the files themselves.

    Attributes:
        index: the index to believe, or None.
        files: without an index, the weight files in the order of their numbers.
        pickled: they are pickles, not safetensors.
        warnings: what was odd and what was believed.
    """

    index: str | None
    files: tuple[str, ...]
    pickled: bool
    warnings: tuple[str, ...] = ()


def choose(place: Place, variant: str | None = None) -> Choice:
    """Find the weights of a place.

    What `config.json` names in `transformers_weights` is believed first. Then safetensors before pickles; of either, an
    index before `model.safetensors` (`pytorch_model.bin`) before a whole numbered set before the only other file.
    `X.fp16.safetensors` is a variant of `X.safetensors` and of `X.bin`; without `variant` it is chosen only where
    neither is.

    Args:
        place: where the files are.
        variant: choose among the files of this variant only.

    Raises:
        SourceError: no weights, none of this variant, several candidates (they are listed), or a part of a set.
        UnsupportedError: only weights that lowmem does not read.
    """
    refuse_unfinished(place)
    refuse_pipeline(place)
    if (named := place.table("config.json").get("transformers_weights")) is not None:
        return _named(place, named, variant)
    every = [n for n in place.names if is_index(n) or is_weights(n, False) or is_weights(n, True)]
    wanted = without_variants(every) if variant is None else [n for n in every if is_of_variant(n, variant)]
    if variant is not None and every and not wanted:
        raise _no_variant(place, every, variant)
    # Who names a variant leaves the others alone knowingly.
    scope = every if variant is None else wanted
    odd: list[str] = []
    for pickled in (False, True):
        found = _of_format(place, wanted, pickled, variant, odd)
        if found is None:
            continue
        index, chosen = found
        name = index or chosen[0]
        # Weights of an index's own format are left to who reads it: only the index knows its shards.
        beside = [] if index else [n for n in scope if is_weights(n, pickled) and n not in chosen]
        others = [n for n in scope if is_weights(n, not pickled) and (pickled or not are_alike(name, n))]
        if others and not pickled and not index and not numbered(name) and name != canonical_name(False, variant):
            raise _several(place, [name, *others], "weight files")
        if beside or others:
            odd.append(f"{listed([*beside, *others])}: beside {name}, which was believed")
        return Choice(index, tuple(chosen), pickled, (*odd, *left_adapters(place)))
    raise nothing(place)


def _named(place: Place, name: object, variant: str | None) -> Choice:
    """What `config.json` names: `from_pretrained` takes that whatever else is there, and whatever the variant."""
    field = f"{place.text}: config.json: transformers_weights"
    if not isinstance(name, str) or not name.endswith(_NAMED) or "\0" in name:
        raise SourceError(
            f"{field}: expected the name of a .safetensors file or of its index, found {shown(name)}; correct it"
        )
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise SourceError(f"{field}: expected a file inside the folder, found {shown(name)}; correct it")
    if not place.has(name):
        raise SourceError(f"{field} names {shown(name)}, which is not there; {place.incomplete}, or correct it")
    said = [f"{name} was believed, which config.json names in transformers_weights, whatever the variant"]
    said = [*(said if variant is not None else ()), *left_adapters(place, name)]
    index, files = (name, ()) if is_index(name) else (None, (name,))
    return Choice(index, files, is_pickled(name), tuple(said))


def _of_format(
    place: Place, wanted: list[str], pickled: bool, variant: str | None, odd: list[str]
) -> tuple[str | None, list[str]] | None:
    """The index or the files to believe among those of one format; what was set aside is said in `odd`."""
    canonical = canonical_name(pickled, variant)
    files = [n for n in wanted if is_weights(n, pickled)]
    if indexes := [n for n in wanted if is_index(n) and is_pickled(n) == pickled]:
        index = _one(place, indexes, canonical_index(pickled, variant), "indexes")
        others = any(is_weights(n, not pickled) for n in wanted)
        instead = instead_of_index(place, index, canonical if canonical in files else None, others)
        if instead is None:
            return index, []
        odd.append(instead)
    if canonical in files:
        return None, [canonical]
    refuse_ranks(place, files)
    if shards := [n for n in files if numbered(n)]:
        _check_whole(place, shards)
        if not indexes:
            odd.append(f"no index beside {shards[0]}: the shards' own headers were believed")
        return None, shards
    return (None, [_one(place, files, canonical, "weight files")]) if files else None


def instead_of_index(place: Place, index: str, canonical: str | None, others: bool = False) -> str | None:
    """Why an index is not believed, or None when it is: its shards are gone and other weights are there.

    Args:
        place: where it lies.
        index: its name.
        canonical: the name of the model in one file, when that is there.
        others: whether there are weights of the other format.
    """
    if canonical is None and not others:
        return None
    shards = place.shards(index)
    if not shards:
        return None
    there = [name for name in shards if place.has(name)]
    if canonical and len(there) < len(shards):
        # save_pretrained into a folder of shards removes them and leaves their index behind.
        return f"{index} names shards that are gone: {canonical} beside it was believed"
    if not there and others:
        # `hf download --include '*.json' '*.bin'` brings an index without its shards.
        return f"{index} names shards of which none is there: it was not believed"
    return None


def _one(place: Place, names: list[str], preferred: str, what: str) -> str:
    if len(names) > 1 and preferred not in names:
        raise _several(place, names, what)
    return preferred if preferred in names else names[0]


def _several(place: Place, names: Sequence[str], what: str) -> SourceError:
    variants = sorted({v for n in names if (v := variant_of(n))})
    choice = f"choose one of the variants {listed(variants)} with variant= (--variant), or " if variants else ""
    return SourceError(f"{place.text}: several {what}: {listed(names)}; {choice}give the path of the one you mean")


def _no_variant(place: Place, names: Sequence[str], variant: str) -> SourceError:
    by_variant: dict[str, list[str]] = {}
    for name in names:
        by_variant.setdefault(variant_of(name) or "none", []).append(name)
    held = "; ".join(f"{own} ({listed(files)})" for own, files in sorted(by_variant.items()))
    plain = ", or leave variant= (--variant) out" if "none" in by_variant else ""
    return SourceError(
        f"{place.text}: no weights of the variant {variant}; variants that are here: {held}; give one of them{plain}"
    )


def _check_whole(place: Place, names: list[str]) -> None:
    """Numbered shards without an index can be believed only when the numbering is whole."""
    found = [m for n in names if (m := numbered(n))]
    numbers = sorted(int(m[1]) for m in found)
    if (
        len({stem(n) for n in names}) > 1
        or {int(m[2]) for m in found} != {len(names)}
        or numbers != list(range(1, len(names) + 1))
    ):
        raise SourceError(
            f"{place.text}: shards without an index, and not one whole set: {listed(names)}; {place.incomplete}"
        )
