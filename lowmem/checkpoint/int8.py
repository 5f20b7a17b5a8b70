"""Row-wise int8 of bitsandbytes in a checkpoint: which tensors belong to a weight, and whether they fit it.

Beside `X.weight` (int8 [out, in]) lie `X.SCB` (fp32 [out], the largest magnitude of each row) and `X.weight_format`
(uint8 scalar), wherever in the shards: `Linear8bitLt._save_to_state_dict` in bitsandbytes/nn/modules.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..dtypes import is_floating
from ..errors import CheckpointError, UnsupportedError
from .records import Checkpoint, TensorEntry

_WEIGHT, _SCALES, _FORMAT = "weight", "SCB", "weight_format"
_HAS_SCALES = "_has_scales"
# The order of the rows, as numbers: `LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING` in bitsandbytes/utils.py. Only the first is a
# tensor as torch has it; the others are layouts of GPUs that bitsandbytes gave up in 0.45.
_FORMATS = {0: "row", 1: "col32", 2: "col_turing", 3: "col_ampere"}


def has_scales(checkpoint: Checkpoint) -> bool:
    """Whether any tensor bears the name of row scales."""
    # Asked several times, of tens of thousands of keys; kept with the checkpoint, so that nothing keeps that.
    table = checkpoint.__dict__
    if _HAS_SCALES not in table:
        table[_HAS_SCALES] = any(key.endswith(_SCALES) for key in checkpoint)
    found: bool = table[_HAS_SCALES]
    return found


def is_int8_weight(checkpoint: Checkpoint, entry: TensorEntry) -> bool:
    """Whether it is an int8 weight with row scales beside it."""
    return entry.dtype == "int8" and scales_of(checkpoint, entry.key) is not None


def scales_of(checkpoint: Checkpoint, key: str) -> TensorEntry | None:
    """The row scales beside the weight `key`; None where there are none, or it bears no weight's name."""
    return _beside(checkpoint, key, _SCALES)


def companions_of(checkpoint: Checkpoint, key: str) -> set[str]:
    """Keys that lie beside the int8 weight `key` and are read with it."""
    found = (_beside(checkpoint, key, leaf) for leaf in (_SCALES, _FORMAT))
    return {entry.key for entry in found if entry is not None}


def _beside(checkpoint: Checkpoint, key: str, leaf: str) -> TensorEntry | None:
    if key != _WEIGHT and not key.endswith(f".{_WEIGHT}"):
        return None
    return checkpoint.get(key[: -len(_WEIGHT)] + leaf)


def check_pair(checkpoint: Checkpoint, weight: TensorEntry) -> TensorEntry:
    """The row scales of an int8 weight, which fit it.

    Raises:
        CheckpointError: they are missing, or of another shape or dtype than they must be.
    """
    scales = scales_of(checkpoint, weight.key)
    if scales is None:
        name = weight.key[: -len(_WEIGHT)] + _SCALES if weight.key.endswith(_WEIGHT) else f"{weight.key}.{_SCALES}"
        raise CheckpointError(
            f"{weight.file}: tensor {weight.key!r} is int8, and its row scales are in no file of the checkpoint: "
            f"expected {name!r}, float32 of shape {weight.shape[:1]}; bring all shards, or a checkpoint whose weights "
            "are floats"
        )
    if scales.shape != weight.shape[:1] or not is_floating(scales.dtype):
        raise CheckpointError(
            f"{scales.file}: tensor {scales.key!r}, the row scales of {weight.key!r}: expected float32 of shape "
            f"{weight.shape[:1]}, found {scales.dtype} of shape {scales.shape}; download the checkpoint again, or "
            "write it anew with the library that quantised it"
        )
    return scales


def check_float(checkpoint: Checkpoint, weight: TensorEntry) -> None:
    """Refuse row scales beside a weight that needs none.

    Raises:
        CheckpointError: there are some.
    """
    scales = scales_of(checkpoint, weight.key)
    if scales is not None:
        raise CheckpointError(
            f"{weight.file}: tensor {weight.key!r} is {weight.dtype}, and {scales.key!r} beside it says that it is "
            "int8: expected int8, or no scales; bring one or the other, or leave the scales out by "
            f"skip=[{scales.key!r}] (--skip)"
        )


def check_formats(checkpoint: Checkpoint, weights: Iterable[TensorEntry]) -> None:
    """Look at what says in which order the elements of int8 weights are: a byte for each, which is read.

    Raises:
        CheckpointError: it cannot be read.
        UnsupportedError: the elements are in another order than torch's.
    """
    by_file: dict[Path, list[tuple[TensorEntry, TensorEntry]]] = {}
    for weight in weights:
        entry = _beside(checkpoint, weight.key, _FORMAT)
        if entry is not None and not entry.packed:
            by_file.setdefault(entry.file, []).append((entry, weight))
    for file, pairs in by_file.items():
        try:
            with file.open("rb") as opened:
                for entry, weight in pairs:
                    number = -1
                    if entry.nbytes == 1:
                        opened.seek(entry.offset)
                        number = opened.read(1)[0]
                    _check_format(entry, weight, number)
        except (OSError, IndexError) as error:
            raise CheckpointError(f"{file}: the formats of int8 weights cannot be read: {error}") from error


def _check_format(entry: TensorEntry, weight: TensorEntry, number: int) -> None:
    if number == 0:
        return
    found = f"{number} ({_FORMATS[number]})" if number in _FORMATS else str(number)
    if number < 0:
        found = f"{entry.dtype} of shape {entry.shape}"
    raise UnsupportedError(
        f"{entry.file}: tensor {entry.key!r}, the order of the elements of {weight.key!r}: expected 0 (row), found "
        f"{found}; save the model anew with bitsandbytes 0.45 or later"
    )
