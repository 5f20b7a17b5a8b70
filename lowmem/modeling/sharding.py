"""How tensors are divided among ranks: what a DTensor says of itself, as records, and which part each rank holds."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .._strides import Shape, row_major
from ..errors import ModelError

# Indices of one dimension, [begin, end) each, in the order in which a rank holds them.
Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Split:
    """How one dimension of a mesh divides a tensor.

    Attributes:
        dim: dimension of the tensor.
        groups: the dimension is first cut into so many, and each of them divided: 1 for torch's `Shard`, the
            `split_factor` of its `_StridedShard` (a later dimension of the mesh divides the same one, or several
            matrices lie in one).
    """

    dim: int
    groups: int = 1


@dataclass(frozen=True, slots=True)
class Mesh:
    """Ranks in rows and columns, as torch's `DeviceMesh` has them.

    Attributes:
        shape: ranks along each dimension.
        ranks: global ranks in row-major order.
        names: of the dimensions, empty where they have none.
        device: type of the devices, such as `"cuda"`.
    """

    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    names: tuple[str, ...] = ()
    device: str = "cpu"

    def coordinate(self, rank: int) -> tuple[int, ...] | None:
        """Where a rank is, an index for each dimension; None when it is not there."""
        return _coordinates(self).get(rank)


@functools.lru_cache(maxsize=64)
def _coordinates(mesh: Mesh) -> dict[int, tuple[int, ...]]:
    found = {}
    for i, rank in enumerate(mesh.ranks):
        at = []
        for n in reversed(mesh.shape):
            at.append(i % n)
            i //= n
        found[rank] = tuple(reversed(at))
    return found


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank holds of a tensor: the product of the runs of its dimensions.

    Attributes:
        shape: of the part.
        runs: of each dimension of the whole tensor.
        of: shape of the whole tensor.
    """

    shape: Shape
    runs: tuple[Runs, ...]
    of: Shape

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of a whole tensor; a view, where it lies in one piece of it."""
        for dim, (n, runs) in enumerate(zip(self.of, self.runs, strict=True)):
            if runs == ((0, n),):
                continue
            pieces = [tensor.narrow(dim, begin, end - begin) for begin, end in runs]
            tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces or [tensor.narrow(dim, 0, 0)], dim)
        return tensor


@dataclass(frozen=True, slots=True)
class Sharding:
    """How a tensor is divided.

    Attributes:
        mesh: among whom.
        splits: by each dimension of the mesh, from the first to the last; None for one along which ranks hold the
            same.
    """

    mesh: Mesh
    splits: tuple[Split | None, ...]

    def part(self, shape: Shape, rank: int) -> Part:
        """What `rank` holds of a tensor of `shape`; of a rank that is not in the mesh, nothing.

        Raises:
            ModelError: a dimension is divided that the tensor does not have.
        """
        at = self.mesh.coordinate(rank)
        if at is None:
            return Part((0,) * len(shape), tuple(() for _ in shape), shape)
        return _part(shape, self.mesh.shape, self.splits, at)


# The tensors of a model have few shapes.
@functools.lru_cache(maxsize=4096)
def _part(shape: Shape, mesh: Shape, splits: tuple[Split | None, ...], at: tuple[int, ...]) -> Part:
    runs: list[Runs] = [((0, n),) if n else () for n in shape]
    for split, ranks, index in zip(splits, mesh, at, strict=True):
        if split is None:
            continue
        if not 0 <= split.dim < len(shape):
            raise ModelError(
                f"a tensor of shape {shape} is divided along dimension {split.dim}, which it does not have; check the "
                "placements of the model"
            )
        runs[split.dim] = _divided(runs[split.dim], split.groups, ranks, index)
    return Part(tuple(sum(end - begin for begin, end in each) for each in runs), tuple(runs), shape)


def _divided(runs: Runs, groups: int, ranks: int, index: int) -> Runs:
    """The share of one of several ranks, as `torch.chunk` has it: all but the last ones are equal.

    Source: torch/distributed/tensor/placement_types.py, `Shard` and `_StridedShard`, `local_shard_size_and_offset`.
    """
    length = sum(end - begin for begin, end in runs)
    found: list[tuple[int, int]] = []
    width = -(-length // groups)
    for group in range(groups):
        first, last = min(group * width, length), min((group + 1) * width, length)
        each = -(-(last - first) // ranks)
        found += _between(runs, min(first + index * each, last), min(first + (index + 1) * each, last))
    return _joined(found)


def _between(runs: Runs, begin: int, end: int) -> list[tuple[int, int]]:
    """Those of the indices that are the `begin`th to the `end`th of all."""
    found, at = [], 0
    for first, last in runs:
        low, high = max(begin, at), min(end, at + last - first)
        if low < high:
            found.append((first + low - at, first + high - at))
        at += last - first
    return found


def _joined(runs: list[tuple[int, int]]) -> Runs:
    found: list[tuple[int, int]] = []
    for begin, end in runs:
        if found and found[-1][1] == begin:
            found[-1] = (found[-1][0], end)
        else:
            found.append((begin, end))
    return tuple(found)


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    # One that is there was imported.
    return module is not None and isinstance(tensor, module.DTensor)


def sharding_of(tensor: Any, name: str) -> Sharding | None:
    """How a tensor is divided; None for one that is no DTensor.

    Args:
        tensor: a parameter or buffer.
        name: of it, for messages.

    Raises:
        ModelError: a kind of placement that is not known here, or this rank does not hold the part that these say.
    """
    if not is_sharded(tensor):
        return None
    own, mesh = _mesh_of(tensor.device_mesh), _mesh_of(root_of(tensor.device_mesh))
    splits = tuple(_split_of(placement, tensor.dim(), name) for placement in tensor.placements)
    _check_order(own, splits, name)
    shape, held, at = tuple(tensor.shape), tuple(tensor._local_tensor.shape), tensor.device_mesh.get_coordinate()
    if at is not None and (said := _part(shape, own.shape, splits, tuple(at)).shape) != held:
        raise ModelError(
            f"tensor {name!r}: its placements {tensor.placements} say that this rank, at {tuple(at)} of the mesh, "
            f"holds {said} of {shape}, and it holds {held}; divide the model so that sizes are multiples of the mesh"
        )
    if mesh is own:
        return Sharding(own, splits)
    by_name = dict(zip(own.names, splits, strict=True))
    return Sharding(mesh, tuple(by_name.get(dimension) for dimension in mesh.names))


def root_of(mesh: Any) -> Any:
    """The mesh that a mesh is some dimensions of: along the others ranks hold the same. Itself, where it is none."""
    find = getattr(mesh, "_get_root_mesh", None)
    root = mesh if find is None else find()
    names, wider = mesh.mesh_dim_names or (), (root.mesh_dim_names or ()) if root is not None else ()
    # Dimensions in another order, or joined to one, are another mesh.
    return root if names and tuple(name for name in wider if name in names) == tuple(names) else mesh


def _check_order(mesh: Mesh, splits: tuple[Split | None, ...], name: str) -> None:
    """Refuse ranks that are not in ascending order along a dimension that divides.

    torch's collectives, by which `fully_shard` and `distribute_tensor` divide, go by the order of ranks, and its
    arithmetic of DTensors by the order in the mesh.

    Raises:
        ModelError: they are not.
    """
    odd = [i for i, split in enumerate(splits) if split is not None and not _ascends(mesh, i)]
    if odd:
        raise ModelError(
            f"tensor {name!r}: the ranks of its mesh, {mesh.ranks} in the shape {mesh.shape}, are not in ascending "
            f"order along dimension {odd[0]}, which divides it: torch's collectives would give other parts than its "
            "placements say; make the mesh of ascending ranks"
        )


@functools.lru_cache(maxsize=64)
def _ascends(mesh: Mesh, dimension: int) -> bool:
    table = torch.tensor(mesh.ranks, device="cpu").view(mesh.shape)
    return bool((table.diff(dim=dimension) > 0).all())


def is_running() -> bool:
    """Whether this process is a rank of torch.distributed."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank_here() -> int:
    """The global rank of this process; 0 where torch.distributed does not run."""
    return torch.distributed.get_rank() if is_running() else 0


# Each parameter asks, and a model has few meshes.
@functools.lru_cache(maxsize=8)
def _mesh_of(mesh: Any) -> Mesh:
    table = mesh.mesh
    names = tuple(mesh.mesh_dim_names or ())
    return Mesh(tuple(table.shape), tuple(table.flatten().tolist()), names, mesh.device_type)


def _split_of(placement: Any, dims: int, name: str) -> Split | None:
    if placement.is_replicate():
        return None
    dim = getattr(placement, "dim", None)
    kind = type(placement).__name__
    if dim is None or kind not in ("Shard", "_StridedShard"):
        raise ModelError(
            f"tensor {name!r}: its placement is {placement}; expected Shard or Replicate, which say where its values "
            "are: redistribute it before the load"
        )
    return Split(dim % dims, int(getattr(placement, "split_factor", 1)))


def wrapped(local: torch.Tensor, like: Any) -> Any:
    """A rank's part as a DTensor of the same mesh, placements and whole as `like`, wherever it lies."""
    made = type(like).from_local(
        local.to("meta"),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        # As it is now, whatever it was.
        stride=row_major(tuple(like.shape)),
    )
    # Given itself, torch would move it to the mesh's kind of device; where layers wait in host memory for their use
    # (FSDP's CPUOffloadPolicy), parameters are not there.
    return type(like)(local, made._spec, requires_grad=False)


def _outermost_of_fsdp(model: nn.Module) -> list[Any]:
    """Modules that `fully_shard` was applied to, without those inside of them."""
    module = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(module, "FSDPModule", None)
    # Nothing is divided without a process group, and most programs have none.
    if kind is None or not is_running():
        return []
    found: list[Any] = []
    seen: set[nn.Module] = set()
    waiting = [model]
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        if isinstance(one, kind):
            found.append(one)
        else:
            waiting += one.children()
    return found


def reshard(model: Any) -> None:
    """Let `fully_shard` take its parameters back to what each rank holds, where a forward has left them whole."""
    for outer in _outermost_of_fsdp(model) if isinstance(model, nn.Module) else ():
        for module in outer.modules():
            if hasattr(module, "reshard"):
                module.reshard()


def retake(model: nn.Module) -> None:
    """Let `fully_shard` take the parameters that are there now for its own, where a forward has made it keep others.

    As `FSDPModule._apply` does when a model is moved; what has not run yet looks by itself.
    """
    for outer in _outermost_of_fsdp(model):
        for module in outer.modules():
            state = module._get_fsdp_state() if hasattr(module, "_get_fsdp_state") else None
            if getattr(state, "_is_root", None) is None:
                continue
            # Newer torch has several.
            groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
            with torch.no_grad():
                for parameter in [p for group in groups if group is not None for p in group.fsdp_params]:
                    parameter.reset_sharded_param()
