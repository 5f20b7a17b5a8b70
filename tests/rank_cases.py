"""The cases of tests/test_ranks.py: each is a function that every rank calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard

import lowmem
from tests.rank_models import (
    META,
    Ranks,
    RefusedError,
    Replicate,
    Shard,
    check_load,
    check_numbers,
    check_parts,
    check_whole,
    empty_model,
    fsdp,
    fully_shard,
    look,
    share_of,
    spread,
    whole_model,
)

MIB = 1 << 20
Case = Callable[[Ranks], None]
CASES: dict[str, Case] = {}
# By how many processes they are for.
OF_TWO: list[str] = []
OF_FOUR: list[str] = []


def case(
    name: str, *args: Any, two: bool = False, four: bool = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a case of a function, with these arguments, for two processes or four."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        assert name not in CASES
        CASES[name] = lambda ranks: function(ranks, *args)
        if two:
            OF_TWO.append(name)
        if four:
            OF_FOUR.append(name)
        return function

    return add


def columns_first(parameter: torch.Tensor) -> Any:
    """Along the second dimension, where there is one."""
    return Shard(1) if parameter.dim() > 1 else Shard(0)


def divided(ranks: Ranks, how: str, folder: str, dtype: str = "float32") -> Any:
    """A model of transformers, divided by FSDP2."""
    model = empty_model(ranks.folders[folder], dtype)
    if how == "fsdp":
        return fsdp(model, ranks.mesh(ranks.count))
    if how == "columns":
        return fsdp(model, ranks.mesh(ranks.count), columns_first)
    assert how == "hsdp"
    return fsdp(model, ranks.mesh(2, ranks.count // 2, names=("replicate", "shard")))


def ids() -> torch.Tensor:
    return torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(5))


def check_forward(ranks: Ranks, model: Any, folder: str, dtype: str | None = None) -> None:
    """Equal outputs, and not by chance."""
    with torch.no_grad():
        theirs = whole_model(ranks.folders[folder], dtype)(ids()).logits
        ours = model(ids()).logits
    ours = ours.full_tensor() if isinstance(ours, DTensor) else ours
    off = (ours - theirs).abs().max().item()
    ranks.expect(off < (1e-4 if theirs.dtype == torch.float32 else 0.1), f"the forward is off by {off}")
    ranks.expect(theirs.std() > 0.01, "the forward says nothing")


def check_training(ranks: Ranks, model: Any, folder: str) -> None:
    """A step of FSDP2 on the loaded model: the gradients are those of one process with the same batch."""
    whole = whole_model(ranks.folders[folder])
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    for name, parameter in whole.named_parameters():
        parameter.requires_grad_(flags[name])
    for each in (whole, model):
        each.train()
        for module in each.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        each(ids(), labels=ids()).loss.backward()
    wanted = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        ranks.expect((parameter.grad is None) == (wanted[name].grad is None), f"{name}: gradient {parameter.grad}")
        if parameter.requires_grad:
            full, theirs = parameter.grad.full_tensor(), wanted[name].grad
            ranks.expect(
                torch.allclose(full, theirs, atol=1e-4), f"{name}: gradient off by {(full - theirs).abs().max()}"
            )
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()
    model.zero_grad()


@case("llama-fsdp", "fsdp", "llama", two=True)
@case("llama-fsdp-columns", "columns", "llama")
@case("llama-hsdp", "hsdp", "llama")
@case("llama-tied-fsdp", "fsdp", "llama-tied", two=True)
@case("llama-tied-hsdp", "hsdp", "llama-tied")
@case("moe-fsdp", "fsdp", "moe", two=True)
@case("moe-fsdp-columns", "columns", "moe")
@case("moe-hsdp", "hsdp", "moe")
@case("gpt2-fsdp", "fsdp", "gpt2")
def _divided_by_fsdp(ranks: Ranks, how: str, folder: str) -> None:
    model = divided(ranks, how, folder)
    whole = ranks.whole(folder)
    result = check_load(ranks, model, whole, ranks.folders[folder], residency="copy")
    share = share_of(model)
    ranks.expect(sum(result.report.read.values()) <= 1.02 * share, f"read {result.report.read} for {share}")
    ranks.expect(result.plan.host.resident <= 1.02 * share, f"resident {result.plan.host.resident} for {share}")
    check_forward(ranks, model, folder)
    check_training(ranks, model, folder)


@case("llama-mapped", "llama")
@case("moe-mapped", "moe")
def _mapped_parts(ranks: Ranks, folder: str) -> None:
    model = divided(ranks, "fsdp", folder)
    result = check_load(ranks, model, ranks.whole(folder), ranks.folders[folder], residency="map")
    share = share_of(model)
    if folder == "llama":
        ranks.expect(result.plan.host.mapped == share, f"{result.plan.host.mapped} mapped of {share}")
        ranks.expect(not sum(result.report.read.values()), f"read {result.report.read}")
        assert result.plan.rank is not None
        total = sum(t.nbytes for t in ranks.whole(folder).values())
        ranks.expect(result.plan.rank.mapped == total, f"{result.plan.rank.mapped} mapped on the host of {total}")
    check_forward(ranks, model, folder)
    check_training(ranks, model, folder)


def like_theirs(ranks: Ranks, folder: str, config: dict[str, int]) -> Any:
    """The model that transformers loads and divides."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    return AutoModelForCausalLM.from_pretrained(
        ranks.folders[folder], dtype=torch.float32, distributed_config=DistributedConfig(**config)
    )


@case("llama-tp", "llama", {"tp_size": 2}, "dict", two=True, four=False)
@case("llama-tied-tp", "llama-tied", {"tp_size": 2}, "object", two=True, four=False)
@case("moe-tp", "moe", {"tp_size": 2}, "object", two=True, four=False)
@case("moe-ep", "moe", {"tp_size": 2, "ep_size": 2}, "object", two=True, four=False)
@case("llama-config-fsdp", "llama", {"fsdp_size": 2}, "dict", two=True, four=False)
@case("llama-fsdp-tp", "llama", {"tp_size": 2, "fsdp_size": 2}, "dict")
@case("llama-fsdp-tp-object", "llama", {"tp_size": 2, "fsdp_size": 2}, "object")
@case("llama-fsdp-tp-drop-in", "llama", {"tp_size": 2, "fsdp_size": 2}, "drop-in")
@case("llama-tied-fsdp-tp", "llama-tied", {"tp_size": 2, "fsdp_size": 2}, "dict")
@case("llama-tied-config-fsdp", "llama-tied", {"fsdp_size": 4}, "drop-in")
@case("llama-config-hsdp", "llama", {"dp_replicate_size": 2, "fsdp_size": 2}, "dict")
@case("moe-fsdp-tp", "moe", {"tp_size": 2, "fsdp_size": 2}, "object")
@case("moe-fsdp-ep-tp", "moe", {"tp_size": 2, "fsdp_size": 2, "ep_size": 2}, "object")
@case("moe-ep-drop-in", "moe", {"fsdp_size": 4, "ep_size": 4}, "drop-in")
@case("moe-fsdp-ep", "moe", {"fsdp_size": 4, "ep_size": 2}, "dict")
def _by_the_plans_of_transformers(ranks: Ranks, folder: str, config: dict[str, int], way: str) -> None:
    from transformers.distributed import DistributedConfig

    asked: Any = config if way == "dict" else DistributedConfig(**config)
    source = ranks.folders[folder]
    theirs = like_theirs(ranks, folder, config)
    if way == "drop-in":
        model = lowmem.from_pretrained(type(theirs), source, dtype=torch.float32, distributed_config=asked)
    else:
        result = ranks.load(source, distributed_config=asked, residency="copy")
        model = result.model
        check_numbers(ranks, result, None)
        share = share_of(model)
        ranks.expect(sum(result.report.read.values()) <= 1.02 * share, f"read {result.report.read} for {share}")
    whole = ranks.whole(folder)
    check_parts(ranks, model, {n: t for n, t in whole.items() if n in theirs.state_dict()}, look(theirs))
    check_whole(ranks, model, whole)
    ranks.expect(type(model) is type(theirs), f"{type(model)} instead of {type(theirs)}")
    with torch.no_grad():
        ours, wanted = model(ids()).logits, theirs(ids()).logits
    ranks.expect((ours - wanted).abs().max() < 1e-5, f"the forward is off by {(ours - wanted).abs().max()}")
    check_forward(ranks, model, folder)


class Odd(nn.Module):
    """Of sizes that no number of ranks divides, and dtypes of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(7, 5)
        self.down = nn.Linear(5, 1)
        self.conv = nn.Conv1d(2, 3, 5)
        self.one = nn.Parameter(torch.zeros(1))
        self.none = nn.Parameter(torch.zeros(0, 3))
        self.cube = nn.Parameter(torch.zeros(6, 5, 3), requires_grad=False)
        self.wave = nn.Parameter(torch.zeros(6, 3, dtype=torch.complex64))
        self.counts = nn.Parameter(torch.zeros(9, dtype=torch.int32), requires_grad=False)
        self.register_buffer("mask", torch.zeros(7, 2, dtype=torch.bool))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("table", torch.zeros(5, 7, dtype=torch.float64))


def odd() -> Odd:
    with META:
        return Odd()


def even_dimension(ranks: Ranks) -> Callable[[torch.Tensor], Any]:
    """The last dimension that ranks divide evenly, which FSDP wants of all but the first."""

    def place(parameter: torch.Tensor) -> Any:
        return Shard(max([d for d, n in enumerate(parameter.shape) if n % ranks.count == 0], default=0))

    return place


@case("odd-fsdp", None, two=True)
@case("odd-fsdp-columns", even_dimension, two=True)
def _odd_sizes(ranks: Ranks, place: Any) -> None:
    model = odd()
    fully_shard(model, mesh=ranks.mesh(ranks.count), **({} if place is None else {"shard_placement_fn": place(ranks)}))
    for residency in ("copy", "map"):
        result = check_load(ranks, model, load_file(ranks.folders["odd"]), ranks.folders["odd"], residency=residency)
        share = share_of(model)
        if residency == "copy" and place is None:
            ranks.expect(sum(result.report.read.values()) <= 1.02 * share, f"read {result.report.read} for {share}")


PAIRS: dict[str, tuple[Any, Any]] = {
    "rows-columns": (Shard(0), Shard(1)),
    "columns-columns": (Shard(1), Shard(1)),
    "rows-rows": (Shard(0), Shard(0)),
    "last-rows": (Shard(-1), Shard(0)),
    "whole-columns": (Replicate(), Shard(1)),
    "rows-whole": (Shard(0), Replicate()),
    "whole-whole": (Replicate(), Replicate()),
    "strided-rows": (_StridedShard(0, split_factor=2), Shard(0)),
    "strided-columns": (_StridedShard(1, split_factor=3), Shard(0)),
    "strided-strided": (_StridedShard(0, split_factor=2), _StridedShard(1, split_factor=2)),
}


def chosen(pair: tuple[Any, Any], name: str, tensor: torch.Tensor) -> Any:
    """The placements that a tensor of so many dimensions can have; a part of the buffers stays whole."""
    if not tensor.dim() or name == "mask":
        return None
    return [Replicate() if getattr(p, "dim", 0) >= tensor.dim() else p for p in pair]


def _by_hand(ranks: Ranks, pair: str) -> None:
    model = odd()
    spread(model, ranks.mesh(2, ranks.count // 2), partial(chosen, PAIRS[pair]))
    # A few bytes between two columns are read along; large tensors are another case.
    check_load(ranks, model, load_file(ranks.folders["odd"]), ranks.folders["odd"], residency="copy")


for _name in PAIRS:
    case(f"hand-{_name}", _name, two=_name.startswith("strided"))(_by_hand)


class Block(nn.Module):
    """What torch's own styles divide."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(self.norm(self.embed(tokens)))))


@case("torch-tp", two=True)
def _by_the_styles_of_torch(ranks: Ranks) -> None:
    with META:
        model = Block()
    plan = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=False),
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, ranks.mesh(ranks.count), plan)
    source = ranks.folders["block"]
    check_load(ranks, model, load_file(source), source, residency="copy")
    tokens = torch.arange(8).view(1, 8)
    whole = lowmem.load(source, model=Block).model(tokens)
    ranks.expect(torch.allclose(model(tokens), whole, atol=1e-5), "the forward is another")


@case("torch-fsdp-tp")
def _by_fsdp_over_the_styles_of_torch(ranks: Ranks) -> None:
    with META:
        model = Block()
    mesh = ranks.mesh(2, 2, names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    source = ranks.folders["block"]
    check_load(ranks, model, load_file(source), source, residency="copy")
    tokens = torch.arange(8).view(1, 8)
    whole = lowmem.load(source, model=Block).model(tokens)
    ranks.expect(torch.allclose(model(tokens), whole, atol=1e-5), "the forward is another")


@case("several-meshes")
def _several_meshes(ranks: Ranks) -> None:
    rows, left, right = ranks.mesh(4), ranks.mesh_of(0, 1), ranks.mesh_of(2, 3)
    model = odd()
    spread(model.up, rows, lambda name, tensor: [Shard(0)])
    spread(model.down, left, lambda name, tensor: [Shard(tensor.dim() - 1)])
    spread(model.conv, right, lambda name, tensor: [Shard(0)])
    check_load(ranks, model, load_file(ranks.folders["odd"]), ranks.folders["odd"], residency="copy")


@case("some-of-the-ranks")
def _some_of_the_ranks(ranks: Ranks) -> None:
    """Others do something else meanwhile."""
    mesh = ranks.mesh_of(0, 2)
    source = ranks.folders["odd"]
    if mesh.get_coordinate() is not None:
        model = odd()
        spread(model, mesh, lambda name, tensor: [Shard(0)] if tensor.dim() else None)
        before = look(model)
        result = lowmem.load(source, model=model, residency="copy")
        check_parts(ranks, model, load_file(source), before)
        ranks.expect(result.plan.rank is not None and result.plan.rank.beside == (0, 2), f"{result.plan.rank}")


@case("odd-one-out")
def _a_rank_that_is_in_no_mesh(ranks: Ranks) -> None:
    """It is told so, and the others load."""
    mesh = ranks.mesh_of(0, 2)
    model = odd()
    spread(model.up, mesh, lambda name, tensor: [Shard(0)])
    before = look(model)
    try:
        ranks.load(ranks.folders["odd"], model=model, residency="copy")
    except RefusedError as refused:
        told = [error is not None and "not among those that are to load together" in error for error in refused.errors]
        ranks.expect(told == [False, True, False, True], str(refused))
    else:
        ranks.expect(False, "a rank loaded that is in no mesh")
    if mesh.get_coordinate() is not None:
        check_parts(ranks, model, load_file(ranks.folders["odd"]), before)


@case("to-float32", "llama-bf16", "float32")
@case("to-bfloat16", "llama", "bfloat16")
def _cast(ranks: Ranks, folder: str, dtype: str) -> None:
    model = divided(ranks, "fsdp", folder, dtype)
    options = {"dtype": dtype, "residency": "copy"}
    result = check_load(ranks, model, ranks.whole(folder, dtype), ranks.folders[folder], **options)
    share = share_of(model, lambda name, tensor: 2 if folder == "llama-bf16" else 4)
    ranks.expect(sum(result.report.read.values()) <= 1.02 * share, f"read {result.report.read} for {share}")
    check_forward(ranks, model, folder, dtype)


@case("io-buffered", "llama", {"io": "buffered"})
@case("io-mmap", "llama", {"io": "mmap"})
@case("io-direct", "llama", {"io": "direct"})
@case("pickled", "llama-bin", {})
@case("staged", "llama", {"staging": "1MiB", "prefetch": True})
def _options(ranks: Ranks, folder: str, options: dict[str, Any]) -> None:
    model = divided(ranks, "fsdp", folder)
    result = check_load(ranks, model, ranks.whole("llama"), ranks.folders[folder], residency="copy", **options)
    share = share_of(model)
    ranks.expect(sum(result.report.read.values()) <= 1.02 * share, f"read {result.report.read} for {share}")


@case("each-hsdp", "hsdp", "each")
@case("once-hsdp", "hsdp", "once", two=True)
@case("once-moe", "moe", "once")
@case("once-whole", "plain", "once", two=True)
@case("each-whole", "plain", "each")
def _read(ranks: Ranks, how: str, read: str) -> None:
    folder = "moe" if how == "moe" else "llama"
    whole = ranks.whole(folder)
    source = ranks.folders[folder]
    model = empty_model(source) if how == "plain" else divided(ranks, "hsdp", folder)
    result = check_load(ranks, model, whole, source, residency="copy", read=read)
    total, share = sum(t.nbytes for t in whole.values()), share_of(model)
    reads = ranks.gather(sum(result.report.read.values()))
    if how == "plain" and read == "each":
        ranks.expect(reads == [total] * ranks.count, f"read {reads}")
    elif read == "each":
        ranks.expect(sum(reads) <= 2.04 * total, f"read {reads} of {total}")
    else:
        ranks.expect(total <= sum(reads) <= 1.02 * total, f"read {reads} of {total}")
        ranks.expect(max(reads) <= 1.5 * total / ranks.count, f"read {reads}: one does most of it")
        rank = result.plan.rank
        ranks.expect(rank is not None and rank.read == "once" and rank.shared == share, f"{rank}, holds {share}")
    check_forward(ranks, model, folder)


@case("several-sources")
def _several_sources(ranks: Ranks) -> None:
    model = nn.ModuleDict({"a": odd(), "b": odd()})
    fully_shard(model["a"], mesh=ranks.mesh(ranks.count))
    spread(model["b"], ranks.mesh(2, 2), partial(chosen, PAIRS["rows-columns"]))
    source = {"a": ranks.folders["odd"], "b": lowmem.Source(ranks.folders["odd-2"], prefix="inner")}
    whole = {f"a.{name}": tensor for name, tensor in load_file(ranks.folders["odd"]).items()}
    whole |= {name.replace("inner", "b", 1): tensor for name, tensor in load_file(ranks.folders["odd-2"]).items()}
    check_load(ranks, model, whole, source, residency="copy")


@case("renamed")
def _renamed(ranks: Ranks) -> None:
    model = odd()
    fully_shard(model, mesh=ranks.mesh(ranks.count))
    whole = {name.removeprefix("inner."): tensor for name, tensor in load_file(ranks.folders["odd-2"]).items()}
    source = ranks.folders["odd-2"]
    check_load(ranks, model, whole, source, residency="copy", prefix="inner")
    check_load(ranks, model, whole, source, residency="copy", rename={r"^inner\.": ""})


@case("computed", two=True)
def _computed(ranks: Ranks) -> None:
    def changed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        up = state["up.weight"]
        mean = up - up.mean(0, keepdim=True)
        return {**state, "up.weight": mean, "table": state["table"].flip(0), "conv.weight": state["conv.weight"] * 2}

    source = ranks.folders["odd"]
    whole = changed(load_file(source))
    for pair in ("rows-columns", "strided-rows", "whole-whole"):
        model = odd()
        spread(model, ranks.mesh(2, ranks.count // 2), partial(chosen, PAIRS[pair]))
        check_load(ranks, model, whole, source, residency="copy", filter_fn=changed)


@case("moved")
def _moved(ranks: Ranks) -> None:
    """What a function moves about is read in parts."""

    def changed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        up = torch.cat([state["up.weight"][3:], state["up.weight"][:3]])
        table = torch.cat([state["table"][:, 4:], state["table"][:, :4]], 1)
        return {**state, "up.weight": up, "table": table, "cube": state["cube"].flip([0])}

    source = ranks.folders["odd"]
    for pair in ("rows-columns", "strided-columns", "columns-columns"):
        model = odd()
        spread(model, ranks.mesh(2, ranks.count // 2), partial(chosen, PAIRS[pair]))
        check_load(ranks, model, changed(load_file(source)), source, residency="copy", filter_fn=changed)


@case("moved-across")
def _moved_across(ranks: Ranks) -> None:
    """Rows that end elsewhere in the checkpoint: right, or refused with what helps."""

    def changed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**state, "table": state["table"].T.reshape(5, 7)}

    source = ranks.folders["odd"]
    model = odd()
    spread(model, ranks.mesh(2, 2), partial(chosen, PAIRS["columns-columns"]))
    before = look(model)
    try:
        check_load(ranks, model, changed(load_file(source)), source, residency="copy", filter_fn=changed)
    except (RefusedError, lowmem.UnsupportedError) as refused:
        ranks.expect("load the model whole and save it" in str(refused), str(refused))
        ranks.expect(look(model).placements == before.placements, "the model is changed")


def check_agreement(ranks: Ranks, model: nn.Module, names: list[str], one_seed: bool) -> None:
    """What was initialised is one tensor: ranks that hold the same have the same values, and others have others.

    These last only where ranks have seeds of their own: torch makes the same values in each part otherwise.
    """
    for name in names:
        tensor = dict(model.named_parameters())[name]
        assert isinstance(tensor, DTensor)
        full = tensor.full_tensor()
        fulls = ranks.gather(full)
        ranks.expect(all(torch.equal(fulls[0], other) for other in fulls), f"{name}: ranks have different tensors")
        ranks.expect(full.isfinite().all(), f"{name}: not finite")
        if not one_seed and full.numel() > 1 and full.std() > 0:
            values = full.flatten().unique().numel()
            ranks.expect(values > 0.9 * full.numel(), f"{name}: only {values} values of {full.numel()} differ")


@case("missing-fsdp", "fsdp", True)
@case("missing-fsdp-other-seeds", "fsdp", False)
@case("missing-hsdp", "hsdp", True)
@case("missing-hsdp-other-seeds", "hsdp", False)
def _missing(ranks: Ranks, how: str, one_seed: bool) -> None:
    model = divided(ranks, how, "llama")
    lost = ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"]
    before = look(model)
    torch.manual_seed(3 if one_seed else 3 + ranks.rank)
    result = ranks.load(ranks.folders["llama"], model=model, residency="copy", strict=False, skip=lost)
    whole = {name: tensor for name, tensor in ranks.whole("llama").items() if name not in lost}
    check_parts(ranks, model, whole, before)
    check_whole(ranks, model, whole)
    ranks.expect(sorted(result.report.initialised) == sorted(lost), f"initialised {result.report.initialised}")
    check_agreement(ranks, model, lost, one_seed)


@case("mismatched")
def _mismatched(ranks: Ranks) -> None:
    model = odd()
    with META:
        model.down = nn.Linear(5, 6)
    fully_shard(model, mesh=ranks.mesh(ranks.count))
    source = ranks.folders["odd"]
    try:
        ranks.load(source, model=model)
    except RefusedError as refused:
        ranks.expect(all("down.weight" in str(error) for error in refused.errors), str(refused))
    else:
        ranks.expect(False, "a mismatch was not refused")
    before = look(model)
    torch.manual_seed(3 + ranks.rank)
    ranks.load(source, model=model, residency="copy", ignore_mismatched_sizes=True)
    whole = {name: tensor for name, tensor in load_file(source).items() if not name.startswith("down")}
    check_parts(ranks, model, whole, before)
    check_agreement(ranks, model, ["down.weight", "down.bias"], one_seed=False)


@case("int8-to-floats", two=True)
def _int8_to_floats(ranks: Ranks) -> None:
    source = ranks.folders["llama-int8"]
    whole = lowmem.load(source, dequantize=True, dtype="float32", residency="copy").model.state_dict()
    model = divided(ranks, "fsdp", "llama")
    check_load(ranks, model, whole, source, dequantize=True, dtype="float32", residency="copy")


@case("int8-to-floats-columns")
def _int8_to_floats_across(ranks: Ranks) -> None:
    model = divided(ranks, "columns", "llama")
    before = look(model)
    try:
        ranks.load(ranks.folders["llama-int8"], model=model, dequantize=True, dtype="float32", residency="copy")
    except RefusedError as refused:
        ranks.expect(all("is divided across its rows" in str(error) for error in refused.errors), str(refused))
    else:
        ranks.expect(False, "int8 was made floats across rows")
    ranks.expect(all(t.is_meta for t in model.parameters()) and look(model) == before, "the model is changed")


@case("quantized")
def _quantized(ranks: Ranks) -> None:
    """A refusal that says why; or int8 that is that of one process."""
    model = divided(ranks, "fsdp", "llama")
    try:
        ranks.load(ranks.folders["llama"], model=model, quantize="int8", residency="copy")
    except RefusedError as refused:
        ranks.expect(all(error and "int8" in error for error in refused.errors), str(refused))
        ranks.expect(all("LowmemError" not in str(e) and "Error: " in str(e) for e in refused.errors), str(refused))
        return
    whole = lowmem.load(ranks.folders["llama"], quantize="int8", residency="copy").model.state_dict()
    check_whole(ranks, model, whole)


@case("refused-alike", two=True)
def _all_are_refused(ranks: Ranks) -> None:
    """One rank gives another option; each says who."""
    model = divided(ranks, "fsdp", "llama")
    options = {"residency": "copy" if ranks.rank else "map"}
    try:
        ranks.load(ranks.folders["llama"], model=model, **options)
    except RefusedError as refused:
        ranks.expect(all(refused.errors), str(refused))
        ranks.expect(all("the same" in str(error) for error in refused.errors), str(refused))
    else:
        ranks.expect(False, "different options were not refused")
    ranks.expect(all(t.is_meta for t in model.parameters()), "the model is changed")
    check_load(ranks, model, ranks.whole("llama"), ranks.folders["llama"], residency="copy")


@case("large-fsdp", "fsdp", {})
@case("large-fsdp-cast", "fsdp", {"dtype": "bfloat16"})
@case("large-tp", "tp", {})
@case("large-strided", "strided", {})
@case("large-once", "once", {"read": "once"})
def _large(ranks: Ranks, how: str, options: dict[str, Any]) -> None:
    """200 MB: bytes and memory are those of the share."""
    with META:
        model = nn.Sequential(*[nn.Linear(2048, 2048) for _ in range(12)])
    if how == "fsdp":
        fully_shard(model, mesh=ranks.mesh(4))
    else:
        pairs = {"tp": (Shard(0), Shard(1)), "strided": (_StridedShard(0, split_factor=2), Shard(0))}
        pair = pairs.get(how, (Replicate(), Shard(1)))
        spread(model, ranks.mesh(2, 2), partial(chosen, pair))
    source = ranks.folders["large"]
    result = ranks.load(source, model=model, residency="copy", **options)
    check_numbers(ranks, result, None)
    share, read = share_of(model, lambda name, tensor: 4), sum(result.report.read.values())
    reads = ranks.gather(read)
    if how == "once":
        ranks.expect(sum(reads) <= 1.02 * source.stat().st_size, f"read {reads}")
        ranks.expect(read <= 0.6 * share, f"read {reads} for {share}")
    else:
        ranks.expect(share <= read <= 1.02 * share, f"read {read} for {share}")
    resident, peak = result.plan.host.resident, result.report.peak
    ranks.expect(resident <= 1.02 * share_of(model) + MIB, f"resident {resident} for {share_of(model)}")
    ranks.expect(peak <= resident + 80 * MIB, f"peak {peak / MIB:.1f} MiB for {resident / MIB:.1f} MiB")
    ranks.expect(peak <= result.report.predicted_peak, f"peak {peak}, predicted {result.report.predicted_peak}")
    whole = load_file(source)
    dtype = getattr(torch, options.get("dtype", "float32"))
    for name, tensor in model.state_dict().items():
        full = tensor.full_tensor()
        ranks.expect(torch.equal(full, whole[name].to(dtype)), f"{name}: other values")


__all__ = ["CASES", "OF_FOUR", "OF_TWO", "Block", "Odd"]
