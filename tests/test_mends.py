"""Ways in which a load once went wrong."""

from __future__ import annotations

import copy
import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lowmem
from lowmem.errors import PlacementError


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), torch.nn.utils.weight_norm(nn.Linear(16, 16)))


class Listed(nn.Module):
    """Weights in a list and in a dict, used by the module around them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.listed = nn.ParameterList([nn.Parameter(torch.randn(16, 16)) for _ in range(2)])
        self.named = nn.ParameterDict({"a": nn.Parameter(torch.randn(16))})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight in self.listed:
            x = self.first(x) @ weight
        return x + self.named["a"]


@pytest.mark.parametrize("make", [attention, normed, Listed])
@pytest.mark.parametrize("dtype", ["auto", "float64"])
@pytest.mark.parametrize("dispatch", ["lowmem", "accelerate"])
def test_weights_that_no_hook_would_fetch_stay_in_memory(make: Any, dtype: str, dispatch: str, tmp_path: Path) -> None:
    """By accelerate's hooks; without them nothing has to."""
    torch.manual_seed(1)
    model = make().eval()
    save_file({k: v.detach().clone() for k, v in model.state_dict().items()}, tmp_path / "w.safetensors")
    x = torch.randn(2, 3, 16, dtype=torch.float64 if dtype == "float64" else torch.float32)
    result = lowmem.load(
        tmp_path / "w.safetensors",
        model=make,
        device_map="disk",
        dtype=dtype,
        offload_folder=tmp_path / "off",
        dispatch=dispatch,
    )
    assert result.plan.devices["disk"].weights > 0
    assert any("cannot fetch them" in w for w in result.plan.warnings) is (dispatch == "accelerate")
    with torch.no_grad():
        assert torch.equal(result.model(x), model.to(x.dtype)(x))


def test_an_index_left_behind_yields_to_the_whole_file_beside_it(tmp_path: Path) -> None:
    """save_pretrained(max_shard_size=...) and then save_pretrained() leave the first one's index."""
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"weight": "model-00001-of-00001.safetensors"}}'
    )
    found = lowmem.inspect(tmp_path)
    assert found["weight"].file.name == "model.safetensors"
    assert "names shards that are gone" in found.warnings[0]


def test_two_spellings_of_one_shard_are_one_shard(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, tmp_path / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "x.safetensors", "b": "./x.safetensors"}}'
    )
    assert set(lowmem.inspect(tmp_path)) == {"a", "b"}


def test_a_tie_survives_a_key_of_another_shape(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e = nn.Linear(3, 4, bias=False)
            self.f = nn.Linear(3, 4, bias=False)
            self.f.weight = self.e.weight

    save_file({"e.weight": torch.ones(4, 3), "f.weight": torch.ones(4, 4)}, tmp_path / "w.safetensors")
    model: Any = lowmem.load(tmp_path / "w.safetensors", model=Tied, strict=False).model
    assert model.e.weight is model.f.weight
    assert torch.equal(model.e.weight, torch.ones(4, 3))


def test_offloaded_files_that_were_written_to_are_not_reused(tmp_path: Path) -> None:
    save_file({"weight": torch.randn(8, 8), "bias": torch.randn(8)}, tmp_path / "w.safetensors")
    options: dict[str, Any] = {"device_map": "disk", "dtype": "float64", "offload_folder": tmp_path / "off"}
    first = lowmem.load(tmp_path / "w.safetensors", model=lambda: nn.Linear(8, 8), **options)
    assert lowmem.plan(tmp_path / "w.safetensors", model=lambda: nn.Linear(8, 8), **options).bytes_written == 0
    assert first.plan.offload is not None
    file = next(first.plan.offload.folder.glob("*.safetensors"))
    with file.open("r+b") as f:
        f.seek(-8, os.SEEK_END)
        f.write(b"\xff" * 8)
    again = lowmem.load(tmp_path / "w.safetensors", model=lambda: nn.Linear(8, 8), **options)
    assert again.plan.bytes_written > 0
    x = torch.randn(2, 8, dtype=torch.float64)
    expected = nn.functional.linear(
        x,
        *(
            lowmem.load(tmp_path / "w.safetensors", model=lambda: nn.Linear(8, 8), dtype="float64")
            .model.state_dict()
            .values()
        ),
    )
    with torch.no_grad():
        assert torch.equal(again.model(x), expected)


@pytest.mark.parametrize("residency", ["map", "copy"])
def test_what_hangs_on_a_parameter_stays_on_it(residency: str, tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, tmp_path / "w.safetensors")

    def make() -> nn.Module:
        module = nn.Linear(2, 2)
        module.weight.no_decay = True  # type: ignore[attr-defined]
        return module

    model: Any = lowmem.load(tmp_path / "w.safetensors", model=make, residency=residency).model
    assert model.weight.no_decay is True


def test_another_kind_of_number_is_said(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2, 2, dtype=torch.int16), "bias": torch.ones(2)}, tmp_path / "w.safetensors")
    plan = lowmem.plan(tmp_path / "w.safetensors", model=lambda: nn.Linear(2, 2))
    assert any("'weight' is float32 in the model and int16 in the checkpoint" in w for w in plan.warnings)


def test_a_mapped_tensor_saves_and_copies_its_own_bytes_only(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1024, 1024), "bias": torch.zeros(1024)}, tmp_path / "w.safetensors")
    model: Any = lowmem.load(tmp_path / "w.safetensors", model=lambda: nn.Linear(1024, 1024)).model
    buffer = io.BytesIO()
    torch.save(model.bias, buffer)
    assert buffer.tell() < 64 * 1024
    assert copy.deepcopy(model.bias.detach()).untyped_storage().nbytes() == 4096


def test_weights_on_disk_need_a_path_that_can_be_opened(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/od\xff"))
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    save_file({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").rename(folder / "w.safetensors")
    with pytest.raises(PlacementError, match="UTF-8"):
        lowmem.plan(folder / "w.safetensors", model=lambda: nn.Linear(2, 2), device_map="disk")
    assert lowmem.load(folder / "w.safetensors", model=lambda: nn.Linear(2, 2)).model.bias.shape == (2,)
