"""Keys that do not match: what the user's rules and evidence make of them, told against torch and transformers."""

from __future__ import annotations

import re
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_models import assert_same_model, every_tensor, same
from torch import nn

import lowmem
from lowmem.checkpoint import Checkpoint, Shard, TensorEntry
from lowmem.errors import KeysError, OptionError, UnsupportedError
from lowmem.mapping import KeyRules, diff_of, match, refuse
from lowmem.modeling.skeleton import Origin, Skeleton, make_skeleton

pytestmark = pytest.mark.usefixtures("one_thread")

State = dict[str, torch.Tensor]


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.up = nn.Linear(size, 2 * size)
        self.down = nn.Linear(2 * size, size)


class Net(nn.Module):
    """Blocks of their own sizes, so that a tensor fits in one place only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.blocks = nn.ModuleList([Block(4), Block(5), Block(6)])
        self.head = nn.Linear(6, 7)


class Inside(nn.Module):
    """The same as a part of something larger."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Net()
        self.neck = nn.Linear(7, 8)


def state_of(make: Callable[[], nn.Module], seed: int = 3) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        for name, tensor in make().state_dict().items()
    }


def write(state: State, path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def loaded(state: State, make: Callable[[], nn.Module], tmp_path: Path, **options: Any) -> lowmem.LoadResult:
    return lowmem.load(write(state, tmp_path / "w.safetensors"), model=make, **options)


def assert_state(model: nn.Module, state: State) -> None:
    found = model.state_dict()
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert same(found[name], tensor), name


# ---- evidence ----


@pytest.mark.parametrize(
    "front",
    [
        "module.",
        "module.module.",
        "_orig_mod.",
        "model.",
        "net.",
        "backbone.",
        "base_model.model.",
        "student.vit.",
        "a-b.",
    ],
)
def test_a_prefix_of_all_keys_is_stripped_and_told(front: str, tmp_path: Path) -> None:
    state = state_of(Net)
    result = loaded({front + k: v for k, v in state.items()}, Net, tmp_path)
    assert_state(result.model, state)
    assert result.plan.mapping.steps == (f"{front!r} was stripped from {len(state)} keys",)
    assert not result.plan.mapping.unexpected


def test_wrappers_in_the_middle_are_left_out(tmp_path: Path) -> None:
    """As activation checkpointing, FSDP and compile of single blocks name them, with DDP around everything."""
    state = state_of(Net)
    middle = re.compile(r"^(blocks\.\d+\.)(up\.)?")

    def wrap(name: str) -> str:
        wrapped = middle.sub(r"\1_checkpoint_wrapped_module._fsdp_wrapped_module._orig_mod.\2", name)
        return f"module._fsdp_wrapped_module.{wrapped}"

    result = loaded({wrap(k): v for k, v in state.items()}, Net, tmp_path)
    assert_state(result.model, state)
    assert len(result.plan.mapping.steps) == 1
    assert "'_checkpoint_wrapped_module.'" in result.plan.mapping.steps[0]


def test_wrappers_of_torch_itself_are_left_out(tmp_path: Path) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    plain = Net()
    wrapped: Any = Net()
    wrapped.load_state_dict(plain.state_dict())
    wrapped.blocks[1] = torch.compile(wrapped.blocks[1])
    wrapped.blocks[2] = torch.compile(checkpoint_wrapper(wrapped.blocks[2]))
    whole: Any = nn.DataParallel(torch.compile(wrapped))  # type: ignore[arg-type]
    keys = list(whole.state_dict())
    assert keys[0].startswith("module._orig_mod.")
    assert any("._orig_mod." in key.removeprefix("module._orig_mod.") for key in keys)
    result = loaded({k: v.clone() for k, v in whole.state_dict().items()}, Net, tmp_path)
    assert_state(result.model, dict(plain.state_dict()))


def test_a_model_whose_own_modules_are_called_so_keeps_its_names(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 3)
            self.inner = nn.ModuleDict({"module": nn.Linear(3, 4)})

    state = state_of(Own)
    result = loaded(state, Own, tmp_path)
    assert_state(result.model, state)
    assert result.plan.mapping.steps == ()
    again = loaded({f"module.{k}": v for k, v in state.items()}, Own, tmp_path)
    assert_state(again.model, state)
    compiled = loaded({k.replace("inner.", "inner._orig_mod."): v for k, v in state.items()}, Own, tmp_path)
    assert_state(compiled.model, state)


def test_a_prefix_that_the_model_has_is_put_before_keys(tmp_path: Path) -> None:
    state = state_of(Net)
    with pytest.raises(KeysError) as caught:
        loaded(state, Inside, tmp_path)
    assert "2 of the model's tensors are not in the checkpoint: 'neck.weight', 'neck.bias'" in str(caught.value)
    result = loaded(state, Inside, tmp_path, strict=False)
    assert result.plan.mapping.steps == (f"'backbone.' was put before {len(state)} keys",)
    assert_state(result.model.backbone, state)
    assert result.plan.mapping.missing == ("neck.weight", "neck.bias")


def test_a_part_of_a_larger_checkpoint_is_found(tmp_path: Path) -> None:
    state = state_of(Inside)
    result = loaded({**state, "ema.decay": torch.ones(())}, Net, tmp_path)
    assert_state(result.model, {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")})
    assert set(result.plan.mapping.unexpected) == {"neck.weight", "neck.bias", "ema.decay"}


def test_keys_that_fit_stay_as_they_are_whatever_else_there_is(tmp_path: Path) -> None:
    """A checkpoint with a second copy under a prefix, the usual way to keep averaged weights."""
    state = state_of(Net)
    ema = {f"module.{k}": v + 1 for k, v in state.items()}
    result = loaded({**ema, **state}, Net, tmp_path)
    assert_state(result.model, state)
    assert result.plan.mapping.steps == ()
    assert len(result.plan.mapping.unexpected) == len(state)


def test_two_keys_that_fall_together_are_an_error_that_names_both(tmp_path: Path) -> None:
    state = state_of(Net)
    twice = {f"module.{k}": v for k, v in state.items()} | {"head.weight": state["head.weight"] + 1}
    with pytest.raises(
        KeysError, match=r"'(module\.)?head\.weight' and tensor '(module\.)?head\.weight' both become"
    ) as e:
        loaded(twice, Net, tmp_path)
    assert "skip=" in str(e.value)
    assert_state(loaded(twice, Net, tmp_path, skip="head.weight", only="module").model, state) if False else None
    result = loaded(twice, Net, tmp_path, only="module")
    assert_state(result.model, state)


def test_two_prefixes_that_serve_as_well_are_no_evidence_for_either(tmp_path: Path) -> None:
    student, teacher = state_of(Net, 1), state_of(Net, 2)
    both = {f"student.{k}": v for k, v in student.items()} | {f"teacher.{k}": v for k, v in teacher.items()}
    for strict in (True, False):
        with pytest.raises(KeysError) as caught:
            loaded(both, Net, tmp_path, strict=strict)
        assert "prefix='student'" in str(caught.value)
        assert "prefix='teacher'" in str(caught.value)
    assert_state(loaded(both, Net, tmp_path, prefix="teacher").model, teacher)


def test_a_prefix_needs_the_shapes_too(tmp_path: Path) -> None:
    state = {f"module.{k}": torch.zeros(*v.shape, 2) for k, v in state_of(Net).items()}
    with pytest.raises(KeysError):
        loaded(state, Net, tmp_path)


def test_a_head_of_another_shape_is_no_hindrance(tmp_path: Path) -> None:
    state = {f"module.{k}": v for k, v in state_of(Net).items()}
    state["module.head.weight"], state["module.head.bias"] = torch.ones(9, 6), torch.ones(9)
    result = loaded(state, Net, tmp_path, ignore_mismatched_sizes=True)
    assert {m.target for m in result.plan.mapping.mismatched} == {"head.weight", "head.bias"}
    assert same(result.model.blocks[2].up.weight, state["module.blocks.2.up.weight"])
    with pytest.raises(KeysError, match="2 tensors have another shape"):
        loaded(state, Net, tmp_path)


def test_gamma_and_beta_of_a_norm_are_its_weight_and_bias(tmp_path: Path) -> None:
    state = state_of(Net)
    old = {k.replace("norm.weight", "norm.gamma").replace("norm.bias", "norm.beta"): v for k, v in state.items()}
    result = loaded(old, Net, tmp_path)
    assert_state(result.model, state)
    assert result.plan.mapping.steps == ("'gamma' and 'beta' were read as 'weight' and 'bias' in 6 keys",)
    wrapped = loaded({f"module.{k}": v for k, v in old.items()}, Net, tmp_path)
    assert_state(wrapped.model, state)


def test_a_parameter_that_only_contains_gamma_keeps_its_name(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4)
            self.gamma = nn.Parameter(torch.ones(4))
            self.gamma_1 = nn.Parameter(torch.ones(4))
            self.beta_net = nn.Linear(4, 4)

    state = state_of(Scaled)
    result = loaded(state, Scaled, tmp_path)
    assert_state(result.model, state)
    assert result.plan.mapping.steps == ()
    # A norm with another's name beside its own is not one of the old.
    odd = {k: v for k, v in state.items() if k != "norm.weight"} | {"norm.gamma_1": state["norm.weight"]}
    with pytest.raises(KeysError):
        loaded(odd, Scaled, tmp_path)


def test_matching_keys_cost_nothing_more() -> None:
    """The search is not even begun, nor when only keys or only tensors are left over."""
    module = sys.modules["lowmem.mapping.linking"]
    checkpoint, skeleton = made({"a": (2,), "b": (3,)}, {"a": (2,), "b": (3,)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "find_evidence", lambda *a: pytest.fail("searched"))
        match(checkpoint, skeleton)
        match(made({"a": (2,), "b": (3,), "c": (4,)}, {})[0], skeleton)
        match(made({"a": (2,)}, {})[0], skeleton)


# ---- transformers ----


@pytest.mark.parametrize(
    "front", ["module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module.", "policy.net."]
)
def test_a_wrapped_llama_is_the_llama(front: str, own: Callable[..., Path]) -> None:
    import transformers

    folder = own("llama", "float32", "1GB")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    rewrite(folder, lambda key: front + key.replace("layers.1.", "layers.1._checkpoint_wrapped_module."))
    result = lowmem.load(folder)
    assert_same_model(result.model, theirs)
    assert result.plan.mapping.steps


def test_a_tied_wrapped_llama_is_the_llama(own: Callable[..., Path]) -> None:
    import transformers

    folder = own("llama-tied", "float32", "1GB")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    rewrite(folder, lambda key: f"module.{key}")
    assert_same_model(lowmem.load(folder).model, theirs)


@pytest.mark.parametrize("front", ["", "module.", "net._orig_mod."])
@pytest.mark.parametrize("old", [False, True])
def test_a_bert_with_old_names_in_both_directions_of_its_prefix(
    front: str, old: bool, own: Callable[..., Path]
) -> None:
    import transformers

    folder = own("bert-mlm", "float32", "1GB")

    def name(key: str) -> str:
        if old:
            key = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        return front + key

    plain = transformers.BertForMaskedLM.from_pretrained(folder)
    base = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False)
    rewrite(folder, name)
    with torch.device("meta"):
        bare = transformers.BertModel(base.config, add_pooling_layer=False)
    assert_same_model(lowmem.load(folder).model, plain)
    # The headless model from the file of the whole one.
    ours: Any = lowmem.load(folder, model=bare).model
    for key, tensor in every_tensor(base).items():
        assert same(every_tensor(ours)[key], tensor), key
    # And the whole one from the file of the headless.
    rewrite(folder, lambda key: key.replace("bert.", ""))
    result = lowmem.load(folder, strict=False)
    found, expected = every_tensor(result.model), every_tensor(plain)
    for key in expected:
        if key.startswith("bert."):
            assert same(found[key], expected[key]), key


def rewrite(folder: Path, name: Callable[[str], str]) -> None:
    from safetensors.torch import load_file

    file = folder / "model.safetensors"
    state = load_file(file)
    save_file({name(key): tensor.clone() for key, tensor in state.items()}, file, {"format": "pt"})


def test_a_llama_of_another_naming_gets_the_rule(own: Callable[..., Path]) -> None:
    """Names that no prefix explains: the message has the rule, and the rule loads."""
    import transformers

    folder = own("llama", "float32", "1GB")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    rewrite(folder, lambda key: key.replace("self_attn", "attention").replace("_proj", "_linear"))
    with pytest.raises(KeysError) as caught:
        lowmem.load(folder)
    assert_same_model(lowmem.load(folder, **pasted(str(caught.value))).model, theirs)


def pasted(text: str) -> dict[str, Any]:
    """The options that a message offers, evaluated as the user's Python would."""
    lines = [line for line in text.splitlines() if re.match(r"(rename|reshape|prefix)=", line)]
    assert lines, text
    options: dict[str, Any] = eval("dict(" + "\n".join(lines) + ")")
    return options


# ---- the user's rules ----


def test_a_prefix_takes_only_that_part_and_strips_it(tmp_path: Path) -> None:
    state = state_of(Inside)
    for prefix in ("backbone", "backbone."):
        result = loaded(state, Net, tmp_path, prefix=prefix)
        assert_state(
            result.model, {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
        )
        assert result.plan.mapping.unexpected == ()
        assert result.plan.mapping.steps == ()


def test_a_prefix_that_is_not_there_lists_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(KeysError, match=r"prefix='bone'.*'backbone' \(22\), 'neck' \(2\)"):
        loaded(state_of(Inside), Net, tmp_path, prefix="bone")
    deep = {f"module.{k}": v for k, v in state_of(Inside).items()}
    with pytest.raises(KeysError, match=r"try prefix='module\.backbone'"):
        loaded(deep, Net, tmp_path, prefix="backbone")


RENAMES: list[Any] = [
    {r"^layers": "blocks", r"\.fc1\.": ".up."},
    OrderedDict([(r"^layers\.", "b."), (r"^b\.(\d+)\.", r"blocks.\g<1>."), (r"fc1", "up")]),
    lambda key: key.replace("layers", "blocks").replace("fc1", "up"),
    [("layers", "blocks"), lambda key: key.replace("fc1", "up")],
    [{"layers": "blocks"}, ("fc1", "up")],
    {re.compile("LAYERS", re.I): "blocks", "fc1": "up"},
]


@pytest.mark.parametrize("rename", RENAMES)
def test_rules_rename_in_order(rename: Any, tmp_path: Path) -> None:
    state = state_of(Net)
    other = {k.replace("blocks", "layers").replace("up", "fc1"): v for k, v in state.items()}
    result = loaded(other, Net, tmp_path, rename=rename)
    assert_state(result.model, state)
    assert result.plan.mapping.steps == ()
    assert {link.entry.key for link in result.plan.mapping.links} == set(other)


def test_rules_come_before_evidence(tmp_path: Path) -> None:
    state = state_of(Net)
    other = {"module." + k.replace("blocks", "layers"): v for k, v in state.items()}
    assert_state(loaded(other, Net, tmp_path, rename={"layers": "blocks"}).model, state)
    assert_state(loaded(other, Net, tmp_path, rename={r"^module\.layers": "blocks"}).model, state)


def test_names_that_collide_after_renaming_are_an_error(tmp_path: Path) -> None:
    state = state_of(Net) | {"unused": torch.ones(2), "unused_too": torch.ones(2)}
    with pytest.raises(KeysError, match=r"'unused_too' and tensor 'unused' both become 'x'.*skip=\['unused_too'\]"):
        loaded(state, Net, tmp_path, rename={"^unused.*": "x"})
    loaded(state, Net, tmp_path, rename={"^unused.*": "x"}, skip=["unused_too"])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rename": {"(": "x"}}, r"rename: '\(': 'x': the regular expression"),
        ({"rename": {"a": r"\1"}}, r"rename: 'a': '\\\\1': the replacement"),
        ({"rename": {"a": r"\g<b>"}}, "the replacement"),
        ({"rename": {"a": 1}}, "rename: 'a': 1: expected a regular expression"),
        ({"rename": {1: "a"}}, "rename: 1: 'a': expected a regular expression"),
        ({"rename": "a"}, "rename: expected {regex: replacement}, a function"),
        ({"rename": 3}, "rename: expected {regex: replacement}, a function"),
        ({"rename": ["ab"]}, "rename: expected pairs"),
        ({"rename": [("a", "b", "c")]}, "rename: expected pairs"),
        ({"rename": lambda key: None}, "rename: expected the function .*<lambda> to give a name, found None"),
        ({"rename": lambda key: key[1000]}, "rename: the function .*<lambda> failed for .*IndexError"),
        ({"only": lambda key: 1 // 0}, "only: the function .*<lambda> failed for .*ZeroDivisionError"),
        ({"prefix": ""}, "prefix: expected the name of a module"),
        ({"prefix": 3}, "prefix: expected the name of a module"),
        ({"only": 3}, "only: expected a name or a list of names"),
        ({"skip": [""]}, "skip: expected names"),
        ({"reshape": {"a": 1}}, "reshape: expected a name"),
        ({"ignore_mismatched_sizes": "yes"}, "ignore_mismatched_sizes: expected True or False"),
    ],
)
def test_an_option_that_means_nothing_is_refused_by_name(options: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=text.replace("{", r"\{").replace("}", r"\}")):
        loaded(state_of(Net), Net, tmp_path, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"skip": "head"},
        {"skip": ["head.weight", "*ad.bias"]},
        {"skip": lambda key: key.startswith("head")},
        {"only": ["stem", "blocks"]},
        {"only": lambda key: not key.startswith("head")},
        {"only": "*", "skip": "head"},
    ],
)
def test_what_is_left_out_is_not_read_and_not_missed(options: dict[str, Any], tmp_path: Path) -> None:
    """Strict all the same; also under a prefix that evidence strips, for keys are named as the file has them."""
    state = state_of(Net)
    result = loaded(state, Net, tmp_path, residency="copy", **options)
    mapping = result.plan.mapping
    assert mapping.excused == ("head.weight", "head.bias")
    assert mapping.missing == mapping.unexpected == ()
    left = sum(state[name].nbytes for name in mapping.excused)
    assert result.plan.bytes_read == sum(tensor.nbytes for tensor in state.values()) - left
    assert not any(link.entry.key.startswith("head") for link in mapping.links)
    assert result.model.head.weight.std() > 0
    assert not same(result.model.head.weight, state["head.weight"])


def test_what_is_left_out_of_wrapped_keys_is_not_missed(tmp_path: Path) -> None:
    state = {f"module.{k}": v for k, v in state_of(Net).items()}
    result = loaded(state, Net, tmp_path, skip="module.head")
    assert result.plan.mapping.excused == ("head.weight", "head.bias")


def test_what_no_key_would_have_fed_is_still_missed(tmp_path: Path) -> None:
    state = {k: v for k, v in state_of(Net).items() if not k.startswith("stem")}
    with pytest.raises(KeysError, match=r"not in the checkpoint: 'stem\.weight', 'stem\.bias'"):
        loaded(state, Net, tmp_path, skip="head")


def test_a_pattern_that_fits_nothing_is_an_error(tmp_path: Path) -> None:
    for what in ("only", "skip"):
        with pytest.raises(KeysError, match=f"{what}='heat': expected a tensor, a module or a pattern"):
            loaded(state_of(Net), Net, tmp_path, **{what: ["stem", "heat"]})
    with pytest.raises(KeysError, match=r"reshape='heat'.*found no such name in the model"):
        loaded(state_of(Net), Net, tmp_path, reshape="heat")


@pytest.mark.parametrize("options", [{}, {"residency": "copy"}, {"dtype": "bfloat16"}])
def test_reshape_feeds_another_shape_of_as_many_elements(options: dict[str, Any], tmp_path: Path) -> None:
    state = state_of(Net)
    other = {k: v.reshape(-1) if k.startswith("stem") else v for k, v in state.items()}
    with pytest.raises(KeysError, match="1 tensor has another shape"):
        loaded(other, Net, tmp_path, **options)
    model = loaded(other, Net, tmp_path, reshape=["stem"], **options).model
    expected = state if "dtype" not in options else {k: v.bfloat16() for k, v in state.items()}
    assert_state(model, expected)
    # Neither more elements than there are, nor other tensors.
    with pytest.raises(KeysError):
        loaded({**other, "stem.weight": torch.ones(13)}, Net, tmp_path, reshape=["stem"])
    with pytest.raises(KeysError):
        loaded({**other, "head.weight": torch.ones(42)}, Net, tmp_path, reshape=["stem"])


def test_ignore_mismatched_sizes_is_strict_about_the_rest(tmp_path: Path) -> None:
    state = state_of(Net) | {"head.weight": torch.ones(9, 6), "head.bias": torch.ones(9)}
    model = loaded(state, Net, tmp_path, ignore_mismatched_sizes=True).model
    assert model.head.weight.shape == (7, 6)
    assert bool(model.head.weight.isfinite().all())
    del state["stem.bias"]
    with pytest.raises(KeysError, match=r"not in the checkpoint: 'stem\.bias'"):
        loaded(state, Net, tmp_path, ignore_mismatched_sizes=True)


def test_links_stay_in_file_order(tmp_path: Path) -> None:
    state = {f"module.{k}": v for k, v in state_of(Net).items()}
    result = loaded(state, Net, tmp_path, skip="module.stem", rename={"nothing": "else"})
    order = [link.entry.key for link in result.plan.mapping.links]
    assert order == [key for key in result.plan.checkpoint if key in order]


def test_ties_are_settled_by_the_renamed_keys(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 4, bias=False)
            self.b = nn.Linear(3, 4, bias=False)
            self.b.weight = self.a.weight

    values = torch.randn(4, 3)
    model = loaded({"module.a.weight": values, "module.b.weight": values.clone()}, Tied, tmp_path).model
    assert model.a.weight is model.b.weight
    assert same(model.a.weight, values)
    with pytest.raises(KeysError, match=r"'module\.b\.weight' and 'module\.a\.weight' differ"):
        loaded({"module.a.weight": values, "module.b.weight": values + 1}, Tied, tmp_path)


# ---- what cannot be read ----


def made(keys: dict[str, tuple[int, ...]], model: dict[str, tuple[int, ...]]) -> tuple[Checkpoint, Skeleton]:
    """A checkpoint that is nowhere, and a model of flat names."""
    file = Path("/nowhere/w.safetensors")
    entries = {key: TensorEntry(key, "float32", shape, file, 0, 0) for key, shape in keys.items()}
    checkpoint = Checkpoint("/nowhere", file.parent, (Shard(file, 0, 0, 0, {}),), entries)

    def make() -> nn.Module:
        root = nn.Module()
        for name, shape in model.items():
            *path, leaf = name.split(".")
            owner = root
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(leaf, nn.Parameter(torch.empty(shape, device="meta")))
        return root

    return checkpoint, make_skeleton(Origin(make), checkpoint, "auto")


def test_an_unreadable_tensor_is_an_error_only_for_who_wants_it() -> None:
    checkpoint, skeleton = made({"a": (2,), "b": (3,)}, {"a": (2,), "b": (3,), "c": (4,)})
    checkpoint = replace(checkpoint, unreadable={"c": "it is sparse", "d": "it is quantised"})
    mapping = match(checkpoint, skeleton)
    with pytest.raises(UnsupportedError, match=r"/nowhere: tensor 'c': it is sparse.*skip=.*strict=False"):
        refuse(mapping, checkpoint.source)
    refuse(mapping, checkpoint.source, strict=False)
    assert mapping.unexpected == ()
    skipped = match(checkpoint, skeleton, rules=KeyRules(skip=("c",)))
    refuse(skipped, checkpoint.source)
    assert skipped.excused == ("c",)
    small = made({"a": (2,), "b": (3,)}, {"a": (2,), "b": (3,)})[1]
    refuse(match(checkpoint, small), checkpoint.source)


def test_an_unreadable_tensor_under_a_prefix_is_the_models() -> None:
    checkpoint, skeleton = made({"module.a": (2,), "module.b": (3,)}, {"a": (2,), "b": (3,), "c": (4,)})
    checkpoint = replace(checkpoint, unreadable={"module.c": "it is sparse"})
    with pytest.raises(UnsupportedError, match=r"'module\.c': it is sparse.*model's 'c'"):
        refuse(match(checkpoint, skeleton), checkpoint.source)


# ---- next to nothing ----


def test_a_load_of_nothing_is_refused_although_not_strict(tmp_path: Path) -> None:
    state = {f"x{i}.y": torch.ones(i + 11) for i in range(4)}
    with pytest.raises(KeysError, match=r"next to nothing of the checkpoint fits the model \(0 of 4 keys\)"):
        loaded(state, Net, tmp_path, strict=False)


def test_a_load_of_next_to_nothing_is_refused_with_the_rule(tmp_path: Path) -> None:
    """One tensor of many fits by chance."""
    checkpoint, skeleton = made(
        {"a": (1,), **{f"layer{i}.w": (i + 2,) for i in range(30)}},
        {"a": (1,), **{f"block.{i}.w": (i + 2,) for i in range(30)}},
    )
    with pytest.raises(KeysError, match=r"next to nothing .*\(1 of 31 keys\)"):
        refuse(match(checkpoint, skeleton), checkpoint.source, strict=False)


def test_a_head_on_a_backbone_and_a_small_part_are_no_nothing() -> None:
    many = {f"a.{i}": (i + 2,) for i in range(60)}
    # A projector's file for a large model, a large file for a small part, and a model without tensors.
    for keys, model in (
        ({"p.w": (3,)}, {**many, "p.w": (3,)}),
        ({**many, "p.w": (3,)}, {"p.w": (3,), "p.b": (4,)}),
        (many, {}),
    ):
        checkpoint, skeleton = made(keys, model)
        refuse(match(checkpoint, skeleton), checkpoint.source, strict=False)


# ---- property: any prefix, any injective renaming ----

WORDS = st.sampled_from(["a", "bc", "norm", "0", "1", "7", "weight", "gamma", "module", "x_1", "model"])


@st.composite
def trees(draw: st.DrawFn) -> dict[str, tuple[int, ...]]:
    """Names of a model, none of which is a module of another."""
    paths = draw(st.lists(st.lists(WORDS, min_size=1, max_size=4), min_size=1, max_size=10))
    names: list[str] = []
    for path in paths:
        name = ".".join(path)
        if path[-1].isdecimal() or any(
            n == name or n.startswith(f"{name}.") or name.startswith(f"{n}.") for n in names
        ):
            continue
        names.append(name)
    sizes = draw(st.lists(st.integers(1, 4), min_size=len(names), max_size=len(names)))
    return dict(zip(names, ((n,) for n in sizes), strict=True))


def check(keys: dict[str, tuple[int, ...]], model: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """What differs is said right. Gives what is fed, and from which key; nothing where two keys fell together."""
    checkpoint, skeleton = made(keys, model)
    try:
        mapping = match(checkpoint, skeleton)
    except KeysError as error:
        if "both become" in str(error):
            return {}
        raise
    state = {name for name, target in skeleton.targets.items() if target.persistent}
    fed = {link.target: link.entry.key for link in mapping.links}
    diff = diff_of(mapping, checkpoint, skeleton)
    assert set(fed) | set(diff.missing) | {m.target for m in diff.mismatched} == state
    assert set(fed.values()) | set(diff.unexpected) | {m.key for m in diff.mismatched} == set(keys)
    assert diff.matched == len(fed)
    assert sum(len(group.names) for group in diff.groups) == sum(
        map(len, (diff.missing, diff.unexpected, diff.mismatched))
    )
    if diff.is_empty:
        assert all(keys[key] == model[name] for name, key in fed.items())
    elif diff.rename:
        rules = KeyRules(rename=tuple((re.compile(a), b) for a, b in diff.rename.items()), reshape=diff.reshape)
        assert len(match(checkpoint, skeleton, rules=rules).links) == len(fed) + diff.mended
    assert isinstance(diff.text(), str)
    assert diff.to_dict()["matched"] == diff.matched
    if not mapping.steps:
        # Nothing was done: only equal names were linked.
        assert all(name == key for name, key in fed.items())
    return fed


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(model=trees(), front=st.lists(WORDS, min_size=1, max_size=3))
def test_any_prefix_loads_the_same_or_is_told(model: dict[str, tuple[int, ...]], front: list[str]) -> None:
    prefix = ".".join(front) + "."
    if not model:
        return
    fed = check({prefix + name: shape for name, shape in model.items()}, model)
    if fed and not any(prefix + name in model for name in model):
        assert fed == {name: prefix + name for name in model}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(model=trees(), data=st.data())
def test_any_injective_renaming_loads_the_same_or_is_told(
    model: dict[str, tuple[int, ...]], data: st.DataObject
) -> None:
    if not model:
        return
    words = sorted({part for name in model for part in name.split(".")})
    others = data.draw(st.permutations([*words, "q", "r.s", "t"]))
    table = dict(zip(words, others, strict=False))
    origin = {".".join(table[part] for part in name.split(".")): name for name in model}
    check({key: model[name] for key, name in origin.items()}, model)


@settings(max_examples=60, deadline=None)
@given(model=trees(), front=st.sampled_from(["zz.", "module._orig_mod.", "backbone.zz."]))
def test_a_prefix_of_its_own_always_loads(model: dict[str, tuple[int, ...]], front: str) -> None:
    """One that no name of the model begins with."""
    if not model:
        return
    checkpoint, skeleton = made({front + name: shape for name, shape in model.items()}, model)
    mapping = match(checkpoint, skeleton)
    assert {link.target: link.entry.key for link in mapping.links} == {name: front + name for name in model}


def test_a_function_that_knows_only_the_files_keys_is_not_asked_for_others(tmp_path: Path) -> None:
    """What is missing is explained by trials with other prefixes."""
    table = {"x.weight": "0.weight", "y.bias": "nothing"}
    save_file({"x.weight": torch.ones(2, 2), "y.bias": torch.ones(7)}, tmp_path / "model.safetensors")
    model = nn.Sequential(nn.Linear(2, 2))
    result = lowmem.load(tmp_path, model=model, rename=lambda key: table[key], strict=False)
    assert torch.equal(result.model[0].weight, torch.ones(2, 2))


def test_what_is_tied_to_a_tensor_that_was_left_out_is_not_missing(own: Callable[..., Path]) -> None:
    folder = own("llama-tied", "float32", "1GB")
    for options in ({"skip": ["model.embed_tokens"]}, {"only": ["model.layers"]}):
        result = lowmem.load(folder, **options)
        assert "model.embed_tokens.weight" in result.report.initialised
        assert result.model.lm_head.weight is result.model.model.embed_tokens.weight


def test_a_rule_that_changes_no_key_is_told(tmp_path: Path) -> None:
    save_file({"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2)}, tmp_path / "model.safetensors")
    plan = lowmem.plan(tmp_path, model=nn.Sequential(nn.Linear(2, 2)), rename={"^backbone": "", "0": "0"})
    assert any("'^backbone' changed no key" in warning for warning in plan.warnings)


def test_a_stream_takes_the_rules_of_keys(tmp_path: Path) -> None:
    save_file({"a.x": torch.ones(1), "a.y": torch.ones(2), "b.x": torch.ones(3)}, tmp_path / "model.safetensors")
    found = dict(lowmem.stream(tmp_path, prefix="a", skip=["a.y"], rename={"x": "z"}))
    assert found.keys() == {"z"}
    assert len(found["z"]) == 1
