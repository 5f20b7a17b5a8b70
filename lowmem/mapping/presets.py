"""Known changes from the layout of one library to that of another: names and shapes, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .._strides import Shape
from ..errors import OptionError
from ..sizes import shown
from .transforms import Transform


@dataclass(frozen=True, slots=True)
class Preset:
    """How the tensors of one library's files become those of another's model.

    Attributes:
        name: such as `"convnextv2->timm"`.
        rename: regular expressions with their replacements, as `re.sub` takes them, one after the other.
        transforms: patterns of new names, with `*`, and what is done to these tensors.
        drop: patterns of old names that are not wanted.
        source: the code that says so.
    """

    name: str
    rename: tuple[tuple[str, str], ...]
    transforms: tuple[tuple[str, Transform], ...] = ()
    drop: tuple[str, ...] = ()
    source: str = ""

    def apply(self, state: Mapping[str, Any], shapes: Mapping[str, Shape]) -> dict[str, Any]:
        """A state dict in the other layout.

        Args:
            state: name → tensor.
            shapes: of the model's tensors; one that it does not have keeps its shape.

        Raises:
            ValueError: a tensor that a transform cannot change, or two that get one name.
        """
        raise NotImplementedError


PRESETS: dict[str, Preset] = {}


def find_preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
        OptionError: there is none; those that there are are listed.
    """
    if isinstance(name, str) and name in PRESETS:
        return PRESETS[name]
    raise OptionError(f"preset: expected one of {', '.join(sorted(PRESETS))}, found {shown(name)}")
