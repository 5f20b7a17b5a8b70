"""Pickles decoded and not executed: nothing is imported, nothing is called, there is no list of what is allowed.

The opcodes are those of protocols 0 to 5 (Python's `Lib/pickletools.py` and `Lib/pickle.py`). What they would call is
kept as `Inert`. A pickle may be hostile: what one opcode costs is bounded, and so is their number. Only text and small
numbers are hashed, and nothing is compared: a tuple that shares its parts is cheap to write and takes for ever to hash.
Bytes and long texts stay in the file, as `Span`.
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import UnsupportedError
from .pickle_bytes import MAX_LONG, MAX_TEXTS, Reader, Span, Stream

__all__ = ["MAX_STEPS", "Dict", "Extension", "Global", "Inert", "Key", "Machine", "Persistent", "Span"]

# Opcodes of one pickle. A checkpoint needs 32 a tensor, so this is 250,000 of them, in some seconds.
MAX_STEPS = 8_000_000
# Bytes, measured with 40,000 tensors (32 opcodes each), with 200,000 texts, and with dicts of numbers: 25 to 60. What
# is made to take much takes 70: so many opcodes in any file, and one more for so many bytes of it.
MEMORY_OF_A_STEP, _FOR_ANY, _BYTES_OF_A_STEP = 60, 850_000, 72
# Different names of classes and functions. A checkpoint has some dozens.
MAX_GLOBALS = 65_536
# Hashes of numbers above are taken modulo 2**61 - 1, so that a file could choose keys that all collide.
_MAX_INT_KEY = 1 << 60
_WORD = struct.Struct("<I")
# What a built object may have been put in the memo before, at most: numpy has a dozen.
_LOOK_BACK = 64


@dataclass(frozen=True, slots=True)
class Global:
    """The name of a class or function; nothing of that name was looked for.

    Attributes:
        module: where it is.
        name: what it is there.
        path: both, with a dot between.
    """

    module: str
    name: str
    path: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", f"{self.module}.{self.name}")


class Inert:
    """An object that was not made: what would have been called, and with what.

    Attributes:
        what: a `Global`, or whatever the pickle would have called.
        args: the arguments.
        kwargs: named arguments of `__new__`, or None.
        state: what its `__setstate__` would have been given last, or None.
        items: what was appended or added.
        pairs: the mapping that was set on it, or None; keys as in every dict of a pickle (see `Key`).
    """

    __slots__ = ("args", "items", "kwargs", "pairs", "state", "what")

    def __init__(self, what: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> None:
        self.what = what
        self.args = args
        self.kwargs = kwargs
        self.state: Any = None
        self.items: Sequence[Any] = ()
        self.pairs: dict[Any, Any] | None = None

    def __repr__(self) -> str:
        return f"Inert({self.what!r})" if type(self.what) is Global else "Inert"


class Dict(dict[Any, Any]):
    """A dict of a class that adds nothing to how it is read, such as `OrderedDict`; its state is kept.

    Attributes:
        what: its class.
        state: its attributes, such as the `_metadata` of a state dict, or None.
    """

    __slots__ = ("state", "what")

    def __init__(self, what: Global) -> None:
        self.what = what
        self.state: Any = None


@dataclass(frozen=True, slots=True, eq=False)
class Key:
    """A key of a dict that is not text, None or a number of usual size: held and not hashed."""

    value: Any = field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class Persistent:
    """A reference to something outside of the pickle."""

    value: Any = field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class Extension:
    """A number of `copyreg`'s registry; it was not looked up."""

    code: int


class Machine(Reader):
    """Decodes one pickle. Subclasses say what calls mean, by the path of what is called: see `meanings`.

    Args:
        stream: where the pickle is; it is read ahead.
        offset: of the stream's next byte, in what spans and errors count in.
        name: the file, for messages.
    """

    def __init__(self, stream: Stream, offset: int, name: str) -> None:
        self.meanings: dict[str, Callable[[Global, tuple[Any, ...]], Any]] = {
            **dict.fromkeys(_MAPPINGS, self._mapping),
            **dict.fromkeys(("copyreg._reconstructor", "copy_reg._reconstructor"), self._reconstructed),
            **dict.fromkeys(("copyreg.__newobj__", "copy_reg.__newobj__"), self._new_object),
            "_codecs.encode": self._encoded,
        }
        super().__init__(stream, offset, name)
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._globals: dict[tuple[str, str], Global] = {}
        self._copies_left = self.most = MAX_STEPS
        self.steps = 0

    def limit(self, size: int) -> None:
        """Let decoding take no more memory than 60 MB and the `size` bytes of the file."""
        self._copies_left = self.most = min(MAX_STEPS, _FOR_ANY + size // _BYTES_OF_A_STEP)

    def run(self) -> Any:
        """Decode up to STOP.

        Raises:
            CheckpointError: damaged, or beyond the bounds above.
            UnsupportedError: of a later protocol, or with parts in other places.
        """
        buf, at, safe, stack = self._buf, self._at, self._safe, self._stack
        memo, recent, handlers, texts, word = self._memo, self._recent, _HANDLERS, 0, _WORD.unpack_from
        try:
            # The commonest opcodes, by how often they are met: a method for each takes twice the time.
            for step in range(self.most):
                if at > safe:
                    self._at = at
                    self._refill(1)
                    buf, at, safe = self._buf, self._at, self._safe
                op = buf[at]
                at += 1
                if op == 0x72:  # LONG_BINPUT
                    memo[word(buf, at)[0]] = stack[-1]
                    at += 4
                elif op == 0x68:  # BINGET
                    stack.append(memo[buf[at]])
                    at += 1
                elif op == 0x4B:  # BININT1
                    stack.append(buf[at])
                    at += 1
                elif op == 0x28:  # MARK
                    self._marks.append(stack)
                    stack = self._stack = []
                elif op == 0x74:  # TUPLE
                    items = tuple(stack)
                    stack = self._stack = self._marks.pop()
                    stack.append(items)
                elif op == 0x94:  # MEMOIZE
                    memo[len(memo)] = stack[-1]
                elif op == 0x58 and at + 6 < (end := at + 4 + word(buf, at)[0]) <= safe and buf[at + 4 : end].isascii():
                    text = str(buf[at + 4 : end], "ascii")  # BINUNICODE, of usual length and letters
                    recent.append((text, self._base + at + 4, end - at - 4, False))
                    stack.append(text)
                    texts += end - at
                    at = end
                    if texts > MAX_TEXTS:
                        self._spend_text(texts)
                elif op == 0x86:  # TUPLE2
                    last = stack.pop()
                    stack[-1] = (stack[-1], last)
                elif op == 0x2E:  # STOP
                    self._at, self.steps = at, step
                    return stack.pop()
                else:
                    self._at = at
                    handlers[op](self)
                    buf, at, safe, stack = self._buf, self._at, self._safe, self._stack
        except (IndexError, KeyError, TypeError, ValueError, AttributeError, struct.error) as error:
            if buf is self._buf:
                self._at = max(self._at, at)
            self.refuse(f"an opcode that does not fit what stands before it ({type(error).__name__}: {error})")
        raise UnsupportedError(f"{self.name}: more than {self.most} opcodes for so few bytes; save weights alone")

    def call(self, what: Any, args: tuple[Any, ...]) -> Any:
        """What stands for `what(*args)`, which is not called."""
        if type(what) is Global and (meaning := self.meanings.get(what.path)) is not None:
            return meaning(what, args)
        return Inert(what, args)

    def build(self, thing: Inert, state: Any) -> Any:
        """What stands for `thing` when it was given `state`."""
        thing.state = state
        return thing

    def persist(self, value: Any) -> Any:
        """What stands for a persistent id."""
        return Persistent(value)

    def _mapping(self, what: Global, args: tuple[Any, ...]) -> Any:
        made = Dict(what)
        if args and type(args[-1]) in (list, tuple, dict, Dict):
            # Python 2 gave the pairs as an argument. Each copy counts, since one list can be named many times.
            pairs = args[-1].items() if isinstance(args[-1], dict) else args[-1]
            self._spend_copies(len(pairs))
            for pair in pairs:
                if type(pair) not in (list, tuple) or len(pair) != 2:
                    raise ValueError("pairs that are none")
                made[_key(pair[0])] = pair[1]
        return made

    def _reconstructed(self, what: Global, args: tuple[Any, ...]) -> Any:
        """Objects of protocols 0 and 1: `_reconstructor(class, base, value of the base)`."""
        if len(args) != 3:
            return Inert(what, args)
        made = self._made(args[0], ())
        if isinstance(args[2], dict) and type(made) is Inert:
            made.pairs = args[2]
        return made

    def _new_object(self, what: Global, args: tuple[Any, ...]) -> Any:
        self._spend_copies(len(args))
        return self._made(args[0], args[1:]) if args else Inert(what)

    def _spend_copies(self, n: int) -> None:
        self._copies_left -= n
        if self._copies_left < 0:
            self.refuse("values copied many times")

    def _made(self, what: Any, args: tuple[Any, ...], kwargs: Any = None) -> Any:
        """A new object of the class `what`."""
        if type(what) is Global and what.path in _MAPPINGS:
            return Dict(what)
        return Inert(what, args, kwargs)

    def _encoded(self, what: Global, args: tuple[Any, ...]) -> Any:
        if len(args) != 2 or type(args[1]) is not str or args[1] not in ("latin1", "latin-1"):
            return Inert(what, args)
        span = self.span_of(args[0]) if type(args[0]) is str else args[0]
        if type(span) is not Span or span.kind != "text":
            return Inert(what, args)
        return Span(span.offset, span.nbytes, "latin1")

    def _global(self, module: Any, name: Any) -> Global:
        if type(module) is not str or type(name) is not str:
            raise TypeError("a name that is not text")
        made = self._globals.get((module, name))
        if made is None:
            if len(self._globals) >= MAX_GLOBALS:
                self.refuse(f"more than {MAX_GLOBALS} different classes and functions")
            made = self._globals[module, name] = Global(module, name)
        return made

    def _pop_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._marks.pop()
        return items

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, Inert):
            if type(target.items) is not list:
                target.items = []
            target = target.items
        if type(target) is not list:
            raise TypeError("items for what is no list")
        target.extend(items)

    def _update(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, Inert):
            if target.pairs is None:
                target.pairs = {}
            target = target.pairs
        elif not isinstance(target, dict):
            raise TypeError("keys for what is no dict")
        for i in range(0, len(items), 2):
            key = items[i]
            target[key if type(key) is str else _key(key)] = items[i + 1]

    def _reduce(self) -> None:
        args = self._stack.pop()
        if type(args) is not tuple:
            raise TypeError("arguments that are no tuple")
        self._stack[-1] = self.call(self._stack[-1], args)

    def _build(self) -> None:
        state = self._stack.pop()
        thing = self._stack[-1]
        if type(thing) is Dict:
            thing.state = state
        elif isinstance(thing, Inert):
            made = self.build(thing, state)
            if made is not thing:
                # It was put in the memo when it was new.
                self._stack[-1] = made
                for index, _ in zip(reversed(self._memo), range(_LOOK_BACK), strict=False):
                    if self._memo[index] is thing:
                        self._memo[index] = made
                        break

    def _new(self) -> None:
        args = self._stack.pop()
        if type(args) is not tuple:
            raise TypeError("arguments that are no tuple")
        self._stack[-1] = self._made(self._stack[-1], args)

    def _new_with_names(self) -> None:
        kwargs, args = self._stack.pop(), self._stack.pop()
        if type(args) is not tuple:
            raise TypeError("arguments that are no tuple")
        self._stack[-1] = self._made(self._stack[-1], args, kwargs)

    def _inst(self) -> None:
        what = self._global(self._line().decode("utf-8"), self._line().decode("utf-8"))
        self._push_popped(lambda items: self._made(what, tuple(items)))

    def _object(self) -> None:
        self._push_popped(lambda items: self._made(items[0], tuple(items[1:])))

    def _push_popped(self, make: Callable[[list[Any]], Any]) -> None:
        items = self._pop_mark()
        self._stack.append(make(items))

    def _dict(self) -> None:
        items = self._pop_mark()
        self._stack.append({})
        self._update(items)

    def _pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._pop_mark()

    def _stack_global(self) -> None:
        name = self._stack.pop()
        self._stack[-1] = self._global(self._stack[-1], name)

    def _tuple(self, n: int) -> None:
        if len(self._stack) < n:
            raise IndexError("too few values")
        self._stack[-n:] = [tuple(self._stack[-n:])]

    def _long(self, n: int) -> None:
        if n > MAX_LONG:
            self._push(self._span(n, "integer"))
        else:
            self._push(int.from_bytes(self._take(n), "little", signed=True))

    def _int_line(self) -> None:
        line = self._digits()
        self._push(line == b"01" if line in (b"00", b"01") else int(line, 0))

    def _frozen(self, items: list[Any]) -> Inert:
        made = Inert(_FROZENSET)
        made.items = items
        return made

    def _persist_top(self) -> None:
        self._stack[-1] = self.persist(self._stack[-1])

    def _string_line(self) -> None:
        line = self._line()
        if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b'"', b"'"):
            raise ValueError("a text without quotes")
        self._push(self._told(codecs.escape_decode(line[1:-1])[0], len(line) + 1, "bytes"))

    def _unicode_line(self) -> None:
        line = self._line()
        text = str(line, "raw-unicode-escape").encode("utf-8", "surrogatepass")
        self._push(self._told(text, len(line) + 1, "text"))

    def _protocol(self) -> None:
        version = self._number(1)
        if version > 5:
            raise UnsupportedError(
                f"{self.name}: byte {self.position}: expected pickle protocol 0 to 5, found {version}; "
                "write it again with torch.save"
            )

    def _elsewhere(self) -> None:
        raise UnsupportedError(
            f"{self.name}: byte {self.position}: a buffer that lies outside of the pickle; "
            "write it again with torch.save"
        )

    def _unknown(self) -> None:
        self.refuse(f"no opcode: {self._buf[self._at - 1]:#04x}")


def _key(key: Any) -> Any:
    """`key` as it may be hashed."""
    if key is None or type(key) in (str, bool, float) or (type(key) is int and -_MAX_INT_KEY < key < _MAX_INT_KEY):
        return key
    if type(key) is Span and key.kind == "text":
        raise ValueError("a name that is too long, or no text")
    return Key(key)


_SET, _FROZENSET = Global("builtins", "set"), Global("builtins", "frozenset")
_MAPPINGS = frozenset(
    {
        "collections.OrderedDict",
        "collections.defaultdict",
        "builtins.dict",
        "__builtin__.dict",
        "ordereddict.OrderedDict",
    }
)
# By opcode; the names of the opcodes are those of pickletools.
_OPCODES: dict[bytes, Callable[[Machine], object]] = {
    b"X": lambda m: m._push(m._text(m._number(4))),  # BINUNICODE
    b"\x8c": lambda m: m._push(m._text(m._number(1))),  # SHORT_BINUNICODE
    b"\x8d": lambda m: m._push(m._text(m._number(8))),  # BINUNICODE8
    b"V": Machine._unicode_line,  # UNICODE
    b"U": lambda m: m._push(m._text(m._number(1), raw=True)),  # SHORT_BINSTRING
    b"T": lambda m: m._push(m._text(m._number(4), raw=True)),  # BINSTRING
    b"S": Machine._string_line,  # STRING
    b"C": lambda m: m._push(m._span(m._number(1), "bytes")),  # SHORT_BINBYTES
    b"B": lambda m: m._push(m._span(m._number(4), "bytes")),  # BINBYTES
    b"\x8e": lambda m: m._push(m._span(m._number(8), "bytes")),  # BINBYTES8
    b"\x96": lambda m: m._push(m._span(m._number(8), "bytes")),  # BYTEARRAY8
    b"\x97": Machine._elsewhere,  # NEXT_BUFFER
    b"\x98": Machine._elsewhere,  # READONLY_BUFFER
    b"N": lambda m: m._push(None),  # NONE
    b"\x88": lambda m: m._push(True),  # NEWTRUE
    b"\x89": lambda m: m._push(False),  # NEWFALSE
    b"I": Machine._int_line,  # INT
    b"L": lambda m: m._push(int(m._digits().rstrip(b"L"), 0)),  # LONG
    b"J": lambda m: m._push(int.from_bytes(m._take(4), "little", signed=True)),  # BININT
    b"M": lambda m: m._push(m._number(2)),  # BININT2
    b"\x8a": lambda m: m._long(m._number(1)),  # LONG1
    b"\x8b": lambda m: m._long(m._number(4)),  # LONG4
    b"F": lambda m: m._push(float(m._digits())),  # FLOAT
    b"G": lambda m: m._push(struct.unpack(">d", m._take(8))[0]),  # BINFLOAT
    b"]": lambda m: m._push([]),  # EMPTY_LIST
    b"a": lambda m: m._extend([m._stack.pop()]),  # APPEND
    b"e": lambda m: m._extend(m._pop_mark()),  # APPENDS
    b"l": lambda m: m._push_popped(list),  # LIST
    b")": lambda m: m._push(()),  # EMPTY_TUPLE
    b"\x85": lambda m: m._tuple(1),  # TUPLE1
    b"\x86": lambda m: m._tuple(2),  # TUPLE2
    b"\x87": lambda m: m._tuple(3),  # TUPLE3
    b"}": lambda m: m._push({}),  # EMPTY_DICT
    b"d": Machine._dict,  # DICT
    b"s": lambda m: m._update([m._stack.pop(), m._stack.pop()][::-1]),  # SETITEM
    b"u": lambda m: m._update(m._pop_mark()),  # SETITEMS
    b"\x8f": lambda m: m._push(Inert(_SET)),  # EMPTY_SET
    b"\x90": lambda m: m._extend(m._pop_mark()),  # ADDITEMS
    b"\x91": lambda m: m._push_popped(m._frozen),  # FROZENSET
    b"0": Machine._pop,  # POP
    b"1": lambda m: m._pop_mark(),  # POP_MARK
    b"2": lambda m: m._push(m._stack[-1]),  # DUP
    b"g": lambda m: m._push(m._memo[int(m._digits())]),  # GET
    b"q": lambda m: m._put(m._number(1)),  # BINPUT
    b"j": lambda m: m._push(m._memo[m._number(4)]),  # LONG_BINGET
    b"p": lambda m: m._put(int(m._digits())),  # PUT
    b"\x82": lambda m: m._push(Extension(m._number(1))),  # EXT1
    b"\x83": lambda m: m._push(Extension(m._number(2))),  # EXT2
    b"\x84": lambda m: m._push(Extension(m._number(4))),  # EXT4
    b"c": lambda m: m._push(m._global(m._line().decode("utf-8"), m._line().decode("utf-8"))),  # GLOBAL
    b"\x93": Machine._stack_global,  # STACK_GLOBAL
    b"R": Machine._reduce,  # REDUCE
    b"b": Machine._build,  # BUILD
    b"i": Machine._inst,  # INST
    b"o": Machine._object,  # OBJ
    b"\x81": Machine._new,  # NEWOBJ
    b"\x92": Machine._new_with_names,  # NEWOBJ_EX
    b"\x80": Machine._protocol,  # PROTO
    b"\x95": lambda m: m._number(8),  # FRAME
    b"P": lambda m: m._push(m.persist(m._line().decode("ascii"))),  # PERSID
    b"Q": Machine._persist_top,  # BINPERSID
}
_HANDLERS = [_OPCODES.get(bytes([code]), Machine._unknown) for code in range(256)]
