"""The bytes of a pickle, read once and forwards through a small window; what is long stays in the file, as `Span`."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, Protocol

from ..errors import CheckpointError

# Longer texts stay in the file. Keys and names are shorter.
MAX_TEXT = 65_536
# Bytes of all the texts that are held. A vocabulary has a few MB.
MAX_TEXTS = 1 << 26
# Longer than any pickle of protocol 0 needs that torch can write.
MAX_LINE = 1 << 20
# Turning digits into a number takes their square.
MAX_DIGITS = 640
# A number of more bytes stays in the file.
MAX_LONG = 255
_WINDOW = 1 << 16
# No opcode has more bytes before its text than these.
_PAD = bytes(16)


class Stream(Protocol):
    """Where a pickle is read from, once and forwards."""

    def read(self, n: int, /) -> bytes:
        """The next `n` bytes, or less at the end."""

    def skip(self, n: int, /) -> int:
        """Pass over `n` bytes, or less at the end; how many."""


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """Bytes or a text that stay where they are: `nbytes` of the file from `offset`.

    The kind `"latin1"` is bytes as protocol 2 writes them: as UTF-8 text, a character a byte.
    """

    offset: int
    nbytes: int
    kind: Literal["bytes", "text", "latin1", "integer"]


class Reader:
    """Reads what opcodes are followed by.

    Args:
        stream: where the pickle is; it is read ahead.
        offset: of the stream's next byte, in what spans and errors count in.
        name: the file, for messages.
    """

    def __init__(self, stream: Stream, offset: int, name: str) -> None:
        self.name = name
        self._stream = stream
        # `_buf` holds `_length` bytes of the stream from `_base` on, and padding; `_safe` is the last place in it from
        # where an opcode can be read whole.
        self._base, self._buf, self._length, self._at, self._safe = offset, _PAD, 0, 0, -1
        # The last two texts and where they lie: the data of an array is a text followed by the name of its encoding.
        self._recent: deque[tuple[str, int, int, bool]] = deque(maxlen=2)
        # Texts of one character are one object in Python, so a pickle names them once.
        self._single: dict[str, Span] = {}
        self._texts_left = MAX_TEXTS

    @property
    def position(self) -> int:
        """Where the next opcode lies: behind the pickle when `run` has returned."""
        return self._base + self._at

    def refuse(self, found: str) -> NoReturn:
        """Raise the error of a damaged pickle."""
        raise CheckpointError(
            f"{self.name}: byte {self.position}: expected a sound pickle, found {found[:200]}; download it again"
        )

    def span_of(self, text: str) -> Span | None:
        """Where a text of the last two lies in the file, or one of a single character."""
        for known, offset, nbytes, raw in self._recent:
            if known is text:
                return Span(offset, nbytes, "bytes" if raw else "text")
        return self._single.get(text) if len(text) == 1 else None

    def _refill(self, need: int) -> None:
        """Read on, so that `need` bytes stand at `_at`."""
        if self._at > self._length:
            self.refuse("its end")
        rest = self._buf[self._at : self._length]
        wanted = max(_WINDOW, need - len(rest))
        fresh = self._stream.read(wanted)
        self._base += self._at
        self._buf, self._length, self._at = b"".join((rest, fresh, _PAD)), len(rest) + len(fresh), 0
        self._safe = self._length - (len(_PAD) if len(fresh) == wanted else 1)
        if self._length < need:
            self.refuse("its end")

    def _take(self, n: int) -> bytes:
        if self._at + n > self._length:
            self._refill(n)
        self._at += n
        return self._buf[self._at - n : self._at]

    def _number(self, n: int) -> int:
        return int.from_bytes(self._take(n), "little")

    def _span(self, n: int, kind: Literal["bytes", "text", "latin1", "integer"]) -> Span:
        """Pass over the next `n` bytes."""
        span = Span(self._base + self._at, n, kind)
        here = self._length - self._at
        if n <= here:
            self._at += n
            return span
        if self._stream.skip(n - here) < n - here:
            self.refuse(f"{n} bytes claimed where fewer are left")
        self._base, self._buf, self._length, self._at, self._safe = span.offset + n, _PAD, 0, 0, -1
        return span

    def _spend_text(self, n: int) -> None:
        self._texts_left -= n
        if self._texts_left < 0:
            self.refuse(f"more than {MAX_TEXTS} bytes of text")

    def _text(self, n: int, raw: bool = False) -> Any:
        """A text of `n` bytes; of a raw one, which Python 2 wrote, it is not known whether it is text."""
        if n > MAX_TEXT:
            return self._span(n, "bytes" if raw else "text")
        self._spend_text(n)
        offset = self.position
        text = self._told(self._take(n), n, "bytes" if raw else "text")
        if type(text) is Span:
            return text
        self._recent.append((text, offset, n, raw))
        if len(text) == 1 and not raw and text <= "\xff":
            self._single[text] = Span(offset, n, "text")
        return text

    def _told(self, data: bytes, n: int, kind: Literal["bytes", "text"]) -> Any:
        """The text of what was read last, in `n` bytes, or its place: Python's pickles keep halves of surrogate pairs.

        Not the text with escapes for what is no UTF-8: two names would be one.
        """
        try:
            return str(data, "utf-8")
        except UnicodeDecodeError:
            return Span(self.position - n, n, kind)

    def _line(self) -> bytes:
        """Up to the end of the line, as protocol 0 writes its arguments."""
        while (end := self._buf.find(b"\n", self._at, self._length)) < 0:
            have = self._length - self._at
            if have > MAX_LINE:
                self.refuse(f"a line of more than {MAX_LINE} bytes")
            self._refill(have + 1)
        line = self._buf[self._at : end]
        self._at = end + 1
        self._spend_text(len(line))
        return line

    def _digits(self) -> bytes:
        line = self._line()
        if len(line) > MAX_DIGITS:
            self.refuse(f"a number of {len(line)} digits")
        return line
