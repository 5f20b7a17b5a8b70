"""Loads by several ranks that stand on what was before: models that have run, int8 layers, chance, ties, page cache."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_processes import run_ranks
from safetensors.torch import save_file
from torch import nn

import lowmem
from lowmem._page_cache import cached_share

dist = pytest.importorskip("torch.distributed")
if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)


def floats(device: str = "meta") -> nn.Module:
    inner = nn.Sequential(nn.Linear(24, 7, device=device), nn.LayerNorm(7, device=device))
    return nn.Sequential(nn.Linear(16, 24, device=device), inner)


def int8s() -> nn.Module:
    inner = nn.Sequential(lowmem.Int8Linear(24, 7, device="meta"), nn.LayerNorm(7, device="meta"))
    return nn.Sequential(lowmem.Int8Linear(16, 24, device="meta"), inner)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Embedding(30, 8, device="meta")
        self.out = nn.Linear(8, 30, bias=False, device="meta")
        self.out.weight = self.inside.weight


def sharded(model: nn.Module, mesh: Any = None) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    # A tied parameter is one only inside of one group.
    for child in [] if isinstance(model, Tied) else list(model.children())[1:]:
        fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def by_columns(model: nn.Module) -> nn.Module:
    """Matrices divided along their columns, the rest whole on each rank."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for module in model.modules():
        for leaf, old in list(module._parameters.items()):
            if old is not None:
                where = Shard(1) if old.dim() == 2 else Replicate()
                whole = distribute_tensor(old, mesh, [where], src_data_rank=None)
                module._parameters[leaf] = nn.Parameter(whole, requires_grad=old.requires_grad)
    return model


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("weight_format")}
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()}


def error_of(*args: Any, **options: Any) -> str:
    try:
        lowmem.load(*args, **options)
    except lowmem.LowmemError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def job(rank: int, folder: str) -> dict[str, Any]:
    """All that is looked at, on one rank."""
    torch.manual_seed(rank)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(5))
    found: dict[str, Any] = {}

    model = sharded(floats())
    outputs = []
    for name in ("a", "b", "a"):
        lowmem.load(f"{folder}/{name}.safetensors", model=model, residency="copy")
        outputs.append(model(x).detach().clone())
        model(x).sum().backward()
    found["run"] = outputs

    model = sharded(int8s())
    result = lowmem.load(f"{folder}/int8.safetensors", model=model, residency="copy")
    found["int8 rows"] = whole(model), sum(result.report.read.values()), result.plan.devices["cpu"].weights
    with torch.no_grad():
        found["int8 forward"] = model(x)
    model = by_columns(int8s())
    result = lowmem.load(f"{folder}/int8.safetensors", model=model, residency="copy")
    found["int8 columns"] = whole(model), sum(result.report.read.values()), result.plan.devices["cpu"].weights
    found["dequantised"] = whole(
        lowmem.load(f"{folder}/int8.safetensors", model=sharded(floats()), dequantize=True, dtype="float32").model
    )
    found["quantised"] = error_of(f"{folder}/a.safetensors", model=sharded(floats()), quantize="int8")
    found["int8 of floats"] = error_of(f"{folder}/int8.safetensors", model=sharded(floats()))
    found["across"] = error_of(f"{folder}/int8.safetensors", model=by_columns(floats()), dequantize=True)

    mesh = dist.init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    loaded = lowmem.load(f"{folder}/a.safetensors", model=sharded(floats(), mesh), strict=False, skip=["0.*", "1.1.*"])
    found["chance"] = whole(loaded.model)

    crossed = torch.distributed.device_mesh.DeviceMesh("cpu", [1, 0])
    found["crossed"] = error_of(f"{folder}/a.safetensors", model=sharded(floats(), crossed))
    elsewhere = {"": "cpu"} if rank == 0 else {"": "cpu", "1": "disk"}
    options: dict[str, Any] = {"read": "once", "residency": "copy"}
    found["apart"] = error_of(f"{folder}/a.safetensors", model=floats(), device_map=elsewhere, **options)
    lowmem.load(f"{folder}/a.safetensors", model=(plain := floats()), **options)
    found["once"] = whole(plain)

    # Divided by a part of a mesh: along the other dimension ranks hold the same.
    both = dist.init_device_mesh("cpu", (1, 2), mesh_dim_names=("shard", "along"))
    model = sharded(floats(), both["shard"])
    result = lowmem.load(f"{folder}/a.safetensors", model=model, strict=False, only=["1"], **options)
    found["along"] = whole(model), sum(result.report.read.values()), result.plan.rank.members

    found["tied"] = whole(lowmem.load(f"{folder}/tied.safetensors", model=sharded(Tied())).model)
    found["untied"] = error_of(f"{folder}/untied.safetensors", model=sharded(Tied()))
    return changed(found, torch.Tensor, lambda tensor: tensor.detach().numpy())  # type: ignore[no-any-return]


def changed(value: Any, kind: type, how: Callable[[Any], Any]) -> Any:
    """Everything of a kind inside: tensors stay behind when a process ends, arrays travel."""
    if isinstance(value, dict):
        return {key: changed(one, kind, how) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(changed(one, kind, how) for one in value)
    return how(value) if isinstance(value, kind) else value


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("kept")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        save_file(floats("cpu").state_dict(), folder / f"{name}.safetensors")
    made = lowmem.load(folder / "a.safetensors", model=lambda: floats("cpu"), quantize="int8").model
    state = {k: v.contiguous() for k, v in made.state_dict().items() if not k.endswith("weight_format")}
    save_file(state, folder / "int8.safetensors")
    words = torch.randn(30, 8)
    save_file({"inside.weight": words, "out.weight": words.clone()}, folder / "tied.safetensors")
    other = words.clone()
    other[-1, -1] += 1
    save_file({"inside.weight": words, "out.weight": other}, folder / "untied.safetensors")
    found = run_ranks(2, job, os.fspath(folder))
    assert all(isinstance(one, dict) for one in found), found
    return folder, changed(found, np.ndarray, torch.from_numpy)


Ranks = tuple[Path, list[dict[str, Any]]]


def test_a_model_that_has_run_computes_with_the_new_weights(ranks: Ranks) -> None:
    folder, found = ranks
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(5))
    for name, *outputs in zip("aba", *(one["run"] for one in found), strict=True):
        alone = lowmem.load(folder / f"{name}.safetensors", model=lambda: floats("cpu")).model
        assert all(torch.equal(output, alone(x)) for output in outputs)


@pytest.mark.parametrize("how", ["int8 rows", "int8 columns"])
def test_int8_layers_are_divided_along_rows_and_columns(ranks: Ranks, how: str) -> None:
    folder, found = ranks
    alone = whole(lowmem.load(folder / "int8.safetensors", model=int8s()).model)
    for one in found:
        state, read, weights = one[how]
        assert state.keys() == alone.keys()
        assert all(torch.equal(state[key], alone[key]) for key in alone)
        assert read <= 1.02 * weights


def test_int8_layers_compute_under_fully_shard_as_alone(ranks: Ranks) -> None:
    folder, found = ranks
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(5))
    alone = int8s()
    lowmem.load(folder / "int8.safetensors", model=alone)
    for one in found:
        assert torch.allclose(one["int8 forward"], alone(x), atol=1e-5)


def test_int8_becomes_floats_on_each_rank_as_on_one(ranks: Ranks) -> None:
    folder, found = ranks
    alone = lowmem.load(folder / "int8.safetensors", model=lambda: floats("cpu"), dequantize=True, dtype="float32")
    expected = alone.model.state_dict()
    for one in found:
        assert all(torch.equal(one["dequantised"][key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("quantised", "lowmem.Int8Linear there before the model is divided"),
        ("int8 of floats", "lowmem.Int8Linear there before the model is divided"),
        ("across", "is divided across its rows"),
        ("untied", "'out.weight'"),
        ("crossed", "are not in ascending order along dimension 0"),
        ("apart", "read='each'"),
    ],
)
def test_what_ranks_cannot_do_is_refused_by_name(ranks: Ranks, what: str, says: str) -> None:
    errors = [one[what] for one in ranks[1]]
    assert all(says in error for error in errors), errors
    assert any(not error.startswith("RankError") for error in errors)


def test_what_is_initialised_by_chance_is_alike_on_replicas(ranks: Ranks) -> None:
    first, second = (one["chance"] for one in ranks[1])
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert first["0.weight"].std() > 0


def test_ranks_beside_each_other_in_a_wider_mesh_read_once_and_initialise_alike(ranks: Ranks) -> None:
    folder, found = ranks
    alone = lowmem.load(folder / "a.safetensors", model=lambda: floats("cpu")).model.state_dict()
    states = [one["along"][0] for one in found]
    assert all(torch.equal(states[0][key], states[1][key]) for key in alone)
    assert all(torch.equal(states[0][key], alone[key]) for key in alone if key.startswith("1."))
    assert states[0]["0.weight"].std() > 0
    assert sum(one["along"][1] for one in found) == sum(t.nbytes for k, t in alone.items() if k.startswith("1."))
    assert all(one["along"][2] == 2 for one in found)
    assert all(torch.equal(one["once"][key], alone[key]) for one in found for key in alone)


def test_tied_tensors_that_are_alike_stay_tied(ranks: Ranks) -> None:
    from safetensors.torch import load_file

    words = load_file(ranks[0] / "tied.safetensors")["inside.weight"]
    for one in ranks[1]:
        assert torch.equal(one["tied"]["inside.weight"], words)
        assert torch.equal(one["tied"]["out.weight"], words)


def cold(rank: int, file: str) -> float:
    model = by_columns(nn.Sequential(nn.Linear(1024, 1024, bias=False, device="meta")))
    dist.barrier()
    lowmem.load(file, model=model, residency="copy", io="buffered")
    dist.barrier()
    return cached_share(Path(file))


def test_pages_that_ranks_share_go_back_when_all_are_done(tmp_path: Path) -> None:
    file = tmp_path / "cold.safetensors"
    save_file({"0.weight": torch.randn(1024, 1024)}, file)
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        if not hasattr(os, "posix_fadvise"):
            pytest.skip("this system takes no advice about pages")
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_share(file) > 0.5:
        pytest.skip("this file system keeps its pages")
    assert max(run_ranks(2, cold, os.fspath(file))) < 0.5
