"""Each architecture of the bench's parity matrix loads as `from_pretrained` loads it, at three dtypes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers

import lowmem
from bench import parity
from bench.architectures import ARCHITECTURES, KNOWN_FAILURES, Architecture, find_architectures, known_failure
from bench.architectures import CHANGES as CONFIG_CHANGES
from bench.comparison import differences_of, same_outputs, shared_memory_of

pytestmark = pytest.mark.usefixtures("one_thread")

RESULTS = json.loads((parity.HERE / "parity.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


def case(architecture: Architecture) -> Any:
    reason = known_failure(architecture.model_type)
    marks = [pytest.mark.xfail(strict=True, raises=AssertionError, reason=reason)] if reason else []
    return pytest.param(architecture, id=architecture.model_type, marks=marks)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", [case(one) for one in ARCHITECTURES])
def test_loads_as_from_pretrained_does(architecture: Architecture, tmp_path: Path) -> None:
    """Every tensor, tie, flag and config value, and what the model returns; from several shards."""
    row = parity.check(architecture, tmp_path)
    assert row["files"] > 1
    assert not row["problems"], row["problems"]


# ---- the table ----


def test_the_committed_table_is_what_its_results_say() -> None:
    assert (parity.HERE / "parity.md").read_text(encoding="utf-8") == parity.as_markdown(RESULTS)
    readme = (parity.HERE.parent / "README.md").read_text(encoding="utf-8")
    same = sum(not row["problems"] for row in RESULTS["rows"])
    assert f"[{same} of {len(RESULTS['rows'])} architectures](bench/parity.md)" in readme


def test_the_committed_results_are_of_these_architectures() -> None:
    """Each once, and those fail that are known to."""
    rows = {row["model_type"]: row for row in RESULTS["rows"]}
    assert len(rows) == len(RESULTS["rows"])
    assert [(row["model_type"], row["class"], row["family"]) for row in RESULTS["rows"]] == [
        (one.model_type, one.cls, one.family) for one in ARCHITECTURES
    ]
    assert {name for name, row in rows.items() if row["problems"]} == set(KNOWN_FAILURES)


def test_each_change_and_each_known_failure_is_of_an_architecture() -> None:
    names = {one.model_type for one in ARCHITECTURES}
    assert len(names) == len(ARCHITECTURES)
    assert {*CONFIG_CHANGES, *KNOWN_FAILURES} <= names


def test_the_matrix_is_wide() -> None:
    """Model types, kinds of them, checkpoints whose tensors are reshuffled on load, and models that were run."""
    rows = RESULTS["rows"]
    assert len(rows) >= 80
    families = {"text", "experts", "state-space", "encoder-decoder", "vision", "audio", "composite"}
    assert families <= {row["family"] for row in rows}
    operations = {name for row in rows for chain in row["conversions"] for name in chain.split("+")}
    assert {
        "rename",
        "MergeModulelist",
        "Concatenate",
        "Split",
        "Chunk",
        "Transpose",
        "Interleave",
        "PermuteForRope",
    } <= operations
    assert sum(bool(set(row["conversions"]) - {"rename"}) for row in rows) >= 30
    assert sum(bool(row["inputs"]) for row in rows) >= 0.85 * len(rows)
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}


def test_experts_lie_unfused_in_the_checkpoint(tmp_path: Path) -> None:
    """`save_pretrained` writes the original format, so that the conversions are exercised."""
    (mixtral,) = find_architectures(["mixtral"])
    parity.save(mixtral, tmp_path)
    keys = list(lowmem.inspect(tmp_path))
    assert [key for key in keys if key.endswith(".experts.3.w2.weight")]
    assert not [key for key in keys if "gate_up_proj" in key]
    conversions = parity.conversions_of(mixtral.build(), keys)
    assert set(conversions) == {"rename", "MergeModulelist", "MergeModulelist+Concatenate"}


def test_one_architecture_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    before = (parity.HERE / "parity.json").read_bytes()
    assert parity.main(["--only", "llama"]) == 0
    assert capsys.readouterr().out.split() == ["llama", "LlamaForCausalLM", "ok"]
    assert (parity.HERE / "parity.json").read_bytes() == before


def test_an_architecture_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parity.main(["--only", "lama"])
    assert "no architecture here is called 'lama'" in capsys.readouterr().err


# ---- the comparison itself ----


def head(model: Any) -> nn.Module:
    return model.get_submodule("lm_head")


def untie(model: Any) -> None:
    head(model).weight = nn.Parameter(head(model).weight.detach().clone())


def retype(model: Any) -> None:
    head(model).weight = nn.Parameter(head(model).weight.detach().double())


def flip_a_bit(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.data.view(torch.int32)[0, 0] ^= 1


def swap(model: Any) -> None:
    layers = model.model.layers
    layers[0].input_layernorm, layers[1].input_layernorm = layers[1].input_layernorm, layers[0].input_layernorm


DAMAGE: dict[str, Callable[[Any], Any]] = {
    "model.layers.1.mlp.up_proj.weight: expected": flip_a_bit,
    "model.layers.0.input_layernorm.weight: expected": swap,
    "lm_head.weight: expected float32 [96, 32] on cpu": retype,
    "ties: expected [['lm_head.weight', 'model.embed_tokens.weight']], found []": untie,
    "model.norm.weight: requires_grad: expected True, found False": lambda m: m.model.norm.requires_grad_(False),
    "model.layers.0: training: expected False, found True": lambda m: m.model.layers[0].train(),
    "model.rotary_emb.inv_freq: expected": lambda m: m.model.rotary_emb.inv_freq.mul_(2),
    "generation config['top_k']: expected": lambda m: setattr(m.generation_config, "top_k", 3),
    "config['rope_parameters']['rope_theta']: expected": lambda m: m.config.rope_parameters.update(rope_theta=1.0),
    "config._attn_implementation: expected 'sdpa', found 'eager'": lambda m: m.set_attn_implementation("eager"),
    "model.norm: description: expected": lambda m: setattr(m.model.norm, "variance_epsilon", 1.0),
    "names: expected ['extra'] too": lambda m: m,
}


@pytest.mark.parametrize("expected", DAMAGE)
def test_a_difference_is_found_and_named(expected: str) -> None:
    (llama,) = find_architectures(["llama"])
    config = copy.deepcopy(llama.build().config)
    config.tie_word_embeddings = True
    theirs = llama.model_class()(config).eval()
    ours = copy.deepcopy(theirs)
    for index, layer in enumerate(theirs.model.layers):
        layer.input_layernorm.weight.data.add_(index)
        ours.model.layers[index].input_layernorm.weight.data.add_(index)
    assert not list(differences_of(ours, theirs))
    DAMAGE[expected](ours)
    if "extra" in expected:
        theirs.register_buffer("extra", torch.ones(2))
    found = list(differences_of(ours, theirs))
    assert [text for text in found if expected in text], found


def test_memory_that_two_parameters_share_is_seen() -> None:
    module = nn.Linear(2, 2)
    other = nn.Linear(2, 2)
    other.weight = nn.Parameter(module.weight.detach())
    assert shared_memory_of(nn.ModuleList([module, other])) == {frozenset({"0.weight", "1.weight"})}


def test_outputs_are_compared_to_the_bit_and_nothing_is_not_equal_to_nothing() -> None:
    a, b = torch.tensor([0.0]), torch.tensor([-0.0])
    assert same_outputs({"x": [a, (b,)]}, {"x": [a, (b,)]})
    assert not same_outputs({"x": a}, {"x": b})
    assert not same_outputs({}, {})


# ---- what the matrix found ----


def test_parameters_that_a_class_freezes_are_free_once_loaded(tmp_path: Path) -> None:
    """As `from_pretrained` leaves them; a model that the caller made keeps its own flags."""
    (whisper,) = find_architectures(["whisper"])
    parity.save(whisper, tmp_path)
    made = whisper.build()
    name = "model.encoder.embed_positions.weight"
    assert not made.get_parameter(name).requires_grad
    theirs = whisper.model_class().from_pretrained(tmp_path)
    loaded = lowmem.load(tmp_path).model
    assert loaded.get_parameter(name).requires_grad is theirs.get_parameter(name).requires_grad is True
    assert not lowmem.load(tmp_path, model=made).model.get_parameter(name).requires_grad
