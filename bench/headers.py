"""What looking and planning cost, without any weight: `python -m bench.headers`.

A checkpoint of 30,000 small tensors is inspected by the shell's verb in a fresh process and by the library, and
planned into a plain module on meta. The least of several is shown: the machine's own noise only ever adds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lowmem


def least(action: Callable[[], Any], rounds: int) -> float:
    """Seconds of the fastest of `rounds` runs."""
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - started)
    return best


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.headers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lowmem-bench-") as folder:
        source = Path(folder) / "many-small"
        subprocess.run(
            [sys.executable, "-m", "bench.make_checkpoint", "many-small", str(source)], check=True, stdout=sys.stderr
        )
        verb = [sys.executable, "-m", "lowmem", "inspect", str(source)]
        figures = {
            "tensors": len(lowmem.inspect(source)),
            "lowmem inspect, whole process": least(
                lambda: subprocess.run(verb, check=True, stdout=subprocess.DEVNULL), arguments.rounds
            ),
            "lowmem.inspect()": least(lambda: lowmem.inspect(source), arguments.rounds),
        }
        assert "torch" not in sys.modules, "inspect must not need torch"
        from bench.models import plain_module, shapes_of

        model = plain_module(shapes_of(source))
        lowmem.plan(source, model=model)
        figures["lowmem.plan()"] = least(lambda: lowmem.plan(source, model=model), arguments.rounds)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    for name, value in figures.items():
        print(f"{name}: {value:.3f} s" if isinstance(value, float) else f"{name}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
