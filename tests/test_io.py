"""Whatever way a load reads, it gives the same bits, and says which way it was."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cold_files import drop, needs_cold, needs_direct, resident, wait_until, warm
from safetensors.torch import load_file, save_file
from tiny_models import same
from torch import nn

import lowmem
from lowmem.cli import main
from lowmem.planner.records import IO
from lowmem.sizes import MIB
from lowmem.synthetic import llama_recipe, write_checkpoint

pytestmark = pytest.mark.timeout(180)
FLOATS = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
WAYS: list[IO] = ["auto", "buffered", "direct", "mmap"]


class Bag(nn.Module):
    """Parameters of these shapes, on meta."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")))


@functools.cache
def patterns(dtype: str) -> torch.Tensor:
    """Every value of a float of one or two bytes, NaNs and infinities included; of larger ones a sample and the odd."""
    kind: torch.dtype = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(5)
    if kind.itemsize == 1:
        return torch.arange(256, dtype=torch.int16).to(torch.uint8).view(kind).repeat(1500)
    if kind.itemsize == 2:
        return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(kind).repeat(4)
    random = torch.randint(-(2**31), 2**31 - 1, (200_000,), generator=generator).to(torch.int32).view(torch.float32)
    small = patterns("float16").to(kind)[:65536]
    odd = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 3.4e38, 65504, 65519.9, 65520, 448])
    return torch.cat([random.to(kind), small, odd.to(kind)])


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A file of all patterns of a dtype, once whole and once as a small matrix."""
    folder = tmp_path_factory.mktemp("floats")

    @functools.cache
    def made(dtype: str) -> Path:
        path = folder / f"{dtype}.safetensors"
        values = patterns(dtype)
        save_file({"all": values, "few": values[:240].reshape(12, 20).clone()}, path)
        drop(path)
        return path

    return made


@pytest.mark.parametrize("io", ["buffered", "direct"])
@pytest.mark.parametrize("into", FLOATS)
@pytest.mark.parametrize("source", FLOATS)
def test_casts_are_those_of_torch_bit_for_bit(floats: Callable[[str], Path], source: str, into: str, io: IO) -> None:
    path = floats(source)
    model = lowmem.load(
        path, model=Bag(load_file(path)), residency="copy", dtype=into, io=io, staging=MIB
    ).model.state_dict()
    for name, tensor in load_file(path).items():
        check_cast(model[name], tensor, getattr(torch, into))


def check_cast(found: torch.Tensor, tensor: torch.Tensor, into: torch.dtype) -> None:
    """Bit for bit. torch casts some NaNs to other bits at a vector's end than within it: both are torch's."""
    if same(found, tensor.to(into)):
        return
    assert (found.shape, found.dtype) == (tensor.shape, into)
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[into.itemsize]
    within, values = tensor.to(into).flatten(), tensor.flatten()
    other = (found.flatten().view(bits) != within.view(bits)).nonzero().flatten()
    assert torch.isnan(values[other]).all()
    at_end = torch.cat([values[n : n + 1].to(into) for n in other.tolist()])
    assert same(found.flatten()[other], at_end)


# -- every way


class Mixed(nn.Module):
    """Large enough for chunks, with ends that lie on no block."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(1537, 3001)
        self.tall = nn.Linear(3, 70_001)
        self.norm = nn.LayerNorm(33)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("io") / "mixed.safetensors"
    torch.manual_seed(2)
    save_file(Mixed().state_dict(), path)
    return path


DOES: dict[str, dict[str, Any]] = {
    "copy": {"residency": "copy"},
    "cast": {"dtype": "bfloat16"},
    "cast, small staging": {"dtype": "bfloat16", "staging": MIB},
    "both": {"dtype": "bfloat16", "keep_fp32": ["wide"], "residency": "copy"},
    "disk": {"dtype": "bfloat16", "device_map": {"": "cpu", "wide": "disk", "tall": "disk"}},
}


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("io", WAYS)
@pytest.mark.parametrize("case", DOES)
def test_every_way_gives_the_same_bits(mixed: Path, tmp_path: Path, case: str, io: IO, cached: bool) -> None:
    (warm if cached else drop)(mixed)
    result = lowmem.load(mixed, model=Mixed, io=io, offload_folder=tmp_path / "off", **DOES[case])
    final = {p.target: getattr(torch, p.dtype) for p in result.plan.placements}
    written = {k: v for f in (tmp_path / "off").rglob("*.safetensors") for k, v in load_file(f).items()}
    assert set(written) == ({"wide.weight", "wide.bias", "tall.weight", "tall.bias"} if case == "disk" else set())
    found = {**result.model.state_dict(), **written}
    for name, tensor in load_file(mixed).items():
        assert same(found[name], tensor.to(final[name])), name
    read = result.report.read
    assert sum(read.values()) == result.plan.bytes_read == result.report.bytes_read > 0
    assert set(read) <= {"auto": {"buffered", "direct"}, "direct": {"buffered", "direct"}}.get(io, {io})
    assert result.report.to_dict()["bytes_by_way"] == dict(read)


@needs_direct
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("case", ["copy", "cast", "cast, small staging", "both"])
def test_who_asks_for_direct_reads_gets_them_for_all_that_is_large(mixed: Path, case: str, cached: bool) -> None:
    (warm if cached else drop)(mixed)
    result = lowmem.load(mixed, model=Mixed, io="direct", **DOES[case])
    assert result.report.read["direct"] >= result.plan.bytes_read * 9 // 10


# -- the shell


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(llama_recipe(8 * MIB), tmp_path_factory.mktemp("io") / "llama", max_shard_size=3 * MIB)
    for file in folder.glob("*.safetensors"):
        drop(file)
    return folder


def run_json(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    capsys.readouterr()
    code = main([*map(str, argv), "--json"])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    value: dict[str, Any] = json.loads(shown.out)
    return value


@pytest.mark.parametrize("io", WAYS)
def test_the_shell_takes_the_way(llama: Path, capsys: pytest.CaptureFixture[str], io: IO) -> None:
    shown = run_json(capsys, "load", llama, "--residency", "copy", "--io", io)
    assert sum(shown["bytes_by_way"].values()) == shown["bytes_read"] > 0
    if io in ("buffered", "mmap"):
        assert set(shown["bytes_by_way"]) == {io}


def test_the_shell_refuses_another_way(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["load", str(llama), "--io", "fast"])
    assert caught.value.code == 2
    assert "--io" in capsys.readouterr().err


@needs_cold
def test_the_shell_prefetches(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted(llama.glob("*.safetensors"))
    for file in files:
        drop(file)
    run_json(capsys, "load", llama, "--prefetch")
    assert wait_until(lambda: all(all(resident(file)[1:]) for file in files))
    shown = run_json(capsys, "plan", llama, "--prefetch", "--residency", "copy")
    assert [text for text in shown["warnings"] if text.startswith("prefetch")]


@needs_cold
def test_the_shell_keeps_the_cache(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted(llama.glob("*.safetensors"))
    for file in files:
        drop(file)
    run_json(capsys, "load", llama, "--residency", "copy", "--io", "buffered", "--keep-cache")
    assert all(all(resident(file)) for file in files)


BAD: list[dict[str, Any]] = [
    {"io": "fast"},
    {"io": None},
    {"io": 1},
    {"io": b"direct"},
    {"prefetch": "yes"},
    {"prefetch": 1},
    {"keep_cache": None},
    {"keep_cache": 0},
]


@pytest.mark.parametrize("options", BAD, ids=str)
def test_options_that_mean_nothing_are_refused(mixed: Path, options: dict[str, Any]) -> None:
    for call in (lowmem.load, lowmem.plan):
        with pytest.raises(lowmem.OptionError, match=next(iter(options))):
            call(mixed, model=Mixed, **options)


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="needs positional reads")
def test_without_positional_reads_the_values_are_the_same(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows: neither preadv nor direct I/O."""
    monkeypatch.delattr(os, "preadv")
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    for options in ({"residency": "copy"}, {"dtype": "bfloat16"}, {"residency": "copy", "io": "direct"}):
        model = lowmem.load(mixed, model=Mixed, **options).model.state_dict()
        for name, tensor in load_file(mixed).items():
            assert same(model[name], tensor.to(model[name].dtype))
