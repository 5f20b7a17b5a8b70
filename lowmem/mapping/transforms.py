"""Named changes of one tensor on its way into the model: position embeddings of another grid, rows, axes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from .._strides import Shape
from ..errors import OptionError
from ..sizes import shown

Grid = tuple[int, int]
_MODES = ("bicubic", "bilinear", "nearest")
_LAYOUTS = ("tokens", "nchw", "nhwc", "relative")
# Class and register tokens that models have; among more numbers two could fit.
_MOST_EXTRA = 16


@dataclass(frozen=True, slots=True)
class Transform:
    """A change of one tensor.

    Made of torch's functions only: it is run once without values when the load is planned. What only moves elements
    about becomes moves; anything else is computed while loading, and its memory is in the plan.

    Attributes:
        what: how it was asked for, for messages, such as `"interpolate(grid=(16, 16))"`.
        function: of a tensor of the checkpoint and the shape of the model's. Raises `ValueError`, saying what was
            expected and found, for a tensor that it cannot change.
    """

    what: str
    # Told by `what`; its own text would be another in every process.
    function: Callable[[torch.Tensor, Shape], torch.Tensor] = field(repr=False)

    def __call__(self, tensor: torch.Tensor, shape: Shape) -> torch.Tensor:
        """The changed tensor; `shape` is that of the model's."""
        return self.function(tensor, shape)


def interpolate(
    grid: int | Sequence[int] | None = None,
    *,
    from_grid: int | Sequence[int] | None = None,
    extra_tokens: int | None = None,
    mode: str = "bicubic",
    antialias: bool = True,
    align_corners: bool = False,
    layout: str = "tokens",
) -> Transform:
    """Resize a position embedding to the model's grid; one whose grid agrees stays as it is.

    Computed in fp32 and cast back. As it stands it is timm's `resample_abs_pos_embed`; `antialias=False` is what MAE,
    BEiT and mmpretrain do. It is not for the kernels of patch embeddings, which timm resizes by a pseudo-inverse.

    Args:
        grid: the model's, (height, width), or one number for a square. Default: by the shape of its tensor, square.
        from_grid: the checkpoint's, likewise.
        extra_tokens: tokens that are no part of the grid and are kept: class and register tokens in front, and in a
            table of relative positions those at the end. Default: the one number, up to 16, that makes both grids
            square.
        mode: `"bicubic"`, `"bilinear"` or `"nearest"`.
        antialias: smooth what is made smaller, as PIL does; not for `"nearest"`.
        align_corners: as in torch's `interpolate`; not for `"nearest"`.
        layout: `"tokens"` is (1, N, C) or (N, C); `"nchw"` (..., C, H, W) and `"nhwc"` (..., H, W, C) are grids as they
            are; `"relative"` is a table of relative positions ((2h-1)(2w-1), heads), of which the grid is the window
            (h, w).

    Raises:
        OptionError: an argument that means nothing.
    """
    new, old = _grid(grid, "grid"), _grid(from_grid, "from_grid")
    if extra_tokens is not None and (not _is_count(extra_tokens) or layout in ("nchw", "nhwc")):
        wanted = "None, for a grid as it is has none" if layout in ("nchw", "nhwc") else "0 or more"
        raise OptionError(f"interpolate: extra_tokens: expected {wanted}, found {shown(extra_tokens)}")
    _check_choice(mode, _MODES, "mode")
    _check_choice(layout, _LAYOUTS, "layout")
    for value, name in ((antialias, "antialias"), (align_corners, "align_corners")):
        if not isinstance(value, bool):
            raise OptionError(f"interpolate: {name}: expected True or False, found {shown(value)}")
    smooth = {} if mode == "nearest" else {"antialias": antialias, "align_corners": align_corners}
    resize = functools.partial(_resized, keywords={"mode": mode, **smooth})
    function: Callable[..., torch.Tensor]
    if layout in ("nchw", "nhwc"):
        function = functools.partial(_whole_grids, new=new, old=old, channels_last=layout == "nhwc", resize=resize)
    else:
        relative = layout == "relative"
        sides = functools.partial(_grids, new=new, old=old, extra=extra_tokens, relative=relative)
        function = functools.partial(_relative if relative else _tokens, sides=sides, resize=resize)
    what = _call(
        "interpolate",
        grid=(grid, None),
        from_grid=(from_grid, None),
        extra_tokens=(extra_tokens, None),
        mode=(mode, "bicubic"),
        antialias=(antialias, True),
        align_corners=(align_corners, False),
        layout=(layout, "tokens"),
    )
    return Transform(what, function)


def reshape_to(*shape: int) -> Transform:
    """Give a tensor the model's shape, or the one stated; one size may be -1. Elements stay in their order.

    Raises:
        OptionError: what is no shape.
    """
    sizes = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    if any(not _is_int(n) or n < -1 for n in sizes) or sizes.count(-1) > 1:
        raise OptionError(f"reshape_to: expected sizes, one of which may be -1, found {shown(sizes)}")
    return Transform(f"reshape_to({', '.join(map(str, sizes))})", functools.partial(_reshaped, sizes=sizes))


def transpose(dim0: int, dim1: int) -> Transform:
    """Exchange two dimensions, as `torch.transpose`.

    Raises:
        OptionError: what is no dimension.
    """
    for dim in (dim0, dim1):
        if not _is_int(dim):
            raise OptionError(f"transpose: expected the numbers of two dimensions, found {shown(dim)}")
    return Transform(f"transpose({dim0}, {dim1})", functools.partial(_transposed, dim0=dim0, dim1=dim1))


def permute(*dims: int) -> Transform:
    """Put the dimensions in another order, as `torch.permute`.

    Raises:
        OptionError: what is no order of dimensions.
    """
    order = tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    if not order or any(not _is_count(dim) for dim in order) or sorted(order) != list(range(len(order))):
        raise OptionError(f"permute: expected each dimension once, such as permute(2, 0, 1), found {shown(order)}")
    return Transform(f"permute({', '.join(map(str, order))})", functools.partial(_permuted, order=order))


def pad_rows(value: float | str = 0) -> Transform:
    """Add rows (of dimension 0) at the end, up to as many as the model has.

    Args:
        value: what is in them: a number, or `"mean"` for the mean of the checkpoint's rows.

    Raises:
        OptionError: neither.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number and value != "mean":
        raise OptionError(f"pad_rows: value: expected a number or 'mean', found {shown(value)}")
    return Transform(_call("pad_rows", value=(value, 0)), functools.partial(_padded, value=value))


def slice_rows(start: int = 0, stop: int | None = None) -> Transform:
    """Take some of the rows (of dimension 0).

    Args:
        start: the first.
        stop: the one behind the last. Default: as many rows as the model has.

    Raises:
        OptionError: what is no range of rows.
    """
    if not _is_count(start):
        raise OptionError(f"slice_rows: start: expected the number of a row, 0 or more, found {shown(start)}")
    if stop is not None and (not _is_count(stop) or stop <= start):
        raise OptionError(f"slice_rows: stop: expected a row behind {start}, found {shown(stop)}")
    what = _call("slice_rows", start=(start, 0), stop=(stop, None))
    return Transform(what, functools.partial(_sliced, start=start, stop=stop))


def _call(name: str, **arguments: tuple[Any, Any]) -> str:
    """A call as it was written, without what is the default anyway."""
    given = [f"{key}={value!r}" for key, (value, default) in arguments.items() if repr(value) != repr(default)]
    return f"{name}({', '.join(given)})"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_int(value) and value >= 0


def _check_choice(value: Any, known: tuple[str, ...], what: str) -> None:
    if not isinstance(value, str) or value not in known:
        *others, last = map(repr, known)
        raise OptionError(f"interpolate: {what}: expected {', '.join(others)} or {last}, found {shown(value)}")


def _grid(value: Any, what: str) -> Grid | None:
    if value is None:
        return None
    sizes = (value, value) if _is_int(value) else tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(sizes) != 2 or not all(_is_int(n) and n > 0 for n in sizes):
        raise OptionError(f"interpolate: {what}: expected height and width such as (16, 16), found {shown(value)}")
    return sizes[0], sizes[1]


def _resized(grid: torch.Tensor, size: Grid, keywords: dict[str, Any]) -> torch.Tensor:
    """A tensor (N, C, H, W) with another height and width. torch's kernels want fp32."""
    return functional.interpolate(grid.float(), size=size, **keywords)


def _tokens(tensor: torch.Tensor, shape: Shape, sides: Any, resize: Any) -> torch.Tensor:
    """A position embedding of tokens: the extra ones, then the grid row by row."""
    channels = _check_table(tensor, shape, "(1, tokens, channels) or (tokens, channels)", most=3)
    old, new, extra = sides(tensor.shape[-2], shape[-2])
    if old != new:
        table = tensor.reshape(1, -1, channels)
        kept, table = table[:, :extra], table[:, extra:]
        # The same operations as timm's, so that the same values come out.
        made = resize(table.reshape(1, *old, channels).permute(0, 3, 1, 2), new)
        made = made.permute(0, 2, 3, 1).reshape(1, -1, channels).to(tensor.dtype)
        tensor = torch.cat([kept, made], dim=1) if extra else made
    return tensor if tuple(tensor.shape) == tuple(shape) else tensor.reshape(shape)


def _relative(tensor: torch.Tensor, shape: Shape, sides: Any, resize: Any) -> torch.Tensor:
    """A table of relative positions: the grid of differences, then the extra ones."""
    heads = _check_table(tensor, shape, "(relative positions, heads)", most=2)
    old, new, extra = sides(tensor.shape[0], shape[0])
    if old == new:
        return tensor
    split = tensor.shape[0] - extra
    table, kept = tensor[:split], tensor[split:]
    made = resize(table.transpose(1, 0).reshape(1, heads, *old), new)
    made = made.reshape(heads, -1).transpose(0, 1).to(tensor.dtype)
    return torch.cat([made, kept], dim=0) if extra else made.contiguous()


def _check_table(tensor: torch.Tensor, shape: Shape, form: str, most: int) -> int:
    """Channels of both tables.

    Raises:
        ValueError: what is no table, or tables of different channels.
    """
    for found, whose in ((tuple(tensor.shape), "checkpoint"), (tuple(shape), "model")):
        if not 2 <= len(found) <= most or math.prod(found[:-2]) != 1 or 0 in found:
            raise ValueError(
                f"expected a position embedding {form}, found {found} in the {whose}; "
                "layout= says what else it can be: 'tokens', 'nchw', 'nhwc' or 'relative'"
            )
    _check_float(tensor)
    if tensor.shape[-1] != shape[-1]:
        raise ValueError(
            f"expected {shape[-1]} channels, found {tensor.shape[-1]}; interpolate changes the grid only, so take a "
            "checkpoint of the model's width"
        )
    return int(tensor.shape[-1])


def _check_float(tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"expected floats to interpolate, found {tensor.dtype}; name the position embedding itself")


def _grids(
    have: int, want: int, new: Grid | None, old: Grid | None, extra: int | None, relative: bool
) -> tuple[Grid, Grid, int]:
    """The checkpoint's grid, the model's, and how many tokens are in neither.

    Raises:
        ValueError: these numbers of tokens are no such grids, or several.
    """
    if relative:
        new, old = (None if g is None else (2 * g[0] - 1, 2 * g[1] - 1) for g in (new, old))
    if have == want and (new is None or old is None or new == old):
        stated = new or old
        # One grid alone is stated where it is no square: the other is a square if it can be one, as timm has it.
        if stated is None or not _side(have - _rest(have, stated, "model" if new else "checkpoint", extra)):
            return (1, 1), (1, 1), 0
    if extra is None:
        extra = _extra_tokens(have, want, new, old, odd=relative)
    found = []
    for count, stated, whose, name in ((have, old, "checkpoint", "from_grid"), (want, new, "model", "grid")):
        if stated is not None:
            _rest(count, stated, whose, extra)
        side = _side(count - extra)
        if stated is None and not side:
            raise ValueError(
                f"expected {extra} extra tokens and a square grid, found {count} tokens in the {whose}; "
                f"give {name}=(height, width), or other extra_tokens="
            )
        found.append(stated or (side, side))
    return found[0], found[1], extra


def _rest(count: int, grid: Grid, whose: str, extra: int | None) -> int:
    """Tokens beside a grid, as many as there must be."""
    rest = count - grid[0] * grid[1]
    if rest < 0 or (extra is not None and rest != extra):
        wanted = f"{grid[0]} x {grid[1]} tokens" + (" or more" if extra is None else f" and {extra} extra ones")
        raise ValueError(
            f"expected {wanted}, found {count} in the {whose}; correct the grid"
            + ("" if extra is None else ", or extra_tokens=")
        )
    return rest


def _extra_tokens(have: int, want: int, new: Grid | None, old: Grid | None, odd: bool) -> int:
    if new is not None:
        return _rest(want, new, "model", None)
    if old is not None:
        return _rest(have, old, "checkpoint", None)
    sides = [(n, _side(have - n), _side(want - n)) for n in range(_MOST_EXTRA + 1)]
    # Of grids of 2 x 2 and more no two pairs are as far apart with so few more tokens beside them.
    for n, a, b in sides:
        if a > 1 and b > 1 and not (odd and (a * b) % 2 == 0):
            return n
    raise ValueError(
        f"expected square grids and the same extra tokens, found {have} tokens in the checkpoint and {want} in the "
        "model; give grid= and from_grid="
    )


def _side(count: int) -> int:
    """Side of a square of as many tokens, 0 if there is none."""
    side = math.isqrt(max(0, count))
    return side if side * side == count else 0


def _whole_grids(
    tensor: torch.Tensor, shape: Shape, new: Grid | None, old: Grid | None, channels_last: bool, resize: Any
) -> torch.Tensor:
    """A grid that is two dimensions of its own."""
    at = slice(-3, -1) if channels_last else slice(-2, None)
    have, want = tuple(tensor.shape), tuple(shape)
    form = "(..., H, W, C)" if channels_last else "(..., C, H, W)"
    for found, stated, whose, name in ((have, old, "checkpoint", "from_grid"), (want, new, "model", "grid")):
        if not 3 <= len(found) <= 4 or 0 in found:
            raise ValueError(f"expected {form}, found {found} in the {whose}; layout= says what else it can be")
        if stated is not None and found[at] != stated:
            raise ValueError(f"expected a grid {stated}, found {found[at]} in the {whose}; leave {name}= out")
    others = [[n for d, n in enumerate(s) if d not in range(len(s))[at]] for s in (have, want)]
    if others[0] != others[1]:
        raise ValueError(f"expected {want} but for the grid, found {have}; interpolate changes the grid only")
    _check_float(tensor)
    if have == want:
        return tensor
    grids = tensor if tensor.ndim == 4 else tensor.unsqueeze(0)
    grids = grids.permute(0, 3, 1, 2) if channels_last else grids
    made: torch.Tensor = resize(grids, (want[at][0], want[at][1])).to(tensor.dtype)
    made = made.permute(0, 2, 3, 1) if channels_last else made
    return made.reshape(want)


def _reshaped(tensor: torch.Tensor, shape: Shape, sizes: tuple[int, ...]) -> torch.Tensor:
    wanted = sizes or tuple(shape)
    if -1 in wanted:
        rest = -math.prod(wanted)
        fits = rest > 0 and tensor.numel() % rest == 0
    else:
        fits = math.prod(wanted) == tensor.numel()
    if not fits:
        raise ValueError(
            f"expected as many elements as in {wanted}, found {tuple(tensor.shape)}; what has another size can be "
            "interpolated, padded or sliced"
        )
    return tensor if tuple(tensor.shape) == wanted else tensor.reshape(wanted)


def _transposed(tensor: torch.Tensor, shape: Shape, dim0: int, dim1: int) -> torch.Tensor:
    for dim in (dim0, dim1):
        if not -tensor.ndim <= dim < tensor.ndim:
            raise ValueError(f"expected a tensor with dimension {dim}, found {tuple(tensor.shape)}; name one it has")
    return tensor.transpose(dim0, dim1)


def _permuted(tensor: torch.Tensor, shape: Shape, order: tuple[int, ...]) -> torch.Tensor:
    if tensor.ndim != len(order):
        raise ValueError(
            f"expected {len(order)} dimensions, found {tuple(tensor.shape)}; give permute() as many as it has"
        )
    return tensor.permute(order)


def _check_rows(tensor: torch.Tensor, shape: Shape) -> None:
    """Raises ValueError: no rows, or rows that are not the model's."""
    if not tensor.ndim or not shape or tuple(tensor.shape[1:]) != tuple(shape[1:]):
        raise ValueError(
            f"expected rows of shape {tuple(shape[1:])} as in {tuple(shape)}, found {tuple(tensor.shape)}; only the "
            "number of rows may differ"
        )


def _padded(tensor: torch.Tensor, shape: Shape, value: float | str) -> torch.Tensor:
    _check_rows(tensor, shape)
    more = shape[0] - tensor.shape[0]
    if not more:
        return tensor
    if more < 0:
        raise ValueError(
            f"expected at most {shape[0]} rows, found {tensor.shape[0]}; slice_rows() takes the first {shape[0]}"
        )
    if not isinstance(value, str):
        if not _holds(tensor.dtype, value):
            raise ValueError(f"expected a number that {tensor.dtype} has for more rows, found {value!r}")
        return torch.cat([tensor, tensor.new_full((more, *tensor.shape[1:]), value)])
    if not tensor.shape[0] or not tensor.is_floating_point():
        raise ValueError(
            f"expected rows of floats for their mean, found {tuple(tensor.shape)} of {tensor.dtype}; give pad_rows() a "
            "number"
        )
    mean = tensor.float().mean(dim=0, keepdim=True).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(more, *tensor.shape[1:])])


def _holds(dtype: torch.dtype, value: float) -> bool:
    """Whether a dtype has a number, rounded where it is one of floats."""
    if dtype.is_floating_point or dtype.is_complex:
        return not math.isfinite(value) or abs(value) <= torch.finfo(dtype).max
    if not math.isfinite(value) or value != int(value):
        return False
    return value in (0, 1) if dtype == torch.bool else torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max


def _sliced(tensor: torch.Tensor, shape: Shape, start: int, stop: int | None) -> torch.Tensor:
    _check_rows(tensor, shape)
    end = start + shape[0] if stop is None else stop
    rows = tensor.shape[0]
    if end > rows:
        raise ValueError(
            f"expected rows {start} to {end - 1}, found {rows} rows; take fewer, or pad_rows() where the model has more"
        )
    return tensor if start == 0 and end == rows else tensor[start:end]
