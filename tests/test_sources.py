"""Models made of several files: an LLM, a tower, a projector, each from a source of its own."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llava_files import Llava, Tower, check, expected, sources, write_files
from rich.console import Console
from safetensors.torch import save_file

import lowmem
from lowmem import KeysError, OptionError
from lowmem.report import plan_tables


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    return write_files(tmp_path)


@pytest.mark.parametrize("residency", ["map", "copy"])
@pytest.mark.parametrize("make", [Llava, lambda: Llava])
def test_each_part_comes_from_its_own_source_in_its_own_dtype(
    files: dict[str, Any], residency: str, make: Callable[[], Any]
) -> None:
    result = lowmem.load(sources(files), model=make(), residency=residency)
    check(result.model, expected(files))
    said = [line for line in result.plan.warnings if "not read" in line]
    assert any("7 tensors ('model.vision_tower." in line and "feeds 'model.vision_tower'" in line for line in said), (
        said
    )
    assert any("mm_projector_old" in line for line in said)
    assert result.model.model.vision_tower.scale.item() == 3.0
    assert len({shard.file for shard in result.plan.checkpoint.shards}) == 3


def test_a_named_dtype_is_for_all_and_a_source_may_have_its_own(files: dict[str, Any]) -> None:
    given = sources(files)
    given["model.vision_tower"] = lowmem.Source(given["model.vision_tower"], dtype="bfloat16")
    model = lowmem.load(given, model=Llava, dtype="float32").model
    state = expected(files)
    check(model, {k: v.to(torch.bfloat16 if "vision_tower" in k else torch.float32) for k, v in state.items()})


def test_sources_that_feed_the_same_are_refused(files: dict[str, Any]) -> None:
    folder = files["folder"]
    given = {"model.vision_tower": folder / "tower.pth", "": folder / "llm"}
    with pytest.raises(KeysError, match=r"expected one source for it, found 'model.vision_tower: pos_embed' and"):
        lowmem.load(given, model=Llava)
    with pytest.raises(KeysError, match="expected one source for it"):
        lowmem.load({"": [folder / "llm", folder / "llm"]}, model=Llava, strict=False)


def test_several_files_for_one_module(files: dict[str, Any]) -> None:
    folder = files["folder"]
    tower = list(files["tower"].items())
    save_file(dict(tower[:3]), folder / "a.safetensors")
    save_file(dict(tower[3:]), folder / "b.safetensors")
    given = sources(files) | {"model.vision_tower": [folder / "a.safetensors", folder / "b.safetensors"]}
    check(lowmem.load(given, model=Llava).model, expected(files))


def test_a_tower_with_a_block_less_than_the_file(files: dict[str, Any]) -> None:
    given = sources(files)
    result = lowmem.load(given, model=lambda: Llava(2))
    assert sorted(result.plan.mapping.unexpected)[0] == "model.mm_projector: model.mm_projector_old.0.weight"
    assert "model.vision_tower: blocks.2.weight" in result.plan.mapping.unexpected
    given["model.vision_tower"] = lowmem.Source(given["model.vision_tower"], skip="blocks.2")
    assert (
        "model.vision_tower: blocks.2.weight" not in lowmem.load(given, model=lambda: Llava(2)).plan.mapping.unexpected
    )


def test_a_tower_with_a_block_more_than_the_file(files: dict[str, Any]) -> None:
    given = sources(files)
    with pytest.raises(KeysError, match=r"blocks\.3"):
        lowmem.load(given, model=lambda: Llava(4))
    given["model.vision_tower"] = lowmem.Source(given["model.vision_tower"], skip="blocks.3")
    result = lowmem.load(given, model=lambda: Llava(4))
    assert sorted(result.report.initialised) == [
        "model.vision_tower.blocks.3.bias",
        "model.vision_tower.blocks.3.weight",
    ]
    assert torch.equal(result.model.model.vision_tower.blocks[2].weight, files["tower"]["blocks.2.weight"])


@pytest.mark.parametrize("borrowed", [True, False])
def test_a_tower_in_a_list_is_filled_and_stays_in_the_list(files: dict[str, Any], borrowed: bool) -> None:
    model: Any = Llava(listed=True) if borrowed else lambda: Llava(listed=True)
    loaded: Any = lowmem.load(sources(files), model=model).model
    assert isinstance(loaded.model.vision_tower, list)
    assert not any("vision_tower" in name for name, _ in loaded.named_parameters())
    check(loaded.model.vision_tower[0], files["tower"])
    assert not loaded.model.vision_tower[0].training


@pytest.mark.parametrize("listed", [True, False])
def test_a_tower_that_is_built_later_is_built_by_the_source(files: dict[str, Any], listed: bool) -> None:
    given = sources(files)
    with pytest.raises(lowmem.ModelError, match=r"expected a module at 'model.vision_tower', found .*give model="):
        lowmem.load(given, model=lambda: Llava(listed=listed, delayed=True))
    given["model.vision_tower"] = lowmem.Source(given["model.vision_tower"], model=Tower)
    owner = Llava(listed=listed, delayed=True)
    owner.model.is_loaded = False
    loaded: Any = lowmem.load(given, model=owner).model
    tower = loaded.model.vision_tower[0] if listed else loaded.model.vision_tower
    check(tower, files["tower"])
    assert loaded.model.is_loaded is True
    assert isinstance(tower, Tower)


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("delayed", [True, False])
def test_a_load_that_fails_leaves_the_model_as_it_was(files: dict[str, Any], listed: bool, delayed: bool) -> None:
    model = Llava(listed=listed, delayed=delayed)
    before = dict(model.model.__dict__), dict(model.model._modules)
    held = list(model.model.vision_tower) if listed else []
    given = sources(files)
    given["model.vision_tower"] = lowmem.Source(given["model.vision_tower"], model=Tower if delayed else None)
    for options in ({"ram": "1KiB", "residency": "copy"}, {"skip": "nothing"}, {"device_map": "nonsense"}):
        with pytest.raises(lowmem.LowmemError):
            lowmem.load(given, model=model, **options)
        assert (model.model.__dict__, model.model._modules) == before
        assert not listed or model.model.vision_tower == held
    lowmem.plan(given, model=model)
    assert (model.model.__dict__, model.model._modules) == before


def test_options_of_the_load_are_of_the_source_of_the_whole(files: dict[str, Any]) -> None:
    folder = files["folder"]
    state = {f"wrapped.{key}": value for key, value in files["llm"].items()}
    save_file(state, folder / "wrapped.safetensors")
    given = sources(files) | {"": folder / "wrapped.safetensors"}
    check(lowmem.load(given, model=Llava, prefix="wrapped").model, expected(files))
    del given[""]
    with pytest.raises(OptionError, match=r"give them to the lowmem\.Source of each"):
        lowmem.load(given, model=Llava, prefix="wrapped")


def test_a_source_that_feeds_nothing_is_refused_whatever_strict_says(files: dict[str, Any]) -> None:
    folder = files["folder"]
    given = sources(files) | {"model.mm_projector": folder / "tower.pth"}
    with pytest.raises(KeysError, match=r"expected tensors of 'model.mm_projector', found none among its 7"):
        lowmem.load(given, model=Llava, strict=False)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "an empty mapping"),
        ({"a..b": "x"}, "expected names of modules"),
        ({3: "x"}, "expected names of modules"),
        ({"a": 3}, "expected a path or a lowmem.Source"),
        ({"a": []}, "expected a path or several"),
    ],
)
def test_a_mapping_of_something_else_is_refused(given: Any, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        lowmem.load(given, model=Llava)


def test_a_grid_of_another_size_is_made_to_fit_within_the_plan(files: dict[str, Any]) -> None:
    def shrink(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return state | {"pos_embed": state["pos_embed"][:, :10]}

    given = sources(files)
    given["model.vision_tower"] = lowmem.Source(given["model.vision_tower"], filter_fn=shrink)
    result = lowmem.load(given, model=make_small)
    assert torch.equal(result.model.model.vision_tower.pos_embed, files["tower"]["pos_embed"][:, :10])


def make_small() -> Llava:
    model = Llava()
    model.model.vision_tower = Tower(grid=3)
    return model


def test_diff_and_plan_say_whose_keys_are_left_over(files: dict[str, Any]) -> None:
    diff = lowmem.diff(sources(files), model=lambda: Llava(4))
    assert diff.missing == ("model.vision_tower.blocks.3.weight", "model.vision_tower.blocks.3.bias")
    assert diff.unexpected == ("model.mm_projector: model.mm_projector_old.0.weight",)
    plan = lowmem.plan(sources(files), model=Llava)
    assert plan.to_dict()["source"].count("tower.pth") == 1


def test_nothing_is_kept_when_it_is_done(files: dict[str, Any]) -> None:
    model = lowmem.load(sources(files), model=Llava, residency="copy").model
    before = len([o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)])
    del model
    gc.collect()
    assert len([o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]) < before


def test_the_report_says_what_each_source_feeds(files: dict[str, Any]) -> None:
    result = lowmem.load(sources(files), model=Llava)
    shares = result.report.to_dict()["sources"]
    state = {"": 6, "model.vision_tower": 7, "model.mm_projector": 4}
    assert {share["module"]: share["tensors"] for share in shares} == state
    assert [share["bytes"] for share in shares][2] == sum(v.nbytes for v in files["projector"].values())
    console = Console(width=200)
    with console.capture() as printed:
        console.print(*plan_tables(result.plan))
    assert re.search(r"model\.vision_tower +\S+tower\.pth +7 ", printed.get())
    assert lowmem.load(files["folder"] / "tower.pth", model=Tower).plan.to_dict()["sources"] == []
