"""Write the offload folder: under a temporary name, whole or not at all."""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import secrets
import shutil
import time
from pathlib import Path

import torch

from .._mounts import is_on_local_disk
from ..errors import OffloadError
from ..planner.moves import Placement
from ..planner.offload import INDEX, boot_id, index_of, is_finished, read_finished
from ..planner.records import OffloadPlan
from ..sizes import format_size
from .cleanup import OpenFiles, close_all, close_read, open_into, undisturbed
from .destinations import FileDestination, write_at
from .locks import alone_in, hold, is_abandoned, release

_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
# The kernel writes by itself what is older than 30 seconds (vm.dirty_expire_centisecs), looking every five.
_WRITTEN_BACK = 60.0
_TEMPORARY = re.compile(r"\.[0-9a-f]{16}-\d+-[0-9a-f]{8}\.tmp")


class OffloadWriter:
    """The folder while it is written; `finish` gives it its name, `abandon` removes it.

    While it has its temporary name it is locked, so that another load can tell whether its writer still lives.
    """

    def __init__(self, plan: OffloadPlan, source: str) -> None:
        self._plan = plan
        self._source = source
        # In the order of the plan's files.
        self._fds = OpenFiles()
        self._locks = OpenFiles()
        self._process = os.getpid()
        self._root = plan.folder.parent
        self._folder = self._root / f".{plan.folder.name}-{os.getpid()}-{secrets.token_hex(4)}.tmp"

    def open(self) -> None:
        """Make the folder and its files, at their final sizes.

        Raises:
            OffloadError: the disk is full, or the folder cannot be written.
        """
        self._make_folder()
        for file in self._plan.files:
            path = self._folder / file.name
            try:
                open_into(self._fds, path, _NEW, 0o644)
                reserve(self._fds[-1], file.size)
                write_at(self._fds[-1], memoryview(file.head), 0)
            except OSError as error:
                few = error.errno in (errno.EMFILE, errno.ENFILE)
                remedy = "raise the number of open files (ulimit -n)" if few else "give offload_folder on another disk"
                raise OffloadError(
                    f"{path}: cannot reserve {format_size(file.size)}: {error.strerror or error}; {remedy}"
                ) from error

    def _make_folder(self) -> None:
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            with alone_in(self._root):
                _sweep(self._root)
                _check_free(self._root, self._plan.nbytes)
                self._folder.mkdir()
                hold(self._locks, self._folder)
        except FileExistsError:
            found = "a file" if self._root.exists() else "a link to nothing"
            raise OffloadError(f"{self._root}: expected a folder, found {found}; give another offload_folder") from None
        except OSError as error:
            raise OffloadError(
                f"{self._root}: cannot be written: {error.strerror or error}; give another offload_folder"
            ) from error

    def destination(self, placement: Placement) -> FileDestination:
        """The range of the file that belongs to `placement`."""
        held = zip(self._fds, self._plan.files, strict=True)
        fd, file = next((fd, file) for fd, file in held if placement.target in file.spans)
        path = os.fspath(self._folder / file.name)
        return FileDestination(placement, fd, file.spans[placement.target][0], path)

    def store(self, placement: Placement, tensor: torch.Tensor) -> None:
        """All of a dense tensor that is on the CPU.

        Raises:
            OffloadError: the disk failed.
        """
        self.destination(placement).store(tensor)

    def finish(self) -> None:
        """Everything is written: write the index, rename.

        A power cut could leave a finished name over unwritten bytes. On a disk of this machine the index says in which
        start of the machine it was written, so that nobody believes it after the next; elsewhere the files are synced.

        Raises:
            OffloadError: the disk failed at the last moment.
        """
        boot = boot_id() if is_on_local_disk(self._root) else None
        try:
            if boot is None:
                for fd in self._fds:
                    os.fsync(fd)
            close_all(self._fds)
            text = json.dumps(index_of(self._plan, self._source, self._folder, boot), indent=1)
            (self._folder / INDEX).write_text(text, encoding="utf-8")
            with alone_in(self._root):
                self._publish()
        except OSError as error:
            raise OffloadError(f"{self._plan.folder}: cannot be finished: {error.strerror or error}") from error
        # Now there is nothing left but what another process's folder made needless.
        self.abandon()

    def _publish(self) -> None:
        final = self._plan.folder
        if is_finished(self._plan):
            # Another process was first: its files are ours, byte for byte, and may be in use.
            return
        if final.is_dir() and not final.is_symlink():
            shutil.rmtree(final)
        else:
            final.unlink(missing_ok=True)
        self._folder.rename(final)

    def abandon(self) -> None:
        """Remove everything; a second call does nothing."""
        close_read(self._fds)
        if os.getpid() != self._process:
            # A child that was forked meanwhile: the folder is its parent's, who still writes.
            close_read(self._locks)
            return
        shutil.rmtree(self._folder, ignore_errors=True)
        release(self._locks)


def settle(plan: OffloadPlan) -> None:
    """A folder that is used again: once its bytes are on the disk, let its index say so, for after the next start.

    Only when the kernel had the time to write them by itself, so that nobody waits; and only where we may write.

    Raises:
        OffloadError: it is not as it was planned any more, or the disk lost some of it.
    """
    table = read_finished(plan)
    if isinstance(table, str):
        raise OffloadError(
            f"{plan.folder}: was removed or changed since it was planned ({table}); load again, to write it anew"
        )
    _tidy(plan.folder.parent)
    index = plan.folder / INDEX
    try:
        if table["boot"] is None or time.time() - index.stat().st_mtime < _WRITTEN_BACK:
            return
        for file in plan.files:
            sync(plan.folder / file.name)
        # Of a killed load; to a live one that is at it as well this one's does as well.
        for left in plan.folder.glob(f".{INDEX}-*.tmp"):
            left.unlink(missing_ok=True)
        mended = plan.folder / f".{INDEX}-{os.getpid()}-{secrets.token_hex(4)}.tmp"
        try:
            anew = index_of(plan, str(table.get("source")), plan.folder, None)
            mended.write_text(json.dumps(anew, indent=1), encoding="utf-8")
            sync(mended)
            mended.replace(index)
        finally:
            mended.unlink(missing_ok=True)
    except OSError as error:
        if error.errno == errno.EIO:
            raise OffloadError(f"{plan.folder}: the disk lost some of it ({error.strerror}); remove it") from error


def sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    fds = OpenFiles()
    try:
        open_into(fds, path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        os.fsync(fds[0])
    finally:
        close_read(fds)


def _tidy(root: Path) -> None:
    """As `_sweep`, unless someone else is busy there."""
    if not any(_TEMPORARY.fullmatch(folder.name) for folder in root.glob(".*.tmp")):
        return
    held = OpenFiles()
    try:
        hold(held, root)
        _sweep(root)
    except OSError:
        return
    finally:
        undisturbed(functools.partial(release, held))


def _sweep(root: Path) -> None:
    """Remove what killed writers left; the lock of a live one protects its folder."""
    for folder in root.glob(".*.tmp"):
        if _TEMPORARY.fullmatch(folder.name) and not folder.is_symlink() and is_abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _check_free(root: Path, size: int) -> None:
    free = shutil.disk_usage(root).free
    if free < size:
        raise OffloadError(
            f"{root}: the offloaded weights need {format_size(size)}, the disk has {format_size(free)} "
            "free; give offload_folder on another disk, or a smaller dtype"
        )


def reserve(fd: int, size: int) -> None:
    """Give a file its final size and, where the file system can, its blocks: so a full disk shows now and not later."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
            return
        except OSError as error:
            # The file system cannot reserve; a full disk then shows while writing.
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    os.ftruncate(fd, size)
