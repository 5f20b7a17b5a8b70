"""The main job on a checkpoint of our own making: write, plan, load in less memory than it has, run, compare."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import ModelError, OptionError
from .planner import ProgressCallback
from .report import LoadReport
from .sizes import GIB, MIB, format_size, parse_size

# The interpreter's own fluctuations would drown anything smaller.
_LEAST = 16 * MIB


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
        raise OptionError(f"size: expected at least {format_size(_LEAST)}, found {size!r}")
    if tokens < 1:
        raise OptionError(f"tokens: expected at least 1, found {tokens}")
    budget = total // 2 if ram is None else parse_size(ram, "ram")
    _need_transformers()
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="lowmem-demo-", dir=folder))
    try:
        return _run(work, total, budget, dtype, tokens, say, progress)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _need_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ModelError(f"the demo runs a transformers model: {error}; install lowmem[transformers]") from error
    # It says that weights are on disk, which is the point here.
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)


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
