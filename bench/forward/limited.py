"""A generation in a process that the kernel allows so much memory: `python -m bench.forward.limited JSON`.

The process enters its memory cgroup before it imports anything, so the group pays for the interpreter, the model, the
process that samples memory, and every page of the files that it is the first to read. Pages of warm files were read
before by the bench, and are paid for there.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.kernel_limits import cgroup_kind, enter
from bench.page_cache import drop, warm
from bench.results import Row
from lowmem.sizes import MIB

_ROOT = Path(__file__).parent.parent.parent
# Of the limit, beside what the imports hold: activations, the KV cache, page tables, the sampler.
_SHARE = 128 * MIB
_LEAST_RAM = 64 * MIB


def run_limited(
    source: Path, limit: int, tokens: int, work: Path, seconds: float, tell: Callable[[str], None]
) -> Iterator[Row]:
    """Rows of a generation without limit, which gives the tokens, then with everything on disk, cold and warm.

    Args:
        source: the checkpoint.
        limit: bytes, for the whole tree of processes.
        tokens: to generate.
        work: a folder for what loaders write.
        seconds: limit of each process.
        tell: called with a line for each.
    """
    files = sorted(source.glob("*.safetensors"))
    kind = cgroup_kind()
    free = generate(source, "loaded", None, 0, tokens, work, seconds)
    free = {**free, "loader": "no limit, in memory"}
    tell(f"limit, {free['loader']}: {free['status']} {free['reason']}")
    yield free
    for state in ("cold", "warm"):
        row: Row = {"loader": f"lowmem, {state}", "limit": limit, "kind": kind}
        stayed = 0
        if state == "cold":
            stayed = drop(files)
        else:
            warm(files)
        if kind is None:
            row |= {"status": "cannot", "reason": "this process may make no memory cgroup"}
        elif stayed:
            row |= {"status": "not cold", "reason": f"{stayed} pages of the files stayed in the page cache"}
        else:
            row |= generate(source, "lowmem", kind, limit, tokens, work, seconds)
        tell(f"limit, {row['loader']}: {row['status']} {row['reason']}")
        yield check_tokens(row, free)


def check_tokens(row: Row, free: Row) -> Row:
    """The row, called `wrong` when its tokens are not those of the run without limit."""
    if row["status"] == free["status"] == "ok" and row["tokens"] != free["tokens"]:
        return {**row, "status": "wrong", "reason": f"its tokens are not those of {free['loader']}"}
    return row


def generate(
    source: Path, loader: str, kind: str | None, limit: int, tokens: int, work: Path, seconds: float
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=work) as folder:
        order = {"source": str(source), "loader": loader, "limit": limit, "tokens": tokens, "folder": folder}
        found = ask("bench.forward.limited", order, kind, seconds)
    if found["status"] != "ok":
        return found
    # The first token is the prompt's.
    times = found["times"][1:]
    summary = {"least": min(times), "median": statistics.median(times)} if times else {}
    return {**found, "times": [found["times"]], **summary}


def ask(module: str, order: dict[str, Any], kind: str | None, seconds: float) -> dict[str, Any]:
    """What a process of this module prints for the order; `killed` by the kernel's limit, or `failed`."""
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "HF_HUB_OFFLINE": "1", "LOWMEM_BENCH_LIMIT": kind or ""}
    process = subprocess.Popen(
        [sys.executable, "-m", module, json.dumps(order)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # Its own session, so that what it starts ends with it.
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"status": "failed", "reason": f"it took more than {seconds:.0f} s"}
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return {"status": "killed", "reason": "the kernel killed it"}
    if process.returncode:
        return {"status": "failed", "reason": (errors.strip().splitlines() or ["no word"])[-1][:400]}
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return {"status": "ok", "reason": "", **found}


def main() -> int:
    """One load and one generation; prints a line of JSON."""
    order = json.loads(sys.argv[1])
    if order["limit"]:
        enter(order["limit"])
    # What libraries print must not mix with the answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import lowmem
    import lowmem.loader
    from lowmem.limits import group_peak
    from lowmem.memory import anonymous_memory

    from .loaders import LOADERS, Order, transformers_class

    source = Path(order["source"])
    transformers_class(source)
    held = anonymous_memory()
    ram = max(_LEAST_RAM, order["limit"] - held - _SHARE) if order["limit"] else None
    started = time.perf_counter()
    with lowmem.measure() as memory:
        model = LOADERS[order["loader"]](Order(source, "bfloat16", "everything", Path(order["folder"]), ram))
        load = time.perf_counter() - started
        tokens, times = _run(model, order["tokens"])
    peak = group_peak() if order["limit"] else None
    found = {"load": load, "tokens": tokens, "times": times, "interpreter": held, "ram": ram}
    answers.write(json.dumps({**found, "peak": peak, "anonymous": held + memory.peak}) + "\n")
    answers.close()
    # Without a long tear-down: `os._exit`, as the sampler has ended.
    os._exit(0)


def _run(model: Any, count: int) -> tuple[list[int], list[float]]:
    """So many greedy tokens by the model's own `generate`, and the seconds of each; the first holds the prompt."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    from .child import prompt_for

    class Clock(StoppingCriteria):
        """Is asked after each token, and never stops."""

        def __init__(self) -> None:
            self.ticks = [time.perf_counter()]

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            self.ticks.append(time.perf_counter())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    clock = Clock()
    ids = prompt_for(model.config.vocab_size)
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), stopping_criteria=StoppingCriteriaList([clock]), **options
        )
    ticks = clock.ticks
    return out[0, ids.shape[1] :].tolist(), [after - before for before, after in itertools.pairwise(ticks)]


if __name__ == "__main__":
    sys.exit(main())
