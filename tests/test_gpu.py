"""What needs a CUDA device: placing there, beside host and disk, within the planned device memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lowmem
from lowmem.sizes import MIB
from lowmem.synthetic import llama_recipe, write_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(llama_recipe(64 * MIB), tmp_path_factory.mktemp("gpu") / "llama", max_shard_size=24 * MIB)


def reference(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(shard))
    return tensors


@pytest.mark.parametrize("dtype", ["auto", "float16", "float32"])
def test_every_weight_arrives_on_the_device(llama: Path, dtype: str) -> None:
    result = lowmem.load(llama, device_map="cuda:0", dtype=dtype)
    state = result.model.state_dict()
    for key, tensor in reference(llama).items():
        wanted = tensor if dtype == "auto" else tensor.to(getattr(torch, dtype))
        assert state[key].device == torch.device("cuda", 0)
        assert torch.equal(state[key].cpu(), wanted)
    assert all(buffer.device.type == "cuda" for buffer in result.model.buffers())
    assert result.report.peak <= result.plan.host.peak


def test_device_memory_stays_within_the_plan(llama: Path) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(0)
    torch.cuda.reset_peak_memory_stats(0)
    result = lowmem.load(llama, device_map="cuda:0", dtype="float32")
    added = torch.cuda.max_memory_allocated(0) - before
    # The allocator rounds each tensor up to 512 bytes.
    assert added <= result.plan.devices["cuda:0"].peak + 1024 * len(result.plan.placements)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_layers_on_gpu_host_and_disk_give_the_logits_of_the_gpu(llama: Path, tmp_path: Path, dtype: str) -> None:
    ids = torch.arange(1, 9, device="cuda:0")[None]
    whole: Any = lowmem.load(llama, device_map="cuda:0", dtype=dtype).model
    layers = whole.config.num_hidden_layers
    table: dict[str, Any] = {"": 0}
    table.update({f"model.layers.{i}": "cpu" for i in range(layers // 3, 2 * layers // 3)})
    table.update({f"model.layers.{i}": "disk" for i in range(2 * layers // 3, layers)})
    spread: Any = lowmem.load(llama, device_map=table, dtype=dtype, offload_folder=tmp_path).model
    with torch.no_grad():
        assert torch.equal(spread(ids).logits, whole(ids).logits)


def test_auto_fills_the_gpu_first_and_keeps_to_max_memory(llama: Path, tmp_path: Path) -> None:
    result = lowmem.load(llama, device_map="auto", max_memory={0: "40MiB", "cpu": "4GiB"}, offload_folder=tmp_path)
    assert result.plan.devices["cuda:0"].weights <= 40 * MIB
    assert {"cuda:0", "cpu"} <= set(result.plan.devices)
    with torch.no_grad():
        out: Any = result.model(torch.arange(1, 5, device="cuda:0")[None])
    assert torch.isfinite(out.logits).all()


def test_int8_is_made_on_the_host_and_is_the_same_on_the_device(llama: Path) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(0)
    torch.cuda.reset_peak_memory_stats(0)
    on_device = lowmem.load(llama, device_map="cuda:0", quantize="int8")
    added = torch.cuda.max_memory_allocated(0) - before
    assert added <= on_device.plan.devices["cuda:0"].peak + 1024 * len(on_device.plan.placements)
    expected = lowmem.load(llama, quantize="int8").model.state_dict()
    state = on_device.model.state_dict()
    assert state.keys() == expected.keys()
    for key, tensor in state.items():
        assert torch.equal(tensor.cpu(), expected[key]), key
        assert tensor.device.type == "cuda" or key.endswith("weight_format")


@pytest.mark.parametrize("waits", ["cpu", "disk"])
def test_int8_layers_that_wait_elsewhere_give_the_logits_of_the_gpu(llama: Path, tmp_path: Path, waits: str) -> None:
    ids = torch.arange(1, 9, device="cuda:0")[None]
    whole: Any = lowmem.load(llama, device_map="cuda:0", quantize="int8").model
    layers = whole.config.num_hidden_layers
    parts = {f"model.layers.{i}": "cuda:0" if i % 2 else waits for i in range(layers)}
    device_map = {"model.embed_tokens": "cuda:0", "model.norm": "cuda:0", "model.rotary_emb": "cuda:0", **parts}
    device_map["lm_head"] = "cuda:0"
    split: Any = lowmem.load(llama, device_map=device_map, quantize="int8", offload_folder=tmp_path).model
    with torch.no_grad():
        expected = whole(ids).logits
        for _ in range(2):
            assert torch.equal(split(ids).logits, expected)
