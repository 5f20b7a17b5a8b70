"""The index's `weight_map` against the shards' own headers."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from .._files import TooHeavyError, held_in, read_small
from ..errors import CheckpointError
from .file_names import is_weights
from .location import names_in
from .records import TensorEntry, stored_bytes
from .safetensors import check_extent, decode_json, short
from .source import Source

# In an index that lowmem wrote: name that is left out → name under which its bytes are stored. For people and other
# programs: the headers say it too, and are believed.
SHARED = "lowmem_shared"


@dataclass(frozen=True, slots=True)
class Listing:
    """What an index says.

    Attributes:
        index: the index file.
        weight_map: key → file name.
        files: file name → path, sorted by name.
        total_size: bytes of all tensors, as the index claims; anything may stand there.
    """

    index: Path
    weight_map: Mapping[str, str]
    files: Mapping[str, Path]
    total_size: Any


def read_listing(found: Source) -> Listing | None:
    """The index of a source, if it has one.

    Raises:
        CheckpointError: the index is damaged, or names files that are not there.
    """
    if found.index is None:
        return None
    weight_map, total_size = _read_index(found.index, found.folder)
    as_path = {name: str(PurePath(name)) if name else name for name in set(weight_map.values())}
    weight_map = {key: as_path[name] for key, name in weight_map.items()}
    first: dict[str, str] = {}
    for key, name in weight_map.items():
        first.setdefault(name, key)
    # Of hundreds of shards each would ask for the same.
    roots = functools.cache(lambda: _roots(found.folder))
    files = {name: _inside(found.index, found.folder, name, first[name], roots) for name in sorted(first)}
    return Listing(found.index, weight_map, files, total_size)


def _read_index(index: Path, folder: Path) -> tuple[dict[str, str], Any]:
    try:
        table = decode_json(read_small(index), more=held_in(folder))
    except OSError as error:
        raise CheckpointError(
            f"{index}: cannot be read: {error.strerror or error}; check the path and its permissions, or download it "
            "again"
        ) from error
    except TooHeavyError as error:
        raise CheckpointError(f"{index}: {error}; download it again") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{index}: not valid JSON ({error}); download it again") from error
    weight_map = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(weight_map, dict):
        raise CheckpointError(
            f"{index}: expected a 'weight_map' of key to file name, found {short(table)}; download it again"
        )
    check_extent(index, max(weight_map, key=len, default=""))
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


def _inside(index: Path, folder: Path, name: str, key: str, roots: Callable[[], tuple[Path, Path | None]]) -> Path:
    """The shard `name`, which must lie in the index's folder; a link may lead only where the hub's cache leads."""
    file = folder / name
    if not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise CheckpointError(
            f"{index}: tensor {key!r}: expected a file inside {folder}, found {short(name)}; bring the matching index"
        )
    try:
        file.lstat()
    except OSError as error:
        # A name too long is that of no file.
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise _unfollowed(file, key, error) from error
        raise CheckpointError(
            f"{index}: tensor {key!r}: expected in {short(name)}, which is missing in {folder}; download it again"
        ) from None
    try:
        (root, blobs), real = roots(), file.resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError, RuntimeError) as error:
        raise CheckpointError(
            f"{file}: tensor {key!r}: expected a file, found a link that leads nowhere; download it again"
        ) from error
    except OSError as error:
        raise _unfollowed(file, key, error) from error
    if not real.is_relative_to(root) and not (blobs and real.is_relative_to(blobs)):
        raise CheckpointError(
            f"{file}: tensor {key!r}: expected a file inside {folder}, found a link to {real}; "
            "put the file itself into the folder"
        )
    return file


def led_outside(folder: Path, file: Path) -> Path | None:
    """Where a link in `folder` leads, if that is neither inside of it nor where the hub's cache keeps its files."""
    root, blobs = _roots(folder)
    real = Path(os.path.realpath(file))
    inside = real.is_relative_to(root) or (blobs is not None and real.is_relative_to(blobs))
    return None if inside else real


def _unfollowed(file: Path, key: str, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{file}: tensor {key!r}: cannot be followed: {error.strerror or error}; check the path and its permissions"
    )


def _roots(folder: Path) -> tuple[Path, Path | None]:
    """Where shards may lie: the folder itself, and in the hub's cache the folder that its links lead to.

    The cache keeps `models--x/snapshots/<revision>/[folder/]<name>` as links into `models--x/blobs`.
    """
    root = folder.resolve(strict=True)
    for revision in (root, *root.parents):
        if revision.parent.name == "snapshots":
            return root, revision.parent.parent / "blobs"
    return root, None


def check_keys(listing: Listing, entries: Mapping[str, TensorEntry], unreadable: Collection[str] = ()) -> list[str]:
    """Every key lies where the index says; returns the keys that the index does not mention.

    Raises:
        CheckpointError: a key lies elsewhere, or nowhere.
    """
    for key, name in listing.weight_map.items():
        entry = entries.get(key)
        if entry is None:
            if key in unreadable:
                continue
            raise CheckpointError(
                f"{listing.files[name]}: tensor {key!r}: expected here by {listing.index.name}, found in no shard; "
                "bring the matching index, or download the shard again"
            )
        if entry.file is not listing.files[name]:
            raise CheckpointError(
                f"{listing.index}: tensor {key!r}: expected in {name}, found in {entry.file.name}; "
                "bring the matching index"
            )
    listed = listing.weight_map
    if len(entries) == len(listed):
        return []
    places = {(id(entries[key].file), entries[key].offset) for key in listed if key in entries}
    # A name that shares the bytes of another need not be in a weight_map.
    return [key for key, e in entries.items() if key not in listed and (id(e.file), e.offset) not in places]


def oddities(found: Source, listing: Listing, entries: Mapping[str, TensorEntry], unlisted: Sequence[str]) -> list[str]:
    """What contradicts the index without stopping a load: said, with what was believed."""
    odd = []
    if unlisted:
        odd.append(f"{len(unlisted)} tensors are in the shards but not in the index ({unlisted[0]}, …); they are used")
    claimed = listing.total_size
    # A tensor that is there under two names may have been counted once or twice.
    if isinstance(claimed, int | float) and claimed != sum([entry.nbytes for entry in entries.values()]):
        held = stored_bytes(entries.values())
        if claimed != held:
            odd.append(f"the index claims {short(claimed)} bytes, the shards hold {held}; the shards were believed")
    named = {file.name for file in listing.files.values()}
    # What cannot be listed has nothing that could be told of.
    names = names_in(found.folder)
    stray = [name for name in names if is_weights(name, found.pickled) and name not in named]
    if stray:
        odd.append(f"{', '.join(stray)}: beside the index, which does not name it; the index was believed")
    return odd
