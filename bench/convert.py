"""Converting beside copying: `python -m bench.convert --size 1GiB --folder DIR`.

A checkpoint is converted (same dtype), with and without reading back, and its file is copied by `shutil.copyfile` and
synced. They take turns; the source is in the page cache. The least of each is compared, and the result must be the
source, bit for bit. Then it is converted once more by a process that the kernel allows 150 MiB more than it has.
With `--legacy` the source is a `.pth` as torch wrote them before version 1.6.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lowmem
from lowmem.sizes import GIB, MIB, parse_size
from lowmem.synthetic import llama_recipe, write_checkpoint

from .page_cache import warm
from .results import describe_machine

LIMIT = 150 * MIB
_LIMITED = """
import sys
import lowmem
from lowmem.planner import make_stream_plan  # so that what it imports is the interpreter's
from bench.kernel_limits import cgroup_kind, enter_above
import lowmem.converter
enter_above(cgroup_kind() or "RLIMIT_DATA", int(sys.argv[3]))
with lowmem.measure() as memory:
    lowmem.convert(sys.argv[1], sys.argv[2])
print(memory.peak)
"""


def files_of(source: Path) -> list[Path]:
    return sorted([*source.glob("*.safetensors"), *source.glob("*.pth")])


def as_legacy(source: Path) -> None:
    """The same tensors in the format of before torch 1.6. Takes as much memory as they do."""
    torch.save(dict(lowmem.stream(source)), source / "weights.pth", _use_new_zipfile_serialization=False)
    (source / "model.safetensors").unlink()


def limited(source: Path, out: Path) -> int:
    """Bytes of anonymous memory at the peak of a conversion under a kernel limit."""
    shutil.rmtree(out, ignore_errors=True)
    # Of the limit, 24 MiB are for page tables and the sampler, which `enter_above` adds.
    command = [sys.executable, "-c", _LIMITED, os.fspath(source), os.fspath(out), str(LIMIT - 24 * MIB)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, cwd=Path(__file__).parent.parent)
    return int(done.stdout)


def copy(source: Path, out: Path) -> None:
    """A plain copy that is on the disk when it ends."""
    out.mkdir()
    for file in files_of(source):
        shutil.copyfile(file, out / file.name)
        with (out / file.name).open("rb+") as opened:
            os.fsync(opened.fileno())


def equal(source: Path, out: Path) -> bool:
    """Whether both hold the same tensors, bit for bit."""
    theirs = dict(lowmem.stream(out))
    ours = lowmem.stream(source)
    return all(torch.equal(tensor.view(torch.uint8), theirs.pop(key).view(torch.uint8)) for key, tensor in ours)


def timed(action: Callable[[Path, Path], object], source: Path, out: Path) -> float:
    """Seconds of one run into a fresh folder, on a disk that has nothing else to do."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    warm(files_of(source))
    started = time.perf_counter()
    action(source, out)
    return time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.convert", description=__doc__)
    parser.add_argument("--size", default="1GiB", help="of the bf16 checkpoint (default 1GiB)")
    parser.add_argument("--shard", default="5GiB", help="size of a file of the result (default 5GiB)")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--legacy", action="store_true", help="from a .pth of before torch 1.6")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    ways: dict[str, Callable[[Path, Path], object]] = {
        "copy and sync": copy,
        "convert": lambda source, out: lowmem.convert(source, out, max_shard_size=arguments.shard),
        "convert, not read back": lambda source, out: lowmem.convert(
            source, out, max_shard_size=arguments.shard, verify=False
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory(prefix="lowmem-bench-", dir=arguments.folder) as folder:
        source, out = Path(folder) / "source", Path(folder) / "out"
        write_checkpoint(llama_recipe(parse_size(arguments.size)), source, max_shard_size=64 * GIB)
        if arguments.legacy:
            as_legacy(source)
        nbytes = lowmem.inspect(source).nbytes
        for _ in range(arguments.rounds):
            for name, action in ways.items():
                seconds[name].append(timed(action, source, out))
                assert name == "copy and sync" or equal(source, out), f"{name}: not what it was"
        peak = limited(source, out)
        assert equal(source, out)
    least = {name: min(found) for name, found in seconds.items()}
    versions = {"torch": str(torch.__version__)}
    figures: dict[str, Any] = {"machine": describe_machine(arguments.folder or Path(tempfile.gettempdir()), versions)}
    figures |= {"legacy": arguments.legacy, "bytes": nbytes, "seconds": seconds, "least": least}
    figures |= {"peak": peak, "allowed by the kernel": LIMIT}
    figures["of the speed of a copy"] = {name: least["copy and sync"] / found for name, found in least.items()}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(f"{'':24} {'s':>8} {'GB/s':>8} {'of a copy':>10}")
    for name, found in least.items():
        print(f"{name:24} {found:8.3f} {nbytes / found / 1e9:8.2f} {least['copy and sync'] / found:10.0%}")
    print(f"under a kernel limit of the interpreter and {LIMIT // MIB} MiB: peak {peak / MIB:.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
