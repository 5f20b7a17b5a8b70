"""Every way to read a checkpoint, each a function of files and a folder of its own, and what a process is after it."""

from __future__ import annotations

import gc
import hashlib
import inspect as inspection
import json
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from pickled_checkpoints import pickle_folder
from safetensors.torch import load_file
from tiny_models import every_tensor, is_on_disk, new_model, outputs_of

import lowmem

Facts = dict[str, Any]
Way = Callable[["Files", Path], Facts]
# Of each load; none of them comes near it.
RAM = "256MiB"


@dataclass(frozen=True)
class Files:
    """The same small Llama in every form that is read.

    Attributes:
        whole: safetensors in several shards, as transformers wrote them.
        pickled: zip pickles.
        legacy: pickles of before torch 1.6.
        damaged: a shard that is cut off.
        shared: an offload folder for all.
    """

    whole: Path
    pickled: Path
    legacy: Path
    damaged: Path
    shared: Path


def make_files(folder: Path, dtype: str = "float32") -> Files:
    """Write them into a new folder, or find them there."""
    files = Files(*(folder / name for name in ("whole", "pickled", "legacy", "damaged", "shared")))
    if not files.damaged.exists():
        torch.manual_seed(0)
        new_model("llama", dtype).save_pretrained(files.whole, max_shard_size="40KB")
        pickle_folder(files.whole, files.pickled)
        pickle_folder(files.whole, files.legacy, legacy=True)
        new_model("llama", dtype).save_pretrained(files.damaged, max_shard_size="40KB")
        last = sorted(files.damaged.glob("*.safetensors"))[-1]
        os.truncate(last, last.stat().st_size - 100)
    return files


def facts_of(model: Any) -> Facts:
    """What it computes, and each tensor in memory: bits, shape, dtype and device."""
    facts: Facts = {"outputs": _digest(outputs_of(model))}
    for name, tensor in every_tensor(model).items():
        facts[name] = str(tensor.device) if is_on_disk(tensor) else _digest(tensor)
    return facts


def _digest(tensor: torch.Tensor) -> list[Any]:
    flat = tensor.detach().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return [str(tensor.dtype), list(tensor.shape), str(tensor.device), hashlib.sha256(data).hexdigest()]


def _load(source: Path, **options: Any) -> Facts:
    model = lowmem.load(source, ram=RAM, **options).model
    try:
        return facts_of(model)
    finally:
        lowmem.release(model)


def _streamed(files: Files, place: Path) -> Facts:
    return {key: _digest(tensor) for key, tensor in lowmem.stream(files.whole, dtype="float16")}


def _converted(files: Files, place: Path) -> Facts:
    lowmem.convert(files.pickled, place / "converted", dtype="bfloat16", max_shard_size="50KB")
    written = sorted((place / "converted").glob("*.safetensors"))
    return {key: _digest(tensor) for file in written for key, tensor in load_file(file).items()}


def _planned(files: Files, place: Path) -> Facts:
    plan = lowmem.plan(files.whole, dtype="bfloat16", device_map={"": "cpu"}, ram=RAM)
    return {"peak": plan.host.peak, "read": plan.bytes_read, "map": dict(plan.device_map)}


def _dropped_in(files: Files, place: Path) -> Facts:
    return facts_of(lowmem.from_pretrained(transformers.LlamaForCausalLM, files.whole, dtype="bfloat16", ram=RAM))


def _dispatched(files: Files, place: Path) -> Facts:
    model = lowmem.load(files.whole, device_map={"": "cpu", "model.layers.1": "disk"}, dispatch="accelerate").model
    return {"outputs": _digest(outputs_of(model))}


def halves(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A filter that has to be run without values, and then with them."""
    return {key: value * 0.5 if "norm" in key else value for key, value in state.items()}


def _checked(files: Files, place: Path) -> Facts:
    return {"problems": list(lowmem.check(files.whole).problems)}


MEMORY = {"max_memory": {"cpu": "90KB", "disk": "1GB"}}
WAYS: dict[str, Way] = {
    "mapped": lambda files, place: _load(files.whole),
    "copied": lambda files, place: _load(files.whole, residency="copy"),
    "cast": lambda files, place: _load(files.whole, dtype="bfloat16"),
    "int8": lambda files, place: _load(files.whole, dtype="float16", quantize="int8"),
    "pickled": lambda files, place: _load(files.pickled, dtype="bfloat16"),
    "legacy": lambda files, place: _load(files.legacy),
    "shared folder": lambda files, place: _load(
        files.whole, dtype="bfloat16", device_map="disk", offload_folder=files.shared
    ),
    "own folder": lambda files, place: _load(
        files.whole, dtype="bfloat16", device_map="disk", offload_folder=place / "off"
    ),
    "at use": lambda files, place: _load(files.whole, dtype="bfloat16", device_map="disk"),
    "filtered": lambda files, place: _load(files.whole, filter_fn=halves),
    "dispatched": _dispatched,
    "streamed": _streamed,
    "converted": _converted,
    "planned": _planned,
    "checked": _checked,
    "from_pretrained": _dropped_in,
}


def _functions(*owners: Any) -> dict[str, int]:
    """Which functions the owners have, by identity: those that a load replaces meanwhile are among them."""
    return {
        f"{getattr(owner, '__name__', owner)}.{name}": id(value)
        for owner in owners
        for name, value in vars(owner).items()
        if inspection.isfunction(value) or isinstance(value, (classmethod, staticmethod))
    }


def state_of_process() -> dict[str, Any]:
    """What everyone in a process shares, and no load may leave changed."""
    import accelerate.big_modeling
    from transformers import initialization

    loggers = [log for log in logging.root.manager.loggerDict.values() if isinstance(log, logging.Logger)]
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.empty(0).device,
        "threads of torch": torch.get_num_threads(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "modes": torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack(),  # type: ignore[attr-defined]
        "collector": (gc.isenabled(), gc.get_threshold()),
        "warnings": (list(warnings.filters), warnings.showwarning),
        "hooks": (sys.excepthook, threading.excepthook, sys.gettrace(), sys.getprofile()),
        "signals": {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGBUS)},
        "quiet logs": sorted(log.name for log in loggers if log.disabled),
        "functions": _functions(
            torch.nn.Module,
            torch.nn.init,
            torch.nn.Linear,
            transformers.PreTrainedModel,
            transformers.LlamaForCausalLM,
            transformers.modeling_utils,
            initialization,
            accelerate.big_modeling,
        ),
        "environment": dict(os.environ),
        "directory": str(Path.cwd()),
        "mask": os.umask(os.umask(0o022)),
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what is not as it was."""
    found = []
    for name in before:
        old, new = before[name], after[name]
        if old != new and isinstance(old, dict):
            found += [f"{name}: {key}" for key in {**old, **new} if old.get(key) != new.get(key)]
        elif old != new:
            found.append(f"{name}: {old} -> {new}"[:500])
    return found


def threads_here() -> list[str]:
    """Threads of lowmem."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("lowmem")]


def open_files(below: Path | None = None) -> list[str]:
    """What is open, or what of it lies in a folder."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = str(link.readlink())
        except OSError:
            continue
        if below is None or target.startswith(str(below.resolve())):
            found.append(target)
    return sorted(found)


def mapped_files(below: Path) -> list[str]:
    """Files of a folder that are mapped."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(below.resolve()) in line]


def children() -> list[str]:
    """Processes of ours that live on. One that ended is Python's to bury, when it starts another."""
    for _ in range(200):
        found = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        found = [number for number in found if _lives(number)]
        if not found:
            break
        # It may be about to see that nobody is there any more.
        time.sleep(0.05)
    return found


def _lives(number: str) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def leftovers(folder: Path) -> list[str]:
    """Threads, open and mapped files of a folder, hidden files in it, child processes."""
    gc.collect()
    # Those of a model that was dropped see by themselves that it is gone.
    for _ in range(100):
        if not threads_here():
            break
        time.sleep(0.05)
    found = [f"thread {name}" for name in threads_here()]
    found += [f"open {name}" for name in open_files(folder)]
    found += [f"mapped {name}" for name in mapped_files(folder)]
    found += [f"hidden {path}" for path in folder.rglob("*") if path.name.startswith(".")]
    found += [f"process {number}" for number in children()]
    return found


def to_json(facts: Facts) -> Any:
    """As it comes out of a pipe."""
    return json.loads(json.dumps(facts))
