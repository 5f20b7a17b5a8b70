"""Models without weights, for the loaders that want one, and what a loaded one holds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.cases import Case


def plain_module(shapes: Iterable[tuple[str, tuple[int, ...]]], device: str = "meta") -> nn.Module:
    """A tree of modules with one parameter for each name, on `device`."""
    root = nn.Module()
    for name, shape in shapes:
        module = root
        *path, attribute = name.split(".")
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            child = module._modules[part]
            assert child is not None
            module = child
        module.register_parameter(attribute, nn.Parameter(torch.empty(shape, device=device), requires_grad=False))
    return root


def shapes_of(source: Path) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a checkpoint; read once, outside of any time."""
    import lowmem

    return [(key, entry.shape) for key, entry in lowmem.inspect(source).items()]


def empty_model(case: Case, source: Path, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> nn.Module:
    """The case's model with parameters on meta and real buffers, at the case's dtype, tied."""
    dtype = getattr(torch, case.dtype)
    if not case.has_config:
        model = plain_module(shapes)
        return model.to(dtype)
    import accelerate
    import transformers

    config = transformers.AutoConfig.from_pretrained(source)
    architecture = getattr(transformers, config.architectures[0])
    with accelerate.init_empty_weights(include_buffers=False):
        made: nn.Module = architecture._from_config(config, dtype=dtype)
    tie(made)
    return made


def tie(model: nn.Module) -> None:
    """Tie the weights of a transformers model again, after they were replaced."""
    method: Any = getattr(model, "tie_weights", None)
    if method is not None:
        method()


def import_model(case: Case, source: Path) -> None:
    """Import the classes that `empty_model` needs."""
    if case.has_config:
        import accelerate  # noqa: F401
        import transformers
        import transformers.generation.utils

        config = transformers.AutoConfig.from_pretrained(source)
        getattr(transformers, config.architectures[0])


class Weights:
    """The weights of a loaded model by key of the checkpoint, wherever they are."""

    def __init__(self, model: nn.Module | Mapping[str, torch.Tensor]) -> None:
        self._model = model
        self._state: Mapping[str, torch.Tensor]
        if isinstance(model, nn.Module):
            self._state = model.state_dict(keep_vars=True)
        else:
            self._state = model

    def declared(self, key: str) -> torch.Tensor:
        """The tensor as the model declares it: on meta when it is on disk.

        Raises:
            KeyError: the model has none.
        """
        return self._state[key] if key in self._state else self._expert(key)

    def find(self, key: str) -> torch.Tensor:
        """The weight as the forward sees it: one on disk is fetched by accelerate's hook, and cast as it does.

        Raises:
            KeyError: the model has none, or nobody keeps it.
        """
        tensor = self.declared(key)
        if not tensor.is_meta:
            return tensor.detach()
        assert isinstance(self._model, nn.Module)
        path, _, attribute = key.rpartition(".")
        hook: Any = getattr(self._model.get_submodule(path), "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            stored = getattr(one, "weights_map", None)
            if stored is not None:
                value: torch.Tensor = stored[attribute]
                return value.to(tensor.dtype)
        raise KeyError(key)

    def _expert(self, key: str) -> torch.Tensor:
        """A projection of one expert, out of the tensor that transformers fuses all experts into."""
        match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", key)
        if match is None:
            raise KeyError(key)
        path, number, kind = match.groups()
        if kind == "down":
            return self._state[f"{path}.down_proj"][int(number)]
        both = self._state[f"{path}.gate_up_proj"][int(number)]
        half = both.shape[0] // 2
        return both[:half] if kind == "gate" else both[half:]
