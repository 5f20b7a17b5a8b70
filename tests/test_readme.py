"""README's code runs, and its reference is the parser's."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from layouts import convnext, state_of
from safetensors.torch import save_file

from bench.peaks import as_markdown
from bench.results import read
from bench.tables import as_markdown as whole_table
from bench.tables import summary
from lowmem.cli import build_parser
from lowmem.mapping.presets import PRESETS
from lowmem.sizes import MIB
from lowmem.synthetic import llama_recipe, write_checkpoint

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which README's paths exist."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "path/to").mkdir(parents=True)
    write_checkpoint(llama_recipe(8 * MIB), folder / "path/to/model", max_shard_size=3 * MIB)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    state = model.state_dict()
    save_file(state, folder / "path/to/weights.safetensors")
    wrapped = {f"module.{key}": value for key, value in state.items()}
    names = {"0.weight": "first.weight", "0.bias": "first.bias", "2.weight": "second.weight", "2.bias": "second.bias"}
    renamed = {names[key]: value for key, value in state.items()}
    torch.save(renamed | {"first.bias": renamed["first.bias"].view(1, 16)}, folder / "path/to/renamed.pth")
    training = {"model": wrapped, "model_ema": wrapped, "optimizer": {"state": {}}, "epoch": 3}
    torch.save(training, folder / "path/to/training.pth")
    write_vision(folder)
    return folder


_PROJECT = """
import torch
from layouts import convnext_of_mmpretrain, model_of

make_backbone = model_of({
    name.removeprefix("backbone."): shape
    for name, shape in convnext_of_mmpretrain(True).items()
    if name.startswith("backbone.")
})


class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.pos_embed = torch.nn.Parameter(torch.zeros(1, 1 + 24 * 24, 8))
        self.words = torch.nn.Embedding(12, 8)
"""


def write_vision(folder: Path) -> None:
    """An official file, one of a detector, one of another size, and the project that has models for them."""
    (folder / "my_project.py").write_text(_PROJECT, encoding="utf-8")
    state = state_of(convnext(True))
    torch.save({"model": state}, folder / "path/to/convnextv2.pth")
    detector = PRESETS["convnextv2->mmpretrain"].apply(state, {})
    torch.save({"state_dict": detector, "optimizer": {"state": {}}}, folder / "path/to/detector.pth")
    encoder = {"pos_embed": torch.ones(1, 1 + 14 * 14, 8), "words.weight": torch.ones(10, 8)}
    torch.save(encoder, folder / "path/to/encoder.pth")


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_python_block_of_the_readme_runs(number: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if re.search(r"^(import|from) timm\b", BLOCKS[number], flags=re.MULTILINE):
        pytest.skip("about timm, which has an environment of its own: tests/vision/test_readme_vision.py")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    exec(compile(BLOCKS[number], f"README.md, block {number}", "exec"), {"__name__": "__main__"})


def test_the_readme_has_python_blocks() -> None:
    assert len(BLOCKS) >= 5


def reference() -> str:
    """The help of every verb, as README shows it."""
    parser = build_parser()
    verbs = next(a for a in parser._actions if hasattr(a, "choices") and isinstance(a.choices, dict))
    assert isinstance(verbs.choices, dict)
    parts = []
    for name, verb in verbs.choices.items():
        parts.append(f"```\n$ lowmem {name} --help\n{verb.format_help().strip()}\n```")
    return "\n\n".join(parts)


def test_the_shell_reference_of_the_readme_is_the_parsers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mend with: COLUMNS=100 PYTHONPATH=. python tests/test_readme.py"""
    monkeypatch.setenv("COLUMNS", "100")
    if sys.version_info[:2] != (3, 11):
        pytest.skip("argparse lays help out differently in other versions; README shows Python 3.11's")
    shown = README.read_text(encoding="utf-8").split("<!-- reference -->")[1].split("<!-- /reference -->")[0]
    assert shown.strip() == reference().strip()


def test_the_table_of_the_readme_is_the_benchs() -> None:
    rows = json.loads((README.parent / "bench/peaks.json").read_text(encoding="utf-8"))["rows"]
    shown = README.read_text(encoding="utf-8").split("<!-- peaks -->")[1].split("<!-- /peaks -->")[0]
    assert shown.strip() == as_markdown(rows)


def test_the_times_of_the_readme_are_the_benchs() -> None:
    results = read(README.parent / "bench/results.json")
    shown = README.read_text(encoding="utf-8").split("<!-- bench -->")[1].split("<!-- /bench -->")[0]
    assert shown.strip() == summary(results)
    assert (README.parent / "bench/results.md").read_text(encoding="utf-8").strip() == whole_table(results)


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    head, rest = text.split("<!-- reference -->")
    tail = rest.split("<!-- /reference -->")[1]
    README.write_text(f"{head}<!-- reference -->\n{reference()}\n<!-- /reference -->{tail}", encoding="utf-8")
