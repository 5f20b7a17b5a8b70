"""Time loads by several ranks on the CPU: `python -m bench.ranks --folder DIR`.

The ranks are processes of torch.distributed with gloo, one thread each, as torchrun makes them. They have imported
everything, all ways take turns in them, the model is dropped between, and the least is compared: the seconds of the
slowest rank from a barrier on. One more load of each way, the first of new processes, is measured, and what each rank
holds is compared with the part that torch would give it of the checkpoint. Then each way loads once in processes in a
memory cgroup that allows for each of them the interpreter, what the rank holds of the model, and 80 MiB.
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
from lowmem.errors import LowmemError
from lowmem.sizes import parse_size

from .cases import CASES, find_cases
from .tables import as_markdown

_PACKAGES = ("lowmem", "torch", "transformers", "accelerate", "safetensors")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.ranks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="cases: " + ", ".join(case.name for case in CASES),
    )
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint is written, and stays")
    parser.add_argument("--size", default="2.5GB", help="of the checkpoint, in bfloat16 (default: 2.5GB)")
    parser.add_argument("--ranks", metavar="A,B", default="2,4", help="numbers of ranks (default: 2,4)")
    parser.add_argument("--cases", metavar="A,B", help="names of cases, or how they begin (default: all)")
    parser.add_argument("--rounds", type=positive, metavar="N", default=5, help="turns of each way (default: 5)")
    parser.add_argument("--no-limits", action="store_true", help="no loads under a kernel limit")
    parser.add_argument("--timeout", type=float, metavar="S", default=300, help="of an answer (default: 300 s)")
    default = Path(__file__).parent.parent / "ranks.json"
    parser.add_argument("--json", type=Path, default=default, help="of the figures (default: bench/ranks.json)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    commands = parser()
    options = commands.parse_args(argv)
    # So that the children are ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        cases = find_cases(names(options.cases))
        ranks = tuple(positive(text) for text in names(options.ranks))
        size = parse_size(options.size, "--size")
    except KeyError as error:
        commands.error(f"no case is called {error}; the cases are {', '.join(case.name for case in CASES)}")
    except (ValueError, argparse.ArgumentTypeError, LowmemError) as error:
        commands.error(str(error))
    # They import torch: seconds that `--help` need not take.
    from bench.forward.children import server

    from .checkpoint import HEADS, make
    from .runs import Plan, run

    if not ranks or any(count < 2 or HEADS % count for count in ranks):
        commands.error(f"--ranks: expected 2, 4 or 8, which divide the model's {HEADS} heads, found {options.ranks}")
    folder: Path = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    source = make(folder, size)
    results: Results = {
        "machine": describe_machine(folder, versions(_PACKAGES)),
        "options": {
            "rounds": options.rounds,
            "ranks": list(ranks),
            "checkpoint": source.name,
            "size": sum(file.stat().st_size for file in source.glob("*.safetensors")),
            "threads": 1,
        },
        "cases": [asdict(case) for case in cases],
        "rows": [],
    }

    def done(row: Row) -> None:
        """Write after each row, so that a run that is cut short leaves what it found."""
        results["rows"].append(row)
        write(results, options.json)

    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    with server("bench.ranks.preload") as context:
        run(Plan(cases, ranks, source, options.rounds, options.timeout, not options.no_limits), context, done, tell)
    print(as_markdown(results))
    return 1 if any(_is_bad(row) for row in results["rows"]) else 0


def _is_bad(row: Row) -> bool:
    """Whether it failed; under a limit only lowmem must pass."""
    limited = row.get("limited", {}).get("status", "ok")
    return row["status"] not in ("ok", "cannot") or (
        row["loader"].startswith("lowmem") and limited not in ("ok", "cannot")
    )


if __name__ == "__main__":
    sys.exit(main())
