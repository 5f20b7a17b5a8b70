"""The kernel confirms the plan: loads live under a limit that it enforces."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import pytest
from cold_files import warm
from fresh import INT8_IMPORTS, JobError, big_checkpoint, server
from test_budget import CAST, COPY, PREDICTED, TO_DISK, with_folder

import lowmem
from bench.kernel_limits import cgroup_kind
from lowmem.planner import budget
from lowmem.sizes import MIB

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux's limits")
KIND = cgroup_kind()
needs_cgroup = pytest.mark.skipif(KIND is None, reason="this process may make no memory cgroup")
KINDS = [
    pytest.param(KIND, marks=[pytest.mark.cgroup, needs_cgroup], id="cgroup"),
    pytest.param("RLIMIT_DATA", id="RLIMIT_DATA"),
]

_LOAD = """
import lowmem
loaded = lowmem.load(args["source"], **args["options"])
result = [loaded.plan.host.peak, loaded.report.peak]
"""
# The bits of the logits, and tokens: a forward of one length, and those of a generation.
_GENERATE = """
import hashlib
import lowmem, torch
loaded = lowmem.load(args["source"], **args["options"])
ids = torch.arange(1, 9)[None]
with torch.no_grad():
    logits = loaded.model(ids).logits.float()
    tokens = loaded.model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
devices = {p.device for p in loaded.plan.placements if p.dtype == "int8"}
digest = hashlib.sha256(logits.numpy().tobytes()).hexdigest()
result = [sorted(devices), bool(logits.isfinite().all()), digest, tokens.tolist()]
"""
_ALLOCATE = """
import torch
result = torch.ones(args["size"], dtype=torch.uint8).numel()
"""
_WHOLE = """
from pathlib import Path
from safetensors.torch import load_file
state = {}
for file in sorted(Path(args["source"]).glob("*.safetensors")):
    state.update({k: v.float() for k, v in load_file(file).items()})
result = len(state)
"""
_HOST = """
import lowmem.memory
memory = lowmem.memory.host_memory()
result = [memory.available, memory.bound_by, dict(memory.limits)]
"""
_REFUSED = """
import lowmem
try:
    lowmem.load(args["source"], **args["options"])
except lowmem.BudgetError as error:
    result = [str(error), error.required, error.limit]
"""


def counted(plan: lowmem.LoadPlan) -> int:
    """What RLIMIT_DATA counts besides: mapped files, and stacks of threads and their helpers."""
    files = budget.mapped_files(plan.placements, plan.checkpoint, plan.offload, plan.running.dispatch)
    return files + budget.thread_stacks(budget.workers_here())


def cached_checkpoint() -> Path:
    """What is not cached has more readers where no rlimit is, as in this process, and no more where one is."""
    folder = big_checkpoint()
    for shard in folder.glob("*.safetensors"):
        warm(shard)
    return folder


def groups() -> set[str]:
    roots = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))
    found = {p for root in roots if root.is_dir() for p in root.glob("lowmem-*")}
    # Those of processes that live are of tests that run beside these.
    return {str(p) for p in found if not Path("/proc", p.name.rpartition("-")[2]).exists()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", PREDICTED)
def test_a_load_lives_within_its_prediction(kind: str, case: str, tmp_path: Path) -> None:
    source = str(cached_checkpoint())
    options = with_folder(PREDICTED[case], tmp_path)
    plan = lowmem.plan(source, **options)
    before = groups()
    predicted, _ = server().run(
        _LOAD, limit=(kind, int(plan.host.peak * 1.05), counted(plan)), source=source, options=options
    )
    assert predicted <= plan.host.peak
    assert groups() <= before


# What is int8 is 126 MiB, and 16 MiB in each of eight layers.
INT8: dict[str, dict[str, Any]] = {
    "disk": {"quantize": "int8", "device_map": TO_DISK, "offload_folder": "OFF"},
    "auto": {"quantize": "int8", "device_map": "auto", "max_memory": {"cpu": "110MiB"}, "offload_folder": "OFF"},
}
# One weight as a forward computes with it, in fp32 and again as the product wants it, and the stack of a thread.
_FORWARD = 48 * MIB


@functools.cache
def generated() -> Any:
    """What the model computes with all of it in memory, and no limit."""
    source, options = str(cached_checkpoint()), {"quantize": "int8"}
    return server(*INT8_IMPORTS).run(_GENERATE, source=source, options=options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", INT8)
def test_int8_is_loaded_and_computed_with_within_its_prediction(kind: str, case: str, tmp_path: Path) -> None:
    source = str(cached_checkpoint())
    options = with_folder(INT8[case], tmp_path)
    plan = lowmem.plan(source, **options)
    places = {p.device for p in plan.placements if p.dtype == "int8"}
    assert places == ({"disk"} if case == "disk" else {"cpu", "disk"})
    # Accelerate maps the whole file around each weight on disk that is no int8.
    opened = max(shard.size for shard in plan.checkpoint.shards)
    limit = (kind, int(plan.host.peak * 1.05) + _FORWARD, counted(plan) + opened)
    found = server(*INT8_IMPORTS).run(_GENERATE, limit=limit, source=source, options=options)
    where, finite, *results = generated()
    assert (where, finite) == (["cpu"], True)
    assert found == [sorted(places), True, *results]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("job", [_ALLOCATE, _WHOLE], ids=["allocate", "load whole"])
def test_the_limit_bites(kind: str, job: str) -> None:
    """Or the test above would show nothing."""
    plan = lowmem.plan(cached_checkpoint(), device_map="disk", dtype="float32", offload_folder="/nowhere")
    source, before = str(cached_checkpoint()), groups()
    # The last of these is more than the interpreter itself, which a cgroup's limit allows on top.
    size = plan.host.peak * 2 + (64 + 320) * MIB
    with pytest.raises(JobError):
        server().run(job, limit=(kind, int(plan.host.peak * 1.05), 0), source=source, size=size)
    assert groups() <= before


@pytest.mark.cgroup
@needs_cgroup
def test_host_memory_reports_the_cgroup_around_it() -> None:
    available, bound_by, limits = server().run(_HOST, limit=(KIND, 64 * MIB, 0))
    assert bound_by.startswith("cgroup /")
    assert "lowmem-" in bound_by
    assert available == min(limits.values())
    assert available < 1024 * MIB


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [CAST, COPY, {}], ids=["cast", "copied", "mapped"])
def test_a_load_that_would_not_fit_is_refused_and_not_killed(kind: str, options: dict[str, Any]) -> None:
    if kind != "RLIMIT_DATA" and not options:
        pytest.skip("a cgroup lets go of mapped pages")
    source = str(cached_checkpoint())
    # A cgroup starts empty, so the room that it gets for the interpreter must not be enough for the load.
    size = 16 * MIB if kind == "RLIMIT_DATA" else -192 * MIB
    text, required, limit = server().run(
        _REFUSED, limit=(kind, size, 0), source=source, options={**options, "ram": "64GiB"}
    )
    assert ("RLIMIT_DATA allows" if kind == "RLIMIT_DATA" else "lowmem-") in text
    assert required > limit
