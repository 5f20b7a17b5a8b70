"""The control room of ranks that load together: all of them end well, or all of them with one rank's error.

The members are the nodes of a tree, in which each has one parent and at most `WIDTH` children, with a link
(links.py) to each. A load is a number of rounds. In each, a member that has said its part and heard all its children's
sends the sum to its parent; the root then has all parts and sends them down to everybody. The last round says nothing
but "done", and when it comes down each member takes its leave over each of its links.

A member that fails sends its error over all its links at once. One that hears of a failure, or finds that the process
at the other end of a link is gone, does the same once, so that the news crosses the whole tree.

Why every thread ends: a reader ends with a leave or a failure, which is also the last thing that a writer sends. When
the last round has come down, a member puts a leave into each writer; when a failure is known, a failure. One of the two
happens to every member: who waits for a round waits for members that will say their parts, fail or die, and each of
these reaches it. Both may happen to two ends of a link (a member dies after the last round); each of them is an end.

Why nothing stays for the next load: links are made for one load and named by its number, which each rank counts in the
store, and by its members. They cost 30 ms, and nothing to who does not wait for them: readers connect.

Members that fail before others came: the error is also put into the store, and who comes late to a link reads it there
(Link._meet). A rank that missed a load which failed for others is so told of it in its next one, and is then in step.

Two limits that no protocol lifts. When a member dies after the root has sent down the last round, some may have heard
of it and not others: then some end well and some fail. And a rank that dies before it comes to its first link is, to
the others, one that has not come yet: they wait for `COMING`, unless who started the ranks (torchrun) ends them.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..errors import OptionError, RankError
from .links import SILENCE, Kind, Link

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

WIDTH = 8
# Characters of an error that are told to the others.
LONGEST = 4000
# Seconds for the others to take leave after a failure, which a stopped process does not; and for threads to end then.
_LEAVING = 5.0
_CUTTING = 1.0
# A wait without an end is not interrupted by Ctrl-C everywhere.
_LOOK_UP = 1.0


class Together:
    """The members of a load, seen from one of them: `with Together(members) as together: ...`.

    Leaving the block waits until all members are done. An error that leaves it is told to the others, which then raise
    `RankError` with its text: where they call `check`, in `exchange`, or when they leave the block. Every member must
    enter, and call `exchange` equally often. One member alone makes no links and no threads.

    Args:
        members: global ranks, this one among them, in the same order or another on each.

    Attributes:
        members: the ranks, sorted.
        rank: this one.

    Raises:
        OptionError: the default process group is not there, or this rank is not a member.
    """

    def __init__(self, members: Sequence[int]) -> None:
        self.members = tuple(sorted(set(members)))
        self.rank = _own_rank(self.members)
        # A bare lock: a Ctrl-C inside a condition's own `__enter__`, written in Python, would leave it locked.
        self._turn = threading.RLock()
        self._news = threading.Condition(self._turn)
        self._store: Store | None = None
        self._parent: Link | None = None
        self._children: list[Link] = []
        # Rounds: what this member says, what its children's parts of the tree said, and what all said.
        self._own: tuple[Kind, list[Any]] | None = None
        self._parts: dict[Link, tuple[Kind, list[Any]]] = {}
        self._whole: list[Any] | None = None
        self._is_over = False
        self._failure: tuple[int, str] | None = None

    def __enter__(self) -> Together:
        if len(self.members) > 1:
            self._make_links()
            try:
                for link in self._links:
                    link.start()
            except BaseException as error:
                self._end(error)
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            try:
                self.finish()
            except BaseException as late:
                self._end(late)
                raise
        self._end(error)

    def check(self) -> None:
        """Learn whether all is well so far. Takes no time.

        Raises:
            RankError: another member has failed, or is gone.
        """
        if self._failure is not None:
            rank, why = self._failure
            raise RankError(why, rank=rank)

    def exchange(self, value: Any) -> list[Any]:
        """Tell all members a value, and wait for theirs: in the order of `members`, as JSON gives them back.

        Raises:
            RankError: another member has failed, or is gone.
            TypeError: the value has no form in JSON.
            ValueError: it contains itself.
        """
        return self._round(Kind.FACTS, json.loads(json.dumps(value)))

    def finish(self) -> None:
        """Wait until all members are done: what becomes of one after that ends nothing. Leaving the block does it too.

        Raises:
            RankError: another member has failed, or is gone.
        """
        if not self._is_over:
            self._round(Kind.DONE, None)

    def name_space(self, name: str) -> Store:
        """A store of this load, which all members share: for connections of their own."""
        from torch._C._distributed_c10d import PrefixStore

        assert self._store is not None, "one member alone shares nothing"
        return PrefixStore(name, self._store)

    @property
    def _links(self) -> list[Link]:
        return self._children if self._parent is None else [self._parent, *self._children]

    def _make_links(self) -> None:
        from torch._C._distributed_c10d import PrefixStore
        from torch.distributed.distributed_c10d import _get_default_store

        names = hashlib.sha1(repr(self.members).encode(), usedforsecurity=False).hexdigest()
        store = PrefixStore(f"lowmem/{names}", _get_default_store())
        # Counted there, not here: a default group that is made anew may have the same store, or another.
        load = store.add(f"loads of {self.rank}", 1)
        self._store = PrefixStore(str(load), store)
        at = self.members.index(self.rank)
        if at:
            self._parent = self._link((at - 1) // WIDTH, at)
        below = range(at * WIDTH + 1, min(at * WIDTH + 1 + WIDTH, len(self.members)))
        self._children = [self._link(child, child) for child in below]

    def _link(self, position: int, lower: int) -> Link:
        """The link with the member at `position`; its lower end names it."""
        from torch._C._distributed_c10d import PrefixStore

        assert self._store is not None
        return Link(
            PrefixStore(str(lower), self._store),
            self.members[position],
            is_upper=position == lower,
            heard=self._hear,
            lost=self._lose,
            withdrawn=self._come_late,
        )

    def _round(self, kind: Kind, value: Any) -> list[Any]:
        if len(self.members) == 1:
            return [value]
        with self._turn:
            self._own = kind, [[self.rank, value]]
            self._whole = None
            self._advance()
            while self._whole is None:
                self.check()
                self._news.wait(_LOOK_UP)
            return [value for _, value in sorted(self._whole, key=lambda said: said[0])]

    def _advance(self) -> None:
        """Pass on what is complete. In turn."""
        if self._own is None or len(self._parts) < len(self._children):
            return
        kind, said = self._own
        for _, part in self._parts.values():
            said = said + part
        parts, self._own, self._parts = self._parts, None, {}
        for link, (theirs, _) in parts.items():
            if theirs is not kind:
                # Without this, one would leave a load in which another still has a question.
                self._fail(link.peer, f"rank {link.peer} and rank {self.rank} are at different steps of the load")
                return
        if self._parent is not None:
            self._parent.say(kind, json.dumps(said).encode())
        else:
            self._settle(kind, said)

    def _settle(self, kind: Kind, whole: list[Any]) -> None:
        """A round is complete: tell those below. In turn."""
        if self._failure is not None:
            # Of who died or was interrupted after it had said its part.
            return
        body = json.dumps(whole).encode()
        self._is_over = kind is Kind.DONE
        for child in self._children:
            child.say(kind, body)
        if self._is_over:
            for link in self._links:
                link.say(Kind.BYE)
        self._whole = whole
        self._news.notify_all()

    def _hear(self, link: Link, kind: Kind, body: bytes) -> None:
        """A message has come; called by the link's reader."""
        if kind is Kind.FAILED:
            self._fail(*json.loads(body))
        elif kind is not Kind.BYE:
            with self._turn:
                if link is self._parent:
                    self._settle(kind, json.loads(body))
                else:
                    self._parts[link] = kind, json.loads(body)
                    self._advance()

    def _lose(self, link: Link, why: str) -> None:
        """The other end is gone; called by the link's reader."""
        told = self._read_failure()
        if told is not None:
            self._fail(*told)
        else:
            self._fail(link.peer, f"rank {link.peer} {why}")

    def _come_late(self, link: Link) -> None:
        """The other end had failed before this one came; called by the link's reader."""
        rank, why = self._read_failure() or (link.peer, f"rank {link.peer} has left the load")
        self._fail(rank, why)

    def _read_failure(self) -> tuple[int, str] | None:
        """What a member that failed has left in the store, if the store is still there."""
        assert self._store is not None
        try:
            if self._store.check(["failed"]):
                rank, why = json.loads(self._store.get("failed"))
                return rank, why
        except RuntimeError:
            pass
        return None

    def _fail(self, rank: int, why: str) -> None:
        """End the load for all, with the first reason that is known."""
        with self._turn:
            if self._failure is not None or self._is_over:
                return
            self._failure = rank, why
            self._news.notify_all()
        body = json.dumps([rank, why])
        for link in self._links:
            link.say(Kind.FAILED, body.encode())
        assert self._store is not None
        # It may be gone, with the process that held it; whoever is linked hears the reason all the same.
        with suppress(RuntimeError):
            self._store.set("failed", body)
        # After the reason is there to be read.
        for link in self._links:
            link.leave()

    def _end(self, error: BaseException | None) -> None:
        """Tell the others of an error of this rank, if it is one, and wait for the links' threads."""
        if len(self.members) == 1:
            return
        if error is not None:
            self._fail(self.rank, f"rank {self.rank}: {describe(error)}")
        # Who has not read that all is done must be let read it: the end of a connection would tell of a failure.
        patience = SILENCE.total_seconds() if self._failure is None else _LEAVING
        until = time.monotonic() + patience
        try:
            ended = [link.join(until) for link in self._links]
        except BaseException:
            ended = [False for _ in self._links]
            raise
        finally:
            self._cut([link for link, has_ended in zip(self._links, ended, strict=True) if not has_ended])

    def _cut(self, links: list[Link]) -> None:
        """End the threads of links whose other ends do not answer."""
        for link in links:
            link.cut()
        until = time.monotonic() + _CUTTING
        for link in links:
            link.join(until)


def describe(error: BaseException) -> str:
    """An error's type and text, cut to what is told to others."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _own_rank(members: tuple[int, ...]) -> int:
    """This process's global rank; that of the only member where nothing is distributed."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        if len(members) == 1:
            return members[0]
        raise OptionError(
            f"ranks {list(members)} are to load together, and torch.distributed has no default process group; "
            "call torch.distributed.init_process_group first"
        )
    rank = dist.get_rank()
    if rank not in members:
        raise OptionError(f"rank {rank} is not among those that are to load together ({list(members)})")
    return rank
