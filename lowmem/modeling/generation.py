"""What a transformers model is given when its weights are there, as `adjust_generation_fn` does it.

That is in transformers/generation/utils.py, version 5. What single model classes do besides in a `from_pretrained` of
their own is here too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from .._files import read_config
from ..checkpoint.there import is_file_at, looking_at
from .failures import refusing
from .hf import Blueprint
from .hf_rules import Generation


def read_generation(model: nn.Module, folder: Path | None, blueprint: Blueprint | None) -> Generation:
    """What `model` will be given, read before its weights are.

    Args:
        model: a transformers model.
        folder: where the files are.
        blueprint: what it was built from, if lowmem built it.

    Raises:
        ModelError: generation_config.json holds something else than generation options, or options that mean nothing,
            or the code beside the checkpoint cannot be imported.
    """
    return Generation(
        _config(model, folder, blueprint), _function(model, folder, blueprint), _epilogue(model, folder, blueprint)
    )


def _config(model: nn.Module, folder: Path | None, blueprint: Blueprint | None) -> Any:
    """What `from_pretrained` would read as the model's generation config; None where it reads none.

    As there, a generation_config.json that is no JSON counts as absent, and `config.json` stands in.

    Args:
        model: a transformers model.
        folder: where the files are.
        blueprint: what it was built from, if lowmem built it: the generation config that was asked for, and what was
            asked about the model and is an attribute of the generation config too.

    Raises:
        ModelError: generation_config.json holds something else than generation options, or options that mean nothing.
    """
    hf: Any = model
    if not hf.can_generate():
        return None
    given = None if blueprint is None else blueprint.request.generation_config
    if given is not None:
        with refusing("generation_config: the model cannot use it"):
            return hf.generation_config.from_dict(given.to_dict())
    if folder is None:
        return None
    from transformers import GenerationConfig

    changes = {} if blueprint is None else dict(blueprint.chosen.generation_kwargs)
    file = folder / "generation_config.json"
    if is_file_at(file):
        with refusing(f"{file}: transformers cannot use it; correct it, or remove it"):
            with looking_at(file):
                # transformers would take what cannot be read for what is not there.
                read_config(file)
            try:
                return GenerationConfig.from_pretrained(str(folder), local_files_only=True, **changes)
            except OSError:
                pass
    if not is_file_at(folder / "config.json"):
        return None
    with refusing(f"{folder / 'config.json'}: transformers cannot make a generation config of it"):
        return GenerationConfig.from_pretrained(
            str(folder), config_file_name="config.json", _from_model_config=True, local_files_only=True, **changes
        )


def _function(model: nn.Module, folder: Path | None, blueprint: Blueprint | None) -> Callable[..., Any] | None:
    """The function beside the checkpoint that stands for `generate`, where the user lets its code run; else None."""
    hf: Any = model
    if folder is None or blueprint is None or not blueprint.request.trust_remote_code or not hf.can_generate():
        return None
    file = folder / "custom_generate" / "generate.py"
    if not is_file_at(file) or not hasattr(hf, "load_custom_generate"):
        return None
    with refusing(f"{file}: cannot be imported"):
        found: Callable[..., Any] = hf.load_custom_generate(str(folder), trust_remote_code=True, local_files_only=True)
    return found


def _epilogue(model: nn.Module, folder: Path | None, blueprint: Blueprint | None) -> Callable[[nn.Module], None] | None:
    """What the `from_pretrained` of the model's own class does with the model that that of all models gives it.

    TimmBackbone's makes a model by itself and asks nobody for one: it has nothing to do with a checkpoint.
    """
    from transformers import PreTrainedModel

    cls: Any = type(model)
    own, every = (getattr(c.from_pretrained, "__func__", None) for c in (cls, PreTrainedModel))
    asks = {"super", "from_pretrained"} <= set(getattr(getattr(own, "__code__", None), "co_names", ()))
    if folder is None or blueprint is None or own is every or not asks:
        return None

    def run(loaded: nn.Module) -> None:
        # Its `super().from_pretrained` is this one, for it comes before PreTrainedModel in the order of classes.
        given = type("Given", (PreTrainedModel,), {"from_pretrained": classmethod(lambda *_, **__: loaded)})
        bridge: Any = type(cls.__name__, (cls, given), {})
        with refusing(f"{folder}: {cls.__name__}.from_pretrained cannot finish the model"):
            bridge.from_pretrained(str(folder), config=loaded.config, local_files_only=True)

    return run
