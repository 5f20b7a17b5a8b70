"""What is required is bounded on both sides, the lowest versions are those that are tested, and an audit is heeded."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import audit
import lowest
import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
# Of torchvision only the version that belongs to torch works, which pip cannot be told.
UNBOUNDED = ("torchvision",)


def test_what_users_install_is_bounded_on_both_sides() -> None:
    extras = lowest.project()["optional-dependencies"]
    users = [*lowest.project()["dependencies"], *(r for name in (*lowest.EXTRAS, "vision") for r in extras[name])]
    bounds = {r.name: sorted(s.operator for s in r.specifier) for r in map(Requirement, users)}
    assert {name for name, found in bounds.items() if found != ["<", ">="]} == set(UNBOUNDED)


def test_every_extra_allows_one_thing_alike() -> None:
    """Bounds that stand in several extras are the same, unless they are pins."""
    found: dict[str, set[str]] = {}
    for extra, requirements in lowest.project()["optional-dependencies"].items():
        for requirement in map(Requirement, requirements):
            if "==" not in str(requirement.specifier) and not extra.startswith(("bench", "dev")):
                found.setdefault(requirement.name, set()).add(str(requirement.specifier))
    assert {name for name, specifiers in found.items() if len(specifiers) > 1} == set()


def test_the_lowest_versions_are_the_projects_own_bounds() -> None:
    """What the command prints for pip is within the bounds, and nothing lower is."""
    printed = subprocess.run(
        [sys.executable, str(ROOT / "tests/lowest.py")], capture_output=True, text=True, check=True
    ).stdout.split()
    pins = dict(pin.split("==") for pin in printed)
    required = {r.name: r for r in map(Requirement, lowest.requirements())}
    assert list(pins) == list(required)
    for name, version in pins.items():
        assert required[name].specifier.contains(version)
        assert f">={version}" in str(required[name].specifier).split(",")


def test_the_lowest_environment_names_no_version_of_its_own() -> None:
    """Its extra would otherwise hide a bound that is too low."""
    names = {Requirement(r).name for r in lowest.project()["optional-dependencies"]["dev-lowest"]}
    assert names.isdisjoint(Requirement(r).name for r in lowest.requirements())


def test_the_tests_of_the_lowest_versions_exist() -> None:
    assert [name for name in lowest.TESTS if not (ROOT / f"tests/{name}.py").is_file()] == []


def test_what_is_installed_is_within_the_bounds() -> None:
    """This run is evidence for the bounds only then."""
    for requirement in map(Requirement, lowest.requirements()):
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            continue
        assert requirement.specifier.contains(Version(version).public), requirement


def test_ci_takes_the_commands_of_the_readme() -> None:
    """A command that README changes beyond what CI looks for would end the run, but only after minutes."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    looked_for = re.findall(r"sed -n 's/\^\\\((.*?)\\\)\$/", (ROOT / ".ci/run").read_text(encoding="utf-8"))
    assert len(looked_for) == 3
    for pattern in looked_for:
        assert len(re.findall(rf"^{pattern}$", readme, flags=re.MULTILINE)) == 1


def test_the_audit_asks_after_what_lowmem_requires_and_what_that_does() -> None:
    found = audit.required()
    assert {"torch", "safetensors", "accelerate", "psutil", "numpy", "rich", "huggingface-hub", "pyyaml"} <= set(found)
    assert not {"pytest", "mypy", "ruff"} & set(found)
    assert not any("+" in version for version in found.values())


def vulnerable(name: str, found: str, *fixed: str, aliases: tuple[str, ...] = ()) -> dict[str, Any]:
    """As pip-audit writes it."""
    vulns = [{"id": found, "fix_versions": list(fixed), "aliases": list(aliases), "description": "odd"}]
    return {"name": name, "version": "1.0", "vulns": vulns}


def test_the_audit_fails_by_what_can_be_mended_and_is_not_accepted() -> None:
    known = next(iter(audit.ACCEPTED))
    report = {
        "dependencies": [
            {"name": "numpy", "version": "2.0", "vulns": []},
            {"name": "six", "skip_reason": "not found on PyPI"},
            vulnerable("torch", "PYSEC-1", "2.99"),
            vulnerable("rich", "PYSEC-2"),
            vulnerable("accelerate", "PYSEC-3", "9.9", aliases=(known,)),
        ]
    }
    assert [(must, line.split(":")[0]) for must, line in audit.judge(report)] == [
        (True, "torch 1.0"),
        (False, "rich 1.0"),
        (False, "accelerate 1.0"),
    ]


@pytest.mark.parametrize(
    ("answer", "code", "text"),
    [
        ("the network is gone", 0, "SKIPPED"),
        ({"dependencies": [{"name": "six", "skip_reason": "not found"}]}, 0, "SKIPPED"),
        ({"dependencies": [{"name": "six", "version": "1", "vulns": []}]}, 0, "1 packages asked after"),
        (
            {"dependencies": [vulnerable("torch", "PYSEC-1", "2.99")]},
            1,
            "VULNERABLE: torch 1.0: PYSEC-1: mended in 2.99",
        ),
    ],
)
def test_the_audit_says_what_it_could_not_ask(
    answer: Any, code: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a database it ends well and says so; with one it ends by what was found."""
    monkeypatch.setattr(audit, "reaches", lambda: None)
    monkeypatch.setattr(audit, "ask", lambda versions: answer)
    assert audit.main() == code
    assert text in capsys.readouterr().out
