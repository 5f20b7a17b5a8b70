"""`kill -9` at each system call that changes something: what is seen afterwards is old or whole, and a second run
finishes the job and leaves nothing behind.

A few kills of each case, evenly spread; `LOWMEM_KILLS=all` makes all of them.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fake_hub import Hub
from fault_shim import Fault, armed, in_fork, under_shim

CHANGES = ("open", "write", "sync", "resize", "rename", "link", "unlink", "mkdir", "rmdir", "copy", "close")
HIDDEN = ".lowmem-convert"
INDEX = "lowmem-offload.json"
FEW = 4


class Case:
    """What is run, killed and run again; `place` is the folder whose calls count.

    Args:
        base: a folder of its own, for what all runs share.
    """

    options: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, base: Path) -> None:
        self.base = base

    def start(self, place: Path) -> None:
        """What lies there before."""
        place.mkdir()

    def run(self, place: Path) -> Any:
        """The job; what it gives is the same each time."""
        raise NotImplementedError

    def look(self, place: Path, whole: dict[str, Any]) -> Any:
        """After the kill: nothing visible is half; what it gives goes to `compare`."""

    def compare(self, result: Any, expected: Any, seen: Any) -> None:
        """What the second run gave, with what an undisturbed one gave."""
        assert result == expected

    def files(self, place: Path) -> dict[str, Any]:
        """Everything that lies there, by its content; None for a folder."""
        return {
            path.relative_to(place).as_posix(): None if path.is_dir() else self.content(path)
            for path in place.rglob("*")
        }

    def content(self, path: Path) -> Any:
        return path.read_bytes()


def state_for(seed: int, count: int = 6, rows: int = 300) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return {f"t{n}": torch.randn(rows, 64, generator=generator) for n in range(count)}


class Convert(Case):
    """Several shards, with what comes along."""

    options: dict[str, Any] = {"max_shard_size": 160_000}  # noqa: RUF012

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self.source = base / "source"
        self.source.mkdir()
        self.fill()

    def fill(self) -> None:
        from safetensors.torch import save_file

        save_file(state_for(0), self.source / "model.safetensors")
        (self.source / "config.json").write_text('{"model_type": "llama"}')
        (self.source / "tokenizer.json").write_text("{}" * 500)

    def run(self, place: Path) -> Any:
        import lowmem

        report = lowmem.convert(self.source, place / "out", **self.options)
        return {"files": dict(report.files), "kept": report.kept, "tensors": report.tensors}

    def look(self, place: Path, whole: dict[str, Any]) -> Any:
        import lowmem
        from lowmem.errors import LowmemError

        found = self.files(place)
        visible = {name: content for name, content in found.items() if HIDDEN not in name}
        assert all(whole[name] == content for name, content in visible.items())
        if f"out/{HIDDEN}/state.json" in found:
            with pytest.raises(LowmemError, match="unfinished conversion"):
                lowmem.inspect(place / "out")
        elif visible.keys() != whole.keys():
            with pytest.raises(LowmemError):
                lowmem.inspect(place / "out")
        else:
            lowmem.inspect(place / "out")
        # With a record it is on the disk and read back, wherever it has got to.
        names = {name.removesuffix(".json").rpartition("/")[2] for name in found if name.endswith(".safetensors.json")}
        state = json.loads(found.get(f"out/{HIDDEN}/state.json") or "{}")
        return {
            "sealed": names if state else set(),
            "published": bool(state) and visible.keys() == whole.keys(),
            "finished": not state and visible.keys() == whole.keys(),
        }

    def compare(self, result: Any, expected: Any, seen: Any) -> None:
        assert result["files"] == expected["files"]
        assert result["tensors"] == expected["tensors"]
        assert seen["sealed"] <= set(result["kept"]), f"written again: {seen['sealed'] - set(result['kept'])}"
        if seen["published"]:
            assert set(result["kept"]) == set(result["files"]), f"kept only {result['kept']}"


class ConvertGoesOn(Convert):
    """Where an earlier run was killed behind its second shard."""

    def start(self, place: Path) -> None:
        template = self.base / "template"
        if not template.exists():
            template.mkdir()
            kill_at_rename(lambda: self.run(template), template, f"/{HIDDEN}/*.safetensors.json", 2)
        shutil.copytree(template, place)


class ConvertPickles(Convert):
    """From shards that torch wrote, and with a cast."""

    options = {"max_shard_size": 100_000, "dtype": "bfloat16"}  # noqa: RUF012

    def fill(self) -> None:
        import torch

        state = state_for(1)
        names = {name: f"pytorch_model-0000{1 + n // 3}-of-00002.bin" for n, name in enumerate(state)}
        for file in set(names.values()):
            torch.save({n: state[n] for n in state if names[n] == file}, self.source / file)
        (self.source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
        (self.source / "config.json").write_text('{"model_type": "llama", "dtype": "float32"}')


class ConvertOneFile(Convert):
    """A single file without a config, and nothing read back."""

    options = {"verify": False}  # noqa: RUF012

    def fill(self) -> None:
        from safetensors.torch import save_file

        save_file(state_for(2), self.source / "model.safetensors")


class ConvertInt8(Convert):
    """Quantised."""

    options = {"max_shard_size": 20_000, "quantize": "int8"}  # noqa: RUF012

    def fill(self) -> None:
        from tiny_models import new_model

        new_model("llama", "bfloat16").save_pretrained(self.source, max_shard_size="30KB")


def kill_at_rename(run: Callable[[], Any], place: Path, pattern: str, count: int) -> None:
    """Run in a fork that is killed when `count` files have got a name of this pattern."""

    def killed() -> None:
        rename, left = Path.replace, [count]

        def replace(self: Path, target: Any) -> Path:
            made = rename(self, target)
            left[0] -= Path(target).match(pattern.lstrip("/"))
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return made

        Path.replace = replace  # type: ignore[assignment]
        run()

    assert in_fork(killed) == -signal.SIGKILL


class Offload(Case):
    """Cast while it goes to disk."""

    options: dict[str, Any] = {"device_map": "disk", "dtype": "bfloat16"}  # noqa: RUF012

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self.source = base / "source"
        self.source.mkdir()
        self.fill()

    def fill(self) -> None:
        from safetensors.torch import save_file
        from test_engine import Net

        state = Net().state_dict()
        names = {name: f"model-0000{1 + n // 6}-of-00002.safetensors" for n, name in enumerate(state)}
        for file in set(names.values()):
            save_file({n: state[n] for n in state if names[n] == file}, self.source / file)
        (self.source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))

    def load(self, off: Path, **options: Any) -> Any:
        import lowmem

        return lowmem.load(self.source, offload_folder=off, **{**self.options, **self.model(), **options})

    def model(self) -> dict[str, Any]:
        from test_engine import Net

        return {"model": Net}

    def run(self, place: Path) -> Any:
        import hashlib

        import torch

        result = self.load(place / "off")
        found = hashlib.sha256()
        for name, tensor in sorted(result.model.state_dict().items()):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def look(self, place: Path, whole: dict[str, Any]) -> Any:
        found = self.files(place)
        for name in [name for name in found if name.endswith(f"/{INDEX}") and "/." not in name]:
            folder = name.removesuffix(f"/{INDEX}")
            if name in whole and self.is_new(found[name]):
                mine = {n: c for n, c in found.items() if n.startswith(f"{folder}/") and "/." not in n}
                assert mine == {n: c for n, c in whole.items() if n.startswith(f"{folder}/")}
        return None

    def is_new(self, index: Any) -> bool:
        """Whether this index is none that lay there before."""
        return True

    def content(self, path: Path) -> Any:
        if path.name != INDEX:
            return path.read_bytes()
        try:
            table = json.loads(path.read_bytes())
        except ValueError:
            return path.read_bytes()
        del table["mtimes"]
        return table


class OffloadFused(Offload):
    """Experts that are put together, beside weights that stay in the checkpoint."""

    options = {"device_map": "disk", "dtype": "auto"}  # noqa: RUF012

    def fill(self) -> None:
        from tiny_models import new_model

        new_model("qwen3-moe", "bfloat16").save_pretrained(self.source, max_shard_size="60KB")

    def model(self) -> dict[str, Any]:
        return {}


class OffloadInt8(OffloadFused):
    """Linear layers as int8."""

    options = {"device_map": "disk", "quantize": "int8"}  # noqa: RUF012

    def fill(self) -> None:
        from tiny_models import new_model

        new_model("llama", "bfloat16").save_pretrained(self.source, max_shard_size="30KB")


class OffloadAfterOthers(Offload):
    """In a root with the same folder, damaged, that of another dtype, and what a killed writer left."""

    def start(self, place: Path) -> None:
        template = self.base / "template"
        if not template.exists():
            template.mkdir()
            assert in_fork(lambda: self.load(template / "off")) == 0
            (mine,) = (template / "off").iterdir()
            shard = min(mine.glob("*.safetensors"))
            os.truncate(shard, shard.stat().st_size // 2)
            assert in_fork(lambda: self.load(template / "off", dtype="float16")) == 0
            left = template / "off/.0123456789abcdef-1-01234567.tmp"
            left.mkdir()
            (left / "offload-00001-of-00001.safetensors").write_bytes(b"x" * 1000)
            copied(template, self.base / "before")
        copied(template, place)

    def look(self, place: Path, whole: dict[str, Any]) -> Any:
        found = self.files(place)
        before = self.files(self.base / "before")
        for name, content in found.items():
            if "/." not in name and content is not None:
                assert content in (before.get(name), whole.get(name)), name


class OffloadIsUsedAgain(Offload):
    """A folder whose bytes are on the disk by now, as its index is to say; beside what a killed writer left."""

    def start(self, place: Path) -> None:
        template = self.base / "template"
        if not template.exists():
            template.mkdir()
            assert in_fork(lambda: self.load(template / "off")) == 0
            (index,) = template.glob(f"off/*/{INDEX}")
            os.utime(index, (1e9, 1e9))
            (template / "off/.0123456789abcdef-1-01234567.tmp").mkdir()
        copied(template, place)

    def look(self, place: Path, whole: dict[str, Any]) -> Any:
        found = self.files(place)
        for name, content in whole.items():
            if name.endswith(INDEX):
                assert {**found[name], "boot": None} == {**content, "boot": None}
            else:
                assert found[name] == content


def copied(folder: Path, to: Path) -> None:
    """A copy with the times of the files."""
    shutil.copytree(folder, to, copy_function=shutil.copy2)


class Manifest(Case):
    """Hashes over an older manifest."""

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        from safetensors.torch import save_file

        self.source = base / "source"
        self.source.mkdir()
        save_file(state_for(3, 2), self.source / "model.safetensors")
        (self.source / "config.json").write_text("{}")

    old = f"{'0' * 64}  other\n".encode()

    def start(self, place: Path) -> None:
        place.mkdir()
        (place / "SHA256SUMS").write_bytes(self.old)

    def run(self, place: Path) -> Any:
        import lowmem

        return lowmem.check(self.source, write_manifest=place / "SHA256SUMS").is_fine

    def look(self, place: Path, whole: dict[str, Any]) -> Any:
        assert (place / "SHA256SUMS").read_bytes() in (self.old, whole["SHA256SUMS"])


class Plot(Case):
    """A picture over an older one."""

    def start(self, place: Path) -> None:
        place.mkdir()
        (place / "memory.svg").write_bytes(b"old")

    def run(self, place: Path) -> Any:
        import lowmem

        with lowmem.measure() as memory:
            pass
        memory.plot(place / "memory.svg")

    def files(self, place: Path) -> dict[str, Any]:
        return {path.name: path.name for path in place.iterdir()}

    def look(self, place: Path, whole: dict[str, Any]) -> Any:
        text = (place / "memory.svg").read_bytes()
        assert text == b"old" or text.rstrip().endswith(b"</svg>")


class Synthetic(Case):
    """A checkpoint that is made up. Its folder must be new or empty, so that the second run is told to clear it."""

    def recipe(self) -> Any:
        from lowmem import synthetic

        tensors = tuple((f"t{n}", (30, 64)) for n in range(6))
        return synthetic.Recipe("some", {"model_type": "llama"}, tensors, "float32")

    def run(self, place: Path) -> Any:
        from lowmem import synthetic
        from lowmem.errors import OptionError

        with contextlib.suppress(OptionError):
            synthetic.write_checkpoint(self.recipe(), place / "made", max_shard_size=20_000)
            return
        shutil.rmtree(place / "made")
        synthetic.write_checkpoint(self.recipe(), place / "made", max_shard_size=20_000)

    def look(self, place: Path, whole: dict[str, Any]) -> Any:
        import lowmem
        from lowmem.errors import LowmemError

        visible = {name: content for name, content in self.files(place).items() if "/." not in name}
        assert all(whole[name] == content for name, content in visible.items())
        if visible == whole:
            lowmem.inspect(place / "made")
        else:
            with pytest.raises(LowmemError):
                lowmem.inspect(place / "made")


class Download(Case):
    """From a hub on this machine, whose cache is `place`."""

    def run(self, place: Path) -> Any:
        import lowmem

        self.use(place)
        checkpoint = lowmem.inspect("org/some", download=True)
        return sorted(checkpoint)

    def use(self, place: Path) -> None:
        from huggingface_hub import constants

        constants.HF_HUB_CACHE = str(place)

    def look(self, place: Path, whole: dict[str, Any]) -> Any:
        import lowmem
        from lowmem.errors import SourceError

        self.use(place)
        found = self.files(place)
        assert all(whole[name] == content for name, content in found.items())
        if found == whole:
            lowmem.inspect("org/some")
        else:
            # Even if only something small is missing.
            with pytest.raises(SourceError, match="download=True"):
                lowmem.inspect("org/some")

    def files(self, place: Path) -> dict[str, Any]:
        return {name: found for name, found in super().files(place).items() if "/snapshots/" in name and found}


CASES = {
    case.__name__: case
    for case in (
        *(Convert, ConvertGoesOn, ConvertPickles, ConvertOneFile, ConvertInt8),
        *(Offload, OffloadFused, OffloadInt8, OffloadAfterOthers, OffloadIsUsedAgain),
        *(Manifest, Plot, Synthetic, Download),
    )
}


def answered(function: Callable[[], Any], file: Path) -> tuple[int, Any]:
    """What a function gives in a fork, with the fork's exit code."""
    file.unlink(missing_ok=True)
    code = in_fork(lambda: file.write_bytes(pickle.dumps(function())))
    return code, pickle.loads(file.read_bytes()) if code == 0 else None


def spread(count: int, most: int) -> Iterator[int]:
    yield from range(count) if most <= 0 or count <= most else (n * (count - 1) // (most - 1) for n in range(most))


def sweep(name: str, folder: str, most: int) -> dict[str, Any]:
    """Kill one case at `most` of its calls (0: at all), each in a fork of this process."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = Path(folder)
    case = CASES[name](base)
    answer = base / "answer"

    def counted() -> Any:
        with armed(Fault(CHANGES, [base / "whole"], action="pass")) as said:
            result = case.run(base / "whole")
        return result, said.kinds, sorted(sys.modules)

    case.start(base / "whole")
    code, found = answered(counted, answer)
    assert code == 0
    expected, kinds, modules = found
    # Paid once, not in each fork.
    for module in modules:
        with contextlib.suppress(Exception):
            importlib.import_module(module)
    whole = case.files(base / "whole")
    done: Counter[str] = Counter()
    wrong: list[str] = []
    for at in spread(len(kinds), most):
        for action in ("kill", "torn") if kinds[at] in ("write", "copy") else ("kill",):
            place = base / f"{at}-{action}"
            try:
                done[one(case, place, answer, at, action, whole, expected)] += 1
                shutil.rmtree(place)
            except AssertionError as error:
                wrong.append(f"{action} at call {at} ({kinds[at]}): {error}")
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong[:20])
    return {"calls": len(kinds), "kinds": Counter(kinds), **done}


def one(case: Case, place: Path, answer: Path, at: int, action: str, whole: dict[str, Any], expected: Any) -> str:
    """Kill one run, look, and run it again: 'killed', or 'finished' where it made fewer calls this time."""

    def killed() -> None:
        with armed(Fault(CHANGES, [place], at=at, action=action)):
            case.run(place)

    case.start(place)
    code = in_fork(killed)
    assert code in (0, -signal.SIGKILL), f"the killed run ended with {code}"
    if code == 0:
        assert case.files(place) == whole, "a run that was not killed differs"
        return "finished"
    code, seen = answered(lambda: case.look(place, whole), answer)
    assert code == 0, f"something half is seen: {sorted(case.files(place))}"
    if seen and seen.get("finished"):
        assert in_fork(lambda: refused(case, place)) == 0, "what is finished is not refused"
    else:
        code, result = answered(lambda: case.run(place), answer)
        assert code == 0, f"the second run ended with {code}"
        case.compare(result, expected, seen)
    after = case.files(place)
    assert after == whole, f"after the second run: {sorted(after.keys() ^ whole.keys())}"
    return "killed"


def refused(case: Case, place: Path) -> None:
    from lowmem.errors import OutputError

    with pytest.raises(OutputError, match="holds a finished checkpoint already"):
        case.run(place)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub with one repository, which processes started from here ask."""
    pytest.importorskip("huggingface_hub")
    from safetensors.torch import save

    state = state_for(4, 4)
    shards = [f"model-{n:05d}-of-00002.safetensors" for n in (1, 2)]
    parts = {file: {f"t{n}": state[f"t{n}"] for n in (2 * i, 2 * i + 1)} for i, file in enumerate(shards)}
    index = {"weight_map": {key: file for file, part in parts.items() for key in part}}
    files = {
        "config.json": b'{"model_type": "llama"}',
        "tokenizer.json": b"{}" * 1000,
        "generation_config.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        **{file: save(part) for file, part in parts.items()},
    }
    monkeypatch.setattr(Hub, "repositories", {"org/some": files})
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for name, value in (("OFFLINE", "0"), ("DISABLE_XET", "1"), ("DISABLE_TELEMETRY", "1")):
        monkeypatch.setenv(f"HF_HUB_{name}", value)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    yield
    server.shutdown()
    server.server_close()


def sweeps(names: list[str], folder: str, most: int) -> dict[str, dict[str, Any]]:
    """`sweep` of several cases in one process."""
    done = {}
    for name in names:
        base = Path(folder) / name
        base.mkdir()
        done[name] = sweep(name, str(base), most)
    return done


def check_swept(names: list[str], folder: Path) -> None:
    most = 0 if os.environ.get("LOWMEM_KILLS") == "all" else FEW
    done = under_shim(sweeps, names, str(folder), most, timeout=3000 if most == 0 else 300)
    print("", *(f"{name}: {counts}" for name, counts in done.items()), sep="\n")
    assert all(counts["killed"] for counts in done.values())


def test_a_killed_conversion_is_old_or_whole_and_the_next_goes_on(tmp_path: Path) -> None:
    check_swept(["Convert", "ConvertGoesOn", "ConvertPickles", "ConvertOneFile"], tmp_path)


def test_a_killed_load_leaves_an_offload_folder_that_the_next_can_use(tmp_path: Path) -> None:
    check_swept(["Offload", "OffloadAfterOthers", "OffloadIsUsedAgain"], tmp_path)


@pytest.mark.skipif(os.environ.get("LOWMEM_KILLS") != "all", reason="LOWMEM_KILLS=all kills models of transformers too")
@pytest.mark.parametrize("name", ["ConvertInt8", "OffloadFused", "OffloadInt8"])
def test_the_same_with_models_of_transformers(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    check_swept([name], tmp_path)


def test_other_files_are_old_or_whole(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    check_swept(["Manifest", "Plot", "Synthetic"], tmp_path)


@pytest.mark.usefixtures("hub")
def test_a_download_that_was_cut_short_is_not_taken_for_whole(tmp_path: Path) -> None:
    check_swept(["Download"], tmp_path)


def test_nothing_gets_its_name_before_its_bytes_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut may drop what was not synced, in any order; a killed process alone would not show that."""
    place = tmp_path / "place"
    case = Convert(tmp_path)
    case.start(place)
    events: list[tuple[str, str]] = []

    def noted(name: str, path: Callable[..., str]) -> None:
        real = getattr(os, name)

        def call(*args: Any, **options: Any) -> Any:
            events.append((name, path(*args)))
            return real(*args, **options)

        monkeypatch.setattr(os, name, call)

    noted("fsync", lambda fd: str(Path(f"/proc/self/fd/{fd}").readlink()))
    noted("fdatasync", lambda fd: str(Path(f"/proc/self/fd/{fd}").readlink()))
    noted("replace", lambda source, target: f"{source} {target}")
    noted("unlink", lambda path, **_: str(path))
    case.run(place)
    out, hidden = place / "out", place / "out" / HIDDEN
    order = [f"{name.removeprefix('fdata').removeprefix('f')} {what}" for name, what in events]
    for name in (*(f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)), "config.json", "tokenizer.json"):
        draft = hidden / (f"{name}.partial" if name.startswith("model") else "small.draft")
        named = order.index(f"replace {draft} {hidden / name}")
        # One draft after the other has the name of small ones.
        assert f"sync {draft}" in (order[:named] if name.startswith("model") else order[named - 1])
        assert named < order.index(f"replace {hidden / name} {out / name}")
    # The weights' names, then the config's, then the end of the conversion.
    synced = [n for n, step in enumerate(order) if step == f"sync {out}"]
    last_weights = order.index(f"replace {hidden / case_last()} {out / case_last()}")
    config = order.index(f"replace {hidden / 'config.json'} {out / 'config.json'}")
    ended = order.index(f"unlink {hidden / 'state.json'}")
    assert last_weights < synced[0] < config < synced[1] < order.index(f"sync {place}") < ended


def case_last() -> str:
    return "model-00003-of-00003.safetensors"
