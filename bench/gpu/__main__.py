"""Time loads into a CUDA device, and forwards there: `python -m bench.gpu --folder DIR`.

In one process, by turns, warm and, unless told otherwise, with the files out of the page cache; the least of each is
compared, after a load that does not count. The rate of the bus is measured between the rounds: pinned memory to the
device. A time counts only when all tensors are, bit for bit, those of safetensors and torch. Below each table it says
which goals are met.

The part `forward` runs one token and 512 with the layers in host memory or on disk, by lowmem's own dispatch, by
accelerate's hooks and by transformers: the least of each, what it puts out beside a model that is all on the device,
and the peak of device memory.

Without a CUDA device it says so and measures nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.arguments import names, positive
from bench.results import Results, Row, describe_machine, versions, write

from .bus import pinned_rate, release

_PACKAGES = ("lowmem", "torch", "transformers", "accelerate", "safetensors", "fastsafetensors", "instanttensor")
_MIB = 1 << 20

# The goals: a part of the rate of the bus, how often as fast as others, and device memory above what is resident.
_OF_THE_BUS = 0.8
_FASTER = {"transformers": 5, "fastsafetensors": 2}
_ABOVE = 64 * _MIB


_PARTS = ("load", "forward")


def _parts(text: str) -> tuple[str, ...]:
    found = names(text)
    unknown = [name for name in found if name not in _PARTS]
    if unknown or not found:
        raise argparse.ArgumentTypeError(f"expected load, forward or both, found {text!r}")
    return found


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint is written, and stays")
    parser.add_argument("--size", type=positive, metavar="MIB", default=8192, help="of it, in bf16 (default: 8192)")
    parser.add_argument("--parts", metavar="A,B", type=_parts, default=_PARTS, help="load,forward (default: both)")
    dtypes = "auto,float32,float16"
    parser.add_argument("--dtypes", metavar="A,B", default=dtypes, help="of loads (default: %(default)s)")
    parser.add_argument("--loaders", metavar="A,B", help="who loads, in that part (default: all that are installed)")
    told = "(default: cuda:0); cpu tries the order of the part forward without a device"
    parser.add_argument("--device", default="cuda:0", help=told)
    parser.add_argument("--rounds", type=positive, metavar="N", default=5, help="turns of each loader (default: 5)")
    parser.add_argument("--warm-only", action="store_true", help="leave the files in the page cache")
    default = Path(__file__).parent.parent / "gpu.json"
    parser.add_argument("--output", type=Path, default=default, help="of the figures (default: bench/gpu.json)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    import torch

    tried = options.device == "cpu" and options.parts == ("forward",)
    if not (tried or torch.cuda.is_available()):
        print("bench.gpu: there is no CUDA device here, so nothing was measured", file=sys.stderr)
        return 0
    from lowmem.synthetic import llama_recipe, write_checkpoint

    folder: Path = options.folder.resolve() / f"llama-{options.size}"
    if not (folder / "config.json").exists():
        write_checkpoint(llama_recipe(options.size * _MIB), folder, max_shard_size=2048 * _MIB)
    gpu = None if tried else torch.cuda.get_device_name(options.device)
    results: Results = {
        "machine": {**describe_machine(folder, versions(_PACKAGES)), "gpu": gpu},
        "options": {"rounds": options.rounds, "size": options.size, "device": options.device},
        "rows": [],
    }
    if "load" in options.parts:
        _run_loads(folder, options, results)
    if "forward" in options.parts:
        _run_forwards(folder, options, results)
    return 1 if any(row["status"] == "differs" for row in results["rows"]) else 0


def _run_loads(folder: Path, options: argparse.Namespace, results: Results) -> None:
    for dtype in names(options.dtypes):
        results["rows"] += _Case(folder, dtype, options).run()
        write(results, options.output)
        print(as_markdown(dtype, results["rows"]))
        print(goals(dtype, results["rows"]), flush=True)


def _run_forwards(folder: Path, options: argparse.Namespace, results: Results) -> None:
    from . import forward

    def done(rows: list[Row]) -> None:
        results["rows"] += rows
        write(results, options.output)
        print(forward.as_markdown(rows), flush=True)

    work, cold = options.folder.resolve(), not options.warm_only
    forward.run(folder, work, options.device, options.rounds, cold=cold, done=done)


class _Case:
    """All loaders by turns, with one dtype."""

    def __init__(self, folder: Path, dtype: str, options: argparse.Namespace) -> None:
        from .loaders import LOADERS, shards

        wanted = names(options.loaders)
        self._loaders = [one for one in LOADERS if one.is_here and (not wanted or one.name in wanted)]
        self._folder, self._dtype, self._options = folder, dtype, options
        self._shards = shards(folder)
        self._size = sum(shard.stat().st_size for shard in self._shards)
        self._rows: dict[str, dict[str, Any]] = {}
        self._rates: list[float] = []

    def run(self) -> list[dict[str, Any]]:
        from bench.page_cache import drop, warm

        for loader in self._loaders:
            row: dict[str, Any] = {"loader": loader.name, "dtype": self._dtype, "status": "ok", "warm": [], "cold": []}
            self._rows[loader.name] = row
            # Once for the imports, the device's context and the caches, and to compare.
            self._try(loader, row, None)
        for _ in range(self._options.rounds):
            self._rates.append(pinned_rate(self._options.device))
            for kind in ["warm"] if self._options.warm_only else ["warm", "cold"]:
                for loader in self._loaders:
                    row = self._rows[loader.name]
                    if row["status"] != "ok":
                        continue
                    release()
                    if kind == "warm":
                        warm(self._shards)
                    elif drop(self._shards):
                        row["cold_failed"] = "pages stayed in the page cache"
                        continue
                    self._try(loader, row, kind)
        for row in self._rows.values():
            row.update(pinned=max(self._rates), bytes=self._size)
        return list(self._rows.values())

    def _try(self, loader: Any, row: dict[str, Any], kind: str | None) -> None:
        """One load; of `kind` None it is compared and its memory is measured, and not its time."""
        import torch

        device = self._options.device
        release()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        try:
            started = time.perf_counter()
            state = loader.load(self._folder, self._dtype, device)
            torch.cuda.synchronize(device)
            seconds = time.perf_counter() - started
        except Exception as error:  # whatever another loader raises is told, and the others go on
            row.update(status="failed", reason=f"{type(error).__name__}: {error}"[:300])
            return
        if kind is not None:
            row[kind].append(seconds)
            return
        row["peak"] = torch.cuda.max_memory_allocated(device) - before
        row["resident"] = sum({t.data_ptr(): t.nbytes for t in state.values()}.values())
        different = difference(state, self._shards, self._dtype)
        if different:
            row.update(status="differs", reason=different)


def difference(state: dict[str, Any], shards: Sequence[Path], dtype: str) -> str:
    """The first tensor that is not as safetensors and torch make it on the CPU; empty when all are."""
    import torch
    from safetensors import safe_open

    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                wanted = file.get_tensor(key)
                wanted = wanted if dtype == "auto" else wanted.to(getattr(torch, dtype))
                found = state.get(key)
                if found is None or found.dtype != wanted.dtype or found.shape != wanted.shape:
                    return str(key)
                if not torch.equal(found.cpu().view(torch.uint8), wanted.view(torch.uint8)):
                    return str(key)
    return ""


def as_markdown(dtype: str, rows: Sequence[dict[str, Any]]) -> str:
    """A table of one dtype; rates are of bytes of the files."""
    rows = [row for row in rows if row["dtype"] == dtype]
    lines = [
        f"**{dtype}**, the bus {rows[0]['pinned'] / 1e9:.1f} GB/s" if rows else f"**{dtype}**",
        "",
        "| loader | warm, s | GB/s | of the bus | cold, s | GB/s | device peak above resident, MiB | |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        least = {kind: min(row[kind], default=None) for kind in ("warm", "cold")}
        cells = [row["loader"]]
        for kind, seconds in least.items():
            rate = None if seconds is None else row["bytes"] / seconds
            cells += ["-" if seconds is None else f"{seconds:.3f}", "-" if rate is None else f"{rate / 1e9:.1f}"]
            if kind == "warm":
                cells.append("-" if rate is None else f"{rate / row['pinned']:.0%}")
        above = _above(row)
        cells.append("-" if above is None else f"{above / _MIB:.0f}")
        cells.append(row.get("reason", row.get("cold_failed", "")))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _above(row: dict[str, Any]) -> int | None:
    """Device memory beside the tensors; None for who takes memory past torch's allocator, which does not count it."""
    return row["peak"] - row["resident"] if "peak" in row and row["peak"] >= row["resident"] else None


def goals(dtype: str, rows: Sequence[dict[str, Any]]) -> str:
    """Which goals a load with lowmem reaches with one dtype; of times, warm ones."""
    found = {row["loader"]: row for row in rows if row["dtype"] == dtype and row.get("status", "ok") == "ok"}
    own = found.get("lowmem", {})
    least = min(own.get("warm", ()), default=None)
    lines = []

    def told(goal: str, value: float | None, shown: str, *, met: bool) -> None:
        lines.append(f"- {goal}: " + ("not measured" if value is None else f"{shown}, {'met' if met else 'not met'}"))

    rate = None if least is None else own["bytes"] / least / own["pinned"]
    told(f"at least {_OF_THE_BUS:.0%} of the bus", rate, f"{rate or 0:.1%}", met=(rate or 0) >= _OF_THE_BUS)
    for name, factor in _FASTER.items():
        other = min(found.get(name, {}).get("warm", ()), default=None)
        times = None if least is None or other is None else other / least
        told(f"at least {factor}x {name}", times, f"{times or 0:.2f}x", met=(times or 0) >= factor)
    above = _above(own)
    met = above is not None and above <= _ABOVE
    told(f"at most {_ABOVE / _MIB:.0f} MiB above resident", above, f"{(above or 0) / _MIB:.1f} MiB", met=met)
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
