"""One process for one loader and one case: `python -m bench.child JSON` prints one line of JSON.

The order job says what to do: `time` (repeat the load, check it, measure its peak), `convert` (write the loader's own
format) or `least` (find the smallest kernel limit). The peak is measured in a fork that was made after the imports
and waited until the timed loads were done, so that it is a first load in a fresh heap and disturbs no time.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.loaders import Job, Loader, Model


def main() -> int:
    # What libraries print must not mix with the answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if sys.argv[1] == "serve":
        _serve(answers)
    else:
        _answer(json.loads(sys.argv[1]), answers)
    return 0


# Seconds of a load after which a process repeats no more.
_LONG = 30.0
# What the loads of most cases import; a loader imports the rest in its fork.
_COMMON = (
    "accelerate",
    "safetensors.torch",
    "transformers.generation.utils",
    "transformers.models.llama.modeling_llama",
    "lowmem.loader",
    "bench.checks",
    "bench.loaders",
)


def _serve(answers: IO[str]) -> None:
    """Import once and fork for each order; this process runs no torch operation, whose threads no fork survives."""
    for name in _COMMON:
        importlib.import_module(name)
    gc.collect()
    # Collections walk past what the imports left, so a loader that collects (accelerate) is quicker in a fork.
    gc.freeze()
    for line in sys.stdin:
        child = os.fork()
        if not child:
            with _no_way_back():
                _answer({**json.loads(line), "forked": True}, answers)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            answers.write(json.dumps({"status": "failed", "reason": f"killed (exit {status})"}) + "\n")
            answers.flush()


def _answer(order: dict[str, Any], answers: IO[str]) -> None:
    try:
        answer = _obey(order)
    except BaseException as error:
        traceback.print_exc()
        answer = {"status": "cannot", "reason": f"{type(error).__name__}: {_first_line(error)}"}
    answers.write(json.dumps(answer) + "\n")
    answers.close()
    # Without a long tear-down of what the loaders left.
    os._exit(0)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else ""


def _obey(order: dict[str, Any]) -> dict[str, Any]:
    started = time.perf_counter()
    # The order of these imports does not matter, and what they take is the loader's: it needs torch in any case.
    from bench.cases import Case
    from bench.loaders import LOADERS, Job
    from bench.models import shapes_of

    case = Case(**order["case"])
    loader = LOADERS[order["loader"]]
    reason = loader.can(case)
    if case.staging is not None and not loader.has_staging:
        reason = "nothing bounds its buffers"
    if case.is_int8 and not loader.has_int8:
        reason = "it knows no int8 layers"
    if reason is not None:
        return {"status": "cannot", "reason": reason}
    source = Path(order["source"])
    converted = None if order["converted"] is None else Path(order["converted"])
    work = Path(order["work"])
    job = Job(case, source, converted, work / "offload", () if case.has_config else shapes_of(source))
    job = replace(job, variant=loader.variants(case)[0])
    loader.imports(job)
    imported = None if order.get("forked") else time.perf_counter() - started
    if order["do"] == "convert":
        loader.convert(job)
        return {"status": "ok"}
    if order["do"] == "least":
        from bench.least_memory import find_least

        return find_least(loader, job, order["kind"], order["first"])
    peak = Waiting(lambda: measure_peak(loader, job)) if order["peak"] else None
    answer = {"import": imported, "note": loader.note(case), **_time(loader, job, order["repeats"])}
    if peak is not None:
        if answer["status"] == "ok":
            answer["peak"] = peak.go()
        else:
            peak.cancel()
    return answer


def _time(loader: Loader, job: Job, repeats: int) -> dict[str, Any]:
    """Load again and again, dropping the model between; check the first one's memory and the last one's values."""
    from bench.checks import WrongMemoryError, WrongResultError, check_memory, check_values

    runs: list[dict[str, Any]] = []
    answer: dict[str, Any] = {"status": "ok", "runs": runs}
    variants = loader.variants(job.case)
    turns = [replace(job, variant=variant) for _ in range(repeats) for variant in variants]
    for number, turn in enumerate(turns):
        stayed = _make_ready(turn)
        if stayed:
            return {"status": "not cold", "reason": f"{stayed} pages of the files stayed in the page cache"}
        model, run = _load_once(loader, turn)
        runs.append(run)
        # A load of half a minute is not repeated: no least of several would change what it tells.
        last = number == len(turns) - 1 or run["build"] + run["weights"] > _LONG
        try:
            if number == 0:
                check_memory(job.case, job.source, model)
            # The last of each variant.
            if last or number >= len(turns) - len(variants):
                answer["checked"] = check_values(job.case, job.source, model)
        except WrongMemoryError as error:
            return {"status": "cannot", "reason": str(error)}
        except WrongResultError as error:
            return {"status": "wrong", "reason": f"wrong: {error}"}
        finally:
            del model
            release()
        if last:
            answer["cut"] = number < len(turns) - 1
            break
    shutil.rmtree(job.offload, ignore_errors=True)
    return answer


def _load_once(loader: Loader, job: Job) -> tuple[Model, dict[str, Any]]:
    from bench.phases import Phases

    phases = Phases()
    phases.start()
    model = loader.load(job, phases)
    phases.stop()
    return model, {**phases.to_dict(), "variant": job.variant}


def release() -> None:
    """Give freed memory back to the kernel, so that every load gets fresh memory, as the limit does."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _make_ready(job: Job) -> int:
    """An empty offload folder, and files cold or warm as the case wants; returns the pages that stayed cached."""
    from bench.page_cache import drop, warm

    shutil.rmtree(job.offload, ignore_errors=True)
    job.offload.mkdir(parents=True)
    if job.case.cold:
        return drop(job.files)
    warm(job.files)
    return 0


def measure_peak(loader: Loader, job: Job) -> dict[str, Any]:
    """One load under a measure: the anonymous peak above the imports, and the timeline."""
    import lowmem

    shutil.rmtree(job.offload, ignore_errors=True)
    job.offload.mkdir(parents=True)
    from bench.phases import Phases

    phases = Phases()
    with lowmem.measure() as memory:
        phases.start()
        model = loader.load(job, phases)
    del model
    shutil.rmtree(job.offload, ignore_errors=True)
    step = max(1, len(memory.samples) // 200)
    parts = [memory.samples[n : n + step] for n in range(0, len(memory.samples), step)]
    # The highest of each stretch, so that thinning hides no peak.
    timeline = [[round(part[0][0], 4), max(s[1] for s in part) - memory.baseline] for part in parts]
    return {"peak": memory.peak, "peak_rss": memory.peak_rss, "timeline": timeline}


class Waiting:
    """A fork of this process that waits for its turn, does one thing and answers with it."""

    def __init__(self, action: Callable[[], dict[str, Any]]) -> None:
        waiting, self._start = os.pipe()
        self._answer, answering = os.pipe()
        self._child = os.fork()
        if self._child:
            os.close(waiting)
            os.close(answering)
            return
        os.close(self._start)
        os.close(self._answer)
        with _no_way_back():
            if os.read(waiting, 1) == b"g":
                try:
                    result = action()
                except BaseException as error:
                    result = {"error": f"{type(error).__name__}: {_first_line(error)}"}
                with os.fdopen(answering, "w") as pipe:
                    pipe.write(json.dumps(result))

    def go(self) -> dict[str, Any]:
        """Let it do its thing; `error` in the answer when it could not."""
        os.write(self._start, b"g")
        with os.fdopen(self._answer) as pipe:
            text = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(self._child, 0)[1])
        os.close(self._start)
        found: dict[str, Any] = json.loads(text) if text else {"error": f"killed (exit {status})"}
        return found

    def cancel(self) -> None:
        """Let it end."""
        os.close(self._start)
        os.waitpid(self._child, 0)


@contextlib.contextmanager
def _no_way_back() -> Iterator[None]:
    """A fork must not return into its parent's code."""
    try:
        yield
    finally:
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
