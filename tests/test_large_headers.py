"""The largest models, from headers alone: every key finds its place, and the bytes are what the shapes say."""

from __future__ import annotations

import json
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import transformers

import lowmem
from bench.large import deepseek_v3, deepseek_v3_fp8, llama_405b
from bench.planning import SHARD, on_a_large_machine, plan_by_phase
from lowmem.dtypes import itemsize
from lowmem.errors import OptionError
from lowmem.sizes import GIB, MIB
from lowmem.synthetic import Recipe, llama_recipe, recipe_from_config, write_checkpoint, write_headers

# As the model cards say; the second without its layer for several tokens.
LLAMA, DEEPSEEK = 405_853_388_800, 671_026_419_200
PACKAGE = str(Path(lowmem.__file__).parent)


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Path]:
    """The folder of a recipe, written once."""
    made: dict[tuple[str, int], Path] = {}

    def write(recipe: Recipe) -> Path:
        key = recipe.name, len(recipe.tensors)
        if key not in made:
            made[key] = write_headers(recipe, tmp_path_factory.mktemp(recipe.name), max_shard_size=SHARD)
        return made[key]

    return write


def llama_count(layers: int) -> int:
    """Parameters, by hand."""
    hidden, inner, shared, vocabulary = 16384, 53248, 1024, 128256
    layer = 2 * hidden * hidden + 2 * hidden * shared + 3 * hidden * inner + 2 * hidden
    return 2 * vocabulary * hidden + layers * layer + hidden


def deepseek_count(layers: int, experts: int) -> int:
    """Parameters, by hand."""
    hidden, query, latent, heads = 7168, 1536, 512, 128
    attention = hidden * query + query + query * heads * 192 + hidden * (latent + 64) + latent
    attention += latent * heads * 256 + heads * 128 * hidden
    dense, sparse = 3 * hidden * 18432, (experts + 1) * 3 * hidden * 2048 + experts * hidden + experts
    return 2 * 129280 * hidden + hidden + layers * (attention + 2 * hidden) + 3 * dense + (layers - 3) * sparse


def test_headers_are_those_of_the_whole_checkpoint(tmp_path: Path) -> None:
    """The same files with the same sizes and the same first bytes; behind these, nothing but holes."""
    recipe = llama_recipe(32 * MIB)
    whole = write_checkpoint(recipe, tmp_path / "whole", max_shard_size=9 * MIB)
    bare = write_headers(recipe, tmp_path / "bare", max_shard_size=9 * MIB)
    assert sorted(f.name for f in whole.iterdir()) == sorted(f.name for f in bare.iterdir())
    for file in whole.iterdir():
        ours = bare / file.name
        assert ours.stat().st_size == file.stat().st_size
        end = file.stat().st_size
        if file.suffix == ".safetensors":
            end = 8 + int.from_bytes(file.read_bytes()[:8], "little")
            assert not any(ours.read_bytes()[end:])
            if sys.platform == "linux":
                assert ours.stat().st_blocks * 512 <= 64 * 1024
        assert ours.read_bytes()[:end] == file.read_bytes()[:end]


def test_headers_are_refused_where_there_are_files(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OptionError, match="expected a new or empty folder"):
        write_headers(llama_recipe(MIB), tmp_path, max_shard_size=GIB)


def test_headers_may_be_larger_than_the_disk(tmp_path: Path) -> None:
    """What a hole holds needs no space: 8 TiB in two files."""
    recipe = Recipe("r", {}, (("a", (2**41,)), ("b", (2**41,))))
    found = lowmem.inspect(write_headers(recipe, tmp_path / "new", max_shard_size=2**42))
    assert [entry.nbytes for entry in found.values()] == [2**42, 2**42]


@pytest.mark.parametrize("make", [lambda: llama_405b(layers=2), lambda: deepseek_v3(layers=5, experts=16)])
def test_recipes_are_what_transformers_saves(make: Callable[[], Recipe]) -> None:
    """Names and shapes from arithmetic are those of the class, its own conversions reverted."""
    recipe = make()
    config = transformers.AutoConfig.for_model(**recipe.config)
    assert dict(recipe.tensors) == dict(recipe_from_config(config).tensors)


def test_the_whole_llama(headers: Callable[[Recipe], Path]) -> None:
    """191 files of bf16: all of it can be mapped, and nothing is read or copied."""
    assert llama_count(126) == LLAMA
    source = headers(llama_405b())
    plan = lowmem.plan(source)
    assert (len(plan.checkpoint), len(plan.checkpoint.shards)) == (1137, 191)
    assert not plan.mapping.missing
    assert not plan.mapping.unexpected
    assert not plan.warnings
    assert plan.host.mapped == 2 * LLAMA
    assert plan.devices["cpu"].weights == 2 * LLAMA
    # 64 frequencies in fp32, twice.
    assert plan.host.resident == 2 * 4 * 64


def test_the_whole_deepseek(headers: Callable[[Recipe], Path]) -> None:
    """45,395 tensors: experts are fused, and every element of the model is fed once."""
    assert deepseek_count(61, 256) == DEEPSEEK
    source = headers(deepseek_v3())
    with on_a_large_machine():
        plan, seconds = plan_by_phase(source)
        assert lowmem.plan(source).host == plan.host
    assert set(seconds) == {"headers", "config", "build", "map", "place", "collector"}
    assert len(plan.checkpoint) == 45395
    assert not plan.mapping.missing
    assert not plan.mapping.unexpected
    assert not plan.warnings
    fused = {p.target: p for p in plan.placements if len(p.links) > 1}
    assert Counter(len(p.links) for p in fused.values()) == {512: 58, 256: 58}
    for placement in plan.placements:
        assert placement.nbytes == placement.source_elements * itemsize(placement.dtype)
        regions = sorted((link.region.offset, link.region.count) for link in placement.links)
        ends = [offset + count for offset, count in regions]
        assert [offset for offset, _ in regions] == [0, *ends[:-1]]
    # What corrects the scores is fp32 in the files; the model may have it otherwise.
    assert sum(p.source_elements for p in plan.placements) == DEEPSEEK
    assert sum(p.source_bytes for p in plan.placements) == 2 * DEEPSEEK + 2 * 58 * 256
    copied = sum(p.nbytes for p in plan.placements if p.residency == "copy")
    experts = 58 * 256 * 3 * 7168 * 2048 * 2
    assert experts <= copied <= experts + 4 * 58 * 256
    assert sum(p.nbytes for p in fused.values()) == experts
    assert plan.host.resident == copied + 2 * 4 * 32


def test_fp8_as_it_is_published_can_be_inspected(headers: Callable[[Recipe], Path]) -> None:
    """90,427 tensors; a block of 128 x 128 has one scale, and blocks at the edges too."""
    found = lowmem.inspect(headers(deepseek_v3_fp8()))
    assert len(found) == 90427
    key = "model.layers.60.self_attn.kv_a_proj_with_mqa.weight"
    assert (found[key].dtype, found[key].shape) == ("float8_e4m3fn", (576, 7168))
    assert (found[f"{key}_scale_inv"].dtype, found[f"{key}_scale_inv"].shape) == ("float32", (5, 56))


def test_a_plan_takes_what_it_says(headers: Callable[[Recipe], Path]) -> None:
    """All that Python has meanwhile, the model on meta too, is within the plan's own overhead."""
    source = headers(deepseek_v3(layers=11, experts=256))
    with on_a_large_machine():
        lowmem.plan(source)
        tracemalloc.start()
        try:
            plan = lowmem.plan(source)
            held, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert len(plan.checkpoint) > 6000
    assert held <= peak <= plan.host.overhead


def own_calls(source: Path) -> int:
    """How many functions the package itself calls to plan, those in C included; transformers' calls are its own."""
    count = 0

    def see(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call") and frame.f_code.co_filename.startswith(PACKAGE)

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        lowmem.plan(source)
    finally:
        sys.setprofile(before)
    return count


def test_an_expert_costs_few_calls(headers: Callable[[Recipe], Path]) -> None:
    """Whatever a clock says: so many calls for each tensor more, of 45,395."""
    few, many = (headers(deepseek_v3(layers=5, experts=experts)) for experts in (64, 256))
    with on_a_large_machine():
        lowmem.plan(few)
        more = own_calls(many) - own_calls(few)
    tensors = len(json.loads((many / "model.safetensors.index.json").read_text())["weight_map"])
    tensors -= len(json.loads((few / "model.safetensors.index.json").read_text())["weight_map"])
    assert more / tensors <= 70


@pytest.mark.parametrize("first", ["{}", "5", '{"\\u0064type":"U8","\\u0073hape":[1],"data_off\\u0073ets":[0,1]}'])
def test_a_key_that_stands_twice_is_known_whatever_it_stands_for(first: str, tmp_path: Path) -> None:
    """Also where the first of the two lacks its fields, or they are written with escapes."""
    header = f'{{"a":{first},"a":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}}}'.encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    with pytest.raises(lowmem.CheckpointError, match="'a' appears twice"):
        lowmem.inspect(tmp_path / "model.safetensors")
