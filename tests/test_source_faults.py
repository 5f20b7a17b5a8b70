"""What one does wrong with several sources, and what must not be left behind or lost then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from llava_files import Llava, Tower, check, expected, random_state, sources, write_files
from safetensors.torch import save_file
from torch import nn

import lowmem
from lowmem import KeysError, OptionError


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    return write_files(tmp_path)


def test_a_tower_in_a_list_without_a_source_is_refused(files: dict[str, Any]) -> None:
    given = sources(files)
    del given["model.vision_tower"]
    with pytest.raises(lowmem.ModelError, match=r"'model\.vision_tower': it is in a list.* 7 tensors"):
        lowmem.load(given, model=lambda: Llava(listed=True))
    model: Any = lowmem.load(given, model=Llava(listed=True)).model
    assert not any(p.is_meta for p in model.model.vision_tower[0].parameters())


def test_a_list_of_modules_that_are_children_too_is_none_of_these(tmp_path: Path) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
            self.all = [self.first, self.second]

    save_file(random_state(Both(), 0), tmp_path / "both.safetensors")
    loaded: Any = lowmem.load(tmp_path / "both.safetensors", model=Both).model
    assert loaded.all[0] is loaded.first


def test_a_misspelt_module_is_refused(files: dict[str, Any]) -> None:
    given = sources(files)
    given["model.vision_towr"] = lowmem.Source(given.pop("model.vision_tower"), model=Tower)
    with pytest.raises(lowmem.ModelError, match=r"did you mean 'vision_tower'\?"):
        lowmem.load(given, model=lambda: Llava(delayed=True))


def test_a_module_without_a_source_is_named(files: dict[str, Any]) -> None:
    given = sources(files)
    del given["model.mm_projector"]
    with pytest.raises(KeysError, match=r"nothing feeds 'model\.mm_projector': give it a source"):
        lowmem.load(given, model=Llava)
    with pytest.raises(KeysError, match=r"has 'lm_head\.weight', which is a name in the whole model"):
        lowmem.load({"": files["folder"] / "tower.pth", "model": files["folder"] / "llm"}, model=Llava)


def test_the_dtype_of_a_source_is_that_of_what_it_feeds(files: dict[str, Any]) -> None:
    folder = files["folder"]
    whole = lowmem.Source(folder / "llm", dtype="float16")
    model = lowmem.load(sources(files) | {"": whole}, model=Llava).model
    state = {k: v.half() if k in files["llm"] and "vision" not in k else v for k, v in expected(files).items()}
    check(model, state)
    tower = list(files["tower"].items())
    save_file(dict(tower[:3]), folder / "a.safetensors")
    save_file(dict(tower[3:]), folder / "b.safetensors")
    parts = [lowmem.Source(folder / "a.safetensors", dtype="float64"), lowmem.Source(folder / "b.safetensors")]
    loaded: Any = lowmem.load(sources(files) | {"model.vision_tower": parts}, model=Llava).model
    first = dict(tower[:3])
    for name, value in loaded.model.vision_tower.state_dict().items():
        assert value.dtype == (torch.float64 if name in first else torch.float16), name


@pytest.mark.parametrize("where", ["read", "attach"])
def test_a_borrowed_tower_is_as_it_was_when_a_load_ends_early(
    files: dict[str, Any], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = Tower()
    before = dict(tower.named_parameters())

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    given = sources(files)
    given["model.vision_tower"] = lowmem.Source(given["model.vision_tower"], model=tower)
    if where == "attach":
        monkeypatch.setattr("lowmem.loader.attach", fail)
    with pytest.raises(KeyboardInterrupt):
        lowmem.load(given, model=Llava, residency="copy", progress=fail if where == "read" else None)
    assert all(p is before[name] for name, p in tower.named_parameters())
    assert tower.training


def test_released_weights_of_a_tower_in_a_list_are_gone_too(files: dict[str, Any]) -> None:
    model: Any = lowmem.load(sources(files), model=lambda: Llava(listed=True), device_map={"": "disk"}).model
    tower = model.model.vision_tower[0]
    state, ones = files["tower"], torch.ones(12).half()
    by_hand = nn.functional.linear(ones, state["blocks.0.weight"], state["blocks.0.bias"])
    assert torch.equal(tower.blocks[0](ones), by_hand)
    lowmem.release(model)
    with pytest.raises(lowmem.LowmemError):
        tower.blocks[0](ones)


@pytest.mark.parametrize("option", ["variant", "subfolder", "revision"])
def test_options_that_would_be_of_no_source_are_refused(files: dict[str, Any], option: str) -> None:
    given = sources(files) | {"": lowmem.Source(files["folder"] / "llm")}
    with pytest.raises(OptionError, match=r"lowmem\.Source of each"):
        lowmem.load(given, model=Llava, **{option: "x"})
    assert lowmem.load(given, model=Llava, ignore_mismatched_sizes=True)


def test_a_list_of_paths_is_told_what_is_expected(files: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="expected a path, or modules with their sources"):
        lowmem.load(list(sources(files).values()), model=Llava)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="give those of the whole to load"):
        lowmem.load({"": lowmem.Source(files["folder"] / "llm", model=Llava)}, model=Llava)


@pytest.mark.parametrize("residency", ["map", "copy"])
def test_tensors_that_are_tied_across_sources_are_one(tmp_path: Path, residency: str) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(4, 3)
            self.inner = nn.Module()
            self.inner.head = nn.Linear(3, 4, bias=False)
            self.inner.head.weight = self.embed.weight

    value = torch.randn(4, 3)
    save_file({"embed.weight": value}, tmp_path / "a.safetensors")
    save_file({"head.weight": value}, tmp_path / "b.safetensors")
    save_file({"head.weight": value + 1}, tmp_path / "c.safetensors")
    given = {"": tmp_path / "a.safetensors", "inner": tmp_path / "b.safetensors"}
    loaded: Any = lowmem.load(given, model=Tied, residency=residency).model
    assert loaded.inner.head.weight is loaded.embed.weight
    assert torch.equal(loaded.embed.weight, value)
    with pytest.raises(KeysError, match="differ, and the model ties them"):
        lowmem.load(given | {"inner": tmp_path / "c.safetensors"}, model=Tied, residency=residency)


def test_a_tensor_of_another_shape_goes_along_with_a_prefix(files: dict[str, Any]) -> None:
    """What stands one module deeper, with another grid: told with its name there, and the transform finds it."""

    class Deeper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision_tower = Tower(grid=6)

    source = files["folder"] / "tower.pth"
    with pytest.raises(KeysError, match=r"transforms=\{'vision_tower\.pos_embed': lowmem\.interpolate\(\)\}"):
        lowmem.load(source, model=Deeper)
    loaded: Any = lowmem.load(source, model=Deeper, transforms={"*pos_embed": lowmem.interpolate()}).model
    assert loaded.vision_tower.pos_embed.shape == (1, 37, 12)
    assert torch.equal(loaded.vision_tower.blocks[0].weight, files["tower"]["blocks.0.weight"])


@pytest.mark.parametrize("make", [lambda: [nn.Linear(16, 16)], list])
def test_a_layer_in_a_list_that_becomes_int8_is_there_afterwards(tmp_path: Path, make: Any) -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x, self.tail = nn.Linear(16, 16), nn.Linear(16, 16)
            self.p: Any = make()

    state = {f"{name}.weight": torch.randn(16, 16) for name in ("x", "tail")}
    state |= {f"{name}.bias": torch.randn(16) for name in ("x", "tail")}
    save_file(state, tmp_path / "whole.safetensors")
    inner = {"weight": torch.randn(16, 16), "bias": torch.randn(16)}
    save_file(inner, tmp_path / "inner.safetensors")
    source = lowmem.Source(
        tmp_path / "inner.safetensors", model=None if make is not list else lambda: nn.Linear(16, 16)
    )
    model: Any = Listed()
    lowmem.load({"": tmp_path / "whole.safetensors", "p": source}, model=model, quantize="int8")
    assert type(model.p) is list
    assert model.p[0].weight.dtype == torch.int8
    near = torch.nn.functional.linear(torch.ones(1, 16), inner["weight"], inner["bias"])
    assert torch.allclose(model.p[0](torch.ones(1, 16)).float(), near, atol=0.5)


def test_a_source_for_what_is_no_place_for_a_module_is_refused(files: dict[str, Any]) -> None:
    class Odd(Llava):
        @property
        def tower(self) -> Any:
            return self.model.vision_tower

    source = lowmem.Source(files["folder"] / "tower.pth", model=Tower)
    for path in ("tower", "lm_head.weight", "get_submodule", "model.layers.append"):
        given = sources(files) | {path: source}
        with pytest.raises(lowmem.ModelError, match=r"expected a (place for a )?module"):
            lowmem.load(given, model=Odd)


def test_accelerates_hooks_open_the_files_of_parts_by_their_own_keys(files: dict[str, Any], tmp_path: Path) -> None:
    save_file(files["tower"], tmp_path / "tower.safetensors")
    given = {"inner": tmp_path / "tower.safetensors"}

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Tower()

        def forward(self, value: torch.Tensor) -> torch.Tensor:
            return self.inner.blocks[0](value)

    options: dict[str, Any] = {"device_map": {"": "disk"}, "dispatch": "accelerate"}
    model = lowmem.load(given, model=Around, **options).model
    state, ones = files["tower"], torch.ones(12).half()
    by_hand = nn.functional.linear(ones, state["blocks.0.weight"], state["blocks.0.bias"])
    assert torch.equal(model(ones), by_hand)


def test_a_name_that_the_class_has_would_hide_the_module(files: dict[str, Any]) -> None:
    class Declared(nn.Module):
        vision_tower: Tower | None = None

    given = {"vision_tower": lowmem.Source(files["folder"] / "tower.pth", model=Tower)}
    with pytest.raises(lowmem.ModelError, match="found an attribute of its class"):
        lowmem.load(given, model=Declared)
