"""From whatever the caller has (a config, a callable, a module) to a model that waits for its weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from torch import nn

from ..checkpoint import Checkpoint
from ..errors import ModelError, OptionError
from . import hf
from .alone import alone
from .checks import checked_modules, refuse_hidden
from .empty import empty_parameters, real_tensors
from .failures import refusing
from .generation import read_generation
from .hf_rules import TransformersRules
from .int8 import Int8Layers, swap
from .request import ModelRequest
from .rules import Rules
from .sharding import reshard
from .targets import Target, dtype_name, join_declared, read_targets
from .timm import TimmBlueprint, TimmModel, build_timm, is_timm_config, read_timm_blueprint
from .timm_rules import TimmRules


@dataclass(frozen=True, eq=False)
class Skeleton:
    """A model without its weights.

    Attributes:
        model: the module itself.
        targets: its parameters and buffers by name.
        rules: what its kind decides.
        borrowed: the caller gave the module, so a failed load must leave it as it was.
        warnings: what lies beside the weights and was left alone.
        int8: the layers that are int8, exchanged for placeholders; None when there are none.
    """

    model: nn.Module
    targets: Mapping[str, Target]
    rules: Rules
    borrowed: bool
    warnings: tuple[str, ...] = ()
    int8: Int8Layers | None = None


@dataclass(frozen=True, eq=False)
class Origin:
    """Where the model will come from, with everything imported that building it needs."""

    model: nn.Module | Callable[[], nn.Module] | hf.Blueprint | TimmBlueprint


def find_origin(checkpoint: Checkpoint, request: ModelRequest) -> Origin:
    """Settle what the model is made from, before any memory is counted.

    A `config.json` of timm makes a model of timm, unless a class or a config of transformers is asked for: that has a
    wrapper for these.

    Args:
        checkpoint: gives the `config.json`, when the request has neither a model nor a config.
        request: what is asked about the model.

    Raises:
        ModelError: there is no config and no model, or the config cannot be used.
        OptionError: what is asked is nothing of such a model.
        UnsupportedError: the config asks for what lowmem does not do.
    """
    model = request.model
    if model is not None:
        if not isinstance(model, nn.Module) and not callable(model):
            raise ModelError(
                f"model: expected a torch.nn.Module or a callable that makes one, found {type(model).__name__}"
            )
        return Origin(model)
    if checkpoint.config is None and request.config is None:
        raise ModelError(
            f"{checkpoint.source}: no config.json beside the weights, so the model is unknown; bring the config.json "
            "that belongs to them (transformers and timm save one), or give model= (a module or a callable that makes "
            "one), or config="
        )
    asks_transformers = request.config is not None or request.auto_class is not None
    with real_tensors():
        if not asks_transformers and checkpoint.config is not None and is_timm_config(checkpoint.config):
            return Origin(read_timm_blueprint(checkpoint, request))
        for name, value in (("num_classes", request.num_classes), ("in_chans", request.in_chans)):
            if value is not None:
                entry = "num_labels" if name == "num_classes" else "num_channels"
                raise OptionError(
                    f"{name}: it is about a model of timm, and this is one of transformers; give "
                    f"model_kwargs={{{entry!r}: {value}}}, where its config has that entry"
                )
        return Origin(hf.read_blueprint(checkpoint, request))


def make_skeleton(
    origin: Origin, checkpoint: Checkpoint, dtype: str, arrange: Callable[[nn.Module], None] | None = None
) -> Skeleton:
    """Build or adopt the model, on meta where lowmem builds it.

    Args:
        origin: what it is made from.
        checkpoint: decides the dtype of a transformers model when nothing else does.
        dtype: `"auto"` or a torch name.
        arrange: what is done to the model before its tensors are looked at.

    Raises:
        ModelError: building failed, or the module is one that lowmem cannot fill (see `checks.checked_modules`).
    """
    source = origin.model
    timm = _timm(origin, dtype)
    module = build(origin, checkpoint, dtype) if timm is None else timm.model
    if arrange is not None:
        arrange(module)
    if isinstance(source, nn.Module):
        reshard(module)
    with real_tensors():
        transformers = hf.is_transformers_model(module)
        targets = read_targets(checked_modules(module, transformers))
        rules = rules_of(module, origin, checkpoint) if timm is None else TimmRules(timm)
    if not isinstance(source, nn.Module):
        refuse_hidden(module)
    blueprint = source if isinstance(source, hf.Blueprint) else None
    joined = join_declared(targets, rules.declared_ties())
    warnings = () if blueprint is None else blueprint.warnings
    return Skeleton(module, joined, rules, isinstance(source, nn.Module), warnings)


def with_int8(skeleton: Skeleton, names: Collection[str]) -> Skeleton:
    """The skeleton with these modules exchanged, in place, for layers whose weights are int8.

    Whoever gives the model back unloaded calls `undo` of its `int8`.

    Raises:
        ModelError: the model itself is one of them.
    """
    model = skeleton.model
    old = {name: model.get_submodule(name) for name in names}
    layers = swap(model, names)
    targets = read_targets(checked_modules(model, hf.is_transformers_model(model)))
    for name, module in old.items():
        weight = f"{name}.weight"
        turned = skeleton.targets[weight].turned
        targets[weight] = replace(targets[weight], floats=dtype_name(module.weight.dtype), turned=turned)
    return replace(skeleton, targets=join_declared(targets, skeleton.rules.declared_ties()), int8=layers)


def build(origin: Origin, checkpoint: Checkpoint, dtype: str) -> nn.Module:
    """The module, on meta where lowmem builds it.

    Raises:
        ModelError: building failed.
    """
    source = origin.model
    assert not isinstance(source, TimmBlueprint), "what timm builds has rules of its own"
    with alone(), real_tensors():
        if isinstance(source, hf.Blueprint):
            return hf.build(source, checkpoint, dtype)
        return source if isinstance(source, nn.Module) else _call(source)


def _timm(origin: Origin, dtype: str) -> TimmModel | None:
    """The model, where it is one of timm that lowmem builds."""
    if not isinstance(origin.model, TimmBlueprint):
        return None
    with alone(), real_tensors():
        return build_timm(origin.model, dtype)


def rules_of(module: nn.Module, origin: Origin | None, checkpoint: Checkpoint) -> Rules:
    """The rules of a module of this origin, or of one that is a part of another."""
    if not hf.is_transformers_model(module):
        return Rules(module)
    blueprint = origin.model if origin is not None and isinstance(origin.model, hf.Blueprint) else None
    folder = checkpoint.folder if checkpoint.config is not None else None
    generation = read_generation(module, folder, blueprint)
    key_mapping = None if blueprint is None else blueprint.request.key_mapping
    return TransformersRules(module, blueprint is not None, generation, key_mapping)


def _call(factory: Callable[[], nn.Module]) -> nn.Module:
    name = getattr(factory, "__qualname__", None) or repr(factory)
    _check_callable(factory, name)
    try:
        with refusing(f"model: the callable {name} failed"), empty_parameters():
            module = factory()
    except ModelError as error:
        if error.__cause__ is None or "meta" not in str(error.__cause__).lower():
            raise
        raise ModelError(
            f"{error}; its parameters have no values here (meta tensors): build it yourself and pass the module"
        ) from error.__cause__
    if not isinstance(module, nn.Module):
        raise ModelError(f"model: the callable gave {type(module).__name__} ({name}); expected a torch.nn.Module")
    return module


def _check_callable(factory: Callable[[], nn.Module], name: str) -> None:
    """Refuse a callable that needs arguments."""
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        return  # not told, as for builtins: the call will show
    try:
        signature.bind()
    except TypeError as error:
        raise ModelError(
            f"model: expected a callable that needs no arguments, found {name}{signature} ({error}); give "
            "functools.partial(...) with its arguments, or build it yourself and pass the module"
        ) from error
