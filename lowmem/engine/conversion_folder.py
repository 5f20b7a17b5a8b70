"""The folder of a conversion: what is whole waits in a hidden folder, until all is and gets its name at once.

    OUT/.lowmem-convert/state.json                                what is being made, so that a second run can go on
    OUT/.lowmem-convert/model-00001-of-00003.safetensors          whole: on the disk and read back
    OUT/.lowmem-convert/model-00001-of-00003.safetensors.json     says so, with the checksums of its pieces
    OUT/.lowmem-convert/model-00002-of-00003.safetensors.partial  being written

Weights get their names when all are whole, then the index, and `config.json` last: until then nothing in OUT looks
like a model. The result is finished when `state.json` goes; whoever reads OUT before is told that it is not.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .._files import check_weight, open_regular, read_small
from ..errors import OutputError
from ..planner.convert import FORMAT, ConvertPlan
from ..planner.records import OffloadFile
from ..sizes import MIB, format_size
from .cleanup import OpenFiles, undisturbed
from .locks import hold, release
from .offload_writer import sync
from .read_back import Piece, find_difference
from .shard_writer import ShardFile

HIDDEN = ".lowmem-convert"
_STATE = "state.json"
_DRAFT = "small.draft"


class ConversionFolder:
    """Where a conversion is written.

    Args:
        plan: what is made.
        beside: small files that come along as they are.
        last: name → content of those that make it a model: the index, and `config.json` as the last.
    """

    def __init__(self, plan: ConvertPlan, beside: Iterable[Path], last: Mapping[str, bytes]) -> None:
        self._plan = plan
        self._beside = tuple(beside)
        self._last = last
        self.out = plan.folder
        self.hidden = plan.folder / HIDDEN
        self._made = self._published = False
        self._lock: int | None = None

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Make the folder, or take up what another run has left of the same conversion; nobody else may meanwhile.

        What is not needed to go on is gone afterwards, however the block ends.

        Raises:
            OutputError: it holds something else, another run is writing there, or it cannot be written.
        """
        with contextlib.ExitStack() as held:
            with self._writing():
                self._made = not self.out.exists()
                try:
                    self.out.mkdir(parents=True, exist_ok=True)
                except FileExistsError:
                    found = "a file" if self.out.exists() else "a link to nothing"
                    raise OutputError(
                        f"{self.out}: expected a folder, found {found}; give the path of a folder"
                    ) from None
                held.enter_context(self._alone())
                self._take_up()
            try:
                yield
            finally:
                with self._writing():
                    undisturbed(self._clean)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"{self.out / (error.filename or '')}: cannot be written: {error.strerror or error}; make room or "
                "check its permissions, and run the conversion again: what is whole is kept"
            ) from error

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        held = OpenFiles()
        try:
            try:
                self._lock = held[-1] if hold(held, self.out) else None
            except BlockingIOError:
                raise OutputError(f"{self.out}: another conversion is writing there; wait for it, or end it") from None
            yield
        finally:
            undisturbed(functools.partial(release, held))

    def check_place(self) -> None:
        """What has our folder's name now may be another's, where ours was removed: nothing of it is touched.

        Raises:
            OutputError: it was, or nobody can tell.
        """
        try:
            is_ours = self._look()
        except OSError as error:
            raise OutputError(
                f"{self.out}: cannot be looked at while it is written: {error.strerror or error}; check its disk, and "
                "run the conversion again: what is whole is kept"
            ) from error
        if not is_ours:
            raise OutputError(f"{self.out}: was removed while it was written; run the conversion again")

    def _is_ours(self) -> bool:
        try:
            return self._look()
        except OSError:
            return False

    def _look(self) -> bool:
        try:
            return self._lock is None or os.path.samestat(os.fstat(self._lock), self.out.stat())
        except (FileNotFoundError, NotADirectoryError):
            return False

    def _take_up(self) -> None:
        names = {entry.name for entry in self.out.iterdir()}
        if HIDDEN in names and (self.hidden.is_symlink() or not self.hidden.is_dir()):
            # What is removed and written there would be of another folder.
            raise OutputError(
                f"{self.hidden}: expected the folder of an unfinished conversion, found "
                f"{'a link' if self.hidden.is_symlink() else 'a file'}; remove it"
            )
        state = _read_json(self.hidden / _STATE)
        ours = {HIDDEN, *(path.name for path in self._beside), *self._last, *(file.name for file in self._plan.files)}
        # Before there is a state, nothing of a conversion has its name.
        others = sorted(names - ours if state else names - {HIDDEN})
        if not state and {file.name for file in self._plan.files} <= names:
            # Of a run that was killed behind its last step.
            with contextlib.suppress(OSError):
                self._empty()
            raise OutputError(
                f"{self.out}: holds a finished checkpoint already; lowmem check looks whether it is whole; "
                "give another folder, or remove this one"
            )
        known = not state or state.get("fingerprint") == self._plan.fingerprint
        if others or not known:
            raise OutputError(
                f"{self.out}: expected an empty folder, or what an earlier run of this conversion left; found "
                f"{others[0] if others else 'an unfinished conversion of something else'}; "
                "give another folder, or remove this one"
            )
        self._make_hidden()
        # What no state tells of may be of anything.
        for pattern in ("*.partial", "*.draft") if state else ("*",):
            for path in self.hidden.glob(pattern):
                path.unlink()
        if not state:
            table = {"format": FORMAT, "fingerprint": self._plan.fingerprint, "source": self._plan.checkpoint.source}
            self._write(_STATE, json.dumps(table, indent=1).encode())
            _sync_folder(self.hidden)

    def _make_hidden(self) -> None:
        """In the folder that is locked: by its path it might be made in another's, which has the name by now."""
        with contextlib.suppress(FileExistsError):
            if self._lock is None:
                self.hidden.mkdir()
                return
            try:
                os.mkdir(HIDDEN, dir_fd=self._lock)
            except FileNotFoundError:
                self.check_place()
                raise
        self.check_place()

    def check_room(self, nbytes: int) -> None:
        """Refuse what the disk has no room for, before the first byte of it.

        Raises:
            OutputError: `nbytes` is more than is free.
        """
        with self._writing():
            free = shutil.disk_usage(self.out).free
        if free < nbytes:
            raise OutputError(
                f"{self.out}: {format_size(nbytes)} are still to be written, the disk has {format_size(free)} free; "
                "make room, or convert into a folder on another disk, or to a smaller dtype"
            )

    def is_whole(self, file: OffloadFile, *, verify: bool) -> bool:
        """Whether an earlier run has finished this file: its record, size, header and, with `verify`, every byte."""
        path = self.hidden / file.name
        try:
            if not path.exists() and not path.is_symlink():
                path = self.out / file.name
            # A piece's sum takes some characters.
            record = _read_json(self.hidden / f"{file.name}.json", MIB + 4 * len(file.head) + file.size // 64)
            if record["fingerprint"] != self._plan.fingerprint:
                return False
            pieces = [Piece(offset, nbytes, found, "") for offset, nbytes, found in record["pieces"]]
            if not _is_all_of(file.size, pieces):
                return False
            with open_regular(path, links=False) as opened:
                info = os.fstat(opened.fileno())
                if (info.st_size, info.st_mtime_ns) != (file.size, record["mtime_ns"]):
                    return False
                if opened.read(len(file.head)) != file.head:
                    return False
            return not verify or find_difference(path, pieces) is None
        except (OSError, KeyError, TypeError, ValueError):
            return False

    def seal(self, shard: ShardFile) -> None:
        """A file is on the disk: give it its name in the hidden folder, and its record.

        Raises:
            OSError: the folder cannot be written.
        """
        mtime_ns = os.fstat(shard.fd).st_mtime_ns
        if not os.path.samestat(os.fstat(shard.fd), shard.path.stat()):
            raise OutputError(f"{shard.path}: was replaced while it was written; run the conversion again")
        shard.close()
        shard.path.replace(self.hidden / shard.file.name)
        pieces = [piece[:3] for piece in sorted(shard.pieces)]
        record = {
            "fingerprint": self._plan.fingerprint,
            "size": shard.file.size,
            "mtime_ns": mtime_ns,
            "pieces": pieces,
        }
        self._write(f"{shard.file.name}.json", json.dumps(record, separators=(",", ":")).encode())
        _sync_folder(self.hidden)

    def publish(self) -> None:
        """All weights are whole: give everything its name.

        Raises:
            OutputError: the folder cannot be written, or was removed meanwhile.
        """
        with self._writing():
            self.check_place()
            self._publish()

    def _publish(self) -> None:
        for path in self._beside:
            with self._draft(path.name) as draft:
                shutil.copyfile(path, draft)
        for name, text in self._last.items():
            self._write(name, text)
        beside = [path.name for path in self._beside]
        for names in ((*beside, *(file.name for file in self._plan.files)), self._last):
            for name in names:
                # An earlier run may have come so far.
                with contextlib.suppress(FileNotFoundError):
                    (self.hidden / name).replace(self.out / name)
            _sync_folder(self.out)
        # Where the folder above may be written and not be read, its own entry is left to the kernel.
        with contextlib.suppress(PermissionError):
            _sync_folder(self.out.parent)
        (self.hidden / _STATE).unlink()
        self._published = True
        # All is whole: what cannot be removed is in nobody's way.
        with contextlib.suppress(OSError):
            self._empty()

    def _write(self, name: str, text: bytes) -> None:
        with self._draft(name) as draft:
            draft.write_bytes(text)

    @contextlib.contextmanager
    def _draft(self, name: str) -> Iterator[Path]:
        """A small file in the hidden folder: whole and on the disk, or not there."""
        # Whatever the name is: with more behind it, it might be too long.
        draft = self.hidden / _DRAFT
        yield draft
        sync(draft)
        draft.replace(self.hidden / name)

    def _clean(self) -> None:
        """What is whole stays, to go on with; without that there is nothing."""
        if self._published or not self._is_ours() or not self.hidden.is_dir():
            return
        # Path.glob passes over what cannot be listed, and whole files would be removed.
        inside = list(self.hidden.iterdir())
        if any(path.name.endswith(".safetensors.json") for path in inside):
            for path in inside:
                if path.name.endswith(".partial"):
                    path.unlink(missing_ok=True)
            return
        self._empty()
        if self._made and not any(self.out.iterdir()):
            self.out.rmdir()

    def _empty(self) -> None:
        """Remove the hidden folder, if it is there."""
        if not self.hidden.is_dir():
            return
        for path in self.hidden.iterdir():
            path.unlink()
        self.hidden.rmdir()


def _is_all_of(size: int, pieces: Iterable[Piece]) -> bool:
    """Whether the pieces are every byte of a file, and each once."""
    at = 0
    for piece in pieces:
        if piece.offset != at or not isinstance(piece.nbytes, int) or piece.nbytes < 0:
            return False
        at += piece.nbytes
    return at == size


def _read_json(path: Path, most: int = MIB) -> dict[str, Any]:
    """The object in a file; an empty one where there is none, or a damaged one. That it cannot be read is an error."""
    try:
        raw = read_small(path, most, links=False)
        check_weight(raw)
        table = json.loads(raw)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EINVAL, errno.EFBIG, errno.ELOOP):
            raise
        return {}
    except (ValueError, RecursionError):
        return {}
    return table if isinstance(table, dict) else {}


def _sync_folder(path: Path) -> None:
    if sys.platform != "win32":
        sync(path)
