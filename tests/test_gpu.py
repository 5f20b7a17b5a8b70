"""What needs a CUDA device: placing there, beside host and disk, within the planned device memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowmem
from lowmem.engine.streams import StreamBackend
from lowmem.sizes import MIB
from lowmem.synthetic import llama_recipe, write_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What CUDA takes for itself is taken before anything is measured: its context, streams, pins and kernels."""
    path = tmp_path_factory.mktemp("warm") / "m.safetensors"
    save_file({"a": torch.ones(5000), "b": torch.ones(5000).bfloat16()}, path)
    for dtype in ("auto", "float16", "float32", "float64"):
        for _, tensor in lowmem.stream(path, device="cuda:0", dtype=dtype):
            assert tensor.sum().item() == 5000
    torch.cuda.synchronize(0)


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


def mixed(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of several dtypes, of many chunks, of odd sizes and of a few bytes; written there."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(1,), (7, 3), (1000,), (1025, 1023), (3, 1 << 20), (5000, 4099)]
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int64]
    made = {}
    for n, shape in enumerate(shape for _ in dtypes for shape in sizes):
        dtype = dtypes[(n + n // len(sizes)) % len(dtypes)]
        made[f"t{n:02d}"] = torch.randn(shape, generator=generator).mul(50).to(dtype)
    save_file(made, path)
    return made


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("io", ["buffered", "direct"])
@pytest.mark.parametrize("staging", [None, "1MiB", "16MiB"])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float64"])
def test_a_stream_gives_tensors_that_are_there(tmp_path: Path, dtype: str, staging: str | None, io: str) -> None:
    made = mixed(tmp_path / "m.safetensors")
    options: dict[str, Any] = {"device": "cuda:0", "staging": staging, "io": io}
    seen = 0
    for key, tensor in lowmem.stream(tmp_path / "m.safetensors", dtype=dtype, **options):
        # On another stream, which nobody told to wait.
        with torch.cuda.stream(torch.cuda.Stream()):
            found = tensor.cpu()
        wanted = made[key]
        if dtype != "auto" and wanted.is_floating_point():
            wanted = wanted.to(getattr(torch, dtype))
        assert found.dtype == wanted.dtype
        assert torch.equal(bits(found), bits(wanted)), key
        seen += 1
        # Its memory is given out again at once, while this stream still works with it.
        torch.cuda._sleep(100_000)
        tensor.float().mul_(2)
    assert seen == len(made)


def test_memory_that_is_still_computed_with_is_not_filled_before_that(llama: Path) -> None:
    """The caller lets go of a tensor, and loads into its memory before the device has done what it was asked for."""
    expected = reference(llama)
    for _ in range(5):
        old = [torch.ones(t.shape, dtype=t.dtype, device="cuda:0") for t in expected.values()]
        torch.cuda._sleep(200_000_000)
        for one in old:
            one.fill_(7)
        del one
        old.clear()
        state = lowmem.load(llama, device_map="cuda:0").model.state_dict()
        assert all(torch.equal(state[key].cpu(), tensor) for key, tensor in expected.items())


def test_a_load_on_a_stream_of_ones_own_is_right(llama: Path) -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        state = lowmem.load(llama, device_map="cuda:0", dtype="float32").model.state_dict()
        sums = {key: tensor.double().sum() for key, tensor in state.items()}
    stream.synchronize()
    for key, tensor in reference(llama).items():
        assert torch.equal(state[key].cpu(), tensor.float())
        assert torch.isfinite(sums[key])


@pytest.fixture(scope="module")
def gigabyte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu") / "gigabyte"
    return write_checkpoint(llama_recipe(1024 * MIB), folder, max_shard_size=400 * MIB)


@pytest.mark.parametrize("dtype", ["auto", "float32", "float16"])
def test_a_load_takes_little_besides_its_weights(gigabyte: Path, dtype: str) -> None:
    lowmem.load(gigabyte, device_map="cuda:0", dtype=dtype)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(0)
    torch.cuda.reset_peak_memory_stats(0)
    with lowmem.measure() as memory:
        result = lowmem.load(gigabyte, device_map="cuda:0", dtype=dtype)
    plan = result.plan
    assert plan.staging.slots > 1
    assert plan.staging.total <= 256 * MIB
    # What CUDA takes for itself was taken by the first load.
    assert memory.peak <= plan.host.peak + 16 * MIB
    added = torch.cuda.max_memory_allocated(0) - before
    rounded = 1024 * len(plan.placements)
    assert added <= plan.devices["cuda:0"].peak + rounded
    assert added <= plan.devices["cuda:0"].resident + 64 * MIB + rounded
    # What torch's cache took of the device is no more than pieces that do not fit.
    assert torch.cuda.max_memory_reserved(0) <= before + plan.devices["cuda:0"].resident * 1.1 + 128 * MIB
    state = result.model.state_dict()
    for key, tensor in reference(gigabyte).items():
        wanted = tensor if dtype == "auto" else tensor.to(getattr(torch, dtype))
        assert torch.equal(bits(state[key]), bits(wanted)), key


def test_pinned_memory_goes_back_when_a_load_ends(llama: Path) -> None:
    """Also after an error: else the kernel would not give these addresses out again."""
    from lowmem.memory import anonymous_memory

    lowmem.load(llama, device_map="cuda:0")
    gc.collect()
    before = anonymous_memory()
    for _ in range(20):
        lowmem.load(llama, device_map="cuda:0")
        tensors = lowmem.stream(llama, device="cuda:0")
        next(tensors)
        tensors.close()
    gc.collect()
    assert anonymous_memory() - before <= 32 * MIB


def test_memory_that_cannot_be_pinned_serves_as_well(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StreamBackend, "pin", lambda self, memory: False)
    state = lowmem.load(llama, device_map="cuda:0", dtype="float32").model.state_dict()
    assert all(torch.equal(state[key].cpu(), tensor.float()) for key, tensor in reference(llama).items())


def test_a_refusal_to_pin_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = StreamBackend(torch.device("cuda", 0), torch.cuda, patient=True)
    memory = torch.empty(8 * MIB, dtype=torch.uint8)
    assert backend.pin(memory)
    # Twice is one of the things that CUDA refuses.
    assert not backend.pin(memory)
    assert torch.ones(3, device="cuda:0").sum().item() == 3
    backend.unpin(memory)
    backend.unpin(memory)
    assert torch.ones(3, device="cuda:0").sum().item() == 3


def test_a_device_that_is_full_is_told_of_and_left_as_it_was(llama: Path) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(0)
    taken = torch.cuda.mem_get_info(0)
    torch.cuda.set_per_process_memory_fraction((before + 40 * MIB) / taken[1], 0)
    try:
        with pytest.raises(lowmem.BudgetError, match="cuda:0 refused"):
            lowmem.load(llama, device_map="cuda:0", dtype="float32")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
    gc.collect()
    assert torch.cuda.memory_allocated(0) - before <= MIB
    assert lowmem.load(llama, device_map="cuda:0").model is not None


def test_only_the_devices_that_are_filled_are_used(llama: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    state = lowmem.load(llama, device_map="cuda:1", dtype="float32").model.state_dict()
    assert all(torch.equal(state[key].cpu(), tensor.float()) for key, tensor in reference(llama).items())
    assert all(tensor.device == torch.device("cuda", 1) for tensor in state.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_fused_experts_are_put_together_on_the_device(saved: Callable[..., Path], dtype: str) -> None:
    folder = saved("qwen3-moe", "float32", "20KB")
    there = lowmem.load(folder, device_map="cuda:0", dtype=dtype).model.state_dict()
    here = lowmem.load(folder, dtype=dtype, residency="copy").model.state_dict()
    assert all(torch.equal(bits(there[name]), bits(tensor)) for name, tensor in here.items())


def test_views_of_a_pickle_are_gathered_on_the_device(tmp_path: Path) -> None:
    made = {"t": torch.randn(700, 900).t(), "s": torch.randn(900, 1000)[:, ::3], "b": torch.randn(64, 3, 5, 7)}
    made["b"] = made["b"].to(memory_format=torch.channels_last)
    torch.save(made, tmp_path / "m.bin")
    for dtype in ("auto", "float64", "float16"):
        for key, tensor in lowmem.stream(tmp_path / "m.bin", device="cuda:0", dtype=dtype):
            wanted = made[key] if dtype == "auto" else made[key].to(getattr(torch, dtype))
            assert torch.equal(tensor.cpu(), wanted), key


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
    options: dict[str, Any] = {"device_map": device_map, "quantize": "int8", "offload_folder": tmp_path}
    by_hooks: Any = lowmem.load(llama, dispatch="accelerate", **options).model
    brought: Any = lowmem.load(llama, **options).model
    with torch.no_grad():
        expected = whole(ids).logits
        for _ in range(2):
            assert torch.equal(by_hooks(ids).logits, expected)
            # Layers that are brought are an Int8Linear, which does not round activations to int8 as bitsandbytes does.
            found = brought(ids).logits
            assert (found - expected).abs().max() < 0.1 * expected.abs().max()


# Weights that are elsewhere, and are brought to the GPU whenever they are used.


def spread(kind: str, where: str) -> dict[str, Any]:
    """All weights elsewhere; what has none is on the GPU."""
    layers = 2 if kind == "qwen3-moe" else 3
    half = {f"model.layers.{n}": "cpu" for n in range(layers // 2, layers)} | {"lm_head": "cpu"}
    return {"": "cpu" if where == "cpu" else "disk", "model.rotary_emb": 0} | (half if where == "half" else {})


def tokens_of(model: Any) -> torch.Tensor:
    ids = torch.tensor([[5, 9, 11, 4]], device="cuda:0")
    found: torch.Tensor = model.generate(ids, max_new_tokens=32, min_new_tokens=32, do_sample=False)
    return found


@pytest.mark.parametrize("room", ["60KiB", None])
@pytest.mark.parametrize("where", ["disk", "cpu", "half"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen3-moe"])
def test_a_model_elsewhere_computes_as_the_whole_one_on_the_gpu(
    saved: Callable[..., Path], kind: str, dtype: str, where: str, room: str | None
) -> None:
    folder = saved(kind, "float32", "20KB")
    options: dict[str, Any] = {"dtype": dtype}
    if kind == "qwen3-moe":
        # One product for each expert: that of several at once may sum in another order than that of one.
        options["experts_implementation"] = "eager"
    whole: Any = lowmem.load(folder, device_map="cuda:0", **options).model
    limits = None if room is None else {0: room}
    model: Any = lowmem.load(folder, device_map=spread(kind, where), max_memory=limits, **options).model
    ids = torch.tensor([[3, 8, 90, 41, 7], [1, 2, 3, 4, 5]], device="cuda:0")
    with torch.inference_mode():
        for _ in range(3):
            assert torch.equal(model(ids).logits, whole(ids).logits)
    assert torch.equal(tokens_of(model), tokens_of(whole))


@pytest.mark.parametrize("where", ["disk", "cpu"])
def test_experts_that_are_multiplied_at_once_are_as_those_of_the_whole_model(
    saved: Callable[..., Path], where: str
) -> None:
    folder = saved("qwen3-moe", "float32", "20KB")
    whole: Any = lowmem.load(folder, device_map="cuda:0", dtype="bfloat16").model
    model: Any = lowmem.load(folder, device_map=spread("qwen3-moe", where), dtype="bfloat16").model
    ids = torch.tensor([[3, 8, 90, 41, 7]], device="cuda:0")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, whole(ids).logits, rtol=0.05, atol=0.05)


def test_inputs_in_host_memory_give_results_there(saved: Callable[..., Path]) -> None:
    model: Any = lowmem.load(saved("llama"), device_map=spread("llama", "disk")).model
    ids = torch.tensor([[3, 8, 90]])
    with torch.no_grad():
        found, there = model(ids).logits, model(ids.to("cuda:0")).logits
    assert found.device.type == "cpu"
    assert there.device.type == "cuda"
    assert torch.equal(found, there.cpu())


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("where", ["disk", "cpu"])
def test_device_memory_of_the_forward_stays_within_the_plan(llama: Path, where: str, dtype: str) -> None:
    ids = torch.arange(1, 9, device="cuda:0")[None]

    def added_by(model: Any) -> int:
        with torch.no_grad():
            model(ids)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated(0)
            torch.cuda.reset_peak_memory_stats(0)
            for _ in range(3):
                model(ids)
            return torch.cuda.max_memory_allocated(0) - before

    whole = lowmem.load(llama, device_map="cuda:0", dtype=dtype).model
    activations = added_by(whole)
    del whole
    gc.collect()
    before = torch.cuda.memory_allocated(0)
    table = {"": where, "model.rotary_emb": 0}
    result = lowmem.load(llama, device_map=table, dtype=dtype, max_memory={0: "40MiB"})
    peak = added_by(result.model)
    # What the buffers hold when a forward begins is no longer added by it.
    peak = max(peak, torch.cuda.max_memory_allocated(0) - before)
    assert result.plan.running.buffers <= 40 * MIB
    # The allocator rounds: to 512 bytes, and large blocks to 2 MiB.
    assert peak <= result.plan.running.buffers + activations + 8 * MIB
    lowmem.release(result.model)
    gc.collect()
    assert torch.cuda.memory_allocated(0) - before <= MIB
    with pytest.raises(lowmem.RunningError, match="released"):
        result.model(ids)


def test_many_forwards_on_a_stream_of_ones_own_are_right(llama: Path) -> None:
    whole: Any = lowmem.load(llama, device_map="cuda:0").model
    model: Any = lowmem.load(llama, device_map={"": "disk", "model.rotary_emb": 0}, max_memory={0: "24MiB"}).model
    ids = torch.arange(1, 9, device="cuda:0")[None]
    stream = torch.cuda.Stream()
    with torch.no_grad():
        expected = whole(ids).logits
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            found = [model(ids).logits for _ in range(50)]
        stream.synchronize()
        # The default stream takes over buffers that the other one used.
        found += [model(ids).logits for _ in range(10)]
    assert all(torch.equal(logits, expected) for logits in found)


def test_several_gpus_and_the_disk_give_the_logits_of_one(llama: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    whole: Any = lowmem.load(llama, device_map="cuda:0").model
    layers = whole.config.num_hidden_layers
    parts = {f"model.layers.{i}": (0, 1, "disk", "cpu")[i % 4] for i in range(layers)}
    table = {"model.embed_tokens": 0, "model.norm": 1, "model.rotary_emb": 0, "lm_head": 1, **parts}
    spread_out: Any = lowmem.load(llama, device_map=table).model
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.equal(spread_out(ids).logits, whole(ids.to("cuda:0")).logits.cpu())
