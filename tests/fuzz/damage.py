"""Damage of any bytes, and values that break what counts."""

from __future__ import annotations

import random
from typing import Any

NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 8, 16, 63, 64, 65, 255, 256, 4095, 4096, 65535, 65536),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30),
)
TEXTS = (
    *(
        "",
        "a",
        "..",
        "../x",
        "/etc/passwd",
        "a/b",
        ".",
        "a\0b",
        "\x1b[2J\x1b]0;x\x07",
        "\u202e",
        "\ud800",
        "é",
        "e\u0301",
    ),
    *("__metadata__", "weight", "a" * 300, "0", "-0", "nan", "con", "*", "[", "{}", "%s", "\n", "model.safetensors"),
)
ODD: tuple[Any, ...] = (None, True, False, 1.5, 1e308, -0.0, [], {}, [[]], "", *NUMBERS[:4])


def damage(data: bytes, chance: random.Random) -> bytes:
    """A few bytes changed, taken, added, repeated; or an end cut off."""
    made = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 8))):
        at = chance.randrange(len(made) + 1)
        kind = chance.randrange(7)
        if kind == 0 and made:
            made[at - 1] ^= 1 << chance.randrange(8)
        elif kind == 1 and made:
            made[at - 1] = chance.randrange(256)
        elif kind == 2:
            made[at:at] = chance.randbytes(chance.randrange(1, 9))
        elif kind == 3:
            del made[at : at + chance.randrange(1, 17)]
        elif kind == 4:
            end = at + chance.randrange(1, 33)
            made[at:at] = made[at:end]
        elif kind == 5:
            width = chance.choice((1, 2, 4, 8))
            number = chance.choice(NUMBERS) % (1 << 8 * width)
            made[at : at + width] = number.to_bytes(width, "little")
        elif chance.random() < 0.3:
            del made[at:]
    return bytes(made)


def change(value: Any, chance: random.Random) -> Any:
    """A value of JSON with something in it changed: another number, another text, another kind, more or less of it."""
    if chance.random() < 0.1:
        return chance.choice(ODD)
    if isinstance(value, dict):
        return _changed_table(value, chance)
    if isinstance(value, list):
        return _changed_list(value, chance)
    if isinstance(value, int | float):
        small = value + chance.choice((-1, 1)) if isinstance(value, int) else -value
        return chance.choice((small, chance.choice(NUMBERS), value * 2))
    if isinstance(value, str):
        return chance.choice((value + "x", value[:-1], value.upper(), chance.choice(TEXTS)))
    return chance.choice(ODD)


def _changed_table(table: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    made = dict(table)
    keys = list(made)
    kind = chance.randrange(6)
    if not keys or kind == 0:
        made[chance.choice(TEXTS)] = chance.choice((*made.values(), *ODD))
    elif kind == 1:
        del made[chance.choice(keys)]
    elif kind == 2:
        old = chance.choice(keys)
        made = {(str(change(key, chance)) if key == old else key): item for key, item in made.items()}
    elif kind == 3 and len(keys) > 1:
        one, other = chance.sample(keys, 2)
        made[one], made[other] = made[other], made[one]
    else:
        key = chance.choice(keys)
        made[key] = change(made[key], chance)
    return made


def _changed_list(items: list[Any], chance: random.Random) -> list[Any]:
    made = list(items)
    kind = chance.randrange(5)
    if not made or kind == 0:
        made.insert(chance.randrange(len(made) + 1), chance.choice((*made, *NUMBERS)))
    elif kind == 1:
        made.pop(chance.randrange(len(made)))
    elif kind == 2:
        chance.shuffle(made)
    else:
        at = chance.randrange(len(made))
        made[at] = change(made[at], chance)
    return made
