"""A load in a process that the kernel allows so much memory: `python -m bench.vision.limited JSON`.

The process enters its memory cgroup before it imports anything, so the group pays for the interpreter, what it imports,
the model, and the process that samples memory. The files are warm: their pages are paid for elsewhere.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.forward.limited import ask
from bench.kernel_limits import cgroup_kind, enter, find_limit
from bench.page_cache import warm
from bench.results import Row
from lowmem.sizes import MIB

from .cases import Order, Sizes

# Beside the interpreter and the largest tensor.
_SHARE = 80 * MIB


def run_limited(orders: Sequence[Order], seconds: float, tell: Callable[[str], None]) -> Iterator[Row]:
    """Rows of a load by hand without limit, which gives the tensors, then of each way under the limit.

    Args:
        orders: the ways, of one checkpoint.
        seconds: limit of each process.
        tell: called with a line for each.
    """
    kind = cgroup_kind()
    free = _load(next(order for order in orders if order.way == "hand"), 0, None, seconds)
    tell(f"limits, no limit: {free['status']} {free['reason']}")
    yield _shown({**free, "loader": "no limit, by hand"})
    for order in orders:
        row: Row = {"loader": order.way, "kind": kind}
        if kind is None:
            row |= {"status": "cannot", "reason": "this process may make no memory cgroup"}
        elif free["status"] != "ok":
            row |= {"status": "cannot", "reason": "nothing to compare with"}
        else:
            limit = find_limit(_SHARE + free["largest"], free["interpreter"])
            ram = _SHARE + free["largest"]
            row |= {"limit": limit.size, **_load(order, limit.size, limit.kind, seconds, ram)}
        if row["status"] == "ok" and row["tensors"] != free["tensors"]:
            row |= {"status": "wrong", "reason": "its tensors are not those of the load without limit"}
        tell(f"limits, {order.way}: {row['status']} {row['reason']}")
        yield _shown(row)


def _load(order: Order, limit: int, kind: str | None, seconds: float, ram: int | None = None) -> Row:
    from .checkpoints import files_of

    warm(files_of(order.folder))
    wanted = {**asdict(order), "folder": str(order.folder), "plain": str(order.plain), "ram": ram}
    return ask("bench.vision.limited", {"limit": limit, "order": wanted}, kind, seconds)


def _shown(row: Row) -> Row:
    return {key: value for key, value in row.items() if key != "tensors"}


def main() -> int:
    """One load; prints a line of JSON."""
    asked = json.loads(sys.argv[1])
    if asked["limit"]:
        enter(asked["limit"])
    # What libraries print must not mix with the answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # What a load would import besides, when torch first computes with tensors without values.
    import torch._dynamo  # noqa: F401

    import bench.vision.preload  # noqa: F401
    from lowmem.limits import group_peak
    from lowmem.memory import anonymous_memory

    from .child import tensors_of
    from .ways import WAYS

    order = _parse(asked["order"])
    held = anonymous_memory()
    started = time.perf_counter()
    model = WAYS[order.way](order)
    seconds = time.perf_counter() - started
    found = {
        "least": seconds,
        "interpreter": held,
        "held": max(0, anonymous_memory() - held),
        "largest": max(tensor.nbytes for tensor in model.state_dict().values()),
        "group_peak": group_peak() if asked["limit"] else None,
        "tensors": tensors_of(model),
    }
    answers.write(json.dumps(found) + "\n")
    answers.close()
    # Without a long tear-down.
    os._exit(0)


def _parse(found: dict[str, Any]) -> Order:
    paths = {name: Path(found[name]) for name in ("folder", "plain")}
    return Order(**{**found, **paths, "sizes": Sizes(**found["sizes"])})


if __name__ == "__main__":
    sys.exit(main())
