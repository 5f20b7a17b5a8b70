"""The verb that lets a model go on with a prompt."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING, Any

from .._terminal import print_json, progress_bar, say, warn, write_text
from ..errors import OptionError
from ..sizes import format_size
from .options import add_load_options, options, sources
from .parser import FINE, verb

if TYPE_CHECKING:
    from ..loader import LoadResult
    from ..running import RunReport


def add_run(verbs: Any) -> None:
    """`lowmem run`."""
    parser = verb(verbs, "run", "load a model and let it go on with a prompt; text to stdout as it comes", _run)
    add_load_options(parser)
    add = parser.add_argument
    add("--prompt", metavar="TEXT", required=True, help="what the model goes on with; - reads it from stdin")
    add("--max-new-tokens", type=int, default=64, metavar="N", help="how many tokens at most (default 64)")
    add("--chat", action="store_true", help="put the prompt into the tokenizer's chat template")
    add(
        "--sample",
        action="store_true",
        help="draw tokens by their probability (default: the likeliest, so the text is the same each time)",
    )
    add("--temperature", type=float, metavar="NUMBER", help="for --sample (default: the model's)")
    add("--top-p", type=float, metavar="NUMBER", help="for --sample (default: the model's)")
    add("--seed", type=int, metavar="N", help="for --sample: the same text each time")


def _run(arguments: argparse.Namespace) -> int:
    from ..running import run_prompt

    prompt = _stdin() if arguments.prompt == "-" else arguments.prompt
    with contextlib.ExitStack() as bar:
        progress = bar.enter_context(progress_bar())

        def loaded(result: LoadResult) -> None:
            # The bar would stand in the text's way.
            bar.close()
            warn(result.plan.warnings)

        report = run_prompt(
            sources(arguments),
            prompt,
            max_new_tokens=arguments.max_new_tokens,
            chat=arguments.chat,
            sample=arguments.sample,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            seed=arguments.seed,
            write=None if arguments.json else write_text,
            loaded=loaded,
            interrupted=None if arguments.json else _show,
            progress=progress,
            **options(arguments),
        )
    if arguments.json:
        warn(_new_warnings(report))
        print_json(report.to_dict())
    else:
        _show(report)
    return FINE


def _show(report: RunReport) -> None:
    warn(_new_warnings(report))
    say("\n".join(_summary(report)))


def _new_warnings(report: RunReport) -> tuple[str, ...]:
    """Those of the load were shown."""
    return report.warnings[len(report.load.plan.warnings) :]


def _summary(report: RunReport) -> list[str]:
    """Speed and memory, a line each."""
    rate = "" if report.rate is None else f", {report.rate:.2f} tokens/s behind the first"
    lines = [
        f"prompt: {len(report.prompt_ids)} tokens, {report.prompt_rate:.2f} tokens/s "
        f"({report.first_seconds:.2f} s to the first new one)",
        f"new: {len(report.ids)} tokens{rate}",
        f"load: {report.load.seconds:.2f} s, anonymous peak {format_size(report.load.predicted_peak)} predicted, "
        f"{format_size(report.load.peak)} measured",
        f"load and generation: anonymous peak {format_size(report.peak)} measured, resident at most "
        f"{format_size(report.peak_rss)} (with mapped weights and the interpreter)",
    ]
    devices = report.to_dict()["devices"]
    return lines + [f"{name}: peak {format_size(peak)}" for name, peak in devices.items()]


def _stdin() -> str:
    """All of stdin, without the newline that `echo` puts behind it.

    Raises:
        OptionError: there is none, or it is no text.
    """
    try:
        text = sys.stdin.read() if sys.stdin is not None else ""
    except ValueError as error:
        raise OptionError(f"--prompt -: stdin cannot be read as text: {error}; give text in UTF-8") from error
    return text.removesuffix("\n")
