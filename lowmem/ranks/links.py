"""A connection between two ranks for one load: messages both ways, and the news when the other end is gone.

Each link is a gloo context of its two ranks alone. torch's own subgroups would not do: they connect every rank with
every other, their names depend on how many groups each rank has made before, making one waits for all of its members,
and a thread that receives from any of them does not learn that one is gone.

Two threads serve a link. The reader connects and then always has a receive posted, which fails at once when the other
process ends. The writer sends what was put before it. A gloo send ends only when the other side receives; since no
reader ever sends, none waits for a writer, and there is no circle in which all could wait.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from .._shared import Stop

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

# A load may take hours, so a live rank says so; and a machine without power says nothing, not even that it is gone.
BEAT_EVERY = 60.0
SILENCE = timedelta(minutes=30)
# As long as torch waits by itself for ranks that come late to a collective.
COMING = timedelta(minutes=30)
# Both sides are there when it begins. One that is killed in these milliseconds is missed only when they are over.
CONNECTING = timedelta(seconds=15)
_LONGEST_PAUSE = 0.2
# Added to the count of those that came to a link by one who came and went. More than there can be of them.
_GONE = 16


class Kind(IntEnum):
    """What a message is."""

    BEAT = 0  # nothing but life
    FACTS = 1  # part of a round, upwards; the whole of it, downwards
    DONE = 2  # the same of the last round
    FAILED = 3  # the load has failed, and nothing follows
    BYE = 4  # the load is done everywhere, and nothing follows


LAST = (Kind.FAILED, Kind.BYE)
GONE = "ended without a word (killed, or its machine is gone)"


class Link:
    """One end of a connection; serves one load.

    Args:
        store: shared by the two ends, with a prefix that no other link uses.
        peer: the global rank at the other end.
        is_upper: whether this end is the one nearer to the root.
        heard: called by the reader with every message but beats.
        lost: called by the reader when the link does not come about or breaks, with what happened: words that may
            follow "rank 5".
        withdrawn: called by the reader when the other end had left before this one came.
    """

    def __init__(
        self,
        store: Store,
        peer: int,
        *,
        is_upper: bool,
        heard: Callable[[Link, Kind, bytes], None],
        lost: Callable[[Link, str], None],
        withdrawn: Callable[[Link], None],
    ) -> None:
        self.peer = peer
        self._store = store
        self._number = 0 if is_upper else 1
        self._heard = heard
        self._lost = lost
        self._withdrawn = withdrawn
        self._leaving = Stop()
        self._outbox: queue.SimpleQueue[tuple[Kind, bytes]] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name=f"lowmem-from-rank-{peer}", daemon=True)
        self._writer = threading.Thread(target=self._write, name=f"lowmem-to-rank-{peer}", daemon=True)
        self._wire: Any = None

    def start(self) -> None:
        """Begin to connect. Waits for nobody.

        Raises:
            RuntimeError: the system has no more threads.
        """
        self._reader.start()

    def say(self, kind: Kind, body: bytes = b"") -> None:
        """Send a message when there is a connection; after one of `LAST`, none any more. Waits for nobody."""
        self._outbox.put((kind, body))

    def leave(self) -> None:
        """Wait no longer for the other end, if it has not come."""
        self._leaving.say()

    def join(self, until: float) -> bool:
        """Wait for the threads, until `time.monotonic()` is `until`; whether they have ended."""
        # The reader first, which starts the writer.
        for thread in (self._reader, self._writer):
            if thread.ident is not None:
                thread.join(max(0.0, until - time.monotonic()))
        if self._reader.is_alive() or self._writer.is_alive():
            return False
        # With its sockets.
        self._wire = None
        return True

    def cut(self) -> None:
        """Close the connection under the threads, which then end: one that waits when Python ends takes it down."""
        self.leave()
        wire = self._wire
        if wire is not None:
            wire.close()

    def _read(self) -> None:
        # Whatever goes wrong: the thread that waits for this one must learn of it.
        try:
            if not self._meet():
                return
            self._wire = _Wire(self._store, self._number)
            self._writer.start()
        except Exception as error:
            self._lost(
                self,
                f"cannot be reached ({_first_line(error)}): it has ended, or the process that holds torch's store has, "
                "or gloo takes a network interface that leads nowhere (GLOO_SOCKET_IFNAME chooses one)",
            )
            return
        try:
            while self._take():
                pass
        except Exception as error:
            self._lost(self, GONE if "by peer" in str(error) else f"is gone ({_first_line(error)})")

    def _take(self) -> bool:
        """Receive a message; whether another follows."""
        kind, body = self._wire.receive()
        if kind is not Kind.BEAT:
            self._heard(self, kind, body)
        return kind not in LAST

    def _meet(self) -> bool:
        """Wait for the other end; whether it is there.

        Who comes first counts 1 and waits for the 2 that the other counts. Who leaves while it waits adds `_GONE`: if
        that shows the other's 2 it came in between, and is already connecting; otherwise it will find the sum, connect
        to nobody, and look up what was left to read.
        """
        count = self._store.add("met", 1)
        if count != 1:
            if count != 2:
                self._withdrawn(self)
            return count == 2
        pause, until = 0.001, time.monotonic() + COMING.total_seconds()
        while count == 1:
            if self._leaving.wait(pause):
                count = self._store.add("met", _GONE)
                return count == 2 + _GONE
            if time.monotonic() > until:
                self._lost(self, f"has not come to the load within {COMING}")
                continue
            count = self._store.add("met", 0)
            pause = min(2 * pause, _LONGEST_PAUSE)
        return True

    def _write(self) -> None:
        kind = Kind.BEAT
        try:
            while kind not in LAST:
                try:
                    kind, body = self._outbox.get(timeout=BEAT_EVERY)
                except queue.Empty:
                    kind, body = Kind.BEAT, b""
                self._wire.send(kind, body)
        # torch's errors of connections are of this class; gloo has no finer ones.
        except RuntimeError:
            # The reader of this end is told the same, by an error of its own.
            pass


class _Wire:
    """Messages over a gloo context of two ranks: a header of two numbers, kind and length, and as many bytes."""

    def __init__(self, store: Store, number: int) -> None:
        import torch.distributed as dist

        self._peer = 1 - number
        # Not registered with torch, which would give it a name and destroy it with the default group.
        self._group: Any = dist.ProcessGroupGloo(store, number, 2, CONNECTING)

    def send(self, kind: Kind, body: bytes) -> None:
        import torch

        parts = [torch.tensor([kind, len(body)])]
        if body:
            parts.append(torch.frombuffer(bytearray(body), dtype=torch.uint8))
        for part in parts:
            self._group.send([part], self._peer, 0).wait(SILENCE)

    def receive(self) -> tuple[Kind, bytes]:
        import torch

        header = torch.empty(2, dtype=torch.int64)
        self._group.recv([header], self._peer, 0).wait(SILENCE)
        kind, length = header.tolist()
        body = torch.empty(length, dtype=torch.uint8)
        if length:
            self._group.recv([body], self._peer, 0).wait(SILENCE)
        return Kind(kind), body.numpy().tobytes()

    def close(self) -> None:
        import torch

        # A wait that runs out of time closes the connection: the one way to do so in every version of torch.
        with suppress(RuntimeError):
            self._group.recv([torch.empty(1)], self._peer, 1).wait(timedelta(milliseconds=1))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
