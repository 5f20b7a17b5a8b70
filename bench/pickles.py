"""Pickled checkpoints beside safetensors: `python -m bench.pickles --folder DIR`.

The Llama of `bench.make_checkpoint` is loaded from its safetensors shards and from the same shards as `.bin`: mapped,
copied, cast, and with its layers on disk, by lowmem, and from `.bin` by transformers and `torch.load`. They take turns
in one process; the least of each is compared. Then the weights of a training checkpoint, most of which is the
optimizer's, are loaded, and the bytes are counted that the kernel was asked for.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import lowmem
from lowmem._page_cache import cached_share
from lowmem.sizes import GIB, MIB

from .child import release
from .page_cache import drop, warm
from .results import describe_machine
from .sources import make_checkpoint, settle

HERE = Path(__file__).parent
_LAYERS_ON_DISK = {"": "cpu", "model.layers": "disk"}
CASES: dict[str, dict[str, Any]] = {
    "mapped": {},
    "copied": {"residency": "copy"},
    "bf16 to fp32": {"dtype": "float32"},
    "layers on disk": {"device_map": _LAYERS_ON_DISK},
    "layers on disk, bf16 to fp32": {"device_map": _LAYERS_ON_DISK, "dtype": "float32"},
}


def pickle_shards(source: Path, folder: Path) -> Path:
    """The same shards, written by `torch.save`."""
    out = folder / f"{source.name}-bin"
    if out.exists():
        return out
    out.mkdir()
    index = json.loads((source / "model.safetensors.index.json").read_text())
    for file in sorted(source.glob("*.safetensors")):
        torch.save(load_file(file), out / renamed(file.name))
    index["weight_map"] = {key: renamed(name) for key, name in index["weight_map"].items()}
    (out / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    shutil.copy(source / "config.json", out)
    settle()
    return out


def renamed(name: str) -> str:
    return name.replace("model-", "pytorch_model-").replace(".safetensors", ".bin")


def training_checkpoint(folder: Path) -> Path:
    """4 GB of an optimizer, and behind it 2 GB of weights under `model`."""
    file = folder / "training.pth"
    if not file.exists():
        moments = {name: torch.randn(500, 1000, 1000) for name in ("exp_avg", "exp_avg_sq")}
        weights = {f"blocks.{i}.weight": torch.randn(25, 1000, 1000) for i in range(20)}
        torch.save({"epoch": 7, "optimizer": {"state": {0: moments}}, "model": weights}, file)
        settle()
    return file


def by_lowmem(source: Path, options: dict[str, Any]) -> tuple[float, int]:
    result = lowmem.load(source, **options)
    return result.report.seconds - result.report.phases["import"], result.report.peak


def by_transformers(source: Path, options: dict[str, Any]) -> tuple[float, int]:
    from transformers import AutoModelForCausalLM

    dtype = options.get("dtype", "bfloat16")
    with lowmem.measure() as memory:
        started = time.perf_counter()
        AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        seconds = time.perf_counter() - started
    return seconds, memory.peak


def by_torch(source: Path, options: dict[str, Any]) -> tuple[float, int]:
    """A state dict, and no model."""
    dtype = getattr(torch, options.get("dtype", "bfloat16"))
    with lowmem.measure() as memory:
        started = time.perf_counter()
        state: dict[str, torch.Tensor] = {}
        for file in sorted(source.glob("*.bin")):
            state |= torch.load(file, mmap=not options.get("residency"), weights_only=True)
        if options.get("dtype"):
            state = {key: value.to(dtype) for key, value in state.items()}
        seconds = time.perf_counter() - started
    return seconds, memory.peak


Loader = Callable[[Path, dict[str, Any]], tuple[float, int]]


def rounds_of(safe: Path, pickled: Path, count: int) -> list[dict[str, Any]]:
    """A row for each case and way: the least seconds, and MiB of anonymous memory at the peak."""
    ways: dict[str, tuple[Loader, Path]] = {
        "lowmem, safetensors": (by_lowmem, safe),
        "lowmem, .bin": (by_lowmem, pickled),
        "transformers, .bin": (by_transformers, pickled),
        "torch.load, .bin": (by_torch, pickled),
    }
    rows = []
    warm([*safe.glob("*.safetensors"), *pickled.glob("*.bin")])
    for case, options in CASES.items():
        found: dict[str, list[tuple[float, int]]] = {}
        for _ in range(count):
            for way, (load, source) in ways.items():
                if "lowmem" not in way and "device_map" in options:
                    continue
                if "transformers" in way and "residency" in options:
                    continue  # it maps
                found.setdefault(way, []).append(load(source, options))
                release()
        for way, runs in found.items():
            least = min(seconds for seconds, _ in runs)
            rows.append({"case": case, "way": way, "seconds": least, "peak_mib": min(p for _, p in runs) // MIB})
            print(f"{case:30} {way:22} {least:8.3f} s {rows[-1]['peak_mib']:6} MiB", flush=True)
    return rows


def read_so_far() -> tuple[int, int]:
    """Bytes that this process has read by calls, and bytes that the disk was asked for."""
    table = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(table["rchar"]), int(table["read_bytes"])


class Blocks(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        make = [torch.nn.Linear(1, 1, bias=False) for _ in range(20)]
        for block in make:
            block.weight = torch.nn.Parameter(torch.empty(25, 1000, 1000, device="meta"))
        self.blocks = torch.nn.ModuleList(make)


def of_a_training_checkpoint(folder: Path) -> dict[str, Any]:
    """Bytes read for the weights of a file that holds three times as much."""
    file = training_checkpoint(folder)
    drop([file])
    assert cached_share(file) < 0.01
    before = read_so_far()
    result = lowmem.load(file, model=Blocks, residency="copy")
    called, asked = (now - then for now, then in zip(read_so_far(), before, strict=True))
    row = {
        "file_bytes": file.stat().st_size,
        "weights": sum(p.numel() * 4 for p in result.model.parameters()),
        "read_by_calls": called,
        "read_from_disk": asked,
        "opened": result.report.opened,
        "peak_above_weights_mib": (result.report.peak - result.plan.host.resident) // MIB,
        "seconds": result.report.seconds,
    }
    print(json.dumps(row, indent=1), flush=True)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.pickles", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints are written, and stay")
    parser.add_argument("--checkpoint", default="llama-1b", help="of bench.make_checkpoint (default llama-1b)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-training", dest="training", action="store_false", help="leave out the 6 GB file")
    parser.add_argument("--json", type=Path, default=HERE / "pickles.json", help="where the figures go")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    shard = "1GB" if arguments.checkpoint == "llama-1b" else "100MB"
    safe = make_checkpoint(arguments.folder, arguments.checkpoint, shard=shard)
    rows = rounds_of(safe, pickle_shards(safe, arguments.folder), arguments.rounds)
    gc.collect()
    if arguments.training and shutil.disk_usage(arguments.folder).free < 8 * GIB:
        print("no room for the training checkpoint", file=sys.stderr)
        arguments.training = False
    training = of_a_training_checkpoint(arguments.folder) if arguments.training else None
    import safetensors
    import transformers

    versions = {"torch": torch.__version__, "safetensors": safetensors.__version__}
    versions["transformers"] = transformers.__version__
    machine = describe_machine(arguments.folder, versions)
    result = {"machine": machine, "checkpoint": arguments.checkpoint, "rows": rows, "training": training}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
