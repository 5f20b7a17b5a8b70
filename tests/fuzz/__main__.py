"""`python tests/fuzz TARGET`: coverage-guided fuzzing by atheris, or by chance alone where it is not installed.

A finding stops it, with the input in `--findings`. New inputs of use go to `--corpus`; `--merge` keeps the fewest that
reach as much, in the corpus that is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import random
import sys
import tempfile
from pathlib import Path

sys.path[:1] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent.parent)]


def main() -> None:
    """Fuzz as the arguments say."""
    parser = argparse.ArgumentParser(prog="python tests/fuzz", description=__doc__)
    parser.add_argument("target")
    parser.add_argument("--runs", type=int, default=10_000, help="executions")
    parser.add_argument("--seconds", type=int, default=0, help="end after so long")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", type=Path, help="folder for new inputs; default: a temporary one")
    parser.add_argument("--findings", type=Path, default=Path("findings"), help="folder for what breaks something")
    parser.add_argument("--merge", type=Path, help="folder to take from into the kept corpus what reaches more")
    parser.add_argument("--by-chance", action="store_true", help="without coverage, and so without atheris")
    wanted = parser.parse_args()
    if wanted.by_chance:
        _by_chance(wanted.target, wanted.runs, wanted.seed, wanted.findings)
    else:
        _guided(wanted)


def _guided(wanted: argparse.Namespace) -> None:
    import atheris

    # The rest is imported first, and not instrumented: torch, transformers.
    for name in ("torch", "safetensors.torch", "numpy", "psutil"):
        importlib.import_module(name)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    with atheris.instrument_imports(include=["lowmem"], enable_loader_override=False):
        from fuzz.guard import Guard, Unwatched
        from fuzz.targets import CORPUS, find

        target = find(wanted.target)
        # lowmem imports its modules when they are first needed.
        for data in target.seeds():
            target.run(Unwatched(), data, folder)

    guard = Guard()
    findings = wanted.findings.resolve()
    findings.mkdir(parents=True, exist_ok=True)
    corpus = wanted.corpus or Path(tempfile.mkdtemp(prefix="corpus-"))
    corpus.mkdir(parents=True, exist_ok=True)
    for data in target.seeds():
        (corpus / hashlib.sha1(data).hexdigest()).write_bytes(data)

    def once(data: bytes) -> None:
        target.run(guard, data, folder)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        chance = random.Random(seed)
        made = atheris.Mutate(data, max_size) if chance.random() < 0.1 else target.mutate(data, chance)
        return bytes(made[:max_size])

    kept = CORPUS / target.name
    kept.mkdir(parents=True, exist_ok=True)
    arguments = ["fuzz", f"-artifact_prefix={findings}/{target.name}-", "-timeout=20", "-rss_limit_mb=4096"]
    arguments += ["-max_len=65536", f"-seed={wanted.seed}", "-print_final_stats=1", "-use_value_profile=0"]
    if wanted.merge:
        arguments += ["-merge=1", str(kept), str(wanted.merge)]
    else:
        arguments += [f"-runs={wanted.runs}", str(corpus), str(kept)]
        arguments += [f"-max_total_time={wanted.seconds}"] if wanted.seconds else []
    atheris.Setup(arguments, once, custom_mutator=mutate, internal_libfuzzer=True)
    atheris.Fuzz()


def _by_chance(name: str, runs: int, seed: int, findings: Path) -> None:
    from fuzz.chance import run_by_chance
    from fuzz.targets import find

    guard = run_by_chance(find(name), runs, seed, findings)
    print(f"{name}: {guard.executions} executions, {guard.refused} refused")


if __name__ == "__main__":
    main()
