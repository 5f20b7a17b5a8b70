"""Time the forward of models whose weights are on disk: `python -m bench.forward --folder DIR`.

Each loader has a process of its own that stays alive; they take turns with tokens over several rounds, and the least
is compared. A time counts only when all logits are, bit for bit, those of the model that is fully in memory. Cold
files count only when the kernel says that none of their pages is in memory.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench.arguments import names, positive
from bench.results import Results, Row, describe_machine, versions, write
from lowmem.errors import OptionError
from lowmem.sizes import parse_size

from .cases import CASES, Case, find_cases
from .goals import judge
from .tables import as_markdown

_PACKAGES = ("lowmem", "torch", "transformers", "accelerate", "safetensors")


def parser() -> argparse.ArgumentParser:
    groups = ", ".join(dict.fromkeys(case.name.partition("-")[0] for case in CASES))
    parser = argparse.ArgumentParser(
        prog="python -m bench.forward",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="cases: " + ", ".join(case.name for case in CASES),
    )
    parser.add_argument("--cases", metavar="A,B", help=f"names of cases, or of groups of them: {groups} (default: all)")
    parser.add_argument("--loaders", metavar="X,Y", help="names of loaders (default: all); the first is the reference")
    parser.add_argument("--quick", action="store_true", help="a 250 MB checkpoint, few rounds and forwards")
    parser.add_argument("--rounds", type=positive, metavar="N", help="turns of each loader (default: 10; quick: 2)")
    parser.add_argument("--steps", type=positive, metavar="N", help="tokens in a turn (default: 4; quick: 2); cold 1")
    parser.add_argument("--forwards", type=positive, metavar="N", help="of `steady` (default: 200; quick: 20)")
    parser.add_argument("--tokens", type=positive, metavar="N", default=16, help="of `limit` (default: 16)")
    parser.add_argument("--limit", default="1.5GiB", metavar="SIZE", help="of `limit` (default: 1.5GiB)")
    parser.add_argument("--timeout", type=float, metavar="S", default=1800, help="of an answer (default: 1800 s)")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written and kept (default: temporary)")
    parser.add_argument("--json", type=Path, help="write the figures there, after each row")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    commands = parser()
    options = commands.parse_args(argv)
    # So that the children are ended and temporary files removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        cases = find_cases(names(options.cases), names(options.loaders), quick=options.quick)
        limit = parse_size(options.limit, "--limit")
    except KeyError as error:
        commands.error(f"no case or loader is called {error}; the cases are {', '.join(c.name for c in CASES)}")
    except OptionError as error:
        commands.error(str(error))
    results = _measure(options, cases, limit)
    print(as_markdown(results))
    # What could not be timed here is no failure; what is wrong is.
    return 0 if all(row["status"] in ("ok", "cannot") for row in results["rows"]) else 1


def _measure(options: argparse.Namespace, cases: tuple[Case, ...], limit: int) -> Results:
    """Run, and write the results after each row, so that a run that is cut short leaves what it found."""
    # They import torch: seconds that `--help` need not take.
    from .children import server
    from .runs import Plan, run

    quick = options.quick
    counts = {
        "rounds": options.rounds or (2 if quick else 10),
        "steps": options.steps or (2 if quick else 4),
        "forwards": options.forwards or (20 if quick else 200),
        "tokens": options.tokens,
        "limit": limit,
    }
    with contextlib.ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory
        folder: Path = options.folder or Path(stack.enter_context(temporary(prefix="lowmem-bench-")))
        folder.mkdir(parents=True, exist_ok=True)
        work = Path(stack.enter_context(temporary(prefix="work-", dir=folder)))
        plan = Plan(cases=cases, folder=folder, work=work, seconds=options.timeout, **counts)
        results: Results = {
            "machine": describe_machine(folder, versions(_PACKAGES)),
            "options": counts,
            "cases": [asdict(case) for case in cases],
            "goals": [],
            "rows": [],
        }

        def done(row: Row) -> None:
            results["rows"].append(row)
            results["goals"] = [asdict(outcome) for outcome in judge(results["rows"])]
            if options.json is not None:
                write(results, options.json)

        context = stack.enter_context(server())
        run(plan, context, done, lambda text: print(text, file=sys.stderr, flush=True))
    return results


if __name__ == "__main__":
    sys.exit(main())
