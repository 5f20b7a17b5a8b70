"""The largest models on 64 ranks and more, from headers alone: each rank's bytes are what the shapes say."""

from __future__ import annotations

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("torch.distributed.tensor")

import lowmem
from bench.large import deepseek_v3, llama_405b
from bench.planning import SHARD, OfRank, plans_of_ranks
from lowmem.dtypes import itemsize
from lowmem.fitting import Phases
from lowmem.planner.ranks import share_out
from lowmem.synthetic import Recipe, write_headers

PACKAGE = str(Path(lowmem.__file__).parent)
# What the plans of tensor parallelism say of each kind of weight, by the end of its name: the dimension that is
# divided. Nothing of the rest: norms, and in the expert model the attention and the router.
LLAMA_TP = {
    **dict.fromkeys(("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), 0),
    **dict.fromkeys(("o_proj", "down_proj"), 1),
}
DEEPSEEK_TP = {**dict.fromkeys(("embed_tokens", "lm_head", "gate_proj", "up_proj"), 0), "down_proj": 1}
CORRECTION = "e_score_correction_bias"


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Path]:
    """The folder of a recipe, written once."""
    made: dict[tuple[str, int], Path] = {}

    def write(recipe: Recipe) -> Path:
        key = recipe.name, len(recipe.tensors)
        if key not in made:
            made[key] = write_headers(recipe, tmp_path_factory.mktemp(recipe.name), max_shard_size=SHARD)
        return made[key]

    return write


def share(length: int, ranks: int, index: int) -> int:
    """How many of so many rows torch.chunk gives to one of the ranks: all but the last ones have as many."""
    each = -(-length // ranks)
    return min(length, (index + 1) * each) - min(length, index * each)


def mesh_of(text: str) -> dict[str, int]:
    return {name: int(count) for name, count in (part.split("=") for part in text.split(","))}


def ranks_of(mesh: Mapping[str, int]) -> Iterator[dict[str, int]]:
    for rank in range(math.prod(mesh.values())):
        at = {}
        for name in reversed(mesh):
            rank, at[name] = divmod(rank, mesh[name])
        yield at


def kinds_of(recipe: Recipe) -> Counter[tuple[str, tuple[int, ...], int]]:
    """How many tensors of the model are alike: kind, shape, and how many experts are fused in one, 0 for no experts."""
    experts: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
    found: Counter[tuple[str, tuple[int, ...], int]] = Counter()
    for key, shape in recipe.tensors:
        kind = key.split(".")[-1 if key.endswith(CORRECTION) else -2]
        layer, _, expert = key.partition(".experts.")
        if expert:
            experts[layer, kind, shape] += 1
        else:
            found[kind, shape, 0] += 1
    for (_, kind, shape), count in experts.items():
        found[kind, shape, count] += 1
    return found


def held(recipe: Recipe, mesh: Mapping[str, int], at: Mapping[str, int], kinds: Mapping[Any, int]) -> int:
    """Bytes of a rank, by hand."""
    dp, tp, ep = (mesh.get(name, 1) for name in ("dp", "tp", "ep"))
    d, t, e = (at.get(name, 0) for name in ("dp", "tp", "ep"))
    plan = LLAMA_TP if recipe.name == "llama-405b" else DEEPSEEK_TP
    total = 0
    for (kind, shape, experts), alike in kinds.items():
        if kind == CORRECTION:
            total += alike * 4 * shape[0]
            continue
        sizes = list(shape)
        across = plan.get(kind)
        if tp > 1 and across is not None:
            sizes[across] = share(sizes[across], tp, t)
        if experts:
            # Fused before they are divided: the experts of a layer are the rows.
            sizes = [share(share(experts, ep, e), dp, d), *sizes]
        else:
            sizes[0] = share(sizes[0], dp, d)
            if "dp" in mesh:
                # Ranks that have other experts have other data too.
                sizes[0] = share(sizes[0], ep, e)
        total += alike * 2 * math.prod(sizes)
    return total


def copies_of(recipe: Recipe, mesh: Mapping[str, int], key: str) -> int:
    """How many ranks hold an element, by hand."""
    if key.endswith(CORRECTION):
        return math.prod(mesh.values())
    if "ep" in mesh and "dp" not in mesh:
        return 1 if ".experts." in key else mesh["ep"]
    plan = LLAMA_TP if recipe.name == "llama-405b" else DEEPSEEK_TP
    return 1 if key.split(".")[-2] in plan else mesh.get("tp", 1)


WHOLE = [
    (llama_405b, "dp=8,tp=8"),
    (llama_405b, "dp=64"),
    (deepseek_v3, "dp=8,tp=8"),
    (deepseek_v3, "dp=8,ep=8"),
    (deepseek_v3, "dp=64"),
]
# 12 and 48 divide few of the sizes: the last ranks have less, or nothing.
REDUCED = [
    (lambda: llama_405b(layers=2), "dp=12,tp=8"),
    (lambda: llama_405b(layers=2), "dp=48"),
    (lambda: deepseek_v3(layers=5, experts=64), "dp=12,tp=8"),
    (lambda: deepseek_v3(layers=5, experts=64), "dp=8,ep=8"),
    (lambda: deepseek_v3(layers=5, experts=64), "ep=16"),
    (lambda: deepseek_v3(layers=5, experts=64), "dp=48"),
]


@pytest.mark.parametrize(("make", "mesh"), [*WHOLE, *REDUCED])
def test_each_rank_has_what_the_shapes_say(
    make: Callable[[], Recipe], mesh: str, headers: Callable[[Recipe], Path]
) -> None:
    recipe, sizes = make(), mesh_of(mesh)
    plan = lowmem.plan_ranks(headers(recipe), mesh=mesh, ranks_per_host=8)
    kinds = kinds_of(recipe)
    by_hand = [held(recipe, sizes, at, kinds) for at in ranks_of(sizes)]
    assert [rank.weights for rank in plan.ranks] == by_hand
    # In bf16, and what is fp32 stays so: no byte is read that is not kept.
    assert all(rank.reads + rank.mapped == rank.weights for rank in plan.ranks)
    assert plan.weights == recipe.nbytes
    assert sum(by_hand) == sum(copies_of(recipe, sizes, key) * nbytes for key, nbytes in sizes_of(recipe))


def sizes_of(recipe: Recipe) -> Iterator[tuple[str, int]]:
    for key, shape in recipe.tensors:
        yield key, math.prod(shape) * itemsize(recipe.dtype_of(key))


def ranges_of(entry: Any) -> tuple[Any, Any]:
    """Where the runs of bytes of an entry begin and end in its file."""
    size = itemsize(entry.dtype)
    if not entry.nbytes:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    if entry.strides is None:
        return np.array([entry.offset]), np.array([entry.end])
    *outer, (run, step) = zip(entry.shape, entry.strides, strict=True)
    assert step == 1
    starts = np.array([entry.offset])
    for n, stride in outer:
        starts = (starts[:, None] + np.arange(n) * stride * size).ravel()
    return starts, starts + run * size


@pytest.mark.parametrize(
    ("make", "mesh"),
    [
        (lambda: llama_405b(layers=1), "dp=8,tp=8"),
        (lambda: llama_405b(layers=1), "dp=12,tp=8"),
        (lambda: llama_405b(layers=1), "dp=48"),
        (lambda: deepseek_v3(layers=4, experts=16), "dp=12,tp=8"),
        (lambda: deepseek_v3(layers=4, experts=64), "dp=8,ep=8"),
        (lambda: deepseek_v3(layers=4, experts=64), "dp=48"),
    ],
)
def test_every_byte_goes_to_as_many_ranks_as_hold_it(
    make: Callable[[], Recipe], mesh: str, headers: Callable[[Recipe], Path]
) -> None:
    """Those of the checkpoint's ranges that the ranks read or map, all of them together."""
    recipe, sizes = make(), mesh_of(mesh)
    source = headers(recipe)
    starts, ends = defaultdict(list), defaultdict(list)
    for one in plans_of_ranks(source, mesh, Phases()):
        for placement in one.plan.placements:
            assert placement.residency in ("copy", "map")
            # Of a slice of columns no more than it is, too.
            assert placement.source_bytes == placement.nbytes
            for link in placement.links:
                begin, end = ranges_of(link.entry)
                starts[link.entry.key].append(begin)
                ends[link.entry.key].append(end)
    for key, entry in lowmem.inspect(source).items():
        begin, end = np.sort(np.concatenate(starts[key])), np.sort(np.concatenate(ends[key]))
        count = copies_of(recipe, sizes, key)
        # Wherever some begin, as many end: everywhere as many are on the way.
        assert np.array_equal(begin[:count], [entry.offset] * count)
        assert np.array_equal(begin[count:], end[:-count])
        assert np.array_equal(end[-count:], [entry.end] * count)


def test_columns_are_read_without_what_is_between_them(headers: Callable[[Recipe], Path]) -> None:
    """What the moves of a rank read, run for run, is its own share, and each byte once."""
    recipe = llama_405b(layers=1)
    one = next(iter(plans_of_ranks(headers(recipe), "dp=8,tp=8", Phases())))
    columns = [p for p in one.plan.placements if p.target.endswith(("o_proj.weight", "down_proj.weight"))]
    assert sum(p.nbytes for p in columns) == 2 * 16384 * (16384 + 53248) // 64
    moves = list(one.plan.moves())
    assert {id(move.placement) for move in moves} == {id(p) for p in columns}
    assert sum(move.nbytes for move in moves) == one.plan.bytes_read == sum(p.nbytes for p in columns)
    assert all(move.spread is not None for move in moves)


# -- what planning costs


def calls_of(ranks: Iterable[OfRank]) -> int:
    """How many functions the package calls to plan all ranks but the first, those in C included."""
    each = iter(ranks)
    next(each)
    count = 0

    def see(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call") and frame.f_code.co_filename.startswith(PACKAGE)

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        for _ in each:
            pass
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize(("mesh", "most"), [("dp=16", 8), ("ep=16", 8), ("dp=2,tp=8", 45)])
def test_an_expert_costs_each_rank_few_calls(mesh: str, most: int, headers: Callable[[Recipe], Path]) -> None:
    """Whatever a clock says; most of the experts are other ranks', unless columns of all of them are this one's."""
    few, many = (deepseek_v3(layers=5, experts=experts) for experts in (64, 256))
    more = calls_of(plans_of_ranks(headers(many), mesh, Phases())) - calls_of(
        plans_of_ranks(headers(few), mesh, Phases())
    )
    assert more / (15 * (len(many.tensors) - len(few.tensors))) <= most


# -- what ranks of a host share


def planned_once(source: Path, mesh: str) -> list[OfRank]:
    """The ranks' plans where what eight of a host hold alike is read by one of them."""
    found = []
    for one in plans_of_ranks(source, mesh, Phases(), residency="copy", read="once"):
        beside = range(one.rank // 8 * 8, one.rank // 8 * 8 + 8)
        found.append(OfRank(one.rank, share_out(one.plan, one.targets, one.rank, beside), one.targets, one.seconds))
    return found


@pytest.mark.parametrize(
    "make", [lambda: llama_405b(layers=2), lambda: deepseek_v3(layers=5, experts=16)], ids=["llama", "deepseek"]
)
def test_a_host_reads_once_what_its_ranks_share(make: Callable[[], Recipe], headers: Callable[[Recipe], Path]) -> None:
    """Eight ranks of tensor parallelism on each of eight hosts, among which the rows are divided."""
    recipe = make()
    source = headers(recipe)
    each = lowmem.plan_ranks(source, mesh="dp=8,tp=8", ranks_per_host=8, residency="copy")
    once = lowmem.plan_ranks(source, mesh="dp=8,tp=8", ranks_per_host=8, residency="copy", read="once")
    assert [rank.weights for rank in once.ranks] == [rank.weights for rank in each.ranks]
    whole = {key: nbytes for key, nbytes in sizes_of(recipe) if not key.endswith(CORRECTION)}
    # Buffers are not divided by rows: every host reads all of these.
    corrections = sum(nbytes for _, nbytes in sizes_of(recipe)) - sum(whole.values())
    for host in range(8):
        reads = sum(nbytes // 8 for nbytes in whole.values()) + corrections
        assert once.hosts[host].reads == reads
        again = sum(7 * nbytes // 8 for key, nbytes in whole.items() if copies_of(recipe, {"tp": 8}, key) == 8)
        assert each.hosts[host].reads == reads + again + 7 * corrections


@pytest.mark.parametrize(
    "make", [lambda: llama_405b(layers=2), lambda: deepseek_v3(layers=5, experts=16)], ids=["llama", "deepseek"]
)
def test_who_reads_what_is_agreed_and_balanced(make: Callable[[], Recipe], headers: Callable[[Recipe], Path]) -> None:
    recipe = make()
    ranks = planned_once(headers(recipe), "dp=8,tp=8")
    for host in range(8):
        here = ranks[8 * host : 8 * host + 8]
        said = [{s.placement.target: (s.reader, s.ranks) for s in one.plan.shared} for one in here]
        assert all(one == said[0] for one in said)
        assert {name for name, _ in recipe.tensors if copies_of(recipe, {"tp": 8}, name) == 8} >= set(said[0])
        members = tuple(one.rank for one in here)
        read = dict.fromkeys(members, 0)
        largest = 0
        for name, (reader, held_by) in said[0].items():
            assert held_by == members
            feeding = [p for one in here for p in one.plan.placements if p.target == name and p.links]
            # One of the host alone has what feeds it.
            assert len(feeding) == 1
            assert any(p is feeding[0] for p in here[reader - members[0]].plan.placements)
            read[reader] += feeding[0].source_bytes
            largest = max(largest, feeding[0].source_bytes)
        assert max(read.values()) - min(read.values()) <= largest
        reads = [one.plan.bytes_read for one in here]
        assert max(reads) - min(reads) <= largest


def test_replicas_on_a_host_read_each_byte_once(headers: Callable[[Recipe], Path]) -> None:
    """Four times two ranks that divide all rows, and have the same four times: an eighth each, within a tensor."""
    recipe = llama_405b(layers=2)
    plan = lowmem.plan_ranks(headers(recipe), mesh="replicate=4,dp=2", residency="copy", read="once")
    assert sum(rank.reads for rank in plan.ranks) == plan.hosts[0].reads == recipe.nbytes
    largest = max(nbytes for _, nbytes in sizes_of(recipe)) // 2
    for group in (plan.ranks[::2], plan.ranks[1::2]):
        reads = [rank.reads for rank in group]
        assert sum(reads) == recipe.nbytes // 2
        assert max(reads) - min(reads) <= largest
