"""Offload folders, conversions, configs, device maps and manifests that lie: equal to the reference, or refused."""

from __future__ import annotations

import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz.chance import the_guard
from fuzz.guard import Unwatched
from fuzz.targets import Target, find
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

import lowmem
from lowmem.cli import build_parser
from lowmem.cli.options import options
from lowmem.engine.hashing import hash_all
from lowmem.planner.devices import DeviceMap, disjoint

TARGETS = ("offload-folder", "conversion", "device-map", "manifest", "config")
_READY: dict[str, Target] = {}
RUNS = int(os.environ.get("LOWMEM_FUZZ_RUNS", "8"))


@pytest.fixture(scope="module")
def folder() -> Any:
    """One folder for all executions of this file: its path is a part of what is kept."""
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def ready(name: str, folder: Path) -> Target:
    """A target whose sound inputs have run once, so that what is imported when first needed is there."""
    target = find(name)
    for data in target.seeds():
        target.run(Unwatched(), data, folder)
    return target


@pytest.mark.parametrize("name", TARGETS)
def test_every_kept_input_ends_equal_or_refused(name: str, folder: Path) -> None:
    """Whatever once broke a rule, or reached something new, breaks none now."""
    target = ready(name, folder)
    for data in target.kept():
        target.run(the_guard(), data, folder)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=RUNS, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_any_mutation_ends_equal_or_refused(name: str, folder: Path, seed: int) -> None:
    """A mutation of a sound input gives what the reference gives, or a `LowmemError`."""
    if name not in _READY:
        _READY[name] = ready(name, folder)
    target = _READY[name]
    chance = random.Random(seed)
    target.run(the_guard(), target.mutate(chance.choice(target.seeds()), chance), folder)


NAMES = st.text(st.characters(exclude_characters="\0\r/", exclude_categories=["Cs"]), min_size=1, max_size=20)


@settings(max_examples=30, deadline=None)
@given(names=st.lists(NAMES, max_size=4))
def test_a_manifest_that_was_written_is_read_again(names: list[str]) -> None:
    """Whatever the names: what `write_manifest` writes, `manifest` finds fine."""
    with tempfile.TemporaryDirectory() as made:
        model = Path(made) / "model"
        model.mkdir()
        (model / "model.safetensors").write_bytes(save({"a": torch.ones(1)}))
        for name in names:
            try:
                (model / f"x{name}.txt").write_bytes(name.encode())
            except OSError:
                continue
        manifest = Path(made) / "SHA256SUMS"
        lowmem.check(model, write_manifest=manifest)
        report = lowmem.check(model, manifest)
        assert report.is_fine, report.problems


def test_files_that_cannot_be_read_hold_no_buffers(tmp_path: Path) -> None:
    """A manifest of thousands of files that are not there takes no megabyte for each."""
    with lowmem.measure() as memory:
        found, _ = hash_all([(tmp_path / str(n), "sha256") for n in range(500)], None)
    assert all(isinstance(error, OSError) and error.__traceback__ is None for error in found.values())
    memory.assert_peak_below("64MiB")


def test_a_device_map_of_many_names_is_read_in_one_pass(tmp_path: Path) -> None:
    """A name that stands there twice among a hundred thousand is found, and not by comparing each with each."""
    names = ", ".join(f'"{n}": "cpu"' for n in range(100_000))
    file = tmp_path / "map.json"
    file.write_text(f'{{{names}, "7": "cpu"}}')
    arguments = build_parser().parse_args(["plan", "model", "--device-map", str(file)])
    with pytest.raises(lowmem.OptionError, match="'7' stands there twice"):
        options(arguments)


def test_a_map_without_the_whole_model_may_have_modules_inside_others() -> None:
    """With two accelerators the map is taken apart from the model's root, though the map does not name that."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
            self.b = nn.Linear(1, 1)

    class Made:
        model = Two()

    skeleton: Any = Made()
    table = {"a": "cuda:0", "a.1": "cuda:1", "b": "cuda:0"}
    flat = disjoint(table, skeleton)
    assert flat == {"a.0": "cuda:0", "a.1": "cuda:1", "b": "cuda:0"}
    assert all(DeviceMap(flat).of(name) == DeviceMap(table).of(name) for name in Made.model.state_dict())


def test_a_config_of_layers_without_end_is_refused(tmp_path: Path) -> None:
    """A model of many times the checkpoint's tensors is not built, whatever the config says of its layers."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(save({"a": torch.ones(4)}))
    sizes = {"vocab_size": 8, "hidden_size": 4, "intermediate_size": 8, "num_attention_heads": 2}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 90_000, **sizes}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(lowmem.ModelError, match=r"a model that 1 tensors can fill"):
        lowmem.plan(model)


def test_nothing_is_removed_where_a_link_leads(tmp_path: Path) -> None:
    """A link in the place of a conversion's hidden folder is refused; what it leads to stays."""
    model, out, other = tmp_path / "model.safetensors", tmp_path / "out", tmp_path / "other"
    model.write_bytes(save({"a": torch.ones(4)}))
    other.mkdir()
    out.mkdir()
    (other / "held").write_text("held")
    (out / ".lowmem-convert").symlink_to(other)
    with pytest.raises(lowmem.OutputError, match="found a link; remove it"):
        lowmem.convert(model, out)
    assert (other / "held").read_text() == "held"
