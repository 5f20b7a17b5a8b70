"""Checkpoints of any sound structure are read as they were written; damaged ones end in that, or in an error."""

from __future__ import annotations

import io
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz.chance import the_guard
from fuzz.damage import damage
from fuzz.equal import check_equal
from fuzz.guard import Unwatched
from fuzz.opcodes import mutate_pickle
from fuzz.pickled_files import saved
from fuzz.reference import check_pickled
from fuzz.safetensors_files import TARGETS as SAFETENSORS
from fuzz.targets import all_targets
from fuzz.zips import Record, read_records, write_records
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

import lowmem

EXAMPLES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
KINDS = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32),
    *(torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2),
)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)
NAMES = TEXTS.filter(lambda name: name != "__metadata__")
# What a mapping of tensors keeps beside them.
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS | st.binary(max_size=20)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any bits of any kind and shape, up to 64 elements."""
    kind = draw(st.sampled_from(KINDS))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    count = 1
    for n in shape:
        count *= n
    raw = draw(st.binary(min_size=count * kind.itemsize, max_size=count * kind.itemsize))
    return torch.frombuffer(bytearray(raw), dtype=kind).reshape(shape) if count else torch.empty(shape, dtype=kind)


STATES = st.dictionaries(NAMES, tensors(), min_size=1, max_size=5)
# Tensors of shape (0,) stand for what is elsewhere, where they are many.
WHOLE = STATES.filter(lambda state: all(tensor.shape != (0,) for tensor in state.values()))


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """What is imported when first needed is there."""
    with tempfile.TemporaryDirectory() as folder:
        for target in all_targets().values():
            for data in target.seeds():
                target.run(Unwatched(), data, Path(folder))


def streamed(data: bytes, name: str) -> dict[str, torch.Tensor] | None:
    """Under guard; None for an error of lowmem."""
    with tempfile.TemporaryDirectory() as made:
        file = Path(made) / name
        file.write_bytes(data)
        result: dict[str, torch.Tensor] | None = the_guard().run(
            lambda: dict(lowmem.stream(file)), size=len(data), read=file.parent
        )
        return result


@EXAMPLES
@given(STATES, st.dictionaries(TEXTS, TEXTS, max_size=3))
def test_safetensors_are_read_as_they_were_written(state: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Whatever is called, shaped and said."""
    made = streamed(save(state, metadata), "model.safetensors")
    assert made is not None
    wanted = state | {name: state[held] for name, held in metadata.items() if held in state and name not in state}
    check_equal(made, wanted)


@EXAMPLES
@given(WHOLE, st.sampled_from([2, 3, 4, 5]), st.booleans(), st.booleans())
def test_state_dicts_are_read_as_they_were_written(
    state: dict[str, torch.Tensor], protocol: int, legacy: bool, wrapped: bool
) -> None:
    """By any protocol, in either container, bare or beside what trainers keep."""
    value: Any = {"state_dict": state, "epoch": 1, "optimizer": {"state": dict(state)}} if wrapped else state
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    made = streamed(buffer.getvalue(), "pytorch_model.bin")
    assert made is not None
    check_equal(made, state)


@EXAMPLES
@given(WHOLE, st.dictionaries(NAMES, PLAIN, max_size=4), st.lists(st.booleans(), min_size=4, max_size=4), TEXTS)
def test_zips_are_read_however_they_are_written(
    state: dict[str, torch.Tensor], plain: dict[str, Any], ways: list[bool], comment: str
) -> None:
    """Packed or not, with large sizes, with sizes behind the data, with padding and a comment."""
    value = {**plain, **state}
    records = [
        Record(r.name, r.data, ways[0], zip64=ways[1], descriptor=ways[2], extra=bytes(40) if ways[3] else b"")
        for r in read_records(saved(value)) or []
    ]
    made = streamed(write_records(records, {"zip64": ways[1]}, comment.encode()[:40]), "pytorch_model.bin")
    assert made is not None
    check_equal(made, state)


@EXAMPLES
@given(st.lists(WHOLE, min_size=1, max_size=3), st.booleans())
def test_indexes_are_read_as_they_were_written(states: list[dict[str, torch.Tensor]], pickled: bool) -> None:
    """Keys in any of several shards."""
    states = [{f"{at}.{key}": tensor for key, tensor in state.items()} for at, state in enumerate(states)]
    suffix, stem = ("bin", "pytorch_model") if pickled else ("safetensors", "model")
    names = [f"{stem}-{at + 1:05}-of-{len(states):05}.{suffix}" for at in range(len(states))]
    weight_map = {key: name for name, state in zip(names, states, strict=True) for key in state}
    with tempfile.TemporaryDirectory() as made:
        folder, size = Path(made), 0
        for name, state in zip(names, states, strict=True):
            size += (folder / name).write_bytes(saved(state) if pickled else save(state))
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
        found = the_guard().run(lambda: dict(lowmem.stream(folder)), size=size, read=folder)
    assert found is not None
    check_equal(found, {key: tensor for state in states for key, tensor in state.items()})


@EXAMPLES
@given(STATES, st.integers(0, 2**32))
def test_damaged_safetensors_end_in_the_same_or_in_an_error(state: dict[str, torch.Tensor], seed: int) -> None:
    """Whatever is damaged."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as made:
        for mutate in (damage, SAFETENSORS[0].mutate):
            SAFETENSORS[0].run(the_guard(), mutate(save(state), chance), Path(made))


@EXAMPLES
@given(STATES, st.integers(0, 2**32), st.sampled_from([2, 4]))
def test_damaged_pickles_end_in_the_same_or_in_an_error(
    state: dict[str, torch.Tensor], seed: int, protocol: int
) -> None:
    """Whatever opcode is another."""
    chance = random.Random(seed)
    records = [
        Record(r.name, mutate_pickle(r.data, chance) if r.name.endswith(b".pkl") else r.data)
        for r in read_records(saved({"state_dict": state}, protocol)) or []
    ]
    with tempfile.TemporaryDirectory() as made:
        file = Path(made) / "pytorch_model.bin"
        data = write_records(records)
        file.write_bytes(data)
        found = the_guard().run(
            lambda: (lowmem.inspect(file), dict(lowmem.stream(file))), size=len(data), read=file.parent
        )
        if found is not None:
            check_pickled(file, found[0].opened, found[1], found[0].unreadable.keys())
