"""Buffers for weights that are made at use: which of them there are, and whose turn it is to be overwritten.

Bookkeeping only: whoever uses a ring holds a lock around every call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any, Literal

import torch

from .._strides import row_major
from ..errors import RunningError

Kind = Literal["passing", "part", "kept"]


class Entry:
    """A weight, or a part of one, in a buffer.

    Attributes:
        tensor: the buffer, with the weight's shape and dtype.
        kind: `passing` (overwritten when what uses it is done), `part` (when it is the one that was not used for the
            longest time), or `kept`.
        ready: whether its values are there, or on their way (see `ticket`).
        used: whether anyone took it since it was made.
        ticket: of the device: when its values are there.
        users: of the device: what was told to work with it since it was made.
        maker: the thread that makes it because it waits for it, or None.
        version: torch's count of writes to it, when its values were there; None for what may be written to.
    """

    __slots__ = ("kind", "maker", "nbytes", "ready", "tensor", "ticket", "used", "users", "version")

    def __init__(self, tensor: torch.Tensor, nbytes: int, kind: Kind) -> None:
        self.tensor = tensor
        self.nbytes = nbytes
        self.kind = kind
        self.ready = False
        self.used = False
        self.ticket: Any = None
        self.users: list[Any] = []
        self.version: int | None = None
        self.maker: int | None = None

    @property
    def is_changed(self) -> bool:
        """Whether someone wrote to it, through a view of the weight."""
        return self.version is not None and self.tensor._version != self.version

    @property
    def is_idle(self) -> bool:
        """Whether nobody else holds the memory: a view that someone kept must not change under them."""
        return _holders(self.tensor) <= _OWN


class Ring:
    """Buffers of at most `capacity` bytes in all.

    Args:
        capacity: bytes. More is taken only where a single operation, or someone who kept a weight, needs it.
        ahead: bytes of it that are never used for what is kept.
        allocate: gives a flat uint8 tensor of that many bytes.
        stamp: of the device: tells when all is done that a `user` was told until now.
    """

    def __init__(
        self,
        capacity: int,
        ahead: int,
        allocate: Callable[[int], torch.Tensor],
        stamp: Callable[[Any], Any] = lambda user: None,
    ) -> None:
        self.capacity = capacity
        self.held = 0
        self._most_kept = capacity - ahead
        self._kept = 0
        self._allocate = allocate
        self._stamp = stamp
        self._entries: dict[Hashable, Entry] = {}
        # What was written to, and is in no buffer any more.
        self._changed: set[Hashable] = set()

    def find(self, key: Hashable) -> Entry | None:
        """What is there under this key, ready or being made."""
        return self._entries.get(key)

    def take(self, entry: Entry, key: Hashable, user: Any = None, name: str = "a weight") -> torch.Tensor:
        """The weight, for use: a tensor of its own over the same memory, so that it is seen when it is let go.

        Raises:
            RunningError: it was written to since it was made.
        """
        if entry.is_changed or key in self._changed:
            # Told once: made anew after that.
            self.drop(key)
            self._changed.discard(key)
            raise RunningError(
                f"{name!r} is on disk and was changed through a view of it, while it was in memory for an operation, "
                "which cannot be kept; load the model with it in memory (device_map=), or change the checkpoint"
            )
        # Whether it stays is decided at its first use: much that was made ahead is never used.
        if not entry.used and entry.kind == "passing" and self._kept + entry.nbytes <= self._most_kept:
            entry.kind = "kept"
            self._kept += entry.nbytes
        entry.used = True
        if user is not None and user not in entry.users:
            entry.users.append(user)
        if entry.kind == "part":
            # The last one is the one that was used last.
            self._entries[key] = self._entries.pop(key)
        return entry.tensor.detach()

    def admit(
        self, key: Hashable, shape: tuple[int, ...], dtype: torch.dtype, *, is_part: bool, needed: bool
    ) -> tuple[Entry, Any] | None:
        """A place for a weight, and when it may be written to (a stamp, or several in a tuple; None: now).

        Args:
            key: by which it is found.
            shape: of the weight.
            dtype: of the weight.
            is_part: of a larger weight, such as an expert.
            needed: an operation waits for it: what was made ahead of others makes room too, and the capacity is passed
                where even that does not do.

        Returns:
            None where there is no room and it is not needed now.
        """
        nbytes = dtype.itemsize * torch.Size(shape).numel()
        # What several threads, or someone who kept weights, needed once is not needed for ever.
        self._free(0, needed=False, is_part=True)
        found = self._find_buffer(nbytes, needed, is_part)
        if found is None:
            if self.held + nbytes > self.capacity and not needed:
                return None
            found = self._allocate(nbytes).untyped_storage(), None
            self.held += nbytes
        storage, ready_at = found
        if is_part:
            self._kept += nbytes
        # Not a view of another tensor, which would hold the memory as well.
        tensor = torch.empty(0, dtype=dtype, device=storage.device).set_(storage, 0, shape, row_major(shape))
        del storage, found
        entry = Entry(tensor, nbytes, "part" if is_part else "passing")
        self._entries[key] = entry
        return entry, ready_at

    def drop(self, key: Hashable) -> None:
        """Forget what could not be made."""
        if key in self._entries:
            self.held -= self._forget(key).nbytes

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self.held = self._kept = 0

    def _find_buffer(self, nbytes: int, needed: bool, is_part: bool) -> tuple[torch.UntypedStorage, Any] | None:
        """A buffer of just this size, of what has passed; or room for another."""
        if not nbytes:
            return None
        for key, entry in self._entries.items():
            if entry.nbytes == nbytes and entry.kind == "passing" and self._is_over(entry):
                return self._take_buffer(key)
        return self._free(nbytes, needed, is_part)

    def _free(self, nbytes: int, needed: bool, is_part: bool) -> tuple[torch.UntypedStorage, Any] | None:
        """Let go of buffers until there is room for that many bytes, or one of just this size is found."""
        if self.held + nbytes <= self.capacity:
            return None
        for key in [*self._expendable(needed, is_part)]:
            if self.held + nbytes <= self.capacity:
                break
            if self._entries[key].nbytes == nbytes:
                return self._take_buffer(key)
            self.held -= self._forget(key).nbytes
        return None

    def _take_buffer(self, key: Hashable) -> tuple[torch.UntypedStorage, Any]:
        entry = self._forget(key)
        return entry.tensor.untyped_storage(), self._stamps(entry)

    def _expendable(self, needed: bool, is_part: bool) -> Iterator[Hashable]:
        """Keys in the order in which they may be let go of."""
        by_kind = {
            kind: [k for k, e in self._entries.items() if e.kind == kind] for kind in ("passing", "part", "kept")
        }
        yield from (k for k in by_kind["passing"] if self._is_over(self._entries[k]))
        if needed or is_part:
            yield from (k for k in by_kind["part"] if self._is_over(self._entries[k]))
        if needed:
            # Made ahead of its use, which has not come; the farthest first.
            yield from (k for k in reversed(by_kind["passing"]) if self._is_unused(self._entries[k]))
            yield from (k for k in reversed(by_kind["kept"]) if self._entries[k].ready and self._entries[k].is_idle)

    def _forget(self, key: Hashable) -> Entry:
        entry = self._entries.pop(key)
        if entry.is_changed:
            self._changed.add(key)
        if entry.kind != "passing":
            self._kept -= entry.nbytes
        return entry

    def _is_over(self, entry: Entry) -> bool:
        # Whatever works with it holds it, until the device was told all.
        return entry.ready and entry.used and entry.is_idle

    def _is_unused(self, entry: Entry) -> bool:
        return entry.ready and not entry.used and entry.is_idle

    def _stamps(self, entry: Entry) -> Any:
        """When all who were told to work with it are done."""
        found = tuple(self._stamp(user) for user in entry.users)
        return found[0] if len(found) == 1 else found or None


def _holders(tensor: torch.Tensor) -> int:
    """How many tensors, and others, hold the memory of this one."""
    storage: Any = tensor.untyped_storage()
    count: int = torch._C._storage_Use_Count(storage._cdata)
    return count


# What the count is when nobody else does.
_OWN = _holders(torch.empty(1))
