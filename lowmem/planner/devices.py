"""Module → device: what the user said, or accelerate's inference fed with what accelerate does not know."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from .._shared import silent
from ..errors import OptionError, PlacementError
from ..limits import device_memory
from ..mapping import KeyMapping
from ..modeling.skeleton import Skeleton
from ..sizes import parse_size, shown

OFFLOADED = ("cpu", "disk")
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
_DEVICE = re.compile(r"(cpu|disk|mps)(?::0)?|(cuda|xpu|npu)(?::(\d{1,9}))?", re.ASCII)
# torch keeps the number of a device in a signed byte.
_MOST_DEVICES = 128


def device_name(device: object, what: str = "device_map") -> str:
    """`"cpu"`, `"disk"`, `"cuda:1"`, … for what people write: `1`, `"1"`, `"cuda"`, `torch.device("cuda", 1)`.

    Raises:
        OptionError: no such kind of device.
    """
    try:
        text = "" if isinstance(device, bool) else str(device).strip()
    except Exception:
        text = ""  # what has no text is no device
    match = _DEVICE.fullmatch(f"cuda:{text}" if text.isdecimal() else text)
    if match is not None and match[1]:
        return match[1]
    if match is not None and match[2] and int(match[3] or 0) < _MOST_DEVICES:
        return f"{match[2]}:{int(match[3] or 0)}"
    raise OptionError(f"{what}: expected a device such as 'cpu', 'cuda:0' or 'disk', found {shown(device)}")


def parse_device_map(value: Any) -> str | dict[str, str] | None:
    """A strategy's name, or module → device; a single device is `{"": device}`.

    Raises:
        OptionError: neither a strategy nor a device nor a mapping of names to devices.
    """
    if value is None or (isinstance(value, str) and value in STRATEGIES):
        return value
    if isinstance(value, Mapping):
        bad = [key for key in value if not isinstance(key, str)]
        if bad:
            raise OptionError(f"device_map: expected module names as keys, found {shown(bad[0])}")
        return {key: device_name(device, f"device_map[{shown(key)}]") for key, device in value.items()}
    try:
        return {"": device_name(value)}
    except OptionError as error:
        raise OptionError(f"{error}; or one of {', '.join(STRATEGIES)}, or a mapping of module to device") from None


def parse_max_memory(value: Any) -> dict[str, int] | None:
    """Device → bytes.

    Raises:
        OptionError: not a mapping of devices to sizes.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise OptionError(f"max_memory: expected a mapping such as {{'cpu': '6GiB', 0: '20GiB'}}, found {shown(value)}")
    table: dict[str, int] = {}
    for device, size in value.items():
        name = device_name(device, "max_memory")
        if name == "disk":
            raise OptionError("max_memory: the disk takes what is left and has no bound here; leave 'disk' out")
        if name in table:
            raise OptionError(f"max_memory: {shown(device)} is {name}, which is there already; give each device once")
        table[name] = parse_size(size, f"max_memory[{shown(device)}]")
    return table


def infer(
    skeleton: Skeleton,
    final: Mapping[str, str],
    strategy: str,
    max_memory: Mapping[str, int],
    no_split: tuple[str, ...],
) -> dict[str, str]:
    """accelerate's `infer_auto_device_map`, at the final dtypes and within the given memory.

    Every tensor's dtype is given as a special one: accelerate alone would take the smaller of the model's and the
    requested size, and knows no keep-list.

    Raises:
        PlacementError: accelerate found no map.
    """
    import torch
    from accelerate.utils import get_balanced_memory, infer_auto_device_map

    special = {name: getattr(torch, dtype) for name, dtype in final.items()}
    memory: dict[Any, int] = {_as_accelerate(device): size for device, size in max_memory.items()}
    # Planning for GPUs of another machine is not worth accelerate's warning that they are not here.
    with silent("accelerate.utils.modeling"):
        if strategy != "sequential":
            memory = get_balanced_memory(
                skeleton.model,
                max_memory=memory,
                no_split_module_classes=list(no_split),
                special_dtypes=special,
                low_zero=strategy == "balanced_low_0",
            )
        try:
            inferred = infer_auto_device_map(
                skeleton.model, max_memory=memory, no_split_module_classes=list(no_split), special_dtypes=special
            )
        except (IndexError, KeyError) as error:
            # accelerate 1.15 does so for tied weights when one of their modules is already placed.
            raise PlacementError(
                f"device_map={strategy!r}: accelerate finds no map within max_memory "
                f"({type(error).__name__}: {error}); give it more memory, or a mapping of module to device"
            ) from error
    return {module: device_name(device) for module, device in inferred.items()}


def _as_accelerate(device: str) -> int | str:
    """accelerate counts accelerators by number."""
    kind, _, index = device.partition(":")
    return int(index) if kind in ("cuda", "xpu", "npu") else device


def default_max_memory(host_available: int) -> dict[str, int]:
    """What this machine has: every visible accelerator's free bytes, then the host's."""
    return {**device_memory(), "cpu": host_available}


class DeviceMap:
    """Looks up the device of a name: the nearest enclosing module that the map names wins.

    Attributes:
        table: module or tensor → device.
        main_device: where offloaded layers compute: the first accelerator, else the CPU. An inferred map keeps room
            for the largest layer there, and need not name it first.
    """

    def __init__(self, table: Mapping[str, str]) -> None:
        self.table = dict(table)
        self._known: dict[str, str | None] = {}
        # One device for everything is the common map, and needs no looking up.
        self.only = self.table.get("") if len(self.table) == 1 else None
        self.main_device = min((d for d in self.table.values() if d not in OFFLOADED), key=_order, default="cpu")

    def of(self, name: str) -> str | None:
        """The device of a tensor or module, None when no enclosing module is in the map."""
        if self.only is not None:
            return self.only
        if name in self.table:
            return self.table[name]
        if not name:
            return None
        # Siblings share their parent's answer.
        parent = name.rpartition(".")[0]
        if parent not in self._known:
            self._known[parent] = self.of(parent)
        return self._known[parent]


def _order(device: str) -> tuple[str, int]:
    kind, _, index = device.partition(":")
    return kind, int(index or 0)


def check_complete(table: Mapping[str, str], skeleton: Skeleton, mapping: KeyMapping) -> list[str]:
    """Every tensor has a device; returns warnings about keys that name nothing.

    Raises:
        PlacementError: a tensor without a device, by name.
    """
    devices = DeviceMap(table)
    lost = [name for name in skeleton.targets if devices.of(name) is None]
    if lost:
        around = lost[0].rpartition(".")[0]
        raise PlacementError(
            f"device_map: no device for {lost[0]!r} ({len(lost)} such tensors); "
            f"add {f'{around!r} or ' if around else ''}'' (the whole model) to the map"
        )
    odd = [key for key in table if key and key not in skeleton.targets and not _is_module(skeleton.model, key)]
    return [f"device_map: {key!r} names no module or tensor of the model" for key in odd]


def _is_module(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def pinned(table: Mapping[str, str], skeleton: Skeleton) -> dict[str, str]:
    """Tensors that the map offloads and accelerate's hooks could not bring back in time → the main device.

    The hooks act when a module's `forward` is called. Some weights are used without that: by a `forward_pre_hook`
    (the old `weight_norm`), from a ParameterList or ParameterDict, and the output projection of torch's attention.
    """
    devices = DeviceMap(table)
    away = {"disk"} if devices.main_device == "cpu" else {"disk", "cpu"}
    if not away & set(table.values()):
        return {}
    stay: dict[str, str] = {}
    for path, module in skeleton.model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name in _used_unasked(module):
            if devices.of(prefix + name) in away:
                stay[prefix + name] = devices.main_device
    return stay


def _used_unasked(module: nn.Module) -> list[str]:
    if isinstance(module, nn.MultiheadAttention):
        return [name for name, _ in module.named_parameters(remove_duplicate=False)]
    if module._forward_pre_hooks or type(module).forward is nn.Module.forward:
        return [name for name, parameter in module._parameters.items() if parameter is not None]
    return []


def disjoint(table: Mapping[str, str], skeleton: Skeleton) -> dict[str, str]:
    """The same map without a module inside another, which is all that accelerate's hooks understand.

    A module that encloses a more special entry is replaced by its children and its own tensors. Such a tensor has no
    module of its own to hang a hook on, so it cannot wait elsewhere: it lies on the main device.
    """
    parents = {name[:at] for name in table for at, c in enumerate(name) if c == "."}
    if "" in table and len(table) > 1:
        parents.add("")
    if not parents & set(table):
        return dict(table)
    # The model encloses them, whether the map names it or not.
    parents.add("")
    devices = DeviceMap(table)
    flat: dict[str, str] = {}

    def visit(path: str, module: nn.Module) -> None:
        if path not in parents:
            device = devices.of(path)
            if device is not None:
                flat[path] = device
            return
        prefix = f"{path}." if path else ""
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            device = devices.of(prefix + leaf)
            if tensor is not None and device is not None:
                flat[prefix + leaf] = devices.main_device if device in OFFLOADED else device
        for leaf, child in module.named_children():
            visit(prefix + leaf, child)

    visit("", skeleton.model)
    return flat
