"""The main job on a checkpoint of our own making: write, plan, load in less memory than it has, run, compare."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .dtypes import parse_dtype
from .errors import ModelError, OptionError
from .planner import ProgressCallback
from .report import LoadReport
from .sizes import GIB, MIB, format_size, parse_size, shown

# The interpreter's own fluctuations would drown anything smaller.
_LEAST = 16 * MIB
_MOST_TOKENS = 10_000


def run_demo(
    *,
    size: int | str = GIB,
    ram: int | str | None = None,
    dtype: str = "float32",
    folder: str | None = None,
    tokens: int = 4,
    say: Callable[[Any], None],
    progress: ProgressCallback | None = None,
) -> LoadReport:
    """Write a Llama-architecture checkpoint, load it under a budget smaller than it, generate, and clean up.

    Args:
        size: bytes of the bf16 checkpoint.
        ram: budget of the load; half the checkpoint by default.
        dtype: to load at; `"auto"` maps the checkpoint instead of casting it.
        folder: where to write a folder of its own; the system's temporary folder by default.
        tokens: how many to generate.
        say: gets texts and tables to show.
        progress: called while the weights move.

    Raises:
        OptionError: a size or a number that means nothing.
        ModelError: transformers is not installed.
        LowmemError: whatever `load` refuses.
    """
    total = parse_size(size, "size")
    if total < _LEAST:
        raise OptionError(f"size: expected at least {format_size(_LEAST)}, found {shown(size)}")
    if isinstance(tokens, bool) or not isinstance(tokens, int) or not 1 <= tokens <= _MOST_TOKENS:
        raise OptionError(f"tokens: expected a number from 1 to {_MOST_TOKENS}, found {shown(tokens)}")
    dtype = parse_dtype(dtype)
    budget = total // 2 if ram is None else parse_size(ram, "ram")
    _need_transformers()
    work = _make_folder(folder)
    try:
        free = shutil.disk_usage(work).free
        if total > free:
            raise OptionError(
                f"size: {format_size(total)} do not fit in {work.parent}, where {format_size(free)} are free; "
                "give a smaller size, or another folder"
            )
        return _run(work, total, budget, dtype, tokens, say, progress)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _make_folder(folder: str | None) -> Path:
    """A new folder inside `folder`, or inside the system's temporary one."""
    from .planner.request import parse_folder

    inside = None if folder is None else parse_folder(folder, "folder")
    try:
        if inside is not None:
            inside.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="lowmem-demo-", dir=inside))
    except OSError as error:
        where = "the temporary folder" if folder is None else shown(folder)
        reason = error.strerror or error
        raise OptionError(f"folder: {where} cannot be written: {reason}; give one that can") from error


def _need_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ModelError(f"the demo runs a transformers model: {error}; install lowmem[transformers]") from error


def _run(
    work: Path,
    total: int,
    budget: int,
    dtype: str,
    tokens: int,
    say: Callable[[Any], None],
    progress: ProgressCallback | None,
) -> LoadReport:
    import torch

    from .loader import load, plan
    from .report import plan_tables, report_table
    from .synthetic import llama_recipe, write_checkpoint

    recipe = llama_recipe(total)
    source = write_checkpoint(recipe, work / "model", max_shard_size=max(total // 4, _LEAST))
    say(f"wrote {source}: {len(recipe.tensors)} tensors, {format_size(recipe.nbytes)} of bf16, in shards")
    options: dict[str, Any] = {
        "dtype": dtype,
        "device_map": "auto",
        "ram": budget,
        "offload_folder": work / "offload",
    }
    decided = plan(source, **options)
    say(f"plan for {dtype} within {format_size(budget)} of RAM:")
    for table in plan_tables(decided):
        say(table)
    result = load(source, progress=progress, **options)
    prompt = torch.arange(1, 9)[None]
    model: Any = result.model
    made = model.generate(prompt, max_new_tokens=tokens, do_sample=False)[0, prompt.shape[1] :]
    say(f"generated tokens {made.tolist()} (random weights: any tokens will do)")
    say(report_table(result.report))
    return result.report
