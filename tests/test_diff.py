"""The difference of keys in few lines, and rules that mend it when they are pasted, as for ConvNeXt-V2."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_keys import Inside, Net, assert_state, made, pasted, state_of, write
from torch import nn

import lowmem
from lowmem.checkpoint import inspect
from lowmem.cli import main
from lowmem.errors import KeysError
from lowmem.mapping import KeyDiff, KeyRules, diff_of, match
from lowmem.mapping.groups import group_names
from lowmem.mapping.suggest import candidates
from lowmem.modeling.skeleton import Origin, make_skeleton

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTHS, DEPTHS = (4, 6, 8, 10), (3, 3, 4, 1)


class GRN(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(shape))
        self.beta = nn.Parameter(torch.empty(shape))


class ConvNeXtBlock(nn.Module):
    """Of ConvNeXt-V2, `facebookresearch/ConvNeXt-V2/models/convnextv2.py`, or as mmpretrain names it."""

    def __init__(self, width: int, mm: bool, flat: bool) -> None:
        super().__init__()
        depth, point = ("depthwise_conv", "pointwise_conv") if mm else ("dwconv", "pwconv")
        self.add_module(depth, nn.Conv2d(width, width, 7, groups=width))
        self.norm = nn.LayerNorm(width)
        self.add_module(f"{point}1", nn.Linear(width, 4 * width))
        self.grn = GRN((4 * width,) if flat else (1, 1, 1, 4 * width))
        self.add_module(f"{point}2", nn.Linear(4 * width, width))


class ConvNeXt(nn.Module):
    """Official by default. mmpretrain: other names in the blocks, `norm3` for the last norm, and GRN of shape (C,)."""

    def __init__(self, mm: bool = False, flat: bool = False, head: bool = True) -> None:
        super().__init__()
        self.downsample_layers = nn.ModuleList([nn.Sequential(nn.Conv2d(3, WIDTHS[0], 4), nn.LayerNorm(WIDTHS[0]))])
        for a, b in itertools.pairwise(WIDTHS):
            self.downsample_layers.append(nn.Sequential(nn.LayerNorm(a), nn.Conv2d(a, b, 2)))
        self.stages = nn.ModuleList(
            nn.Sequential(*[ConvNeXtBlock(width, mm, flat) for _ in range(depth)])
            for width, depth in zip(WIDTHS, DEPTHS, strict=True)
        )
        self.add_module("norm3" if mm else "norm", nn.LayerNorm(WIDTHS[-1]))
        if head:
            self.head = nn.Linear(WIDTHS[-1], 5)


class Classifier(nn.Module):
    """mmpretrain's."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = ConvNeXt(mm=True, flat=True, head=False)
        self.head = nn.Module()
        self.head.add_module("fc", nn.Linear(WIDTHS[-1], 5))


def as_mmpretrain(name: str) -> str:
    if name.startswith("head."):
        return name.replace("head.", "head.fc.")
    name = name.replace("dwconv", "depthwise_conv").replace("pwconv", "pointwise_conv")
    return "backbone." + re.sub(r"^norm\.", "norm3.", name)


def official() -> dict[str, torch.Tensor]:
    return state_of(ConvNeXt)


def in_mmpretrain(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {as_mmpretrain(k): v.flatten() if ".grn." in k else v for k, v in state.items()}


def headless() -> nn.Module:
    return ConvNeXt(mm=True, flat=True, head=False)


def mm_backbone() -> dict[str, torch.Tensor]:
    state = in_mmpretrain(official())
    return {k.removeprefix("backbone."): v for k, v in state.items() if not k.startswith("head.")}


STORY: list[tuple[str, Callable[[], Any], Callable[[], nn.Module], Callable[[], Any], list[str]]] = [
    ("official into mmpretrain's", official, Classifier, lambda: in_mmpretrain(official()), ["rename", "reshape"]),
    ("mmpretrain's into official", lambda: in_mmpretrain(official()), ConvNeXt, official, ["rename", "reshape"]),
    ("GRN of another shape", official, lambda: ConvNeXt(flat=True), lambda: flat(official()), ["reshape"]),
    ("GRN back", lambda: flat(official()), ConvNeXt, official, ["reshape"]),
    (
        "official into a backbone",
        official,
        headless,
        mm_backbone,
        ["rename", "reshape"],
    ),
    ("the backbone", lambda: in_mmpretrain(official()), headless, mm_backbone, []),
    ("official", official, ConvNeXt, official, []),
    ("wrapped", lambda: {f"module.{k}": v for k, v in official().items()}, ConvNeXt, official, []),
]


def flat(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.flatten() if ".grn." in k else v for k, v in state.items()}


@pytest.mark.parametrize(("name", "source", "make", "expected", "needed"), STORY, ids=[row[0] for row in STORY])
def test_convnext_v2_ends_in_a_load_or_in_the_rule_to_paste(
    name: str, source: Any, make: Any, expected: Any, needed: list[str], tmp_path: Path
) -> None:
    """The message's rule, evaluated as Python, loads bit for bit."""
    path = write(source(), tmp_path / "convnextv2.safetensors")
    options: dict[str, Any] = {}
    if needed:
        with pytest.raises(KeysError) as caught:
            lowmem.load(path, model=make)
        options = pasted(str(caught.value))
        assert sorted(options) == needed
        assert len(str(caught.value).splitlines()) < 26
        with pytest.raises(KeysError):
            # Nothing of it is done behind the user's back, and next to nothing is no load.
            lowmem.load(path, model=make, **{key: options[key] for key in needed[1:]})
    model = lowmem.load(path, model=make, **options).model
    assert_state(model, expected())


@pytest.mark.parametrize(
    "rename",
    [
        {"^blocks": "layers", r"\bup\b": "fc1", r"\bdown\b": "fc2"},
        {r"^": "encoder.vit."},
        {r"^blocks\.(\d+)\.up": r"mlp.\1.inner.up", "^stem": "patch_embed.proj"},
        {r"^(blocks)\.(\d+)\.norm": r"\1.\2.norm_layer"},
        {r"^head": "classifier.1"},
        {r"weight$": "w", r"bias$": "b"},
        {r"^blocks\.0": "first", r"^blocks\.1": "second", r"^blocks\.2": "third"},
    ],
)
@pytest.mark.parametrize("prefix", ["", "module.", "teacher."])
def test_the_rule_for_another_naming_loads(rename: dict[str, str], prefix: str, tmp_path: Path) -> None:
    """One that `re.sub` made: the message has one that undoes it, together with what evidence finds."""
    state = state_of(Net)
    other = {}
    for key, value in state.items():
        new = key
        for old, replacement in rename.items():
            new = re.sub(old, replacement, new)
        other[prefix + new] = value
    path = write(other, tmp_path / "w.safetensors")
    try:
        model = lowmem.load(path, model=Net).model
    except KeysError as error:
        model = lowmem.load(path, model=Net, **pasted(str(error))).model
    assert_state(model, state)


def test_a_sequence_without_names_gets_them(tmp_path: Path) -> None:
    """Numbers in the file for what has names in the model."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.norm = nn.BatchNorm2d(4)
            self.out = nn.Linear(4, 6)

    state = state_of(Named)
    numbers = {"conv": "0", "norm": "1", "out": "4"}
    other = {re.sub(r"^\w+", lambda m: numbers[m[0]], key): value for key, value in state.items()}
    path = write(other, tmp_path / "w.safetensors")
    with pytest.raises(KeysError) as caught:
        lowmem.load(path, model=Named)
    assert_state(lowmem.load(path, model=Named, **pasted(str(caught.value))).model, state)


def test_the_users_own_rules_are_part_of_the_pasted_one(tmp_path: Path) -> None:
    state = state_of(Net)
    other = {k.replace("blocks", "layers").replace("up", "fc1"): v for k, v in state.items()}
    path = write(other, tmp_path / "w.safetensors")
    for own in ({"^layers": "blocks"}, lambda key: re.sub("^layers", "blocks", key)):
        options: dict[str, Any] = {"rename": own, "skip": "stem.bias"}
        with pytest.raises(KeysError) as caught:
            lowmem.load(path, model=Net, **options)
        rule = pasted(str(caught.value))["rename"]
        options["rename"] = [own, rule] if callable(own) else rule
        assert ("after your own functions" in str(caught.value)) == callable(own)
        lowmem.load(path, model=Net, **options)


def test_a_rule_is_not_offered_that_would_take_from_what_is_fed(tmp_path: Path) -> None:
    """The one key left over resembles the one tensor missing in nothing but its shape."""
    state = state_of(Net)
    other = {k: v for k, v in state.items() if k != "stem.weight"} | {"zzz": torch.ones(9)}
    path = write(other, tmp_path / "w.safetensors")
    with pytest.raises(KeysError) as caught:
        lowmem.load(path, model=Net)
    assert "rename=" not in str(caught.value)


def test_a_rule_is_not_offered_where_neither_shapes_nor_names_tell() -> None:
    """A guess that loads the wrong tensor is worse than none."""
    alike = {f"block.{i}.{n}.weight": (4, 4) for i in range(3) for n in ("x", "y")}
    diff = difference({k.replace(".x.", ".one.").replace(".y.", ".two."): s for k, s in alike.items()}, alike)
    assert diff.rules == ()
    assert not diff.rename


def resnet() -> dict[str, tuple[int, ...]]:
    """Names of torchvision's resnet50."""
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(name: str, width: int) -> None:
        shapes.update({f"{name}.{leaf}": (width,) for leaf in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{name}.num_batches_tracked"] = ()

    before = 64
    for i, (depth, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), 1):
        for j in range(depth):
            at = f"layer{i}.{j}"
            sizes = [(width, before, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            for k, size in enumerate(sizes, 1):
                shapes[f"{at}.conv{k}.weight"] = size
                norm(f"{at}.bn{k}", size[0])
            if not j:
                shapes[f"{at}.downsample.0.weight"] = (4 * width, before, 1, 1)
                norm(f"{at}.downsample.1", 4 * width)
            before = 4 * width
    return shapes


def as_transformers(name: str) -> str:
    """Numbers that begin at another number: no regular expression for all, and siblings of equal shapes."""
    name = re.sub(r"^layer(\d)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.", name)
    name = re.sub(r"conv(\d)\.", lambda m: f"layer.{int(m[1]) - 1}.convolution.", name)
    name = re.sub(r"bn(\d)\.", lambda m: f"layer.{int(m[1]) - 1}.normalization.", name)
    return name.replace("downsample.0", "shortcut.convolution").replace("downsample.1", "shortcut.normalization")


@pytest.mark.parametrize("back", [False, True])
def test_what_is_offered_for_another_architectures_names_is_right_or_nothing(back: bool) -> None:
    shapes = resnet()
    table = {name: as_transformers(name) for name in shapes}
    new = {table[name]: shape for name, shape in shapes.items()}
    keys, model = (new, shapes) if back else (shapes, new)
    origin = table if back else {b: a for a, b in table.items()}
    keys = dict(sorted(keys.items()))
    diff = difference(keys, model)
    assert len(diff.text().splitlines()) < 32
    checkpoint, skeleton = made(keys, model)
    rules = KeyRules(rename=tuple((re.compile(a), b) for a, b in diff.rename.items()))
    links = match(checkpoint, skeleton, rules=rules).links
    assert {link.target: link.entry.key for link in links} == {link.target: origin[link.target] for link in links}


def difference(keys: dict[str, tuple[int, ...]], model: dict[str, tuple[int, ...]], **rules: Any) -> KeyDiff:
    checkpoint, skeleton = made(keys, model)
    return diff_of(match(checkpoint, skeleton, rules=KeyRules(**rules)), checkpoint, skeleton)


def test_four_hundred_names_become_a_few_lines() -> None:
    """Ranges where numbers follow each other, sets where not, and one line for a module's weight and bias."""
    layers = [i for i in range(32) if i != 30]
    model = {f"layers.{i}.{m}.{leaf}": (8,) for i in range(32) for m in "abcdef" for leaf in ("weight", "bias")}
    model |= {f"layers.{i}.moe.{j}.w": (3, 3) for i in layers for j in (0, 2, 5)}
    diff = difference({"x": (1,)}, model)
    patterns = [group.pattern for group in diff.groups if group.kind == "missing"]
    listed = ",".join(map(str, layers))
    assert patterns == [
        *(f"layers.{{0..31}}.{m}.{{weight,bias}}" for m in "abcdef"),
        f"layers.{{{listed}}}.moe.{{0,2,5}}.w",
    ]
    assert [len(group.names) for group in diff.groups] == [64] * 6 + [93, 1]
    assert sum(len(line) for line in diff.text().splitlines()) < 1200
    assert len(diff.text().splitlines()) < 12


def test_partners_are_told_by_shape_then_by_name() -> None:
    keys = {f"m.{i}.{n}_lin": s for i in range(4) for n, s in (("k", (2, 4)), ("o", (4, 4)), ("q", (4, 4)))}
    model = {f"h.{i}.{n}_proj": s for i in range(4) for n, s in (("q", (4, 4)), ("k", (2, 4)), ("o", (4, 4)))}
    diff = difference(keys, model)
    partners = {group.pattern: group.partner for group in diff.groups}
    assert partners == {
        **{f"h.{{0..3}}.{n}_proj": f"m.{{0..3}}.{n}_lin" for n in "qko"},
        **{f"m.{{0..3}}.{n}_lin": f"h.{{0..3}}.{n}_proj" for n in "qko"},
    }
    assert diff.mended == 12


def test_the_record_says_everything_in_plain_values() -> None:
    diff = difference({"a": (2,), "b.x": (1, 3), "c": (5,)}, {"a": (2,), "b.x": (3,), "d": (5,)})
    assert diff.matched == 1
    assert not diff.is_empty
    assert diff.missing == ("d",)
    assert diff.unexpected == ("c",)
    assert (diff.mismatched[0].found, diff.mismatched[0].expected, diff.mismatched[0].dtype) == (
        (1, 3),
        (3,),
        "float32",
    )
    assert diff.rename == {"^c\\b": "d"} or diff.rename
    assert len(diff.reshape) == 1
    assert diff.mended == 2
    plain = json.loads(json.dumps(diff.to_dict()))
    assert plain["mismatched"] == [
        {"key": "b.x", "target": "b.x", "found": [1, 3], "expected": [3], "dtype": "float32"}
    ]
    assert plain["groups"][0]["kind"] == "mismatched"
    assert "'b.x': expected [3], found [1, 3] float32" in diff.text()


def test_no_difference_is_empty() -> None:
    diff = difference({"a": (2,)}, {"a": (2,)})
    assert diff.is_empty
    assert diff.text() == "no difference: 1 tensors match"
    more = difference({"a": (2,), "b": (3,)}, {"a": (2,)})
    assert not more.is_empty
    assert more.text() == "1 keys of the checkpoint are not in the model: 'b'"


def test_names_with_braces_and_quotes_are_names() -> None:
    diff = difference({'{x}."q"': (2,), "{0}.w": (3,)}, {'{y}."q"': (2,), "{1}.w": (3,)})
    assert {group.pattern for group in diff.groups} == {'{x}."q"', "{0}.w", '{y}."q"', "{1}.w"}
    assert eval(f"dict({', '.join(diff.rules)})")["rename"] == dict(diff.rename)


@given(names=st.lists(st.from_regex(r"[a-c{}]{1,2}(\.([a-c]|\d{1,2})){0,3}", fullmatch=True), unique=True))
def test_every_name_is_in_one_group(names: list[str]) -> None:
    groups = group_names(dict.fromkeys(names, (1,)))
    # 01 and 1 are one number and two names.
    found = [name for group in groups for name in group.names]
    assert sorted(found) == sorted(names)


@given(a=st.lists(st.sampled_from(["a", "b", "0", "1", "x-y", "w"]), min_size=1, max_size=4), b=st.data())
def test_a_candidate_makes_the_one_name_of_the_other(a: list[str], b: st.DataObject) -> None:
    other = b.draw(st.lists(st.sampled_from(["a", "b", "0", "1", "z.z", "w"]), min_size=1, max_size=4))
    name, target = ".".join(a), ".".join(other)
    if name == target:
        return
    for rule in candidates(name, target):
        assert re.sub(rule.pattern.pattern, rule.replacement, name) == target


def test_a_large_difference_costs_in_proportion_to_the_names() -> None:
    """Names of which none fits by name; calls are counted, so that no clock decides."""

    def names(size: int, front: str, leaf: str) -> dict[str, tuple[int, ...]]:
        return {f"{front}.{i}.{m}.{leaf}": (m + 2,) for i in range(size) for m in range(20)}

    def cost(size: int) -> int:
        count = 0

        def count_calls(frame: object, event: str, argument: object) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        checkpoint, skeleton = made(names(size, "layers", "w"), names(size, "blocks", "weight"))
        sys.setprofile(count_calls)
        try:
            diff = diff_of(match(checkpoint, skeleton), checkpoint, skeleton)
        finally:
            sys.setprofile(None)
        assert diff.mended == size * 20
        assert len(diff.rename) <= 2
        return count

    cost(10)
    assert cost(200) < 2.6 * cost(100)


def test_the_diff_of_a_real_checkpoint_is_that_of_the_load(tmp_path: Path) -> None:
    path = write(state_of(Inside), tmp_path / "w.safetensors")
    checkpoint = inspect(path)
    skeleton = make_skeleton(Origin(Net), checkpoint, "auto")
    mapping = match(checkpoint, skeleton)
    diff = diff_of(mapping, checkpoint, skeleton)
    assert diff.unexpected == mapping.unexpected == ("neck.bias", "neck.weight")
    assert diff.steps == mapping.steps
    assert diff_of(replace(mapping, diff=diff), checkpoint, skeleton) is diff


def test_the_shell_shows_lines_and_a_rule_that_it_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shell_net.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(*(nn.Linear(n + 2, n + 3) for n in range(4)))\n"
    )
    monkeypatch.chdir(tmp_path)
    state = {
        f"odd.{n}.{leaf}": torch.ones(n + 3, *([n + 2] if leaf == "weight" else []))
        for n in range(4)
        for leaf in ("weight", "bias")
    }
    write({key.replace("odd.", "layer="): value for key, value in state.items()}, tmp_path / "w.safetensors")
    assert main(["diff", "w.safetensors", "--model", "shell_net:net"]) == 1
    out = capsys.readouterr().out
    assert "\N{REPLACEMENT CHARACTER}" not in out
    assert len(out.splitlines()) > 4
    rule = shlex.split(next(line for line in out.splitlines() if line.startswith("--")))
    assert main(["diff", "w.safetensors", "--model", "shell_net:net", *rule]) == 0
