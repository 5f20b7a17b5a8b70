"""The door to pickled weights: what kind of file it is, by its first bytes, and its reader."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from ..errors import CheckpointError, LowmemError, UnsupportedError
from .pickles import Machine
from .places import FileRange, opened, read_at
from .records import PickledFile
from .torch_legacy import MAGIC, read_torch_legacy
from .torch_zip import SIGNATURE, read_torch_zip

# The pickle of the magic number is shorter in every protocol.
_MAGIC_LENGTH = 64
# First bytes → what such a file is, and what to do.
_KINDS = {
    b"version https://git-lfs": ("a pointer of git-lfs, and not the weights", "run git lfs pull"),
    b"<!doctype html": ("a web page", "the download went wrong: download it again"),
    b"<html": ("a web page", "the download went wrong: download it again"),
    b"\x1f\x8b": ("a file compressed by gzip", "unpack it with gunzip"),
    b"\x28\xb5\x2f\xfd": ("a file compressed by zstd", "unpack it with unzstd"),
    b"\xfd7zXZ": ("a file compressed by xz", "unpack it with unxz"),
    b"BZh": ("a file compressed by bzip2", "unpack it with bunzip2"),
    b"\x93numpy": ("an array of numpy (.npy)", "numpy.load reads it: save it as a tensor"),
    b"\x89hdf\r\n": ("an HDF5 file, perhaps of Keras", "convert it to safetensors"),
    b"gguf": ("a GGUF file", "take the original weights"),
    b"pk\x05\x06": ("an empty zip", "download it again"),
}


def read_pickled(file: Path) -> PickledFile:
    """Look at a file of `torch.save`, of any version, without executing its pickle.

    Reads the pickle and the zip's directory; no bytes of tensors.

    Raises:
        CheckpointError: not a regular file, unreadable, empty, damaged or truncated.
        UnsupportedError: readable, but not a file of `torch.save`, or of a kind that is not read; it says which.
    """
    with opened(file) as (f, status):
        head = read_at(f, 0, 512)
        if head.startswith(SIGNATURE):
            return read_torch_zip(file, f, status)
        if _is_legacy(f, status):
            return read_torch_legacy(file, f, status)
        raise _other(file, head, status.st_size)


def _is_legacy(f: BinaryIO, status: os.stat_result) -> bool:
    try:
        return bool(Machine(FileRange(f, 0, min(_MAGIC_LENGTH, status.st_size)), 0, "").run() == MAGIC)
    except LowmemError:
        return False


def _other(file: Path, head: bytes, size: int) -> LowmemError:
    """The error for a file that torch.save did not write in one of the two formats."""
    if not head:
        return CheckpointError(f"{file}: expected weights, found an empty file; download it again")
    lowered = head.lstrip().lower()
    for begin, (what, remedy) in _KINDS.items():
        if lowered.startswith(begin.lower()) or head.startswith(begin):
            return UnsupportedError(f"{file}: expected a file of torch.save, found {what}; {remedy}")
    if head[257:262] == b"ustar":
        return UnsupportedError(
            f"{file}: expected a file of torch.save, found a tar file; torch wrote such before version 0.1.12: "
            "torch.load(weights_only=False) reads it where you trust it, torch.save writes it anew"
        )
    if len(head) > 9 and head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= size - 8:
        return UnsupportedError(
            f"{file}: expected a file of torch.save, found a safetensors file by its header; name it *.safetensors"
        )
    if len(head) > 1 and head[0] == 0x80 and 2 <= head[1] <= 5:
        return UnsupportedError(
            f"{file}: expected a file of torch.save, found a plain pickle, as pickle.dump or joblib write; "
            "load it where you trust it, and save its tensors with torch.save or safetensors"
        )
    if head.isascii() and all(byte >= 0x20 or byte in b"\t\r\n" for byte in head):
        text = head[:40].decode("utf-8", "replace").strip()
        return UnsupportedError(
            f"{file}: expected a file of torch.save, found text that begins with {text!r}; "
            "look what was downloaded, and download it again"
        )
    return CheckpointError(
        f"{file}: expected a file of torch.save, found bytes that begin with {head[:8].hex(' ')}; "
        "it is damaged or something else; download it again"
    )
