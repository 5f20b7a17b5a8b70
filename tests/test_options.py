"""Bad values: every option refuses them with an `OptionError` that says what it expects."""

from __future__ import annotations

import inspect
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lowmem
from lowmem import memory
from lowmem._mounts import memory_file_system
from lowmem.demo import run_demo
from lowmem.dtypes import parse_dtype
from lowmem.errors import MeasureError, OptionError, PlacementError
from lowmem.planner.devices import device_name, parse_device_map, parse_max_memory
from lowmem.planner.request import make_request, parse_folder
from lowmem.sizes import shown


class Mute:
    """Cannot be printed."""

    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


HUGE = pytest.param(10**5000, id="huge")
LONG = "cuda:" + "9" * 5000
ODD = [Mute(), 10**5000, -(10**5000), LONG, "\ud800", "\0", b"cpu", object(), [Mute()], {"a": 10**5000}, float("nan")]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file({"weight": torch.ones(3, 2), "bias": torch.zeros(3)}, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def linear() -> nn.Module:
    return nn.Linear(2, 3)


@pytest.mark.parametrize(
    ("verb", "option", "nearest"),
    [
        ("plan", "devicemap", "device_map"),
        ("plan", "trust_remote", "trust_remote_code"),
        ("plan", "progress", None),
        ("load", "devicemap", "device_map"),
        ("load", "Progress", "progress"),
        ("stream", "devise", "device"),
        ("stream", "device_map", "device"),
        ("stream", "ram", None),
        ("stream", "zzz", None),
    ],
)
def test_an_unknown_option_names_the_verb_and_the_nearest_option(
    verb: str, option: str, nearest: str | None, file: Path
) -> None:
    with pytest.raises(TypeError) as refused:
        getattr(lowmem, verb)(file, **{option: 1})
    elsewhere = "; what is an attribute of the model's config goes into model_kwargs=" if verb != "stream" else ""
    hint = f". Did you mean {nearest!r}?" if nearest else elsewhere
    assert str(refused.value) == f"{verb}() got an unexpected keyword argument {option!r}{hint}"


@pytest.mark.parametrize("verb", ["plan", "load", "diff"])
def test_an_attribute_of_a_config_is_told_where_it_goes(verb: str, file: Path) -> None:
    with pytest.raises(
        TypeError, match=r"'num_labels'; what is an attribute of the model's config goes into model_kwargs="
    ):
        getattr(lowmem, verb)(file, num_labels=3)


@pytest.mark.parametrize("verb", ["plan", "load", "stream"])
def test_other_wrong_calls_are_told_in_pythons_own_words(verb: str) -> None:
    function = getattr(lowmem, verb)
    with pytest.raises(TypeError, match=rf"^{verb}\(\) missing 1 required positional argument: 'source'"):
        function()
    assert (function.__name__, next(iter(inspect.signature(function).parameters))) == (verb, "source")


@pytest.mark.parametrize("option", ["strict", "trust_remote_code"])
@pytest.mark.parametrize("value", ["no", "false", 0, 1, None, Mute()])
def test_a_flag_is_true_or_false_and_nothing_else(option: str, value: object, file: Path) -> None:
    for verb in (lowmem.load, lowmem.plan):
        with pytest.raises(OptionError, match=f"^{option}: expected True or False"):
            verb(file, model=linear, **{option: value})


def test_progress_is_checked_before_anything_is_built(file: Path) -> None:
    built: list[int] = []

    def make() -> nn.Module:
        built.append(1)
        return linear()

    with pytest.raises(OptionError, match=r"^progress: expected a function.*found 'yes'"):
        lowmem.load(file, model=make, progress="yes")  # type: ignore[arg-type]
    assert built == []


@pytest.mark.parametrize("option", ["keep_fp32", "no_split"])
@pytest.mark.parametrize(
    "value", [3, True, Path("a"), torch.device("cpu"), {"a": 1}, b"ab", bytearray(b"a"), [1], [""], ""]
)
def test_names_are_texts(option: str, value: object) -> None:
    with pytest.raises(OptionError, match=f"^{option}: expected"):
        make_request(**{option: value})  # type: ignore[arg-type]


def test_names_come_alone_in_a_list_or_not_at_all() -> None:
    assert make_request(keep_fp32=None).keep_fp32 == ()
    assert make_request(keep_fp32="norm").keep_fp32 == ("norm",)
    assert make_request(keep_fp32=(n for n in "ab")).keep_fp32 == ("a", "b")
    assert make_request(no_split=None).no_split is None
    assert make_request(no_split=[]).no_split == ()


@pytest.mark.parametrize("value", [3, True, ["a"], Mute(), "", "a\0b", "\ud800", "caf\udce9", "~no-such-user-here/x"])
def test_an_offload_folder_is_a_path(value: Any) -> None:
    with pytest.raises(OptionError, match=r"^offload_folder: expected the path of a folder"):
        make_request(offload_folder=value)


def test_an_offload_folder_is_absolute_and_knows_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert parse_folder("~/off", "x") == tmp_path / "home/off"
    assert parse_folder(Path("not/there/yet"), "x") == tmp_path / "not/there/yet"


def test_an_offload_folder_in_a_loop_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for path in (tmp_path / "a", tmp_path / "a/below"):
        with pytest.raises(OptionError, match=r"^offload_folder: .* cannot be followed"):
            make_request(offload_folder=path)
        assert memory_file_system(path) in (None, "tmpfs", "ramfs")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep the current folder")
def test_without_a_current_folder_a_relative_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(OptionError, match=r"^offload_folder: 'off' cannot be followed"):
        make_request(offload_folder="off")
    assert memory_file_system(Path("off")) is None
    assert make_request(offload_folder=tmp_path).offload_folder == tmp_path


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"disk": "1GiB", "cpu": "1GiB"}, "leave 'disk' out"),
        ({"cpu": 1, "cpu:0": 2}, "'cpu:0' is cpu, which is there already"),
        ({0: 1, "cuda": 2}, "'cuda' is cuda:0"),
        ({"cpu": -1}, r"\['cpu'\]: expected a size"),
        ({"cpu": -0.5}, "expected a size"),
        ({"cpu": float("nan")}, "expected a size"),
        ({"cpu": float("inf")}, "expected a size"),
        ({"cpu": 10**5000}, "expected a size"),
        ({Mute(): 1}, "expected a device"),
        ([("cpu", 1)], "expected a mapping"),
        pytest.param(10**5000, "expected a mapping", id="huge"),
    ],
)
def test_max_memory_gives_each_device_one_size(value: Any, said: str) -> None:
    with pytest.raises(OptionError, match=f"^max_memory.*{said}"):
        parse_max_memory(value)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (0, "cuda:0"),
        ("7", "cuda:7"),
        ("cuda", "cuda:0"),
        ("xpu:1", "xpu:1"),
        ("mps:0", "mps"),
        (torch.device("cpu"), "cpu"),
    ],
)
def test_a_device_can_be_said_in_several_ways(value: object, name: str) -> None:
    assert device_name(value) == name


@pytest.mark.parametrize(
    "value", ["cuda:", "cuda:128", "cuda:-1", "cuda:٣", "٣", "mps:1", "meta", "", -1, 0.0, True, None]
)
def test_anything_else_is_no_device(value: object) -> None:
    with pytest.raises(OptionError, match="expected a device"):
        device_name(value)


@pytest.mark.parametrize("value", ODD, ids=lambda v: type(v).__name__)
@pytest.mark.parametrize(
    "option", ["dtype", "device_map", "max_memory", "ram", "residency", "staging", "strict", "keep_fp32", "no_split"]
)
def test_odd_values_are_refused_in_a_short_message(option: str, value: Any) -> None:
    if option in ("keep_fp32", "no_split") and isinstance(value, str):
        pytest.skip("any text is a name")
    with pytest.raises(OptionError) as caught:
        make_request(**{option: value})
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("value", ODD, ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("option", ["quantize", "skip_modules", "dequantize", "int8_threshold"])
def test_odd_values_about_int8_are_refused_in_a_short_message(option: str, value: Any) -> None:
    if option == "skip_modules" and isinstance(value, str):
        pytest.skip("any text is a name")
    with pytest.raises(OptionError, match=f"^{option}: expected") as caught:
        make_request(**{"quantize": "int8" if option == "skip_modules" else None, option: value})
    assert len(str(caught.value)) < 500


def test_what_is_said_of_int8_must_agree() -> None:
    asked = make_request(quantize="int8", skip_modules="lm_head", int8_threshold=0).int8
    assert (asked.quantize, asked.skip_modules, asked.dequantize, asked.threshold) == (True, ("lm_head",), False, 0.0)
    assert make_request(quantize="int8").int8.skip_modules is None
    for options in ({"skip_modules": ["a"]}, {"quantize": "int8", "dequantize": True}, {"quantize": "int4"}):
        with pytest.raises(OptionError, match=r"^(skip_modules|quantize)"):
            make_request(**options)  # type: ignore[arg-type]
    for threshold in (-1, True, "6", float("inf")):
        with pytest.raises(OptionError, match=r"^int8_threshold: expected a number, 0 or more"):
            make_request(int8_threshold=threshold)  # type: ignore[arg-type]


def test_what_is_shown_is_short_and_always_there() -> None:
    assert shown("a") == "'a'"
    assert shown(Mute()).startswith(("<Mute", "a Mute"))
    assert "int" in shown(10**5000)
    assert all(len(shown(value)) <= 200 for value in (*ODD, "x" * 10**6, list(range(10**5)), [["y" * 999] * 99] * 99))
    with pytest.raises(OptionError):
        parse_dtype(Mute())
    with pytest.raises(OptionError):
        parse_device_map({"m" * 5000: Mute()})


@pytest.mark.parametrize("device", ["xpu:0", "npu:0", "mps", "cuda:99"])
def test_a_load_refuses_an_accelerator_that_is_not_here(device: str, file: Path) -> None:
    module = torch.backends.mps if device == "mps" else getattr(torch, device.partition(":")[0], None)
    if device != "cuda:99" and module is not None and module.is_available():
        pytest.skip(f"{device} is here")
    assert lowmem.plan(file, model=linear, device_map=device).devices
    with pytest.raises(PlacementError, match=f"^device_map: {device} is not on this machine"):
        lowmem.load(file, model=linear, device_map=device)


def test_an_empty_device_map_is_told_what_to_add(file: Path) -> None:
    with pytest.raises(PlacementError, match=r"add '' \(the whole model\) to the map$"):
        lowmem.plan(file, model=linear, device_map={})


@pytest.mark.parametrize("value", [0, -1, 3601, HUGE, float("nan"), float("inf"), "1", None, True, Mute()])
def test_an_interval_is_some_seconds(value: Any) -> None:
    with pytest.raises(OptionError, match=r"^interval: expected seconds"):
        memory.measure(interval=value)
    with pytest.raises(OptionError, match=r"^interval: expected seconds"):
        memory.measure_command(["true"], value)


@pytest.mark.parametrize("command", [[1], b"ls", None, 7, ["ls", None], Mute(), {"ls": 1}])
def test_a_command_is_a_list_of_words(command: Any) -> None:
    with pytest.raises(OptionError, match="as a list"):
        memory.measure_command(command)


def test_a_command_with_a_nul_cannot_be_started() -> None:
    with pytest.raises(MeasureError, match="cannot be started"):
        memory.measure_command(["true", "\0"])


def test_a_long_interval_does_not_outlast_the_command() -> None:
    started = time.monotonic()
    code, _ = memory.measure_command([sys.executable, "-c", "raise SystemExit(3)"], 60.0)
    assert code == 3
    assert time.monotonic() - started < 30


def ignore(_: object) -> None:
    pass


@pytest.mark.parametrize("value", [0, -1, True, "4", 1.5, HUGE])
def test_the_demos_tokens_are_a_number(value: Any) -> None:
    with pytest.raises(OptionError, match=r"^tokens: expected a number from 1"):
        run_demo(tokens=value, say=ignore)


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/lowmem", ""])
def test_the_demo_needs_a_folder_that_it_can_write(place: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match=r"^folder: "):
        run_demo(folder=str(tmp_path / place) if place else place, say=ignore)


def test_the_demo_does_not_fill_the_disk(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(OptionError, match=r"^size: .* do not fit in"):
        run_demo(size="1000000TiB", folder=str(tmp_path), say=ignore)
    assert list(tmp_path.iterdir()) == []
