"""The order of things: for each case the children load, then take turns over several rounds."""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from bench.page_cache import drop, warm
from bench.results import Row
from bench.sources import make_checkpoint, settle

from . import disk
from .cases import Case
from .child import start
from .children import Child
from .limited import run_limited
from .loaders import LOADERS, Order

Tell = Callable[[str], None]

# The row of the disk's own time, and how often each way to read is tried to choose one.
_DISK = "disk"
_PROBES = 2


@dataclass(frozen=True)
class Plan:
    """How to run.

    Attributes:
        cases: in this order.
        folder: where checkpoints are.
        work: an empty folder on the same disk, for what loaders write.
        rounds: turns of each loader.
        steps: tokens in each turn; cold it is one.
        forwards: of the cases that must not grow; a tenth of them are done before the first look.
        tokens: of the generation under a kernel limit.
        limit: bytes, that limit.
        seconds: limit of each answer.
    """

    cases: tuple[Case, ...]
    folder: Path
    work: Path
    rounds: int
    steps: int
    forwards: int
    tokens: int
    limit: int
    seconds: float


def run(plan: Plan, context: ForkServerContext, done: Callable[[Row], None], tell: Tell) -> None:
    """Run the cases, `tell` of each turn, and hand every finished row to `done`."""
    for case in plan.cases:
        source = make_checkpoint(plan.folder, case.checkpoint)
        rows: Iterable[Row]
        if case.kind == "limit":
            rows = run_limited(source, plan.limit, plan.tokens, plan.work, plan.seconds, tell)
        elif case.kind == "steady":
            rows = _run_steady(plan, context, case, source)
        else:
            with Turns(plan, context, case, source, tell) as turns:
                rows = turns.rows()
        for row in rows:
            done({"case": case.name, "status": "ok", "reason": "", **row})


class Turns:
    """The children of one case that compares tokens, and what they have answered."""

    def __init__(self, plan: Plan, context: ForkServerContext, case: Case, source: Path, tell: Tell) -> None:
        self._plan, self._context, self._case, self._source, self._tell = plan, context, case, source, tell
        self._stack = ExitStack()
        self._children: dict[str, Child] = {}
        self._rows: dict[str, Row] = {}
        self._work = Path()

    def __enter__(self) -> Turns:
        temporary = tempfile.TemporaryDirectory(prefix=f"{self._case.name}-", dir=self._plan.work)
        self._work = Path(self._stack.enter_context(temporary))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def rows(self) -> list[Row]:
        """Let every loader load, then take its turns; a row each, and one of the disk where files are cold."""
        warm(self._files())
        for loader in self._case.loaders:
            self._load(loader)
        settle()
        warm(self._files())
        for loader in self._case.loaders:
            self._ask(loader, "prompt", None)
        disk_row = self._probe() if self._case.cold else None
        takers = (*self._case.loaders, *([_DISK] if disk_row is not None else []))
        for turn in range(self._plan.rounds):
            # Each round starts with another one, so that none always comes after the same.
            shift = turn % len(takers)
            for taker in takers[shift:] + takers[:shift]:
                if taker == _DISK and disk_row is not None:
                    self._read(disk_row, turn)
                else:
                    self._turn(taker, turn)
        rows = check_digests(list(self._rows.values()))
        return [_summed_up(row) for row in (*rows, *([disk_row] if disk_row is not None else []))]

    def _files(self) -> list[Path]:
        """The checkpoint's, and what the loaders wrote."""
        written = (file for file in self._work.rglob("*") if file.is_file())
        return [*self._checkpoint(), *sorted(written)]

    def _checkpoint(self) -> list[Path]:
        return sorted(self._source.glob("*.safetensors"))

    def _load(self, loader: str) -> None:
        folder = self._work / loader
        folder.mkdir()
        order = Order(self._source, self._case.dtype, self._case.on_disk, folder)
        child = Child(self._context, partial(start, LOADERS[loader]), order, self._plan.seconds)
        self._stack.callback(child.close)
        self._children[loader] = child
        self._rows[loader] = {"loader": loader, "status": "ok", "reason": "", "times": [], "digests": []}
        self._note(loader, child.loaded)
        self._rows[loader] |= {key: child.loaded[key] for key in ("load", "threads") if key in child.loaded}
        self._tell(f"{self._case.name}, {loader}: {_brief(self._rows[loader])}")

    def _note(self, loader: str, answer: Mapping[str, Any]) -> bool:
        if answer["status"] != "ok":
            self._rows[loader] |= {"status": answer["status"], "reason": answer["reason"]}
        return bool(answer["status"] == "ok")

    def _ask(self, loader: str, what: str, argument: object) -> dict[str, Any] | None:
        """The answer, None of a loader that has failed."""
        if self._rows[loader]["status"] != "ok":
            return None
        answer = self._children[loader].ask(what, argument)
        if not self._note(loader, answer):
            return None
        if "digest" in answer:
            self._rows[loader]["digests"].append(answer["digest"])
        if what == "prompt":
            self._rows[loader]["prompt"] = answer["seconds"]
        return answer

    def _turn(self, loader: str, turn: int) -> None:
        if self._rows[loader]["status"] != "ok":
            return
        stayed = self._make_cold() if self._case.cold else 0
        if stayed:
            reason = f"{stayed} pages of the files stayed in the page cache"
            self._note(loader, {"status": "not cold", "reason": reason})
            return
        answer = self._ask(loader, "steps", 1 if self._case.cold else self._plan.steps)
        if answer is not None:
            self._rows[loader]["times"].append(answer["seconds"])
        self._tell(f"{self._case.name}, round {turn + 1}, {loader}: {_brief(self._rows[loader])}")

    def _make_cold(self) -> int:
        """Take the files out of the page cache, where every model must let go of them; returns pages that stayed."""
        files = self._files()
        for loader in self._case.loaders:
            self._ask(loader, "forget", files)
        return drop(files)

    def _probe(self) -> Row | None:
        """A row of the disk: the quickest way to read it here, which takes its turns as the loaders do. A least of more
        turns would be less than theirs on a disk that others use too.
        """
        files = self._checkpoint()
        ways = disk.ways(files[0])
        found: dict[str, list[float]] = {}
        for _ in range(_PROBES):
            for name, reader in ways.items():
                if not self._make_cold():
                    found.setdefault(name, []).append(disk.read_time(files, reader))
        if not found:
            return None
        variants = {name: min(times) for name, times in found.items()}
        best = min(variants, key=lambda name: variants[name])
        row = {"loader": _DISK, "status": "ok", "reason": "", "times": [], "digests": []}
        return {**row, "variant": best, "variants": variants}

    def _read(self, row: Row, turn: int) -> None:
        if self._make_cold():
            return
        files = self._checkpoint()
        row["times"].append([disk.read_time(files, disk.ways(files[0])[row["variant"]])])
        self._tell(f"{self._case.name}, round {turn + 1}, {_DISK}: {_brief(row)}")


def check_digests(rows: Sequence[Row]) -> list[Row]:
    """The rows, with those called `wrong` whose logits are not, bit for bit, those of the first that ran."""
    reference = next((row for row in rows if row["status"] == "ok"), None)
    found = []
    for row in rows:
        if reference is not None and row["status"] == "ok" and row["digests"] != reference["digests"]:
            same = zip(row["digests"], reference["digests"], strict=False)
            turn = next((n for n, (ours, theirs) in enumerate(same) if ours != theirs), 0)
            where = "the prompt" if turn == 0 else f"turn {turn}"
            row = {**row, "status": "wrong", "reason": f"logits of {where} are not those of {reference['loader']}"}
        found.append(row)
    return found


def _summed_up(row: Row) -> Row:
    times = [seconds for turn in row["times"] for seconds in turn]
    digest = {"digest": row["digests"][-1][:16]} if row["digests"] else {}
    kept = {key: value for key, value in row.items() if key != "digests"} | digest
    return {**kept, "least": min(times), "median": statistics.median(times)} if times else kept


def _run_steady(plan: Plan, context: ForkServerContext, case: Case, source: Path) -> Iterable[Row]:
    """Forwards of each loader's model, and what it holds after a tenth of them and after all."""
    for loader in case.loaders:
        folder = plan.work / f"{case.name}-{loader}"
        folder.mkdir()
        order = Order(source, case.dtype, case.on_disk, folder)
        child = Child(context, partial(start, LOADERS[loader]), order, plan.seconds)
        try:
            yield {"loader": loader, **_watch(child, plan.forwards)}
        finally:
            child.close()
            shutil.rmtree(folder)


def _watch(child: Child, forwards: int) -> Row:
    first = max(1, forwards // 10)
    row: Row = {"forwards": [first, forwards], "states": []}
    digests: set[str] = set()
    answer = child.loaded
    for count in (first, forwards - first):
        answer = child.ask("forwards", count) if answer["status"] == "ok" else answer
        if answer["status"] != "ok":
            break
        digests.update(answer["digests"])
        row["least"] = answer["seconds"] / max(1, count)
        answer = child.ask("state")
        if answer["status"] == "ok":
            row["states"].append({key: value for key, value in answer.items() if key != "status"})
    if answer["status"] != "ok":
        return {**row, "status": answer["status"], "reason": answer["reason"]}
    if len(digests) != 1:
        return {**row, "status": "wrong", "reason": f"{len(digests)} different logits of one prompt"}
    return row


def _brief(row: Row) -> str:
    if row["status"] != "ok":
        return f"{row['status']}: {row['reason']}"
    if row["times"]:
        return f"least {min(row['times'][-1]):.3f} s a token"
    return f"loaded in {row['load']:.2f} s"
