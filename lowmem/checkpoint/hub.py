"""Models of the Hugging Face hub: from its cache, and from the network only when the user says so.

The cache's layout (`models--org--name/{refs,snapshots,blobs}`) is huggingface_hub's, which finds and fills it; see
"Understand caching" in its guides. Nothing here is imported for a source that is a local path.
"""

from __future__ import annotations

import errno
import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Any

from .._files import read_small
from ..errors import LowmemError, OptionError, SourceError
from .file_names import PICKLES, SAFETENSORS, is_index, listed
from .folder import Choice, choose
from .location import Place, local_place, shards_named, within
from .selection import Selection, is_revision
from .there import is_folder_at, table_at

_PART = r"\w(?:[\w.-]{0,94}\w)?"
_ID = re.compile(rf"((?:{_PART}/)?{_PART})(?:@(.+))?", re.ASCII)
_ABBREVIATED = re.compile(r"[0-9a-f]{4,39}")
# What stands beside the weights and builds a model and its tokenizer: no pictures, no cards, no other weights.
_BESIDE = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".spm", ".codes", ".bpe", ".vocab")
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EFBIG)
_NOT_BESIDE = ("trainer_state.json", "requirements.txt")


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A model of the hub as a source names it; `name` is the whole source, for messages."""

    name: str
    repo: str
    revision: str | None
    selection: Selection

    def inside(self, name: str) -> str:
        """The path in the repository of a file beside the weights."""
        return within(self.selection.subfolder, name)

    @property
    def remedy(self) -> str:
        """How to bring what is missing here."""
        revision = f" --revision {self.revision}" if self.revision else ""
        return f"download=True (--download) or `hf download {self.repo}{revision}` brings it"


def snapshot(text: str, selection: Selection) -> Path:
    """The folder of a model's snapshot in the hub's cache: the scheme `hf-hub:`.

    Without `selection.download` nothing is sent: what HF_HUB_CACHE or HF_HOME names is looked at. With it, the weights
    that `folder.choose` would choose are fetched, and the small files beside them. huggingface_hub draws bars meanwhile
    (HF_HUB_DISABLE_PROGRESS_BARS=1 stops them).

    Args:
        text: `org/name` or `name`, and perhaps `@` and a branch, tag or commit (its first digits do when it is cached).
        selection: a revision, when `text` has none; the subfolder and the variant whose weights are wanted; and
            whether the network may be used.

    Returns:
        The whole snapshot, whatever the subfolder.

    Raises:
        SourceError: no such name, not in the cache or not all of it, huggingface_hub is missing, or the hub refuses.
        OptionError: two revisions.
        UnsupportedError: only weights of kinds that lowmem does not read.
    """
    wanted = _parse(f"hf-hub:{text}", text, selection)
    if wanted is None:
        raise SourceError(f"hf-hub:{text}: expected org/name or org/name@revision after the colon; check the name")
    library = _library()
    if library is None:
        raise SourceError(f"{wanted.name}: models of the hub need huggingface_hub; pip install huggingface_hub")
    return _fetched(library, wanted) if selection.download else _cached(library, wanted)


def by_name(text: str, selection: Selection) -> Path | None:
    """The snapshot of a bare `org/name[@revision]`; of a bare `name` only when it is in the cache.

    Returns:
        A folder; None when `text` cannot be such a name, or is one without an owner and not in the cache.

    Raises:
        SourceError, OptionError, UnsupportedError: as `snapshot`.
    """
    wanted = _parse(text, text, selection)
    # A file that is not there is more likely than a model with a file's name.
    if wanted is None or text.lower().endswith((SAFETENSORS, *PICKLES, ".json")):
        return None
    library = _library()
    if "/" not in wanted.repo and (library is None or not _repository(library, wanted).is_dir()):
        return None
    if library is None:
        raise SourceError(
            f"{text}: no such file or folder; if it is a model of the hub, pip install huggingface_hub and ask again"
        )
    return _fetched(library, wanted) if selection.download else _cached(library, wanted)


def _parse(name: str, text: str, selection: Selection) -> _Wanted | None:
    """Names as `validate_repo_id` in huggingface_hub takes them; a revision that cannot leave the cache's folders."""
    found = _ID.fullmatch(text)
    if found is None or "--" in found[1] or ".." in found[1] or found[1].endswith(".git"):
        return None
    revision = found[2]
    if revision is not None and not is_revision(revision):
        return None
    if revision is not None and selection.revision not in (None, revision):
        raise OptionError(
            f"revision: {name} names the revision {revision} already, and revision= another ({selection.revision}); "
            "give one of them"
        )
    return _Wanted(name, found[1], revision or selection.revision, selection)


def _library() -> Any:
    """huggingface_hub, or None where it is not installed."""
    try:
        importlib.import_module("huggingface_hub.constants")
        return importlib.import_module("huggingface_hub")
    except ImportError:
        return None


def _repository(library: Any, wanted: _Wanted) -> Path:
    return Path(library.constants.HF_HUB_CACHE).expanduser() / ("models--" + wanted.repo.replace("/", "--"))


def _cached(library: Any, wanted: _Wanted) -> Path:
    repository = _repository(library, wanted)
    try:
        found = library.snapshot_download(
            wanted.repo, revision=_whole_commit(repository, wanted.revision), local_files_only=True
        )
    except (OSError, ValueError) as error:
        # Newer versions say that a snapshot is partial, by all its files; what counts here is the weights.
        found = getattr(error, "snapshot_path", None)
        if found is None:
            if isinstance(error, OSError) and error.strerror and not isinstance(error, FileNotFoundError):
                raise SourceError(
                    f"{wanted.name}: its place in the hub's cache ({error.filename or repository}) cannot be read: "
                    f"{error.strerror}"
                ) from error
            raise _not_cached(repository, wanted) from error
    folder = Path(found)
    _check(wanted, folder)
    return folder


def _whole_commit(repository: Path, revision: str | None) -> str | None:
    """The cached commit that begins with `revision`, when that is no branch or tag; else `revision` as it is."""
    if revision is None or not _ABBREVIATED.fullmatch(revision) or (repository / "refs" / revision).exists():
        return revision
    commits = [entry.name for entry in (repository / "snapshots").glob(f"{revision}*")]
    return commits[0] if len(commits) == 1 else revision


def _not_cached(repository: Path, wanted: _Wanted) -> SourceError:
    path = "" if wanted.name.startswith("hf-hub:") else "no such file or folder, and "
    what = f"revision {wanted.revision} " if wanted.revision else ""
    held = _held(repository)
    cache = f"({repository.parent}{f', where {wanted.repo} is at {held}' if held else ''})"
    return SourceError(f"{wanted.name}: {path}{what}not in the hub's cache {cache}; {wanted.remedy}")


def _held(repository: Path) -> str:
    """The snapshots in the cache, by branch or tag where one points to them: "main (0123abc), 4567def"."""
    try:
        commits = {entry.name: "" for entry in sorted((repository / "snapshots").iterdir())}
        for ref in sorted(path for path in (repository / "refs").rglob("*") if path.is_file()):
            commit = read_small(ref, 4096).decode().strip()
            if commit in commits:
                commits[commit] = ref.relative_to(repository / "refs").as_posix()
    except (OSError, ValueError):
        return ""
    return ", ".join(f"{ref} ({commit[:7]})" if ref else commit[:7] for commit, ref in commits.items())


def _check(wanted: _Wanted, folder: Path) -> None:
    """A snapshot holds what was fetched, which may be a part: its weights must be there, and all of them."""
    inside, selection = folder / wanted.selection.subfolder, wanted.selection
    if not is_folder_at(inside):
        raise SourceError(
            f"{wanted.name}: no folder {selection.subfolder} in what is cached of it ({folder}); {wanted.remedy}, if "
            "the repository has it"
        )
    place = replace(
        local_place(wanted.name, inside, selection.subfolder),
        incomplete=f"in the cache it is {inside}; {wanted.remedy}",
        empty=f"a part of it is cached in {inside}; {wanted.remedy}",
    )
    choice = choose(place, selection.variant)
    named = (place.shards(choice.index) if choice.index else None) or choice.files
    missing = sorted(name for name in named if not place.has(name))
    if missing:
        raise SourceError(
            f"{wanted.name}: not all of it is cached: of {len(named)} weight files {len(missing)} are missing in "
            f"{inside} ({listed(missing)}); {wanted.remedy}"
        )


def _fetched(library: Any, wanted: _Wanted) -> Path:
    revision = _whole_commit(_repository(library, wanted), wanted.revision)
    try:
        names = library.list_repo_files(wanted.repo, revision=revision)
        files = _needed(library, wanted, revision, names)
        for part in files:
            folder = Path(
                library.snapshot_download(wanted.repo, revision=revision, allow_patterns=[*map(escape, part)])
            )
            # The rest is of the same commit, even if the branch moves meanwhile.
            revision = folder.name
    except LowmemError:
        raise
    except Exception as error:
        # Which classes a broken network raises depends on the HTTP library, and that on huggingface_hub's version.
        raise _refusal(library, wanted, error) from error
    _check(wanted, folder)
    return folder


def _needed(library: Any, wanted: _Wanted, revision: str | None, names: Sequence[str]) -> list[list[str]]:
    """The files of a repository that a load needs, in the order in which they are fetched: the small ones, then one set
    of weights. Where a download is cut short, weights are missing, which is told by themselves; the others could not
    be missed.
    """
    every = frozenset(names)
    subfolder = wanted.selection.subfolder
    held = [name.removeprefix(f"{subfolder}/") for name in names if not subfolder or name.startswith(f"{subfolder}/")]
    if not held:
        there = listed(sorted(_by_folder(names))) or "none"
        raise SourceError(
            f"{wanted.name}: no folder {subfolder} in the repository (folders there: {there}); name another"
        )

    @cache
    def fetched(name: str) -> Path:
        return Path(library.hf_hub_download(wanted.repo, wanted.inside(name), revision=revision))

    place = Place(
        within(wanted.name, subfolder),
        sorted(name for name in held if "/" not in name),
        lambda: _by_folder(held),
        lambda index: shards_named(fetched(index)),
        lambda name: wanted.inside(name) in every,
        lambda name: table_at(fetched(name)) if wanted.inside(name) in every else {},
        lambda folder: f"with subfolder={wanted.inside(folder)!r} (--subfolder)",
        "the repository itself lacks some",
        "it is the repository of something else",
    )
    choice = choose(place, wanted.selection.variant)
    weights = _of_index(wanted, choice, place) if choice.index else choice.files
    beside = [
        name
        for name in place.names
        if name.lower().endswith(_BESIDE) and name not in _NOT_BESIDE and not is_index(name)
    ]
    parts = [sorted(wanted.inside(name) for name in part) for part in ({*beside} - {*weights}, {*weights})]
    return [part for part in parts if part]


def _of_index(wanted: _Wanted, choice: Choice, place: Place) -> tuple[str, ...]:
    assert choice.index
    shards = place.shards(choice.index)
    lacking = sorted(name for name in shards or () if not place.has(name))
    if not shards or lacking:
        what = f"shards that the repository lacks ({', '.join(lacking[:3])})" if lacking else "no shards"
        raise SourceError(f"{wanted.name}: {choice.index} names {what}; try another revision, or ask its owner")
    return (choice.index, *shards)


def _by_folder(names: Sequence[str]) -> dict[str, list[str]]:
    below: dict[str, list[str]] = {}
    for path in map(PurePosixPath, names):
        if len(path.parts) == 2:
            below.setdefault(path.parts[0], []).append(path.name)
    return below


def _refusal(library: Any, wanted: _Wanted, error: Exception) -> SourceError:
    """What the hub or the network said, in one line, and what would help; by the names of huggingface_hub's errors."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    page = f"{library.constants.ENDPOINT}/{wanted.repo}"
    if "GatedRepoError" in kinds:
        what, remedy = "its owner asks for consent", f"accept the conditions at {page}, and `hf auth login`"
    elif "RepositoryNotFoundError" in kinds:
        what, remedy = f"not found at {page}", "check the name; `hf auth login` if it is private"
    elif "RevisionNotFoundError" in kinds:
        what, remedy = f"no revision {wanted.revision} at {page}", "check the branch, tag or commit"
    elif "OfflineModeIsEnabled" in kinds:
        what, remedy = "HF_HUB_OFFLINE forbids the network", "unset it, or leave out download to use what is cached"
    elif isinstance(error, OSError) and error.errno in _DISK:
        what, remedy = f"cannot be fetched: {_line(error)}", f"check {library.constants.HF_HUB_CACHE} and its disk"
    else:
        what = f"cannot be fetched: {_line(error)}"
        remedy = "check the network and ask again, which goes on where it stopped; without download the cache is used"
    return SourceError(f"{wanted.name}: {what}; {remedy}")


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"
