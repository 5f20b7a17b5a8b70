"""README's code about timm runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

timm = pytest.importorskip("timm", reason="timm is not installed: these need lowmem[dev-vision]")

from timm_models import new, write

README = Path(__file__).parent.parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
VISION = [block for block in BLOCKS if re.search(r"^(import|from) timm\b", block, flags=re.MULTILINE)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which README's paths exist."""
    folder = tmp_path_factory.mktemp("readme")
    write(folder / "path/to/vit", new("vit_tiny_patch16_224", img_size=224))
    return folder


def test_the_readme_has_code_about_timm() -> None:
    assert VISION


@pytest.mark.parametrize("number", range(len(VISION)))
def test_a_block_about_timm_runs(number: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    exec(compile(VISION[number], f"README.md, block {number} about timm", "exec"), {"__name__": "__main__"})
