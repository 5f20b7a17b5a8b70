"""Known vulnerabilities of what lowmem requires, as it is installed: `python tests/audit.py`.

pip-audit asks PyPI's advisory database. Where that cannot be reached, this says so and ends well.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from lowest import EXTRAS
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

DATABASE = "https://pypi.org/pypi/numpy/2.0.0/json"  # any page of it: whether there is one, and answers in time

# Advisory → why it does not reach lowmem. SECURITY.md has the whole table.
ACCEPTED = {
    "CVE-2025-3000": "torch.jit.script: lowmem compiles nothing",
    "CVE-2025-14925": "accelerate's loading of pickles: lowmem calls none of it",
    "CVE-2026-69112": "accelerate's load_checkpoint_in_model: lowmem reads indexes itself, and checks their paths",
}


def required(name: str = "lowmem", extras: tuple[str, ...] = EXTRAS) -> dict[str, str]:
    """Name → version of what is installed of a distribution's requirements, and of theirs."""
    found: dict[str, str] = {}
    todo: list[tuple[str, tuple[str, ...]]] = [(name, extras)]
    while todo:
        of, wanted = todo.pop()
        for text in metadata.requires(of) or ():
            requirement = Requirement(text)
            marker = requirement.marker
            if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in ("", *wanted)):
                continue
            other = canonicalize_name(requirement.name)
            try:
                version = metadata.version(other)
            except metadata.PackageNotFoundError:
                continue
            if other not in found:
                # PyPI knows nothing of local builds (+cpu): what is known of a version is known of its builds.
                found[other] = Version(version).public
                todo.append((other, tuple(requirement.extras)))
    return found


def reaches() -> str | None:
    """Why the database cannot be asked; None where it can."""
    try:
        with urllib.request.urlopen(DATABASE, timeout=5) as answer:
            return None if answer.status == 200 else f"{DATABASE} answers {answer.status}"
    except (OSError, urllib.error.URLError) as error:
        return f"{DATABASE}: {error}"


def ask(versions: dict[str, str]) -> dict[str, Any] | str:
    """pip-audit's report, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder) / "requirements.txt"
        pins.write_text("".join(f"{name}=={version}\n" for name, version in versions.items()), encoding="utf-8")
        command = [sys.executable, "-m", "pip_audit", "--requirement", str(pins), "--no-deps", "--disable-pip"]
        command += ["--format", "json", "--progress-spinner", "off", "--timeout", "5"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
            report: dict[str, Any] = json.loads(done.stdout)
        except subprocess.TimeoutExpired:
            return "it does not answer in time"
        except ValueError:
            return done.stderr.strip().rsplit("\n", 1)[-1]
    return report


def judge(report: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    """A line for each advisory, and whether something must be done: it has a mended version, and is not accepted."""
    for dependency in report["dependencies"]:
        for found in dependency.get("vulns", ()):
            names = [found["id"], *found.get("aliases", ())]
            why = next((ACCEPTED[name] for name in names if name in ACCEPTED), None)
            mended = ", ".join(found["fix_versions"])
            about = f"{dependency['name']} {dependency['version']}: {', '.join(names)}"
            yield bool(mended) and why is None, f"{about}: {why or (f'mended in {mended}' if mended else 'not mended')}"


def main() -> int:
    """Ask, and say what was found; 1 where something must be done."""
    versions = required()
    report = reaches() or ask(versions)
    if isinstance(report, str):
        print(f"audit: SKIPPED: no advisory database can be asked here: {report}")
        return 0
    asked = [d["name"] for d in report["dependencies"] if "skip_reason" not in d]
    if not asked:
        print("audit: SKIPPED: the database that answers here knows none of the packages")
        return 0
    unknown = sorted(set(versions) - set(asked))
    lines = list(judge(report))
    for must, line in lines:
        print("audit:", "VULNERABLE:" if must else "accepted:", line)
    print(f"audit: {len(asked)} packages asked after" + (f"; not known: {', '.join(unknown)}" if unknown else ""))
    return int(any(must for must, _ in lines))


if __name__ == "__main__":
    sys.exit(main())
