"""Which layers of a model are int8, and the exchange of their modules.

What transformers does with bitsandbytes is read from `quantizers/base.py`, `quantizers/quantizer_bnb_8bit.py` and
`integrations/bitsandbytes.py` (version 5).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .._patterns import name_matches
from ..errors import ModelError
from ..int8 import Int8Linear
from .empty import real_tensors
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
    """

    quantize: bool = False
    skip_modules: tuple[str, ...] | None = None
    dequantize: bool = False
    threshold: float | None = None


NO_INT8 = Int8Request()
# That of transformers' BitsAndBytesConfig.
_THRESHOLD = 6.0


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
    components, anywhere). Layers whose weight is tied, and those that `keep_fp32` names, always stay floats.

    Args:
        model: its tensors may lie anywhere.
        request: what the user asked.
        keep_fp32: the user's patterns of tensors.
    """
    modules = [(prefix[:-1], module) for prefix, module in walk(model)]
    skipped, warnings = _skipped(model, request, [name for name, _ in modules if name])
    tied = _tied(modules)
    floats: set[int] = set()
    linear: list[tuple[str, nn.Module]] = []
    for name, module in modules:
        if _sizes(module) is None or is_bitsandbytes(module):
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
    named = _named if hf is None else _named_by_transformers
    lists, patterns, warnings = set[str](), set[str](), list[str]()
    if request.skip_modules is None:
        if hf is None:
            patterns.add("lm_head")
        else:
            lists.update(_left_out_by_transformers(hf))
    elif hf is not None:
        lists.update(hf._keep_in_fp32_modules or ())
    for pattern in request.skip_modules or ():
        if any(named(name, pattern) for name in names):
            lists.add(pattern)
        elif "*" in pattern and any(name_matches(name, pattern) for name in names):
            patterns.add(pattern)
        else:
            warnings.append(f"skip_modules: {pattern!r} names no module of the model")

    def skipped(name: str) -> bool:
        return any(named(name, p) for p in lists) or any(name_matches(name, p) for p in patterns)

    return skipped, warnings


def _left_out_by_transformers(model: Any, skip_modules: list[str] | None = None) -> list[str]:
    """`get_modules_to_not_convert`, as its quantizer calls it."""
    from transformers.quantizers.base import HfQuantizer

    found: list[str] = HfQuantizer.get_modules_to_not_convert(model, skip_modules, model._keep_in_fp32_modules)
    # The last parameter of the model may be that of an Int8Linear, where transformers would see a weight.
    return [name.removesuffix(".SCB") for name in found]


def _named_by_transformers(name: str, pattern: str) -> bool:
    from transformers.quantizers.quantizers_utils import should_convert_module

    try:
        return not should_convert_module(name, [pattern])
    except re.error:
        return name.endswith(pattern)


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


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) features of a layer that may be int8; None for every other module.

    A layer that holds more than a weight and a bias is none: what it holds besides would be lost.
    """
    if is_bitsandbytes(module):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    transposed = is_conv1d(module)
    if not transposed and type(module) is not nn.Linear:
        return None
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 2 or not weight.is_floating_point():
        return None
    if module._buffers or module._modules or not set(module._parameters) <= {"weight", "bias"}:
        return None
    inner, outer = weight.shape if transposed else reversed(weight.shape)
    # A row of no element has no largest magnitude.
    return (inner, outer) if inner else None


def is_linear(module: nn.Module) -> bool:
    """Whether `swap` takes it."""
    return _sizes(module) is not None


def existing_int8(model: nn.Module) -> list[str]:
    """Names of the modules that are bitsandbytes' `Linear8bitLt` already, with int8 weights or a place for them."""
    return [prefix[:-1] for prefix, module in walk(model) if is_bitsandbytes(module)]


def bitsandbytes_here() -> bool:
    """Whether bitsandbytes can be imported and quantises a number. What stands in the way does not matter."""
    try:
        package = importlib.import_module("bitsandbytes")
        with real_tensors():
            values, scales, _ = package.functional.int8_vectorwise_quant(torch.ones(1, 1, dtype=torch.float16))
        return bool(values.item() == 127 and scales.item() == 1 and callable(package.nn.Linear8bitLt))
    except Exception:  # whatever a package raises whose libraries do not fit this machine
        return False


# What the caller may have hung on a module that is called; state dicts have other keys afterwards.
_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)


@dataclass(slots=True, eq=False)
class _Exchange:
    """One module and what stands in its place.

    Attributes:
        old: the module that was there.
        stand_in: the int8 layer that is loaded.
        places: (module around it, name there), all of them.
        held: the old module's parameters, whatever is done to it later.
        state: where it computed with weights that a `Linear8bitLt` keeps twice, those.
    """

    old: nn.Module
    stand_in: Int8Linear
    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    held: dict[str, nn.Parameter | None] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)

    def put(self, module: nn.Module) -> None:
        for around, leaf in self.places:
            around._modules[leaf] = module


class Int8Layers:
    """Layers of a model that `swap` exchanged.

    Attributes:
        names: of all of them, in the model's order; a shared one under each of its names.
    """

    def __init__(self, names: tuple[str, ...], exchanges: list[_Exchange]) -> None:
        self.names = names
        self._exchanges = exchanges

    def undo(self) -> None:
        """Put every old module back as it was. Nothing happens the second time."""
        for exchange in self._exchanges:
            exchange.old._parameters.update(exchange.held)
            for key, value in exchange.state.items():
                setattr(exchange.old.state, key, value)
            exchange.put(exchange.old)

    def finish(self, threshold: float) -> None:
        """Exchange each `Int8Linear`, loaded or on meta, for a `Linear8bitLt` where bitsandbytes works.

        The memory stays the same. A `Linear8bitLt` that the model had before comes back with the new tensors, its
        own threshold, and whether bitsandbytes works or not. Hooks that load layers from disk must come later.

        Args:
            threshold: magnitude from which activations are computed in fp16; 0 for never.
        """
        here = bitsandbytes_here()
        for exchange in self._exchanges:
            if is_bitsandbytes(exchange.old):
                _fill(exchange.old, exchange.stand_in)
                exchange.put(exchange.old)
            elif here:
                exchange.put(_linear8bit(exchange.stand_in, type(exchange.old), threshold))


def swap(model: nn.Module, names: Collection[str]) -> Int8Layers:
    """Exchange modules in place by `Int8Linear` on meta, under all of their names.

    The bias stays the object that it is; whether the module trains and its forward and backward hooks are kept.

    Args:
        model: around them.
        names: of `nn.Linear`, `Conv1D` or `Linear8bitLt` modules.

    Raises:
        ModelError: a name is that of the model itself, of no module, or of one that cannot be int8.
    """
    wanted = set(names)
    if "" in wanted:
        raise ModelError(
            f"the model itself is a {type(model).__name__}, which becomes int8 by an exchange of modules: expected a "
            "module around it; wrap it in a module, for example nn.Sequential"
        )
    exchanges: dict[int, _Exchange] = {}
    found: list[tuple[str, nn.Module, str, nn.Module]] = []
    for prefix, around in walk(model):
        found += [(prefix + leaf, around, leaf, m) for leaf, m in around._modules.items() if m is not None]
    for name, _, _, module in found:
        if name in wanted:
            wanted.discard(name)
            if id(module) not in exchanges:
                exchange = exchanges[id(module)] = _Exchange(module, _stand_in(name, module))
                exchange.held.update(module._parameters)
                if is_bitsandbytes(module):
                    exchange.state.update({key: getattr(module.state, key) for key in ("CB", "SCB")})
    if wanted:
        raise ModelError(f"expected a linear layer {min(wanted)!r} to make int8, found no such module in the model")
    placed: dict[str, None] = {}
    for name, around, leaf, module in found:
        if id(module) in exchanges:
            placed[name] = None
            exchanges[id(module)].places.append((around, leaf))
    for exchange in exchanges.values():
        exchange.put(exchange.stand_in)
    return Int8Layers(tuple(placed), list(exchanges.values()))


def _stand_in(name: str, module: nn.Module) -> Int8Linear:
    sizes = _sizes(module)
    if sizes is None:
        raise ModelError(
            f"module {name!r}: expected torch's own nn.Linear or transformers' Conv1D, with a weight and a bias and "
            f"nothing else, to make int8, found {type(module).__name__}; exchange it, or load its weight as floats "
            "with dequantize=True"
        )
    bias = module._parameters.get("bias")
    made = Int8Linear(*sizes, bias=bias is not None, device="meta")
    if bias is not None:
        made._parameters["bias"] = bias
    _carry_over(module, made)
    return made


def _carry_over(source: nn.Module, module: nn.Module) -> None:
    """The same tables of hooks, so that the handles of these remove them still."""
    for key in ("training", *_HOOKS, "_is_hf_initialized"):
        if key in source.__dict__:
            module.__dict__[key] = source.__dict__[key]


def _linear8bit(layer: Int8Linear, source: type[nn.Module], threshold: float) -> nn.Module:
    package = importlib.import_module("bitsandbytes")
    bias = layer._parameters.get("bias")
    with torch.device("meta"):
        made: nn.Module = package.nn.Linear8bitLt(
            layer.in_features, layer.out_features, bias is not None, has_fp16_weights=False, threshold=threshold
        )
    made.__dict__["source_cls"] = source
    _fill(made, layer)
    _carry_over(layer, made)
    return made


def _fill(module: nn.Module, layer: Int8Linear) -> None:
    """Give a `Linear8bitLt` what was loaded, without a copy."""
    package = importlib.import_module("bitsandbytes")
    values, scales = layer.weight.detach(), layer.SCB.detach()
    weight = package.nn.Int8Params(values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=scales)
    weight.__dict__.update(layer.weight.__dict__)
    module._parameters["weight"] = weight
    if "bias" in layer._parameters:
        module._parameters["bias"] = layer._parameters["bias"]
    state: Any = module.state
    state.CB = state.SCB = None


def mark_quantised(model: nn.Module, skip_modules: list[str] | None, threshold: float) -> None:
    """Leave on a transformers model what `from_pretrained` leaves on one that it made int8, or loaded so.

    A config that says already that the weights are int8 keeps its words, but for the threshold. Another gets a list of
    modules by which transformers finds the same layers when it loads what `save_pretrained` writes: `skip_modules`
    itself wherever that is enough. Without bitsandbytes the model has no `hf_quantizer` and no `is_loaded_in_8bit`:
    `to` and `cuda` would refuse to move it, and `dequantize` and training need the package.

    Args:
        model: with its int8 layers in their places. Not a transformers model: nothing is done.
        skip_modules: as the user gave them; None for transformers' own list.
        threshold: magnitude from which activations are computed in fp16.
    """
    if not is_transformers_model(model):
        return
    import transformers

    make: Any = transformers.BitsAndBytesConfig
    hf: Any = model
    config = hf.config
    found = getattr(config, "quantization_config", None)
    if found is None:
        found = getattr(config.get_text_config(decoder=True), "quantization_config", None)
    quantizer = getattr(hf, "hf_quantizer", None)
    pre_quantized = found is not None if quantizer is None else quantizer.pre_quantized
    if found is None:
        found = {"llm_int8_skip_modules": _enough_for_transformers(hf, skip_modules)}
    if isinstance(found, Mapping):
        # It takes no whole number for a threshold.
        found = make(**{**found, "load_in_8bit": True, "llm_int8_threshold": float(threshold)})
    found.llm_int8_threshold = float(threshold)
    config.quantization_config = found
    for module in model.modules():
        if is_transformers_model(module):
            inner: Any = module
            inner.config._is_quantized = True
    hf.is_quantized = True
    hf.quantization_method = found.quant_method
    if bitsandbytes_here():
        from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

        quantizer = Bnb8BitHfQuantizer(found, pre_quantized=pre_quantized) if quantizer is None else quantizer
        quantizer.modules_to_not_convert = _left_out_by_transformers(hf, found.llm_int8_skip_modules)
        hf.hf_quantizer = quantizer
        hf.is_loaded_in_8bit = True


def _enough_for_transformers(model: Any, skip_modules: list[str] | None) -> list[str] | None:
    """The list by which transformers leaves out just what is no int8 layer of the model."""
    int8, floats = set[str](), set[str]()
    for prefix, module in walk(model):
        if isinstance(module, Int8Linear) or is_bitsandbytes(module):
            int8.add(prefix[:-1])
        elif type(module) is nn.Linear or is_conv1d(module):
            floats.add(prefix[:-1])

    def tells_apart(patterns: list[str] | None) -> bool:
        out = _left_out_by_transformers(model, patterns)
        left = {name for name in int8 | floats if any(_named_by_transformers(name, pattern) for pattern in out)}
        return left == floats

    given = skip_modules
    if given is not None:
        # What only lowmem understands would be an error there.
        given = [pattern for pattern in given if "*" not in pattern or _is_expression(pattern)]
    if tells_apart(given):
        return given
    known = _left_out_by_transformers(model) if given is None else given
    more = [*known, *sorted(floats.difference(known))]
    return more if tells_apart(more) else [f"{re.escape(name)}$" for name in sorted(floats)]


def _is_expression(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def settle_int8(model: nn.Module, layers: Int8Layers | None, request: Int8Request) -> None:
    """When all weights are in their places: the modules that compute with int8, and what the model says of itself.

    Args:
        model: loaded.
        layers: of it that are int8; None when there are none.
        request: what the user asked.
    """
    if layers is None:
        if request.dequantize:
            unmark(model)
        return
    table = getattr(getattr(model, "config", None), "quantization_config", None)
    said = table.get("llm_int8_threshold") if isinstance(table, Mapping) else getattr(table, "llm_int8_threshold", None)
    threshold = request.threshold
    if threshold is None:
        threshold = _THRESHOLD if said is None else float(said)
    layers.finish(threshold)
    mark_quantised(model, None if request.skip_modules is None else list(request.skip_modules), threshold)


def unmark(model: nn.Module) -> None:
    """Take from a transformers model every sign that its weights are quantised, as `remove_quantization_config` does.

    Sub-configs too: what is saved then is read as floats.
    """
    if not is_transformers_model(model):
        return
    for key in ("hf_quantizer", "quantization_method", "is_loaded_in_8bit"):
        model.__dict__.pop(key, None)
    hf: Any = model
    hf.is_quantized = False
    configs = [hf.config, *(module.config for module in model.modules() if is_transformers_model(module))]
    while configs:
        config = configs.pop()
        for key in ("quantization_config", "_is_quantized"):
            config.__dict__.pop(key, None)
        configs += [getattr(config, key) for key in config.sub_configs if getattr(config, key, None) is not None]
