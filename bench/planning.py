"""What planning the largest models costs, by phase, from generated headers: `python -m bench.planning`.

Llama 3.1 405B and DeepSeek-V3 are written as headers and holes (a few MB on the disk) and planned as each rank would
plan them, in turns. The least of several is shown: the machine's own noise only ever adds. The machine is taken to
have memory enough, since what is measured is the plan.

With `--ranks` the same for each of 64 ranks: what one of them pays itself under torchrun once it has the headers and
the model (the mapping, narrowed to its part, and the plan), and what it costs `lowmem.plan_ranks`, which maps once.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from bench.arguments import names, positive
from bench.large import deepseek_v3, llama_405b
from lowmem.sizes import GIB
from lowmem.synthetic import Recipe, write_headers

RECIPES: dict[str, Callable[[], Recipe]] = {"llama-405b": llama_405b, "deepseek-v3": deepseek_v3}
# As the published files of both are cut, or about so.
SHARD = 4_690_000_000
# Of 64 ranks.
MESHES = {"llama-405b": ("dp=8,tp=8", "dp=64"), "deepseek-v3": ("dp=8,tp=8", "dp=8,ep=8", "dp=64")}
# Phases that must wait for the headers and the model of this rank, and are all that a plan itself costs.
OWN = ("map", "place")


def plan_by_phase(source: Path, **options: Any) -> tuple[Any, dict[str, float]]:
    """What `lowmem.plan` gives, and the seconds of what it does.

    The phases: `headers` (of the files, and the index against them), `config` (and what it imports), `build` (the model
    on meta, by transformers), `map` (renames, conversions, which key feeds what), `place` (devices, dtypes, totals),
    and `collector` (its pass over all that was made).

    Args:
        source: a checkpoint.
        options: of `lowmem.plan`, but for those of the model.
    """
    from lowmem._collector import paused_collector
    from lowmem.checkpoint import make_wish
    from lowmem.fitting import Phases, fit
    from lowmem.mapping import refuse
    from lowmem.modeling.request import make_model_request
    from lowmem.modeling.skeleton import find_origin
    from lowmem.planner import make_plan
    from lowmem.planner.request import make_request
    from lowmem.sources import look_at

    request, wish = make_request(**options), make_wish(None, None)
    clock = Phases()
    with paused_collector(), ExitStack() as undo:
        found = look_at(source, rules=request.keys, wish=wish)
        glance = found.glance()
        clock.end("headers")
        origin = find_origin(glance, make_model_request(None))
        clock.end("config")
        made = fit(found, origin, request, undo, clock)
        refuse(made.mapping, made.checkpoint.source, request.strict, request.keys)
        clock.end("map")
        plan = make_plan(made.checkpoint, made.skeleton, made.mapping, request)
        clock.end("place")
    clock.end("collector")
    return plan, clock.seconds


@dataclass(frozen=True)
class OfRank:
    """One rank's plan.

    Attributes:
        rank: its number.
        plan: what it reads and holds.
        targets: the whole model's.
        seconds: of `narrow` (the mapping to its part), `place` (its plan) and `share` (what of its pages others map).
    """

    rank: int
    plan: Any
    targets: Mapping[str, Any]
    seconds: dict[str, float]


def plans_of_ranks(source: Path, mesh: str, clock: Any, beside: int = 8, **options: Any) -> Iterator[OfRank]:
    """What `lowmem.plan_ranks` plans, rank for rank.

    Args:
        source: a checkpoint.
        mesh: as there.
        clock: gets the seconds of what is done once: `headers`, `config`, `build`, `map` and `divide`.
        beside: ranks of a host.
        options: of `lowmem.plan`, but for those of the model.
    """
    from lowmem._collector import paused_collector
    from lowmem.checkpoint import make_wish
    from lowmem.fitting import Phases, fit
    from lowmem.limits import HostMemory
    from lowmem.mapping import refuse
    from lowmem.modeling.parallel import PaperMesh, parse_mesh
    from lowmem.modeling.request import make_model_request
    from lowmem.modeling.skeleton import find_origin
    from lowmem.planner import make_plan
    from lowmem.planner.ranks import mapped_share
    from lowmem.planner.request import make_request
    from lowmem.sources import look_at

    request, wish = make_request(**options), make_wish(None, None)
    paper, memory = PaperMesh(parse_mesh(mesh)), HostMemory(sys.maxsize, "a simulation", {})
    with paused_collector(), ExitStack() as undo:
        found = look_at(source, rules=request.keys, wish=wish)
        glance = found.glance()
        clock.end("headers")
        origin = find_origin(glance, make_model_request(None))
        clock.end("config")
        made = fit(found, origin, request, undo, clock)
        refuse(made.mapping, made.checkpoint.source, request.strict, request.keys)
        clock.end("map")
        targets = paper.divide(made.skeleton.model, made.skeleton.targets, made.skeleton.borrowed)
        made = replace(made, skeleton=replace(made.skeleton, targets=targets))
        clock.end("divide")
        for rank in range(paper.ranks):
            own = Phases()
            local = made.on_rank(rank)
            own.end("narrow")
            plan = make_plan(local.checkpoint, local.skeleton, local.mapping, request, memory)
            own.end("place")
            mapped_share(plan, targets, rank, range(rank // beside * beside, rank // beside * beside + beside))
            own.end("share")
            yield OfRank(rank, plan, targets, own.seconds)


def on_a_large_machine() -> Any:
    """A context in which the host has 4 TiB of memory."""
    from lowmem.limits import HostMemory

    large = HostMemory(4096 * GIB, "a simulation", {})
    return mock.patch("lowmem.planner.plan.host_memory", return_value=large)


def measure(sources: dict[str, Path], rounds: int) -> dict[str, dict[str, Any]]:
    """Figures of each source: the least seconds by phase, and what the plan says."""
    import lowmem

    figures: dict[str, dict[str, Any]] = {}
    for _ in range(rounds):
        for name, source in sources.items():
            gc.collect()
            started = time.perf_counter()
            plan, seconds = plan_by_phase(source)
            seconds["all"] = time.perf_counter() - started
            seconds["map and place"] = sum(seconds[phase] for phase in OWN)
            first = {
                "tensors": len(plan.checkpoint),
                "files": len(plan.checkpoint.shards),
                "GB": round((plan.host.mapped + plan.host.resident) / 1e9, 1),
                "missing": len(plan.mapping.missing),
                "unexpected": len(plan.mapping.unexpected),
                "seconds": seconds,
            }
            least = figures.setdefault(name, first)["seconds"]
            least.update({phase: min(value, least[phase]) for phase, value in seconds.items()})
            del plan
            gc.collect()
            started = time.perf_counter()
            lowmem.plan(source)
            value = time.perf_counter() - started
            least["lowmem.plan()"] = min(value, least.get("lowmem.plan()", value))
    return figures


def measure_ranks(sources: dict[str, Path], rounds: int) -> dict[str, dict[str, Any]]:
    """Figures of each source and mesh: seconds of what is done once and of each rank, and the bytes of these.

    Of the rounds the least counts, and of the ranks the slowest.
    """
    import lowmem
    from lowmem.fitting import Phases

    figures: dict[str, dict[str, Any]] = {}
    for _ in range(rounds):
        for name, mesh in ((model, mesh) for model in sources for mesh in MESHES[model]):
            gc.collect()
            clock, ranks, own = Phases(), [], []
            for one in plans_of_ranks(sources[name], mesh, clock):
                own.append(one.seconds)
                held = sum(device.weights for device in one.plan.devices.values())
                ranks.append({"weights": held, "mapped": one.plan.host.mapped, "reads": one.plan.bytes_read})
            seconds = dict(clock.seconds)
            for phase in own[0]:
                times = [times[phase] for times in own]
                seconds[f"{phase} (slowest rank)"] = max(times)
                seconds[f"{phase} (mean)"] = sum(times) / len(times)
            seconds["a rank itself (slowest)"] = seconds["map"] + max(t["narrow"] + t["place"] for t in own)
            seconds["of plan_ranks, each (slowest)"] = max(sum(t.values()) for t in own)
            started = time.perf_counter()
            lowmem.plan_ranks(sources[name], mesh=mesh, ranks_per_host=8)
            seconds["lowmem.plan_ranks()"] = time.perf_counter() - started
            # Ranks that have the same bytes are one line.
            alike = {tuple(rank.items()): ranks.count(rank) for rank in ranks}
            bytes_ = [{**dict(rank), "ranks": count} for rank, count in alike.items()]
            first = {"ranks": len(ranks), "bytes": bytes_, "seconds": seconds}
            least = figures.setdefault(f"{name} {mesh}", first)["seconds"]
            least.update({phase: min(value, least[phase]) for phase, value in seconds.items()})
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.planning", description=__doc__)
    parser.add_argument("--models", type=names, default=tuple(RECIPES), help=f"of {', '.join(RECIPES)} (default: all)")
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--ranks", action="store_true", help="plan 64 ranks instead of one process")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lowmem-bench-") as folder, on_a_large_machine():
        sources = {
            name: write_headers(RECIPES[name](), Path(folder) / name, max_shard_size=SHARD) for name in arguments.models
        }
        figures = (measure_ranks if arguments.ranks else measure)(sources, arguments.rounds)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    for name, values in figures.items():
        seconds = values.pop("seconds")
        print(f"{name}: {', '.join(f'{value} {what}' for what, value in values.items())}")
        for phase, value in seconds.items():
            print(f"  {phase}: {value:.3f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
