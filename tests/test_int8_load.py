"""Floats that become int8 while they are loaded: what transformers and bitsandbytes make of them, bit for bit."""

from __future__ import annotations

import re
import shutil
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

import bitsandbytes as bnb
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_models import Holder, as_bin, assert_bytes_as_planned, assert_same_int8, expected_of, int8_of, theirs_of
from safetensors.torch import save_file
from tiny_models import Saved, same
from torch_files import rewritten

import lowmem

pytestmark = [pytest.mark.usefixtures("one_thread", "quiet"), pytest.mark.filterwarnings("ignore")]


KINDS = ("llama", "llama-tied", "gpt2", "bert", "bert-mlm", "t5", "gemma", "qwen3", "qwen3-moe", "vit")


CASES = [
    *((kind, "bfloat16") for kind in KINDS),
    *((kind, dtype) for kind in ("llama-tied", "gpt2", "qwen3-moe") for dtype in ("float32", "float16")),
]


@pytest.mark.parametrize(("kind", "source"), CASES)
def test_floats_become_the_int8_of_transformers(saved: Saved, kind: str, source: str) -> None:
    folder = saved(kind, source)
    ours = lowmem.load(folder, quantize="int8")
    theirs = theirs_of(folder, dtype="auto")
    assert_bytes_as_planned(ours)
    assert_same_int8(ours.model, theirs)


@pytest.mark.parametrize(("source", "dtype"), [("float32", "float16"), ("bfloat16", "float32"), ("float16", "float32")])
@pytest.mark.parametrize("kind", ["gpt2", "t5", "qwen3-moe"])
def test_the_rest_of_the_model_has_the_dtype_that_is_given(saved: Saved, kind: str, source: str, dtype: str) -> None:
    folder = saved(kind, source)
    ours = lowmem.load(folder, quantize="int8", dtype=dtype)
    assert_bytes_as_planned(ours)
    assert_same_int8(ours.model, theirs_of(folder, dtype=getattr(torch, dtype)))


@pytest.mark.parametrize("source", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_floats_are_rounded_to_bf16_first_where_the_model_has_them_so(saved: Saved, kind: str, source: str) -> None:
    folder = saved(kind, source)
    ours = lowmem.load(folder, quantize="int8", dtype="bfloat16").model
    assert_same_int8(ours, theirs_of(folder, dtype=torch.bfloat16), ignore=("quantization_config", "name_or_path"))
    exact = int8_of(theirs_of(folder, dtype=torch.float32))
    assert any(not same(weight, exact[name][0]) for name, (weight, _) in int8_of(ours).items())


@pytest.mark.parametrize("kind", ["gpt2", "llama-tied"])
@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_floats_become_int8(saved: Saved, kind: str, shards: int, tmp_path: Path) -> None:
    folder = as_bin(saved(kind, "bfloat16"), tmp_path / "bin", shards)
    theirs = theirs_of(saved(kind, "bfloat16"), dtype="auto")
    assert_same_int8(lowmem.load(folder, quantize="int8").model, theirs, ignore=("quantization_config", "name_or_path"))


@pytest.mark.parametrize(
    "options",
    [
        {"staging": "1MiB"},
        {"io": "direct"},
        {"io": "mmap"},
        {"io": "buffered", "residency": "copy"},
        {"dtype": "float32", "keep_fp32": ["q_proj"], "leaves": r".*q_proj"},
        {"skip_modules": ["mlp"], "leaves": "mlp"},
        {"skip_modules": []},
    ],
    ids=str,
)
def test_however_it_is_read_the_int8_are_the_same(saved: Saved, options: dict[str, Any]) -> None:
    folder = saved("llama", "bfloat16", "1GB")
    theirs_skip = options.get("skip_modules")
    options = dict(options)
    leaves = options.pop("leaves", None)
    if leaves is not None:
        theirs_skip = [leaves, "lm_head"] if "keep_fp32" in options else [leaves]
    dtype = getattr(torch, options["dtype"]) if "dtype" in options else "auto"
    ours = lowmem.load(folder, quantize="int8", **options)
    assert_bytes_as_planned(ours)
    assert_same_int8(ours.model, theirs_of(folder, dtype=dtype, skip_modules=theirs_skip))


def test_an_output_embedding_becomes_int8_if_nothing_is_to_be_skipped(saved: Saved) -> None:
    model = lowmem.load(saved("llama", "bfloat16"), quantize="int8", skip_modules=[]).model
    assert "lm_head" in int8_of(model)
    tied = lowmem.load(saved("llama-tied", "bfloat16"), quantize="int8", skip_modules=[]).model
    assert "lm_head" not in int8_of(tied)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert tied.lm_head.weight.dtype == torch.bfloat16


# ---- rows and chunks ----


def check_holder(file: Path, weight: torch.Tensor, **options: Any) -> lowmem.LoadResult:
    """A checkpoint of `layer.weight` becomes what bitsandbytes makes of it."""
    result = lowmem.load(file, model=lambda: Holder(*weight.shape), quantize="int8", strict=False, **options)
    values, scales = expected_of(weight)
    layer = result.model.layer
    assert isinstance(layer, bnb.nn.Linear8bitLt)
    assert same(layer.weight.data, values)
    assert same(layer.weight.SCB, scales)
    return result


SHAPES = [(1, 1), (1, 300_001), (100_003, 3), (2049, 1025), (3, 1_048_576), (5, 65_537)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_that_are_cut_across_chunks(tmp_path: Path, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    save_file({"layer.weight": weight, "odd": torch.zeros(1, dtype=torch.int8)}, tmp_path / "model.safetensors")
    staging = "1MiB" if shape[1] < 70_000 else "16MiB"
    result = check_holder(tmp_path / "model.safetensors", weight, staging=staging)
    check_holder(tmp_path / "model.safetensors", weight)
    assert_bytes_as_planned(result)


def test_layers_with_rows_larger_than_a_chunk_stay_floats(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"layer.weight": torch.zeros(2, 1_048_577)}, file)
    result = lowmem.load(file, model=lambda: Holder(2, 1_048_577), quantize="int8", strict=False)
    assert type(result.model.layer) is torch.nn.Linear
    assert any("1 layers stay floats" in text and "'layer'" in text for text in result.plan.warnings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 4097), (4097, 1), (3001, 257), (257, 3001), (40, 90_001)], ids=str)
def test_a_transposed_view_in_a_pickle(tmp_path: Path, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Rows do not come whole, so they are read twice."""
    weight = torch.randn(shape[::-1], generator=torch.Generator().manual_seed(1)).to(dtype).t()
    torch.save({"layer.weight": weight}, tmp_path / "model.bin")
    plan = check_holder(tmp_path / "model.bin", weight, staging="1MiB").plan
    if min(shape) > 1:
        assert plan.bytes_read == 2 * weight.nbytes


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_view_in_a_pickle(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Slices, steps and transposes of a larger tensor, of any float dtype."""
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    down, right = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    seed = data.draw(st.integers(0, 99))
    whole = torch.randn(rows * down + 2, columns * right + 3, generator=torch.Generator().manual_seed(seed)).to(dtype)
    view = whole[1 : 1 + rows * down : down, 2 : 2 + columns * right : right]
    if data.draw(st.booleans()):
        view = view.t()
    if data.draw(st.booleans()):
        view = view[:1].expand(5, -1)
    folder = tmp_path_factory.mktemp("view")
    torch.save({"layer.weight": view}, folder / "model.bin")
    check_holder(folder / "model.bin", view)
    shutil.rmtree(folder)


def test_a_wide_gap_between_the_rows_of_a_view(tmp_path: Path) -> None:
    whole = torch.randn(50, 40_000, generator=torch.Generator().manual_seed(1))
    for view in (whole[:, 7:107], whole[:, 7:107].t(), whole[::3, ::200], whole[::3, ::200].t()):
        torch.save({"layer.weight": view}, tmp_path / "model.bin")
        check_holder(tmp_path / "model.bin", view, staging="1MiB")


def test_deflated_and_big_endian_pickles(tmp_path: Path) -> None:
    weight = torch.randn(300, 257, generator=torch.Generator().manual_seed(1))
    for state in ({"layer.weight": weight}, {"layer.weight": weight.t().contiguous().t()}):
        torch.save(state, tmp_path / "little.pt")
        deflated = rewritten(tmp_path / "little.pt", tmp_path / "deflated.pt", method=zipfile.ZIP_DEFLATED)
        check_holder(deflated, weight, staging="1MiB")
        check_holder(rewritten(tmp_path / "little.pt", tmp_path / "big.pt", swapping), weight, staging="1MiB")
        check_holder(rewritten(deflated, tmp_path / "both.pt", swapping, zipfile.ZIP_DEFLATED), weight, staging="1MiB")


def swapping(name: str, data: bytes) -> bytes:
    """Of a zip of fp32: as a big-endian machine writes it."""
    if name.endswith("/byteorder"):
        return b"big"
    return np.frombuffer(data, ">f4").astype("<f4").tobytes() if "/data/" in name else data


# ---- values that cannot be int8 ----


UNFIT = [(value, torch.float32) for value in (float("inf"), float("-inf"), float("nan"), 65536.0, -1e30)]
UNFIT += [(65536.0, torch.bfloat16), (float("nan"), torch.bfloat16), (float("-inf"), torch.float16)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("value", "dtype"), UNFIT)
def test_values_that_fp16_does_not_have_are_refused(
    tmp_path: Path, value: float, dtype: torch.dtype, transposed: bool
) -> None:
    weight = torch.ones(900, 700).to(dtype)
    weight[613, 5] = value
    ending, save = ("bin", torch.save) if transposed else ("safetensors", save_file)
    file = tmp_path / f"model.{ending}"
    save({"layer.weight": weight.t().contiguous().t() if transposed else weight}, file)
    model = Holder(900, 700)
    before, layer, kept = list(model.parameters()), model.layer, model.layer.weight.clone()
    threads = set(threading.enumerate())
    text = rf"{re.escape(str(file))}: tensor 'layer\.weight': row 613 .*65504.*leave 'layer' out by skip_modules"
    for options in ({}, {"staging": "1MiB"}):
        with pytest.raises(lowmem.UnsupportedError, match=text):
            lowmem.load(file, model=model, quantize="int8", strict=False, **options)
        assert model.layer is layer
        assert [id(p) for p in model.parameters()] == [id(p) for p in before]
        assert same(model.layer.weight, kept)
        assert set(threading.enumerate()) <= threads
    assert sorted(path.name for path in tmp_path.iterdir()) == [file.name]


def test_rows_of_zeros_denormals_and_the_largest(tmp_path: Path) -> None:
    weight = torch.zeros(6, 300)
    weight[1] = 6e-8
    weight[2] = torch.linspace(-65504, 65504, 300)
    weight[3] = 1e-12
    weight[4, 7] = -65519.0
    weight[5] = -0.0
    save_file({"layer.weight": weight}, tmp_path / "model.safetensors")
    check_holder(tmp_path / "model.safetensors", weight)
    torch.save({"layer.weight": weight.t().contiguous().t()}, tmp_path / "model.bin")
    check_holder(tmp_path / "model.bin", weight)
