"""The options of a load, parsed into a `LoadRequest`."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..dtypes import parse_dtype
from ..errors import OptionError
from ..sizes import parse_size, shown
from .budget import MIN_STAGING
from .devices import parse_device_map, parse_max_memory
from .records import LoadRequest


def make_request(
    *,
    dtype: Any = "auto",
    device_map: Any = None,
    max_memory: Mapping[Any, int | str] | None = None,
    ram: int | str | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    keep_fp32: Iterable[str] | None = (),
    residency: str = "map",
    strict: bool = True,
    staging: int | str | None = None,
    no_split: Iterable[str] | None = None,
) -> LoadRequest:
    """Parse the options of `load`.

    Raises:
        OptionError: a value that means nothing.
    """
    if not isinstance(residency, str) or residency not in ("map", "copy"):
        raise OptionError(f"residency: expected 'map' or 'copy', found {shown(residency)}")
    staged = None if staging is None else parse_size(staging, "staging")
    if staged is not None and staged < MIN_STAGING:
        raise OptionError(f"staging: expected at least 1MiB, found {shown(staging)}")
    return LoadRequest(
        dtype=parse_dtype(dtype),
        device_map=parse_device_map(device_map),
        max_memory=parse_max_memory(max_memory),
        ram=None if ram is None else parse_size(ram, "ram"),
        staging=staged,
        offload_folder=None if offload_folder is None else parse_folder(offload_folder, "offload_folder"),
        keep_fp32=() if keep_fp32 is None else names_of(keep_fp32, "keep_fp32"),
        residency="map" if residency == "map" else "copy",
        strict=flag(strict, "strict"),
        no_split=None if no_split is None else names_of(no_split, "no_split"),
    )


def names_of(value: Iterable[str], what: str) -> tuple[str, ...]:
    """A name or several as a tuple; `what` names the option in the message.

    Raises:
        OptionError: something else.
    """
    # The text of bytes and the keys of a mapping would be taken for names.
    if not isinstance(value, Iterable) or isinstance(value, (bytes, bytearray, Mapping)):
        raise OptionError(f"{what}: expected a name or a list of names, found {shown(value)}")
    names = (value,) if isinstance(value, str) else tuple(value)
    bad = [name for name in names if not isinstance(name, str) or not name]
    if bad:
        raise OptionError(f"{what}: expected names, found {shown(bad[0])}")
    return names


def flag(value: bool, what: str) -> bool:
    """`value` if it is a truth value; no truth of other things, 'no' would be true.

    Raises:
        OptionError: it is not.
    """
    if not isinstance(value, bool):
        raise OptionError(f"{what}: expected True or False, found {shown(value)}")
    return value


def parse_folder(value: str | os.PathLike[str], what: str) -> Path:
    """The absolute path of a folder to write in, which need not exist; `~` is the home folder.

    Raises:
        OptionError: not a path, or one that no folder can have. `what` names the option in the message.
    """
    path = None
    try:
        text = os.fsdecode(value)
        # accelerate opens what is written there by safetensors, which takes only names in UTF-8.
        text.encode("utf-8")
        if not text or "\0" in text:
            raise ValueError("it is empty or holds a NUL")
        path = Path(text).expanduser().absolute()
        path.stat()
    except (TypeError, RuntimeError, ValueError) as error:
        raise OptionError(f"{what}: expected the path of a folder, found {shown(value)} ({error})") from error
    except OSError as error:
        # Without a current folder there is no absolute path; what only cannot be written, the writer finds out.
        if path is None or error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            raise OptionError(f"{what}: {shown(value)} cannot be followed: {error.strerror or error}") from error
    return path
