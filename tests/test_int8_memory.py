"""Loads and conversions that quantise hold no copy of a weight: peaks in fresh processes, with one large layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fresh import INT8_IMPORTS, server
from safetensors.torch import save_file

from lowmem.sizes import MIB
from lowmem.synthetic import recipe_from_config, write_checkpoint

# Rows and columns of the large layer: 64 MiB in int8, 128 MiB in 16 bits, 256 MiB in fp32.
SIDE = 8192
INT8 = SIDE * SIDE
# Half of the least that a copy of the whole weight takes: modules, pages that the allocator keeps, readers.
SLACK = 28 * MIB
STAGING = 4 * MIB

_BUILD = """
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        side = args["side"]
        self.small = nn.Linear(64, 64)
        self.large = Conv1D(side, side) if args["transposed"] else nn.Linear(side, side)
"""
_LOAD = (
    _BUILD
    + """
import lowmem
loaded = lowmem.load(args["source"], model=Model, staging=args["staging"], **args["options"])
large = loaded.model.large
result = {
    "peak": loaded.report.peak, "predicted": loaded.plan.host.peak, "resident": loaded.plan.host.resident,
    "staging": loaded.plan.host.staging, "dtype": str(large.weight.dtype), "measured": loaded.report.peak,
}
"""
)
# What transformers does with each weight.
_WHOLE = """
import lowmem, torch
from safetensors import safe_open
with lowmem.measure() as memory, safe_open(args["source"], framework="pt") as file:
    rows = file.get_tensor("large.weight").half()
    scales = rows.abs().amax(1, keepdim=True).float()
    values = (rows * (127 / scales)).round().to(torch.int8)
result = memory.peak
"""
_CONVERT = """
import lowmem
with lowmem.measure() as memory:
    lowmem.convert(args["source"], args["out"], quantize="int8", staging=args["staging"])
result = memory.peak
"""


def random_bits(dtype: torch.dtype) -> torch.Tensor:
    """The large weight: a block of random numbers again and again, which is quicker than as many numbers."""
    torch.manual_seed(0)
    block = torch.randint(-100, 100, (16, SIDE)) if dtype == torch.int8 else torch.randn(16, SIDE)
    return block.to(dtype).repeat(SIDE // 16, 1)


def write(folder: Path, dtype: torch.dtype) -> Path:
    """A checkpoint of the model with weights of `dtype`."""
    floats = torch.float32 if dtype == torch.int8 else dtype
    state = {"large.bias": torch.zeros(SIDE, dtype=floats), "small.bias": torch.ones(64, dtype=floats)}
    state.update({"large.weight": random_bits(dtype), "small.weight": torch.ones(64, 64, dtype=dtype)})
    if dtype == torch.int8:
        state.update({"large.SCB": torch.rand(SIDE) + 1, "small.SCB": torch.ones(64)})
    save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("bf16"), torch.bfloat16)


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("int8"), torch.int8)


def check(source: Path, resident: int, transposed: bool = False, **options: Any) -> dict[str, Any]:
    """Load once; the peak is what stays, the buffers and the slack, and the prediction is near it.

    Twice the slack is less than the int8 weight, the smallest copy that a load could make of the large one.
    """
    given = {"source": str(source), "side": SIDE, "transposed": transposed, "staging": STAGING, "options": options}
    found: dict[str, Any] = server(*INT8_IMPORTS).run(_LOAD, **given)
    assert STAGING + SLACK < INT8
    assert found["staging"] <= STAGING
    assert abs(found["resident"] - resident) < MIB, found
    assert found["peak"] <= resident + STAGING + SLACK, found
    assert abs(found["predicted"] - found["peak"]) <= 16 * MIB, found
    return found


@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])
def test_a_weight_that_becomes_int8_is_never_whole_in_floats(bf16: Path, transposed: bool) -> None:
    assert check(bf16, INT8, transposed, quantize="int8")["dtype"] == "torch.int8"


@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])
def test_on_the_way_to_disk_no_weight_is_whole_at_all(bf16: Path, transposed: bool, tmp_path: Path) -> None:
    device_map = {"": "cpu", "large": "disk"}
    check(bf16, 0, transposed, quantize="int8", device_map=device_map, offload_folder=str(tmp_path / "off"))


def test_of_fp32_neither(tmp_path: Path) -> None:
    check(write(tmp_path, torch.float32), INT8, quantize="int8")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_int8_that_becomes_floats_is_in_memory_once(int8: Path, dtype: str) -> None:
    size = getattr(torch, dtype).itemsize
    assert check(int8, size * INT8, dequantize=True, dtype=dtype)["dtype"] == f"torch.{dtype}"


def test_int8_is_mapped_where_it_lies(int8: Path) -> None:
    check(int8, 0)


def test_a_copy_of_the_weight_would_be_seen(bf16: Path) -> None:
    """Or the tests above would show nothing."""
    peak = server(*INT8_IMPORTS).run(_WHOLE, source=str(bf16))
    assert peak > INT8 + STAGING + 2 * SLACK


def test_a_conversion_needs_as_much_for_large_layers_as_for_small_ones(tmp_path: Path) -> None:
    """The peak is less than the int8 of the smallest of the large weights, which is half of what was stored."""
    transformers = pytest.importorskip("transformers")
    peaks = {}
    for name, width in (("small", 1024), ("large", 40 * 1024)):
        config = transformers.LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=256,
            hidden_size=1024,
            intermediate_size=width,
            num_hidden_layers=1,
            num_attention_heads=8,
        )
        recipe = recipe_from_config(config, dtype="bfloat16", name=name)
        source = write_checkpoint(recipe, tmp_path / name, max_shard_size=1024 * MIB)
        given = {"source": str(source), "out": str(tmp_path / f"{name}-int8"), "staging": STAGING}
        peaks[name] = server(*INT8_IMPORTS).run(_CONVERT, **given)
    assert peaks["large"] <= STAGING + SLACK < 40 * MIB, peaks
    assert peaks["large"] <= peaks["small"] + 12 * MIB, peaks
