"""The verbs that write a checkpoint anew, and look whether one is whole."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

from .._terminal import print_json, progress_bar, say, show, warn
from ..sizes import format_size
from .options import (
    add_key_options,
    add_selection,
    add_source,
    key_options,
    selection_options,
    source_options,
    split,
)
from .parser import FAILED, FINE, verb


def add_convert(verbs: Any) -> None:
    """`lowmem convert`."""
    parser = verb(verbs, "convert", "write a checkpoint as sharded safetensors, in bounded memory; goes on", _convert)
    add = parser.add_argument
    add_source(parser)
    add("out", metavar="OUT", help="folder: empty, not there yet, or with an unfinished run of this conversion")
    add("--dtype", default="auto", help="auto (the checkpoint's, default), float32, bfloat16, float16, ...")
    add("--max-shard-size", metavar="SIZE", default="5GiB", help="bytes of tensors in one file (default 5GiB)")
    add_key_options(parser)
    add("--quantize", choices=("int8",), help="make linear layers int8, as transformers saves them with bitsandbytes")
    add(
        "--skip-modules",
        metavar="NAMES",
        action="append",
        help="linear layers that --quantize leaves floats, a,b,... (default: as transformers)",
    )
    add("--dequantize", action="store_true", help="make floats of what is int8")
    add("--trust-remote-code", action="store_true", help="let Python files beside the checkpoint run")
    add("--staging", metavar="SIZE", help="bound on the readers' buffers, at least 1MiB")
    add(
        "--io", choices=("auto", "buffered", "direct", "mmap"), default="auto", help="how files are read (default auto)"
    )
    add("--keep-cache", action="store_true", help="leave in the page cache what was read")
    add("--no-verify", dest="verify", action="store_false", help="do not read back what was written")


def add_check(verbs: Any) -> None:
    """`lowmem check`."""
    parser = verb(verbs, "check", "check headers, index, sizes, and hashes where some are known", _check)
    add = parser.add_argument
    add("source", metavar="SRC", help="what load takes")
    add_selection(parser)
    add("--manifest", metavar="FILE", help="SHA-256 of the files, as sha256sum writes it, names relative to SRC")
    add("--write-manifest", metavar="FILE", help="write one, of all files")


def _convert(arguments: argparse.Namespace) -> int:
    from ..converter import convert

    with progress_bar() as progress, _going_on(arguments.out):
        report = convert(
            arguments.source,
            arguments.out,
            dtype=arguments.dtype,
            max_shard_size=arguments.max_shard_size,
            **source_options(arguments),
            **key_options(arguments),
            staging=arguments.staging,
            io=arguments.io,
            keep_cache=arguments.keep_cache,
            verify=arguments.verify,
            quantize=arguments.quantize,
            skip_modules=None if arguments.skip_modules is None else split(arguments.skip_modules),
            dequantize=arguments.dequantize,
            trust_remote_code=arguments.trust_remote_code,
            progress=progress,
        )
    warn(report.warnings)
    if arguments.json:
        print_json(report.to_dict())
        return FINE
    from ..report import plain

    lines = [
        f"{_count(len(report.files), 'file')}, {_count(report.tensors, 'tensor')}, "
        f"{format_size(sum(report.files.values()))} in "
        f"{report.seconds:.2f} s, {'read back' if report.verified else 'not read back'}: {report.folder}"
    ]
    if report.kept:
        lines.append(f"kept from an earlier run: {', '.join(report.kept)}")
    if report.shared:
        lines.append(f"stored once: {', '.join(f'{name} as {kept}' for name, kept in report.shared.items())}")
    if report.copied:
        lines.append(f"copied: {', '.join(report.copied)}")
    show(*map(plain, lines))
    return FINE


@contextlib.contextmanager
def _going_on(out: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        say(f"lowmem: {out}: what is whole is kept: the same command goes on behind it")
        raise


def _check(arguments: argparse.Namespace) -> int:
    from ..checker import check

    with progress_bar() as progress:
        report = check(
            arguments.source,
            arguments.manifest,
            arguments.write_manifest,
            **selection_options(arguments),
            progress=progress,
        )
    warn(report.warnings)
    code = FINE if report.is_fine else FAILED
    if arguments.json:
        print_json(report.to_dict())
        return code
    from ..report import plain

    count = len(report.problems)
    verdict = "fine" if not count else _count(count, "problem")
    read = f"{len(report.verified)} verified by hash ({format_size(report.hashed)} read)"
    if arguments.write_manifest is not None and not count:
        read = f"{format_size(report.hashed)} read, hashes written to {arguments.write_manifest}"
    elif not report.verified:
        read = "headers and sizes only: no hash is known (--manifest, --write-manifest)"
    show(*(plain(str(problem)) for problem in report.problems))
    show(plain(f"{verdict}: {_count(len(report.files), 'file')}, {read}, {report.seconds:.2f} s"))
    if count and arguments.write_manifest is not None:
        say(f"lowmem: {arguments.write_manifest}: not written, because something is wrong")
    return code


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
