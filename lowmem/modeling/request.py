"""What is asked about the model itself: its class, its config, how it computes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import OptionError
from ..sizes import shown

if TYPE_CHECKING:
    from .int8_choice import Int8Request

# What `from_pretrained` takes out of its arguments before the config and the model see them, and what `load` has as an
# option of its own: as overrides of the config they would be lost, or said twice.
_NOT_OF_THE_MODEL = frozenset(
    {
        "cache_dir",
        "force_download",
        "local_files_only",
        "proxies",
        "token",
        "revision",
        "subfolder",
        "variant",
        "trust_remote_code",
        "code_revision",
        "return_unused_kwargs",
        "gguf_file",
        "state_dict",
        "config",
        "dtype",
        "torch_dtype",
        "device_map",
        "max_memory",
        "offload_folder",
        "offload_buffers",
        "quantization_config",
        "attn_implementation",
        "experts_implementation",
    }
)


@dataclass(frozen=True, slots=True, eq=False)
class ModelRequest:
    """What the user asked about the model.

    Attributes:
        model: a module, a callable that makes one, or None for a transformers model.
        auto_class: a class of transformers or its name: an auto class, which chooses by the config, or a model class.
            None for the class that `architectures` names.
        config: a config of transformers, or the path of one; None for the `config.json` beside the weights.
        attn_implementation: how attention is computed; one for all, or sub-config → one.
        experts_implementation: how fused experts are computed, likewise.
        model_kwargs: attributes of the config → what they are to be; others go to the class.
        model_args: what the class is given behind the config.
        key_mapping: regular expression → replacement, by which transformers renames keys before all else.
        generation_config: what `generate` takes its defaults from; None for that of the folder.
        name: what `name_or_path` is to say; None for the folder.
        trust_remote_code: whether Python files beside the checkpoint may run.
        num_classes: of a timm model, how many outputs its classifier is to have; None for what the config says.
        in_chans: of a timm model, how many channels its input is to have; None for what the config says.
        distributed_config: how a transformers model is divided among ranks by its own plans; None for one process.
        int8: what a `quantization_config` asks, instead of the options of a load; None for these.
    """

    model: nn.Module | Callable[[], nn.Module] | None = None
    auto_class: Any = None
    config: Any = None
    attn_implementation: str | Mapping[str, str] | None = None
    experts_implementation: str | Mapping[str, str] | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    model_args: tuple[Any, ...] = ()
    key_mapping: Mapping[str, str] = field(default_factory=dict)
    generation_config: Any = None
    name: str | None = None
    trust_remote_code: bool = False
    num_classes: int | None = None
    in_chans: int | None = None
    distributed_config: Any = None
    int8: Int8Request | None = None

    @property
    def implementations(self) -> dict[str, str | dict[str, str]]:
        """Those that were asked for, under the names that transformers has for them."""
        asked = {
            "attn_implementation": self.attn_implementation,
            "experts_implementation": self.experts_implementation,
        }
        return {name: dict(v) if isinstance(v, Mapping) else v for name, v in asked.items() if v is not None}


ModelSource = nn.Module | Callable[[], nn.Module] | ModelRequest | None


def make_model_request(
    model: ModelSource = None,
    *,
    auto_class: Any = None,
    config: Any = None,
    attn_implementation: str | Mapping[str, str] | None = None,
    experts_implementation: str | Mapping[str, str] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    num_classes: int | None = None,
    in_chans: int | None = None,
    distributed_config: Any = None,
) -> ModelRequest:
    """Parse what is asked about the model; one that is parsed already is given back.

    Raises:
        OptionError: a value that means nothing, or one about a model that the caller makes.
    """
    for name, value in (
        ("auto_class", auto_class),
        ("config", config),
        ("attn_implementation", attn_implementation),
        ("experts_implementation", experts_implementation),
        ("model_kwargs", model_kwargs or None),
        ("num_classes", num_classes),
        ("in_chans", in_chans),
        ("distributed_config", distributed_config),
    ):
        if model is not None and value is not None:
            raise OptionError(
                f"{name}: it is about a model that lowmem makes, and model= is given; leave one of them out"
            )
    if isinstance(model, ModelRequest):
        return model
    if auto_class is not None and not isinstance(auto_class, (str, type)):
        raise OptionError(
            f"auto_class: expected a class of transformers or its name, such as 'AutoModel', found {shown(auto_class)}"
        )
    return ModelRequest(
        model=model,
        auto_class=auto_class,
        config=_config(config),
        attn_implementation=_implementation(attn_implementation, "attn_implementation"),
        experts_implementation=_implementation(experts_implementation, "experts_implementation"),
        model_kwargs=_model_kwargs(model_kwargs),
        trust_remote_code=trust_remote_code,
        num_classes=_count(num_classes, "num_classes", 0),
        in_chans=_count(in_chans, "in_chans", 1),
        distributed_config=_distributed(distributed_config),
    )


def _config(value: Any) -> Any:
    """A path as text, or an object; what class that must be of only transformers can say."""
    if isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    if value is None or hasattr(value, "to_dict"):
        return value
    raise OptionError(f"config: expected a config of transformers or the path of one, found {shown(value)}")


def _distributed(value: Any) -> Any:
    """A `DistributedConfig` of transformers, or a mapping of its arguments."""
    if value is None or isinstance(value, Mapping) or type(value).__name__ == "DistributedConfig":
        return dict(value) if isinstance(value, Mapping) else value
    raise OptionError(
        "distributed_config: expected a DistributedConfig of transformers, or its arguments such as {'tp_size': 2}, "
        f"found {shown(value)}"
    )


def _implementation(value: Any, what: str) -> str | dict[str, str] | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Mapping) and all(isinstance(part, str) for pair in value.items() for part in pair):
        return dict(value)
    raise OptionError(f"{what}: expected a name such as 'sdpa' or 'eager', or sub-config → name, found {shown(value)}")


def _count(value: int | None, what: str, least: int) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= least):
        return value
    raise OptionError(f"{what}: expected a whole number, {least} or more, found {shown(value)}")


def _model_kwargs(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise OptionError(
            f"model_kwargs: expected names with values, such as {{'num_labels': 3}}, found {shown(value)}"
        )
    for name in value:
        if name == "quantization_config":
            raise OptionError(
                "model_kwargs: 'quantization_config' is an option of its own; give quantize='int8' to load, "
                "or quantization_config= to from_pretrained"
            )
        if name in _NOT_OF_THE_MODEL:
            raise OptionError(
                f"model_kwargs: {name!r} is no attribute of a config but an option; give it to load itself, if it "
                "has it"
            )
    return dict(value)
