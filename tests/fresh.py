"""Fresh processes that have imported everything already: one server imports once and forks for each job.

A job is Python source; it finds its arguments in `args` and leaves plain values in `result`. The child has run no torch
operation yet (a fork does not survive OpenMP's threads), so its memory is that of imports alone.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

# What a load with int8 layers would import on the way.
INT8_IMPORTS = (
    ("transformers.integrations.bitsandbytes", "transformers.quantizers.quantizer_bnb_8bit", "bitsandbytes")
    if importlib.util.find_spec("bitsandbytes") is not None
    else ()
)
# What torch imports when it first computes with tensors without values.
COMPUTING_IMPORTS = ("torch._dynamo",)
# What a load would import on the way.
_IMPORTS = (
    "accelerate",
    "psutil",
    "torch",
    "transformers.generation.utils",
    "transformers.models.llama.modeling_llama",
    "bench.kernel_limits",
    "lowmem.loader",
    "lowmem.memory",
)
_ROOT = Path(__file__).parent.parent


class JobError(Exception):
    """The job raised or was killed; `status` is its exit code, negative for a signal."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"exit {status}\n{text}")
        self.status = status
        self.text = text


class Server:
    def __init__(self, more: tuple[str, ...]) -> None:
        environment = {**os.environ, "PYTHONPATH": f"{_ROOT}{os.pathsep}{Path(__file__).parent}", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, *more], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def run(self, job: str, /, limit: tuple[str, int, int] | None = None, **args: Any) -> Any:
        """`limit` is (kind, bytes, bytes that the kind counts besides), applied on top of what the child has."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps({"source": job, "args": args, "limit": limit}) + "\n")
        stdin.flush()
        answer = json.loads(stdout.readline())
        if answer["status"]:
            raise JobError(answer["status"], answer["text"])
        return answer["result"]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@functools.cache
def server(*more: str) -> Server:
    """One for all tests that import no more than this: it takes seconds to start."""
    made = Server(more)
    atexit.register(made.close)
    return made


@functools.cache
def big_checkpoint() -> Path:
    """A Llama of about 256 MiB in bfloat16, in four shards. Read it, do not change it."""
    from lowmem.sizes import MIB
    from lowmem.synthetic import llama_recipe, write_checkpoint

    folder = Path(tempfile.mkdtemp(prefix="lowmem-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return write_checkpoint(llama_recipe(256 * MIB), folder, max_shard_size=64 * MIB)


def _job(job: dict[str, Any]) -> Any:
    if job["limit"] is not None:
        from bench.kernel_limits import enter_above

        enter_above(*job["limit"])
    space: dict[str, Any] = {"args": job["args"], "result": None, "__name__": "job"}
    exec(compile(job["source"], "<job>", "exec"), space)
    return space["result"]


def _fork(job: dict[str, Any]) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        status, answer = 0, {"result": None, "text": ""}
        try:
            answer["result"] = _job(job)
        except BaseException:
            status, answer["text"] = 1, traceback.format_exc()
        with os.fdopen(writing, "w") as pipe:
            pipe.write(json.dumps(answer))
        os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    answer = json.loads(text) if text else {"result": None, "text": "killed"}
    return {"status": status, **answer}


def _serve() -> None:
    for name in (*_IMPORTS, *sys.argv[1:]):
        importlib.import_module(name)
    # Imported when it is first asked for.
    from transformers import AutoConfig, LlamaForCausalLM  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    gc.collect()
    # Or each collection would write to, and so copy, the pages that parent and child share.
    gc.freeze()
    for line in sys.stdin:
        answers.write(json.dumps(_fork(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
