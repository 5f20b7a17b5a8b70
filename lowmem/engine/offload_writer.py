"""Write the offload folder: under a temporary name, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from pathlib import Path

from ..errors import OffloadError
from ..planner.offload import INDEX, index_of, is_finished
from ..planner.records import OffloadPlan, Placement
from ..sizes import format_size
from .destinations import FileDestination


class OffloadWriter:
    """The folder while it is written; `finish` gives it its name, `abandon` removes it."""

    def __init__(self, plan: OffloadPlan, source: str) -> None:
        self._plan = plan
        self._source = source
        self._fds: dict[str, int] = {}
        self._folder = _make_folder(plan)
        try:
            for file in plan.files:
                self._fds[file.name] = _create(self._folder / file.name, file.head, file.size)
        except BaseException:
            self.abandon()
            raise

    def destination(self, placement: Placement) -> FileDestination:
        """The range of the file that belongs to `placement`."""
        file = next(f for f in self._plan.files if placement.target in f.spans)
        path = os.fspath(self._folder / file.name)
        return FileDestination(placement, self._fds[file.name], file.spans[placement.target][0], path)

    def finish(self) -> None:
        """Everything is written: sync, write the index, rename.

        Raises:
            OffloadError: the disk failed at the last moment.
        """
        final = self._plan.folder
        try:
            for fd in self._fds.values():
                # Otherwise a power cut could leave a finished name over unwritten bytes.
                os.fsync(fd)
            self._close()
            text = json.dumps(index_of(self._plan, self._source), indent=1)
            (self._folder / INDEX).write_text(text, encoding="utf-8")
            if final.exists() and not is_finished(self._plan):
                shutil.rmtree(final)
            try:
                self._folder.rename(final)
            except OSError:
                # Another process finished the same folder first: its files are ours, byte for byte.
                if not is_finished(self._plan):
                    raise
                self.abandon()
        except OSError as error:
            self.abandon()
            raise OffloadError(f"{final}: cannot be finished: {error.strerror or error}") from error

    def abandon(self) -> None:
        """Remove everything; a second call does nothing."""
        self._close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _close(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])


def _make_folder(plan: OffloadPlan) -> Path:
    root = plan.folder.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(root).free
        if free < plan.nbytes:
            raise OffloadError(
                f"{root}: the offloaded weights need {format_size(plan.nbytes)}, the disk has {format_size(free)} "
                "free; give offload_folder on another disk, or a smaller dtype"
            )
        return Path(tempfile.mkdtemp(prefix=f".{plan.folder.name}-", suffix=".tmp", dir=root))
    except OSError as error:
        raise OffloadError(
            f"{root}: cannot be written: {error.strerror or error}; give another offload_folder"
        ) from error


def _create(path: Path, head: bytes, size: int) -> int:
    """A file of its final size whose blocks are reserved, so that a full disk shows now and not in the middle."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o644)
        try:
            _reserve(fd, size)
            os.write(fd, head)
        except BaseException:
            os.close(fd)
            raise
    except OSError as error:
        raise OffloadError(
            f"{path}: cannot reserve {format_size(size)}: {error.strerror or error}; "
            "give offload_folder on another disk"
        ) from error
    return fd


def _reserve(fd: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
            return
        except OSError as error:
            # The file system cannot reserve; a full disk then shows while writing.
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    os.ftruncate(fd, size)
