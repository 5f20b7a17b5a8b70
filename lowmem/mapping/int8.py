"""int8 weights and the scales of their rows, paired wherever they lie; and which layers of a model become int8."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

from torch import nn

from ..checkpoint import Checkpoint, TensorEntry
from ..checkpoint.int8 import check_float, check_pair, companions_of, has_scales, is_int8_weight, scales_of
from ..checkpoint.int8 import check_formats as check_formats_of
from ..dtypes import is_floating
from ..errors import CheckpointError, UnsupportedError
from ..modeling.int8_choice import Choice, Int8Request, existing_int8, layers_to_quantise, sizes_of
from ..modeling.skeleton import Skeleton
from ..modeling.targets import Target
from .records import KeyMapping, Link, Region, whole


@dataclass
class Pairs:
    """Links that know their scales.

    Attributes:
        links: in the same order.
        made: target of row scales → that of the weight, where floats become int8.
        companions: keys that are read with an int8 weight.
    """

    links: list[Link]
    made: dict[str, str] = field(default_factory=dict)
    companions: set[str] = field(default_factory=set)


def pair(
    links: Sequence[Link], skeleton: Skeleton, checkpoint: Checkpoint, left_out: AbstractSet[str] = frozenset()
) -> Pairs:
    """Give int8 that becomes floats its scales, and check that int8 has some and floats none.

    Args:
        links: what feeds what.
        skeleton: the model.
        checkpoint: the entries.
        left_out: keys that the user does not want, which may lie beside floats.

    Raises:
        CheckpointError: scales are missing, of another shape, or beside floats.
        UnsupportedError: int8 in another order than torch's, or a part of it that becomes floats.
    """
    found, state = Pairs(list(links)), skeleton.targets
    scaled = has_scales(checkpoint)
    if not scaled and skeleton.int8 is None and not any(link.entry.dtype == "int8" for link in links):
        return found
    fed = {link.target for link in links}
    for i, link in enumerate(found.links):
        entry, target = link.entry, state[link.target]
        if entry.dtype == "int8":
            if not scaled and not target.scales and not _is_linear(skeleton.model, link.target):
                # Integers of the model's own.
                continue
            found.links[i] = _paired(link, target, fed, checkpoint, found)
            continue
        if scaled and len(target.shape) >= 2 and not _is_left(checkpoint, entry.key, left_out):
            check_float(checkpoint, entry)
        if target.scales:
            if not is_floating(entry.dtype):
                raise UnsupportedError(
                    f"{entry.file}: tensor {entry.key!r} is {entry.dtype}, and the model's {link.target!r} is to be "
                    "int8: expected floats or int8; leave its module out by skip_modules= (--skip-modules)"
                )
            found.made[target.scales] = link.target
    return found


def _is_linear(model: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    return leaf == "weight" and sizes_of(model.get_submodule(path)) is not None


def _is_left(checkpoint: Checkpoint, key: str, left_out: AbstractSet[str]) -> bool:
    scales = scales_of(checkpoint, key)
    return scales is not None and scales.key in left_out


def _paired(link: Link, target: Target, fed: set[str], checkpoint: Checkpoint, found: Pairs) -> Link:
    entry = link.entry
    whole_entry = checkpoint[entry.key]
    as_it_lies = _is_as_it_lies(link, whole_entry) and entry.strides is None
    if target.scales:
        scales = check_pair(checkpoint, whole_entry)
        if not as_it_lies or link.region != whole(target.shape):
            raise _odd(link)
        if target.scales not in fed:
            raise CheckpointError(
                f"{scales.file}: tensor {scales.key!r}, the row scales of {entry.key!r}: expected it to feed "
                f"{target.scales!r} of the model, and only or skip leave it out; take it too"
            )
        found.companions |= companions_of(checkpoint, entry.key)
        return link
    if not is_floating(target.dtype) or len(target.shape) < 2:
        return link
    if scales_of(checkpoint, entry.key) is None and not target.name.endswith("weight"):
        return link
    scales = check_pair(checkpoint, whole_entry)
    if not as_it_lies:
        raise _odd(link)
    found.companions |= companions_of(checkpoint, entry.key)
    return replace(link, scales=scales)


def _odd(link: Link) -> UnsupportedError:
    entry = link.entry
    return UnsupportedError(
        f"{entry.file}: tensor {entry.key!r} is int8, and {link.target!r} of the model is made of a part of it, or of "
        "its elements in another order: expected all of it as it lies, for the scales are of whole rows; load it with "
        "the library that wrote it, and save it as floats"
    )


def turned(entry: TensorEntry, target: Target) -> Link | None:
    """The link of a `Conv1D`, whose floats are the transpose of a linear layer's weight and whose int8 are that weight.

    None where nothing has to be turned, or it does not fit.
    """
    if entry.shape != target.shape[::-1] or is_floating(entry.dtype) != bool(target.scales):
        return None
    if target.scales:
        return Link(transposed(entry), target.name, whole(target.shape))
    return Link(entry, target.name, Region(0, entry.shape, (1, entry.shape[0]))) if entry.dtype == "int8" else None


def transposed(entry: TensorEntry) -> TensorEntry:
    """A matrix by its columns."""
    rows, columns = entry.shape
    along, across = entry.strides or (columns, 1)
    return replace(entry, shape=(columns, rows), strides=(across, along))


def choose_layers(
    checkpoint: Checkpoint, skeleton: Skeleton, mapping: KeyMapping, request: Int8Request, keep_fp32: Sequence[str]
) -> Choice:
    """The layers that are int8: those that the checkpoint has so, those that the user wants so, and the model's own.

    Args:
        checkpoint: the entries.
        skeleton: the model, all of floats.
        mapping: what feeds what in that model.
        request: what the user wants.
        keep_fp32: what stays fp32 though the user wants int8.

    Raises:
        UnsupportedError: the user wants floats, and the model has layers of int8.
    """
    own = existing_int8(skeleton.model)
    if own and request.dequantize:
        raise UnsupportedError(
            f"dequantize: module {own[0]!r} of the model is bitsandbytes' Linear8bitLt, which holds int8: expected "
            "nn.Linear; build the model without quantization_config"
        )
    if not own and not request.quantize and not any(link.scales for link in mapping.links):
        return Choice(())
    mismatched = {m.target for m in mapping.mismatched}
    modules = dict(skeleton.model.named_modules(remove_duplicate=False))
    chosen: dict[str, None] = {}
    if not request.dequantize:
        for target, key in mapping.sources.items():
            name, _, leaf = target.rpartition(".")
            entry = checkpoint.get(key)
            module = modules.get(name) if leaf == "weight" and target not in mismatched else None
            is_int8 = entry is not None and is_int8_weight(checkpoint, entry)
            if is_int8 and module is not None and sizes_of(module) is not None:
                chosen[name] = None
    warnings: list[str] = []
    wanted = list(own)
    if request.quantize:
        found = layers_to_quantise(skeleton.model, request, keep_fp32)
        wanted += found.names
        warnings += found.warnings
    fed = {link.target for link in mapping.links}
    left = []
    for name in wanted:
        if (f"{name}.weight" if name else "weight") in fed:
            chosen[name] = None
        elif name not in chosen:
            left.append(name)
    if left:
        warnings.append(
            f"{len(left)} layers stay floats: nothing of the checkpoint feeds their weights, or an operation computes "
            f"them ({left[0]!r}{', …' if len(left) > 1 else ''})"
        )
    return Choice(tuple(chosen), tuple(warnings))


def check_stays_int8(checkpoint: Checkpoint, mapping: KeyMapping, request: Int8Request) -> None:
    """Refuse int8 that feeds floats, unless the user wants that; and int8 that an operation would compute with.

    Raises:
        UnsupportedError: it does.
    """
    for computation in mapping.computed:
        for entry in computation.sources:
            if is_int8_weight(checkpoint, entry):
                raise UnsupportedError(
                    f"{entry.file}: tensor {entry.key!r} is int8, and the operation {computation.what} would make "
                    f"{computation.targets[0]!r} of it without its scales: expected floats; load it with the library "
                    "that wrote it, and save it as floats"
                )
    if request.dequantize:
        return
    for link in mapping.links:
        if link.scales is not None:
            raise UnsupportedError(
                f"{link.entry.file}: tensor {link.entry.key!r} is int8, and {link.target!r} of the model belongs to no "
                "linear layer, so it cannot stay so: expected floats; give dequantize=True (--dequantize), which makes "
                "floats of all int8"
            )


@dataclass(frozen=True, slots=True)
class ToInt8:
    """How a tensor of the checkpoint becomes int8.

    Attributes:
        turned: it is the transpose of the weight of a linear layer.
        floats: the dtype that the model would have it as.
    """

    turned: bool
    floats: str


def check_formats(checkpoint: Checkpoint, mapping: KeyMapping) -> None:
    """Refuse int8 whose elements are in another order than torch's; see `checkpoint.int8.check_formats`."""
    check_formats_of(checkpoint, [link.entry for link in mapping.links if link.entry.dtype == "int8"])


def _is_as_it_lies(link: Link, whole_entry: TensorEntry) -> bool:
    """Whether what feeds a target is all of a tensor in its own order of elements."""
    entry = link.entry
    same = (entry.offset, entry.nbytes, entry.strides) == (whole_entry.offset, whole_entry.nbytes, whole_entry.strides)
    return link.whole and same


def floats_that_become_int8(
    checkpoint: Checkpoint, skeleton: Skeleton, mapping: KeyMapping, names: Sequence[str]
) -> tuple[dict[str, ToInt8], list[str]]:
    """Of layers that are to be int8, the keys that are floats, and the layers whose weight is no tensor of its own.

    Args:
        checkpoint: the entries.
        skeleton: the model, all of floats.
        mapping: what feeds what in it.
        names: of the layers.

    Returns:
        Key → how it becomes int8; and names.
    """
    layers = {f"{name}.weight": name for name in names}
    parts: dict[str, list[Link]] = {}
    for link in mapping.links:
        if link.target in layers:
            parts.setdefault(layers[link.target], []).append(link)
    keys, left = {}, []
    for name, links in parts.items():
        entry = links[0].entry
        shape = skeleton.targets[links[0].target].shape
        in_order = _is_as_it_lies(links[0], checkpoint[entry.key]) and links[0].region == whole(shape)
        if len(links) > 1 or not in_order:
            left.append(name)
        elif is_floating(entry.dtype):
            target = skeleton.targets[f"{name}.weight"]
            keys[entry.key] = ToInt8(target.turned, target.dtype)
    return keys, left
