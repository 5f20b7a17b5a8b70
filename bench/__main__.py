"""Time lowmem beside its peers and the machine's limit: `python -m bench --quick`."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.arguments import names, positive
from bench.cases import CASES, Case, find_cases
from bench.children import Forks, Fresh
from bench.results import Results, Row, describe_machine, make_results, write
from bench.runs import Plan, run
from bench.tables import as_markdown


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Run cases x loaders, each in a process of its own, and write results.json, results.md and plots.",
    )
    parser.add_argument("--quick", action="store_true", help="a 250 MB checkpoint, few cases: under three minutes")
    parser.add_argument("--list", action="store_true", help="list cases and loaders, and end")
    parser.add_argument("--cases", metavar="A,B", help="names of cases (default: all)")
    parser.add_argument("--loaders", metavar="X,Y", help="names of loaders (default: all)")
    parser.add_argument("--rounds", type=positive, metavar="N", help="processes of each (default: 3; quick: 1)")
    parser.add_argument("--repeats", type=positive, metavar="N", help="loads in each process (default: 5; quick: 3)")
    parser.add_argument("--timeout", type=float, metavar="S", default=600, help="of a process (default: 600 s)")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written and kept (default: temporary)")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="where results go (bench-results)")
    parser.add_argument("--no-plots", action="store_true", help="draw nothing")
    parser.add_argument("--no-least-memory", action="store_true", help="look for no smallest kernel limit")
    parser.add_argument("--forks", action="store_true", help="fork one interpreter: quicker, imports are not timed")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    commands = parser()
    options = commands.parse_args(argv)
    # So that the children are ended and temporary files removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # It imports torch: seconds, but the versions must come from the loaders themselves.
    from bench.loaders import LOADERS

    if options.list:
        _list()
        return 0
    try:
        cases = find_cases(names(options.cases), options.quick)
        loaders = names(options.loaders) or tuple(LOADERS)
        unknown = [name for name in loaders if name not in LOADERS]
        if unknown:
            raise KeyError(unknown[0])
    except KeyError as error:
        commands.error(f"nothing here is called {error}; --list shows what there is")
    options.out.mkdir(parents=True, exist_ok=True)
    results = _measure(options, cases, loaders)
    text = as_markdown(results)
    (options.out / "results.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    if not options.no_plots:
        _draw(results, options.out)
    return 0


def _list() -> None:
    from bench.loaders import LOADERS
    from bench.loaders.base import versions

    for case in CASES:
        print(f"{case.name:<16}{case.title}")
    print()
    for loader in LOADERS.values():
        found = ", ".join(f"{name} {version}" for name, version in versions(loader).items())
        print(f"{loader.name:<16}{found}")


def _measure(options: argparse.Namespace, cases: tuple[Case, ...], loaders: tuple[str, ...]) -> Results:
    """Run, and write the results after each row, so that a run that is cut short leaves what it found."""
    from bench.loaders import LOADERS
    from bench.loaders.base import versions

    rounds = options.rounds or (1 if options.quick else 3)
    repeats = options.repeats or (3 if options.quick else 5)
    used = {package: version for name in loaders for package, version in versions(LOADERS[name]).items()}
    children = Forks() if options.forks or options.quick else Fresh()
    with contextlib.ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory
        folder: Path = options.folder or Path(stack.enter_context(temporary(prefix="lowmem-bench-")))
        folder.mkdir(parents=True, exist_ok=True)
        work = Path(stack.enter_context(temporary(prefix="work-", dir=folder)))
        least = not options.no_least_memory and not options.quick
        plan = Plan(cases, loaders, folder, work, rounds, repeats, options.timeout, least)
        results = make_results(describe_machine(folder, used), cases, {"rounds": rounds, "repeats": repeats})
        results["titles"] = {name: LOADERS[name].title for name in loaders}

        def done(row: Row) -> None:
            results["rows"].append(row)
            write(results, options.out / "results.json")

        stack.callback(children.close)
        run(plan, children, done, lambda text: print(text, file=sys.stderr, flush=True))
    return results


def _draw(results: Results, out: Path) -> None:
    try:
        from bench.plots import draw

        written = draw(results, out)
    except ImportError as error:
        print(f"no plots: {error}; pip install lowmem[bench]", file=sys.stderr)
        return
    print(*(str(file) for file in written), sep="\n", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
