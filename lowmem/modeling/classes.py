"""Which class of transformers a checkpoint is loaded into, and with which config.

As `from_pretrained` of an auto class (`transformers/models/auto/auto_factory.py`) and of a model class
(`transformers/modeling_utils.py`, version 5) decide it.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._files import read_config
from ..checkpoint.there import is_file_at
from ..errors import ModelError, OptionError, UnsupportedError
from .failures import refusing
from .request import ModelRequest

_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """A class, and what it is built from.

    Attributes:
        cls: the model class.
        config: an instance of its own.
        model_kwargs: what was asked and is no attribute of the config: for the class's `__init__`.
        generation_kwargs: what was asked and may also be an attribute of the generation config.
    """

    cls: Any
    config: Any
    model_kwargs: Mapping[str, Any]
    generation_kwargs: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """Where configs and code come from.

    Attributes:
        transformers: the package.
        where: what errors call the config.
        folder: with `config.json` and code.
        request: what was asked.
    """

    transformers: Any
    where: str
    folder: Path
    request: ModelRequest


def choose(transformers: Any, where: str, folder: Path, request: ModelRequest) -> Chosen:
    """The class that was asked for, or the one that the config names.

    Args:
        transformers: the package.
        where: what errors call the config.
        folder: with `config.json` and code beside it.
        request: what was asked about the model.

    Raises:
        ModelError: the config cannot be read, or names no class that can be imported.
        OptionError: `auto_class` or `config` is nothing of transformers.
        UnsupportedError: the class is code that the user did not allow.
    """
    place = _Place(transformers, where, folder, request)
    if not isinstance(request.config, (str, type(None), transformers.PreTrainedConfig)):
        raise OptionError(
            f"config: expected a config of transformers or the path of one, found {type(request.config).__name__}"
        )
    if request.auto_class is None:
        config, _ = _auto_config(place, {})
        cls = _by_architectures(place, config)
        # Code beside the checkpoint is loaded through an auto class, which believes the config's own type.
        return _of_class(place, cls, config) if cls.__module__.startswith("transformers.") else _of_remote(place, cls)
    cls = _asked(transformers, request.auto_class)
    return _of_auto_class(place, cls) if _is_auto(cls) else _of_class(place, cls, None)


def _is_auto(cls: type) -> bool:
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    return issubclass(cls, _BaseAutoModelClass)


def _asked(transformers: Any, auto_class: Any) -> Any:
    found = auto_class
    if isinstance(auto_class, str):
        with refusing(f"auto_class: transformers cannot import {auto_class!r}"):
            found = getattr(transformers, auto_class, None)
    if isinstance(found, type) and (hasattr(found, "_from_config") or _is_auto(found)):
        return found
    name = auto_class if isinstance(auto_class, str) else auto_class.__name__
    near = difflib.get_close_matches(name, [n for n in dir(transformers) if n.startswith(("Auto", name[:3]))], n=1)
    hint = f"; did you mean {near[0]!r}?" if near and near[0] != name else ""
    raise OptionError(
        "auto_class: expected a class of transformers that makes models, such as 'AutoModel' or 'LlamaModel', found "
        f"{name!r}{hint}"
    )


def _auto_config(place: _Place, given: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The config as an auto class reads it, and what of `given` is none of its attributes."""
    source = place.request.config
    if source is not None and not isinstance(source, str):
        return copy.deepcopy(source), dict(given)
    with refusing(f"{place.where}: transformers cannot read it"):
        beside = Path(source or place.folder)
        if (file := beside / "config.json" if beside.is_dir() else beside).is_file():
            read_config(file, place.folder)
        config, left = place.transformers.AutoConfig.from_pretrained(
            source or str(place.folder),
            trust_remote_code=place.request.trust_remote_code,
            local_files_only=True,
            return_unused_kwargs=True,
            **given,
        )
    return config, left


def _of_class(place: _Place, cls: Any, known: Any) -> Chosen:
    """As a model class decides; `known` is the config as far as it was read without what was asked."""
    request, implementations = place.request, place.request.implementations
    given = {**request.model_kwargs, **implementations}
    kind = getattr(cls, "config_class", None) or type(known)
    if request.config is not None and not isinstance(request.config, str):
        config, left = copy.deepcopy(request.config), dict(request.model_kwargs)
    elif known is not None and not given and type(known) is kind:
        config, left = known, {}
    else:
        if kind is type(None):
            raise ModelError(f"{place.where}: {cls.__name__} has no config class; give config=")
        with refusing(f"{place.where}: transformers cannot read it as {kind.__name__}"):
            config, left = kind.from_pretrained(
                request.config or str(place.folder), return_unused_kwargs=True, local_files_only=True, **given
            )
    # Some composite configs make their sub-configs after they were told.
    for name, value in implementations.items():
        with refusing(f"{name}: {place.where} does not take it"):
            setattr(config, f"_{name}", value)
    left = {name: value for name, value in left.items() if name not in _IMPLEMENTATIONS}
    return Chosen(cls, config, left, request.model_kwargs)


def _of_remote(place: _Place, cls: Any) -> Chosen:
    config, left = _asked_config(place)
    return Chosen(cls, config, left, left)


def _asked_config(place: _Place) -> tuple[Any, dict[str, Any]]:
    """The config as an auto class reads it and hands it on, with what was asked of it, and what is left of that."""
    request = place.request
    config, left = _auto_config(place, {**request.model_kwargs, **request.implementations})
    for name in _IMPLEMENTATIONS:
        if name in left:
            with refusing(f"{name}: {place.where} does not take it"):
                setattr(config, f"_{name}", left.pop(name))
    return config, left


def _of_auto_class(place: _Place, auto: Any) -> Chosen:
    """As an auto class decides."""
    config, left = _asked_config(place)
    cls = _remote_class(place, auto, config)
    if cls is None:
        cls, config = _native_class(place, auto, config)
    return Chosen(cls, config, left, left)


def _native_class(place: _Place, auto: Any, config: Any) -> tuple[Any, Any]:
    """The model class of transformers for the config, and the config that is that class's."""
    if type(config) not in auto._model_mapping:
        raise ModelError(
            f"{place.where}: {auto.__name__} has no model for {type(config).__name__}; ask for a class that has "
            "(auto_class=, or the first argument of from_pretrained), or for the model class itself"
        )
    with refusing(f"{place.where}: the class that {auto.__name__} has for it cannot be imported"):
        cls = _mapped_class(auto._model_mapping, config)
    text = config.sub_configs.get("text_config")
    if text is not None and getattr(cls, "config_class", None) == text:
        # The part of a composite model that generates text.
        config = config.get_text_config()
    return cls, config


def _mapped_class(mapping: Any, config: Any) -> Any:
    """Of several classes for one config the one that `architectures` names, else the first."""
    from transformers.models.auto import auto_factory

    find: Any = auto_factory._get_model_class
    return find(config, mapping)


def _remote_class(place: _Place, auto: Any, config: Any) -> Any:
    """The class beside the checkpoint that `auto_map` names for this auto class, if it is to run; else None.

    Raises:
        UnsupportedError: there is no other, and the user did not allow it.
    """
    reference = (_auto_map(place, config) or {}).get(auto.__name__)
    if not isinstance(reference, str):
        return None
    native = type(config) in auto._model_mapping
    if not place.request.trust_remote_code:
        if native:
            return None
        raise UnsupportedError(
            f"{place.where}: {auto.__name__} is code beside the checkpoint ({reference}); pass trust_remote_code=True "
            "to run it"
        )
    # One that the caller registered goes before.
    if native and not _mapped_class(auto._model_mapping, config).__module__.startswith("transformers."):
        return None
    return _import_remote(place, reference, reference.rpartition(".")[2])


def _auto_map(place: _Place, config: Any) -> dict[str, Any] | None:
    auto_map: dict[str, Any] | None = getattr(config, "auto_map", None)
    if not isinstance(auto_map, (dict, type(None))):
        raise ModelError(
            f'{place.where}: \'auto_map\': expected an object such as {{"AutoModel": "file.Class"}}, found '
            f"{auto_map!r}; correct it, or give model="
        )
    return auto_map


def _import_remote(place: _Place, reference: str, name: str) -> Any:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.auto import auto_factory

    with refusing(f"{place.where}: {name} cannot be imported from {reference!r}"):
        cls: Any = get_class_from_dynamic_module(reference, str(place.folder), local_files_only=True)
    if not isinstance(cls, type) or not hasattr(cls, "_from_config"):
        raise ModelError(f"{place.where}: expected {reference!r} to be a PreTrainedModel, found {cls!r}; give model=")
    # Code from before 4.45 has no `generate` of its own.
    add: Any = getattr(auto_factory, "add_generation_mixin_to_remote_model", None)
    return cls if add is None else add(cls)


def _by_architectures(place: _Place, config: Any) -> Any:
    """The first class of `architectures` that there is; without any the headless one, as AutoModel would choose."""
    architectures = getattr(config, "architectures", None)
    if not architectures and not isinstance(place.request.config, (str, type(None))):
        architectures = _architectures_beside(place)
    auto_map = _auto_map(place, config)
    if not isinstance(architectures, (list, tuple, type(None))):
        raise ModelError(
            f"{place.where}: 'architectures': expected a list of class names such as [\"LlamaForCausalLM\"], "
            f"found {architectures!r}; correct it, or give model="
        )
    for name in architectures or ():
        reference = next(
            (ref for ref in (auto_map or {}).values() if isinstance(ref, str) and ref.endswith(f".{name}")), None
        )
        if reference is not None and place.request.trust_remote_code:
            return _import_remote(place, reference, name)
        with refusing(f"{place.where}: transformers cannot import {name!r}"):
            cls = getattr(place.transformers, str(name), None)
        if isinstance(cls, type) and hasattr(cls, "_from_config"):
            return cls
        if reference is not None:
            raise UnsupportedError(
                f"{place.where}: {name} is code beside the checkpoint ({reference}); "
                "pass trust_remote_code=True to run it"
            )
    if architectures:
        raise ModelError(
            f"{place.where}: transformers {place.transformers.__version__} has no class {architectures[0]!r}; "
            "update transformers, or give model="
        )
    mapping = place.transformers.MODEL_MAPPING
    if type(config) not in mapping:
        raise ModelError(
            f"{place.where}: no 'architectures', and no model for {type(config).__name__}; give auto_class= or model="
        )
    return _mapped_class(mapping, config)


def _architectures_beside(place: _Place) -> Any:
    """What `config.json` says where the caller gave a config that was never saved."""
    if not is_file_at(place.folder / "config.json"):
        return None
    with refusing(f"{place.folder / 'config.json'}: transformers cannot read it"):
        table, _ = place.transformers.PreTrainedConfig.get_config_dict(str(place.folder), local_files_only=True)
    return table.get("architectures")
