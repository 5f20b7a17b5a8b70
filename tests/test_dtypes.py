"""The tables of dtypes are torch's and safetensors', though neither is imported to make them."""

from __future__ import annotations

import pytest
import torch

from lowmem import OptionError, UnsupportedError
from lowmem._patterns import name_matches
from lowmem.dtypes import (
    CASTABLE,
    NOT_IN_TORCH,
    SAFETENSORS_DTYPES,
    SAFETENSORS_NAMES,
    is_floating,
    itemsize,
    parse_dtype,
)

TORCH_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}


@pytest.mark.parametrize("name", sorted(TORCH_DTYPES))
def test_an_element_has_as_many_bytes_as_torch_says(name: str) -> None:
    assert itemsize(name) == TORCH_DTYPES[name].itemsize


def test_a_dtype_of_a_later_torch_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="float3_x"):
        itemsize("float3_x")


def test_every_name_is_torchs_except_those_said_to_be_absent() -> None:
    names = {name for name, _ in SAFETENSORS_DTYPES.values()}
    assert names - set(TORCH_DTYPES) == NOT_IN_TORCH
    assert len(SAFETENSORS_NAMES) == len(SAFETENSORS_DTYPES)
    assert all(SAFETENSORS_DTYPES[st][0] == name for name, st in SAFETENSORS_NAMES.items())


def test_bits_are_those_of_torchs_elements_but_for_the_packed_pair() -> None:
    for name, bits in SAFETENSORS_DTYPES.values():
        if name in TORCH_DTYPES:
            pair = 2 if name == "float4_e2m1fn_x2" else 1
            assert pair * bits == 8 * TORCH_DTYPES[name].itemsize


@pytest.mark.parametrize("name", sorted(CASTABLE))
def test_castable_floats_cast_in_torch_and_keep_one(name: str) -> None:
    dtype = TORCH_DTYPES[name]
    assert is_floating(name)
    assert dtype.is_floating_point
    assert torch.ones(2).to(dtype).float().tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", sorted(set(TORCH_DTYPES) - CASTABLE))
def test_the_rest_are_no_floats_that_a_cast_keeps(name: str) -> None:
    assert not is_floating(name)
    assert not TORCH_DTYPES[name].is_floating_point or name in ("float4_e2m1fn_x2", "float8_e8m0fnu")


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("auto", "auto"),
        ("bfloat16", "bfloat16"),
        ("bf16", "bfloat16"),
        ("fp16", "float16"),
        ("half", "float16"),
        ("fp32", "float32"),
        ("fp64", "float64"),
        ("torch.float32", "float32"),
        (torch.bfloat16, "bfloat16"),
        (torch.half, "float16"),
        (torch.float8_e4m3fn, "float8_e4m3fn"),
    ],
)
def test_a_dtype_can_be_said_in_several_ways(value: object, name: str) -> None:
    assert parse_dtype(value) == name


@pytest.mark.parametrize(
    "value",
    [
        *("", "float", "BF16", "int8", "fp8", "torch.", "float4_e2m1fn_x2", "float8_e8m0fnu", "float6_e2m3"),
        *(None, 16, True, torch.int64, torch.bool, torch.complex64),
    ],
)
def test_anything_else_is_refused_and_the_option_named(value: object) -> None:
    with pytest.raises(OptionError, match=r"^--dtype: expected 'auto' or one of bfloat16, .*; found") as caught:
        parse_dtype(value, "--dtype")
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "pattern", "matches"),
    [
        ("model.norm.weight", "norm", True),
        ("norm", "norm", True),
        ("model.input_layernorm.weight", "norm", False),
        ("model.norm2.weight", "norm", False),
        ("model.input_layernorm.weight", "*norm", True),
        ("model.norm.weight", "*norm", True),
        ("model.layers.0.mlp.up.weight", "layers.0.mlp", True),
        ("model.layers.10.mlp.up.weight", "layers.0.mlp", False),
        ("model.layers.0.mlp2.up.weight", "layers.0.mlp", False),
        ("model.layers.7.mlp.up.weight", "layers.*.mlp", True),
        ("model.layers.7.attn.q.weight", "layers.*.mlp", False),
        ("model.layers.7.norm.weight", "norm.weight", True),
        ("model.layers.7.norm.bias", "norm.weight", False),
        ("model.layers.7.norm.weight", "layers.[0-7].norm", False),
        ("model.layers.8.norm.weight", "layers.?.norm", False),
        ("model.Norm.weight", "norm", False),
        ("modelXnorm.weight", "model.norm", False),
        ("a.b", "*", True),
    ],
)
def test_a_pattern_names_whole_components(name: str, pattern: str, matches: bool) -> None:
    assert name_matches(name, pattern) is matches
