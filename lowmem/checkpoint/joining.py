"""Several checkpoints as one: what each has under keys that tell whose they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..errors import UnsupportedError
from .records import Checkpoint, Shard


def labelled(checkpoint: Checkpoint, label: str) -> Checkpoint:
    """A checkpoint whose entries say whose they are: `label: key`. It is still asked for them by its own keys."""
    if not label:
        return checkpoint
    entries = {key: replace(entry, key=f"{label}: {key}") for key, entry in checkpoint.entries.items()}
    return replace(checkpoint, entries=entries)


def join_checkpoints(source: str, held: Sequence[tuple[str, Checkpoint]]) -> Checkpoint:
    """All entries of several checkpoints, in their order, by the keys that the entries say.

    Args:
        source: what messages call the whole.
        held: label → checkpoint, labelled by it.

    Raises:
        UnsupportedError: packed tensors of one file were opened in two ways.
    """
    checkpoints = [checkpoint for _, checkpoint in held]
    first = checkpoints[0]
    return Checkpoint(
        source=source,
        folder=first.folder,
        shards=_shards(shard for checkpoint in checkpoints for shard in checkpoint.shards),
        entries={entry.key: entry for checkpoint in checkpoints for entry in checkpoint.values()},
        config=first.config,
        warnings=tuple(f"{label}: {warning}" if label else warning for label, c in held for warning in c.warnings),
        opened=", ".join(f"{label}: {c.opened}" if label else c.opened for label, c in held if c.opened),
        unreadable={f"{label}: {key}" if label else key: why for label, c in held for key, why in c.unreadable.items()},
        described=sum(checkpoint.described for checkpoint in checkpoints),
        labels=tuple(label for label, _ in held if label),
    )


def _shards(shards: Iterable[Shard]) -> tuple[Shard, ...]:
    """Each file once."""
    found: dict[object, Shard] = {}
    for shard in shards:
        known = found.setdefault(shard.file, shard)
        if known.packed != shard.packed:
            raise UnsupportedError(
                f"{shard.file}: two sources open other mappings of its compressed tensors; give both the "
                "same by weights=, or save the file again uncompressed"
            )
    return tuple(found.values())
