"""A manifest beside a checkpoint: the verdict is that of `sha256sum -c`, or the manifest is refused."""

from __future__ import annotations

import hashlib
import os
import random
import re
from pathlib import Path

import torch
from safetensors.torch import save

import lowmem

from .damage import TEXTS, damage
from .guard import Broken, Guard
from .scenes import check_elsewhere, elsewhere
from .targets import Target

_MODEL = save({"a": torch.ones(2)})
# Names that a manifest has to escape, and one that a terminal would obey.
_FILES = {
    "model.safetensors": _MODEL,
    "config.json": b"{}",
    "a\nb\\c.txt": b"line",
    "sub/\x1b[2Jé.txt": b"",
    "empty": b"",
}
_LINKS = {"out-of-here": "../elsewhere/held", "endless": "/dev/zero"}


def _line(name: str, content: bytes) -> bytes:
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return b"%s%s  %s\n" % (b"\\" * (escaped != name), hashlib.sha256(content).hexdigest().encode(), escaped.encode())


def _seeds() -> list[bytes]:
    lines = [_line(name, content) for name, content in _FILES.items()]
    return [
        b"".join(lines),
        lines[0],
        b"".join(lines).replace(b"  ", b" *").replace(b"\n", b"\r\n"),
        b"".join(lines) + _line("none", b""),
        b"".join(lines).upper().replace(b"MODEL.SAFETENSORS", b"./model.safetensors"),
        b"",
    ]


def _execute(guard: Guard, data: bytes, folder: Path) -> None:
    model = folder / "model"
    for name, content in _FILES.items():
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_bytes(content)
    held = elsewhere(folder)
    for name, target in _LINKS.items():
        (model / name).symlink_to(target)
    os.mkfifo(model / "pipe")
    manifest = folder / "SHA256SUMS"
    manifest.write_bytes(data)
    report = guard.run(lambda: lowmem.check(model, manifest), size=len(data), read=folder)
    check_elsewhere(held)
    if report is None:
        return
    expected = _verdict(model, data)
    if expected is None:
        raise Broken("a manifest was believed that sha256sum would find no line in, or that leads out of the folder")
    if report.is_fine != expected:
        raise Broken(f"fine: {report.is_fine}, by the reference {expected}: {[str(p) for p in report.problems]}"[:2000])


def _verdict(model: Path, data: bytes) -> bool | None:
    """Whether every line is of a file that has its hash and the weights are among them; None of what is no manifest."""
    fine, named = True, set()
    for line in data.split(b"\n"):
        found = re.fullmatch(rb"(\\?)([0-9a-fA-F]{64}) [ *](.+)", line.removesuffix(b"\r"), re.DOTALL)
        if found is None:
            if line.removesuffix(b"\r"):
                return None
            continue
        name = found[3]
        if found[1]:
            name = re.sub(rb"\\(.)", lambda m: {b"n": b"\n", b"r": b"\r"}.get(m[1], m[1]), name)
        if name.startswith(b"/") or b".." in name.split(b"/"):
            return None
        path = model / os.path.normpath(os.fsdecode(name))
        named.add(path)
        try:
            held = path.read_bytes() if path.is_file() else b"none"
        except (OSError, ValueError):
            held = b"none"
        fine = fine and hashlib.sha256(held).hexdigest().encode() == found[2].lower()
    return fine and model / "model.safetensors" in named


def _mutate(data: bytes, chance: random.Random) -> bytes:
    lines = data.split(b"\n")
    for _ in range(chance.choice((1, 1, 2, 3))):
        at = chance.randrange(len(lines))
        kind = chance.randrange(8)
        name = chance.choice((*_FILES, *_LINKS, "pipe", "sub", "sub/../config.json", "./empty", *TEXTS))
        if kind == 0:
            lines.insert(at, b"%064x  %s" % (chance.getrandbits(256), name.encode("utf-8", "surrogatepass")))
        elif kind == 1:
            name = chance.choice((*_FILES, *_LINKS, "pipe", "sub"))
            lines.insert(at, _line(name, chance.choice((b"", b"{}", b"line", b"held", _MODEL)))[:-1])
        elif kind == 2 and len(lines) > 1:
            del lines[at]
        elif kind == 3:
            lines[at:at] = lines[at : at + chance.choice((1, 2, 100))]
        elif kind == 4:
            lines[at] += b"\r"
        elif kind == 5:
            lines[at] = lines[at][:65] + chance.choice((b" ", b"*", b"  ", b"\t")) + name.encode("utf-8", "replace")
        elif kind == 6:
            lines[at] = b"\\" * chance.choice((0, 1, 2)) + lines[at].lstrip(b"\\")
        else:
            lines[at] = damage(lines[at], chance)
    return b"\n".join(lines)


TARGETS = (Target("manifest", _seeds, _execute, _mutate),)
