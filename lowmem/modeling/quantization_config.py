"""`quantization_config` of `from_pretrained`: what it asks of int8, and what of it the model says afterwards.

As transformers 5.23 takes it: `quantizers/auto.py`, `quantizers/quantizer_bnb_8bit.py` and
`utils/quantization_config.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import OptionError, UnsupportedError
from ..sizes import shown

_WHAT = "quantization_config: expected BitsAndBytesConfig(load_in_8bit=True) or a dictionary that says so"
_REMEDY = (
    "lowmem makes bitsandbytes' int8 only: give BitsAndBytesConfig(load_in_8bit=True), load in bf16 or fp16, or use "
    "from_pretrained itself"
)


def parse_quantization_config(value: Any) -> Any:
    """The `BitsAndBytesConfig` that `value` is or stands for; None for None.

    Raises:
        UnsupportedError: another way of quantising than bitsandbytes' int8.
        OptionError: it says nothing, or what `BitsAndBytesConfig` does not take.
    """
    if value is None:
        return None
    import transformers

    config: Any = value
    if isinstance(value, Mapping):
        config = _from_table(dict(value), transformers.BitsAndBytesConfig)
    elif not isinstance(value, transformers.BitsAndBytesConfig):
        method = getattr(value, "quant_method", None)
        if method is None:
            raise OptionError(f"{_WHAT}, found {shown(value)}")
        raise _refusal(f"{type(value).__name__} ({str(getattr(method, 'value', method))!r})")
    if config.load_in_4bit:
        raise _refusal("load_in_4bit=True")
    if config.llm_int8_has_fp16_weight:
        raise _refusal("llm_int8_has_fp16_weight=True, which keeps the weights in fp16")
    if not config.load_in_8bit:
        raise OptionError(f"{_WHAT}, found load_in_8bit=False; leave quantization_config out for floats")
    return config


def _from_table(table: dict[str, Any], make: Any) -> Any:
    """As `AutoQuantizationConfig.from_dict`: `load_in_8bit` and `load_in_4bit` go before `quant_method`."""
    if not table.get("load_in_8bit") and not table.get("load_in_4bit"):
        method = getattr(table.get("quant_method"), "value", table.get("quant_method"))
        if method is None or method == "bitsandbytes":
            raise OptionError(f"{_WHAT}, found {shown(table)}")
        raise _refusal(repr(method))
    try:
        return make.from_dict(table)
    except (TypeError, ValueError) as error:
        raise OptionError(f"quantization_config: BitsAndBytesConfig does not take {shown(table)}: {error}") from error


def _refusal(found: str) -> UnsupportedError:
    return UnsupportedError(f"quantization_config: lowmem does not take {found}; {_REMEDY}")


def kept_off_the_gpu(config: Any, device_map: Any) -> list[str]:
    """Modules that stay floats because the map puts them on the CPU or the disk, if the config wants that."""
    if not config.llm_int8_enable_fp32_cpu_offload or not isinstance(device_map, Mapping):
        return []
    # There the name of the whole model is the end of every name.
    return [name or "*" for name, device in device_map.items() if str(device) in ("cpu", "disk")]


def accelerator() -> str | None:
    """The kind of accelerator that a quantised model without a device map goes to, if there is one."""
    for kind in ("cuda", "npu", "xpu"):
        # torch.npu is there only after torch_npu was imported.
        module = getattr(torch, kind, None)
        if module is not None and module.is_available():
            return kind
    return None


def device_in_use(kind: str) -> str:
    """The current device of a kind; asking for it takes some memory there."""
    return f"{kind}:{getattr(torch, kind).current_device()}"
