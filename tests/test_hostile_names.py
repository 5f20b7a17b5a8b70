"""Names that steer a terminal, look like others, or have no end: never printed raw, never at full length."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from hostile_ways import SOUND, STEERING, folder_of, safetensors, tried

from lowmem import LowmemError, _terminal, inspect
from lowmem.errors import BudgetError, OptionError, OutOfMemoryError

linux = pytest.mark.skipif(sys.platform != "linux", reason="memory and files are looked at as Linux has them")
NAMES = {
    "CSI": "a\x1b[2J\x1b[31m",
    "OSC": "a\x1b]52;c;aGk=\x07\x1b]8;;http://x\x07",
    "C1": "a\x9b31m\x9d0;x\x9c",
    "back": "a\b\b\b\rlowmem: fine",
    "a line": "a\nlowmem: fine\nwarning: none",
    "bidi": "a\u202eb\u2066c\u200f",
    "no width": "a\u200b\ufeff",
    "separators": "a\u2028b\u2029c",
    "delete": "a\x7fb",
    "NUL": "a\0b",
    "markup": "[red]a[/red][/]",
    "4,096 characters": "a" * 4096,
    "above": "../../a",
    "absolute": "/etc/passwd",
    "reserved elsewhere": "CON",
    "a lookalike": "w\u0435ight",
}


@linux
@pytest.mark.parametrize("name", NAMES)
def test_names_in_a_header_are_never_printed_raw(name: str, tmp_path: Path) -> None:
    """As a tensor, beside it in another case, as metadata, and as the name of a shard."""
    key = NAMES[name]
    table = {**SOUND, key: {"dtype": "U8", "shape": [2], "data_offsets": [36, 38]}}
    table |= {key.upper() + "A": {"dtype": "U8", "shape": [1], "data_offsets": [38, 39]}}
    table |= {"__metadata__": {key: key}}
    for way, came in tried(
        folder_of(tmp_path / "one", safetensors(table, bytes(39))),
        ways=["inspect", "plan", "diff", "convert", "lowmem plan", "lowmem diff", "lowmem load", "lowmem check"],
        model="linear",
    ).items():
        assert not any(line.startswith("lowmem: fine") for line in came["text"].splitlines()), (way, came)
    shard = key.replace("/", "_").replace("\0", "_").replace(".", "_")[:200] + ".safetensors"
    folder = folder_of(tmp_path / "many", safetensors(SOUND), shard)
    folder_of(folder, safetensors(SOUND), "stray.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": shard}}))
    for came in tried(folder, ways=["inspect", "lowmem inspect", "lowmem check"], model="linear").values():
        assert not any(line.startswith(("lowmem: fine", "warning: none")) for line in came["text"].splitlines())


@pytest.mark.parametrize("name", NAMES)
def test_names_in_a_pickle_are_never_in_an_error_raw(name: str, tmp_path: Path) -> None:
    file = tmp_path / "a.pt"
    torch.save({NAMES[name]: {"weight": torch.ones(2)}, NAMES[name] + "2": {"weight": torch.ones(2)}}, file)
    with pytest.raises(LowmemError) as caught:
        inspect(file, weights="nothing")
    assert not STEERING & set(str(caught.value))
    assert len(str(caught.value)) < 7000


@pytest.mark.parametrize("kind", [LowmemError, OptionError, OutOfMemoryError])
def test_no_error_has_a_text_without_end_or_one_that_steers(kind: type[LowmemError]) -> None:
    """The end stays, for it has the remedy."""
    error = kind("model: " + "a\x1b" * 100_000 + "; give another")
    assert len(str(error)) < 6200
    assert str(error).startswith("model: ")
    assert str(error).endswith("; give another")
    assert "characters left out" in str(error)
    assert not STEERING & set(str(error))


def test_what_steers_is_escaped_in_errors_as_in_a_repr() -> None:
    text = str(LowmemError("a\x1b[2J\x9b\u202e\u00e9\n\tb"))
    assert text == "a\\x1b[2J\\x9b\\u202e\u00e9\n\tb"
    assert str(BudgetError("a\x07", required=2, limit=1)) == "a\\x07"


def test_messages_of_the_shell_look_like_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    """A name with a new line begins no message of its own."""
    _terminal.warn(["odd\nlowmem: fine\nwarning: none", "x\x1b[2J" + "long " * 10_000])
    said = capsys.readouterr().err
    assert [line[:10] for line in said.splitlines()][:3] == ["warning: o", " lowmem: f", " warning: "]
    assert len(said) < 8000
    assert "\x1b" not in said


def test_json_and_generated_text_steer_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _terminal.print_json({"a\x7f\x9b\u202e": "\x7f\x1b"})
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"a\x7f\x9b\u202e": "\x7f\x1b"}
    assert not STEERING & set(printed)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    _terminal.write_text("a\x1b\u202eb\u200dc")
    assert capsys.readouterr().out == "a\ufffd\ufffdb\u200dc"
