"""Models that ranks divide, load and compare with whole ones: what each process of tests/test_ranks.py runs."""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import lowmem
from lowmem import LoadResult

META = torch.device("meta")


class RefusedError(Exception):
    """The load was refused, on some ranks or on all: the error of each, None where it went well."""

    def __init__(self, errors: list[str | None]) -> None:
        super().__init__("; ".join(f"rank {i}: {error}" for i, error in enumerate(errors)))
        self.errors = errors


@dataclass
class Ranks:
    """One rank among the others.

    Attributes:
        rank: its global number.
        count: how many there are.
        folders: checkpoints by name.
        problems: what was not as it should be in the case that runs.
    """

    rank: int
    count: int
    folders: Mapping[str, Path]
    problems: list[str] = field(default_factory=list)
    _meshes: dict[Any, DeviceMesh] = field(default_factory=dict)
    _whole: dict[Any, dict[str, torch.Tensor]] = field(default_factory=dict)

    def expect(self, condition: object, what: str) -> None:
        """Note what is not so; the other ranks go on, and so does this one."""
        if not condition:
            self.problems.append(what)

    def mesh(self, *shape: int, names: tuple[str, ...] = ()) -> DeviceMesh:
        """All ranks in rows and columns."""
        key = shape, names
        if key not in self._meshes:
            self._meshes[key] = init_device_mesh("cpu", shape, mesh_dim_names=names or None)
        return self._meshes[key]

    def mesh_of(self, *ranks: int) -> DeviceMesh:
        """Some of them, in a row; every rank must call this."""
        if ranks not in self._meshes:
            self._meshes[ranks] = DeviceMesh("cpu", list(ranks))
        return self._meshes[ranks]

    def gather(self, mine: Any) -> list[Any]:
        """What each rank has."""
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, mine)
        return found

    def load(self, source: Any, **options: Any) -> LoadResult:
        """`lowmem.load` on all ranks at once.

        Raises:
            RefusedError: on any of them it did not go well.
        """
        error, result = None, None
        try:
            result = lowmem.load(source, **options)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        errors = self.gather(error)
        if any(errors):
            raise RefusedError(errors)
        assert result is not None
        return result

    def whole(self, name: str, dtype: str | None = None) -> dict[str, torch.Tensor]:
        """What transformers loads in one process, which `lowmem.load` does too."""
        key = name, dtype
        if key not in self._whole:
            theirs = whole_model(self.folders[name], dtype).state_dict()
            ours = lowmem.load(self.folders[name], residency="copy", dtype=dtype or "auto").model.state_dict()
            self.expect(list(ours) == list(theirs), "a whole load has other names than transformers")
            for key_, tensor in theirs.items():
                self.expect(same_tensor(ours[key_], tensor), f"a whole load has another {key_}")
            self._whole[key] = theirs
        return self._whole[key]


def same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Shape, dtype and every bit."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.detach(), b.detach())


def whole_model(folder: Path, dtype: str | None = None) -> Any:
    """By transformers, in this process alone."""
    from transformers import AutoModelForCausalLM

    wanted = "auto" if dtype is None else getattr(torch, dtype)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=wanted).eval()


def empty_model(folder: Path, dtype: str = "float32") -> Any:
    """Without values."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with META:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=getattr(torch, dtype))
    for parameter in list(model.parameters())[4::5]:
        parameter.requires_grad_(False)
    return model


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, each under all its names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def part_of(tensor: torch.Tensor, mesh: DeviceMesh, placements: Iterable[Any]) -> torch.Tensor:
    """What torch gives to this rank of a whole tensor."""
    at = mesh.get_coordinate()
    assert at is not None
    for index, count, placement in zip(at, mesh.mesh.shape, placements, strict=True):
        if isinstance(placement, (Shard, _StridedShard)):
            tensor = placement._split_tensor(tensor, count, with_padding=False, contiguous=True)[0][index]
    return tensor.contiguous()


@dataclass
class Before:
    """What a model has before it is loaded, and should have afterwards."""

    placements: dict[str, Any]
    flags: dict[str, bool]
    attributes: dict[str, dict[str, Any]]
    ties: list[list[str]]


def ties_in(model: nn.Module) -> list[list[str]]:
    """Names of the same tensor."""
    found: dict[int, list[str]] = {}
    for name, tensor in tensors_of(model).items():
        found.setdefault(id(tensor), []).append(name)
    return [names for names in found.values() if len(names) > 1]


def look(model: nn.Module) -> Before:
    """At a model that is not loaded yet."""
    tensors = tensors_of(model)
    return Before(
        {n: (t.device_mesh, t.placements) for n, t in tensors.items() if isinstance(t, DTensor)},
        {n: t.requires_grad for n, t in tensors.items()},
        {n: _attributes(t) for n, t in tensors.items()},
        ties_in(model),
    )


def _attributes(tensor: torch.Tensor) -> dict[str, Any]:
    """But for marks of transformers and torch, which are left out of loads by transformers too."""
    return {name: value for name, value in vars(tensor).items() if not name.startswith("_is") and name != "persistent"}


def _steps(tensor: torch.Tensor) -> list[int]:
    """Strides, where they say something."""
    dims = zip(tensor.shape, tensor.stride(), strict=True)
    return [stride for n, stride in dims if n > 1] if tensor.numel() else []


def check_parts(ranks: Ranks, model: nn.Module, whole: Mapping[str, torch.Tensor], before: Before) -> None:
    """What this rank holds is its part, of the kind that it was."""
    expect = ranks.expect
    expect(ties_in(model) == before.ties, f"other ties: {ties_in(model)} instead of {before.ties}")
    tensors = tensors_of(model)
    for name, tensor in tensors.items():
        expect(not tensor.is_meta, f"{name}: on the meta device")
        expect(tensor.requires_grad == before.flags[name], f"{name}: requires_grad {tensor.requires_grad}")
        expect(_attributes(tensor) == before.attributes[name], f"{name}: {vars(tensor)}, not {before.attributes[name]}")
        expect(isinstance(tensor, DTensor) == (name in before.placements), f"{name}: {type(tensor)}")
        if name not in whole:
            continue
        full = whole[name]
        if not isinstance(tensor, DTensor):
            expect(same_tensor(tensor, full), f"{name}: other values")
            continue
        mesh, placements = before.placements[name]
        expect((tensor.device_mesh, tensor.placements) == (mesh, placements), f"{name}: {tensor.placements}")
        expect(tensor.shape == full.shape, f"{name}: shape {tensor.shape}")
        expect(tensor.stride() == full.stride(), f"{name}: strides {tensor.stride()}")
        local = tensor.to_local()
        if mesh.get_coordinate() is None:
            expect(not local.numel() and local.dtype == full.dtype, f"{name}: {local} of no rank's")
            continue
        part = part_of(full, mesh, placements)
        expect(same_tensor(local, part), f"{name}: other values in this rank's part {placements}")
        expect(_steps(local) == _steps(part), f"{name}: part's strides {local.stride()}, not {part.stride()}")
        theirs = distribute_tensor(full.detach(), mesh, placements, src_data_rank=None).to_local()
        expect(same_tensor(local, theirs), f"{name}: torch distributes other values")
        expect(_steps(local) == _steps(theirs), f"{name}: strides {local.stride()}, torch's {theirs.stride()}")
        if name in dict(model.named_parameters(remove_duplicate=False)):
            expect(isinstance(tensor, nn.Parameter), f"{name}: {type(tensor)} is no parameter")


def check_whole(ranks: Ranks, model: nn.Module, whole: Mapping[str, torch.Tensor]) -> None:
    """All parts together are the whole; every rank must call this."""
    for name, tensor in tensors_of(model).items():
        if name in whole:
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if not isinstance(tensor, DTensor) or tensor.device_mesh.get_coordinate() is not None:
                ranks.expect(same_tensor(full, whole[name]), f"{name}: other values after full_tensor()")


def share_of(model: nn.Module, itemsize: Callable[[str, torch.Tensor], int] | None = None) -> int:
    """Bytes of what this rank holds, each tensor once."""
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        size = itemsize(name, local) if itemsize is not None else local.itemsize
        found[id(tensor)] = local.numel() * size
    return sum(found.values())


def check_load(
    ranks: Ranks, model: nn.Module, whole: Mapping[str, torch.Tensor], source: Any, **options: Any
) -> LoadResult:
    """A divided model, loaded: its parts, their whole, and the plan beforehand."""
    for name, parameter in model.named_parameters():
        parameter.tag = f"of {name}"
    before = look(model)
    planned = None
    if "read" not in options:
        planned = lowmem.plan(source, model=model, **options)
    result = ranks.load(source, model=model, **options)
    ranks.expect(result.model is model, "another model")
    check_parts(ranks, model, whole, before)
    check_whole(ranks, model, whole)
    check_numbers(ranks, result, planned)
    return result


def check_numbers(ranks: Ranks, result: LoadResult, planned: Any) -> None:
    """The plan, that of `lowmem.plan`, and what the load measured."""
    plan, report, expect = result.plan, result.report, ranks.expect
    expect(sum(report.read.values()) == plan.bytes_read, f"read {dict(report.read)}, planned {plan.bytes_read}")
    if planned is not None and plan.rank is not None and plan.rank.read == "each":
        for what in ("bytes_read", "host", "devices", "staging"):
            a, b = getattr(planned, what), getattr(plan, what)
            a, b = (_fixed(a), _fixed(b)) if what == "host" else (a, b)
            expect(a == b, f"plan() has {what} {a}, the load {b}")
    facts = ranks.gather((plan.bytes_read, plan.host.peak, None if plan.rank is None else plan.rank.to_dict()))
    if plan.rank is not None:
        share, beside = plan.rank, plan.rank.beside
        expect(share.rank == ranks.rank, f"rank {share.rank}")
        expect(share.members == len(beside), f"{share.members} members, {beside} beside")
        expect(share.reads == sum(facts[r][0] for r in beside), f"reads {share.reads}")
        expect(share.peak == sum(facts[r][1] for r in beside), f"peak {share.peak}")
        expect({facts[r][2]["mapped"] for r in beside} == {share.mapped}, "ranks differ about what is mapped")


def _fixed(host: Any) -> tuple[int, ...]:
    """What does not change with what else the machine does."""
    return host.peak, host.resident, host.mapped


def run_cases(rank: int, cases: list[str], folders: Mapping[str, Path]) -> dict[str, list[str]]:
    """The problems of each case, on this rank."""
    from tests import rank_cases

    _be_quiet()
    ranks = Ranks(rank, dist.get_world_size(), folders)
    answers = {}
    for name in cases:
        ranks.problems = []
        try:
            rank_cases.CASES[name](ranks)
        except Exception as error:
            ranks.problems.append(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        answers[name] = ranks.problems[:12]
        dist.barrier()
    return answers


def _be_quiet() -> None:
    import transformers

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def fsdp(model: Any, mesh: DeviceMesh, place: Callable[[Any], Any] | None = None) -> Any:
    """Its layers and the rest, as training programs do it."""
    options: dict[str, Any] = {"mesh": mesh}
    if place is not None:
        options["shard_placement_fn"] = place
    inner = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    for layer in inner:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def spread(module: nn.Module, mesh: DeviceMesh, placements: Callable[[str, torch.Tensor], Any]) -> None:
    """Make DTensors of a module's tensors; None leaves one whole."""
    for prefix, owner in module.named_modules():
        for table in (owner._parameters, owner._buffers):
            for leaf, tensor in list(table.items()):
                chosen = None if tensor is None else placements(f"{prefix}.{leaf}".lstrip("."), tensor)
                if tensor is None or chosen is None:
                    continue
                whole = tensor.detach()
                divided = distribute_tensor(whole, mesh, chosen, src_data_rank=None)
                if isinstance(tensor, nn.Parameter):
                    divided = nn.Parameter(divided, tensor.requires_grad)
                table[leaf] = divided


__all__ = [
    "META",
    "Ranks",
    "RefusedError",
    "Replicate",
    "Shard",
    "check_load",
    "empty_model",
    "fsdp",
    "run_cases",
    "share_of",
    "spread",
    "whole_model",
]
