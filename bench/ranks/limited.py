"""A rank of a group that the kernel allows so much memory: `python -m bench.ranks.limited JSON`.

All ranks are in one memory cgroup, as in a container, which each enters before it imports anything. So the group pays
for the interpreters, what they import, the parts of the model, and the processes that sample memory. The files are
warm: their pages are paid for elsewhere.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.forward.limited import ask
from bench.kernel_limits import cgroup_kind, find_limit
from bench.page_cache import warm
from bench.results import Row
from lowmem.sizes import MIB

from .cases import Member, Order
from .group import group

# Beside the interpreter and what the rank holds of the model.
SHARE = 80 * MIB

Members = Callable[[], list[Member]]


def interpreter(order: Order, members: Members, seconds: float) -> Row:
    """Bytes of anonymous memory of a rank that has imported everything and loaded nothing: the most of them."""
    rows = _ask_all(order, members(), None, seconds, loads=False)
    return {**_together(rows), "interpreter": max((row.get("interpreter", 0) for row in rows), default=0)}


def run_limited(order: Order, members: Members, held: int, idle: int, seconds: float) -> Row:
    """What became of one load under the limit of what a rank `held`, the `idle` interpreter and `SHARE`, for each."""
    kind = cgroup_kind()
    if kind is None:
        return {"status": "cannot", "reason": "this process may make no memory cgroup"}
    limit = find_limit(SHARE + held, idle).size
    warm(sorted(order.folder.glob("*.safetensors")))
    them = members()
    with group(kind, limit * len(them)) as folder:
        rows = _ask_all(replace(order, ram=SHARE + held), them, folder, seconds)
    peaks = [row["group_peak"] for row in rows if row.get("group_peak")]
    row = {**_together(rows), "kind": kind, "limit": limit, "group_limit": limit * len(them)}
    return {**row, "group_peak": max(peaks, default=None)}


def _ask_all(order: Order, members: list[Member], folder: Path | None, seconds: float, loads: bool = True) -> list[Row]:
    wanted = {**asdict(order), "folder": str(order.folder)}
    common = {"group": None if folder is None else str(folder), "order": wanted, "loads": loads}
    orders = [{**common, "member": asdict(member)} for member in members]
    with ThreadPoolExecutor(len(members)) as pool:
        return list(pool.map(lambda one: ask("bench.ranks.limited", one, None, seconds), orders))


def _together(rows: list[Row]) -> Row:
    """That of all ranks: when one is killed the others fail, so that it comes first."""
    for status in ("killed", "failed"):
        for rank, row in enumerate(rows):
            if row["status"] == status:
                return {"status": status, "reason": f"rank {rank}: {row['reason']}"}
    return {"status": "ok", "reason": ""}


def main() -> int:
    """One load; prints a line of JSON."""
    asked = json.loads(sys.argv[1])
    if asked["group"]:
        (Path(asked["group"]) / "cgroup.procs").write_text(str(os.getpid()), encoding="utf-8")
    # What libraries print must not mix with the answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch.distributed as dist

    import bench.ranks.preload  # noqa: F401
    from lowmem.limits import group_peak
    from lowmem.memory import anonymous_memory

    from .checks import check
    from .child import join
    from .ways import WAYS

    order = Order(**{**asked["order"], "folder": Path(asked["order"]["folder"])})
    join(Member(**asked["member"]))
    found: dict[str, Any] = {"interpreter": anonymous_memory()}
    if asked["loads"]:
        started = time.perf_counter()
        loaded = WAYS[order.way](order)
        found["seconds"] = time.perf_counter() - started
        # The others' peaks too.
        dist.barrier()
        found["group_peak"] = group_peak() if asked["group"] else None
        found |= check(loaded.model, order.folder, order.dtype)
    # Nobody may end while another is still given something.
    dist.barrier()
    answers.write(json.dumps(found) + "\n")
    answers.close()
    # Without a long tear-down.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
