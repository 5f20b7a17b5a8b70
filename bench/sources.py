"""Checkpoints in a folder, written when they are not there yet."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def make_checkpoint(folder: Path, name: str, dtype: str = "bfloat16", shard: str = "1GB") -> Path:
    """The checkpoint `name` of `bench.make_checkpoint`, by a process of its own.

    Of dtype `int8`, it is what `lowmem convert` makes of that in bfloat16, which lies beside it.
    """
    target = folder / (name if dtype == "bfloat16" else f"{name}-{dtype}")
    if not target.exists():
        if dtype == "int8":
            source = make_checkpoint(folder, name, shard=shard)
            command = [sys.executable, "-m", "lowmem", "convert", str(source), str(target), "--quantize", "int8"]
            command += ["--max-shard-size", shard]
        else:
            command = [sys.executable, "-m", "bench.make_checkpoint", name, str(target)]
            command += ["--dtype", dtype, "--max-shard-size", shard]
        subprocess.run(command, check=True, stdout=sys.stderr, cwd=Path(__file__).parent.parent)
        settle()
    return target


def settle() -> None:
    """Wait until what was written is on the disk: writing it back takes time from whoever loads meanwhile."""
    if hasattr(os, "sync"):
        os.sync()
