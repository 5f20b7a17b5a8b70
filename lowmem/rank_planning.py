"""A load by several ranks, planned where none of them is."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from fractions import Fraction
from typing import Any

from ._collector import paused_collector
from .checkpoint import make_wish
from .errors import OptionError, UnsupportedError
from .fitting import Fit, Phases, fit
from .limits import HostMemory
from .mapping import refuse
from .modeling.parallel import PaperMesh, parse_mesh
from .modeling.request import ModelSource, make_model_request
from .modeling.skeleton import find_origin
from .planner import LoadPlan, LoadRequest, make_plan
from .planner.devices import STRATEGIES
from .planner.final_dtypes import nbytes_of
from .planner.rank_records import RankPlan, RanksPlan
from .planner.ranks import host_shares, mapped_share, rank_plan, share_out
from .planner.request import checks_names, flag, make_request
from .sizes import shown
from .sources import Sources, look_at

# The memory of machines that are not this one; `ram` bounds it where the user says so.
_ELSEWHERE = HostMemory(sys.maxsize, "nothing that is known here", {})


@checks_names
def plan_ranks(
    source: Sources,
    *,
    mesh: str | Mapping[str, int],
    ranks: int | None = None,
    ranks_per_host: int | None = None,
    model: ModelSource = None,
    auto_class: Any = None,
    config: Any = None,
    attn_implementation: str | Mapping[str, str] | None = None,
    experts_implementation: str | Mapping[str, str] | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    weights: str | None = None,
    ema: bool | None = None,
    variant: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    download: bool = False,
    trust_remote_code: bool = False,
    **options: Any,
) -> RanksPlan:
    """What each of several ranks would read and hold: without a GPU, without processes, and without reading a tensor.

    Args:
        source: as in `load`.
        mesh: the ranks along each dimension, such as `"dp=2,tp=4"` or `{"dp": 2, "tp": 4}`: `dp` divides every
            parameter as `fully_shard` does, `tp` and `ep` by the model's own plans of tensor and expert parallelism,
            `replicate` not at all.
        ranks: how many there are, if that is to be checked against the mesh.
        ranks_per_host: ranks that share one host, which are neighbours. Default: all.
        model: a callable that makes the model, or a module, which `tp` and `ep` do not take. Default: the transformers
            model that `config.json` describes.
        auto_class: as in `load`.
        config: as in `load`.
        attn_implementation: as in `load`.
        experts_implementation: as in `load`.
        num_classes: as in `load`.
        in_chans: as in `load`.
        model_kwargs: as in `load`.
        weights: as in `load`.
        ema: as in `load`.
        variant: as in `load`.
        subfolder: as in `load`.
        revision: as in `load`.
        download: as in `load`.
        trust_remote_code: as in `load`.
        options: the other options of `load`, for each rank: `ram`, `dtype`, `residency`, `device_map` (one device), …

    Raises:
        OptionError: a mesh that means nothing, or that the model has no plan for.
        LowmemError: whatever `load` would refuse on one of the ranks.
    """
    asked = make_model_request(
        model,
        auto_class=auto_class,
        config=config,
        attn_implementation=attn_implementation,
        experts_implementation=experts_implementation,
        num_classes=num_classes,
        in_chans=in_chans,
        model_kwargs=model_kwargs,
        trust_remote_code=flag(trust_remote_code, "trust_remote_code"),
    )
    request = make_request(**options)
    paper = PaperMesh(parse_mesh(mesh))
    beside = _ranks_per_host(paper.ranks, ranks, ranks_per_host)
    if isinstance(request.device_map, str) or len(set((request.device_map or {}).values())) > 1:
        raise OptionError(
            f"device_map: expected one device for all ranks, found {shown(options.get('device_map'))}: the mesh says "
            f"who holds what, so that none of {', '.join(STRATEGIES)} applies"
        )
    if isinstance(request.device_map, Mapping) and "disk" in request.device_map.values():
        raise OptionError("device_map: expected a device with memory, found 'disk': divided models are not put on disk")
    if request.int8.quantize:
        raise UnsupportedError(
            "quantize: layers do not become int8 once they are divided: expected a model of lowmem.Int8Linear and a "
            "checkpoint that is int8 (lowmem convert --quantize int8 writes one); leave it out"
        )
    wish = make_wish(weights, ema)
    files: dict[str, Any] = {"variant": variant, "subfolder": subfolder, "revision": revision, "download": download}
    with paused_collector(), ExitStack() as undo:
        found = look_at(source, rules=request.keys, wish=wish, **files)
        origin = find_origin(found.glance(), asked)
        found.find_origins()
        made = fit(found, origin, request, undo, Phases())
        skeleton = made.skeleton
        refuse(made.mapping, made.checkpoint.source, request.strict, request.keys)
        targets = paper.divide(skeleton.model, skeleton.targets, skeleton.borrowed)
        return _planned(replace(made, skeleton=replace(skeleton, targets=targets)), request, paper, beside)


def _ranks_per_host(count: int, ranks: int | None, beside: int | None) -> int:
    for name, value in (("ranks", ranks), ("ranks_per_host", beside)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise OptionError(f"{name}: expected a number of ranks, found {shown(value)}")
    if ranks is not None and ranks != count:
        raise OptionError(f"ranks: expected as many as the mesh has, {count}, found {ranks}")
    return count if beside is None else beside


def _planned(made: Fit, request: LoadRequest, paper: PaperMesh, beside: int) -> RanksPlan:
    rows: list[RankPlan] = []
    mapped: dict[int, Fraction] = {}
    warnings: dict[str, None] = dict.fromkeys(made.skeleton.warnings)
    targets, weights = made.skeleton.targets, 0
    for rank in paper.mesh.ranks:
        host = rank // beside
        here = range(host * beside, min((host + 1) * beside, paper.ranks))
        plan = plan_of(made, request, rank)
        if request.read == "once":
            plan = share_out(plan, targets, rank, here)
        coordinate = paper.mesh.coordinate(rank)
        assert coordinate is not None
        rows.append(rank_plan(plan, rank, dict(zip(paper.mesh.names, coordinate, strict=True)), host))
        mapped[rank] = mapped_share(plan, targets, rank, here)
        warnings.update(dict.fromkeys(plan.warnings))
        # Every rank has a place for every tensor, if only for nothing of it. Tied ones that are divided differently
        # have one each.
        whole = {targets[p.target].tie: nbytes_of(targets[p.target].shape, p.dtype) for p in plan.placements}
        weights = sum(whole.values())
    return RanksPlan(
        made.checkpoint.source,
        dict(zip(paper.mesh.names, paper.mesh.shape, strict=True)),
        weights,
        tuple(rows),
        host_shares(rows, mapped),
        tuple(warnings),
    )


def plan_of(made: Fit, request: LoadRequest, rank: int) -> LoadPlan:
    """The plan of one rank that is on another machine."""
    local = made.on_rank(rank)
    return make_plan(local.checkpoint, local.skeleton, local.mapping, request, _ELSEWHERE)
