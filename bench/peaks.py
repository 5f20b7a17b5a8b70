"""Peak memory of whole loads, beside the plan's prediction and under a kernel limit: `python -m bench.peaks`.

Each case runs in a fresh process that has imported everything first. Its anonymous peak above those imports is
compared with the prediction; then the same load runs again under a memory cgroup (or RLIMIT_DATA, where none can be
made) of the predicted peak plus 5 % plus what the interpreter itself holds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.device_maps import DISJOINT, LAYERS_TO_DISK
from bench.kernel_limits import Limit, find_limit
from bench.sources import make_checkpoint
from lowmem.sizes import MIB

PEERS = ("transformers", "accelerate")
# What may stay in memory above the weights: the model's modules, and pages that the allocator keeps.
_HELD = 32 * MIB


@dataclass(frozen=True)
class Case:
    """One load with `options` of a checkpoint that is `stored` so.

    `bound`: bytes it may add above resident; `peers`: those that can do it.
    """

    name: str
    checkpoint: str
    bound: int
    options: dict[str, Any] = field(default_factory=dict)
    peers: tuple[str, ...] = PEERS
    stored: str = "bfloat16"

    @property
    def is_int8(self) -> bool:
        """Whether int8 is loaded, or what it is made from."""
        return self.stored == "int8" or "quantize" in self.options


CASES = (
    Case("Llama 1B, bf16 mapped", "llama-1b", 32 * MIB),
    Case("Llama 1B, bf16 copied", "llama-1b", 80 * MIB, {"residency": "copy"}, peers=()),
    Case("Llama 1B, bf16 to fp32", "llama-1b", 80 * MIB, {"dtype": "float32"}),
    Case(
        "Llama 1B, layers on disk, bf16",
        "llama-1b",
        80 * MIB,
        {"device_map": LAYERS_TO_DISK, "offload_folder": "OFFLOAD"},
    ),
    Case(
        "Llama 1B, layers to disk as fp32",
        "llama-1b",
        80 * MIB,
        {"device_map": LAYERS_TO_DISK, "dtype": "float32", "offload_folder": "OFFLOAD"},
    ),
    Case("Qwen3 MoE of 2.4 GB, bf16", "qwen3-moe", 80 * MIB, peers=("transformers",)),
    Case("Qwen3 MoE of 2.4 GB, bf16 to fp32", "qwen3-moe", 80 * MIB, {"dtype": "float32"}, peers=("transformers",)),
    Case(
        "one 3 GB tensor, cast to disk",
        "one-3gb-tensor",
        80 * MIB,
        {"device_map": "disk", "dtype": "float32", "offload_folder": "OFFLOAD"},
        peers=(),
    ),
    Case("Llama 1B, bf16 to int8", "llama-1b", 80 * MIB, {"quantize": "int8"}, peers=("transformers",)),
    Case(
        "Llama 1B, int8 layers to disk",
        "llama-1b",
        80 * MIB,
        {"device_map": LAYERS_TO_DISK, "quantize": "int8", "offload_folder": "OFFLOAD"},
        peers=(),
    ),
    Case(
        "Llama 1B int8, to bf16",
        "llama-1b",
        80 * MIB,
        {"dequantize": True, "dtype": "bfloat16"},
        peers=("transformers",),
        stored="int8",
    ),
    Case(
        'Llama 1B to int8, device_map="auto"',
        "llama-1b",
        80 * MIB,
        # The embedding is 501 MiB, each of 16 layers 58 MiB, and room for one is left: 8 stay in memory.
        {"device_map": "auto", "max_memory": {"cpu": "1040MiB"}, "quantize": "int8", "offload_folder": "OFFLOAD"},
        peers=(),
    ),
)

# Runs in the measured process: imports first, then one load, then one line of JSON.
_CHILD = """
import json, sys
source, options, loader, limit = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], int(sys.argv[4])
int8 = sys.argv[5] == "int8"
import torch, accelerate, lowmem, lowmem.loader, lowmem.memory
import gc, pathlib, transformers.generation.utils
from transformers import AutoConfig
named = pathlib.Path(source, "config.json")
architecture = json.loads(named.read_text())["architectures"][0] if named.exists() else "LlamaForCausalLM"
architecture = getattr(transformers, architecture)
if int8:
    import bitsandbytes, transformers.integrations.bitsandbytes, transformers.quantizers.quantizer_bnb_8bit
before = lowmem.memory.anonymous_memory()
if limit:
    from bench.kernel_limits import enter
    enter(limit)

class One(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(lowmem.inspect(source)["weight"].shape, device="meta"))

    def forward(self, x):  # weights of modules without one stay in memory: no hook would fetch them
        return torch.nn.functional.linear(x, self.weight)

kept = []

def with_lowmem():
    given = {"model": One} if source.endswith("one-3gb-tensor") else {}
    result = lowmem.load(source, **options, **given)
    kept.append(result.model)
    host = result.plan.host
    return {"peak": result.report.peak, "seconds": result.report.seconds, "predicted": host.peak,
            "resident": host.resident, "mapped": host.mapped, "read": result.plan.bytes_read,
            "written": result.plan.bytes_written}

def with_transformers():
    dequantize = options.pop("dequantize", False)
    if options.pop("quantize", None):
        options["quantization_config"] = transformers.BitsAndBytesConfig(load_in_8bit=True)
    kept.append(architecture.from_pretrained(source, **options))
    if dequantize:
        kept[0].dequantize()

def with_accelerate():
    with accelerate.init_empty_weights():
        model = architecture(AutoConfig.from_pretrained(source))
    model.tie_weights()
    dtype = getattr(torch, options.pop("dtype", "bfloat16"))
    options.setdefault("device_map", {"": "cpu"})
    kept.append(accelerate.load_checkpoint_and_dispatch(model, source, dtype=dtype, **options))

if loader == "lowmem":
    found = with_lowmem()
else:
    with lowmem.measure() as memory:
        {"transformers": with_transformers, "accelerate": with_accelerate}[loader]()
    found = {"peak": memory.peak, "seconds": memory.seconds}
gc.collect()
held = lowmem.memory.anonymous_memory() - before
print(json.dumps({"before": before, "held": held, **found}))
"""


def run_case(
    case: Case, source: Path, work: Path, limit: Limit | None = None, loader: str = "lowmem"
) -> dict[str, Any]:
    """One load in a process of its own; raises when it fails or is killed."""
    with tempfile.TemporaryDirectory(dir=work) as offload:
        options = {k: offload if v == "OFFLOAD" else v for k, v in case.options.items()}
        if loader != "lowmem" and isinstance(options.get("device_map"), dict):
            # Their hooks take no module inside another.
            options["device_map"] = DISJOINT
        size = 0 if limit is None else limit.size
        argv = [sys.executable, "-c", _CHILD, str(source), json.dumps(options), loader, str(size)]
        argv.append("int8" if case.is_int8 else "floats")
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "HF_HUB_OFFLINE": "1"}
        if limit is not None:
            environment["LOWMEM_BENCH_LIMIT"] = limit.kind
        done = subprocess.run(argv, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{case.name}: exit {done.returncode}: {done.stderr.strip()[-800:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_all(folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Every case, free and limited; one row each."""
    rows = []
    for case in CASES:
        if names and not any(name in case.name for name in names):
            continue
        source = make_checkpoint(folder, case.checkpoint, case.stored)
        free = run_case(case, source, folder)
        allowed = free["resident"] + case.bound
        limit = find_limit(int(free["predicted"] * 1.05), free["before"], free["mapped"])
        try:
            run_case(case, source, folder, limit)
            limited = "passes"
        except RuntimeError as error:
            limited = f"fails: {error}"
        tolerance = max(0.02 * free["peak"], 16 * MIB)
        rows.append(
            {
                "case": case.name,
                **free,
                "bound": allowed,
                "within_bound": free["peak"] <= allowed and free["held"] <= free["resident"] + _HELD,
                "within_prediction": abs(free["predicted"] - free["peak"]) <= tolerance,
                "limit": limit.kind,
                "limited": limited,
                "peers": {p: _peer(case, source, folder, p) for p in case.peers},
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def _peer(case: Case, source: Path, folder: Path, loader: str) -> dict[str, Any] | None:
    try:
        return run_case(case, source, folder, loader=loader)
    except RuntimeError as error:
        print(f"{loader} cannot: {error}", file=sys.stderr)
        return None


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table that README quotes."""
    lines = [
        "| case | allowed | predicted | measured | held after | transformers | accelerate | under a kernel limit |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        peers = [row["peers"].get(name) for name in PEERS]
        theirs = " | ".join(f"{p['peak'] / MIB:.0f}" if p else "-" for p in peers)
        lines.append(
            f"| {row['case']} | {row['bound'] / MIB:.0f} | {row['predicted'] / MIB:.0f} | {row['peak'] / MIB:.0f} "
            f"| {row['held'] / MIB:.0f} "
            f"| {theirs} | {row['limited'][:40]} ({row['limit']}) |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.peaks", description=__doc__)
    parser.add_argument("--folder", type=Path, help="where checkpoints are written and kept (default: temporary)")
    parser.add_argument("--only", action="append", default=[], help="run only the cases whose name holds this")
    parser.add_argument("--json", type=Path, help="write the rows and the machine there")
    arguments = parser.parse_args()
    if arguments.folder is not None:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        rows = measure_all(arguments.folder, arguments.only)
    else:
        with tempfile.TemporaryDirectory(prefix="lowmem-bench-") as folder:
            rows = measure_all(Path(folder), arguments.only)
    if arguments.json is not None:
        import torch

        machine = {
            "python": platform.python_version(),
            "kernel": platform.release(),
            "cpus": os.cpu_count(),
            "torch": torch.__version__,
        }
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(as_markdown(rows))
    return 0 if all(r["within_bound"] and r["within_prediction"] and r["limited"] == "passes" for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
