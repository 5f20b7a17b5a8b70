"""Time loads of timm's models and of several sources: `python -m bench.vision --folder DIR`.

Each loader has a process of its own that has imported torch, transformers, timm and lowmem; they take turns, the model
is dropped between, and the least is compared. One more load of each, the first of a process, is measured, and its
tensors are compared, bit for bit, with timm's or with those of the model that is put together by hand: a time counts
only when they are equal.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench.arguments import names, positive
from bench.results import Results, Row, describe_machine, versions, write

from .cases import CASES, FULL, SMALL, find_cases
from .tables import as_markdown

_PACKAGES = ("lowmem", "torch", "torchvision", "timm", "transformers", "safetensors")


def parser() -> argparse.ArgumentParser:
    groups = ", ".join(dict.fromkeys(case.name.partition("-")[0] for case in CASES))
    parser = argparse.ArgumentParser(
        prog="python -m bench.vision",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="cases: " + ", ".join(case.name for case in CASES),
    )
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints are written, and stay")
    parser.add_argument("--cases", metavar="A,B", help=f"names of cases, or of groups of them: {groups} (default: all)")
    parser.add_argument("--rounds", type=positive, metavar="N", default=5, help="turns of each loader (default: 5)")
    parser.add_argument("--small", action="store_true", help="tiny checkpoints, whose figures mean nothing")
    parser.add_argument("--timeout", type=float, metavar="S", default=1800, help="of an answer (default: 1800 s)")
    default = Path(__file__).parent.parent / "vision.json"
    parser.add_argument("--output", type=Path, default=default, help="of the figures (default: bench/vision.json)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    commands = parser()
    options = commands.parse_args(argv)
    # So that the children are ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        cases = find_cases(names(options.cases))
    except KeyError as error:
        commands.error(f"no case is called {error}; the cases are {', '.join(case.name for case in CASES)}")
    # They import torch: seconds that `--help` need not take.
    from bench.forward.children import server

    from .operators import declare
    from .runs import Plan, run

    declare()

    folder: Path = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    sizes = SMALL if options.small else FULL
    results: Results = {
        "machine": describe_machine(folder, versions(_PACKAGES)),
        "options": {"rounds": options.rounds, "sizes": asdict(sizes)},
        "cases": [asdict(case) for case in cases],
        "rows": [],
    }

    def done(row: Row) -> None:
        """Write after each row, so that a run that is cut short leaves what it found."""
        results["rows"].append(row)
        write(results, options.output)

    with server("bench.vision.preload") as context:
        plan = Plan(cases, folder, sizes, options.rounds, options.timeout)
        run(plan, context, done, lambda text: print(text, file=sys.stderr, flush=True))
    print(as_markdown(results))
    return 1 if any(_is_bad(row) for row in results["rows"]) else 0


def _is_bad(row: Row) -> bool:
    """What could not be timed here is no failure, nor what the kernel does not allow the others."""
    return row["status"] not in ("ok", "cannot") and (row["status"] != "killed" or row["loader"].startswith("lowmem"))


if __name__ == "__main__":
    sys.exit(main())
