"""Nothing in a file is imported or called, whatever opcode asks for it; no file takes memory or time without end."""

from __future__ import annotations

import copyreg
import gc
import io
import os
import pickle
import sys
import tempfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fresh
import numpy as np
import pytest
import torch
from hostile_ways import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_files import leaves_of, pickle_in_legacy, pickle_in_zip, rewritten, save

from lowmem import CheckpointError, LowmemError, UnsupportedError
from lowmem.checkpoint import pickle_bytes, pickles, torch_zip
from lowmem.checkpoint.pickled import read_pickled
from lowmem.checkpoint.pickles import Machine
from lowmem.checkpoint.places import FileRange

# Modules that no test imports, of the standard library and of no library.
NEVER = ["antigravity", "this", "turtledemo", "module_of_a_hostile_pickle"]
CONTAINERS = pytest.mark.parametrize("put", [pickle_in_zip, pickle_in_legacy], ids=["zip", "legacy"])


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def attacks(command: str) -> Iterator[tuple[str, bytes]]:
    """By opcode: a pickle that would run `command` in a shell, where a pickle could."""
    word, system = text(command), b"cposix\nsystem\n"
    stack_global = b"\x8c\x05posix\x8c\x06system\x93"
    short = b"\x8c" + bytes([len(command)]) + command.encode()
    yield "REDUCE", b"\x80\x02" + system + word + b"\x85R."
    yield "STACK_GLOBAL", b"\x80\x04" + stack_global + short + b"\x85R."
    yield "NEWOBJ", b"\x80\x02" + system + word + b"\x85\x81."
    yield "NEWOBJ_EX", b"\x80\x04" + stack_global + short + b"\x85}\x92."
    yield "OBJ", b"\x80\x02(" + system + word + b"o."
    yield "INST", b"(S'" + command.encode() + b"'\niposix\nsystem\n."
    yield "BUILD", b"\x80\x02cargparse\nNamespace\n)\x81}" + text("__setstate__") + system + b"sb" + word + b"b."
    yield "EXT1", b"\x80\x02\x82\xf0" + word + b"\x85R."
    yield "EXT2", b"\x80\x02\x83\xf1\x00" + word + b"\x85R."
    yield "EXT4", b"\x80\x02\x84\xf2\x00\x00\x00" + word + b"\x85R."
    yield "PERSID", b"(Pposix.system\n" + word + b"\x85Rl."
    yield "BINPERSID", b"\x80\x02" + system + word + b"\x86Q."
    yield "getattr", b"\x80\x02cbuiltins\ngetattr\ncposix\nsystem\n" + text("__call__") + b"\x86R" + word + b"\x85R."
    yield "eval", b"\x80\x02cbuiltins\neval\n" + text(f"__import__('os').system({command!r})") + b"\x85R."
    yield "dotted", b"\x80\x04\x8c\x05torch\x8c\x14serialization.os.sys\x93."
    yield "rebuild", b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(" + system + system + word + b"\x85NtR."
    yield "dict of calls", b"\x80\x02ccollections\ndefaultdict\n" + system + b"\x85R" + word + word + b"s."
    for module in NEVER:
        yield f"import {module}", b"\x80\x02c" + module.encode() + b"\nname\n)R."


@pytest.fixture
def extensions() -> Iterator[None]:
    """`os.system` under three numbers, as an application could have registered it."""
    codes = {0xF0: "system", 0xF1: "popen", 0xF2: "_exit"}
    for code, name in codes.items():
        copyreg.add_extension("os", name, code)
    yield
    for code, name in codes.items():
        copyreg.remove_extension("os", name, code)


def test_the_attacks_are_real(tmp_path: Path, extensions: None) -> None:
    """Python's own unpickler runs them, so that it means something when nothing happens below."""
    marker = tmp_path / "marker"
    table = dict(attacks(f"touch {marker}"))
    for name in ("REDUCE", "STACK_GLOBAL", "OBJ", "INST", "BUILD", "EXT1", "getattr", "eval"):
        try:
            pickle.loads(table[name])
        except Exception:
            assert name == "BUILD"
        if name == "BUILD":
            continue
        assert marker.exists(), name
        marker.unlink()


@CONTAINERS
@pytest.mark.parametrize("name", [name for name, _ in attacks("")])
def test_no_opcode_can_call(name: str, put: Callable[[Path, bytes], Path], tmp_path: Path, extensions: None) -> None:
    marker = tmp_path / "marker"
    file = put(tmp_path / "a.pt", dict(attacks(f"touch {marker}"))[name])
    before = set(sys.modules)
    read_pickled(file)
    assert not marker.exists()
    assert not set(NEVER) & set(sys.modules)
    # Names in zips may be of an old encoding, whose table Python has in a module.
    assert set(sys.modules) - before <= {"encodings.cp437"}


class Armed:
    """Would touch a file when it is made, given its state, looked into, or deleted."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",), {"a": 1}, iter([1]), iter([("k", "v")])


class ArmedState:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __getstate__(self) -> Any:
        return {"marker": self.marker}

    def __setstate__(self, state: Any) -> None:
        state["marker"].touch()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_objects_between_weights_are_inert_and_the_weights_are_read(
    protocol: int, legacy: bool, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    value = {"a": torch.arange(3.0), "x": Armed(marker), "y": ArmedState(marker), "b": torch.ones(2)}
    picked = read_pickled(save(value, tmp_path / "a.pt", legacy, protocol))
    assert not marker.exists()
    entries, _ = picked.locate(leaves_of(picked.root))
    assert list(entries) == ["a", "b"]
    assert picked.root["x"].what.name == "system"
    assert (picked.root["x"].items, picked.root["x"].pairs) == ([1], {"k": "v"})


@contextmanager
def bounded(megabytes: float) -> Iterator[None]:
    """Python's memory that the block takes; what takes for ever is ended by the time that a test has."""
    gc.collect()
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] <= megabytes * 1e6
    finally:
        tracemalloc.stop()


def decoded(data: bytes) -> Any:
    with tempfile.TemporaryFile(buffering=0) as f:
        f.write(data)
        return Machine(FileRange(f, 0, len(data)), 0, "bomb.pt").run()  # type: ignore[arg-type]


DEEP = 10_000
LAUGHS = b"".join(b"h\x00h\x00\x86q\x00" for _ in range(200))
BOMBS = {
    "nested lists": b"]" * DEEP + b"a" * (DEEP - 1) + b".",
    "nested tuples": b")" + b"\x85" * DEEP + b".",
    "nested dicts": b"}" + b"(" + b"}K\x00}s" * DEEP + b"0" * (DEEP - 1) + b"l.",
    "nested calls": b"cx\ny\nq\x00" + b"h\x00" * DEEP + b")" + b"\x85R" * DEEP + b".",
    "nested references": b")" + b"Q" * DEEP + b".",
    "nested states": b"cx\ny\n)Rq\x00" + b"0cx\ny\n)Rh\x00bq\x00" * DEEP + b".",
    "nested keys": b"K\x01" + b"\x85" * DEEP + b"}q\x00" + b"(" + b"t\x85.",
    "marks": b"(" * DEEP + b"l" * DEEP + b".",
    "billion laughs": b"K\x01q\x00" + LAUGHS + b".",
    "billion laughs as keys": b"K\x01q\x00" + LAUGHS + b"}q\x010h\x01h\x00N\x87.",
    "billion laughs as a key": b"K\x01q\x00" + LAUGHS + b"q\x02}h\x02Ns.",
    "billion laughs in a set": b"K\x01q\x00" + LAUGHS + b"q\x02\x8f(h\x02\x90.",
    "huge indices": b"K\x01r\xff\xff\xff\xffr\xff\xff\xff\x7fp99999999999999999999\n.",
    "a ring": b"]q\x00h\x00a.",
    "numbers that collide": b"}("
    + b"".join(b"\x8a\x0c" + (i * (2**61 - 1)).to_bytes(12, "little") + b"N" for i in range(10_000))
    + b"u.",
    "a long number": b"\x8b" + (1_000_000).to_bytes(4, "little") + b"\x7f" * 1_000_000 + b".",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_that_are_sound_are_read_in_little_memory(name: str) -> None:
    with bounded(100):
        value = decoded(BOMBS[name])
        repr(value) if name.startswith("nested c") else None
        del value
        gc.collect()


REFUSED = {
    "a long number in text": b"L" + b"7" * 1_000_000 + b"L\n.",
    "a long integer in text": b"I" + b"7" * 1_000_000 + b"\n.",
    "a long float in text": b"F" + b"7" * 1_000_000 + b"\n.",
    "claimed bytes": b"B\xff\xff\xff\xff",
    "claimed bytes of 64 bits": b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
    "a claimed array": b"\x96\xff\xff\xff\xff\xff\xff\xff\xff",
    "a claimed text": b"X\xff\xff\xff\xffabc",
    "a claimed text of 64 bits": b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f",
    "a claimed string": b"T\xff\xff\xff\xff",
    "a claimed number": b"\x8b\xff\xff\xff\xff",
    "no end": b"]" * 100_000,
    "a line without end": b"S'" + b"a" * 3_000_000,
}


@pytest.mark.parametrize("name", REFUSED)
def test_claims_are_checked_before_memory_is_taken(name: str) -> None:
    with bounded(60), pytest.raises(CheckpointError, match=r"bomb\.pt: byte \d+"):
        decoded(REFUSED[name])


def test_the_number_of_opcodes_and_the_text_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "MAX_STEPS", 1000)
    with pytest.raises(UnsupportedError, match="more than 1000 opcodes"):
        decoded(b"N" * 2000 + b".")
    monkeypatch.setattr(pickles, "MAX_GLOBALS", 50)
    with pytest.raises(CheckpointError, match="more than 50 different classes and functions"):
        decoded(b"".join(b"cx\n%d\n" % i for i in range(60)) + b".")
    copies = b"ccollections\nOrderedDict\nq\x00]q\x01(" + b"NN\x86" * 150 + b"eh\x01\x85q\x02" + b"h\x00h\x02R0" * 20
    with pytest.raises(CheckpointError, match="values copied many times"):
        decoded(copies + b".")
    monkeypatch.setattr(pickles, "MAX_TEXTS", 5000)
    monkeypatch.setattr(pickle_bytes, "MAX_TEXTS", 5000)
    for opcode in (b"X\x64\x00\x00\x00", b"\x8c\x64", b"U\x64"):
        with pytest.raises(CheckpointError, match="more than 5000 bytes of text"):
            decoded((opcode + b"a" * 100) * 100 + b".")


def test_a_hostile_pickle_of_a_sparse_gigabyte_is_refused_at_once(tmp_path: Path) -> None:
    """A record that claims a gigabyte is passed over or refused, and not read."""
    file = tmp_path / "a.pt"
    with file.open("wb") as f:
        f.write(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}.\x80\x02B\x00\x00\x00\x7f")
        f.truncate(1 << 30)
    with bounded(5), pytest.raises(CheckpointError, match="claimed where fewer are left"):
        read_pickled(file)


# Zips


def test_a_directory_that_claims_to_be_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save({"a": torch.ones(3)}, tmp_path / "a.pt")
    monkeypatch.setattr(torch_zip, "_MAX_DIRECTORY", 100)
    with pytest.raises(CheckpointError, match="expected a zip directory of at most 100 bytes"):
        read_pickled(file)


def test_a_packed_bomb_is_refused_or_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """30 MB of zeros in a pickle of 30 KB, and a claim that deflate cannot hold."""
    bomb = b"\x80\x03B" + (30_000_000).to_bytes(4, "little") + bytes(30_000_000) + b"."
    file = rewritten(pickle_in_zip(tmp_path / "a.pt", bomb), tmp_path / "b.pt", method=zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 100_000
    with bounded(20):
        assert read_pickled(file).root.nbytes == 30_000_000
    monkeypatch.setattr(torch_zip, "_MAX_PACKED_PICKLE", 1_000_000)
    with pytest.raises(UnsupportedError, match="a compressed pickle of at most 1000000 bytes"):
        read_pickled(file)
    raw = bytearray(file.read_bytes())
    at = raw.index(b"PK\x01\x02")
    raw[at + 24 : at + 28] = b"\xff\xff\xff\x7f"
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match="found a claim of 2147483647"):
        read_pickled(file)


def test_no_more_is_unpacked_than_was_claimed(tmp_path: Path) -> None:
    """Else an array in a packed pickle could lie behind what its range unpacks to."""
    original = save({"n": np.arange(9)}, tmp_path / "a.pt", protocol=4)
    file = rewritten(original, tmp_path / "b.pt", method=zipfile.ZIP_DEFLATED)
    raw = bytearray(file.read_bytes())
    at = raw.index(b"PK\x01\x02")
    raw[at + 24 : at + 28] = (200).to_bytes(4, "little")
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"a/data\.pkl: byte 149: .*72 bytes claimed where fewer are left"):
        read_pickled(file)


def test_damage_in_a_packed_pickle(tmp_path: Path) -> None:
    original = save({f"k{i}": torch.ones(3) for i in range(50)}, tmp_path / "a.pt")
    file = rewritten(original, tmp_path / "b.pt", method=zipfile.ZIP_DEFLATED)
    raw = bytearray(file.read_bytes())
    raw[60:70] = bytes(10)
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"b\.pt: a/data\.pkl"):
        read_pickled(file)


# Any corruption at all


def sound() -> dict[str, bytes]:
    """Files of every kind, small."""
    value = {
        "a": torch.arange(6.0).view(2, 3).t(),
        "n": np.arange(3),
        "o": [1, "x", {"k": (2.5, None)}],
        "d": slice(1, 2),
        "s": {1},
    }
    made: dict[str, bytes] = {}
    for legacy in (False, True):
        for protocol in (2, 4):
            buffer = io.BytesIO()
            torch.save(value, buffer, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
            made[f"{'legacy' if legacy else 'zip'} {protocol}"] = buffer.getvalue()
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(made["zip 4"])) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    made["packed"] = packed.getvalue()
    return made


SOUND = sound()


def survives(data: bytes) -> None:
    """Read it and everything in it, or refuse it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "fuzzed.pt"
        file.write_bytes(data)
        refused = "fuzzed.pt"
        try:
            picked = read_pickled(file)
            for key, leaf in leaves_of(picked.root).items():
                try:
                    entries, shard = picked.locate({key: leaf})
                except LowmemError:
                    continue
                assert entries[key].end <= max([shard.size, *(p.address + p.size for p in shard.packed)])
        except LowmemError as error:
            refused = str(error)
        assert "fuzzed.pt" in refused
        assert len(refused) < 1500


@given(st.sampled_from(sorted(SOUND)), st.data())
@settings(max_examples=300, deadline=None)
def test_any_corruption_is_an_error_or_a_result(kind: str, data: Any) -> None:
    raw = bytearray(SOUND[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] = data.draw(
            st.sampled_from([0, 1, 255, 128, *b"(.RbtoiQ\x81\x92\x93\x94hqrXBju"]) | st.integers(0, 255)
        )
    survives(bytes(raw))


@given(st.sampled_from(sorted(SOUND)), st.data())
@settings(max_examples=100, deadline=None)
def test_any_part_missing_or_doubled_is_an_error_or_a_result(kind: str, data: Any) -> None:
    raw = SOUND[kind]
    first, second = sorted(data.draw(st.tuples(st.integers(0, len(raw)), st.integers(0, len(raw)))))
    survives(data.draw(st.sampled_from([raw[:first] + raw[second:], raw[:second] + raw[first:], raw[first:]])))


OPCODES = st.sampled_from([*sorted(pickles._OPCODES), b".", b"(", b"t", b"h", b"q", b"r", b"\x94"])
PIECES = st.one_of(
    OPCODES,
    OPCODES,
    st.binary(max_size=4),
    st.sampled_from(
        [
            b"cx\ny\n",
            b"ctorch._utils\n_rebuild_tensor_v2\n",
            b"ctorch._utils\n_rebuild_parameter\n",
            b"ctorch._tensor\n_rebuild_from_type_v2\n",
            b"ctorch\nFloatStorage\n",
            b"cnumpy._core.multiarray\n_reconstruct\n",
            b"cnumpy\ndtype\nX\x02\x00\x00\x00f4\x89\x88\x87R",
            b"cnumpy._core.numeric\n_frombuffer\n",
            b"ccollections\nOrderedDict\n",
            b"ccopyreg\n_reconstructor\n",
            b"c_codecs\nencode\n",
            text("storage"),
            text("latin1"),
            b"K\x01",
            b"K\x02\x85",
            b"(K\x00K\x02\x85K\x01\x85",
        ]
    ),
)


@given(st.lists(PIECES, max_size=40).map(b"".join), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_opcodes_are_an_error_or_a_result(data: bytes, legacy: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "made.pt"
        (pickle_in_legacy if legacy else pickle_in_zip)(file, b"\x80\x02" + data + b".")
        survives(file.read_bytes())


def test_a_record_with_the_wrong_sum_is_known_by_it(tmp_path: Path) -> None:
    """The sum of a packed record goes along, for whoever unpacks it."""
    original = save({"a": torch.arange(100)}, tmp_path / "a.pt")
    picked = read_pickled(rewritten(original, tmp_path / "b.pt", method=zipfile.ZIP_DEFLATED))
    _, shard = picked.locate(leaves_of(picked.root))
    assert shard.packed[0].crc == zlib.crc32(torch.arange(100).numpy().tobytes())


# What scanners of pickles look for: by name, a callable and what it is called with.
EXPLOITS: dict[str, tuple[str, str]] = {
    "os.system": ("posix system", "{command}"),
    "nt.system": ("nt system", "{command}"),
    "os.popen": ("os popen", "{command}"),
    "subprocess.Popen": ("subprocess Popen", "{command}"),
    "subprocess.getoutput": ("subprocess getoutput", "{command}"),
    "commands.getoutput": ("commands getoutput", "{command}"),
    "pty.spawn": ("pty spawn", "{command}"),
    "builtins.eval": ("builtins eval", "{code}"),
    "builtins.exec": ("builtins exec", "{code}"),
    "__builtin__.execfile": ("__builtin__ execfile", "{file}"),
    "builtins.compile": ("builtins compile", "{code}"),
    "builtins.__import__": ("builtins __import__", "antigravity"),
    "builtins.open": ("builtins open", "{file}"),
    "builtins.breakpoint": ("builtins breakpoint", "pdb"),
    "importlib.import_module": ("importlib import_module", "antigravity"),
    "runpy.run_path": ("runpy run_path", "{file}"),
    "runpy._run_code": ("runpy _run_code", "{code}"),
    "webbrowser.open": ("webbrowser open", "http://127.0.0.1:9"),
    "operator.attrgetter": ("operator attrgetter", "system"),
    "operator.methodcaller": ("operator methodcaller", "system"),
    "functools.partial": ("functools partial", "{command}"),
    "types.FunctionType": ("types FunctionType", "{code}"),
    "types.CodeType": ("types CodeType", "{code}"),
    "code.InteractiveInterpreter": ("code InteractiveInterpreter.runcode", "{code}"),
    "pickle.loads": ("_pickle loads", "cposix\nsystem\n(S'{command}'\ntR."),
    "torch.load": ("torch.serialization load", "{file}"),
    "torch.hub.load": ("torch.hub load", "{file}"),
    "torch.jit.load": ("torch.jit load", "{file}"),
    "torch.storage._load_from_bytes": ("torch.storage _load_from_bytes", "{command}"),
    "torch._inductor.codecache": ("torch._inductor.codecache compile_file", "{file}"),
    "torch._dynamo.guards": ("torch._dynamo.guards GuardBuilder.get", "{code}"),
    "torch.utils._config_module": ("torch.utils._config_module ConfigModule.load_config", "{file}"),
    "torch.utils.bottleneck": ("torch.utils.bottleneck.__main__ run_cprofile", "{code}"),
    "torch.fx.experimental": ("torch.fx.experimental.symbolic_shapes ShapeEnv.evaluate_guards_expression", "{code}"),
    "numpy.load": ("numpy load", "{file}"),
    "numpy.testing._private.utils.runstring": ("numpy.testing._private.utils runstring", "{code}"),
    "numpy.f2py.crackfortran": ("numpy.f2py.crackfortran getlincoef", "{code}"),
    "joblib.load": ("joblib load", "{file}"),
    "sys.modules": ("sys modules.clear", "os"),
    "ctypes.CDLL": ("ctypes CDLL", "{file}"),
    "socket.create_connection": ("socket create_connection", "127.0.0.1"),
    "shutil.rmtree": ("shutil rmtree", "{folder}"),
    "os.remove": ("os remove", "{victim}"),
    "asyncio": ("asyncio.unix_events _UnixSubprocessTransport._start", "{command}"),
    "timeit.timeit": ("timeit timeit", "{code}"),
    "cProfile.run": ("cProfile run", "{code}"),
    "doctest.debug_script": ("doctest debug_script", "{code}"),
    "pip.main": ("pip main", "install"),
    "logging.config.listen": ("logging.config listen", "9"),
    "transformers.dynamic_module_utils": ("transformers.dynamic_module_utils get_class_from_dynamic_module", "{file}"),
    "site.main": ("site main", ""),
    "linecache.getline": ("linecache getline", "{file}"),
    "_io.FileIO": ("_io FileIO", "{victim}"),
}
SHAPES = ("reduce", "stack global", "object", "instance", "new object", "names", "build", "key", "persistent")


def exploit(shape: str, name: str, argument: str) -> bytes:
    """A pickle in which `name` is asked for and called, in one of the ways that there are."""
    module, _, attribute = name.partition(" ")
    what, word = f"c{module}\n{attribute}\n".encode(), text(argument)
    match shape:
        case "stack global":
            return b"\x80\x04" + text(module) + text(attribute) + b"\x93" + word + b"\x85R."
        case "object":
            return b"\x80\x02(" + what + word + b"o."
        case "instance":
            return b"\x80\x02(" + word + f"i{module}\n{attribute}\n.".encode()
        case "new object":
            return b"\x80\x02" + what + word + b"\x85\x81."
        case "names":
            return b"\x80\x04" + what + word + b"\x85}\x92."
        case "build":
            return b"\x80\x02cx\ny\n)R}" + text("__setstate__") + what + b"sb" + word + b"b."
        case "key":
            return b"\x80\x02}" + what + word + b"\x85RK\x01s."
        case "persistent":
            return b"\x80\x02" + what + word + b"\x85RQ."
    return b"\x80\x02" + what + word + b"\x85R."


# In a child, with an eye on everything that Python says of itself: none of it may be of the pickle's making.
_WATCHED = """
import json, os, sys
from pathlib import Path
from lowmem import LowmemError, inspect, stream
seen = []
def watch(event, details):
    if event in ("import", "exec", "compile", "marshal.loads", "code.__new__", "pickle.find_class", "ctypes.dlopen"):
        seen.append(f"{event} {details!r}"[:200])
    elif event.startswith(("os.", "subprocess.", "socket.", "shutil.", "webbrowser.", "pty.")):
        seen.append(f"{event} {details!r}"[:200])
    elif event == "open" and str(details[0]) not in args["files"]:
        seen.append(f"{event} {details!r}"[:200])
for file in args["files"][:2]:
    for way in (inspect, lambda file: list(stream(file))):
        try:
            way(file)
        except LowmemError:
            pass
import encodings.cp437
sys.addaudithook(watch)
result = {}
for file in args["files"]:
    del seen[:]
    try:
        inspect(file)
    except LowmemError:
        pass
    if seen:
        result[file] = seen[:5]
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the child is forked")
def test_no_public_exploit_runs_opens_or_imports_anything(tmp_path: Path) -> None:
    """Each callable that scanners look for, in each way to call it: nothing happens that Python would tell of."""
    victim, marker = tmp_path / "victim", tmp_path / "marker"
    victim.write_text("whole")
    given = {
        "command": f"touch {marker}",
        "code": f"open({str(marker)!r}, 'w')",
        "file": str(victim),
        "folder": str(tmp_path / "folder"),
        "victim": str(victim),
    }
    (tmp_path / "folder").mkdir()
    files = []
    for number, (name, argument) in enumerate(EXPLOITS.values()):
        for shape in SHAPES:
            put = (pickle_in_zip, pickle_in_legacy)[number % 2]
            pickled = exploit(shape, name, argument.format(**given))
            files.append(str(put(tmp_path / f"{number} {shape}.pt", pickled)))
    assert fresh.server().run(_WATCHED, files=files) == {}
    assert not marker.exists()
    assert victim.read_text() == "whole"
    assert (tmp_path / "folder").is_dir()


SWELLING = {
    "lists": b"](" + b"]" * 9_000_000 + b"e.",
    "dicts": b"](" + b"}" * 9_000_000 + b"e.",
    "tuples in the memo": b"](" + b")\x94" * 4_000_000 + b"e.",
    "texts": b"](" + b"\x8c\x02ab" * 2_000_000 + b"e.",
}


@pytest.mark.parametrize("packed", [False, True], ids=["stored", "packed"])
@pytest.mark.parametrize("name", SWELLING)
def test_a_pickle_takes_no_more_memory_than_its_file_has_bytes(name: str, packed: bool, tmp_path: Path) -> None:
    """Nine million empty lists are 9 MB, or 9 KB deflated, and were 550 MB of memory."""
    file = pickle_in_zip(tmp_path / "a.pt", SWELLING[name])
    if packed:
        file = rewritten(file, tmp_path / "b.pt", method=zipfile.ZIP_DEFLATED)
    refused(file, "opcodes", ways=["inspect"])


TENSORS: dict[str, tuple[tuple[Any, ...], tuple[Any, ...], int, int]] = {
    "a negative stride": ((3,), (-1,), 0, 3),
    "a stride that reaches outside": ((3,), (2,), 0, 3),
    "a stride of 2**62": ((3,), (2**62,), 0, 3),
    "strides that overflow": ((2**32, 2**32), (2**32, 2**32), 0, 3),
    "a negative size": ((-3,), (1,), 0, 3),
    "an offset of 2**62": ((3,), (1,), 2**62, 3),
    "a negative offset": ((3,), (1,), -1, 3),
    "a storage of 2**62": ((3,), (1,), 0, 2**62),
    "a storage larger than its record": ((4,), (1,), 0, 4),
    "elements of 2**64": ((2**32, 2**32), (0, 0), 0, 3),
    "4 TB of one element": ((2**40,), (0,), 0, 3),
    "5,000 sizes": ((1,) * 5000, (1,) * 5000, 0, 3),
}


@CONTAINERS
@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_reach_outside_are_refused(name: str, put: Callable[[Path, bytes], Path], tmp_path: Path) -> None:
    size, strides, offset, count = TENSORS[name]
    shape = b"(" + b"".join(map(number, size)) + b"t(" + b"".join(map(number, strides)) + b"t"
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(count) + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + shape + b"\x89}tR"
    pickled = b"\x80\x02}" + text("weight") + tensor + b"s."
    file = put(tmp_path / "a.pt", pickled) if put is pickle_in_legacy else put(tmp_path / "a.pt", pickled, _0=bytes(12))
    refused(file, "", ways=["stream", "load", "convert"], model="linear")


def number(value: int) -> bytes:
    return b"\x8a\x0c" + value.to_bytes(12, "little", signed=True)
