"""Layers of bitsandbytes whose weights are elsewhere: a hook that brings int8 with its scales, and leaves nothing.

accelerate's own hook quantises what it brings to the CPU, which takes a GPU, and leaves the int8 weight in the layer's
state behind it, so that a model on disk would come into memory layer by layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook
from accelerate.utils import find_device, named_module_tensors, send_to_device
from torch import nn

_Function = TypeVar("_Function", bound=Callable[..., Any])


def exchange_hooks(model: nn.Module) -> None:
    """Give every `Linear8bitLt` of a dispatched model whose int8 weight is elsewhere a hook that fits it.

    Only accelerate's hook that brings weights is exchanged; what else is at a module stays, in its order.
    """
    from bitsandbytes.nn import Linear8bitLt

    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        if hook is not None and isinstance(module, Linear8bitLt) and module.weight.dtype == torch.int8:
            # accelerate's forward looks the hook up at each call.
            module._hf_hook = _exchanged(hook, module)


def _exchanged(hook: ModelHook, module: nn.Module) -> ModelHook:
    if isinstance(hook, SequentialHook):
        hook.hooks = tuple(_exchanged(one, module) for one in hook.hooks)
    elif type(hook) is AlignDevicesHook and hook.offload:
        return Int8Hook(hook, module)
    return hook


def _not_compiled(function: _Function) -> _Function:
    """`torch.compiler.disable`, applied at the first call: it imports for seconds."""
    disable: Any = torch.compiler.disable
    disabled: list[Any] = []

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not disabled:
            disabled.append(disable(function))
        return disabled[0](*args, **kwargs)

    return cast(_Function, wrapper)


class Int8Hook(AlignDevicesHook):  # type: ignore[misc]
    """Brings weight, scales and bias from the weights map for one forward, and takes all of them away behind it.

    On the CPU they are what the map gives, without a copy: pages of a file are never written to. A forward that fails
    leaves them until the next one. A backward through the layer's input is refused by bitsandbytes, since the weight
    is no longer there.

    Args:
        hook: accelerate's, attached to `module`: what it does with inputs and outputs is done here too.
        module: a `Linear8bitLt` whose parameters are on meta.
    """

    def __init__(self, hook: AlignDevicesHook, module: nn.Module) -> None:
        super().__init__(
            execution_device=hook.execution_device,
            offload=True,
            io_same_device=hook.io_same_device,
            weights_map=hook.weights_map,
            offload_buffers=hook.offload_buffers,
            place_submodules=hook.place_submodules,
            skip_keys=hook.skip_keys,
        )
        # Where they were before accelerate's hook came, for when hooks are removed.
        self.original_devices = hook.original_devices
        weight = module._parameters["weight"]
        assert weight is not None
        scales = nn.Parameter(torch.empty(weight.shape[0], dtype=torch.float32, device="meta"), requires_grad=False)
        # For saving: bitsandbytes names the scales of a weight in the layer's state dict, and transformers asks a
        # model for each tensor of its state dict that is on meta, before it takes the values from the hook's map.
        module.__dict__["SCB"] = scales
        module._parameters["weight"] = self._parameter(torch.empty_like(weight.data, device="meta"), scales)
        self._absent = {name: tensor for name, tensor in self._tensors(module) if tensor.is_meta}

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Nothing: the hook that this one was made of did it."""
        return module

    @_not_compiled
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Bring what the layer needs to where it is computed."""
        if self.io_same_device:
            self.input_device = find_device([args, kwargs])
        try:
            for name in self._absent:
                self._bring(module, name, self.execution_device)
        except BaseException:
            self._take_away(module)
            raise
        return send_to_device(args, self.execution_device), send_to_device(
            kwargs, self.execution_device, skip_keys=self.skip_keys
        )

    @_not_compiled
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Take away what was brought, and what bitsandbytes made of it."""
        self._take_away(module)
        if self.io_same_device and self.input_device is not None:
            output = send_to_device(output, self.input_device, skip_keys=self.skip_keys)
        return output

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Bring back for good what was in memory before hooks were attached; what is on disk stays there."""
        self._take_away(module)
        module.__dict__.pop("SCB", None)
        for name, device in self.original_devices.items():
            if name in self._absent and device != torch.device("meta"):
                self._bring(module, name, device)
        return module

    def _tensors(self, module: nn.Module) -> Any:
        return named_module_tensors(module, include_buffers=self.offload_buffers, remove_non_persistent=True)

    def _parameter(self, values: torch.Tensor, scales: torch.Tensor) -> nn.Parameter:
        from bitsandbytes.nn import Int8Params

        # bitsandbytes takes `CB` for a weight that is ready to be used.
        ready = None if values.is_meta else values
        made: nn.Parameter = Int8Params(values, requires_grad=False, has_fp16_weights=False, CB=ready, SCB=scales)
        return made

    def _bring(self, module: nn.Module, name: str, device: Any) -> None:
        absent = self._absent[name]
        value = send_to_device(self.weights_map[name].to(absent.dtype), device)
        if name == "weight":
            module._parameters[name] = self._parameter(value, send_to_device(self.weights_map["SCB"], device))
        elif name in module._buffers:
            module._buffers[name] = value
        else:
            module._parameters[name] = nn.Parameter(value, requires_grad=absent.requires_grad)

    def _take_away(self, module: Any) -> None:
        for name, absent in self._absent.items():
            (module._buffers if name in module._buffers else module._parameters)[name] = absent
        # A graph that this forward left holds the state as well, so that it must be emptied and not exchanged.
        module.state.reset_grads()
        module.state.idx = None


__all__ = ["Int8Hook", "exchange_hooks"]
