"""Synthetic checkpoints: what is written is what transformers and safetensors expect, in bounded memory."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lowmem.checkpoint.safetensors import read_shard
from lowmem.errors import ModelError, OptionError
from lowmem.sizes import GIB, MIB
from lowmem.synthetic import Recipe, llama_recipe, plan_shards, recipe_from_config, write_checkpoint

ROOT = Path(__file__).parents[1]
TINY_QWEN = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [1],
}


def qwen_recipe(**changes: Any) -> Recipe:
    transformers = pytest.importorskip("transformers")
    return recipe_from_config(transformers.Qwen3MoeConfig(**{**TINY_QWEN, **changes}))


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


@pytest.mark.parametrize("kind", ["llama", "qwen3-moe", "qwen3-moe-tied"])
def test_transformers_loads_it(kind: str, tmp_path: Path) -> None:
    """from_pretrained finds every key and no other, and the model runs."""
    transformers = pytest.importorskip("transformers")
    recipe = llama_recipe(8 * MIB) if kind == "llama" else qwen_recipe(tie_word_embeddings=kind.endswith("tied"))
    write_checkpoint(recipe, tmp_path, max_shard_size=max(recipe.nbytes // 3, 1))
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(model).__name__ == recipe.config["architectures"][0]
    assert model.dtype == torch.bfloat16
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
    assert torch.equal(model.model.embed_tokens.weight, load_all(tmp_path)["model.embed_tokens.weight"])


@pytest.mark.parametrize("kind", ["llama-tied", "qwen3-moe", "qwen3-moe-tied"])
def test_recipe_is_what_save_pretrained_writes(kind: str, tmp_path: Path) -> None:
    """Keys, shapes, dtype and config.json equal those of a real model that transformers saves."""
    transformers = pytest.importorskip("transformers")
    if kind == "llama-tied":
        config = transformers.LlamaConfig(**{**llama_recipe(4 * MIB).config, "tie_word_embeddings": True})
    else:
        config = transformers.Qwen3MoeConfig(**TINY_QWEN, tie_word_embeddings=kind.endswith("tied"))
    recipe = recipe_from_config(config)
    assert ("lm_head.weight" in dict(recipe.tensors)) == (not config.tie_word_embeddings)

    build = getattr(transformers, config.architectures[0])
    build(config).to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    ours = write_checkpoint(recipe, tmp_path / "ours", max_shard_size=GIB)
    expected = {key: (t.shape, t.dtype) for key, t in load_all(tmp_path / "theirs").items()}
    assert {key: (t.shape, t.dtype) for key, t in load_all(ours).items()} == expected
    theirs = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert json.loads((ours / "config.json").read_text()) == theirs


def test_experts_are_written_one_by_one() -> None:
    """Qwen3-MoE has a tensor for each projection of each expert, and none that is fused."""
    shapes = dict(qwen_recipe().tensors)
    for layer in (0, 2):
        for expert in range(4):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}"
            assert shapes[f"{prefix}.gate_proj.weight"] == shapes[f"{prefix}.up_proj.weight"] == (16, 32)
            assert shapes[f"{prefix}.down_proj.weight"] == (32, 16)
    assert not any("gate_up_proj" in key for key in shapes)


@pytest.mark.parametrize("size", [MIB, 4 * MIB, 8 * MIB, 64 * MIB, GIB, 100 * GIB])
def test_llama_recipe_equals_transformers(size: int) -> None:
    """The names and shapes from arithmetic are those of the class, in the same order."""
    transformers = pytest.importorskip("transformers")
    recipe = llama_recipe(size)
    reference = recipe_from_config(transformers.LlamaConfig(**recipe.config))
    assert recipe.tensors == reference.tensors
    assert reference.dtype == recipe.dtype


@given(st.integers(MIB, 200 * GIB))
def test_llama_recipe_has_the_size_asked_for(size: int) -> None:
    """Within 2 % for any size, with a valid number of heads."""
    recipe = llama_recipe(size)
    assert abs(recipe.nbytes - size) <= 0.02 * size
    config = recipe.config
    assert config["hidden_size"] == config["num_attention_heads"] * config["head_dim"]
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0


@pytest.mark.parametrize("size", [4 * MIB, 64 * MIB, GIB, 100 * GIB])
def test_llama_recipe_has_the_shape_of_a_llama(size: int) -> None:
    """More than one layer, and an MLP wider than the model."""
    config = llama_recipe(size).config
    assert config["num_hidden_layers"] >= 2
    assert 2 <= config["intermediate_size"] / config["hidden_size"] <= 5


def test_llama_recipe_refuses_what_is_too_small() -> None:
    with pytest.raises(OptionError, match=r"at least 1 MiB for a Llama, found 10 B"):
        llama_recipe(10)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 100))
def test_shards_are_planned_as_transformers_does(sizes: list[int], limit: int) -> None:
    """The plan equals that of huggingface_hub, which save_pretrained uses."""
    recipe = Recipe("r", {}, tuple((f"t{n}", (size,)) for n, size in enumerate(sizes)))
    state = {key: torch.empty(shape, dtype=torch.bfloat16) for key, shape in recipe.tensors}
    split = split_torch_state_dict_into_shards(state, max_shard_size=limit)
    assert plan_shards(recipe, limit) == [list(keys) for keys in split.filename_to_tensors.values()]


def test_shards_and_index(tmp_path: Path) -> None:
    """Shards respect the limit unless one tensor exceeds it; the index names every tensor and the total."""
    recipe = llama_recipe(8 * MIB)
    limit = MIB
    folder = write_checkpoint(recipe, tmp_path / "new" / "folder", max_shard_size=limit)
    files = sorted(folder.glob("*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert [f.name for f in files] == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    assert index["metadata"] == {"total_size": recipe.nbytes}
    assert set(index["weight_map"]) == {key for key, _ in recipe.tensors}
    for file in files:
        shard, entries = read_shard(file)
        assert shard.metadata == {"format": "pt"}
        assert sum(e.nbytes for e in entries) <= limit or len(entries) == 1
        assert all(index["weight_map"][e.key] == file.name for e in entries)
    assert json.loads((folder / "config.json").read_text()) == recipe.config
    assert json.loads((folder / "generation_config.json").read_text()) == recipe.generation_config


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    write_checkpoint(Recipe("r", {}, (("w", (2, 3)),)), tmp_path, max_shard_size=1)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "float8_e4m3fn"])
def test_values(dtype: str, tmp_path: Path) -> None:
    """Matrices are normal and differ, also within a tensor; norm weights are ones; biases are zeros."""
    tensors = (
        ("layers.0.weight", (2048, 1536)),
        ("layers.1.weight", (2048, 1536)),
        ("layers.0.bias", (700_000,)),
        ("input_layernorm.weight", (700_000,)),
        ("ln_f.weight", (5,)),
        ("scale", ()),
        ("none.weight", (0, 4)),
        ("steps", (3,)),
    )
    recipe = Recipe("r", {}, tensors, dtype, dtypes={"steps": "int64"})
    write_checkpoint(recipe, tmp_path, max_shard_size=GIB)
    state = load_file(tmp_path / "model.safetensors")
    assert {key: tuple(t.shape) for key, t in state.items()} == dict(tensors)
    assert state.pop("steps").equal(torch.zeros(3, dtype=torch.int64))
    assert {t.dtype for t in state.values()} == {getattr(torch, dtype)}
    values = {key: t.float() for key, t in state.items()}
    first, second = values["layers.0.weight"], values["layers.1.weight"]
    assert first.std().item() == pytest.approx(0.02, rel=0.02)
    assert first.mean().item() == pytest.approx(0, abs=1e-4)
    assert not torch.equal(first, second)
    assert len(torch.unique(torch.cat([first, second]), dim=0)) == 4096
    assert (values["layers.0.bias"] == 0).all()
    assert (values["input_layernorm.weight"] == 1).all()
    assert (values["ln_f.weight"] == 1).all()


def test_values_depend_on_recipe_and_seed_only(tmp_path: Path) -> None:
    """Another sharding holds the same tensors, another seed holds others, and all matrices differ."""
    recipe = llama_recipe(16 * MIB)
    whole = load_all(write_checkpoint(recipe, tmp_path / "a", max_shard_size=GIB))
    parts = load_all(write_checkpoint(recipe, tmp_path / "b", max_shard_size=2 * MIB))
    other = load_all(write_checkpoint(recipe, tmp_path / "c", max_shard_size=GIB, seed=1))
    assert whole.keys() == parts.keys() == dict(recipe.tensors).keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    matrices = [key for key in whole if whole[key].ndim == 2]
    assert not any(torch.equal(whole[key], other[key]) for key in matrices)
    assert len({whole[key].view(torch.uint8).numpy().tobytes() for key in matrices}) == len(matrices)


def test_safetensors_writes_the_same_bytes(tmp_path: Path) -> None:
    """The data of a file is laid out as safetensors' save_file lays it out."""
    recipe = Recipe("r", {}, (("b", (3, 5)), ("a", (7,)), ("n", (2,)), ("c.weight", (11, 2))), dtypes={"n": "int64"})
    ours = write_checkpoint(recipe, tmp_path / "ours", max_shard_size=GIB) / "model.safetensors"
    save_file(load_file(ours), tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    entries = [
        [(e.key, e.offset - shard.data_offset, e.nbytes) for e in table]
        for shard, table in map(read_shard, (ours, tmp_path / "theirs.safetensors"))
    ]
    assert entries[0] == entries[1]


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    """Progress grows from tensor to tensor and ends at the size of the recipe."""
    recipe = llama_recipe(8 * MIB)
    calls: list[tuple[int, int]] = []
    write_checkpoint(recipe, tmp_path, max_shard_size=2 * MIB, progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert {total for _, total in calls} == {recipe.nbytes}
    assert calls[-1][0] == recipe.nbytes


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("share", [0, 0.6, 1])
def test_interruption_leaves_nothing(share: float, error: type[BaseException], tmp_path: Path) -> None:
    """No temporary file, no shard, no index; a folder that was there stays, one that was made goes."""

    def stop(done: int, total: int) -> None:
        if done >= share * total:
            raise error("stop")

    (tmp_path / "there").mkdir()
    for folder in (tmp_path / "there", tmp_path / "made"):
        with pytest.raises(error, match="stop"):
            write_checkpoint(llama_recipe(8 * MIB), folder, max_shard_size=2 * MIB, progress=stop)
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]


def test_unserializable_config_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_checkpoint(Recipe("r", {"dtype": torch.float32}, (("w", (2,)),)), tmp_path, max_shard_size=MIB)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_files_is_refused(tmp_path: Path) -> None:
    """Nothing is overwritten, and nothing of what was there is removed."""
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OptionError, match="expected a new or empty folder, found files in it"):
        write_checkpoint(llama_recipe(4 * MIB), tmp_path, max_shard_size=GIB)
    with pytest.raises(OptionError, match="expected a folder, found a file"):
        write_checkpoint(llama_recipe(4 * MIB), tmp_path / "mine.txt", max_shard_size=GIB)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["mine"]


def test_a_full_disk_is_noticed_first(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"the checkpoint needs 1024\.00 TiB, the disk has"):
        write_checkpoint(Recipe("r", {}, (("w", (2**49,)),)), tmp_path / "new", max_shard_size=GIB)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("recipe", "limit", "text"),
    [
        (Recipe("r", {}, (("w", (2,)),)), 0, "max_shard_size: expected at least 1 byte, found 0"),
        (Recipe("r", {}, ()), 1, "recipe 'r': expected tensors, found none"),
        (Recipe("r", {}, (("w", (2,)), ("w", (3,)))), 1, "a key appears twice among its 2 tensors"),
        (Recipe("r", {}, (("w", (2,)),), "int8"), 1, "expected a float such as 'bfloat16', found 'int8'"),
        (
            Recipe("r", {}, (("w", (2,)),), dtypes={"w": "qint8"}),
            1,
            "tensor 'w': safetensors cannot hold dtype 'qint8'",
        ),
    ],
)
def test_unusable_recipes(recipe: Recipe, limit: int, text: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=text):
        write_checkpoint(recipe, tmp_path / "new", max_shard_size=limit)
    assert not (tmp_path / "new").exists()


def test_a_configuration_without_a_class_is_refused() -> None:
    transformers = pytest.importorskip("transformers")
    for architectures in (None, ["NoSuchModel"]):
        with pytest.raises(ModelError, match="expected the name of a transformers class first"):
            recipe_from_config(transformers.LlamaConfig(architectures=architectures))


def test_integer_buffers_keep_their_dtype() -> None:
    """What is not a float is not written as one, and the caller's configuration stays as it was."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        architectures=["ResNetModel"], embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic"
    )
    recipe = recipe_from_config(config, dtype="float32")
    counters = {key for key, _ in recipe.tensors if key.endswith("num_batches_tracked")}
    assert counters
    assert recipe.dtypes == dict.fromkeys(counters, "int64")
    assert config.dtype is None


_CHILD = """
import resource, sys
import torch
from pathlib import Path
from lowmem.synthetic import Recipe, write_checkpoint

MIB = 1024**2
torch.set_num_threads(1)
torch.empty(1000).normal_().to(torch.bfloat16).view(torch.uint8).numpy()  # what torch itself sets up on first use
used = next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").open() if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used + 40 * MIB, used + 40 * MIB))
try:
    bytearray(48 * MIB)
except MemoryError:
    pass
else:
    sys.exit(77)
tensors = (("big.weight", (8192, 16384)), *((f"small.{n}.weight", (4, 64)) for n in range(1000)))
write_checkpoint(Recipe("r", {}, tensors), sys.argv[1], max_shard_size=int(sys.argv[2]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA bounds anonymous memory on Linux only")
@pytest.mark.parametrize("limit", [MIB, GIB])
def test_memory_is_bounded(limit: int, tmp_path: Path) -> None:
    """A tensor of 256 MiB is written where the kernel grants 40 MiB of data over torch itself."""
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(out), str(limit)], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode == 77:
        pytest.skip("the kernel does not enforce RLIMIT_DATA")
    assert done.returncode == 0, done.stderr
    assert sum(f.stat().st_size for f in out.glob("*.safetensors")) > 256 * MIB


def test_importing_it_imports_no_torch() -> None:
    """The module is light: torch and transformers are imported when they are used."""
    code = "import sys, lowmem.synthetic; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("bench.make_checkpoint")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-1b", 1_235_814_400),  # as the model cards say
        ("llama-3b", 3_212_749_824),
        ("qwen3-moe", 1_200_000_000),
        ("one-3gb-tensor", 1_500_000_000),
        ("many-small", 30_000 * 20 * 128),
    ],
)
def test_bench_recipes_have_their_size(name: str, parameters: int, bench: ModuleType) -> None:
    pytest.importorskip("transformers")
    recipe = bench.RECIPES[name][0]("bfloat16")
    assert recipe.nbytes == pytest.approx(2 * parameters, rel=1e-9 if name.startswith(("llama", "one")) else 0.02)
    assert recipe.config.get("dtype", "bfloat16") == "bfloat16"


def test_bench_tensor_has_3_gb_in_any_dtype(bench: ModuleType) -> None:
    assert {bench.one_3gb_tensor(dtype).nbytes for dtype in bench.DTYPES} == {3_000_000_000}


def test_bench_prints_one_line(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command writes the checkpoint and says so; what cannot be written is a usage error."""
    small = Recipe("small", {}, (("a.weight", (8, 8)), ("b.weight", (8, 8))), "float32")
    monkeypatch.setitem(bench.RECIPES, "many-small", (lambda dtype: small, ""))
    command = ["many-small", str(tmp_path / "out"), "--max-shard-size", "256B", "--dtype", "float32", "--seed", "3"]
    assert bench.main(command) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "small, 2 tensors, float32, 0.00 GB, 2 files" in out
    with pytest.raises(SystemExit, match="2"):
        bench.main(command)
    assert "expected a new or empty folder" in capsys.readouterr().err
