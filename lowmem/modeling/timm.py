"""Models of timm: built from `config.json` without weights, by `timm.create_model`.

What timm does with a checkpoint is left to it: `create_model(..., pretrained=True)` builds the model and hands it, with
all that decides how weights are adapted, to `timm.models._builder.load_pretrained`. There the call ends here, and what
it was given is kept; `timm_rules.py` runs it on a state dict.
"""

from __future__ import annotations

import difflib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .._files import read_config
from .._shared import Shared
from ..checkpoint import Checkpoint
from ..checkpoint.there import is_there, table_at
from ..errors import LowmemError, ModelError, OptionError
from ..sizes import shown
from .empty import Registrations, empty_parameters
from .failures import describe, refusing
from .request import ModelRequest

# What `create_model` takes that is lowmem's to say, or has an option of its own.
_NOT_OF_THE_MODEL = {
    "model_name": "config.json names the architecture",
    "pretrained": "weights are loaded in any case",
    "pretrained_cfg": "config.json has it; pretrained_cfg_overlay changes entries of it",
    "pretrained_model_args": "config.json has them as model_args",
    "checkpoint_path": "the source is the checkpoint",
    "cache_dir": "the source says where the files are",
    "device": "give device_map= to load",
}


@dataclass(frozen=True, slots=True, eq=False)
class TimmBlueprint:
    """What a model of timm is built from.

    Attributes:
        architecture: its name in timm.
        folder: that of the `config.json`.
        options: what `create_model` is given besides.
        hub: of a model of the hub its `org/name[@revision]`; empty for a local folder.
        where: what errors call the config.
        text: the config.
    """

    architecture: str
    folder: Path
    options: Mapping[str, Any]
    hub: str
    where: str
    text: str


@dataclass(frozen=True, slots=True, eq=False)
class Adaptation:
    """What timm gave its `load_pretrained`.

    Attributes:
        model: the model that it loads into; with `features_only` not the one that the user gets.
        options: the other arguments.
    """

    model: nn.Module
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class TimmModel:
    """A model of timm without weights.

    Attributes:
        model: itself.
        blueprint: what it was built from.
        adaptation: how timm adapts weights to it; None where it does not ask for any.
        registrations: the parameters in the order in which they were made.
    """

    model: nn.Module
    blueprint: TimmBlueprint
    adaptation: Adaptation | None
    registrations: Registrations


def is_timm_config(config: Path) -> bool:
    """Whether a `config.json` is one of timm's: it names an architecture and no type of transformers.

    Both of timm's forms do so, that with a `pretrained_cfg` and the older one, whose entries are that. One that cannot
    be read is for its reader to refuse.
    """
    table = table_at(config)
    return "architecture" in table and not {"model_type", "architectures"} & table.keys()


def import_timm(where: str) -> Any:
    """The package, or why it cannot be had.

    Raises:
        ModelError: it or its torchvision is not installed, or cannot be imported.
    """
    what = f"{where} describes a model of timm, and "
    try:
        import timm
        from timm.models import _builder  # noqa: F401
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("timm", "torchvision"):
            raise ModelError(f"{what}{missing} is not installed; install lowmem[vision], or give model=") from error
        raise ModelError(f"{what}timm cannot be imported ({error}); install {missing}, or give model=") from error
    except Exception as error:
        # A torchvision of another torch build fails in many ways.
        raise ModelError(
            f"{what}timm cannot be imported ({describe(error)}); it needs the torchvision that belongs to torch "
            f"{torch.__version__}: install both from one index, or give model="
        ) from error
    return timm


def read_timm_blueprint(checkpoint: Checkpoint, request: ModelRequest) -> TimmBlueprint:
    """Read timm's `config.json` beside the checkpoint, and import timm.

    Raises:
        ModelError: the config is damaged, or names an architecture that does not exist; timm cannot be imported.
        OptionError: what was asked is nothing of timm.
    """
    assert checkpoint.config is not None
    config, where = checkpoint.config, str(checkpoint.config)
    options = _options(request)
    with refusing(f"{where}: cannot be read"):
        text = read_config(config).decode()
        architecture = _check_table(where, json.loads(text))
    timm = import_timm(where)
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture.partition(".")[0], timm.list_models(), n=3)
        like = f"; similar ones are {', '.join(close)}" if close else ""
        raise ModelError(
            f"{where}: timm {timm.__version__} has no architecture {architecture!r}{like}; correct it, install a timm "
            "that has it, or give model="
        )
    return TimmBlueprint(architecture, config.parent, options, _hub_name(checkpoint), where, text)


def _options(request: ModelRequest) -> dict[str, Any]:
    """What `create_model` is to be given.

    Raises:
        OptionError: what timm does not have, or has said twice.
    """
    refused: dict[str, Any] = {
        "attn_implementation": request.attn_implementation,
        "experts_implementation": request.experts_implementation,
        "model_args": request.model_args,
        "key_mapping": request.key_mapping,
        "generation_config": request.generation_config,
    }
    for name, value in refused.items():
        if value:
            raise OptionError(f"{name}: it means nothing for a model of timm; leave it out")
    options = dict(request.model_kwargs)
    for name in options.keys() & _NOT_OF_THE_MODEL.keys():
        raise OptionError(f"model_kwargs: {name!r} is not for timm's model: {_NOT_OF_THE_MODEL[name]}")
    for name, value in (("num_classes", request.num_classes), ("in_chans", request.in_chans)):
        if value is None:
            continue
        if options.setdefault(name, value) != value:
            raise OptionError(f"{name}: {value}, and model_kwargs says {shown(options[name])}; leave one of them out")
    return options


def _check_table(where: str, table: Mapping[str, Any]) -> str:
    """The architecture, when the parts that timm takes apart are what it expects them to be.

    Raises:
        ModelError: they are not.
    """
    architecture = table["architecture"]
    if not isinstance(architecture, str):
        raise ModelError(f"{where}: 'architecture': expected the name of one of timm, found {shown(architecture)}")
    inner = table.get("pretrained_cfg", {})
    for name, value in (("pretrained_cfg", inner), ("model_args", table.get("model_args", {}))):
        if not isinstance(value, dict):
            raise ModelError(f"{where}: {name!r}: expected an object, found {shown(value)}; bring the model's own")
    whole = inner if "pretrained_cfg" in table else table
    for source in (table, whole):
        count = source.get("num_classes")
        if count is not None and (not isinstance(count, int) or isinstance(count, bool)):
            raise ModelError(f"{where}: 'num_classes': expected a whole number, found {shown(count)}; correct it")
    size = whole.get("input_size", [3, 1, 1])
    if not isinstance(size, list) or len(size) != 3 or not all(isinstance(n, int) for n in size):
        raise ModelError(f"{where}: 'input_size': expected channels, height and width, found {shown(size)}; correct it")
    return architecture


def _hub_name(checkpoint: Checkpoint) -> str:
    """What timm would be given after `hf-hub:`; empty where the source is no model of the hub."""
    scheme, colon, rest = checkpoint.source.partition(":")
    if colon and scheme.lower() == "hf-hub":
        return rest
    in_cache = any(part.startswith("models--") for part in checkpoint.folder.parts)
    return "" if colon or not in_cache or is_there(Path(checkpoint.source).expanduser()) else checkpoint.source


def build_timm(blueprint: TimmBlueprint, dtype: str = "auto") -> TimmModel:
    """The model on meta, at its final dtypes.

    Args:
        blueprint: what it is built from.
        dtype: `"auto"` (as timm builds it, which is fp32 whatever the file has) or a torch name, to which all its
            floats are cast, as `model.to` does.

    Raises:
        ModelError: timm cannot build it.
        OptionError: it does not take what was asked.
    """
    registrations = Registrations()
    with empty_parameters(registrations):
        model, adaptation = create(blueprint)
    _set_source(model, blueprint)
    if adaptation is not None and adaptation.model is not model:
        _set_source(adaptation.model, blueprint)
    if dtype != "auto":
        with refusing(f"dtype {dtype}: a model of timm cannot be made so"):
            model.to(getattr(torch, dtype))
    return TimmModel(model, blueprint, adaptation, registrations)


def create(blueprint: TimmBlueprint) -> tuple[nn.Module, Adaptation | None]:
    """The model as timm builds it, with initial values, and what it would load weights by.

    Raises:
        ModelError: timm cannot build it.
        OptionError: it does not take what was asked.
    """
    timm = import_timm(blueprint.where)
    given: list[Adaptation] = []
    with _refusing_options(blueprint), _captured(given), _OnTheCPU():
        model: nn.Module = timm.create_model(f"local-dir:{blueprint.folder}", pretrained=True, **blueprint.options)
    return model, given[-1] if given else None


class _OnTheCPU(TorchFunctionMode):
    """For models that ask their parameters where they are, which are on meta here, or that run while they are built.

    What is made where a parameter is (the masks of Swin) is made on the CPU, so that buffers have values. A function
    that is given tensors of both kinds gives one on meta: who runs a backbone to learn the shape of its features (the
    hybrids of ViT) learns that. What would be lost so, values written in place, stays the error that it is.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args = tuple(map(_off_meta, args))
        kwargs = {name: _off_meta(value) for name, value in (kwargs or {}).items()}
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            name = getattr(func, "__name__", "_")
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            mixed = len({tensor.is_meta for tensor in tensors}) > 1
            if not mixed or "out" in kwargs or (name.endswith("_") and not name.endswith("__")):
                raise
            return func(*map(_to_meta, args), **{name: _to_meta(value) for name, value in kwargs.items()})


def _off_meta(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "meta" else value


def _to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) else value


@contextmanager
def _refusing_options(blueprint: TimmBlueprint) -> Iterator[None]:
    """What a model says of an argument that it does not take is about the option, not the config."""
    with refusing(f"{blueprint.where}: timm cannot build {blueprint.architecture} from it"):
        try:
            yield
        except LowmemError:
            raise
        except Exception as error:
            if named := re.search(r"unexpected keyword argument '(\w+)'", str(error)):
                option = named[1] if named[1] in ("num_classes", "in_chans") else f"model_kwargs: {named[1]!r}"
                if named[1] in blueprint.options:
                    raise OptionError(
                        f"{option}: {blueprint.architecture} does not take it ({error}); leave it out"
                    ) from error
            elif blueprint.options:
                given = ", ".join(f"{name}={shown(value)}" for name, value in blueprint.options.items())
                raise ModelError(
                    f"{blueprint.where}: timm cannot build {blueprint.architecture} from it with {given}: "
                    f"{describe(error)}"
                ) from error
            raise


def _set_source(model: nn.Module, blueprint: TimmBlueprint) -> None:
    """Let `pretrained_cfg` say that the weights are the hub's, as timm does when it took them from there."""
    table: Any = getattr(model, "pretrained_cfg", None)
    if not blueprint.hub or not isinstance(table, dict):
        return
    table.pop("file", None)
    table.update(hf_hub_id=blueprint.hub, source="hf-hub")


_here = threading.local()
_load_pretrained: Callable[..., None]


@contextmanager
def _captured(given: list[Adaptation]) -> Iterator[None]:
    """What timm gives `load_pretrained` in this thread goes to `given`, and nothing is loaded.

    Other threads load as ever; timm is as it was when the last user is gone.
    """
    with _capturing.changed():
        outer = getattr(_here, "given", None)
        try:
            _here.given = given
            yield
        finally:
            _here.given = outer


def _begin() -> None:
    global _load_pretrained
    from timm.models import _builder

    _load_pretrained = _builder.load_pretrained
    _builder.load_pretrained = _load_here


def _end() -> None:
    from timm.models import _builder

    if _builder.load_pretrained is _load_here:
        _builder.load_pretrained = _load_pretrained


_capturing = Shared(_begin, _end)


def _load_here(model: nn.Module, *args: Any, **options: Any) -> None:
    given: list[Adaptation] | None = getattr(_here, "given", None)
    if given is None:
        _load_pretrained(model, *args, **options)
        return
    named = dict(zip(("pretrained_cfg", "num_classes", "in_chans", "filter_fn", "strict"), args, strict=False))
    given.append(Adaptation(model, {**named, **options}))
