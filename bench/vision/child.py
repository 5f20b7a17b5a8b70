"""A process that loads one model again and again, in one way."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import torch

import lowmem
from bench.child import release
from lowmem.memory import anonymous_memory

from .cases import Order
from .ways import WAYS

# Name of a tensor → its dtype, its shape and a hash of its bytes.
Tensors = dict[str, tuple[str, tuple[int, ...], str]]


class Runner:
    """Every method takes one argument and answers with plain values, as `bench.forward.child.serve` wants it."""

    def __init__(self, order: Order) -> None:
        self._order = order

    def turn(self, _: None) -> dict[str, Any]:
        """One load: its `seconds`. The model is dropped."""
        release()
        started = time.perf_counter()
        model = WAYS[self._order.way](self._order)
        seconds = time.perf_counter() - started
        del model
        release()
        return {"seconds": seconds}

    def look(self, _: None) -> dict[str, Any]:
        """One load under a measure: bytes of anonymous memory at its `peak` and `held` after it, its `tensors`."""
        release()
        with lowmem.measure() as memory:
            model = WAYS[self._order.way](self._order)
        release()
        held = max(0, anonymous_memory() - memory.baseline)
        size = sum(tensor.nbytes for tensor in model.state_dict().values())
        answer = {"peak": memory.peak, "held": held, "size": size, "tensors": tensors_of(model)}
        if "num_classes" in self._order.options:
            answer["fresh"] = [f"{model.pretrained_cfg['classifier']}.{leaf}" for leaf in ("weight", "bias")]
        return answer


def tensors_of(model: Any) -> Tensors:
    """All parameters and buffers, those that no state dict has too; one without values raises."""
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: (str(value.dtype), tuple(value.shape), _digest(value)) for name, value in held.items()}


def _digest(tensor: torch.Tensor) -> str:
    data = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(data.data).hexdigest()


def difference(ours: Tensors, theirs: Tensors, fresh: list[str]) -> str:
    """The first tensor that is not the same, empty when all are; of `fresh` ones the values may differ."""
    if missing := sorted(ours.keys() ^ theirs.keys()):
        return missing[0]
    for name, (dtype, shape, digest) in ours.items():
        if (dtype, shape) != theirs[name][:2] or (digest != theirs[name][2] and name not in fresh):
            return name
    return ""
