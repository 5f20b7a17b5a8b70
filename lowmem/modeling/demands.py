"""What a `config.json` may demand: models that no checkpoint could fill take all memory or never end."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules import module as hooks

from .._shared import Shared
from ..checkpoint import Checkpoint
from ..errors import ModelError

# Names of what a model has a list of, or a config makes one of: `num_hidden_layers`, `n_layer`, `depths`, `num_labels`.
_COUNTS = re.compile(r"(layers?|depths?|blocks?|experts?|heads?|labels|classes|stages|levels|hops|groups?)\d*$")
# More than any model has of any of them, but for those of which the last layer has a row each.
MOST = 100_000
_ROWS = re.compile(r"(labels|classes)\d*$")
# Less than a row has, and as much as the names that a config makes of a number of labels.
_BYTES_OF_A_ROW = 256
# Modules and parameters of a model, for a checkpoint of nothing, for each of its tensors, and for so many bytes of it.
_FOR_NOTHING = 20_000
_FOR_A_TENSOR = 64
_BYTES_EACH = 1 << 16

_here = threading.local()
_handles: list[Any] = []


def refuse_endless(where: str, table: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Look at how many of anything a config demands, before a class of transformers makes a list as long as that.

    Raises:
        ModelError: more than any model has, or more labels than the checkpoint has room for.
    """
    rows = max(MOST, checkpoint.nbytes // _BYTES_OF_A_ROW)
    left: list[tuple[str, Any]] = list(table.items())
    while left:
        key, value = left.pop()
        if isinstance(value, dict):
            # The keys of this one are names of labels.
            left += value.items() if key != "label2id" else ()
        elif isinstance(value, list):
            left += ((key, item) for item in value)
        elif isinstance(value, (int, float)) and value > MOST and _COUNTS.search(key):
            most = rows if _ROWS.search(key) else MOST
            if value > most:
                raise ModelError(
                    f"{where}: {key!r}: expected at most {most}, found {value!r}; bring the model's own config.json"
                )


@contextmanager
def counted(where: str, checkpoint: Checkpoint) -> Iterator[None]:
    """Around what builds a model in this thread: it may have only so many parts as the checkpoint could ever fill.

    Raises:
        ModelError: it has more.
    """
    most = _FOR_NOTHING + _FOR_A_TENSOR * len(checkpoint) + checkpoint.nbytes // _BYTES_EACH
    made = 0

    def count() -> None:
        nonlocal made
        made += 1
        if made > most:
            raise ModelError(
                f"{where}: expected a model that {len(checkpoint)} tensors can fill, found one of more than {most} "
                "modules and parameters; bring the config.json that belongs to the weights"
            )

    with _counting.changed():
        outer = getattr(_here, "count", None)
        try:
            _here.count = count
            yield
        finally:
            _here.count = outer


def _count(module: nn.Module, name: str, part: Any) -> None:
    if (count := getattr(_here, "count", None)) is not None:
        count()


def _begin() -> None:
    _handles.append(hooks.register_module_parameter_registration_hook(_count))
    _handles.append(hooks.register_module_module_registration_hook(_count))


def _end() -> None:
    while _handles:
        _handles[-1].remove()
        _handles.pop()


_counting = Shared(_begin, _end)
