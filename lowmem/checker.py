"""Whether a checkpoint is whole: headers, index and sizes, and the SHA-256 of each file where one is known."""

from __future__ import annotations

import io
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ._drafts import new_content
from ._files import LONGEST_NAME, read_small
from .checkpoint import Checkpoint, survey
from .checkpoint.survey import find
from .checkpoint.there import is_file_at, is_folder_at, looking_at
from .engine.hashing import hash_all
from .errors import CheckpointError, OptionError, UnsupportedError
from .planner import ProgressCallback
from .planner.request import checks_names, parse_folder
from .sizes import MIB, shown

# As coreutils' sha256sum writes it: a backslash in front says that the name is escaped; `*` is for binary mode.
_LINE = re.compile(r"(\\?)([0-9a-fA-F]{64}) [ *](.+)")
_ESCAPES = {"\\\\": "\\", "\\n": "\n", "\\r": "\r"}
# Some ten thousand files; what is made of a line is many times as large as the line.
MOST_OF_A_MANIFEST = 2 * MIB


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong with one file, and what mends it."""

    file: str
    expected: str
    found: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.file}: expected {self.expected}, found {self.found}; {self.remedy}"


@dataclass(frozen=True, eq=False)
class CheckReport:
    """What a check found.

    Attributes:
        source: as the user gave it.
        files: files that were looked at.
        verified: those of them whose content has the hash that it should have.
        hashed: bytes that were read for that.
        problems: what is wrong.
        warnings: what is odd and does not make the checkpoint wrong.
        seconds: of everything.
    """

    source: str
    files: tuple[str, ...]
    verified: tuple[str, ...]
    hashed: int
    problems: tuple[Problem | str, ...]
    warnings: tuple[str, ...]
    seconds: float

    @property
    def is_fine(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """As plain values, as `lowmem check --json` prints it."""
        return {
            "source": self.source,
            "fine": self.is_fine,
            "files": list(self.files),
            "verified": list(self.verified),
            "hashed": self.hashed,
            "problems": [str(problem) for problem in self.problems],
            "warnings": list(self.warnings),
            "seconds": self.seconds,
        }


@dataclass(frozen=True, slots=True)
class _Hash:
    """A hash that a file should have; `kind` is `sha256`, or `blob` as git names the content of a file."""

    file: Path
    kind: str
    expected: str
    origin: str


@checks_names
def check(
    source: str | os.PathLike[str],
    manifest: str | os.PathLike[str] | None = None,
    write_manifest: str | os.PathLike[str] | None = None,
    *,
    variant: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    download: bool = False,
    progress: ProgressCallback | None = None,
) -> CheckReport:
    """Check a checkpoint: headers against sizes, the index against the headers, and hashes where some are known.

    Hashes come from a manifest in the format of `sha256sum`, with names relative to the checkpoint's folder, and from
    the hub's cache, where a file is a link to one that is named after its content: 64 hex digits are a SHA-256, 40 the
    SHA-1 of a git blob. Files are read in small buffers, by a few threads.

    Args:
        source: what `load` takes.
        manifest: a file of hashes to compare with. Files of the folder that it does not name are mentioned.
        write_manifest: where to write the hashes of all files of the folder; only when nothing is wrong.
        variant: take the files with this word in their names, such as `"fp16"`.
        subfolder: a folder inside the source that is meant, with its own config.
        revision: a branch, tag or commit of a model of the hub, as after `@` in the source.
        download: whether a model of the hub may be fetched.
        progress: called with a `Progress` from the calling thread.

    Returns:
        What was looked at, and what is wrong.

    Raises:
        SourceError: nothing that can be loaded is there.
        CheckpointError: the manifest cannot be read, or names files outside of the folder.
        OptionError: an option that means nothing, or nothing for this source.
    """
    started = time.perf_counter()
    if progress is not None and not callable(progress):
        raise OptionError(f"progress: expected a function of one Progress, found {shown(progress)}")
    listed = None if manifest is None else parse_folder(manifest, "manifest", "file")
    target = None if write_manifest is None else parse_folder(write_manifest, "write_manifest", "file")
    if target is not None:
        target = _check_target(target)
    problems: list[Problem | str] = []
    checkpoint = None
    place = find(source, variant=variant, subfolder=subfolder, revision=revision, download=download)
    try:
        # Which mapping of a pickle holds the weights is nothing to check.
        checkpoint = survey(place).glance()
    except (CheckpointError, UnsupportedError) as error:
        problems.append(str(error))
    folder, files = _files(place.path.absolute(), checkpoint, [path for path in (listed, target) if path is not None])
    warnings = list(checkpoint.warnings) if checkpoint is not None else []
    hashes = [*_hub_hashes(files)]
    if listed is not None:
        wanted = _read_manifest(listed)
        hashes += [_Hash(folder / name, "sha256", value, listed.name) for name, value in wanted.items()]
        unnamed = [path for path in files if path.relative_to(folder).as_posix() not in wanted]
        weights = {shard.file.absolute() for shard in checkpoint.shards} if checkpoint is not None else set()
        problems += [_unnamed(path, listed) for path in unnamed if path in weights]
        others = [path.relative_to(folder).as_posix() for path in unnamed if path not in weights]
        if others:
            warnings.append(f"{listed}: does not name {', '.join(others)}")
    kinds = {(h.file, h.kind): None for h in hashes}
    if target is not None:
        kinds.update({(path, "sha256"): None for path in files})
    found, hashed = hash_all(list(kinds), progress)
    problems += [problem for h in hashes if (problem := _compare(h, found[h.file, h.kind])) is not None]
    if target is not None and not problems:
        _write_manifest(target, folder, {path: found[path, "sha256"] for path in files})
    bad = {problem.file for problem in problems if isinstance(problem, Problem)}
    return CheckReport(
        source=os.fsdecode(source),
        files=tuple(str(path) for path in files),
        verified=tuple(dict.fromkeys(str(h.file) for h in hashes if str(h.file) not in bad)),
        hashed=hashed,
        problems=tuple(problems),
        warnings=tuple(warnings),
        seconds=time.perf_counter() - started,
    )


def _files(path: Path, checkpoint: Checkpoint | None, without: list[Path]) -> tuple[Path, list[Path]]:
    """The folder, and the files that a check is about: of a folder all that are not hidden."""
    if is_folder_at(path):
        found = [file for file in sorted(_inside_of(path)) if not _is_hidden(file.relative_to(path))]
        return path, [file for file in found if file not in without and is_file_at(file)]
    if checkpoint is None:
        return path.parent, [path]
    beside = [path, *(shard.file.absolute() for shard in checkpoint.shards)]
    return path.parent, list(dict.fromkeys(beside))


def _inside_of(folder: Path) -> Iterator[Path]:
    """All that is below a folder, but for what links lead to. Path.rglob passes over what cannot be listed.

    Raises:
        SourceError: a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise error

    with looking_at(folder):
        for inside, folders, files in os.walk(folder, onerror=refuse):
            yield from (Path(inside, name) for name in (*folders, *files))


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _hub_hashes(files: Iterable[Path]) -> Iterator[_Hash]:
    """The hub's cache (huggingface_hub, file_download.py) keeps `snapshots/<revision>/<name>` as links into `blobs`,
    named by the server's etag: the SHA-256 of what git LFS keeps, and git's own name of everything else.
    """
    for file in files:
        with looking_at(file):
            if not stat.S_ISLNK(file.lstat().st_mode):
                continue
            blob = file.resolve()
        if blob.parent.name != "blobs" or not re.fullmatch("[0-9a-f]{64}|[0-9a-f]{40}", blob.name):
            continue
        yield _Hash(file, "sha256" if len(blob.name) == 64 else "blob", blob.name, "the name of its blob")


def _unnamed(path: Path, manifest: Path) -> Problem:
    return Problem(str(path), f"its hash in {manifest}", "none", "write the manifest again, or remove the file")


def _compare(wanted: _Hash, found: str | OSError) -> Problem | None:
    file = str(wanted.file)
    if isinstance(found, FileNotFoundError):
        return Problem(file, f"a file, by {wanted.origin}", "none", "download it again")
    if isinstance(found, OSError):
        return Problem(file, "a file that can be read", str(found.strerror or found), "check its permissions")
    if found == wanted.expected:
        return None
    what = "SHA-256" if wanted.kind == "sha256" else "git's SHA-1"
    return Problem(file, f"{what} {wanted.expected}, by {wanted.origin}", found, "download it again")


def _read_manifest(path: Path) -> dict[str, str]:
    """Name → SHA-256.

    Raises:
        CheckpointError: it cannot be read, or a line is not of that format or leads out of the folder.
    """
    try:
        raw = read_small(path, MOST_OF_A_MANIFEST)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}; check the path") from error
    wanted: dict[str, str] = {}
    for number, text in enumerate(io.BytesIO(raw), start=1):
        if text in (b"\n", b"\r\n", b"\r"):
            continue
        line = os.fsdecode(text).removesuffix("\n").removesuffix("\r")
        match = _LINE.fullmatch(line)
        if match is None:
            raise CheckpointError(
                f"{path}: line {number}: expected '<64 hex digits>  <name>' as sha256sum writes it, found "
                f"{shown(line)}; write it again with --write-manifest"
            )
        name = re.sub(r"\\[\\nr]", lambda found: _ESCAPES[found[0]], match[3]) if match[1] else match[3]
        name = _inside(path, number, name)
        if wanted.setdefault(name, match[2].lower()) != match[2].lower():
            raise CheckpointError(f"{path}: line {number}: {shown(name)} has another hash above; keep the right one")
    return wanted


def _inside(manifest: Path, number: int, name: str) -> str:
    if len(name) > LONGEST_NAME:
        raise CheckpointError(
            f"{manifest}: line {number}: expected a name of at most {LONGEST_NAME} characters, found {len(name)}; "
            "write it again with --write-manifest"
        )
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\0" in name or not pure.parts:
        raise CheckpointError(
            f"{manifest}: line {number}: expected a name inside the checkpoint's folder, found {shown(name)}; "
            "write it relative to the folder"
        )
    return pure.as_posix()


def _check_target(target: Path) -> Path:
    """Where a manifest is written; a link stays a link. It is refused over something else.

    Raises:
        OptionError: the file there is no manifest.
    """
    try:
        target = target.resolve() if target.is_symlink() else target
        if not target.exists():
            return target
        if not target.is_file():
            raise OptionError(f"write_manifest: {target}: expected a file, found another kind; give another path")
        _read_manifest(target)
        return target
    except OSError as error:
        raise OptionError(f"write_manifest: {target}: cannot be written: {error.strerror or error}") from error
    except CheckpointError as error:
        raise OptionError(
            f"write_manifest: {target} is there and is no manifest; give another path, or remove it"
        ) from error


def _write_manifest(target: Path, folder: Path, found: Mapping[Path, str | OSError]) -> None:
    lines = []
    for path, value in found.items():
        if isinstance(value, OSError):
            raise CheckpointError(f"{path}: cannot be read: {value.strerror or value}; check its permissions")
        name = path.relative_to(folder).as_posix()
        escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
        lines.append(f"{'' if escaped == name else chr(92)}{value}  {escaped}\n")
    text = os.fsencode("".join(lines))
    if len(text) > MOST_OF_A_MANIFEST:
        raise CheckpointError(
            f"{folder}: expected files for a manifest of at most {MOST_OF_A_MANIFEST} bytes, found {len(lines)}; check "
            "the folder of the weights alone"
        )
    try:
        with new_content(target) as file:
            file.write(text)
    except OSError as error:
        raise OptionError(f"write_manifest: {target}: cannot be written: {error.strerror or error}") from error


__all__ = ["CheckReport", "Problem", "check"]
