"""What torch and transformers themselves give each rank of a mesh, by groups of processes that are only fakes.

A program: `python torch_ranks.py '[["path/to/folder", {"fsdp": 2, "tp": 2}], ...]'`. Each rank is a process of its own,
because torch keeps what it learned of a mesh, with the rank that learned it.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.fsdp
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.distributed import DistributedConfig
from transformers.distributed.utils import TransformersDeviceMesh
from transformers.initialization import no_tie_weights

import lowmem


def settled(mesh: dict[str, int]) -> Any:
    """The mesh in transformers' words, where `fsdp` counts the ranks that have the same experts and those that have
    others.
    """
    fsdp, tp, ep, replicas = mesh.get("fsdp"), mesh.get("tp", 1), mesh.get("ep", 1), mesh.get("replicate", 1)
    if ep == 1:
        return DistributedConfig(fsdp_size=fsdp or 1, tp_size=tp, dp_replicate_size=replicas)
    if fsdp is None:
        # Nothing but the experts is divided. A plan of tensor parallelism without rules is refused, so all rules are
        # there, and divide nothing.
        rules = [
            *(f"model.{name}" for name in transformers.Qwen3MoeConfig.base_model_tp_plan),
            "model.embed_tokens",
            "lm_head",
        ]
        nothing = dict.fromkeys(rules, "replicated_with_grad_allreduce")
        return DistributedConfig(tp_size=ep, ep_size=ep, tp_plan=nothing, dp_replicate_size=replicas)
    return DistributedConfig(fsdp_size=fsdp * ep, ep_size=ep, dp_replicate_size=replicas)


def divided(folder: str, asked: Any) -> nn.Module:
    """The model on the meta device, divided by transformers for this rank."""
    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, config.architectures[0])
    # As `from_pretrained` does: ties come behind the weights.
    with torch.device("meta"), no_tie_weights():
        model = cls(config)
    outer, names = (1, asked.dp_replicate_size), ("pp", "dp_replicate")
    dense = init_device_mesh("cpu", (*outer, asked.fsdp_size, asked.tp_size), mesh_dim_names=(*names, "fsdp", "tp"))
    experts = init_device_mesh("cpu", (*outer, asked.efsdp_size, asked.ep_size), mesh_dim_names=(*names, "efsdp", "ep"))
    found: nn.Module = cls.maybe_distribute_model(model, asked, TransformersDeviceMesh(dense, experts))
    found.tie_weights()  # type: ignore[operator]
    return found


def of_rank(folder: str, mesh: dict[str, int], rank: int) -> dict[str, Any]:
    """Parameters as torch holds them, and what `lowmem.plan` says of the same on this rank."""
    dist.init_process_group("fake", rank=rank, world_size=math.prod(mesh.values()), store=FakeStore())
    asked = settled(mesh)
    held = {}
    for name, parameter in divided(folder, asked).named_parameters():
        local = getattr(parameter, "_local_tensor", parameter)
        held[name] = {"shape": list(local.shape), "nbytes": local.nbytes}
    plan = lowmem.plan(Path(folder), distributed_config=settled(mesh))
    devices = plan.devices.values()
    return {
        "held": held,
        "weights": sum(device.weights for device in devices),
        "mapped": plan.host.mapped,
        "resident": sum(device.resident for device in devices),
        "reads": plan.bytes_read,
        "staging": plan.staging.total,
        "peak": plan.host.peak,
    }


def main(cases: list[tuple[str, dict[str, int]]]) -> list[list[dict[str, Any]]]:
    """For each model and mesh, what each rank has."""
    for folder in sorted({folder for folder, _ in cases}):
        # Imports the model's module, which else each of the processes would.
        lowmem.plan(Path(folder))
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        asked = [[(folder, mesh, rank) for rank in range(math.prod(mesh.values()))] for folder, mesh in cases]
        found = iter(pool.starmap(of_rank, [one for case in asked for one in case], chunksize=1))
        return [[next(found) for _ in case] for case in asked]


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK="0", CUDA_VISIBLE_DEVICES="")
    print(json.dumps(main(json.loads(sys.argv[1]))))
