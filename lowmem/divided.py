"""What a load by several ranks needs beside that of one process: who loads together, and what their plans come to."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ._mounts import is_on_local_disk
from ._page_cache import CachedPages, cached_share, give_back, look
from .engine.sharing import share
from .errors import BudgetError, ModelError, OptionError
from .limits import host_memory
from .modeling.request import ModelRequest
from .modeling.sharding import is_running, is_sharded, root_of
from .modeling.skeleton import Skeleton
from .modeling.targets import Target, tensor_of, walk
from .planner import LoadPlan, LoadRequest, Placement
from .planner.rank_records import RankShare
from .planner.ranks import SHARED_AHEAD, held_alike, holders, mapped_share, share_out, shared_digests
from .planner.records import Shared
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
        # Which pages of files were in the page cache before, where this rank sees to what all of its host have read.
        self._before: dict[Path, CachedPages] = {}
        self._alike: tuple[Shared, ...] = ()

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
            self._carrier = Carrier(self.together, SHARED_AHEAD)
            self._stack.callback(self._carrier.close)
            # Before anything else talks by torch's store, which serves one caller of a process at a time: a link that
            # waits there for its other end would keep this rank from making a mesh for which that one waits.
            gather(self.together, None, "the beginning")

    @property
    def watch(self) -> Callable[[], None] | None:
        """Raises when another rank has failed; None where there is none."""
        return None if self.together is None else self.together.check

    @property
    def carrier(self) -> Carrier | None:
        """Brings tensors from rank to rank; None where there is none."""
        return self._carrier

    def meet(self) -> None:
        """Wait for all ranks, before something that nothing could end when one of them does not come.

        Raises:
            RankError: another rank has failed, or is gone.
        """
        if self.together is not None:
            gather(self.together, None, "the meshes")

    def initialised(self, plan: LoadPlan, targets: Mapping[str, Target]) -> None:
        """Note what the model's own rule will initialise, and who holds the same of it."""
        if self.together is not None:
            fresh = [p for p in plan.placements if p.residency == "init" and p.nbytes]
            self._alike = tuple(held_alike(fresh, targets, self.together.rank, self.together.members))

    def make_alike(self, plan: LoadPlan, model: nn.Module) -> None:
        """Give what the model's own rule has initialised, by chance on each rank, to all that hold the same of it.

        Raises:
            RankError: another rank has failed, or is gone.
        """
        if self._alike and self.together is not None and self._carrier is not None:
            there = {one.placement: _local_of(model, one.placement) for one in self._alike}
            share(self._alike, there, _keep, self._carrier)

    def asked_about_ties(self) -> tuple[int | None, Callable[[list[str]], list[list[str]]] | None]:
        """The rank whose parts of tied tensors are compared, and how the others learn of it; None for one process."""
        if self.together is None:
            return None, None
        return self.together.rank, functools.partial(gather, self.together, step="tied tensors")

    def settle(self) -> None:
        """Wait until all ranks have everything in its place, as long as this one can still take it back.

        From then on the load has succeeded for all of them, whatever becomes of one.

        Raises:
            RankError: another rank has failed, or is gone.
        """
        if self.together is not None:
            self.together.finish()
            for file, before in self._before.items():
                _drop_new(file, before)

    def keep_pages(self, plan: LoadPlan, beside: tuple[int, ...]) -> LoadPlan:
        """The plan, leaving in the page cache what ranks beside this one read too; all of it goes back when they are
        done, except what was there before.
        """
        if plan.reading.keep_cache or len(beside) < 2:
            return plan
        if plan.bytes_read and self.together is not None and self.together.rank == beside[0]:
            for shard in plan.checkpoint.shards:
                with suppress(OSError), shard.file.open("rb", buffering=0) as file:
                    self._before[shard.file] = look(file.fileno(), shard.size)
        return replace(plan, reading=replace(plan.reading, keep_cache=True))


def _local_of(model: nn.Module, placement: Placement) -> torch.Tensor:
    """What this rank holds of a tensor."""
    tensor: Any = tensor_of(model, placement.target)
    local: torch.Tensor = tensor._local_tensor if is_sharded(tensor) else tensor
    return local.detach()


def _keep(placement: Placement, tensor: torch.Tensor) -> None:
    """It is in its place already."""


def _drop_new(path: Path, before: CachedPages) -> None:
    with suppress(OSError), path.open("rb", buffering=0) as file:
        for begin, length in () if before.everything else before.absent(0, os.fstat(file.fileno()).st_size):
            give_back(file.fileno(), begin, length)


def is_divided(skeleton: Skeleton) -> bool:
    """Whether some of the model's tensors are DTensors, of which each rank holds a part."""
    return bool({target.sharding for target in skeleton.targets.values()} - {None})


def ranks_of(model: Any, distributed_config: Any, read: Any) -> tuple[int, ...]:
    """The ranks that load together, as far as that can be seen from what was given; none where it cannot."""
    if not is_running():
        return ()
    everybody = tuple(range(torch.distributed.get_world_size()))
    if isinstance(model, ModelRequest):
        model, distributed_config = model.model, model.distributed_config
    if distributed_config is not None:
        return everybody
    meshes: set[Any] = set()
    for _, module in walk(model) if isinstance(model, nn.Module) else ():
        tensors: tuple[Any, ...] = (*module._parameters.values(), *module._buffers.values())
        meshes.update(root_of(tensor.device_mesh) for tensor in tensors if is_sharded(tensor))
    found = tuple(sorted({rank for mesh in meshes for rank in mesh.mesh.flatten().tolist()}))
    return found or (everybody if read in ("each", "once") else ())


def check_ranks(asked: ModelRequest, request: LoadRequest) -> None:
    """Refuse what is said about several ranks to a single process.

    Raises:
        OptionError: `read` is about several ranks, and torch.distributed does not run.
    """
    if request.read is not None and not is_running() and asked.distributed_config is None:
        raise OptionError(
            f"read: expected several ranks for {request.read!r}, found no process group of torch.distributed; "
            "leave it out, or start the program by torchrun and call torch.distributed.init_process_group() before"
        )


def members_of(skeleton: Skeleton) -> tuple[int, ...]:
    """The ranks among which a model is divided."""
    meshes = {target.sharding.mesh for target in skeleton.targets.values() if target.sharding is not None}
    return tuple(sorted({rank for mesh in meshes for rank in mesh.ranks}))


def at_home(skeleton: Skeleton, request: LoadRequest) -> LoadRequest:
    """Where the parts of a divided model go, if that is not said: to this process's own device of its meshes' kind.

    Raises:
        OptionError: a device map that would be inferred, several devices, or the disk: the mesh says who holds what.
        ModelError: nothing says which rank this is.
    """
    if not is_running():
        raise ModelError(
            "the model has DTensors, and no process group of torch.distributed runs here; lowmem.plan_ranks plans a "
            "load by several ranks without them"
        )
    devices = set() if isinstance(request.device_map, str) else set((request.device_map or {}).values())
    if isinstance(request.device_map, str) or len(devices) > 1 or "disk" in devices:
        raise OptionError(
            f"device_map: expected one device with memory, found {shown(request.device_map)}: the model is divided "
            "among ranks by its DTensors, so that each process has one device; leave device_map out for the mesh's own"
        )
    kinds = {target.sharding.mesh.device for target in skeleton.targets.values() if target.sharding is not None}
    if request.device_map is not None or kinds == {"cpu"}:
        return request
    kind = min(kinds - {"cpu"})
    return replace(request, device_map={"": f"{kind}:{getattr(torch, kind).current_device()}"})


def agreed(plan: LoadPlan, targets: Mapping[str, Target], request: LoadRequest, company: Company) -> LoadPlan:
    """The plan of this rank beside those of the others: who reads what, and whether all of a host fit into it.

    Args:
        plan: of this rank alone.
        targets: of the whole model.
        request: what was asked of this rank.
        company: the ranks; each of them must call this.

    Raises:
        ModelError: ranks load different models, or load them differently.
        BudgetError: the ranks of this host need more than it has.
        RankError: another rank has failed.
    """
    together = company.together
    if together is None:
        return plan
    rank, beside = together.rank, find_neighbours(together).ranks
    said = {"asked": _digest(plan, targets, request), "once": _is_worth_reading_once(plan, targets, rank, beside)}
    answers = dict(zip(together.members, gather(together, said, "how to load"), strict=True))
    odd = [other for other, answer in answers.items() if answer["asked"] != said["asked"]]
    if odd:
        raise ModelError(
            f"{plan.checkpoint.source}: rank {rank} and rank {odd[0]} do not load the same: expected the same tensors, "
            "dtypes, files, read= and residency= on each; give every rank the same model, checkpoint and options"
        )
    once = request.read == "once" or (request.read is None and all(answers[other]["once"] for other in beside))
    if once:
        plan = share_out(plan, targets, rank, beside)
    _check_shared(plan, together)
    plan = company.keep_pages(plan, beside)
    company.initialised(plan, targets)
    mapped = mapped_share(plan, targets, rank, beside)
    mine: dict[str, Any] = {
        "mapped": [mapped.numerator, mapped.denominator],
        "reads": plan.bytes_read,
        "peak": plan.host.peak,
        "limits": _shared_limits(),
    }
    facts = dict(zip(together.members, gather(together, mine, "what it takes"), strict=True))
    here = {other: facts[other] for other in beside}
    _check_host(here)
    share = RankShare(
        rank=rank,
        members=len(together.members),
        beside=beside,
        read="once" if once else "each",
        shared=sum(one.placement.nbytes for one in plan.shared),
        mapped=round(sum((Fraction(*fact["mapped"]) for fact in here.values()), Fraction(0))),
        reads=sum(fact["reads"] for fact in here.values()),
        peak=sum(fact["peak"] for fact in here.values()),
    )
    return replace(plan, rank=share)


def _check_shared(plan: LoadPlan, together: Together) -> None:
    """Refuse ranks that would wait for each other: what one gives, all others must take.

    Raises:
        ModelError: ranks hold tensors alike, and not in the same places.
        BudgetError: what is given on takes more than this rank may use.
    """
    mine = shared_digests(plan.shared)
    for other, theirs in zip(together.members, gather(together, mine, "what is read once"), strict=True):
        odd = [ranks for ranks in mine.keys() & theirs.keys() if mine[ranks] != theirs[ranks]]
        odd += [r for r in mine.keys() ^ theirs.keys() if {other, together.rank} <= set(map(int, r.split(",")))]
        if odd:
            raise ModelError(
                f"{plan.checkpoint.source}: ranks {odd[0]} hold the same tensors, and some of them mapped, "
                "elsewhere, or of another dtype in the file: expected them alike, where one reads for all "
                "(read='once'); give every rank the same files and device_map, or read='each'"
            )
    if plan.host.peak > plan.host.limit:
        raise BudgetError(
            f"the load needs {format_size(plan.host.peak)} of host memory ({plan.host.peak} bytes) where ranks read "
            f"for each other, and may use {format_size(plan.host.limit)}. What helps: read='each', or raise ram",
            required=plan.host.peak,
            limit=plan.host.limit,
        )


def _shared_limits() -> dict[str, int]:
    """What this host leaves under each limit that other processes may be under too."""
    memory = host_memory()
    return {name: left for name, left in memory.limits.items() if name not in memory.rlimits}


def _check_host(facts: Mapping[int, Mapping[str, Any]]) -> None:
    """Refuse ranks that need more together than a limit leaves which they are all under: a cgroup, or the machine.

    Raises:
        BudgetError: they do.
    """
    for name in sorted({name for fact in facts.values() for name in fact["limits"]}):
        under = {rank: fact for rank, fact in facts.items() if name in fact["limits"]}
        need = sum(fact["peak"] for fact in under.values())
        left = min(fact["limits"][name] for fact in under.values())
        if need > left:
            raise BudgetError(
                f"the ranks of this host ({', '.join(map(str, under))}) need {format_size(need)} of host memory "
                f"together ({need} bytes), and {name} allows {format_size(left)}. What helps: map instead of copying "
                "(residency='map', --residency map), fewer ranks on a host, or less staging",
                required=need,
                limit=left,
            )


def _digest(plan: LoadPlan, targets: Mapping[str, Target], request: LoadRequest) -> str:
    """What must be the same on all ranks, in short."""
    rows = []
    for placement in sorted(plan.placements, key=lambda p: p.target):
        target = targets[placement.target]
        splits = None if target.sharding is None else repr((target.sharding.mesh.shape, target.sharding.splits))
        rows.append([placement.names, target.shape, placement.dtype, splits])
    files = sorted((shard.file.name, shard.size) for shard in plan.checkpoint.shards)
    text = json.dumps([rows, files, request.read, request.residency])
    return hashlib.sha256(text.encode()).hexdigest()


def _is_worth_reading_once(plan: LoadPlan, targets: Mapping[str, Target], rank: int, beside: tuple[int, ...]) -> bool:
    """Whether it is faster that one rank of this host reads what several hold, and gives it to the others.

    From the page cache each reads for itself as fast as memory is, which no message is. Past it a disk of this machine
    serves all from one cache too. So it is worth it where files come over a network and are not here yet.
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
    # Among accelerators nobody has measured it yet.
    return devices == {"cpu"} and all(not is_on_local_disk(file) and cached_share(file) < 0.5 for file in files)


__all__ = ["Company", "agreed", "at_home", "check_ranks", "is_divided", "members_of", "ranks_of"]
