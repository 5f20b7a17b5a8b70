"""Which layers of a model become int8, and which are.

What transformers leaves out is read from `quantizers/base.py` and `quantizers/quantizers_utils.py` (version 5).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .._patterns import name_matches
from ..int8 import Int8Linear
from .hf import is_transformers_model
from .targets import is_bitsandbytes, is_conv1d, walk


@dataclass(frozen=True, slots=True)
class Int8Request:
    """What the user asked about int8, parsed.

    Attributes:
        quantize: make the linear layers int8 that are floats in the checkpoint.
        skip_modules: names or patterns of layers that stay floats then; None for transformers' own list.
        dequantize: make floats of what is int8 in the checkpoint.
        threshold: magnitude from which bitsandbytes computes activations in fp16; None for what the checkpoint's
            config says, or its default.
        also_skip: names or patterns of layers that stay floats besides.
        config: a `BitsAndBytesConfig` that the model is to have when this load made it int8; None for one of lowmem's.
    """

    quantize: bool = False
    skip_modules: tuple[str, ...] | None = None
    dequantize: bool = False
    threshold: float | None = None
    also_skip: tuple[str, ...] = ()
    config: Any = None


NO_INT8 = Int8Request()


@dataclass(frozen=True, slots=True)
class Choice:
    """The layers that become int8.

    Attributes:
        names: of modules, in the model's order; a shared module under each of its names.
        warnings: what was asked and means nothing for this model.
    """

    names: tuple[str, ...]
    warnings: tuple[str, ...] = ()


def layers_to_quantise(model: nn.Module, request: Int8Request, keep_fp32: Collection[str]) -> Choice:
    """The linear layers that `quantize="int8"` makes int8: `nn.Linear` itself and transformers' `Conv1D`.

    What stays floats is what transformers leaves out for the model (`get_modules_to_not_convert`): its output
    embedding, tied layers, the module of its last parameter, and `_keep_in_fp32_modules`; of a plain `nn.Module`, what
    is called `lm_head`. `request.skip_modules` replaces the list but for `_keep_in_fp32_modules`. Its entries match as
    in transformers (`should_convert_module`): as a regular expression from the start of the name to a dot or to its
    end, or as the end of the name. One with `*` that names no module so is a pattern as everywhere in lowmem (whole
    components, anywhere). Layers whose weight is tied, those that `keep_fp32` names, and those of
    `torch.nn.TransformerEncoderLayer`, always stay floats.

    Args:
        model: its tensors may lie anywhere.
        request: what the user asked.
        keep_fp32: the user's patterns of tensors.
    """
    modules = [(prefix[:-1], module) for prefix, module in walk(model)]
    skipped, warnings = _skipped(model, request, [name for name, module in modules if name and sizes_of(module)])
    tied = _tied(modules)
    direct = {
        id(layer): name
        for name, module in modules
        if isinstance(module, nn.TransformerEncoderLayer)
        for layer in (module.linear1, module.linear2)
    }
    if direct:
        more = f" and {len(direct) // 2 - 1} others" if len(direct) > 2 else ""
        warnings.append(
            f"{next(iter(direct.values()))!r}{more}: linear1 and linear2 stay floats, for "
            "torch.nn.TransformerEncoderLayer computes with their weights itself"
        )
    floats: set[int] = set(direct)
    linear: list[tuple[str, nn.Module]] = []
    for name, module in modules:
        sizes = sizes_of(module)
        if sizes is None or not all(sizes) or is_bitsandbytes(module):
            continue
        linear.append((name, module))
        weight = f"{name}.weight" if name else "weight"
        kept = any(name_matches(weight, pattern) for pattern in keep_fp32)
        if kept or skipped(name) or weight in tied or id(module._parameters["weight"]) in tied:
            floats.add(id(module))
    return Choice(tuple(name for name, module in linear if id(module) not in floats), tuple(warnings))


def _skipped(model: nn.Module, request: Int8Request, names: Collection[str]) -> tuple[Callable[[str], bool], list[str]]:
    """Whether a module's name is in the list of what stays floats; and warnings."""
    hf: Any = model if is_transformers_model(model) else None
    named = _named if hf is None else named_by_transformers
    lists, patterns, warnings = set[str](), set[str](), list[str]()
    if request.skip_modules is None:
        if hf is None:
            patterns.add("lm_head")
        else:
            lists.update(left_out_by_transformers(hf))
    elif hf is not None:
        lists.update(hf._keep_in_fp32_modules or ())
    for pattern in (*(request.skip_modules or ()), *request.also_skip):
        if any(named(name, pattern) for name in names):
            lists.add(pattern)
        elif "*" in pattern and any(name_matches(name, pattern) for name in names):
            patterns.add(pattern)
        elif pattern not in request.also_skip:
            warnings.append(
                f"skip_modules: {pattern!r} names no linear layer of the model: expected the beginning of a name up to "
                "a dot, or its end"
            )

    def skipped(name: str) -> bool:
        return any(named(name, p) for p in lists) or any(name_matches(name, p) for p in patterns)

    return skipped, warnings


def left_out_by_transformers(model: Any, skip_modules: list[str] | None = None) -> list[str]:
    """`get_modules_to_not_convert`, as its quantizer calls it."""
    from transformers.quantizers.base import HfQuantizer

    seen: Any = _AsBuilt(model)
    found: list[str] = HfQuantizer.get_modules_to_not_convert(seen, skip_modules, model._keep_in_fp32_modules)
    return found


class _AsBuilt:
    """A transformers model with the parameters that it has when `from_pretrained` chooses the layers.

    Which of them is the last decides. They are not tied yet then, and none holds scales.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        seen: set[int] = set()
        for prefix, module in self._model.named_modules():
            for leaf, parameter in module._parameters.items():
                name = f"{prefix}.{leaf}" if prefix else leaf
                if parameter is None or (leaf == "SCB" and isinstance(module, Int8Linear)):
                    continue
                if id(parameter) not in seen or name in self._model.all_tied_weights_keys:
                    seen.add(id(parameter))
                    yield name, parameter


def named_by_transformers(name: str, pattern: str) -> bool:
    """Whether an entry of transformers' list of modules names this one; what is no expression names by the end."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    try:
        return not should_convert_module(name, [pattern])
    except re.error:
        return name.endswith(pattern)


def named_by_any(names: Collection[str], patterns: Collection[str]) -> set[str]:
    """Those of `names` that an entry of transformers' list names, at once for many."""
    try:
        every = re.compile(rf"(?:{'|'.join(f'(?:{p})' for p in patterns)})(?:(?<=\.)|(?=\.|$))")
    except re.error:
        return {name for name in names if any(named_by_transformers(name, pattern) for pattern in patterns)}
    ends = tuple(patterns)
    return {name for name in names if patterns and (every.match(name) or name.endswith(ends))}


def _named(name: str, pattern: str) -> bool:
    """What `should_convert_module` denies."""
    try:
        found = re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", name)
    except re.error:
        found = None
    return found is not None or name.endswith(pattern)


def _tied(modules: Collection[tuple[str, nn.Module]]) -> set[str | int]:
    """Ids of parameters that several modules hold, or one under several names; and names that are declared tied."""
    holders: dict[int, set[tuple[int, str]]] = {}
    tied: set[str | int] = set()
    for name, module in modules:
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), set()).add((id(module), leaf))
        declared = module.__dict__.get("all_tied_weights_keys")
        if isinstance(declared, Mapping):
            prefix = f"{name}." if name else ""
            tied.update(prefix + key for pair in declared.items() for key in pair)
    tied.update(key for key, places in holders.items() if len(places) > 1)
    return tied


def sizes_of(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) features of a layer that may be int8; None for every other module.

    A layer that holds more than a weight and a bias is none: what it holds besides would be lost.
    """
    if is_bitsandbytes(module):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    transposed = is_conv1d(module)
    if not transposed and type(module) is not nn.Linear:
        return None
    if "forward" in module.__dict__:
        # It computes in a way of its own.
        return None
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 2 or not weight.is_floating_point():
        return None
    if module._buffers or module._modules or not set(module._parameters) <= {"weight", "bias"}:
        return None
    inner, outer = weight.shape if transposed else reversed(weight.shape)
    return inner, outer


def existing_int8(model: nn.Module) -> list[str]:
    """Names of the modules that are bitsandbytes' `Linear8bitLt` already, with int8 weights or a place for them."""
    known: dict[type, bool] = {}
    found = []
    for prefix, module in walk(model):
        kind = type(module)
        if kind not in known:
            known[kind] = kind.__name__ == "Linear8bitLt" or issubclass(kind, nn.Linear)
        if known[kind] and is_bitsandbytes(module):
            found.append(prefix[:-1])
    return found
