"""What a `config.json` may demand: models that no checkpoint could fill take all memory or never end."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules import module as hooks

from ..checkpoint import Checkpoint
from ..errors import ModelError

# Names of what a model has a list of, or a config makes one of: `num_hidden_layers`, `n_layer`, `depths`, `num_labels`.
_COUNTS = re.compile(r"(layers?|depths?|blocks?|experts?|heads?|labels|classes|stages|levels|hops|groups?)\d*$")
# More than any model has of any of them.
MOST = 100_000
# Modules and parameters of a model, for a checkpoint of nothing, for each of its tensors, and for so many bytes of it.
_FOR_NOTHING = 20_000
_FOR_A_TENSOR = 64
_BYTES_EACH = 1 << 16


def refuse_endless(where: str, table: Mapping[str, Any]) -> None:
    """Look at how many of anything a config demands, before a class of transformers makes a list as long as that.

    Raises:
        ModelError: more than any model has.
    """
    left: list[tuple[str, Any]] = list(table.items())
    while left:
        key, value = left.pop()
        if isinstance(value, dict):
            left += value.items()
        elif isinstance(value, list):
            left += ((key, item) for item in value)
        elif isinstance(value, (int, float)) and value > MOST and _COUNTS.search(key):
            raise ModelError(
                f"{where}: {key!r}: expected at most {MOST}, found {value!r}; bring the model's own config.json"
            )


@contextmanager
def counted(where: str, checkpoint: Checkpoint) -> Iterator[None]:
    """Around what builds a model in this thread: it may have only so many parts as the checkpoint could ever fill.

    Raises:
        ModelError: it has more.
    """
    most = _FOR_NOTHING + _FOR_A_TENSOR * len(checkpoint) + checkpoint.nbytes // _BYTES_EACH
    here, made = threading.get_ident(), 0

    def count(module: nn.Module, name: str, part: Any) -> None:
        nonlocal made
        made += threading.get_ident() == here
        if made > most:
            raise ModelError(
                f"{where}: expected a model that {len(checkpoint)} tensors can fill, found one of more than {most} "
                "modules and parameters; bring the config.json that belongs to the weights"
            )

    handles = [
        hooks.register_module_parameter_registration_hook(count),
        hooks.register_module_module_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
