"""Transforms of single tensors: what they make, told against torch done by hand, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import lowmem
from lowmem.errors import KeysError, OptionError
from lowmem.sizes import MIB

pytestmark = pytest.mark.usefixtures("one_thread")

Shape = tuple[int, ...]


def counted(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def as_timm(table: torch.Tensor, new: Shape, old: Shape, extra: int, mode: str, antialias: bool = True) -> torch.Tensor:
    """timm's `resample_abs_pos_embed` (timm/layers/pos_embed.py)."""
    kept, grid = table[:, :extra], table[:, extra:]
    grid = grid.float().reshape(1, old[0], old[1], -1).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, size=new, mode=mode, antialias=antialias)
    grid = grid.permute(0, 2, 3, 1).reshape(1, -1, table.shape[-1]).to(table.dtype)
    return torch.cat([kept, grid], dim=1) if extra else grid


def as_mae(table: torch.Tensor, new: int, extra: int) -> torch.Tensor:
    """MAE's `interpolate_pos_embed` (util/pos_embed.py)."""
    old = int((table.shape[-2] - extra) ** 0.5)
    tokens = table[:, extra:].reshape(-1, old, old, table.shape[-1]).permute(0, 3, 1, 2)
    tokens = functional.interpolate(tokens, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat((table[:, :extra], tokens.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("old", "new"), [(14, 24), (16, 7)])
def test_a_position_embedding_is_resized_as_timm_does(old: int, new: int, mode: str, dtype: torch.dtype) -> None:
    table = counted(1, old * old + 1, 12, dtype=dtype)
    made = lowmem.interpolate(mode=mode)(table, (1, new * new + 1, 12))
    assert made.dtype == dtype
    assert torch.equal(made, as_timm(table, (new, new), (old, old), 1, mode))


def test_without_antialias_it_is_resized_as_mae_and_beit_do() -> None:
    table = counted(1, 197, 8)
    made = lowmem.interpolate(antialias=False)(table, (1, 577, 8))
    assert torch.equal(made, as_mae(table, 24, 1))
    smaller = lowmem.interpolate(antialias=False)(table, (1, 50, 8))
    assert torch.equal(smaller, as_mae(table, 7, 1))
    assert not torch.equal(smaller, lowmem.interpolate()(table, (1, 50, 8)))


def test_nearest_and_aligned_corners_are_torchs() -> None:
    table = counted(1, 16, 3)
    grid = table.reshape(1, 4, 4, 3).permute(0, 3, 1, 2)
    near = functional.interpolate(grid, size=(6, 6), mode="nearest").permute(0, 2, 3, 1).reshape(1, 36, 3)
    assert torch.equal(lowmem.interpolate(mode="nearest", extra_tokens=0)(table, (1, 36, 3)), near)
    aligned = functional.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=True)
    made = lowmem.interpolate(extra_tokens=0, antialias=False, align_corners=True)(table, (1, 36, 3))
    assert torch.equal(made, aligned.permute(0, 2, 3, 1).reshape(1, 36, 3))


def test_extra_tokens_stay_as_they_are_whatever_their_number() -> None:
    table = counted(1, 5 + 16 * 16, 6)
    made = lowmem.interpolate(extra_tokens=5)(table, (1, 5 + 32 * 32, 6))
    assert torch.equal(made[:, :5], table[:, :5])
    assert torch.equal(made, as_timm(table, (32, 32), (16, 16), 5, "bicubic"))
    assert torch.equal(lowmem.interpolate()(table, (1, 5 + 32 * 32, 6)), made)


def test_grids_that_are_no_squares_are_given() -> None:
    table = counted(1, 1 + 12, 6)
    made = lowmem.interpolate((5, 8), from_grid=(3, 4))(table, (1, 41, 6))
    assert torch.equal(made, as_timm(table, (5, 8), (3, 4), 1, "bicubic"))
    square = counted(1, 1 + 36, 6)
    turned = lowmem.interpolate(grid=(4, 9))(square, (1, 37, 6))
    assert torch.equal(turned, as_timm(square, (4, 9), (6, 6), 1, "bicubic"))
    assert torch.equal(lowmem.interpolate((9, 4), from_grid=(4, 9))(turned, (1, 37, 6))[:, :1], square[:, :1])
    assert torch.equal(
        lowmem.interpolate(from_grid=(3, 4))(table, (1, 1 + 64, 6)), as_timm(table, (8, 8), (3, 4), 1, "bicubic")
    )


def test_tables_with_and_without_a_batch_dimension_feed_each_other() -> None:
    table = counted(1, 197, 8)
    made = lowmem.interpolate()(table[0], (577, 8))
    assert torch.equal(made, as_timm(table, (24, 24), (14, 14), 1, "bicubic")[0])
    assert torch.equal(lowmem.interpolate()(table[0], (1, 577, 8))[0], made)
    assert torch.equal(lowmem.interpolate()(table, (197, 8)), table[0])


@pytest.mark.parametrize(
    ("transform", "tensor"),
    [
        (lowmem.interpolate(), counted(1, 197, 8)),
        (lowmem.interpolate(14), counted(1, 197, 8)),
        (lowmem.interpolate((14, 14), from_grid=(14, 14), extra_tokens=1), counted(1, 197, 8)),
        (lowmem.interpolate(extra_tokens=2), counted(1, 7, 8)),
        (lowmem.interpolate((3, 8)), counted(1, 25, 8)),
        (lowmem.interpolate(layout="nchw"), counted(1, 8, 3, 4)),
        (lowmem.interpolate(layout="nhwc"), counted(1, 3, 4, 8)),
        (lowmem.interpolate(layout="relative"), counted(15 * 15 + 3, 8)),
        (lowmem.reshape_to(), counted(2, 3)),
        (lowmem.pad_rows(), counted(2, 3)),
        (lowmem.pad_rows("mean"), counted(2, 3)),
        (lowmem.slice_rows(), counted(2, 3)),
    ],
    ids=lambda value: value.what if isinstance(value, lowmem.Transform) else "",
)
def test_what_fits_already_is_the_tensor_itself(transform: lowmem.Transform, tensor: torch.Tensor) -> None:
    assert transform(tensor, tuple(tensor.shape)) is tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grids_of_their_own_dimensions_are_resized_in_either_layout(dtype: torch.dtype) -> None:
    grid = counted(1, 8, 14, 10, dtype=dtype)
    expected = functional.interpolate(grid.float(), size=(7, 20), mode="bicubic", antialias=True).to(dtype)
    assert torch.equal(lowmem.interpolate(layout="nchw")(grid, (1, 8, 7, 20)), expected)
    assert torch.equal(lowmem.interpolate(layout="nchw")(grid[0], (8, 7, 20)), expected[0])
    last = grid.permute(0, 2, 3, 1).contiguous()
    expected = functional.interpolate(last.permute(0, 3, 1, 2).float(), size=(7, 20), mode="bicubic", antialias=True)
    made = lowmem.interpolate((7, 20), layout="nhwc")(last, (1, 7, 20, 8))
    assert torch.equal(made, expected.permute(0, 2, 3, 1).to(dtype))


@pytest.mark.parametrize("extra", [0, 3])
def test_a_table_of_relative_positions_is_resized_as_timms_simple_way(extra: int) -> None:
    """`resize_rel_pos_bias_table_simple` of timm/layers/pos_embed_rel.py."""
    table = counted(13 * 13 + extra, 4)
    grid = table[: 13 * 13].transpose(1, 0).reshape(1, -1, 13, 13)
    grid = functional.interpolate(grid, size=(23, 23), mode="bicubic", align_corners=False)
    expected = torch.cat([grid.view(-1, 23 * 23).transpose(0, 1), table[13 * 13 :]])
    transform = lowmem.interpolate(layout="relative", antialias=False)
    assert torch.equal(transform(table, (23 * 23 + extra, 4)), expected)
    stated = lowmem.interpolate((12, 12), from_grid=7, layout="relative", antialias=False, extra_tokens=extra)
    assert torch.equal(stated(table, (23 * 23 + extra, 4)), expected)


def test_elements_stay_in_their_order_when_reshaped() -> None:
    tensor = counted(2, 6)
    assert torch.equal(lowmem.reshape_to()(tensor, (3, 4)), tensor.reshape(3, 4))
    assert torch.equal(lowmem.reshape_to(-1)(tensor, (3, 4)), tensor.reshape(12))
    assert torch.equal(lowmem.reshape_to((1, 4, -1))(tensor, (5,)), tensor.reshape(1, 4, 3))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.data())
def test_axes_go_where_numpy_puts_them(shape: list[int], data: st.DataObject) -> None:
    tensor = counted(*shape)
    a, b = (data.draw(st.integers(-len(shape), len(shape) - 1)) for _ in range(2))
    order = data.draw(st.permutations(range(len(shape))))
    swapped = lowmem.transpose(a, b)(tensor, (1,))
    np.testing.assert_array_equal(swapped.numpy(), np.swapaxes(tensor.numpy(), a, b))
    np.testing.assert_array_equal(lowmem.permute(*order)(tensor, (1,)).numpy(), np.transpose(tensor.numpy(), order))
    assert torch.equal(lowmem.permute(order)(tensor, (1,)), lowmem.permute(*order)(tensor, (1,)))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6), st.integers(0, 5), st.lists(st.integers(1, 3), max_size=2), st.sampled_from([0, -1.5, "mean"])
)
def test_rows_are_added_up_to_the_models(rows: int, more: int, rest: list[int], value: Any) -> None:
    tensor = counted(rows, *rest)
    made = lowmem.pad_rows(value)(tensor, (rows + more, *rest)).numpy()
    assert made.shape == (rows + more, *rest)
    np.testing.assert_array_equal(made[:rows], tensor.numpy())
    filling = tensor.mean(dim=0).numpy() if value == "mean" else np.full(rest, value, dtype=np.float32)
    np.testing.assert_array_equal(made[rows:], np.broadcast_to(filling, (more, *rest)))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9))
def test_rows_are_taken_as_a_slice_takes_them(rows: int, wanted: int, start: int) -> None:
    tensor = counted(rows, 3)
    transform = lowmem.slice_rows(start)
    if start + wanted > rows:
        with pytest.raises(ValueError, match=f"found {rows} rows"):
            transform(tensor, (wanted, 3))
        return
    assert torch.equal(transform(tensor, (wanted, 3)), tensor[start : start + wanted])
    assert torch.equal(lowmem.slice_rows(start, start + wanted)(tensor, (wanted, 3)), tensor[start : start + wanted])


def test_the_mean_of_half_precision_rows_is_taken_in_fp32() -> None:
    tensor = counted(3000, 2, dtype=torch.bfloat16)
    made = lowmem.pad_rows("mean")(tensor, (3001, 2))
    assert torch.equal(made[-1], tensor.float().mean(dim=0).to(torch.bfloat16))
    assert torch.equal(lowmem.pad_rows(7)(torch.arange(4), (6,)), torch.tensor([0, 1, 2, 3, 7, 7]))


def test_a_transform_says_how_it_was_asked_for() -> None:
    assert lowmem.interpolate().what == "interpolate()"
    stated = lowmem.interpolate((16, 16), extra_tokens=1, antialias=False)
    assert stated.what == "interpolate(grid=(16, 16), extra_tokens=1, antialias=False)"
    others = [lowmem.reshape_to(1, -1), lowmem.transpose(0, 1), lowmem.permute(1, 0), lowmem.pad_rows("mean")]
    assert [t.what for t in others] == [
        "reshape_to(1, -1)",
        "transpose(0, 1)",
        "permute(1, 0)",
        "pad_rows(value='mean')",
    ]
    assert lowmem.slice_rows(2, 5).what == "slice_rows(start=2, stop=5)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: lowmem.interpolate(mode="x"),
            "interpolate: mode: expected 'bicubic', 'bilinear' or 'nearest', found 'x'",
        ),
        (
            lambda: lowmem.interpolate((16,)),
            "interpolate: grid: expected height and width such as (16, 16), found (16,)",
        ),
        (lambda: lowmem.interpolate(from_grid=0), "interpolate: from_grid: expected height and width"),
        (lambda: lowmem.interpolate((16, True)), "interpolate: grid: expected height and width"),
        (lambda: lowmem.interpolate("14x14"), "interpolate: grid: expected height and width"),
        (lambda: lowmem.interpolate(extra_tokens=-1), "interpolate: extra_tokens: expected 0 or more, found -1"),
        (lambda: lowmem.interpolate(extra_tokens=1, layout="nchw"), "interpolate: extra_tokens: expected None"),
        (lambda: lowmem.interpolate(antialias=1), "interpolate: antialias: expected True or False, found 1"),
        (lambda: lowmem.interpolate(align_corners=None), "interpolate: align_corners: expected True or False"),
        (
            lambda: lowmem.interpolate(layout="hwc"),
            "interpolate: layout: expected 'tokens', 'nchw', 'nhwc' or 'relative'",
        ),
        (lambda: lowmem.reshape_to(-1, -1), "reshape_to: expected sizes, one of which may be -1, found (-1, -1)"),
        (lambda: lowmem.reshape_to("2"), "reshape_to: expected sizes"),
        (lambda: lowmem.transpose(0, 1.0), "transpose: expected the numbers of two dimensions, found 1.0"),
        (lambda: lowmem.permute(), "permute: expected each dimension once"),
        (lambda: lowmem.permute(0, 2), "permute: expected each dimension once, such as permute(2, 0, 1), found (0, 2)"),
        (lambda: lowmem.pad_rows("median"), "pad_rows: value: expected a number or 'mean', found 'median'"),
        (lambda: lowmem.pad_rows(True), "pad_rows: value: expected a number or 'mean', found True"),
        (lambda: lowmem.slice_rows(-1), "slice_rows: start: expected the number of a row, 0 or more, found -1"),
        (lambda: lowmem.slice_rows(4, 4), "slice_rows: stop: expected a row behind 4, found 4"),
    ],
)
def test_an_argument_that_means_nothing_is_refused_by_name(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        make()
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("transform", "found", "wanted", "message"),
    [
        (lowmem.interpolate(), (1, 197, 8), (1, 577, 9), "expected 9 channels, found 8"),
        (lowmem.interpolate(), (1, 198, 8), (1, 577, 8), "give grid= and from_grid="),
        (
            lowmem.interpolate(extra_tokens=1),
            (1, 198, 8),
            (1, 577, 8),
            "found 198 tokens in the checkpoint; give from_grid=",
        ),
        (lowmem.interpolate(extra_tokens=1), (1, 197, 8), (1, 578, 8), "found 578 tokens in the model; give grid="),
        (
            lowmem.interpolate((30, 30)),
            (1, 197, 8),
            (1, 577, 8),
            "expected 30 x 30 tokens or more, found 577 in the model",
        ),
        (lowmem.interpolate(24, from_grid=14, extra_tokens=2), (1, 197, 8), (1, 577, 8), "and 2 extra ones, found 197"),
        (lowmem.interpolate(), (2, 197, 8), (2, 577, 8), "found (2, 197, 8) in the checkpoint; layout="),
        (lowmem.interpolate(), (1, 8, 14, 14), (1, 8, 24, 24), "layout= says what else"),
        (lowmem.interpolate(layout="nchw"), (1, 8, 14, 14), (1, 9, 24, 24), "changes the grid only"),
        (
            lowmem.interpolate(7, layout="nchw"),
            (1, 8, 14, 14),
            (1, 8, 24, 24),
            "found (24, 24) in the model; leave grid=",
        ),
        (lowmem.interpolate(layout="nhwc"), (197, 8), (577, 8), "expected (..., H, W, C), found (197, 8)"),
        (lowmem.reshape_to(), (2, 3), (4, 2), "expected as many elements as in (4, 2), found (2, 3)"),
        (lowmem.reshape_to(4, -1), (2, 3), (4, 2), "expected as many elements as in (4, -1), found (2, 3)"),
        (lowmem.transpose(0, 2), (2, 3), (3, 2), "expected a tensor with dimension 2, found (2, 3)"),
        (lowmem.permute(0, 2, 1), (2, 3), (3, 2), "expected 3 dimensions, found (2, 3)"),
        (lowmem.pad_rows(), (5, 3), (4, 3), "expected at most 4 rows, found 5; slice_rows() takes the first 4"),
        (lowmem.pad_rows(), (4, 3), (5, 4), "expected rows of shape (4,) as in (5, 4), found (4, 3)"),
        (lowmem.slice_rows(), (4, 3), (5, 3), "expected rows 0 to 4, found 4 rows"),
        (lowmem.slice_rows(), (), (5, 3), "only the number of rows may differ"),
    ],
)
def test_a_tensor_that_cannot_be_changed_says_what_would_fit(
    transform: lowmem.Transform, found: Shape, wanted: Shape, message: str
) -> None:
    with pytest.raises(ValueError, match=r"^expected ") as caught:
        transform(counted(*found), wanted)
    assert message in str(caught.value)


def test_no_two_numbers_of_extra_tokens_fit_the_same_two_tables() -> None:
    """So that the one that is found is the one that is meant."""
    squares = {n * n for n in range(2, 70)}
    # Two numbers fit a table where two squares lie so near each other; that must be in one place each.
    for apart in range(1, 17):
        assert len([n for n in squares if n + apart in squares]) <= 1


def test_integers_are_not_interpolated() -> None:
    with pytest.raises(ValueError, match=r"expected floats to interpolate, found torch\.int64"):
        lowmem.interpolate()(torch.zeros(1, 197, 8, dtype=torch.int64), (1, 577, 8))


class Model(nn.Module):
    """What the transforms below are for."""

    def __init__(self, tokens: int = 1 + 24 * 24) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, 8))
        self.proj = nn.Linear(8, 5)
        self.words = nn.Embedding(12, 8)
        self.table = nn.Parameter(torch.zeros(8, 4))
        self.gamma = nn.Parameter(torch.zeros(6))


CHECKPOINT: dict[str, Shape] = {
    "pos_embed": (1, 197, 8),
    "proj.weight": (8, 5),
    "proj.bias": (5,),
    "words.weight": (10, 8),
    "table": (20, 4),
    "gamma": (1, 1, 1, 6),
}
CHANGES = {
    "pos_embed": lowmem.interpolate(),
    "proj.weight": lowmem.transpose(0, 1),
    "words": lowmem.pad_rows("mean"),
    "table": lowmem.slice_rows(3),
    "gamma": lowmem.reshape_to(),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.save({name: counted(*shape) for name, shape in CHECKPOINT.items()}, tmp_path / "m.pth")
    return tmp_path / "m.pth"


@pytest.mark.parametrize("residency", ["map", "copy"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_load_gives_what_the_transforms_give_by_hand(file: Path, dtype: str, residency: str) -> None:
    result = lowmem.load(file, model=Model, transforms=CHANGES, dtype=dtype, residency=residency)
    loaded = result.model.state_dict()
    for name, shape in CHECKPOINT.items():
        change = CHANGES.get(name, CHANGES.get(name.rpartition(".")[0], lowmem.reshape_to()))
        expected = change(counted(*shape), tuple(loaded[name].shape)).to(getattr(torch, dtype))
        assert torch.equal(loaded[name], expected), name
    # What only moves elements about is moved; the other two are computed.
    assert sorted(group.what for group in result.plan.groups) == ["interpolate()", "pad_rows(value='mean')"]


def test_what_only_moves_rows_or_shapes_stays_in_the_file(file: Path) -> None:
    plan = lowmem.plan(file, model=lambda: Model(197), transforms=CHANGES | {"words": lowmem.pad_rows()})
    # The padded embedding, and the transposed matrix in memory of its own.
    assert plan.host.resident == 4 * (12 * 8 + 5 * 8)
    assert [group.what for group in plan.groups] == ["pad_rows()"]


def test_a_grid_that_agrees_is_a_plain_link(file: Path) -> None:
    only = {"pos_embed": lowmem.interpolate()}
    plain = {"proj.weight": (5, 8), "words.weight": (12, 8), "table": (8, 4), "gamma": (6,)}
    torch.save({name: counted(*plain.get(name, shape)) for name, shape in CHECKPOINT.items()}, file)
    result = lowmem.load(file, model=lambda: Model(197), transforms=only)
    assert result.plan.groups == ()
    assert (result.plan.host.resident, result.plan.host.computing) == (0, 0)
    assert torch.equal(result.model.pos_embed, counted(1, 197, 8))


class Table(nn.Module):
    def __init__(self, side: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, 256))


def test_the_memory_of_an_interpolation_is_in_the_plan(tmp_path: Path) -> None:
    torch.save({"pos_embed": torch.ones(1, 1 + 64 * 64, 256)}, tmp_path / "m.pth")
    options: dict[str, Any] = {"model": lambda: Table(96), "transforms": {"pos_embed": lowmem.interpolate()}}
    # What torch imports for the plan is not of the load.
    plan = lowmem.plan(tmp_path / "m.pth", **options)
    source, made = 64 * 64 * 256 * 4, 96 * 96 * 256 * 4
    assert plan.host.resident == made + 256 * 4
    assert plan.host.computing >= source + made
    result = lowmem.load(tmp_path / "m.pth", **options)
    assert result.plan.host.peak == plan.host.peak
    assert result.report.peak <= plan.host.peak
    need = plan.host.peak
    with pytest.raises(lowmem.BudgetError):
        lowmem.load(tmp_path / "m.pth", ram=need - 4 * MIB, **options)


def test_a_transform_that_does_not_fit_names_file_tensor_and_remedy(file: Path) -> None:
    changes = CHANGES | {"pos_embed": lowmem.interpolate(extra_tokens=3)}
    with pytest.raises(KeysError) as caught:
        lowmem.load(file, model=Model, transforms=changes)
    assert str(caught.value) == (
        f"{file}: tensor 'pos_embed': interpolate(extra_tokens=3) for 'pos_embed': expected 3 extra tokens and a "
        "square grid, found 197 tokens in the checkpoint; give from_grid=(height, width), or other extra_tokens="
    )
