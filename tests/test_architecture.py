"""The rooms and their doors: who may import whom, what importing costs, what is public and explained."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lowmem
from lowmem import errors

PACKAGE = Path(lowmem.__file__).parent
# A module imports only from its own room and from rooms above it.
ORDER = [
    "errors",
    "_files",
    "sizes",
    "dtypes",
    "_shared",
    "_collector",
    "_drafts",
    "_mounts",
    "_page_cache",
    "_mapped_pages",
    "_patterns",
    "_records",
    "_strides",
    "limits",
    "_sampler",
    "_processes",
    "_thread_sampler",
    "_process_sampler",
    "_devices",
    "plots",
    "memory",
    "ranks",
    "int8",
    "checkpoint",
    "modeling",
    "mapping",
    "planner",
    "engine",
    "offload",
    "report",
    "sources",
    "fitting",
    "divided",
    "loader",
    "rank_planning",
    "drop_in",
    "running",
    "streaming",
    "converting_int8",
    "converter",
    "checker",
    "synthetic",
    "demo",
    "_terminal",
    "cli",
]
ALL = {*ORDER, "__init__"}
# Rooms that see less than what is above them, or more: the command line comes in by the front door.
ONLY = {"synthetic": {"errors", "sizes", "dtypes", "checkpoint"}, "_sampler": set(), "cli": ALL}
# Types of records from below, named for the reader and never imported at run time.
TYPES_ONLY = {"report.py", "plots.py", "__init__.py"}
MAY_PRINT = {"cli/parser.py", "_terminal.py", "_sampler.py"}
HEAVY = ["torch", "numpy", "transformers", "rich", "accelerate", "safetensors", "psutil", "matplotlib"]

MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
INSIDE = [name for name in MODULES if name not in ("__init__.py", "__main__.py")]


def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / module).read_text(encoding="utf-8"))


def room(module: str) -> str:
    return module.partition("/")[0].removesuffix(".py")


def imported_rooms(module: str, parsed: ast.AST) -> Iterator[str]:
    """The rooms of lowmem that a module names in its imports, wherever in it they stand."""
    here = ["lowmem", *module.split("/")[:-1]]
    for node in ast.walk(parsed):
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "lowmem":
                    yield parts[1] if len(parts) > 1 else "__init__"
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            parts = base + (node.module.split(".") if node.module else [])
            if parts[0] == "lowmem":
                yield from [parts[1]] if len(parts) > 1 else [_room_or_door(alias.name) for alias in node.names]


def _room_or_door(name: str) -> str:
    return name if name in ORDER else "__init__"


class _WithoutTypes(ast.NodeTransformer):
    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        return node.orelse if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING" else node


def test_the_import_reader_sees_every_way_to_import() -> None:
    """Else the tests below could pass for want of eyes."""
    ways = """
import lowmem.memory, os, lowmem
from lowmem.sizes import parse_size
from lowmem import report
from lowmem import inspect
from ..errors import LowmemError
from .. import dtypes
from .records import Shard
from . import index
def late():
    from ..engine.run import run
"""
    found = list(imported_rooms("checkpoint/source.py", ast.parse(ways)))
    expected = [
        "memory",
        "__init__",
        "__init__",
        "sizes",
        "report",
        "errors",
        "dtypes",
        "checkpoint",
        "checkpoint",
        "engine",
    ]
    assert sorted(found) == sorted(expected)
    assert list(imported_rooms("loader.py", ast.parse("from .engine import run\nfrom . import cli"))) == [
        "engine",
        "cli",
    ]


@pytest.mark.parametrize("module", INSIDE)
def test_a_module_imports_only_from_its_own_room_and_those_above(module: str) -> None:
    own, parsed = room(module), tree(module)
    assert own in ORDER, f"{module}: give this room a place in ORDER"
    if module in TYPES_ONLY:
        parsed = _WithoutTypes().visit(parsed)
    allowed = ONLY.get(own, set(ORDER[: ORDER.index(own)])) | {own}
    assert set(imported_rooms(module, parsed)) <= allowed


def test_the_front_door_imports_only_the_errors_at_once() -> None:
    parsed = _WithoutTypes().visit(tree("__init__.py"))
    assert set(imported_rooms("__init__.py", parsed)) == {"errors"}


def loaded_after(code: str) -> list[str]:
    """Which heavy packages a fresh process holds after running `code`."""
    script = f"import sys\n{code}\nprint(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.split()


def test_importing_and_inspecting_load_nothing_heavy(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    assert loaded_after("import lowmem") == []
    assert loaded_after(f"import lowmem\nassert len(lowmem.inspect({str(tmp_path)!r})) == 1") == []
    assert loaded_after("import safetensors") == ["safetensors"]


def test_the_door_is_complete() -> None:
    """Every error, and every name that the door knows a home for, and nothing else."""
    own = {
        name for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == errors.__name__
    }
    assert set(lowmem.__all__) == own | set(lowmem._HOMES) | {"__version__"}
    assert len(lowmem.__all__) == len(set(lowmem.__all__))
    assert set(lowmem.__all__) <= set(dir(lowmem))
    shown = {
        alias.name
        for block in tree("__init__.py").body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert shown == set(lowmem._HOMES)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = lowmem.no_such_name


@pytest.mark.parametrize("name", [name for name in lowmem.__all__ if name != "__version__"])
def test_a_public_name_is_explained(name: str) -> None:
    value = getattr(lowmem, name)
    doc = vars(value).get("__doc__") if isinstance(value, type) else value.__doc__
    assert doc
    # A dataclass without a docstring is given its signature for one.
    assert not doc.startswith(f"{name}(")


def test_errors_are_one_tree_and_the_drawing_shows_it() -> None:
    own = {name for name, value in vars(errors).items() if isinstance(value, type)}
    for name in own:
        assert issubclass(getattr(errors, name), errors.LowmemError)
        assert name in (errors.__doc__ or "")


def undocumented(node: ast.Module | ast.ClassDef, path: str) -> Iterator[str]:
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            if not ast.get_docstring(child):
                yield f"{path}.{child.name}"
            if isinstance(child, ast.ClassDef):
                yield from undocumented(child, f"{path}.{child.name}")


@pytest.mark.parametrize("module", MODULES)
def test_every_public_function_and_class_is_explained(module: str) -> None:
    parsed = tree(module)
    assert ast.get_docstring(parsed), module
    assert list(undocumented(parsed, module)) == []


@pytest.mark.parametrize("module", [name for name in MODULES if name not in MAY_PRINT])
def test_the_library_does_not_print(module: str) -> None:
    calls = [node for node in ast.walk(tree(module)) if isinstance(node, ast.Call)]
    assert [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"] == []


@pytest.mark.parametrize("module", INSIDE)
def test_every_module_can_be_imported_first(module: str) -> None:
    """No circle hides behind the order in which the tests happen to import."""
    name = "lowmem." + module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    assert importlib.import_module(name).__name__ == name
