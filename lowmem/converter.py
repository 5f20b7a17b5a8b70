"""Any checkpoint into sharded safetensors: moves of the engine into files, in bounded memory, resumable, verified."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ._collector import paused_collector
from ._files import read_small
from .checkpoint import Checkpoint, make_wish, survey
from .checkpoint.index import led_outside
from .checkpoint.there import is_file_at, looking_at, table_at
from .converting_int8 import KEEP, Declared, declare, find_change
from .dtypes import parse_dtype
from .engine import undisturbed
from .engine.conversion_folder import ConversionFolder
from .engine.shard_writer import Sealer, ShardFile, write_shard
from .errors import CheckpointError, OptionError
from .planner import Progress, ProgressCallback
from .planner.convert import INDEX, ConvertPlan, ConvertRequest, make_convert_plan
from .planner.request import (
    Names,
    Renames,
    checks_names,
    flag,
    make_int8_request,
    make_key_rules,
    parse_folder,
    parse_io,
    parse_staging,
)
from .sizes import parse_size, shown

# What transformers and tokenizers write beside weights, and read again; never weights or an optimizer's state.
_BESIDE = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "feature_extractor_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "normalizer.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model*",
    "vocab*.json",
    "vocab*.txt",
    "vocab.bpe",
    "merges*.txt",
    "*.spm",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template*",
    "*.jinja",
)
_CONFIG = "config.json"
_PROGRESS_EVERY = 0.05


@dataclass(frozen=True, eq=False)
class ConvertReport:
    """What a conversion made.

    Attributes:
        source: as the user gave it.
        folder: where the result lies.
        files: name → bytes of each weight file.
        kept: those of them that an earlier run had finished.
        copied: small files that came along.
        tensors: how many are stored.
        shared: name that is left out → name under which its bytes are stored.
        bytes_read: tensor bytes that this run read.
        bytes_written: bytes of weight files that this run wrote.
        verified: whether what was written was read back.
        seconds: of everything.
        warnings: what was odd in the source and what was believed.
    """

    source: str
    folder: Path
    files: Mapping[str, int]
    kept: tuple[str, ...]
    copied: tuple[str, ...]
    tensors: int
    shared: Mapping[str, str] = field(repr=False)
    bytes_read: int
    bytes_written: int
    verified: bool
    seconds: float
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain values, as `lowmem convert --json` prints it. Sizes in bytes."""
        table = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            **table,
            "folder": os.fspath(self.folder),
            "files": dict(self.files),
            "shared": dict(self.shared),
            **{name: list(table[name]) for name in ("kept", "copied", "warnings")},
        }


@checks_names
def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: Any = "auto",
    max_shard_size: int | str = "5GiB",
    rename: Renames = None,
    prefix: str | None = None,
    only: Names = None,
    skip: Names = None,
    weights: str | None = None,
    ema: bool | None = None,
    variant: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    download: bool = False,
    staging: int | str | None = None,
    io: str = "auto",
    keep_cache: bool = False,
    verify: bool = True,
    quantize: str | None = None,
    skip_modules: str | Iterable[str] | None = None,
    dequantize: bool = False,
    trust_remote_code: bool = False,
    progress: ProgressCallback | None = None,
) -> ConvertReport:
    """Write a checkpoint as safetensors: one file, or shards with an index, as `save_pretrained` lays them out.

    Memory is `staging`, whatever the size of tensors and shards. Tensors that are one range of the source are stored
    once; headers and index say which names were left out. A run that was ended leaves nothing that looks finished, and
    the next with the same source and options goes on behind the last whole file. The config, the tokenizer's files and
    others like them come along; in `config.json` the dtype is the one that was asked for.

    Args:
        source: what `load` takes.
        out: a folder that is empty, not there yet, or holds an unfinished run of this conversion.
        dtype: `"auto"` (as the checkpoint has it), or a float dtype; floating tensors only.
        max_shard_size: bytes of tensors in one file; a larger tensor has a file of its own.
        rename: regular expression → replacement, or a function of the key, or several of them, in this order.
        prefix: take only what is inside this module, and leave the prefix off.
        only: the tensors to take: names of tensors or modules, patterns with `*`, or a function of the key.
        skip: those to leave, likewise.
        weights: path of the mapping inside a pickled file, as in `inspect`.
        ema: averaged weights or others, as in `inspect`.
        variant: take the files with this word in their names, such as `"fp16"`.
        subfolder: a folder inside the source that is meant, with its own config.
        revision: a branch, tag or commit of a model of the hub, as after `@` in the source.
        download: whether a model of the hub may be fetched.
        staging: bound on the readers' buffers, at least 1 MiB. Default: what they can use, at most 64 MiB.
        io: how files are read, as in `load`.
        keep_cache: leave in the page cache what was read and was not there before.
        verify: read back from the disk what was written, and compare checksums.
        quantize: `"int8"`: make the linear layers of the transformers model int8, row by row, as transformers saves
            them with bitsandbytes; `config.json` says so, and names what stays floats where transformers would not
            know.
        skip_modules: names of linear layers that stay floats then, as in `load`.
        dequantize: make floats of what is int8, of `dtype`, or of that which `config.json` names.
        trust_remote_code: whether Python files beside the checkpoint may run; only `quantize` and `dequantize` ask for
            the model.
        progress: called with a `Progress` from the calling thread, in bytes of the source.

    Returns:
        What was made.

    Raises:
        ModelError: `quantize` needs the model, and no `config.json` tells which one it is.
        OutputError: the folder holds something else, cannot be written, or does not hold what was written.
        LowmemError: see `lowmem.errors`.
    """
    started = time.perf_counter()
    request = ConvertRequest(
        dtype=parse_dtype(dtype),
        max_shard_size=parse_size(max_shard_size, "max_shard_size"),
        rules=make_key_rules(prefix=prefix, only=only, skip=skip, rename=rename),
        staging=parse_staging(staging),
        io=parse_io(io),
        keep_cache=flag(keep_cache, "keep_cache"),
    )
    int8 = make_int8_request(quantize, skip_modules, dequantize)
    remote = flag(trust_remote_code, "trust_remote_code")
    wish = make_wish(weights, ema)
    verify = flag(verify, "verify")
    folder = parse_folder(out, "out")
    if progress is not None and not callable(progress):
        raise OptionError(f"progress: expected a function of one Progress, found {shown(progress)}")
    with paused_collector():
        found = survey(source, variant=variant, subfolder=subfolder, revision=revision, download=download)
        checkpoint = found.open(wish)
        del found
        change = find_change(checkpoint, request, int8, trust_remote_code=remote)
        plan = make_convert_plan(checkpoint, folder, change.request)
    beside = _beside(checkpoint)
    last = _last(checkpoint, plan, change.declared)
    result = ConversionFolder(plan, beside, last)
    with result.open():
        kept = {file.name for file in plan.files if result.is_whole(file, verify=verify)}
        result.check_room(sum(file.size for file in plan.files if file.name not in kept))
        _write(plan, kept, result, verify, progress)
        result.publish()
    fresh = [n for n, file in enumerate(plan.files) if file.name not in kept]
    return ConvertReport(
        source=checkpoint.source,
        folder=folder,
        files={file.name: file.size for file in plan.files},
        kept=tuple(sorted(kept)),
        copied=(*(path.name for path in beside), *(name for name in last if name == _CONFIG)),
        tensors=plan.tensors,
        shared=plan.shared,
        bytes_read=sum(plan.shards[n].bytes_read for n in fresh),
        bytes_written=sum(plan.files[n].size for n in fresh),
        verified=verify,
        seconds=time.perf_counter() - started,
        warnings=(*checkpoint.warnings, *change.warnings),
    )


def _write(
    plan: ConvertPlan, kept: set[str], result: ConversionFolder, verify: bool, progress: ProgressCallback | None
) -> None:
    """Every file that is not whole yet, through one sealer."""
    meter = _Meter(plan.bytes_read, progress)
    sealer = Sealer(verify=verify, seal=result.seal)
    try:
        for shard, file in zip(plan.shards, plan.files, strict=True):
            meter.file = file.name
            if file.name in kept:
                meter.kept(shard.bytes_read)
            else:
                result.check_place()
                write_shard(shard, ShardFile(file, result.hidden), sealer, meter.moved)
        sealer.finish()
        meter.finish()
    finally:
        undisturbed(sealer.end)


class _Meter:
    """Tells the caller how far it is; `file` is the one that is written."""

    def __init__(self, total: int, progress: ProgressCallback | None) -> None:
        self.file = ""
        self._total = total
        self._progress = progress
        self._done = self._moved = 0
        self._started = time.monotonic()
        self._reported = 0.0

    def kept(self, nbytes: int) -> None:
        """Done by an earlier run."""
        self._done += nbytes

    def moved(self, nbytes: int) -> None:
        """Done now."""
        self._done += nbytes
        self._moved += nbytes
        # The last word is for when everything is on the disk.
        if time.monotonic() - self._reported >= _PROGRESS_EVERY and self._done < self._total:
            self._report()

    def finish(self) -> None:
        """All is done."""
        self._done = self._total
        self._report()

    def _report(self) -> None:
        if self._progress is None:
            return
        self._reported = time.monotonic()
        rate = self._moved / max(self._reported - self._started, 1e-9)
        left = (self._total - self._done) / rate if rate else None
        self._progress(Progress(self._done, self._total, rate, left, self.file))


def _beside(checkpoint: Checkpoint) -> list[Path]:
    """The small files that belong to the model; its own Python files only where its config names them."""
    patterns = [*_BESIDE, *(["*.py"] if _has_code(checkpoint) else [])]
    with looking_at(checkpoint.folder):
        names = sorted(entry.name for entry in checkpoint.folder.iterdir())
    wanted = (name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))
    found = [path for name in wanted if is_file_at(path := checkpoint.folder / name)]
    for path in (*found, *((checkpoint.config,) if checkpoint.config is not None else ())):
        # Else a link that came with the weights would put a file of the user's into what he may publish.
        if (led := led_outside(checkpoint.folder, path)) is not None:
            raise CheckpointError(
                f"{path}: expected a file inside {checkpoint.folder}, found a link to {led}; put the file itself into "
                "the folder, or remove the link"
            )
    return found


def _has_code(checkpoint: Checkpoint) -> bool:
    return checkpoint.config is not None and any(
        "auto_map" in table_at(path) for path in (checkpoint.config, checkpoint.folder / "tokenizer_config.json")
    )


def _last(checkpoint: Checkpoint, plan: ConvertPlan, declared: Declared) -> dict[str, bytes]:
    """The index and the config, in this order."""
    last = {}
    index = plan.index()
    if index is not None:
        # As save_pretrained of transformers writes it (modeling_utils.py).
        last[INDEX] = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
    if checkpoint.config is not None:
        with looking_at(checkpoint.config):
            text = read_small(checkpoint.config)
        table = table_at(checkpoint.config)
        stated = [name for name in ("dtype", "torch_dtype") if isinstance(table.get(name), str)]
        wrong = plan.dtype != "auto" and any(table[name] != plan.dtype for name in stated)
        if wrong or "transformers_weights" in table or declared != KEEP:
            # transformers would load the weights in the dtype that they no longer have, and look for files that have
            # other names here; save_pretrained leaves the names out too.
            table.update(dict.fromkeys(stated, plan.dtype) if wrong else {})
            table.pop("transformers_weights", None)
            try:
                declare(table, declared)
                text = (json.dumps(table, indent=2) + "\n").encode()
            except RecursionError as error:
                raise CheckpointError(
                    f"{checkpoint.config}: nested too deep to be written again; bring the model's own"
                ) from error
        last[_CONFIG] = text
    return last


__all__ = ["ConvertReport", "convert"]
