"""The lowest versions that pyproject.toml allows, as pins for pip, and the tests that are run with them.

pip install -e '.[dev-lowest]' $(python tests/lowest.py)
python -m pytest $(python tests/lowest.py --tests)
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10: pip brings the same reader, before anything is installed
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).parent.parent
# What users install. `vision` has an environment of its own, with timm at its lowest: see the extra `dev-vision`.
EXTRAS = ("transformers", "plot", "int8")

# One file for each thing that is done with another's functions; the whole suite passes too, in three times the time.
TESTS = (
    "test_architecture",
    "test_cli",
    "test_computed",
    "test_conversions",
    "test_convert",
    "test_dependencies",
    "test_device_maps",
    "test_ecosystem",
    "test_from_pretrained",
    "test_int8_drop_in",
    "test_int8_load",
    "test_int8_plan",
    "test_linear",
    "test_memory",
    "test_minilm",
    "test_offload_folder",
    "test_pickled_models",
    "test_plain_module",
    "test_plots",
    "test_reading",
    "test_readme",
    "test_running_equal",
    "test_torch_files",
    "test_trainers",
)


def project() -> dict[str, Any]:
    """pyproject.toml's table of the project."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table: dict[str, Any] = tomllib.loads(text)["project"]
    return table


def requirements() -> list[str]:
    """What lowmem requires, and what its extras for users do."""
    table = project()
    return [*table["dependencies"], *(r for extra in EXTRAS for r in table["optional-dependencies"][extra])]


def pins() -> list[str]:
    """`name==lowest` of each requirement."""
    found = []
    for requirement in requirements():
        match = re.fullmatch(r"([\w-]+)>=([\w.]+),<[\w.]+", requirement)
        if match is None:
            raise SystemExit(f"pyproject.toml: expected 'name>=lowest,<next', found {requirement!r}")
        found.append(f"{match[1]}=={match[2]}")
    return found


if __name__ == "__main__":
    print(*(f"tests/{name}.py" for name in TESTS) if "--tests" in sys.argv[1:] else pins())
