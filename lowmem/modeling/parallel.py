"""Models of transformers divided among ranks by their own plans: by processes that run, or on paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from .._records import computed_once
from ..errors import ModelError, OptionError
from .empty import real_tensors
from .failures import refusing
from .sharding import Mesh, Sharding, Split, sharding_of
from .targets import Target, read_targets, walk

# What people call the dimensions of a mesh, and what they are here.
_DIMENSIONS = {
    "dp": "fsdp",
    "fsdp": "fsdp",
    "dp_shard": "fsdp",
    "tp": "tp",
    "ep": "ep",
    "replicate": "replicate",
    "dp_replicate": "replicate",
    "ddp": "replicate",
}


def prepared(cls: Any, config: Any, distributed: Any) -> tuple[Any, Any]:
    """The processes and meshes that a `DistributedConfig` asks for: what transformers makes of it, and its meshes.

    Every rank must call this. The config of the model says it too, as after `from_pretrained`.

    Raises:
        ModelError: torch.distributed does not run, or not with so many ranks.
    """
    if distributed is None:
        return None, None
    with refusing("distributed_config: transformers does not take it here"), real_tensors():
        _check_names(distributed)
        settled, _, meshes = cls.prepare_distribute_model(distributed, device_map=None)
    config.distributed_config = settled
    return settled, meshes


def _check_names(distributed: Any) -> None:
    """Refuse what `DistributedConfig.from_dict` would drop.

    Raises:
        OptionError: a name that is none of its arguments.
    """
    if not isinstance(distributed, Mapping):
        return
    from transformers.distributed import DistributedConfig

    known = [field.name for field in fields(DistributedConfig)]
    for name in distributed:
        if name not in known:
            raise OptionError(
                f"distributed_config: {name!r} is no argument of transformers' DistributedConfig; expected some of "
                f"{', '.join(known)}"
            )


def distributed_model(model: Any, settled: Any, meshes: Any) -> nn.Module:
    """The model with its tensors divided, by transformers' own plans.

    Raises:
        ModelError: the model cannot be divided so.
    """
    if settled is None:
        return model  # type: ignore[no-any-return]
    with refusing(f"distributed_config: {type(model).__name__} cannot be divided so"):
        divided: nn.Module = type(model).maybe_distribute_model(model, settled, meshes)
    return divided


def parse_mesh(value: Any, what: str = "mesh") -> dict[str, int]:
    """Dimensions of a mesh, the outermost first: `{"fsdp": 2, "tp": 4}` for `"dp=2,tp=4"`.

    Raises:
        OptionError: something else, a dimension that is not known, or one that is there twice.
    """
    pairs: list[tuple[Any, Any]]
    if isinstance(value, str):
        pairs = [(name.strip(), count.strip()) for name, _, count in (p.partition("=") for p in value.split(","))]
    elif isinstance(value, Mapping):
        pairs = list(value.items())
    else:
        raise OptionError(f"{what}: expected dimensions such as 'dp=2,tp=4', found {value!r}")
    found: dict[str, int] = {}
    for name, count in pairs:
        known = _DIMENSIONS.get(name) if isinstance(name, str) else None
        number = int(count) if isinstance(count, str) and count.isdecimal() else count
        if known is None or known in found:
            how = "is not one" if known is None else "is there twice"
            raise OptionError(
                f"{what}: {name!r} {how}; expected each of dp (or fsdp), tp, ep and replicate once at most, with a "
                "number: 'dp=2,tp=4'"
            )
        if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= 1 << 20:
            raise OptionError(f"{what}: {name!r}: expected a number of ranks, found {count!r}")
        found[known] = number
    if found.get("ep", 1) > 1 and found.get("tp", 1) > 1:
        raise OptionError(f"{what}: tp and ep together are not planned without processes; give one of them")
    return found


class PaperMesh:
    """Ranks that are not there: how they would divide a model.

    Args:
        dimensions: of the mesh, the outermost first.
        device: type of their devices.
    """

    def __init__(self, dimensions: Mapping[str, int], device: str = "cpu") -> None:
        # What divides tensors by the model's own plan is the innermost, as torch wants it.
        order = sorted(dimensions, key=("replicate", "fsdp", "ep", "tp").index)
        shape = tuple(dimensions[name] for name in order)
        count = 1
        for n in shape:
            count *= n
        self.mesh = Mesh(shape, tuple(range(count)), tuple(order), device)

    @property
    def ranks(self) -> int:
        """How many."""
        return len(self.mesh.ranks)

    def divide(self, model: nn.Module, targets: Mapping[str, Target], borrowed: bool) -> dict[str, Target]:
        """The targets as these ranks would hold them; a model with a `tp` or `ep` plan is changed on the way.

        `tp` and `ep` are the model's own plans. `fsdp` divides the first dimension of every parameter of what these
        leave, as `fully_shard` does; ranks of `ep` divide what is no expert with those of `fsdp`.

        Args:
            model: on the meta device.
            targets: its tensors.
            borrowed: whether it is the caller's, and must stay as it is.

        Raises:
            OptionError: the model has no such plan, or is the caller's.
        """
        inner = next((name for name in ("tp", "ep") if name in self.mesh.names), None)
        by_plan = self._by_plan(model, inner, borrowed) if inner is not None else {}
        return {
            name: replace(
                target, sharding=self._sharding(target, by_plan.get(target.tie) or by_plan.get(name, ()), inner)
            )
            for name, target in targets.items()
        }

    def _sharding(self, target: Target, by_plan: tuple[Split | None, ...], inner: str | None) -> Sharding:
        planned = by_plan[0] if by_plan else None
        # Ranks that have other experts are ranks of the data too, among all of which the rest is divided at once.
        mesh = self._of_data if inner == "ep" and planned is None and "fsdp" in self.mesh.names else self.mesh
        splits: list[Split | None] = []
        for name, count in zip(mesh.names, mesh.shape, strict=True):
            if name == inner:
                splits.append(planned)
            elif name == "fsdp" and count > 1 and target.kind == "parameter" and target.shape:
                # Of what the inner dimension leaves, which torch says by a split in groups.
                inside = self.mesh.shape[self.mesh.names.index(inner)] if inner is not None else 1
                splits.append(Split(0, inside if planned is not None and planned.dim == 0 else 1))
            else:
                splits.append(None)
        sharding = Sharding(mesh, tuple(splits))
        _check_what_is_held(target, sharding)
        return sharding

    @computed_once
    def _of_data(self) -> Mesh:
        """The mesh with its ranks of experts among those of `fsdp`, which are beside them."""
        counts = dict(zip(self.mesh.names, self.mesh.shape, strict=True))
        counts["fsdp"] *= counts.pop("ep")
        return replace(self.mesh, shape=tuple(counts.values()), names=tuple(counts))

    def _by_plan(self, model: nn.Module, kind: str, borrowed: bool) -> dict[str, tuple[Split | None, ...]]:
        """How the model's own plan divides its tensors along one dimension of the mesh."""
        plan = _plan_of(model, kind)
        if borrowed:
            raise OptionError(
                f"mesh: {kind} divides a model by its own plan, which would change the model that was given; give what "
                "makes it, such as a callable"
            )
        from torch.distributed.device_mesh import DeviceMesh

        count = self.mesh.shape[self.mesh.names.index(kind)]
        with real_tensors():
            # No group of processes is behind it.
            mesh = DeviceMesh("cpu", torch.arange(count), mesh_dim_names=(kind,), _init_backend=False, _rank=0)
        with refusing(f"mesh: {type(model).__name__} cannot be divided by its {kind} plan"):
            _divide_parameters(model, mesh, plan)
        found = {}
        for name in read_targets(walk(model)):
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner) if owner else model
            tensor = module._parameters.get(leaf)
            sharding = sharding_of(tensor, name)
            if sharding is not None:
                found[name] = sharding.splits
        return found


def _check_what_is_held(target: Target, sharding: Sharding) -> None:
    """Refuse what `sharding_of` would: torch's placements say otherwise than `fully_shard` leaves on a rank.

    That divides what the inner dimension has left on each rank, and the placements have the inner one divide later.

    Raises:
        ModelError: on some rank they are of different sizes.
    """
    splits = [split for split in sharding.splits if split is not None and split.dim == 0]
    if len(splits) < 2:
        return
    outer, inner = (n for n, s in zip(sharding.mesh.shape, sharding.splits, strict=True) if s in splits and s)
    rows = target.shape[0]
    if rows % (outer * inner) == 0:
        return
    for rank in sharding.mesh.ranks:
        at = sharding.mesh.coordinate(rank)
        assert at is not None
        i, j = (index for index, split in zip(at, sharding.splits, strict=True) if split is not None and split.dim == 0)
        left = _chunk(rows, inner, j)
        said = sharding.part(target.shape, rank).shape[0]
        if said != (held := _chunk(left, outer, i)):
            raise ModelError(
                f"mesh: tensor {target.name!r} of {rows} rows: torch's placements say that rank {rank} holds {said} of "
                f"them, and fully_shard leaves it {held}; take sizes of the mesh that divide {rows}"
            )


def _chunk(length: int, count: int, index: int) -> int:
    """Elements of one of the chunks that `torch.chunk` makes."""
    each = -(-length // count)
    return max(0, min(length, (index + 1) * each) - index * each)


def _plan_of(model: Any, kind: str) -> dict[str, str]:
    plan = getattr(model, f"{kind}_plan", None)
    if not plan:
        raise OptionError(
            f"mesh: {kind}: {type(model).__name__} has no {kind} plan of its own (a transformers model has one by its "
            f"config's base_model_{kind}_plan); leave {kind} out, or divide the model yourself and give it as model="
        )
    return dict(plan)


def _divide_parameters(model: Any, mesh: Any, plan: dict[str, str]) -> None:
    """What `maybe_distribute_model` does to parameters, without the hooks that would talk to other ranks."""
    import transformers

    # Where it is found in every version that is allowed.
    from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

    if not hasattr(model, "_expand_parallel_plan"):
        raise OptionError(
            "mesh: the plans of transformers' models need transformers 5.23 or newer, found "
            f"{transformers.__version__}; update it, or divide the model yourself and give it as model="
        )
    parameters = dict(model.named_parameters())
    for name, style in model._expand_parallel_plan(plan).items():
        if name in parameters:
            owner, _, leaf = name.rpartition(".")
            ALL_PARALLEL_STYLES[style].shard_param(model.get_submodule(owner), leaf, mesh)


__all__ = ["PaperMesh", "distributed_model", "parse_mesh", "prepared"]
