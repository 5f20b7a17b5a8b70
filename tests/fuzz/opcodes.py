"""Pickles changed opcode by opcode, so that most of them still are pickles."""

from __future__ import annotations

import pickletools
import random
import struct
from collections.abc import Callable

from .damage import NUMBERS, TEXTS, damage

_STORAGES = ("Float", "Half", "BFloat16", "Double", "Long", "Byte", "Bool", "ComplexFloat", "QInt8", "Untyped")
_REBUILDS = (
    *("_rebuild_tensor_v2", "_rebuild_tensor", "_rebuild_tensor_v3", "_rebuild_parameter", "_rebuild_sparse_tensor"),
    *("_rebuild_qtensor", "_rebuild_meta_tensor_no_storage", "_rebuild_wrapper_subclass", "_rebuild_nested_tensor"),
    *("_rebuild_device_tensor_from_numpy", "_rebuild_parameter_with_state", "_rebuild_sparse_csr_tensor"),
)
_GLOBALS = (
    *(f"torch\n{name}Storage\n" for name in _STORAGES),
    *(f"torch._utils\n{name}\n" for name in _REBUILDS),
    *(f"torch\n{name}\n" for name in ("float32", "bfloat16", "int64", "uint8", "float8_e4m3fn", "complex64", "Size")),
    *("torch._tensor\n_rebuild_from_type_v2\n", "torch\nTensor\n", "torch.nn.parameter\nParameter\n"),
    *("collections\nOrderedDict\n", "collections\ndefaultdict\n", "builtins\ndict\n", "builtins\nset\n"),
    *("numpy._core.multiarray\n_reconstruct\n", "numpy\nndarray\n", "numpy\ndtype\n", "_codecs\nencode\n"),
    *("numpy.core.multiarray\nscalar\n", "numpy._core.numeric\n_frombuffer\n", "copyreg\n_reconstructor\n"),
    *(
        "os\nsystem\n",
        "builtins\neval\n",
        "builtins\ngetattr\n",
        "os.path\nx\n",
        "subprocess\nPopen\n",
        "\n\n",
        "é\nλ\n",
    ),
)
_SNIPPETS = (
    *(b"N", b"(", b")", b"]", b"}", b"0", b"1", b"2", b"R", b"b", b"s", b"u", b"a", b"e", b"t", b"l", b"d", b"Q"),
    *(b"\x81", b"\x92", b"\x85", b"\x86", b"\x87", b"\x88", b"\x89", b"\x8f", b"\x90", b"\x91", b"\x93", b"\x94"),
    *(b".", b"o", b"K\x00", b"K\x01", b"K\x02", b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"I01\n"),
    *(b"h\x00", b"h\x01", b"h\x05", b"q\x00", b"q\x01", b"q\xff", b"r\xff\xff\xff\xff", b"X\x01\x00\x00\x000"),
    *(b"\x80\x02", b"\x80\x05", b"\x80\xff", b"\x95" + bytes(8), b"\x97", b"\x82\x01", b"C\x02ab", b"U\x02\xe9\xff"),
    *(b"V\\ud800\n", b"S'a\\x41'\n", b"F1.5\n", b"L5L\n", b"P0\n", b"g0\n", b"p0\n", b"ios\nsystem\n", b"}Nb", b")R"),
)
# How numbers are written: opcode, width, signed.
_NUMBERS = {b"K": (1, False), b"M": (2, False), b"J": (4, True)}
# What names a place in the memo, and how wide.
_MEMO = {b"q": 1, b"h": 1, b"r": 4, b"j": 4}


def length_of(data: bytes) -> int:
    """Bytes of the pickle at the beginning of `data`; 0 where there is none."""
    pieces, rest = _split(data)
    return len(data) - len(rest) if pieces and pieces[-1] == b"." else 0


def mutate_pickle(data: bytes, chance: random.Random) -> bytes:
    """The pickle with a few opcodes other, or away, or more of them; bytes behind it are kept."""
    pieces, rest = _split(data)
    if not pieces:
        return damage(data, chance)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        # Most often an argument: that keeps the pickle sound, and is where sizes, names, shapes and classes are.
        if chance.random() < 0.7:
            at = chance.randrange(len(pieces))
            for near in [*range(at, len(pieces)), *range(at)]:
                changed = _other_argument(pieces[near], pieces, chance)
                if changed is not None:
                    pieces[near] = changed
                    break
        else:
            _move(pieces, chance)
    made = b"".join(pieces)
    if chance.random() < 0.03:
        made = damage(made, chance)
    return made + rest


def _split(data: bytes) -> tuple[list[bytes], bytes]:
    """The opcodes, each with its argument, and what stands behind the pickle."""
    starts, end = [], len(data)
    try:
        for opcode, _, at in pickletools.genops(data):
            starts.append(at or 0)
            if opcode.name == "STOP":
                end = (at or 0) + 1
    except Exception:  # Whatever is no pickle: what follows the last sound opcode is one piece.
        pass
    if not starts:
        return [], data
    return [data[a:b] for a, b in zip(starts, [*starts[1:], end], strict=True)], data[end:]


def _move(pieces: list[bytes], chance: random.Random) -> None:
    at = chance.randrange(len(pieces))
    kind = chance.randrange(6)
    if kind == 0:
        del pieces[at]
        pieces or pieces.append(b".")
    elif kind == 1:
        pieces.insert(at, chance.choice(_SNIPPETS))
    elif kind == 2:
        pieces[at] = chance.choice(_SNIPPETS)
    elif kind == 3:
        run = pieces[at : at + chance.randrange(1, 40)]
        pieces[(to := chance.randrange(len(pieces))) : to] = run
    elif kind == 4:
        del pieces[at : at + chance.randrange(1, 20)]
        pieces or pieces.append(b".")
    else:
        other = chance.randrange(len(pieces))
        pieces[at], pieces[other] = pieces[other], pieces[at]


def _other_argument(piece: bytes, pieces: list[bytes], chance: random.Random) -> bytes | None:
    """The opcode with another argument, or None for one without."""
    code = piece[:1]
    if code in _NUMBERS or code in (b"\x8a", b"G"):
        return _other_number(piece, chance)
    if code in (b"X", b"\x8c", b"U"):
        return _other_text(pieces, chance)
    if code in _MEMO:
        width = _MEMO[code]
        known = int.from_bytes(piece[1:], "little")
        number = chance.choice((known + 1, known - 1, chance.randrange(64), 2**31)) % (1 << 8 * width)
        return code + number.to_bytes(width, "little")
    if code == b"c":
        known_globals = [other for other in pieces if other[:1] == b"c"]
        return chance.choice((chance.choice(known_globals), b"c" + chance.choice(_GLOBALS).encode()))
    if code in (b"\x88", b"\x89"):
        return b"\x88" if code == b"\x89" else b"\x89"
    if code in (b"C", b"B", b"\x8e", b"\x96") and len(piece) > 12:
        return piece[:-1] + bytes([piece[-1] ^ 1])
    return None


def _other_number(piece: bytes, chance: random.Random) -> bytes:
    code = piece[:1]
    if code == b"G":
        return b"G" + struct.pack(">d", chance.choice((0.0, -0.0, 1.5, 1e308, float("nan"), float("inf"))))
    width, signed = _NUMBERS.get(code, (len(piece) - 2, True))
    known = int.from_bytes(piece[-width:], "little", signed=signed)
    number = chance.choice((known + 1, known - 1, known * 2, chance.randrange(9), chance.randrange(9)))
    return written(chance.choice(NUMBERS) if chance.random() < 0.2 else number)


def written(number: int) -> bytes:
    """The opcode for a number, as Python writes it."""
    if 0 <= number < 256:
        return b"K" + bytes([number])
    if 0 <= number < 65536:
        return b"M" + number.to_bytes(2, "little")
    if -(2**31) <= number < 2**31:
        return b"J" + number.to_bytes(4, "little", signed=True)
    raw = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def _other_text(pieces: list[bytes], chance: random.Random) -> bytes:
    texts = [piece for piece in pieces if piece[:1] in (b"X", b"\x8c")]
    kinds: tuple[Callable[[], str], ...] = (
        lambda: str(chance.randrange(4)),
        lambda: chance.choice(TEXTS),
        lambda: chance.choice(
            ("state_dict", "model", "module", "ema", "optimizer", "storage", "cpu", "meta", "latin1")
        ),
        lambda: chance.choice(("<", ">", "f4", "i8", "b1", "O8", "_parameters", "_buffers", "_modules", "model_ema")),
    )
    if texts and chance.random() < 0.5:
        return chance.choice(texts)
    raw = chance.choice(kinds)().encode("utf-8", "surrogatepass")
    return b"X" + len(raw).to_bytes(4, "little") + raw
