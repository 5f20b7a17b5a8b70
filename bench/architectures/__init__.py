"""Architectures of transformers at tiny sizes: data for the parity matrix, one for each model type."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .changes import CHANGES
from .classes import CLASSES
from .shrink import tiny_values

# Model types whose result differs from that of `from_pretrained`, with the reason: in the table, and expected by the
# tests.
KNOWN_FAILURES: dict[str, str] = {
    "hrm_text": "_init_weights, which from_pretrained runs on each load, freezes z_L_init again",
    "zaya": "_init_weights, which from_pretrained runs on each load, overwrites a loaded value of balancing_biases",
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model class and how its tiny config is made.

    Attributes:
        model_type: of its config; once in the matrix.
        cls: name of the model class.
        family: what kind of model it is, for the table.
        changes: values of the config that the generic shrinker does not find.
    """

    model_type: str
    cls: str
    family: str
    changes: Mapping[str, Any] = field(default_factory=dict)

    def model_class(self) -> Any:
        """The class, imported."""
        import transformers

        return getattr(transformers, self.cls)

    def build(self) -> Any:
        """The model in fp32 with seeded weights, at tiny sizes."""
        import transformers

        config = transformers.CONFIG_MAPPING[self.model_type]
        torch.manual_seed(1)
        return self.model_class()(config(**tiny_values(config, self.changes)))


ARCHITECTURES: tuple[Architecture, ...] = tuple(
    Architecture(model_type, cls, family, CHANGES.get(model_type, {}))
    for family, classes in CLASSES.items()
    for model_type, cls in classes.items()
)


def find_architectures(names: Iterable[str]) -> tuple[Architecture, ...]:
    """Those of the model types `names`, in that order.

    Raises:
        KeyError: there is none of that model type.
    """
    table = {one.model_type: one for one in ARCHITECTURES}
    return tuple(table[name] for name in names)


def known_failure(model_type: str) -> str:
    """Why this one is not the same, empty when it should be."""
    return KNOWN_FAILURES.get(model_type, "")
