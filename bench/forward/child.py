"""A process with one model, which does what the bench asks: tokens, forwards, looking at itself."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench.child import release
from lowmem.memory import anonymous_memory

from .loaders import Load, Order
from .pages import give_back_mapped

PROMPT = 16


def start(load: Load, order: Order) -> Runner:
    """The runner of a model that is loaded now."""
    return Runner(load(order))


def serve(connection: Connection, make: Callable[[Any], object], order: Any) -> None:
    """Make a runner of `order`, then answer (its method, argument) with a dict until the other end is closed."""
    # What libraries print, bars among it, would hide the bench's own lines; errors go through the connection.
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nothing, stream)
    os.close(nothing)
    with contextlib.suppress(EOFError, BrokenPipeError):
        try:
            started = time.perf_counter()
            runner = make(order)
            seconds = time.perf_counter() - started
            connection.send({"status": "ok", "load": seconds, "threads": torch.get_num_threads()})
            while True:
                what, argument = connection.recv()
                answer: dict[str, Any] = getattr(runner, what)(argument)
                connection.send({"status": "ok", **answer})
        except (EOFError, BrokenPipeError):
            raise
        except BaseException as error:
            text = str(error).strip().partition("\n")[0]
            connection.send({"status": "failed", "reason": f"{type(error).__name__}: {text}"})


def prompt_for(vocabulary: int) -> torch.Tensor:
    """Token ids, 1 x 16, the same in every process."""
    return torch.tensor([[(1000 + 97 * n) % vocabulary for n in range(PROMPT)]])


class Runner:
    """One model and the tokens it has made. Every method takes one argument and answers with plain values."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._digest = hashlib.sha256()
        self._cache: Any = None
        self._next = prompt_for(model.config.vocab_size)

    def prompt(self, _: None) -> dict[str, Any]:
        """Run the prompt into an empty KV cache; its `seconds`, and a `digest` of all logits so far."""
        return {"seconds": self._forward(), "digest": self._digest.hexdigest()}

    def steps(self, count: int) -> dict[str, Any]:
        """So many greedy tokens, one forward each: `seconds` of each, and a `digest` of all logits so far."""
        return {"seconds": [self._forward() for _ in range(count)], "digest": self._digest.hexdigest()}

    @torch.inference_mode()
    def _forward(self) -> float:
        started = time.perf_counter()
        out = self._model(input_ids=self._next, past_key_values=self._cache, use_cache=True)
        seconds = time.perf_counter() - started
        self._cache = out.past_key_values
        self._next = out.logits[:, -1:].argmax(-1)
        self._digest.update(out.logits.contiguous().view(torch.uint8).numpy().data)
        return seconds

    @torch.inference_mode()
    def forwards(self, count: int) -> dict[str, Any]:
        """So many forwards of the prompt without a KV cache, which would grow; their `seconds`, and a `digest`."""
        ids = prompt_for(self._model.config.vocab_size)
        digests = set()
        started = time.perf_counter()
        for _ in range(count):
            logits = self._model(input_ids=ids, use_cache=False).logits
            digests.add(hashlib.sha256(logits.contiguous().view(torch.uint8).numpy().data).hexdigest())
        return {"seconds": time.perf_counter() - started, "digests": sorted(digests)}

    def forget(self, files: Sequence[Path]) -> dict[str, Any]:
        """Give back the mapped pages of these files; `kept` are bytes of mappings that cannot."""
        return {"kept": give_back_mapped(files)}

    def state(self, _: None) -> dict[str, Any]:
        """What must not grow: bytes of anonymous memory, open handles, threads, lines of the map of memory."""
        release()
        own = Path("/proc/self")
        return {
            "anonymous": anonymous_memory(),
            "handles": len(list((own / "fd").iterdir())),
            "threads": len(list((own / "task").iterdir())),
            "mappings": len((own / "maps").read_bytes().splitlines()),
        }
