"""Fuzzing without coverage: the kept corpus and the seeds, mutated by chance. Needs nothing but the target."""

from __future__ import annotations

import hashlib
import random
import tempfile
from pathlib import Path

from .guard import Broken, Guard, Unwatched
from .targets import Target

_guard: Guard | None = None


def the_guard() -> Guard:
    """The one of this process: an audit hook cannot be taken away."""
    global _guard
    if _guard is None:
        _guard = Guard()
    return _guard


def run_by_chance(target: Target, runs: int, seed: int, findings: Path | None = None) -> Guard:
    """Execute every kept input, and then `runs` mutations of them.

    Raises:
        Broken: an input broke a rule; it is in `findings`, if that is given.
    """
    guard, chance = the_guard(), random.Random(seed)
    pool = [*target.seeds(), *target.kept()]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        # Modules that are imported when first needed.
        for data in target.seeds():
            target.run(Unwatched(), data, folder)
        for at in range(len(pool) + runs):
            data = pool[at] if at < len(pool) else target.mutate(chance.choice(pool), chance)
            try:
                target.run(guard, data, folder)
            except Broken as broken:
                name = f"{target.name}-{hashlib.sha1(data).hexdigest()}"
                if findings is not None:
                    findings.mkdir(parents=True, exist_ok=True)
                    (findings / name).write_bytes(data)
                raise Broken(f"{name}, {len(data)} bytes, {data[:200]!r}: {broken}") from broken
            # Children of children reach further.
            if at >= len(pool) and chance.random() < 0.05 and len(pool) < 2000:
                pool.append(data)
    return guard
