"""Running from disk stays within its memory, and forwards leave nothing behind: measured in fresh processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh import JobError, server
from safetensors.torch import save_file
from test_engine import linux
from test_kernel_limits import KINDS
from tiny_models import least_ram, new_model
from torch import nn

import lowmem
from lowmem.errors import BudgetError
from lowmem.planner import budget
from lowmem.sizes import KIB, MIB

pytestmark = linux

# What a forward takes besides weights: activations, scratch of the products, objects, pages that the allocator keeps.
SLACK = 6 * MIB


def most(plan: dict[str, int], ram: int) -> int:
    """Anonymous bytes that a load and the forwards behind it may add; `plan` is `plan.host`."""
    return min(ram, plan["limit"]) + SLACK


def most_pages(ram: int, layer: int) -> int:
    """Bytes of mapped weights that may be resident where `ram` does not hold all of them."""
    return ram + layer


def counted_besides(source: Path) -> int:
    """What RLIMIT_DATA counts though it is no memory: private mappings of the files, and stacks of threads."""
    files = sum(file.stat().st_size for file in source.parent.glob("*.safetensors"))
    return files + budget.thread_stacks(budget.workers_here() + 2)


# -- no growth

_STEADY = """
import gc, os
import torch
import lowmem
from lowmem.memory import anonymous_memory
torch.set_num_threads(1)
model = lowmem.load(args["source"], **args["options"]).model
ids = torch.arange(1, 9)[None]
mask = torch.ones_like(ids)
result = {}
counts = []
def look():
    gc.collect()
    maps = open("/proc/self/maps").read().splitlines()
    return {
        "anonymous": anonymous_memory(),
        "handles": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "mappings": sum(args["below"] in line for line in maps),
        "tensors": sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects()),
    }
with torch.no_grad():
    for number in range(1, 201):
        last = model(ids[:, : 1 + number % 8], attention_mask=mask[:, : 1 + number % 8]).logits
        if number in (20, 110, 200):
            del last
            counts.append(look())
result = counts
"""
STEADY: dict[str, tuple[str, dict[str, Any]]] = {
    "mapped": ("llama", {}),
    "cast": ("llama", {"dtype": "bfloat16"}),
    "experts": ("qwen3-moe", {}),
    "experts, cast": ("qwen3-moe", {"dtype": "bfloat16"}),
}


@pytest.mark.parametrize("narrow", [False, True], ids=["much memory", "least memory"])
@pytest.mark.parametrize("case", STEADY)
def test_two_hundred_forwards_leave_what_twenty_left(case: str, narrow: bool, saved: Callable[..., Path]) -> None:
    """Memory, handles, threads, mappings and tensors."""
    kind, options = STEADY[case]
    source = saved(kind)
    options = {**options, "device_map": "disk"}
    if narrow:
        options["ram"] = least_ram(source, **options)
    first, *later = server().run(_STEADY, source=str(source), options=options, below=str(source))
    for found in later:
        assert found["anonymous"] <= first["anonymous"] + 512 * KIB, (first, found)
        for name in ("handles", "threads", "mappings", "tensors"):
            # What is ahead of the last layer is in buffers, or not yet.
            slack = 8 if name == "tensors" else 0
            assert found[name] <= first[name] + slack, (name, first, found)


# -- bounds

# Layers of 8 MiB in the file and 16 MiB as fp32.
SIDE, LAYERS = 2048, 24
LAYER = SIDE * SIDE * 4

_RUN = """
import hashlib
import torch
from torch import nn
import lowmem
torch.set_num_threads(1)
torch.set_grad_enabled(False)

class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2048, 2048, bias=False) for _ in range(24))
    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x

class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 4096)
        self.big = nn.Linear(4096, 4096)
        self.last = nn.Linear(4096, 64)
    def forward(self, x):
        return self.last(torch.tanh(self.big(torch.tanh(self.first(x[:, :64])))))

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(32768, 512)
        self.body = nn.Linear(512, 512)
    def forward(self, x):
        return self.body(self.words((x[:, :32].abs() * 9999).long() % 32768))

class TiedWords(Words):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(512, 32768, bias=False)
        self.head.weight = self.words.weight
    def forward(self, x):
        return self.head(super().forward(x)).amax(1)

def made():
    # What a constructor allocates for a moment is not what is measured here.
    with torch.device("meta"):
        return {"deep": Deep, "wide": Wide, "words": Words, "tied": TiedWords}[args["kind"]]()

x = torch.randn(4, 2048, generator=torch.Generator().manual_seed(3)).to(getattr(torch, args["options"]["dtype"]))
# What the first product of a process takes.
nn.Linear(256, 256, dtype=x.dtype)(x[:, :256])
"""
_BOUND = (
    _RUN
    + """
with lowmem.measure() as memory:
    loaded = lowmem.load(args["source"], model=made, device_map="disk", **args["options"])
    found = [loaded.model(x) for _ in range(3)]
result = {"peak": memory.peak, "host": loaded.plan.host.to_dict(), "same": all(torch.equal(found[0], y) for y in found)}
# The same with everything in memory.
lowmem.release(loaded.model)
whole = lowmem.load(args["source"], model=made, dtype=args["options"]["dtype"]).model(x)
result["equal"] = torch.equal(found[0], whole)
result["difference"] = float((found[0] - whole).abs().max() / whole.abs().max())
"""
)
# Under a limit there is no room for the whole model: a digest is compared instead.
_DIGEST = (
    _RUN
    + """
loaded = lowmem.load(args["source"], model=made, **args["options"])
digests = {hashlib.sha256(loaded.model(x).float().numpy().tobytes()).hexdigest() for _ in range(3)}
result = sorted(digests)
"""
)
_PAGES = (
    _RUN
    + """
loaded = lowmem.load(args["source"], model=made, device_map="disk", **args["options"])

def resident():
    total, ours = 0, False
    for line in open("/proc/self/smaps"):
        if "-" in line.split(" ", 1)[0]:
            ours = args["source"] in line
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total

seen = []
for layer in loaded.model.layers:
    layer.register_forward_hook(lambda *_: seen.append(resident()))
for _ in range(3):
    loaded.model(x)
result = seen
"""
)


def numbers(*shape: int) -> torch.Tensor:
    """A few random rows again and again, which is quicker than as many numbers; of a size that keeps outputs near 1."""
    rows = torch.randn(min(64, shape[0]), *shape[1:]) * shape[-1] ** -0.5
    return rows.repeat(-(-shape[0] // len(rows)), *[1] * (len(shape) - 1))[: shape[0]].clone()


SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "deep": {f"layers.{number}.weight": (SIDE, SIDE) for number in range(LAYERS)},
    "wide": {
        "first.weight": (4096, 64),
        "first.bias": (4096,),
        "big.weight": (4096, 4096),
        "big.bias": (4096,),
        "last.weight": (64, 4096),
        "last.bias": (64,),
    },
    "words": {"words.weight": (32768, 512), "body.weight": (512, 512), "body.bias": (512,)},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`sources("deep", "bfloat16")`: the file of such a model."""
    made: dict[tuple[str, str], Path] = {}

    def make(kind: str, dtype: str = "bfloat16") -> Path:
        kind = "words" if kind == "tied" else kind
        if (kind, dtype) not in made:
            torch.manual_seed(5)
            file = tmp_path_factory.mktemp(kind) / f"{kind}.safetensors"
            save_file({n: numbers(*shape).to(getattr(torch, dtype)) for n, shape in SHAPES[kind].items()}, file)
            made[kind, dtype] = file
        return made[kind, dtype]

    return make


class Deep(nn.Module):
    """For plans; what runs is in the jobs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS))


def run(job: str, source: Path, limit: tuple[str, int, int] | None = None, **args: Any) -> Any:
    return server().run(job, limit=limit, source=str(source), **args)


@pytest.mark.parametrize("more", [0, 2 * LAYER + 3 * MIB, 6 * LAYER])
def test_weights_that_are_cast_at_use_stay_within_ram(more: int, sources: Callable[..., Path]) -> None:
    """24 layers of 16 MiB as they are used: the least that the plan accepts, a little more, and room to read ahead."""
    source = sources("deep")
    least = least_ram(source, model=Deep, dtype="float32", device_map="disk")
    assert least < 5 * LAYER
    ram = least + more
    found = run(_BOUND, source, kind="deep", options={"dtype": "float32", "ram": ram})
    assert found["peak"] <= most(found["host"], ram), found
    assert found["same"]
    assert found["equal"]


@pytest.mark.parametrize("ram", [24 * MIB, 64 * MIB])
def test_mapped_weights_take_no_memory_of_ones_own(ram: int, sources: Callable[..., Path]) -> None:
    """Whatever `ram` allows, nothing is copied."""
    found = run(_BOUND, sources("deep"), kind="deep", options={"dtype": "bfloat16", "ram": ram})
    # A product of bf16 may turn its weight on the way.
    assert found["peak"] <= SLACK + LAYER, found
    assert found["equal"]


def test_pages_that_are_past_are_given_back_where_ram_does_not_hold_all(sources: Callable[..., Path]) -> None:
    """And those of a layer are there again for the next forward."""
    ram = 64 * MIB
    seen = run(_PAGES, sources("deep"), kind="deep", options={"dtype": "bfloat16", "ram": ram})
    assert len(seen) == 3 * LAYERS
    assert max(seen) <= most_pages(ram, LAYER // 2), max(seen)
    # Each layer was there while it was used.
    assert min(seen) > 0


def test_pages_stay_where_ram_holds_all(sources: Callable[..., Path]) -> None:
    seen = run(_PAGES, sources("deep"), kind="deep", options={"dtype": "bfloat16", "ram": 1024 * MIB})
    assert min(seen[LAYERS:]) >= 0.95 * LAYERS * LAYER // 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"], ids=["mapped", "cast"])
def test_the_kernel_confirms_the_bound(kind: str, dtype: str, sources: Callable[..., Path]) -> None:
    """192 MiB of weights, or 384 MiB as fp32, under a limit of much less."""
    source = sources("deep")
    options: dict[str, Any] = {"dtype": dtype, "device_map": "disk"}
    ram = least_ram(source, model=Deep, **options) + LAYER
    whole = run(_DIGEST, source, kind="deep", options={"dtype": dtype})
    limit = (kind, ram + SLACK + (LAYER if dtype == "bfloat16" else 0), counted_besides(source))
    assert limit[1] < 112 * MIB
    found = run(_DIGEST, source, limit=limit, kind="deep", options={**options, "ram": ram})
    assert found == whole
    assert len(found) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_limit_bites(kind: str, sources: Callable[..., Path]) -> None:
    """Or the test above would show nothing: the same model with everything in memory."""
    source = sources("deep")
    options = {"dtype": "float32", "device_map": "cpu", "ram": 1024 * MIB}
    with pytest.raises(JobError):
        run(_DIGEST, source, limit=(kind, 96 * MIB, counted_besides(source)), kind="deep", options=options)


# -- a weight that is larger than the budget


def test_a_linear_that_is_larger_than_ram_runs_in_blocks_of_rows(sources: Callable[..., Path]) -> None:
    """64 MiB as fp32 within 24 MiB. Products in blocks may add in another order: 1e-5 of the largest output."""
    ram = 24 * MIB
    found = run(_BOUND, sources("wide"), kind="wide", options={"dtype": "float32", "ram": ram})
    assert found["peak"] <= most(found["host"], ram), found
    assert found["difference"] <= 1e-5, found
    assert found["same"]


@pytest.mark.parametrize("kind", ["words", "tied"])
def test_an_embedding_that_is_larger_than_ram_brings_its_rows(kind: str, sources: Callable[..., Path]) -> None:
    """Tied to a head, that runs in blocks of rows."""
    ram = 24 * MIB
    found = run(_BOUND, sources(kind), kind=kind, options={"dtype": "float32", "ram": ram})
    # The outputs of the head are 16 MiB.
    assert found["peak"] <= most(found["host"], ram) + (16 * MIB if kind == "tied" else 0), found
    assert found["equal"] if kind == "words" else found["difference"] <= 1e-5, found


def test_as_stored_it_is_mapped_and_needs_no_blocks(sources: Callable[..., Path]) -> None:
    ram = 24 * MIB
    found = run(_BOUND, sources("wide", "float32"), kind="wide", options={"dtype": "float32", "ram": ram})
    assert found["peak"] <= most(found["host"], ram), found
    assert found["equal"]


class Product(nn.Module):
    """As a linear layer, but lowmem does not know it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4096, 4096))
        self.bias = nn.Parameter(torch.empty(4096))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias


class Unknown(nn.Module):
    """A large weight of a layer of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 4096)
        self.big = Product()
        self.last = nn.Linear(4096, 64)


def test_another_weight_that_is_larger_than_ram_is_refused_by_its_name(sources: Callable[..., Path]) -> None:
    """Before a byte is read; with as much as the refusal says it is accepted."""
    options: dict[str, Any] = {"model": Unknown, "dtype": "float32", "device_map": "disk"}
    for call in (lowmem.plan, lowmem.load):
        with pytest.raises(BudgetError, match=r"big\.weight") as caught:
            call(sources("wide"), ram=24 * MIB, **options)
        assert caught.value.limit == 24 * MIB
        assert caught.value.required >= 64 * MIB
    assert lowmem.plan(sources("wide"), ram=caught.value.required, **options).host.limit == caught.value.required


# -- experts

_EXPERTS = """
import torch
import lowmem
torch.set_num_threads(1)
torch.set_grad_enabled(False)
options = {"device_map": {"": "cpu", "model.layers.0.mlp.experts": "disk"}, "dtype": "float32", "ram": 512 * 2**20}
loaded = lowmem.load(args["source"], experts_implementation=args["experts"], **options)
token = torch.tensor([[5]])
torch.nn.Linear(256, 256)(torch.ones(1, 256))
with lowmem.measure() as memory:
    found = loaded.model(token).logits
whole = lowmem.load(args["source"], experts_implementation=args["experts"], dtype="float32").model(token).logits
result = [memory.peak, torch.equal(found, whole)]
"""


@pytest.mark.parametrize("layout", ["separate", "fused"])
@pytest.mark.parametrize("experts", ["eager", "batched_mm"])
def test_of_experts_only_those_that_are_hit_are_brought(experts: str, layout: str, tmp_path: Path) -> None:
    """Two of sixteen: 6 MiB each as fp32, of 96 MiB."""
    transformers = pytest.importorskip("transformers")
    config = new_model("qwen3-moe").config
    for name, value in {
        "num_hidden_layers": 1,
        "hidden_size": 512,
        "moe_intermediate_size": 1024,
        "num_experts": 16,
    }.items():
        setattr(config, name, value)
    model = transformers.Qwen3MoeForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path, save_original_format=layout == "separate")
    del model
    peak, equal = server().run(_EXPERTS, source=str(tmp_path), experts=experts)
    assert equal
    assert peak < 48 * MIB
