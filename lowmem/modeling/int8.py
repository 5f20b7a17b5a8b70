"""The exchange of modules for int8 ones and back, and the marks that it leaves on a model.

What transformers does with bitsandbytes is read from `quantizers/base.py`, `quantizers/quantizer_bnb_8bit.py` and
`integrations/bitsandbytes.py` (version 5).
"""

from __future__ import annotations

import copy
import functools
import importlib
import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from ..int8 import Int8Linear
from .empty import real_tensors
from .hf import is_transformers_model
from .int8_choice import Int8Request, left_out_by_transformers, named_by_any, sizes_of
from .quantised import DEFAULT_THRESHOLD, int8_config
from .targets import is_bitsandbytes, is_conv1d, walk

_LOGGER = logging.getLogger("lowmem")


@functools.cache
def bitsandbytes_here() -> bool:
    """Whether bitsandbytes can be imported and quantises a number. What stands in the way does not matter."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    try:
        # It says which of its optional kernels are not there, none of which is asked for here.
        logger.setLevel(logging.ERROR)
        package = importlib.import_module("bitsandbytes")
        with real_tensors():
            values, scales, _ = package.functional.int8_vectorwise_quant(torch.ones(1, 1, dtype=torch.float16))
        return bool(values.item() == 127 and scales.item() == 1 and callable(package.nn.Linear8bitLt))
    except Exception as error:  # whatever a package raises whose libraries do not fit this machine
        _LOGGER.debug("bitsandbytes is not used: %s", error)
        return False
    finally:
        logger.setLevel(level)


# What the caller may have hung on a module that is called; state dicts have other keys afterwards.
_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)


# Attributes of `Conv1D` that say what the other layers say by others.
_OF_A_LAYER = frozenset({"nf", "nx"})


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

    def finish(self, threshold: float, comes_at_use: Callable[[torch.Tensor], bool] = lambda parameter: False) -> None:
        """Exchange each `Int8Linear`, loaded or on meta, for a `Linear8bitLt` where bitsandbytes works.

        The memory stays the same. A `Linear8bitLt` that the model had before comes back with the new tensors, its
        own threshold, and whether bitsandbytes works or not. Hooks that load layers from disk must come later.

        A layer with a parameter that is brought whenever it is used stays an `Int8Linear`: bitsandbytes keeps the
        weight itself between two forwards.

        Args:
            threshold: magnitude from which activations are computed in fp16; 0 for never.
            comes_at_use: tells such parameters.
        """
        here = bitsandbytes_here()
        for exchange in self._exchanges:
            if any(p is not None and comes_at_use(p) for p in exchange.stand_in._parameters.values()):
                continue
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
    sizes = sizes_of(module)
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
    """The same tables of hooks, so that the handles of these remove them still; and what the caller hung on it."""
    others = not is_bitsandbytes(source)
    for key, value in source.__dict__.items():
        if key in ("training", *_HOOKS) or (others and key not in module.__dict__ and key not in _OF_A_LAYER):
            module.__dict__[key] = value


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


def mark_quantised(
    model: nn.Module,
    skip_modules: list[str] | None,
    threshold: float,
    given: Any = None,
    also_skip: Sequence[str] = (),
) -> None:
    """Leave on a transformers model what `from_pretrained` leaves on one that it made int8, or loaded so.

    A config that says already that the weights are int8 keeps its words, but for the threshold, and for a list of
    modules that no longer tells the layers. Another gets a list by which transformers finds the same layers when it
    loads what `save_pretrained` writes: `skip_modules` itself wherever that is enough. Without bitsandbytes the model
    has no `hf_quantizer` and no `is_loaded_in_8bit`: `to` and `cuda` would refuse to move it, and `dequantize` and
    training need the package.

    Args:
        model: with its int8 layers in their places. Not a transformers model: nothing is done.
        skip_modules: as the user gave them; None for transformers' own list.
        threshold: magnitude from which activations are computed in fp16.
        given: a `BitsAndBytesConfig` of the user, which lands on the model itself if its list tells the layers.
        also_skip: what stays floats besides its list.
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
        found = {} if given is None else given
        skip_modules = skip_modules if given is None else given.llm_int8_skip_modules
    elif isinstance(found, Mapping):
        skip_modules = found.get("llm_int8_skip_modules")
    else:
        skip_modules = found.llm_int8_skip_modules
    if isinstance(found, Mapping):
        # It takes no whole number for a threshold.
        found = make(**{**found, "load_in_8bit": True, "llm_int8_threshold": float(threshold)})
    enough = _enough_for_transformers(hf, skip_modules, also_skip)
    if found.llm_int8_skip_modules != enough or found.llm_int8_threshold != threshold:
        # The user's own object stays as it is.
        found = copy.copy(found)
        found.llm_int8_skip_modules, found.llm_int8_threshold = enough, float(threshold)
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
        quantizer.modules_to_not_convert = left_out_by_transformers(hf, found.llm_int8_skip_modules)
        hf.hf_quantizer = quantizer
        hf.is_loaded_in_8bit = True


def _enough_for_transformers(
    model: Any, skip_modules: list[str] | None, also_skip: Sequence[str] = ()
) -> list[str] | None:
    """The list by which transformers leaves out just what is no int8 layer of the model."""
    int8, floats = set[str](), set[str]()
    for prefix, module in walk(model):
        if isinstance(module, Int8Linear) or is_bitsandbytes(module):
            int8.add(prefix[:-1])
        elif type(module) is nn.Linear or is_conv1d(module):
            floats.add(prefix[:-1])

    def tells_apart(patterns: list[str] | None) -> bool:
        return named_by_any(int8 | floats, left_out_by_transformers(model, patterns)) == floats

    given = skip_modules
    if given is not None:
        # What only lowmem understands would be an error there.
        given = [pattern for pattern in given if _is_expression(pattern)]
    if tells_apart(given):
        return given
    known = left_out_by_transformers(model) if given is None else given
    named = {name for name, _ in model.named_modules()}
    besides = [*sorted(named.intersection(known) if given is None else known), *also_skip]
    if also_skip and tells_apart(besides):
        return besides
    more = [*known, *sorted(floats.difference(known))]
    return more if tells_apart(more) else [f"{re.escape(name)}$" for name in sorted(floats)]


def _is_expression(pattern: str) -> bool:
    try:
        re.compile(f"(?:{pattern})")
    except re.error:
        return False
    return True


def finish_layers(
    model: nn.Module, layers: Int8Layers, request: Int8Request, comes_at_use: Callable[[torch.Tensor], bool]
) -> None:
    """When all weights are in their places: exchange the modules for those that compute with int8.

    Args:
        model: loaded.
        layers: of it that are int8.
        request: what the user asked.
        comes_at_use: tells parameters that are brought whenever they are used.
    """
    layers.finish(_threshold_of(model, request), comes_at_use)


def mark(model: nn.Module, layers: Int8Layers | None, request: Int8Request) -> None:
    """Last of all: let the model say whether its weights are int8.

    Args:
        model: loaded.
        layers: of it that are int8; None when there are none.
        request: what the user asked.
    """
    if layers is not None:
        skips = None if request.skip_modules is None else list(request.skip_modules)
        mark_quantised(model, skips, _threshold_of(model, request), request.config, request.also_skip)
    elif request.dequantize or says_int8(model):
        unmark(model)


def _threshold_of(model: nn.Module, request: Int8Request) -> float:
    """What the user says, else the config or a sub-config, else transformers' own."""
    if request.threshold is not None:
        return request.threshold
    said = _declared(model)
    return DEFAULT_THRESHOLD if said is None else float(said["llm_int8_threshold"])


def says_int8(model: nn.Module) -> bool:
    """Whether the config of a transformers model says that its weights are int8."""
    return _declared(model) is not None


def _declared(model: nn.Module) -> Mapping[str, Any] | None:
    if not is_transformers_model(model):
        return None
    hf: Any = model
    return int8_config(hf.config.to_dict())


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
