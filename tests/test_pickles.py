"""The decoder of pickles agrees with Python's own on values, and keeps every call as it was written."""

from __future__ import annotations

import argparse
import datetime
import io
import pickle
from collections import OrderedDict, defaultdict
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem import CheckpointError, UnsupportedError
from lowmem.checkpoint.pickle_bytes import MAX_TEXT
from lowmem.checkpoint.pickles import Dict, Extension, Global, Inert, Key, Machine, Persistent, Span

PROTOCOLS = range(6)


class Held:
    """Bytes as a stream, and a count of what was read."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.count = data, 0, 0

    def read(self, n: int) -> bytes:
        piece = self.data[self.at : self.at + n]
        self.at += len(piece)
        self.count += len(piece)
        return piece

    def skip(self, n: int) -> int:
        n = min(n, len(self.data) - self.at)
        self.at += n
        return n


def decode(data: bytes, offset: int = 0) -> Any:
    return Machine(Held(data), offset, "file.pt").run()


def plain(value: Any, data: bytes) -> Any:
    """What Python would have made of a decoded value of simple kinds."""
    if isinstance(value, Span):
        raw = data[value.offset : value.offset + value.nbytes]
        return (
            raw if value.kind == "bytes" else raw.decode().encode("latin1") if value.kind == "latin1" else raw.decode()
        )
    if isinstance(value, Key):
        return plain(value.value, data)
    if isinstance(value, dict):
        return {plain(key, data): plain(item, data) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(item, data) for item in value)
    if isinstance(value, Inert) and value.what.name in ("set", "frozenset"):
        items = value.items or (value.args[0] if value.args else [])
        return {"set": set, "frozenset": frozenset}[value.what.name](plain(item, data) for item in items)
    if isinstance(value, Inert) and value.what.name == "encode":
        # Of protocol 0, whose lines are no ranges of bytes.
        return value.args[0].encode("latin1")
    if isinstance(value, Inert) and value.what.name in ("bytes", "bytearray"):
        return plain(value.args[0], data) if value.args else b""
    return value


simple = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**1000), 2**1000)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=("Cs",)))
    | st.binary()
)
keys = (
    st.text(st.characters(exclude_categories=("Cs",)))
    | st.integers()
    | st.none()
    | st.tuples(st.integers(), st.text("ab"))
)
values = st.recursive(
    simple,
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(keys, inner)
        | st.lists(inner, max_size=5).map(tuple)
        | st.sets(st.integers())
        | st.frozensets(st.text("abc"))
    ),
    max_leaves=20,
)


@given(values, st.sampled_from(PROTOCOLS))
@settings(max_examples=200, deadline=None)
def test_values_are_those_of_pickle(value: Any, protocol: int) -> None:
    data = pickle.dumps(value, protocol)
    assert plain(decode(data), data) == pickle.loads(data) == value


@given(values, st.sampled_from(PROTOCOLS))
@settings(max_examples=50, deadline=None)
def test_the_pickler_written_in_python_is_understood_too(value: Any, protocol: int) -> None:
    buffer = io.BytesIO()
    pickle._Pickler(buffer, protocol).dump(value)  # type: ignore[attr-defined]
    assert plain(decode(buffer.getvalue()), buffer.getvalue()) == value


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_long_values_cross_the_window(protocol: int) -> None:
    value = {f"key{i}": [i, "text" * 20, float(i)] for i in range(20_000)}
    value["long"] = ["x" * n for n in (MAX_TEXT - 1, MAX_TEXT, 10)]
    data = pickle.dumps(value, protocol)
    assert decode(data) == value


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_shared_and_recursive_values_stay_so(protocol: int) -> None:
    shared: list[Any] = [1]
    ring: dict[str, Any] = {"a": shared, "b": [shared]}
    ring["self"] = ring
    made = decode(pickle.dumps(ring, protocol))
    assert made["a"] is made["b"][0]
    assert made["self"] is made


@pytest.mark.parametrize("protocol", range(1, 6))
def test_bytes_and_long_texts_stay_in_the_file(protocol: int) -> None:
    """They are ranges, and what they pass over is not read."""
    raw, text = bytes(range(256)) * 4000, "é" * MAX_TEXT
    data = pickle.dumps([raw, text, "after"], protocol)
    stream = Held(data)
    made = Machine(stream, 1000, "file.pt").run()
    assert made[2] == "after"
    assert [type(item) for item in made] == [Span, Span, str]
    assert made[0].kind == ("latin1" if protocol < 3 else "bytes")
    start = made[0].offset - 1000
    assert data[start : start + made[0].nbytes] == (raw.decode("latin1").encode() if protocol < 3 else raw)
    assert data[made[1].offset - 1000 :][: made[1].nbytes].decode() == text
    assert stream.count < len(data) // 2


def test_small_latin1_texts_are_found_where_they_are() -> None:
    value = [b"\x05", b"\x05\xff", bytes([0x80]), bytes([5]), b"\x05" * 3, b"b", bytes([0x80])]
    for protocol in (1, 2):
        data = pickle._dumps(value, protocol)  # type: ignore[attr-defined]
        assert plain(decode(data), data) == value
        data = pickle.dumps(value, protocol)
        assert plain(decode(data), data) == value


def test_texts_of_python_2() -> None:
    data = b"\x80\x02]q\x00(U\x03abcT\x04\x00\x00\x00abcdU\x02\xff\xfeS'a\\x41b'\ne."
    made = decode(data)
    assert made[:2] == ["abc", "abcd"]
    assert (made[2].kind, made[2].offset, made[2].nbytes) == ("bytes", data.index(b"\xff"), 2)
    assert made[3] == "aAb"


class Plain:
    def __init__(self) -> None:
        self.a = 1


class Slotted:
    __slots__ = ("a", "b")


class Sub(dict[str, int]):
    pass


class SubList(list[int]):
    pass


class WithArguments:
    def __new__(cls, *args: Any, **kwargs: Any) -> WithArguments:
        return super().__new__(cls)

    def __getnewargs_ex__(self) -> Any:
        return (1, 2), {"name": 3}


def named(value: type) -> Global:
    return Global(value.__module__, value.__qualname__)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_objects_are_kept_as_what_would_have_been_called(protocol: int) -> None:
    made = decode(pickle.dumps(Plain(), protocol))
    assert (made.what, made.state) == (named(Plain), {"a": 1})
    if protocol >= 2:
        slotted = Slotted()
        slotted.a = 5
        assert decode(pickle.dumps(slotted, protocol)).state == (None, {"a": 5})
    sub = Sub(x=1)
    sub.note = "n"  # type: ignore[attr-defined]
    made = decode(pickle.dumps(sub, protocol))
    assert (made.what, made.pairs, made.state) == (named(Sub), {"x": 1}, {"note": "n"})
    if protocol >= 2:
        assert decode(pickle.dumps(SubList([1, 2]), protocol)).items == [1, 2]
    made = decode(pickle.dumps(argparse.Namespace(x=[1]), protocol))
    assert (made.what, made.state) == (Global("argparse", "Namespace"), {"x": [1]})


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_calls_keep_their_arguments(protocol: int) -> None:
    made = decode(pickle.dumps(Fraction(1, 3), protocol))
    assert made.what == Global("fractions", "Fraction")
    assert isinstance(decode(pickle.dumps(datetime.date(2020, 1, 2), protocol)), Inert)
    assert decode(pickle.dumps(print, protocol)).name == "print"


def test_named_arguments_of_new() -> None:
    made = decode(pickle.dumps(WithArguments(), 4))
    assert (made.what, made.args, made.kwargs) == (named(WithArguments), (1, 2), {"name": 3})


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_ordered_dicts_are_dicts(protocol: int) -> None:
    ordered: OrderedDict[str, Any] = OrderedDict(b=1, a=2)
    ordered._metadata = {"": 1}  # type: ignore[attr-defined]
    made = decode(pickle.dumps(ordered, protocol))
    assert type(made) is Dict
    assert list(made.items()) == [("b", 1), ("a", 2)]
    assert made.state["_metadata"] == {"": 1}
    assert decode(pickle.dumps(defaultdict(int, a=2), protocol)) == {"a": 2}
    python2 = b"ccollections\nOrderedDict\n((l(lS'b'\naI1\naatR."
    assert decode(python2) == {"b": 1}


def test_keys_that_may_be_slow_to_hash_are_held_and_not_hashed() -> None:
    made = decode(pickle.dumps({(1, 2): "t", 1 << 61: "n", "s": "s", 7: "i", None: "0", 2.5: "f"}))
    assert [type(key) for key in made] == [Key, Key, str, int, type(None), float]
    assert [key.value for key in list(made)[:2]] == [(1, 2), 1 << 61]


def test_persistent_ids() -> None:
    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", 5) if value == "here" else None

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(["here", "there"])
    made = decode(buffer.getvalue())
    assert isinstance(made[0], Persistent)
    assert made[0].value == ("storage", 5)
    assert decode(b"Pabc\n.").value == "abc"


def test_extensions_are_numbers() -> None:
    made = decode(b"(\x82\x01\x83\x02\x03\x84\x04\x05\x06\x07l.")
    assert [type(item) for item in made] == [Extension] * 3
    assert [item.code for item in made] == [1, 0x302, 0x7060504]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"I01\n.", True),
        (b"I00\n.", False),
        (b"I-5\n.", -5),
        (b"L77L\n.", 77),
        (b"F2.5\n.", 2.5),
        (b"K\x01K\x02\x300.".replace(b"\x300", b"0"), 1),
        (b"K\x01(K\x02K\x031.", 1),
        (b"K\x012\x86.", (1, 1)),
        (b"(K\x01K\x02d.", {1: 2}),
        (b"(K\x01p5\n0g5\nt.", (1,)),
        (b"}K\x01K\x02s.", {1: 2}),
        (b"\x8b\x02\x00\x00\x00\xff\xff.", -1),
        (b"\x8a\x00.", 0),
        (b"K\x05r\xff\xff\xff\xff0j\xff\xff\xff\xff.", 5),
        (b"V\\u00e9\xe9\n.", "éé"),
    ],
)
def test_opcodes_that_python_seldom_writes(data: bytes, expected: Any) -> None:
    assert decode(data) == expected


@pytest.mark.parametrize(
    "data", [b"(cx\ny\nK\x01o.", b"(K\x01ix\ny\n.", b"cx\ny\nK\x01\x85R.", b"cx\ny\nK\x01\x85\x81."]
)
def test_every_way_to_call_gives_the_same_record(data: bytes) -> None:
    made = decode(data)
    assert (type(made), made.what, made.args) == (Inert, Global("x", "y"), (1,))


def test_what_stands_behind_a_pickle_is_left_alone() -> None:
    data = pickle.dumps([1]) + b"rest"
    machine = Machine(Held(data), 50, "file.pt")
    machine.run()
    assert machine.position == 50 + len(data) - 4


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "byte 0: expected a sound pickle, found its end"),
        (b"K", "its end"),
        (b"K\x01", "byte 2: expected a sound pickle, found its end"),
        (b".", "IndexError"),
        (b"\xff.", "no opcode: 0xff"),
        (b"K\x01t.", "does not fit"),
        (b"K\x01e.", "does not fit"),
        (b"h\x07.", "KeyError: 7"),
        (b"K\x01K\x02a.", "no list"),
        (b"K\x01K\x02K\x03s.", "no dict"),
        (b"}(K\x01u.", "does not fit"),
        (b"cx\ny\nK\x01R.", "arguments that are no tuple"),
        (b"K\x01K\x02\x93.", "a name that is not text"),
        (b"B\xff\xff\xff\xff.", "4294967295 bytes claimed"),
        (b"\x8e" + b"\xff" * 8 + b".", "claimed where fewer are left"),
        (b"X\xff\x00\x00\x00abc.", "its end"),
        (b"I" + b"9" * 5000 + b"\n.", "a number of 5000 digits"),
        (b"L" + b"9" * 1_000_000 + b"L\n.", "a number of 1000001 digits"),
        (b"Iabc\n.", "does not fit"),
        (b"S'a\n.", "without quotes"),
        (b"V" + b"a" * 2_000_000 + b"\n.", "a line of more than"),
    ],
)
def test_damage_is_an_error_that_says_where_and_what(data: bytes, found: str) -> None:
    with pytest.raises(CheckpointError, match=r"file\.pt: byte \d+: .*") as caught:
        decode(data)
    assert found in str(caught.value)
    assert str(caught.value).endswith("download it again")
    assert len(str(caught.value)) < 400


def test_what_lies_elsewhere_or_is_of_a_later_python_is_refused() -> None:
    buffers: list[Any] = []
    data = pickle.dumps(pickle.PickleBuffer(b"abc"), 5, buffer_callback=buffers.append)
    with pytest.raises(UnsupportedError, match="lies outside of the pickle"):
        decode(data)
    with pytest.raises(UnsupportedError, match="expected pickle protocol 0 to 5, found 6"):
        decode(b"\x80\x06N.")
