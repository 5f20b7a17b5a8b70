"""README's code runs, its reference is the parser's, and its errors are those of the exception tree."""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from layouts import convnext, state_of
from safetensors.torch import save_file

import lowmem
from bench.peaks import as_markdown
from bench.results import read
from bench.tables import as_markdown as whole_table
from bench.tables import summary
from lowmem import errors
from lowmem.cli import build_parser
from lowmem.errors import LowmemError
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
    if "plan_ranks(" in BLOCKS[number] and not hasattr(transformers.PreTrainedModel, "_expand_parallel_plan"):
        pytest.skip("plans of transformers' models need transformers 5.23")
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


def exceptions(of: type[LowmemError] = LowmemError, depth: int = 0) -> list[tuple[int, type[LowmemError]]]:
    """The tree of lowmem/errors.py, each class with its depth, in the order in which they stand there."""
    order = list(vars(errors)).index
    children = sorted(
        (c for c in of.__subclasses__() if c.__module__ == errors.__name__), key=lambda c: order(c.__name__)
    )
    return [(depth, of), *(found for child in children for found in exceptions(child, depth + 1))]


def told(error: type[LowmemError]) -> tuple[str, list[str], str]:
    """What a class says of itself: meaning, attributes, remedy."""
    parts = (inspect.getdoc(error) or "").split("\n\n")
    sections = dict(part.split(":", 1) for part in parts if part.startswith(("Attributes:", "Remedy:")))
    meaning = " ".join(part for part in parts if not part.startswith(("Attributes:", "Remedy:")))
    attributes = [line.strip() for line in sections.get("Attributes", "").strip().splitlines()]
    return " ".join(meaning.split()), attributes, " ".join(sections["Remedy"].split())


def catalogue() -> str:
    """The table of errors."""
    rows = ["| error | is also | means | to do |", "|---|---|---|---|"]
    for depth, error in exceptions():
        meaning, attributes, remedy = told(error)
        also = ", ".join(f"`{base.__name__}`" for base in error.__bases__ if base not in (LowmemError, Exception))
        details = "".join(
            f"; `.{name}`: {text.removesuffix('.')}" for name, text in (line.split(": ", 1) for line in attributes)
        )
        text = f"{meaning.removesuffix('.')}{details}."
        rows.append(f"| {'└ ' * (depth - 1)}`{error.__name__}` | {also} | {text} | {remedy[0].upper()}{remedy[1:]} |")
    return "\n".join(rows)


def test_the_errors_of_the_readme_are_those_of_the_tree() -> None:
    """Mend with: COLUMNS=100 PYTHONPATH=. python tests/test_readme.py"""
    shown = README.read_text(encoding="utf-8").split("<!-- errors -->")[1].split("<!-- /errors -->")[0]
    assert shown.strip() == catalogue()


def test_the_tree_of_the_errors_docstring_is_the_tree() -> None:
    drawn = re.findall(r"^ {4}([ │├└─]*)(\w+Error)\b", errors.__doc__ or "", flags=re.MULTILINE)
    assert [(len(lines) // 4, name) for lines, name in drawn] == [(d, e.__name__) for d, e in exceptions()]


def test_every_error_is_public_and_raised() -> None:
    """An error that nobody can name or that nothing raises is not in the catalogue."""
    names = {error.__name__ for _, error in exceptions()}
    assert names == {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert names <= set(lowmem.__all__)
    package = Path(errors.__file__).parent
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in package.rglob("*.py") if path.name != "errors.py"]
    calls = (node.func for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call))
    assert names <= {call.id for call in calls if isinstance(call, ast.Name)}


def renewed(text: str, mark: str, inner: str) -> str:
    """README with other text between two marks."""
    head, rest = text.split(f"<!-- {mark} -->")
    return f"{head}<!-- {mark} -->\n{inner}\n<!-- /{mark} -->{rest.split(f'<!-- /{mark} -->')[1]}"


if __name__ == "__main__":
    text = renewed(README.read_text(encoding="utf-8"), "errors", catalogue())
    README.write_text(renewed(text, "reference", reference()), encoding="utf-8")
