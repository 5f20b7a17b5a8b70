"""Which of the files in a folder are the model's weights, told by their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import SourceError, UnsupportedError
from .safetensors import MAX_HEADER, decode_json

SAFETENSORS = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pth.tar")
# transformers writes a variant's index as model.safetensors.index.fp16.json (`_add_variant` in modeling_utils.py).
_INDEX = re.compile(r"\.(safetensors|bin|pth|pt|ckpt)\.index((?:\.[\w-]+)?)\.json$", re.IGNORECASE)
_NUMBERED = re.compile(r"-(\d{5,})-of-(\d{5,})$")
_VARIANT = re.compile(r"\.[A-Za-z][\w-]*")
# What trainers of transformers, accelerate, DeepSpeed and Megatron write beside the weights, and what is hidden:
# macOS puts a ._model.safetensors beside model.safetensors on disks of others.
_NEVER = re.compile(
    r"\.|(training_args|trainer_state|(lr_)?scheduler|(grad_)?scaler|sampler|dl_state_dict|(distrib_)?optim(izer)?(_states?)?)"
    r"([_-]?\d+)*\.|rng_states?|random_states?|.*_optim_states\.pt$",
    re.IGNORECASE,
)
_ADAPTER = re.compile(r"adapter_model[.-]|pytorch_lora_weights\.", re.IGNORECASE)
_FOREIGN = {
    ".h5": "TensorFlow",
    ".keras": "Keras",
    ".pb": "TensorFlow",
    ".tflite": "TensorFlow Lite",
    ".msgpack": "Flax",
    ".gguf": "GGUF",
    ".ggml": "GGML",
    ".onnx": "ONNX",
    ".npz": "numpy",
    ".npy": "numpy",
    ".distcp": "torch.distributed.checkpoint",
    ".pdparams": "Paddle",
    ".pkl": "plain pickle",
    ".pickle": "plain pickle",
}
_TENSORFLOW_1 = re.compile(r"\.ckpt(-\d+)?\.(index|meta)$|\.data-\d{5}-of-\d{5}$")
_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Place:
    """Where files are: a folder, or a repository of the hub before anything of it is fetched.

    Attributes:
        text: what errors call it.
        names: the files that lie directly in it, in order.
        below: sub-folder → the files that lie directly in that; called only when it matters.
        shards: name of an index → the names of its shards, or None when it cannot be read; called only when it matters.
        has: whether a file is there, by its path from here.
        part: a sub-folder → how to name it as a source.
        incomplete: what to do when a part of a set is missing.
        empty: what to do when there are no weights at all.
    """

    text: str
    names: Sequence[str]
    below: Callable[[], Mapping[str, Sequence[str]]]
    shards: Callable[[str], frozenset[str] | None]
    has: Callable[[str], bool]
    part: Callable[[str], str]
    incomplete: str = "bring the index"
    empty: str = "is it the model's folder?"


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


def local_place(text: str, folder: Path) -> Place:
    """The files of a local folder.

    Args:
        text: what errors call it.
        folder: its path.

    Raises:
        SourceError: it cannot be listed.
    """
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise SourceError(f"{text}: cannot be listed: {error.strerror or error}") from error
    # A folder may be called model.bin, but its weights are then inside.
    files = [n for n in names if not ((is_weights(n, False) or is_weights(n, True)) and _is_folder(folder / n))]
    return Place(
        text,
        files,
        lambda: {n: _names_in(folder / n) for n in names if not n.startswith(".") and _is_folder(folder / n)},
        lambda index: shards_named(folder / index),
        lambda name: _exists(folder / name),
        lambda below: str(folder / below),
    )


def shards_named(index: Path) -> frozenset[str] | None:
    """The names of the shards in an index, or None when it cannot be read: that is for its reader to say."""
    try:
        if not index.is_file() or index.stat().st_size > MAX_HEADER:
            return None
        named = decode_json(index.read_bytes())["weight_map"].values()
        return frozenset(name for name in named if isinstance(name, str))
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return None


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return []


def is_index(name: str) -> bool:
    """Whether `name` is that of an index, of whatever format and variant."""
    return _INDEX.search(name) is not None


def is_pickled(name: str) -> bool:
    """Whether `name` is that of pickled weights, or of an index of such."""
    found = _INDEX.search(name)
    return found[1].lower() != "safetensors" if found else name.lower().endswith(PICKLES)


def canonical_name(pickled: bool) -> str:
    """What transformers calls a model in one file (`WEIGHTS_NAME`, `SAFE_WEIGHTS_NAME` in its utils/__init__.py)."""
    return "pytorch_model.bin" if pickled else "model.safetensors"


def is_weights(name: str, pickled: bool) -> bool:
    """Whether a file of this name can be the weights of a model: no optimizer, no trainer's state, no adapter."""
    suffixes = PICKLES if pickled else (SAFETENSORS,)
    return name.lower().endswith(suffixes) and not _NEVER.match(name) and not _ADAPTER.match(name)


def kind_of(name: str) -> str | None:
    """Whose weights a file holds that is neither safetensors nor a torch pickle; None when it is none that is known."""
    if _TENSORFLOW_1.search(name):
        return "TensorFlow"
    return next((kind for suffix, kind in _FOREIGN.items() if name.lower().endswith(suffix)), None)


def listed(names: Iterable[str]) -> str:
    """File names for a message: the first of them, and how many more."""
    every = list(names)
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + more


def choose(place: Place) -> Choice:
    """Find the weights of a place.

    safetensors are believed before pickles; of either, an index before `model.safetensors` (`pytorch_model.bin`)
    before a whole numbered set before the only other file. `X.fp16.safetensors` is a variant of `X.safetensors`, and
    chosen only where that is not.

    Raises:
        SourceError: no weights, several candidates (they are listed), or a part of a set.
        UnsupportedError: only weights that lowmem does not read.
    """
    _refuse_pipeline(place)
    odd: list[str] = []
    formats = {pickled: [n for n in place.names if is_weights(n, pickled)] for pickled in (False, True)}
    for pickled, files in formats.items():
        found = _of_format(place, pickled, files, bool(formats[not pickled]), odd)
        if found is None:
            continue
        index, chosen = found
        name = index or chosen[0]
        # Weights of an index's own format are left to who reads it: only the index knows its shards.
        beside = [] if index else [n for n in files if n not in chosen]
        others = [] if pickled else [n for n in formats[True] if not _alike(name, n)]
        if others and index is None and not _numbered(name) and name != canonical_name(False):
            raise _several(place, [name, *others], "weight files")
        beside += others + _adapters(place)
        if beside:
            odd.append(f"{listed(beside)}: beside {name}, which was believed")
        return Choice(index, tuple(chosen), pickled, tuple(odd))
    raise _nothing(place)


def _of_format(
    place: Place, pickled: bool, files: list[str], others: bool, odd: list[str]
) -> tuple[str | None, list[str]] | None:
    """The index or the files to believe among those of one format; what was set aside is said in `odd`."""
    canonical = canonical_name(pickled)
    indexes = _without_variants([n for n in place.names if is_index(n) and is_pickled(n) == pickled])
    if indexes:
        index = _one(place, indexes, canonical + ".index.json", "indexes")
        instead = instead_of_index(place, index, canonical if canonical in files else None, others)
        if instead is None:
            return index, []
        odd.append(instead)
    if canonical in files:
        return None, [canonical]
    _refuse_ranks(place, files)
    numbered = _without_variants([n for n in files if _numbered(n)])
    if numbered:
        _check_whole(place, numbered)
        if not indexes:
            odd.append(f"no index beside {numbered[0]}: the shards' own headers were believed")
        return None, numbered
    single = _without_variants(files)
    return (None, [_one(place, single, canonical, "weight files")]) if single else None


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


def _stem(name: str) -> str:
    """What a file is called without suffix, number and format: `model.fp16` for `model.safetensors.index.fp16.json`."""
    found = _INDEX.search(name)
    if found:
        return name[: found.start()] + found[2]
    return _NUMBERED.sub("", _without_suffix(name))


def shard_number(name: str) -> tuple[int, int] | None:
    """Which shard a file is, of how many, by its name; None when it is the whole."""
    found = _numbered(name)
    return (int(found[1]), int(found[2])) if found and int(found[2]) > 1 else None


def _numbered(name: str) -> re.Match[str] | None:
    return _NUMBERED.search(_without_suffix(name))


def _without_suffix(name: str) -> str:
    suffix = next((s for s in (SAFETENSORS, *PICKLES) if name.lower().endswith(s)), "")
    return name[: len(name) - len(suffix)]


def _without_variants(names: list[str]) -> list[str]:
    """The names less those that are a variant of another one, as `model.fp16` is of `model`."""
    stems = {_stem(name) for name in names}

    def is_variant(stem: str) -> bool:
        return any(stem.startswith(plain) and _VARIANT.fullmatch(stem[len(plain) :]) for plain in stems)

    return [name for name in names if not is_variant(_stem(name))]


def _alike(name: str, other: str) -> bool:
    """Whether two files of different formats look like the same model: `model.safetensors`, `pytorch_model.bin`."""
    own, its = (_stem(n).replace("pytorch_", "") for n in (name, other))
    return own == its or its.startswith(own + ".")


def _one(place: Place, names: list[str], preferred: str, what: str) -> str:
    if len(names) > 1 and preferred not in names:
        raise _several(place, names, what)
    return preferred if preferred in names else names[0]


def _several(place: Place, names: list[str], what: str) -> SourceError:
    return SourceError(f"{place.text}: several {what}: {listed(names)}; give the path of the one you mean")


def _check_whole(place: Place, names: list[str]) -> None:
    """Numbered shards without an index can be believed only when the numbering is whole."""
    found = [m for n in names if (m := _numbered(n))]
    numbers = sorted(int(m[1]) for m in found)
    if (
        len({_stem(n) for n in names}) > 1
        or {int(m[2]) for m in found} != {len(names)}
        or numbers != list(range(1, len(names) + 1))
    ):
        raise SourceError(
            f"{place.text}: shards without an index, and not one whole set: {listed(names)}; {place.incomplete}"
        )


def _refuse_pipeline(place: Place) -> None:
    """A diffusers pipeline is several models, whatever lies beside its `model_index.json`."""
    if "model_index.json" in place.names and (below := _with_weights(place)):
        raise SourceError(
            f"{place.text}: model_index.json: a pipeline of several models, in {listed(below)}; "
            f"give one of them, such as {place.part(below[0])}"
        )


def _refuse_ranks(place: Place, files: list[str]) -> None:
    """DeepSpeed's files of model states are whole models only where there is one, and ZeRO-3 did not divide it.

    Names from `_get_ckpt_name` and `_get_zero_ckpt_name` in deepspeed/runtime/engine.py.
    """
    states = [n for n in files if n.endswith("model_states.pt")]
    if len(states) > 1 or any(n.startswith("zero_pp_rank_") for n in states):
        raise UnsupportedError(
            f"{place.text}: a DeepSpeed checkpoint divided among processes ({listed(states)}); make one file of it "
            "with the zero_to_fp32.py beside it, or give the path of the part that you mean"
        )


def _adapters(place: Place) -> list[str]:
    """The files of changes to a base model, as peft and diffusers call them (`SAFETENSORS_WEIGHTS_NAME` in peft)."""
    return [n for n in place.names if _ADAPTER.match(n) and n.lower().endswith((SAFETENSORS, *PICKLES))]


def _with_weights(place: Place) -> list[str]:
    return [
        folder
        for folder, names in place.below().items()
        if any(is_index(n) or is_weights(n, False) or is_weights(n, True) for n in names)
    ]


def _nothing(place: Place) -> SourceError | UnsupportedError:
    """The error for a place without weights, which says what is there instead."""
    adapters = _adapters(place)
    if place.has(".lowmem-convert/state.json"):
        return SourceError(
            f"{place.text}: an unfinished conversion; run lowmem convert again with the same source and options, which "
            "goes on behind what is whole"
        )
    if adapters:
        return SourceError(
            f"{place.text}: only an adapter ({listed(adapters)}), which changes a base model; give the base model that "
            f"its adapter_config.json names, or the path of {adapters[0]} for the adapter's own tensors"
        )
    if "latest_checkpointed_iteration.txt" in place.names:
        return SourceError(
            f"{place.text}: a Megatron checkpoint: its weights are in iter_*/mp_rank_*/model_optim_rng.pt; "
            "give the path of one of these files"
        )
    below = _with_weights(place)
    if any(folder.startswith("global_step") for folder in below):
        return SourceError(
            f"{place.text}: a DeepSpeed checkpoint: its weights are in {listed(below)}; give one of these folders "
            "(the file `latest` names the newest)"
        )
    if below:
        return SourceError(
            f"{place.text}: no weights in this folder itself, but in {listed(below)}; "
            f"give one of them, such as {place.part(below[0])}"
        )
    kinds = {name: kind for name in place.names if (kind := kind_of(name))}
    if kinds:
        return unsupported(place.text, kinds)
    return SourceError(
        f"{place.text}: no {SAFETENSORS} file, no pickled weights ({', '.join(PICKLES)}) and no index in this folder; "
        f"{place.empty}"
    )


def unsupported(text: str, kinds: Mapping[str, str]) -> UnsupportedError:
    """The error for weights of other libraries.

    Args:
        text: what the error calls the source.
        kinds: file → whose weights it holds, as `kind_of` says.
    """
    whose = ", ".join(dict.fromkeys(kinds.values()))
    if whose == "torch.distributed.checkpoint":
        remedy = "make one file: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pt"
    elif whose == "numpy":
        remedy = "write them with safetensors.numpy.save_file(dict(numpy.load(FILE)), 'model.safetensors')"
    else:
        remedy = "bring the model's safetensors, or convert these with the library that wrote them"
    return UnsupportedError(f"{text}: weights of a kind that lowmem does not read: {listed(kinds)} ({whose}); {remedy}")
