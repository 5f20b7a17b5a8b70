"""What a load by several ranks needs beside that of one process: who loads together, and what their plans come to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ._mounts import is_on_local_disk
from ._page_cache import cached_share
from .errors import BudgetError, ModelError, OptionError
from .modeling.request import ModelRequest
from .modeling.sharding import is_sharded, rank_here
from .modeling.skeleton import Skeleton
from .modeling.targets import Target, walk
from .planner import LoadPlan, LoadRequest
from .planner.rank_records import RankShare
from .planner.ranks import holders, mapped_share, share_out
from .ranks import Together, find_neighbours, gather
from .ranks.carrier import Carrier
from .sizes import MIB, format_size, shown

# What is read once saves at least so much, or it is not worth the messages.
_WORTH_SHARING = 64 * MIB


class Company:
    """The ranks that do a load together: nobody, until it is known who.

    A failure of one that leaves the block ends the load of all.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.together: Together | None = None
        self._carrier: Carrier | None = None

    def __enter__(self) -> Company:
        self._stack.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def join(self, members: tuple[int, ...]) -> None:
        """These ranks load together, from now on; does nothing for a single one, or when they are known already.

        Raises:
            RankError: one of them has failed, or is gone.
        """
        if self.together is None and len(members) > 1:
            self.together = self._stack.enter_context(Together(members))
            self._carrier = Carrier(self.together)
            self._stack.callback(self._carrier.close)

    @property
    def watch(self) -> Callable[[], None] | None:
        """Raises when another rank has failed; None where there is none."""
        return None if self.together is None else self.together.check

    @property
    def carrier(self) -> Carrier | None:
        """Brings tensors from rank to rank; None where there is none."""
        return self._carrier

    def settle(self) -> None:
        """Wait until all ranks have everything in its place, as long as this one can still take it back.

        From then on the load has succeeded for all of them, whatever becomes of one.

        Raises:
            RankError: another rank has failed, or is gone.
        """
        if self.together is not None:
            self.together.finish()


def is_divided(skeleton: Skeleton) -> bool:
    """Whether some of the model's tensors are DTensors, of which each rank holds a part."""
    return bool({target.sharding for target in skeleton.targets.values()} - {None})


def ranks_of(model: Any, distributed_config: Any) -> tuple[int, ...]:
    """The ranks that load what is given as a model, as far as that can be seen from it; none where it cannot."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return ()
    if distributed_config is not None:
        return tuple(range(torch.distributed.get_world_size()))
    if not isinstance(model, nn.Module):
        return ()
    meshes: set[Any] = set()
    for _, module in walk(model):
        tensors: tuple[Any, ...] = (*module._parameters.values(), *module._buffers.values())
        meshes.update(tensor.device_mesh for tensor in tensors if is_sharded(tensor))
    return tuple(sorted({rank for mesh in meshes for rank in mesh.mesh.flatten().tolist()}))


def known_members(asked: ModelRequest, request: LoadRequest) -> tuple[int, ...]:
    """The ranks that load together because of `read`, where the model does not say who: all that there are.

    Raises:
        OptionError: `read` is about several ranks, and torch.distributed does not run.
    """
    if request.read is None:
        return ()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return tuple(range(torch.distributed.get_world_size()))
    if asked.distributed_config is None:
        raise OptionError(
            f"read: expected several ranks for {request.read!r}, found no process group of torch.distributed; "
            "leave it out, or start the program by torchrun and call torch.distributed.init_process_group() before"
        )
    return ()


def members_of(skeleton: Skeleton) -> tuple[int, ...]:
    """The ranks among which a model is divided."""
    meshes = {target.sharding.mesh for target in skeleton.targets.values() if target.sharding is not None}
    return tuple(sorted({rank for mesh in meshes for rank in mesh.ranks}))


def at_home(skeleton: Skeleton, request: LoadRequest) -> LoadRequest:
    """Where the parts of a divided model go, if that is not said: to this process's own device of its meshes' kind.

    Raises:
        OptionError: a device map that would be inferred, or several devices: the mesh says who holds what.
        ModelError: nothing says which rank this is.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise ModelError(
            "the model has DTensors, and no process group of torch.distributed runs here; lowmem.plan_ranks plans a "
            "load by several ranks without them"
        )
    if isinstance(request.device_map, str) or len(set((request.device_map or {}).values())) > 1:
        raise OptionError(
            f"device_map: expected one device, found {shown(request.device_map)}: the model is divided among ranks by "
            "its DTensors, so that each process has one device; leave device_map out for the mesh's own"
        )
    kinds = {target.sharding.mesh.device for target in skeleton.targets.values() if target.sharding is not None}
    if request.device_map is not None or kinds == {"cpu"}:
        return request
    kind = min(kinds - {"cpu"})
    return replace(request, device_map={"": f"{kind}:{getattr(torch, kind).current_device()}"})


def agreed(plan: LoadPlan, targets: Mapping[str, Target], request: LoadRequest, together: Together) -> LoadPlan:
    """The plan of this rank beside those of the others: who reads what, and whether all of a host fit into it.

    Args:
        plan: of this rank alone.
        targets: of the whole model.
        request: what was asked of this rank.
        together: the ranks; each of them must call this.

    Raises:
        ModelError: ranks load different models, or load them differently.
        BudgetError: the ranks of this host need more than it has.
        RankError: another rank has failed.
    """
    rank, beside = together.rank, find_neighbours(together).ranks
    said = {"asked": _digest(plan, targets, request), "once": _is_worth_reading_once(plan, targets, rank, beside)}
    answers = dict(zip(together.members, gather(together, said), strict=True))
    odd = [other for other, answer in answers.items() if answer["asked"] != said["asked"]]
    if odd:
        raise ModelError(
            f"{plan.checkpoint.source}: rank {rank} and rank {odd[0]} do not load the same: expected the same tensors, "
            "dtypes and options on each; give every rank the same model, checkpoint and options"
        )
    once = request.read == "once" or (request.read is None and all(answers[other]["once"] for other in beside))
    if once:
        plan = share_out(plan, targets, rank, beside)
    mapped = mapped_share(plan, targets, rank, beside)
    mine: dict[str, Any] = {
        "mapped": [mapped.numerator, mapped.denominator],
        "reads": plan.bytes_read,
        "peak": plan.host.peak,
        "available": plan.host.available,
    }
    facts = dict(zip(together.members, gather(together, mine), strict=True))
    here = [facts[other] for other in beside]
    share = RankShare(
        rank=rank,
        members=len(together.members),
        beside=beside,
        read="once" if once else "each",
        shared=sum(one.placement.nbytes for one in plan.shared),
        mapped=round(sum((Fraction(*fact["mapped"]) for fact in here), Fraction(0))),
        reads=sum(fact["reads"] for fact in here),
        peak=sum(fact["peak"] for fact in here),
    )
    available = min(fact["available"] for fact in here)
    if share.peak > available:
        raise BudgetError(
            f"the ranks of this host ({', '.join(map(str, beside))}) need {format_size(share.peak)} of host memory "
            f"together ({share.peak} bytes), and {plan.host.bound_by} allows {format_size(available)}. What helps: map "
            "instead of copying (residency='map', --residency map), fewer ranks on a host, or less staging",
            required=share.peak,
            limit=available,
        )
    return replace(plan, rank=share)


def _digest(plan: LoadPlan, targets: Mapping[str, Target], request: LoadRequest) -> str:
    """What must be the same on all ranks, in short."""
    rows = []
    for placement in sorted(plan.placements, key=lambda p: p.target):
        target = targets[placement.target]
        splits = None if target.sharding is None else repr((target.sharding.mesh.shape, target.sharding.splits))
        rows.append([placement.names, target.shape, placement.dtype, splits])
    text = json.dumps([rows, request.read, request.residency])
    return hashlib.sha256(text.encode()).hexdigest()


def _is_worth_reading_once(plan: LoadPlan, targets: Mapping[str, Target], rank: int, beside: tuple[int, ...]) -> bool:
    """Whether it is faster that one rank of this host reads what several hold, and gives it to the others.

    From the page cache each reads for itself as fast as memory is, which no message is. Past it a disk of this machine
    serves all from one cache too. So it is worth it where accelerators talk to each other, and where files come over a
    network and are not here yet.
    """
    saved = 0
    files: set[Path] = set()
    devices: set[str] = set()
    for placement in plan.placements:
        if placement.residency != "copy" or not placement.is_fed:
            continue
        target = targets[placement.target]
        if len(holders(target.sharding, target.shape, rank, beside)) > 1:
            saved += placement.source_bytes
            files.update(link.entry.file for link in placement.links)
            devices.add(placement.device)
    if saved < _WORTH_SHARING:
        return False
    if "cpu" not in devices:
        return "nccl" in str(torch.distributed.get_backend_config())
    return all(not is_on_local_disk(file) and cached_share(file) < 0.5 for file in files)


__all__ = ["Company", "agreed", "at_home", "is_divided", "known_members", "members_of", "rank_here", "ranks_of"]
