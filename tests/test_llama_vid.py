"""LLaMA-VID's layout: an LLM in `.bin` shards, a tower with another grid and a block too many, a projector."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh import COMPUTING_IMPORTS, server
from llama_vid import TINY, make_model, sources, state_of, write_files

import lowmem
from lowmem.sizes import MIB

pytest.importorskip("transformers")

# 72 MB of LLM, 36 MB of tower: larger than what is allowed besides.
LARGE = {"width": 512, "layers": 12, "words": 8192, "tower": 384, "depth": 16}
_LOAD = """
import lowmem
from dataclasses import replace
from pathlib import Path
from llama_vid import make_model, sources, state_of
import torch
folder, sizes = Path(args["folder"]), args["sizes"]
options = {"ram": args["ram"], "residency": args["residency"]}
loaded = lowmem.load(sources(folder, sizes), model=lambda: make_model(sizes), **options)
expected = torch.load(folder / "expected.pt", mmap=True)
state = state_of(loaded.model)
same = state.keys() == expected.keys() and all(
    state[k].dtype == v.dtype and torch.equal(state[k], v) for k, v in expected.items()
)
largest = max(p.nbytes for p in loaded.plan.placements)
result = [loaded.plan.host.peak, loaded.report.peak, same, largest]
"""


@pytest.mark.parametrize("residency", ["map", "copy"])
def test_equals_what_is_put_together_by_hand(tmp_path: Path, residency: str) -> None:
    expected = write_files(tmp_path)
    result = lowmem.load(sources(tmp_path), model=lambda: make_model(TINY), residency=residency)
    state = state_of(result.model)
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert state[key].dtype == value.dtype, key
        assert torch.equal(state[key], value), key
    assert [group.what.partition("(")[0] for group in result.plan.groups] == ["interpolate"]
    said = "\n".join(result.plan.warnings)
    assert "feeds 'model.vision_tower'" in said
    left = ["norm.weight", "head.weight", "model.mm_projector_2.weight"]
    assert [key.partition(": ")[2] for key in result.plan.mapping.unexpected] == left
    assert isinstance(result.model.model.vision_tower, list)


def test_a_grid_of_another_size_is_told_with_what_would_mend_it(tmp_path: Path) -> None:
    write_files(tmp_path)
    given = sources(tmp_path)
    given["model.vision_tower"] = replace(given["model.vision_tower"], transforms=None)
    with pytest.raises(lowmem.KeysError, match=r"transforms=\{'pos_embed': lowmem.interpolate\(\)\} gives it"):
        lowmem.load(given, model=make_model)


def test_the_forward_is_that_of_the_model_put_together_by_hand(tmp_path: Path) -> None:
    expected = write_files(tmp_path)
    loaded: Any = lowmem.load(sources(tmp_path), model=lambda: make_model(TINY), dtype="float32").model
    model: Any = make_model(TINY).eval()
    model.load_state_dict({k: v.float() for k, v in expected.items() if "vision_tower" not in k})
    ids = torch.arange(5)[None]
    with torch.inference_mode():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("residency", ["map", "copy"])
def test_loads_within_its_largest_placement_and_80_mib(tmp_path: Path, residency: str) -> None:
    expected = write_files(tmp_path, LARGE)
    torch.save(expected, tmp_path / "expected.pt")
    largest = max(value.nbytes for value in expected.values())
    held = sum(value.nbytes for value in expected.values()) if residency == "copy" else largest
    ram = held + 80 * MIB
    job = {"folder": str(tmp_path), "sizes": LARGE, "ram": ram, "residency": residency}
    predicted, measured, same, found = server(*COMPUTING_IMPORTS).run(_LOAD, **job)
    assert same
    assert found == largest
    assert measured <= predicted <= ram
