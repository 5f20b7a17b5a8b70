"""The index's `weight_map` against the shards' own headers."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from .._collector import paused_collector
from ..errors import CheckpointError
from .records import Checkpoint, Shard, TensorEntry, stored_bytes
from .safetensors import MAX_HEADER, decode_json, read_shard, short
from .source import Source, resolve

# In an index that lowmem wrote: name that is left out → name under which its bytes are stored. For people and other
# programs: the headers say it too, and are believed.
SHARED = "lowmem_shared"


def inspect(source: str | os.PathLike[str]) -> Checkpoint:
    """Read the headers of a checkpoint, and nothing else: no tensor byte, no torch.

    Args:
        source: a folder, an index file (`*.safetensors.index.json`) or a `.safetensors` file.

    Returns:
        The checkpoint: a mapping of key to `TensorEntry`.

    Raises:
        SourceError: nothing that can be loaded is there.
        CheckpointError: index and headers contradict each other, or a file is damaged.
        UnsupportedError: the weights are of a kind that lowmem does not read.
    """
    found = resolve(source)
    with paused_collector():
        return _read(found)


def _read(found: Source) -> Checkpoint:
    if found.index is None:
        shards, entries = _read_all(found.shards)
        return _checkpoint(found, shards, entries, found.warnings)
    weight_map, total_size = _read_index(found.index)
    whole = found.folder / "model.safetensors"
    if whole.is_file() and not all((found.folder / name).exists() for name in set(weight_map.values())):
        # save_pretrained into a folder of shards removes them and leaves their index behind.
        odd = f"{found.index.name} names shards that are gone: {whole.name} beside it was believed"
        return _read(replace(found, index=None, shards=(whole,), warnings=(*found.warnings, odd)))
    as_path = {name: str(PurePath(name)) if name else name for name in set(weight_map.values())}
    weight_map = {key: as_path[name] for key, name in weight_map.items()}
    first: dict[str, str] = {}
    for key, name in weight_map.items():
        first.setdefault(name, key)
    files = {name: _inside(found.index, found.folder, name, first[name]) for name in sorted(first)}
    shards, entries = _read_all(files.values())
    unlisted = _check_keys(found.index, weight_map, files, entries)
    warnings = [*found.warnings, *_oddities(found, files, entries, unlisted, total_size)]
    return _checkpoint(found, shards, entries, warnings)


def _checkpoint(
    found: Source, shards: list[Shard], entries: dict[str, TensorEntry], warnings: Iterable[str]
) -> Checkpoint:
    return Checkpoint(
        source=found.text,
        folder=found.folder,
        shards=tuple(shards),
        entries=entries,
        index=found.index,
        config=found.config,
        warnings=tuple(warnings),
    )


def _read_all(files: Iterable[Path]) -> tuple[list[Shard], dict[str, TensorEntry]]:
    shards: list[Shard] = []
    entries: dict[str, TensorEntry] = {}
    for file in files:
        shard, held = read_shard(file)
        shards.append(shard)
        found = {entry.key: entry for entry in held}
        for key in entries.keys() & found.keys():
            raise CheckpointError(
                f"{file}: tensor {key!r}: expected in one shard, found also in {entries[key].file.name}; "
                "remove the shard that does not belong, or download both again"
            )
        entries.update(found)
    return shards, _with_shared(shards, entries)


def _with_shared(shards: list[Shard], entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """With the names that share the bytes of another, each behind the one that is stored.

    `safetensors.torch.save_model` (safetensors/torch.py) records them in the header: left out → stored. Only where
    the second is a tensor of that file and the first is no tensor at all; metadata may hold anything.
    """
    sharing: dict[str, list[str]] = {}
    for shard in shards:
        for name, stored in shard.metadata.items():
            if name not in entries and stored in entries and entries[stored].file is shard.file:
                sharing.setdefault(stored, []).append(name)
    if not sharing:
        return entries
    joined: dict[str, TensorEntry] = {}
    for key, entry in entries.items():
        joined[key] = entry
        joined.update((name, replace(entry, key=name)) for name in sharing.get(key, ()))
    return joined


def _read_index(index: Path) -> tuple[dict[str, str], Any]:
    try:
        info = index.stat()
        if not stat.S_ISREG(info.st_mode) or info.st_size > MAX_HEADER:
            found = f"{info.st_size} bytes" if stat.S_ISREG(info.st_mode) else "another kind"
            raise CheckpointError(
                f"{index}: expected a regular file of at most {MAX_HEADER} bytes, found {found}; download it again"
            )
        table = decode_json(index.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{index}: cannot be read: {error.strerror or error}; check the path and its permissions"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{index}: not valid JSON ({error}); download it again") from error
    weight_map = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(weight_map, dict):
        raise CheckpointError(
            f"{index}: expected a 'weight_map' of key to file name, found {short(table)}; download it again"
        )
    for key, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointError(
                f"{index}: tensor {key!r}: expected a file name in the weight_map, found {short(name)}; "
                "download it again"
            )
    if not weight_map:
        raise CheckpointError(f"{index}: expected tensors in the weight_map, found none; download it again")
    metadata = table.get("metadata")
    return weight_map, metadata.get("total_size") if isinstance(metadata, dict) else None


def _inside(index: Path, folder: Path, name: str, key: str) -> Path:
    """The shard `name`, which must lie in the index's folder; a link may lead only where the hub's cache leads."""
    file = folder / name
    if not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise CheckpointError(
            f"{index}: tensor {key!r}: expected a file inside {folder}, found {short(name)}; bring the matching index"
        )
    if not os.path.lexists(file):
        raise CheckpointError(
            f"{index}: tensor {key!r}: expected in {short(name)}, which is missing in {folder}; download it again"
        )
    try:
        root, real = folder.resolve(strict=True), file.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{file}: tensor {key!r}: expected a file, found a link that leads nowhere; download it again"
        ) from error
    blobs = _blobs(root)
    if not real.is_relative_to(root) and not (blobs and real.is_relative_to(blobs)):
        raise CheckpointError(
            f"{file}: tensor {key!r}: expected a file inside {folder}, found a link to {real}; "
            "put the file itself into the folder"
        )
    return file


def _blobs(root: Path) -> Path | None:
    """The hub's cache keeps `models--x/snapshots/<revision>/[folder/]<name>` as links into `models--x/blobs`."""
    for revision in (root, *root.parents):
        if revision.parent.name == "snapshots":
            return revision.parent.parent / "blobs"
    return None


def _check_keys(
    index: Path, weight_map: dict[str, str], files: dict[str, Path], entries: dict[str, TensorEntry]
) -> list[str]:
    """Every key lies where the index says; returns the keys that the index does not mention."""
    for key, name in weight_map.items():
        entry = entries.get(key)
        if entry is None:
            raise CheckpointError(
                f"{files[name]}: tensor {key!r}: expected here by {index.name}, found in no shard; "
                "bring the matching index, or download the shard again"
            )
        if entry.file is not files[name]:
            raise CheckpointError(
                f"{index}: tensor {key!r}: expected in {name}, found in {entry.file.name}; bring the matching index"
            )
    if len(entries) == len(weight_map):
        return []
    listed = {(entries[key].file, entries[key].offset) for key in weight_map}
    # A name that shares the bytes of another is not in a weight_map.
    return [key for key, e in entries.items() if key not in weight_map and (e.file, e.offset) not in listed]


def _oddities(
    found: Source, files: dict[str, Path], entries: dict[str, TensorEntry], unlisted: list[str], total_size: Any
) -> list[str]:
    """What contradicts the index without stopping a load: said, with what was believed."""
    odd = []
    if unlisted:
        odd.append(f"{len(unlisted)} tensors are in the shards but not in the index ({unlisted[0]}, …); they are used")
    size = stored_bytes(entries.values())
    if isinstance(total_size, int | float) and total_size != size:
        odd.append(f"the index claims {short(total_size)} bytes, the shards hold {size}; the shards were believed")
    named = {file.name for file in files.values()}
    stray = sorted(file.name for file in found.folder.glob("*.safetensors") if file.name not in named)
    if stray:
        odd.append(f"{', '.join(stray)}: beside the index, which does not name it; the index was believed")
    return odd
