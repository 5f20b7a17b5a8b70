"""What the tests of failing machines share: ways to use lowmem, each tried with every fault at every call.

With `LOWMEM_FAULTS=all` the tests take all ways and calls, without it an evenly spread part.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import io
import json
import os
import re
import shutil
import threading
import traceback
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from fault_shim import Fault, armed, in_fork
from safetensors.torch import save_file
from torch import nn

import lowmem
from lowmem import LowmemError

# What a system call may end in, and what a user is told of it.
READING: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("open", (errno.EACCES, errno.EMFILE, errno.EIO, errno.ENOENT)),
    ("read", (errno.EIO, errno.ESTALE)),
    ("stat", (errno.EIO, errno.EACCES, errno.ESTALE)),
    ("list", (errno.EIO, errno.EACCES)),
    ("map", (errno.ENOMEM, errno.ENODEV)),
    ("close", (errno.EIO,)),
)
WRITING: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("open", (errno.EACCES, errno.EMFILE, errno.EROFS, errno.ENOSPC)),
    ("write", (errno.ENOSPC, errno.EIO, errno.EDQUOT)),
    ("sync", (errno.EIO, errno.ENOSPC)),
    ("resize", (errno.ENOSPC, errno.EFBIG)),
    ("rename", (errno.ENOSPC, errno.EROFS, errno.EIO)),
    ("mkdir", (errno.ENOSPC, errno.EROFS, errno.EACCES)),
    ("rmdir", (errno.EROFS,)),
    ("unlink", (errno.EROFS, errno.EACCES)),
    ("stat", (errno.EIO, errno.ESTALE)),
    ("list", (errno.EIO,)),
    ("map", (errno.ENOMEM,)),
    ("lock", (errno.ENOLCK,)),
    ("copy", (errno.ENOSPC, errno.EIO)),
    ("link", (errno.EROFS,)),
    ("close", (errno.EIO, errno.ENOSPC)),
    ("read", (errno.EIO,)),
)


@dataclass(frozen=True)
class Way:
    """One use of lowmem.

    Attributes:
        run: from the folder of the inputs, `in`, and a place for outputs, `out`, that is not there at first, makes
            what can be compared.
        writes: whether it writes to `out`.
        makes: whether what is in `out` is the result.
        into: whether `out` is to be a folder that is there.
        told: whether what the system says reaches lowmem, and not another library that keeps it to itself.
        needs: writes the inputs that only this way reads.
    """

    run: Callable[[Path], Any]
    writes: bool = False
    makes: bool = False
    into: bool = False
    told: bool = True
    needs: Callable[[Path], None] | None = None


@dataclass
class Sweep:
    """What came of faults."""

    tried: int = 0
    succeeded: int = 0
    refused: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, other: Sweep) -> None:
        """And those of another."""
        self.tried += other.tried
        self.succeeded += other.succeeded
        self.refused += other.refused
        self.problems += other.problems


def plain() -> nn.Sequential:
    """A model of one tensor that takes several reads, and small ones."""
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 3000), nn.Linear(3000, 16))


def write_inputs(folder: Path) -> None:
    """Checkpoints of every kind that is read."""
    folder.mkdir(parents=True)
    torch.manual_seed(3)
    state = plain().state_dict()
    shards = [{k: v for k, v in state.items() if (k[0] == "0") == first} for first in (True, False)]
    sharded = folder / "sharded"
    sharded.mkdir()
    names = {}
    for n, shard in enumerate(shards, 1):
        name = f"model-{n:05d}-of-00002.safetensors"
        save_file(shard, sharded / name, {"format": "pt"})
        names.update(dict.fromkeys(shard, name))
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    torch.save({"epoch": 1, "state_dict": state}, folder / "zip.pth")
    torch.save(state, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(folder / "zip.pth") as source, zipfile.ZipFile(folder / "packed.pth", "w", 8) as packed:
        for record in source.infolist():
            packed.writestr(record.filename, source.read(record))


def digest(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Dtype, shape and values of each."""
    return {
        name: (str(t.dtype), tuple(t.shape), zlib.crc32(t.detach().contiguous().view(-1).view(torch.uint8).numpy()))
        for name, t in tensors.items()
    }


def _state(result: Any) -> dict[str, Any]:
    made = digest(result.model.state_dict())
    lowmem.release(result.model)
    return made


def _load(source: str, **options: Any) -> Callable[[Path], Any]:
    def run(root: Path) -> Any:
        return _state(lowmem.load(root / "in" / source, model=plain, **options))

    return run


def _untouched(root: Path) -> Any:
    """Values are left alone: a page behind the end of a file is a signal, which is what the load is to prevent."""
    result = lowmem.load(root / "in" / "sharded", model=plain)
    return list(result.model.state_dict())


def _inspect(source: str) -> Callable[[Path], Any]:
    def run(root: Path) -> Any:
        found = lowmem.inspect(root / "in" / source)
        return {k: (e.dtype, e.shape, e.file.name, e.offset, e.nbytes) for k, e in found.items()}

    return run


def _plan(root: Path) -> Any:
    plan = lowmem.plan(root / "in" / "sharded", model=plain, dtype="bfloat16", ram="1GiB")
    return plan.bytes_read, plan.host.resident, plan.dtypes


def _diff(root: Path) -> Any:
    return lowmem.diff(root / "in" / "zip.pth", model=plain).text()


def _given(root: Path) -> Any:
    model = plain()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    before = digest(model.state_dict())
    places = [p.data_ptr() for p in model.parameters()]
    try:
        lowmem.load(root / "in" / "sharded", model=model, dtype="float32", residency="copy")
    except BaseException:
        assert digest(model.state_dict()) == before, "the given model was changed"
        assert [p.data_ptr() for p in model.parameters()] == places, "the given model has other parameters"
        raise
    return digest(model.state_dict())


def _filtered(root: Path) -> Any:
    def scale(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: v * 2 if k.endswith("weight") else v for k, v in state.items()}

    return _state(lowmem.load(root / "in" / "sharded", model=plain, filter_fn=scale))


def _streamed(root: Path) -> Any:
    return digest(dict(lowmem.stream(root / "in" / "sharded", dtype="bfloat16", staging="1MiB")))


_X = torch.linspace(-1, 1, 64).reshape(1, 64)


def _forward(source: str, **options: Any) -> Callable[[Path], Any]:
    """Forwards are compared in bits: a layer that is read is the layer that was loaded."""

    def run(root: Path) -> Any:
        folder = {"offload_folder": root / "out"} if options.get("offload_folder") else {}
        result = lowmem.load(root / "in" / source, model=plain, device_map="disk", **{**options, **folder})
        try:
            with torch.no_grad():
                x = _X.to(result.model[0].bias.dtype)
                made = [result.model(x) for _ in range(2)]
        finally:
            lowmem.release(result.model)
        return [m.view(torch.uint8).numpy().tobytes() for m in made]

    return run


def _computed_offload(root: Path) -> Any:
    def scale(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: v * 2 if k.endswith("weight") else v for k, v in state.items()}

    result = lowmem.load(
        root / "in" / "sharded", model=plain, filter_fn=scale, device_map="disk", offload_folder=root / "out"
    )
    return _state(result)


def _twice(root: Path) -> Any:
    options: Any = {"model": plain, "dtype": "bfloat16", "device_map": "disk", "offload_folder": root / "out"}
    first = _state(lowmem.load(root / "in" / "sharded", **options))
    second = lowmem.load(root / "in" / "sharded", **options)
    assert second.plan.offload is not None
    return first, _state(second)


def _tree(folder: Path) -> dict[str, int]:
    if folder.is_file():
        return {"": zlib.crc32(folder.read_bytes())}
    return {str(p.relative_to(folder)): zlib.crc32(p.read_bytes()) for p in sorted(folder.glob("[!.]*")) if p.is_file()}


def _converted(**options: Any) -> Callable[[Path], Any]:
    def run(root: Path) -> Any:
        lowmem.convert(root / "in" / options.get("source", "sharded"), root / "out", **(options.get("options", {})))

    return run


def _checked(root: Path) -> Any:
    report = lowmem.check(root / "in" / "sharded", write_manifest=root / "out")
    if report.problems:
        raise LowmemError("; ".join(map(str, report.problems)))


def _checked_against(root: Path) -> Any:
    manifest = root / "in" / "SHA256SUMS"
    report = lowmem.check(root / "in" / "sharded", manifest=manifest)
    if report.problems:
        raise LowmemError("; ".join(map(str, report.problems)))
    return len(report.files), len(report.verified)


def _synthetic(root: Path) -> Any:
    from lowmem.synthetic import llama_recipe, write_checkpoint

    write_checkpoint(llama_recipe(1 << 20), root / "out", max_shard_size=400_000)


def _command(*arguments: str) -> Callable[[Path], Any]:
    """A verb of the shell: what it prints, or its one message of error, which is not one of wrong usage."""

    def run(root: Path) -> Any:
        from lowmem.cli import main

        places = {"IN": root / "in", "OUT": root / "out"}
        words = [word.format_map({name: str(place) for name, place in places.items()}) for word in arguments]
        out, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            code = main(words)
        said = errors.getvalue()
        if code:
            assert code == 1, f"exit code {code}: {said}"
            # What a check finds is its result.
            said = said or f"lowmem: {out.getvalue()}" if arguments[0] == "check" else said
            assert said.startswith("lowmem: "), said
            assert said.count("\nlowmem: ") == 0, said
            assert "Traceback" not in said, said
            raise LowmemError(said)
        # What is there before, on the disk or in memory, may be part of what these say.
        return None if arguments[0] in ("convert", "plan") else re.sub(r"\d+\.\d+ s\b", "some s", out.getvalue())

    return run


def _write_int8(folder: Path) -> None:
    """A checkpoint whose linear layers are int8, as bitsandbytes names them."""
    result = lowmem.load(folder / "sharded", model=plain, quantize="int8")
    (folder / "int8").mkdir()
    save_file(result.model.state_dict(), folder / "int8" / "model.safetensors", {"format": "pt"})


_COMMIT = "0123abc" + "0" * 33


def _write_hub(folder: Path) -> None:
    """A model in a cache as huggingface_hub keeps it."""
    repository = folder / "hub" / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(_COMMIT)
    (repository / "blobs").mkdir()
    snapshot = repository / "snapshots" / _COMMIT
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted((folder / "sharded").iterdir())):
        shutil.copy(file, repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")


def _from_hub(root: Path) -> Any:
    from huggingface_hub import constants

    before = constants.HF_HUB_CACHE
    constants.HF_HUB_CACHE = str(root / "in" / "hub")
    try:
        return _state(lowmem.load("hf-hub:org/name", model=plain))
    finally:
        constants.HF_HUB_CACHE = before


def _write_experts(folder: Path) -> None:
    """A model of transformers whose experts are one tensor each, which it fuses."""
    import transformers

    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 32}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    config = transformers.Qwen3MoeConfig(**shape, **heads, num_experts=2, num_experts_per_tok=1)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder / "experts")


def _experts(**options: Any) -> Callable[[Path], Any]:
    def run(root: Path) -> Any:
        folder = {"offload_folder": root / "out"} if "device_map" in options else {}
        return _state(lowmem.load(root / "in" / "experts", **options, **folder))

    return run


def _plot(root: Path) -> Any:
    """A picture of a measurement that is always the same."""
    from lowmem.memory import Measurement

    made = Measurement(baseline=0, method="process")
    at = made._started
    made.complete([(at + second, second << 20, second << 21) for second in range(4)], ended=at + 3, gap=0.001)
    made.plot(root / "out" / "memory.png", title="a test")


def _measured(root: Path) -> Any:
    with lowmem.measure() as memory:
        made = digest({"x": torch.ones(1000)})
    assert memory.seconds > 0
    return made


WAYS: dict[str, Way] = {
    "inspect": Way(_inspect("sharded")),
    "inspect a zip": Way(_inspect("zip.pth")),
    "inspect a legacy file": Way(_inspect("legacy.pth")),
    "plan": Way(_plan),
    "diff": Way(_diff),
    "mapped": Way(_load("sharded")),
    "mapped, untouched": Way(_untouched),
    "cast": Way(_load("sharded", dtype="bfloat16")),
    "buffered": Way(_load("sharded", residency="copy", io="buffered")),
    "direct": Way(_load("sharded", residency="copy", io="direct")),
    "by maps": Way(_load("sharded", residency="copy", io="mmap")),
    "zip": Way(_load("zip.pth")),
    "zip, cast": Way(_load("zip.pth", dtype="bfloat16")),
    "legacy": Way(_load("legacy.pth")),
    "packed": Way(_load("packed.pth")),
    "given": Way(_given),
    "filter": Way(_filtered),
    "stream": Way(_streamed),
    "forward": Way(_forward("sharded")),
    "forward, cast": Way(_forward("sharded", dtype="bfloat16")),
    "forward of a zip": Way(_forward("zip.pth")),
    "forward, written": Way(_forward("sharded", dtype="bfloat16", offload_folder=True), writes=True),
    "offload, computed": Way(_computed_offload, writes=True),
    "offload twice": Way(_twice, writes=True),
    "convert": Way(_converted(options={"dtype": "bfloat16", "max_shard_size": "300KB"}), writes=True, makes=True),
    "convert a pickle": Way(_converted(source="packed.pth"), writes=True, makes=True),
    "write a manifest": Way(_checked, writes=True, makes=True),
    "synthetic": Way(_synthetic, writes=True, makes=True),
    "check": Way(_checked_against),
    "hub": Way(_from_hub, told=False, needs=_write_hub),
    "measure": Way(_measured),
    "shell: inspect": Way(_command("inspect", "{IN}/sharded")),
    "shell: plan": Way(_command("plan", "{IN}/zip.pth", "--model", "failing:plain")),
    "shell: check": Way(_command("check", "{IN}/sharded", "--manifest", "{IN}/SHA256SUMS")),
    "shell: convert": Way(_command("convert", "{IN}/zip.pth", "{OUT}", "--dtype", "bfloat16"), writes=True, makes=True),
}
if find_spec("bitsandbytes"):
    WAYS |= {
        "to int8": Way(_load("sharded", quantize="int8")),
        "to int8, on disk": Way(_forward("sharded", quantize="int8", offload_folder=True), writes=True),
        "int8": Way(_load("int8"), needs=_write_int8),
        "from int8": Way(_load("int8", dequantize=True, dtype="bfloat16"), needs=_write_int8),
        "forward of int8": Way(_forward("int8"), needs=_write_int8),
    }
if find_spec("matplotlib"):
    WAYS["plot"] = Way(_plot, writes=True, makes=True, into=True)
if find_spec("transformers"):
    WAYS |= {
        "experts": Way(_experts(), told=False, needs=_write_experts),
        "experts, on disk": Way(
            _experts(device_map="disk", dtype="float16"), writes=True, told=False, needs=_write_experts
        ),
    }


def _census() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Threads and open files of this process."""
    fds = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            fds.append(f"{entry.name} {entry.readlink()}")
    return tuple(sorted(t.name for t in threading.enumerate())), tuple(sorted(f for f in fds if "/proc/" not in f))


def _clear(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# Other inputs that were written already: where, and by what.
_written: set[tuple[Path, Callable[[Path], None]]] = set()


class Trial:
    """One way, and what it gives when nothing fails."""

    def __init__(self, name: str, root: Path) -> None:
        self.name, self.way, self.root = name, WAYS[name], root
        self.folders = [root / "in", *([root / "out"] if self.way.writes else [])]
        if self.way.needs and (root, self.way.needs) not in _written:
            self.way.needs(root / "in")
            _written.add((root, self.way.needs))
        self.clear()
        self.run()
        self.clear()
        self.expected = self.run()
        self.clear()
        self.inputs = sorted(str(p) for p in (root / "in").rglob("*"))

    def run(self) -> Any:
        """What it gives, and what it wrote."""
        return self.way.run(self.root), self.outputs()

    def clear(self) -> None:
        """Take `out` away, or what is in it."""
        _clear(self.root / "out")
        if self.way.into:
            (self.root / "out").mkdir()

    def outputs(self) -> Any:
        """What is in `out`, where that is the result."""
        return _tree(self.root / "out") if self.way.makes else None

    def count(self, fault: Fault) -> Counter[str]:
        """How many calls of each kind there are, when none fails."""
        with armed(replace(fault, at=10**9, times=1)) as said:
            self.run()
        self.clear()
        return Counter(said.kinds)

    def check(
        self,
        fault: Fault,
        result: Sweep,
        *,
        must_work: bool = False,
        told: bool = True,
        label: str = "",
        restore: Callable[[], None] = lambda: None,
        also: object = None,
    ) -> None:
        """Run it once with a fault, and look at what it left.

        Args:
            fault: what goes wrong.
            result: takes the outcome.
            must_work: whether an error is a problem.
            told: whether an error must say what the system said, and of which file.
            label: names the fault besides.
            restore: undoes what the fault did to the inputs.
            also: another result that is right.
        """
        gc.collect()
        before = _census()
        error: BaseException | None = None
        made: Any = None
        with armed(fault) as said:
            try:
                made = self.way.run(self.root)
            except BaseException as caught:
                error = caught
        where = f"{self.name}: {'/'.join(fault.calls)} {fault.at} of {said.counted} {fault.action}"
        where += f" {label}"
        where += f" {errno.errorcode[fault.error]}" if fault.action == "fail" else ""
        restore()
        if not said.fired:
            self.clear()
            return
        result.tried += 1
        problems = []
        if error is None:
            result.succeeded += 1
            made = made, self.outputs()
            self.clear()
            if made not in (self.expected, also):
                problems.append(f"success with another result: {_difference(made, self.expected)}")
        elif isinstance(error, LowmemError):
            result.refused += 1
            if must_work:
                problems.append(f"refused: {error}")
            if told and self.way.told and fault.action == "fail" and not _says(error, fault.error):
                problems.append(f"no reason in: {error}")
            if told and str(self.root) not in str(error):
                problems.append(f"no file in: {error}")
        elif not (fault.error == errno.ENOMEM and isinstance(error, MemoryError)):
            frames = traceback.extract_tb(error.__traceback__)
            at = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames if "lowmem" in f.filename][-2:]
            problems.append(f"{type(error).__name__}: {error} at {' > '.join(at)}")
        error = made = None
        gc.collect()
        after = _census()
        if after != before:
            problems.append(f"left: {[a for a, b in zip(after, before, strict=True)]} before {before}")
        there = sorted(str(p) for p in (self.root / "in").rglob("*"))
        if there != self.inputs:
            problems.append(f"inputs changed: {set(there) ^ set(self.inputs)}")
        # What could not be removed goes with the next run.
        problems += [] if "unlink" in fault.calls else self._left()
        if self.way.into:
            (self.root / "out").mkdir(exist_ok=True)
        try:
            if self.run() != self.expected:
                problems.append("the next run gives another result")
        except BaseException as caught:
            problems.append(f"the next run: {type(caught).__name__}: {caught}")
        problems += self._left() if "unlink" in fault.calls else []
        self.clear()
        result.problems += [f"{where}: {problem}" for problem in problems]

    def _left(self) -> list[str]:
        """What should not be beside or in `out`."""
        odd = [p.name for p in self.root.iterdir() if p.name not in ("in", "out")]
        out = self.root / "out"
        if out.is_dir():
            odd += [p.name for p in out.iterdir() if p.name.endswith((".tmp", ".draft"))]
        return [f"left behind: {odd}"] if odd else []


def _says(error: BaseException, number: int) -> bool:
    """Whether an error tells what the system said; of what is not there, that is all there is to tell."""
    return os.strerror(number) in str(error) or (number == errno.ENOENT and "found none" in str(error))


def _difference(made: Any, expected: Any) -> str:
    if isinstance(made, dict) and isinstance(expected, dict):
        return str([k for k in {*made, *expected} if made.get(k) != expected.get(k)][:5])
    return f"{str(made)[:200]} for {str(expected)[:200]}"


def is_full() -> bool:
    """Whether everything is to be tried."""
    return os.environ.get("LOWMEM_FAULTS") == "all"


def spread(count: int, most: int) -> Iterable[int]:
    """Numbers below `count`: all, or `most` from the first to the last."""
    if count <= most:
        return range(count)
    return sorted({round(n * (count - 1) / (most - 1)) for n in range(most)})


def prepare(root: Path) -> None:
    """Inputs, in a process that will fail."""
    torch.set_num_threads(1)
    write_inputs(root / "in")
    lowmem.check(root / "in" / "sharded", write_manifest=root / "in" / "SHA256SUMS")


def sweep(
    root: str, names: Iterable[str], kinds: Iterable[tuple[str, tuple[int, ...]]], most: int, part: str = "in"
) -> Sweep:
    """Every call of each kind that each way makes below `part`, or `most` of each, fails with each error.

    Of a `part` that is not of the user's files an error need not tell.
    """
    total = Sweep()
    for name in names:
        trial = Trial(name, Path(root))
        gc.collect()
        gc.freeze()
        for kind, errors in kinds:
            fault = Fault([kind], [Path(root) / part])
            count = trial.count(fault)[kind]
            for at in spread(count, most):
                for error in errors:
                    trial.check(replace(fault, at=at, error=error), total, told=not part.startswith("/"))
    return total


def sweep_actions(root: str, names: Iterable[str], calls: Iterable[str], actions: Iterable[str], most: int) -> Sweep:
    """Reads and writes that move a part, and calls that are interrupted: all of it must simply work."""
    total = Sweep()
    for name in names:
        trial = Trial(name, Path(root))
        gc.collect()
        gc.freeze()
        for kind in calls:
            fault = Fault([kind], trial.folders)
            for action in actions:
                for at in spread(trial.count(fault)[kind], most):
                    trial.check(replace(fault, at=at, action=action, error=errno.EINTR), total, must_work=True)
    return total


def fresh_sweep(function: str, root: str, *args: Any) -> Sweep:
    """`sweep` or another, with new inputs."""
    prepare(Path(root))
    made: Sweep = globals()[function](root, *args)
    return made


def sweep_threads(root: str, names: Iterable[str]) -> Sweep:
    """No thread can be started from the first on, from the second and so on; or one cannot."""
    total = Sweep()
    for name in names:
        # Readers start none of torch's; what computes for the caller does, and OpenMP ends the process without them.
        trial = Trial(name, Path(root))
        gc.collect()
        gc.freeze()
        fault = Fault(["thread"], error=errno.EAGAIN)
        for at in range(trial.count(fault)["thread"]):
            for times in (0, 1):
                trial.check(replace(fault, at=at, times=times), total, told=False)
    return total


def sweep_vanishing(root: str, names: Iterable[str], most: int) -> Sweep:
    """At every call that writes, or `most` of them, the folder that is written is removed."""
    total = Sweep()
    for name in names:
        trial = Trial(name, Path(root))
        gc.collect()
        gc.freeze()
        fault = Fault(["open", "write", "sync", "resize", "rename"], [trial.root / "out"], action="call back")
        fault = replace(fault, back=lambda: shutil.rmtree(Path(root) / "out", ignore_errors=True))
        for at in spread(sum(trial.count(replace(fault, back=None)).values()), most):
            trial.check(replace(fault, at=at), total, told=False, label="vanished")
    return total


def without_writing(root: str, names: Iterable[str]) -> list[str]:
    """What goes wrong where the disk that holds `out` is mounted for reading only; needs a name space of mounts."""
    problems = []
    prepare(Path(root))
    for name in names:
        trial = Trial(name, Path(root))
        place = trial.root / "out"
        place.mkdir(exist_ok=True)
        mount("tmpfs", place, "tmpfs", _READ_ONLY)
        try:
            trial.way.run(trial.root)
            problems.append(f"{name}: it worked")
        except LowmemError as error:
            if os.strerror(errno.EROFS) not in str(error) or str(trial.root) not in str(error):
                problems.append(f"{name}: neither reason nor place in: {error}")
        except BaseException as error:
            problems.append(f"{name}: {type(error).__name__}: {error}")
        finally:
            _libc().umount2(str(place).encode(), 2)
        trial.clear()
        if (trial.run(), trial.outputs())[0] != trial.expected:
            problems.append(f"{name}: the next run gives another result")
        trial.clear()
    return problems


_READ_ONLY = 1
_PRIVATE = 1 << 18 | 1 << 14
_NEW_MOUNTS = 0x20000


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def mount(source: str, place: Path, kind: str, flags: int) -> None:
    """mount(2).

    Raises:
        OSError: it is not allowed.
    """
    if _libc().mount(source.encode(), str(place).encode(), kind.encode(), ctypes.c_ulong(flags), None):
        raise OSError(ctypes.get_errno(), f"mount {place}")


def own_mounts() -> None:
    """Give this process mounts of its own, whose changes nobody else sees.

    Raises:
        OSError: it is not allowed.
    """
    if _libc().unshare(_NEW_MOUNTS):
        raise OSError(ctypes.get_errno(), "unshare")
    mount("none", Path("/"), "none", _PRIVATE)


def read_only_disk(root: str, names: Iterable[str]) -> list[str] | None:
    """`without_writing` in this process, with mounts of its own; None where that is not allowed."""
    try:
        own_mounts()
        place = Path(root).with_name("mounted")
        place.mkdir(parents=True)
        mount("tmpfs", place, "tmpfs", _READ_ONLY)
    except OSError:
        return None
    return without_writing(root, names)


def sweep_memory(root: str, names: Iterable[str], least: int, most: int) -> Sweep:
    """Every allocation of at least `least` bytes fails, or `most` of them."""
    total = Sweep()
    for name in names:
        trial = Trial(name, Path(root))
        gc.collect()
        gc.freeze()
        fault = Fault(["allocate"], larger=least)
        for at in spread(trial.count(fault)["allocate"], most):
            trial.check(replace(fault, at=at, error=errno.ENOMEM), total, told=False)
    return total


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 3)


def _grow(file: Path) -> None:
    with file.open("ab") as f:
        f.write(b"more")


def _overwrite(file: Path) -> None:
    """Other values, in place, of the same size."""
    size = file.stat().st_size
    with file.open("r+b") as f:
        f.seek(size // 2)
        f.write(bytes(size - size // 2))


def _replace(file: Path) -> None:
    """Another file of the same name and size."""
    other = file.with_name(f".{file.name}.new")
    other.write_bytes(
        file.read_bytes()[: file.stat().st_size // 2] + bytes(file.stat().st_size - file.stat().st_size // 2)
    )
    other.replace(file)


def _remove(file: Path) -> None:
    file.unlink(missing_ok=True)


CHANGES = {"truncated": _truncate, "grown": _grow, "overwritten": _overwrite, "replaced": _replace, "removed": _remove}


def sweep_changes(root: str, names: Iterable[str], file: str, changes: Iterable[str], most: int) -> Sweep:
    """At every call that a load makes below its inputs, or `most` of them, a file of the checkpoint changes."""
    total, folder = Sweep(), Path(root) / "in"
    kept = Path(root).with_name(f"{Path(root).name}-kept")
    # As old as files are: a change within one tick of the clock cannot be told by its time.
    for path in folder.rglob("*"):
        os.utime(path, (1_600_000_000, 1_600_000_000))
    shutil.copytree(folder, kept)
    for name in names:
        trial = Trial(name, Path(root))
        gc.collect()
        gc.freeze()
        fault = Fault(["open", "read", "map", "stat"], [folder], action="call back")
        calls = sum(trial.count(fault).values())

        def restore() -> None:
            shutil.rmtree(folder)
            shutil.copytree(kept, folder)

        for change in changes:
            also = None
            # Before the first look at it, the changed file is the file.
            CHANGES[change](folder / file)
            with contextlib.suppress(LowmemError):
                also = trial.run()
            trial.clear()
            restore()
            for at in spread(calls, most):

                def back(change: str = change) -> None:
                    CHANGES[change](folder / file)

                changed = replace(fault, at=at, back=back)
                trial.check(changed, total, told=False, label=change, restore=restore, also=also)
    shutil.rmtree(kept)
    return total


def descriptors(root: str, name: str, most: int) -> list[str]:
    """With so many more open files than now, up to `most`, a way works or says that they are too few."""
    import resource

    prepare(Path(root))
    trial, problems = Trial(name, Path(root)), []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    here = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir()) + 1
    worked = False
    for more in range(most):
        error: BaseException | None = None
        before = _census()
        resource.setrlimit(resource.RLIMIT_NOFILE, (here + more, hard))
        try:
            trial.way.run(trial.root)
        except BaseException as caught:
            error = caught
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if error is not None and not isinstance(error, LowmemError):
            problems.append(f"{more} more: {type(error).__name__}: {error}")
        worked = error is None
        error = None
        gc.collect()
        if _census() != before:
            problems.append(f"{more} more: left {_census()} before {before}")
        trial.clear()
    return problems if worked else [*problems, "it never worked"]


def under_data_limits(root: str, name: str, steps: int) -> dict[str, list[int]]:
    """In forks, under limits of private memory from none to enough: how each ended, of the outcomes that may be."""
    import resource

    prepare(Path(root))
    trial = Trial(name, Path(root))
    ends: dict[str, list[int]] = {}
    for step in range(steps):
        left = step * (32 << 20) // steps

        def work(left: int = left) -> None:
            status = Path("/proc/self/status").read_text().splitlines()
            used = next(int(line.split()[1]) for line in status if line.startswith("VmData")) << 10
            resource.setrlimit(resource.RLIMIT_DATA, (used + left, resource.RLIM_INFINITY))
            before = _census()
            code = 0
            try:
                trial.way.run(trial.root)
            except (LowmemError, MemoryError):
                code = 3
            resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY,) * 2)
            gc.collect()
            if _census() != before:
                os._exit(4)
            trial.clear()
            if trial.run() != trial.expected:
                os._exit(5)
            os._exit(code)

        code = in_fork(work, timeout=60)
        trial.clear()
        ends.setdefault({0: "worked", 3: "refused"}.get(code, f"exit {code}"), []).append(left)
    return ends
