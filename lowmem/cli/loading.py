"""The verbs that look, plan and load."""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING, Any

from .._terminal import print_json, progress_bar, show, warn
from .options import (
    add_fit_options,
    add_load_options,
    add_plot,
    add_rank_options,
    add_source,
    draw,
    fit_options,
    options,
    picture_of,
    rank_options,
    source_options,
    sources,
)
from .parser import FAILED, FINE, verb

if TYPE_CHECKING:
    from ..loader import LoadResult
    from ..mapping import KeyDiff


def add_inspect(verbs: Any) -> None:
    """`lowmem inspect`."""
    parser = verb(verbs, "inspect", "show what a checkpoint holds; reads headers only", _inspect)
    add_source(parser)
    parser.add_argument("--tensors", action="store_true", help="list every tensor too")


def add_plan(verbs: Any) -> None:
    """`lowmem plan`."""
    parser = verb(verbs, "plan", "show what a load would do and need; reads no tensor byte", _plan)
    add_load_options(parser)
    add_rank_options(parser)


def add_diff(verbs: Any) -> None:
    """`lowmem diff`."""
    parser = verb(verbs, "diff", "show which keys and shapes differ from the model's, and what would mend it", _diff)
    add_source(parser)
    add_fit_options(parser)


def add_load(verbs: Any) -> None:
    """`lowmem load`."""
    parser = verb(verbs, "load", "load a checkpoint and report predicted beside measured memory", _load)
    add_load_options(parser)
    add_plot(parser)


def _inspect(arguments: argparse.Namespace) -> int:
    from ..checkpoint import inspect

    checkpoint = inspect(arguments.source, **source_options(arguments))
    warn(checkpoint.warnings)
    if arguments.json:
        print_json(checkpoint.to_dict())
        return FINE
    from ..report import checkpoint_tables, tensor_table

    show(*checkpoint_tables(checkpoint))
    if arguments.tensors:
        show(tensor_table(checkpoint))
    return FINE


def _plan(arguments: argparse.Namespace) -> int:
    several = rank_options(arguments)
    if several:
        return _plan_ranks(arguments, several)
    from ..loader import plan

    decided = plan(sources(arguments), **options(arguments))
    warn(decided.warnings)
    if arguments.json:
        print_json(decided.to_dict())
        return FINE
    from ..report import plan_tables

    show(*plan_tables(decided))
    return FINE


def _plan_ranks(arguments: argparse.Namespace, several: dict[str, Any]) -> int:
    from ..rank_planning import plan_ranks

    decided = plan_ranks(sources(arguments), **several, **options(arguments))
    warn(decided.warnings)
    if arguments.json:
        print_json(decided.to_dict())
        return FINE
    from ..report import ranks_tables

    show(*ranks_tables(decided))
    return FINE


def _diff(arguments: argparse.Namespace) -> int:
    from ..loader import diff

    found = diff(sources(arguments), **source_options(arguments), **fit_options(arguments))
    code = FAILED if found.missing or found.mismatched else FINE
    if arguments.json:
        print_json(found.to_dict())
        return code
    from ..report import plain

    show(*(plain(line) for line in found.text().split("\n")))
    if found.rename or found.reshape or found.prefixes:
        show("in the shell:", plain(_as_arguments(found)))
    return code


def _as_arguments(found: KeyDiff) -> str:
    """The rules that would mend a difference, as the shell takes them."""
    parts = [f"--rename {shlex.quote(f'{old}={new}')}" for old, new in found.rename.items()]
    parts += [f"--reshape {shlex.quote(','.join(found.reshape))}"] if found.reshape else []
    return " ".join(parts) or f"--prefix {shlex.quote(found.prefixes[0])}"


def _load(arguments: argparse.Namespace) -> int:
    from ..loader import load

    picture = picture_of(arguments)
    with progress_bar() as progress:
        result = load(sources(arguments), progress=progress, **options(arguments))
    warn(result.plan.warnings)
    drawn = FINE
    try:
        _show_load(result, arguments.json)
    finally:
        if picture is not None:
            drawn = draw(lambda: result.report.plot(picture))
    return drawn


def _show_load(result: LoadResult, as_json: bool) -> None:
    if as_json:
        print_json(result.report.to_dict())
        return
    from ..report import phase_table, plan_tables, report_table

    show(*plan_tables(result.plan), report_table(result.report), phase_table(result.report))
