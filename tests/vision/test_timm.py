"""Models of timm, loaded by lowmem and by timm from the same folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

timm = pytest.importorskip("timm", reason="timm is not installed: these need lowmem[dev-vision]")

import torch
from safetensors.torch import load_file, save_file
from timm_models import FAMILIES, assert_same, by_timm, new, tensors_of, write

import lowmem

Folder = Callable[..., Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """`folder("resnet10t")`: what timm would push of such a model. Read it, do not change it."""
    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            # safetensors do not hold tensors that share their bytes, as those of CoaT do.
            safe = architecture != "coat_lite_tiny"
            made[architecture] = write(tmp_path_factory.mktemp(architecture), new(architecture), safe)
        return made[architecture]

    return make


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder that the test may change."""
    return write(tmp_path / "model", new("resnet10t"))


def change(folder: Path, **entries: Any) -> None:
    """Change entries of the `pretrained_cfg`, or those of the whole that exist there."""
    config = folder / "config.json"
    table = json.loads(config.read_text())
    for name, value in entries.items():
        (table if name in table else table["pretrained_cfg"])[name] = value
    config.write_text(json.dumps(table))


def classifiers(model: torch.nn.Module) -> set[str]:
    names = model.pretrained_cfg["classifier"] or ()
    names = (names,) if isinstance(names, str) else names
    return {f"{name}.{leaf}" for name in names for leaf in ("weight", "bias")}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_family_loads_as_timm_loads_it(architecture: str, folder: Folder) -> None:
    """With the outputs and the input that it has, with others, and without outputs, the input repeated or cut."""
    path = folder(architecture)
    for options in ({}, {"num_classes": 7, "in_chans": 1}, {"num_classes": 0, "in_chans": 4}):
        result = lowmem.load(f"local-dir:{path}", **options)
        expected = by_timm(path, **options)
        fresh = set(result.report.initialised)
        assert fresh == (classifiers(expected) & set(tensors_of(expected)) if options.get("num_classes") else set())
        assert_same(result.model, expected, but=fresh)
        assert result.model.pretrained_cfg == expected.pretrained_cfg
        assert not result.model.training


@pytest.mark.parametrize("architecture", ["resnet10t", "vit_tiny_patch16_224", "swinv2_tiny_window8_256", "fastvit_t8"])
def test_a_forward_gives_what_timms_gives(architecture: str, folder: Folder) -> None:
    path = folder(architecture)
    # In memory of their own: where a tensor begins decides which instructions compute with it, and the last bit.
    ours = lowmem.load(f"local:{path}", in_chans=2, residency="copy").model
    theirs = by_timm(path, in_chans=2)
    height, width = theirs.pretrained_cfg["input_size"][1:]
    image = torch.linspace(-1, 1, 2 * height * width).reshape(1, 2, height, width)
    assert torch.equal(ours(image), theirs(image))


def test_a_head_of_as_many_outputs_is_read(folder: Folder) -> None:
    path = folder("resnet10t")
    result = lowmem.load(path, num_classes=1000, in_chans=3)
    assert result.report.initialised == ()
    assert_same(result.model, by_timm(path, num_classes=1000, in_chans=3))


@pytest.mark.parametrize("safe", [True, False])
def test_a_label_offset_cuts_the_head(own: Path, safe: bool) -> None:
    """1001 outputs in the file, of which the first is the background."""
    state = load_file(own / "model.safetensors")
    state["fc.weight"] = torch.cat([torch.full((1, 512), 9.0), state["fc.weight"]])
    state["fc.bias"] = torch.cat([torch.full((1,), 9.0), state["fc.bias"]])
    (own / "model.safetensors").unlink()
    if safe:
        save_file(state, own / "model.safetensors")
    else:
        torch.save(state, own / "pytorch_model.bin")
    change(own, label_offset=1)
    result = lowmem.load(own)
    assert 9.0 not in result.model.fc.bias
    assert_same(result.model, by_timm(own))


def test_the_older_form_of_a_config_is_read(own: Path) -> None:
    table = json.loads((own / "config.json").read_text())
    flat = {**table["pretrained_cfg"], "architecture": "resnet10t", "num_classes": 1000, "labels": ["a", "b"]}
    (own / "config.json").write_text(json.dumps(flat))
    result, expected = lowmem.load(own), by_timm(own)
    assert result.model.pretrained_cfg == expected.pretrained_cfg
    assert_same(result.model, expected)


def test_half_precision_files_become_fp32_as_timm_has_it(own: Path) -> None:
    state = load_file(own / "model.safetensors")
    save_file({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, own / "model.safetensors")
    result = lowmem.load(own, in_chans=5)
    assert result.model.fc.weight.dtype == torch.float32
    assert_same(result.model, by_timm(own, in_chans=5))


@pytest.mark.parametrize("architecture", ["resnet10t", "swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224"])
def test_another_dtype_is_what_to_makes_of_it(architecture: str, folder: Folder) -> None:
    path = folder(architecture)
    for dtype in ("bfloat16", "float64"):
        assert_same(lowmem.load(path, dtype=dtype).model, by_timm(path).to(getattr(torch, dtype)))


def shard(folder: Path, parts: int) -> None:
    """Divide a folder's weights as `save_pretrained` does."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    where = {}
    for i in range(parts):
        name = f"model-{i + 1:05}-of-{parts:05}.safetensors"
        where.update(dict.fromkeys(names[i::parts], name))
        save_file({key: state[key] for key in names[i::parts]}, folder / name)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("options", [{}, {"num_classes": 3, "in_chans": 1}], ids=str)
def test_all_shards_of_a_folder_are_read(options: dict[str, Any], own: Path, folder: Folder) -> None:
    """timm itself reads the first file, so the whole is compared with the same weights in one file."""
    shard(own, 3)
    result = lowmem.load(own, **options)
    expected = by_timm(folder("resnet10t"), **options)
    assert_same(result.model, expected, but=result.report.initialised)
    assert len(list(own.glob("*.safetensors"))) == 3


@pytest.mark.parametrize("wrapper", ["state_dict", "state_dict_ema", "model", "model_ema", ""])
def test_what_training_scripts_wrap_around_weights_is_taken_off(wrapper: str, own: Path) -> None:
    state = load_file(own / "model.safetensors")
    (own / "model.safetensors").unlink()
    # As DDP and torch.compile name them.
    prefixed = {f"module._orig_mod.{key}": value for key, value in state.items()}
    other = {key: value + 1 for key, value in prefixed.items()}
    whole = {"epoch": 3, "arch": "resnet10t", wrapper: prefixed} if wrapper else prefixed
    if wrapper.endswith("_ema"):
        whole["state_dict" if wrapper == "state_dict_ema" else "model"] = other
    torch.save(whole, own / "model.pth")
    assert_same(lowmem.load(own).model, by_timm(own))


@pytest.mark.parametrize(
    ("architecture", "size"),
    [
        ("vit_tiny_patch16_224", 96),
        ("deit_tiny_distilled_patch16_224", 96),
        ("beit_base_patch16_224", 96),
        ("eva02_tiny_patch14_224", 84),
        ("swin_tiny_patch4_window7_224", 128),
        ("swinv2_tiny_window8_256", 128),
    ],
)
def test_tables_of_positions_are_resampled_for_another_size(architecture: str, size: int, folder: Folder) -> None:
    path = folder(architecture)
    result = lowmem.load(path, model_kwargs={"img_size": size}, num_classes=5)
    expected = by_timm(path, img_size=size, num_classes=5)
    assert_same(result.model, expected, but=result.report.initialised)
    assert set(result.report.initialised) <= classifiers(expected)


@pytest.mark.parametrize(
    ("architecture", "names"),
    [
        ("vit_tiny_patch16_224", ["head.weight", "head.bias"]),
        ("convnext_atto", ["head.fc.weight", "head.fc.bias"]),
        ("resnet10t", ["fc.weight", "fc.bias"]),
        ("swin_tiny_patch4_window7_224", ["head.fc.weight", "head.fc.bias"]),
        ("xcit_nano_12_p16_224", ["head.weight", "head.bias"]),
        ("inception_v4", ["last_linear.weight", "last_linear.bias"]),
    ],
)
def test_a_new_head_has_the_values_that_timm_gives_it(architecture: str, names: list[str], folder: Folder) -> None:
    """Those that are constants to the bit, the others by their distribution."""
    path = folder(architecture)
    torch.manual_seed(0)
    result = lowmem.load(path, num_classes=500)
    assert sorted(result.report.initialised) == sorted(names)
    expected = by_timm(path, num_classes=500)
    for name in names:
        ours, theirs = result.model.get_parameter(name).detach(), expected.get_parameter(name).detach()
        if theirs.min() == theirs.max():
            assert torch.equal(ours, theirs)
        else:
            assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.1)
            assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.3)
            assert abs(ours.mean().item()) < 0.2 * theirs.std().item()


def test_the_same_seed_gives_the_same_head(folder: Folder) -> None:
    heads = []
    for _ in range(2):
        torch.manual_seed(3)
        heads.append(lowmem.load(folder("resnet10t"), num_classes=4).model.fc.weight)
    assert torch.equal(*heads)


def test_a_model_that_is_built_otherwise_the_second_time_is_initialised_by_a_whole_build(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowmem.modeling import timm_rules

    built = timm_rules.create
    calls: list[int] = []

    def create(blueprint: Any) -> Any:
        calls.append(0)
        if len(calls) == 1:
            torch.nn.Linear(1, 1)  # one more than before: every number is another
        return built(blueprint)

    monkeypatch.setattr(timm_rules, "create", create)
    model = lowmem.load(folder("vit_tiny_patch16_224"), num_classes=40).model
    assert len(calls) == 2
    assert torch.equal(model.head.bias, torch.zeros(40))
    assert 0.01 < model.head.weight.std() < 0.03 or not model.head.weight.any()


def test_what_timm_does_not_adapt_must_be_there(own: Path) -> None:
    name = "layer1.0.conv1.weight"
    state = load_file(own / "model.safetensors")
    del state[name]
    save_file(state, own / "model.safetensors")
    for options in ({}, {"in_chans": 1}, {"num_classes": 2}):
        with pytest.raises(lowmem.KeysError, match=name):
            lowmem.load(own, **options)
    assert lowmem.load(own, strict=False).report.initialised == (name,)


def test_a_classifier_may_be_missing_only_where_it_is_another(own: Path) -> None:
    state = load_file(own / "model.safetensors")
    del state["fc.bias"]
    save_file(state, own / "model.safetensors")
    for options in ({}, {"in_chans": 1}):
        with pytest.raises(lowmem.KeysError, match=r"fc\.bias"):
            lowmem.load(own, **options)
    assert set(lowmem.load(own, num_classes=2).report.initialised) == {"fc.weight", "fc.bias"}


def test_a_renamed_key_is_refused_with_the_rule_that_mends_it(own: Path) -> None:
    state = load_file(own / "model.safetensors")
    save_file({key.replace("bn", "norm"): value for key, value in state.items()}, own / "model.safetensors")
    with pytest.raises(lowmem.KeysError, match="norm1"):
        lowmem.load(own, num_classes=2)
    found = lowmem.diff(own)
    assert found.rename
    result = lowmem.load(own, rename=found.rename)
    (own / "model.safetensors").unlink()
    save_file(state, own / "model.safetensors")
    assert_same(result.model, by_timm(own))


def test_a_checkpoint_without_a_classifier_takes_a_new_one(tmp_path: Path) -> None:
    path = write(tmp_path, new("convnext_atto", num_classes=0))
    result = lowmem.load(path, num_classes=3)
    assert set(result.report.initialised) == {"head.fc.weight", "head.fc.bias"}
    assert_same(result.model, by_timm(path, num_classes=3), but=result.report.initialised)


def test_counters_that_old_checkpoints_lack_are_excused(own: Path) -> None:
    state = load_file(own / "model.safetensors")
    save_file({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, own / "model.safetensors")
    assert_same(lowmem.load(own).model, by_timm(own))


@pytest.mark.parametrize(
    ("architecture", "more"),
    [
        ("resnet10t", {}),
        ("resnet10t", {"out_indices": (1, 3), "in_chans": 1}),
        ("tinynet_e", {}),
        ("hrnet_w18_small", {}),
        ("convnext_atto", {"out_indices": (0, 2)}),
        ("vit_tiny_patch16_224", {"out_indices": (0, 1)}),
        ("swin_tiny_patch4_window7_224", {"out_indices": (0, 1)}),
    ],
)
def test_features_only_is_loaded_into_the_wrapper(architecture: str, more: dict[str, Any], folder: Folder) -> None:
    path = folder(architecture)
    kwargs = {"features_only": True, **more}
    result = lowmem.load(path, model_kwargs=kwargs)
    expected = by_timm(path, **kwargs)
    assert result.report.initialised == ()
    assert_same(result.model, expected)
    assert result.model.pretrained_cfg == expected.pretrained_cfg
    assert result.model.feature_info.channels() == expected.feature_info.channels()


def test_a_config_may_ask_for_features(own: Path) -> None:
    table = json.loads((own / "config.json").read_text())
    table["model_args"] = {"features_only": True, "out_indices": [2, 4]}
    (own / "config.json").write_text(json.dumps(table))
    assert_same(lowmem.load(own).model, by_timm(own))


def test_no_mark_is_left_on_timm_or_the_model(folder: Folder) -> None:
    from timm.models import _builder

    before = _builder.load_pretrained
    model = lowmem.load(folder("resnet10t"), num_classes=2, in_chans=1).model
    assert _builder.load_pretrained is before
    assert "load_state_dict" not in vars(model)
    with pytest.raises(lowmem.ModelError):
        lowmem.load(folder("resnet10t"), model_kwargs={"block_args": 3})
    assert _builder.load_pretrained is before


def test_a_loaded_model_saves_and_resets_as_timms_does(folder: Folder, tmp_path: Path) -> None:
    model = lowmem.load(folder("resnet10t"), num_classes=2, in_chans=1).model
    again = write(tmp_path, model)
    assert_same(lowmem.load(again).model, by_timm(again))
    model.reset_classifier(5)
    assert model(torch.zeros(1, 1, 64, 64)).shape == (1, 5)


def test_timms_own_log_lines_are_its_loggers(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="timm.models._builder"):
        lowmem.load(folder("resnet10t"), in_chans=1)
    assert "Converted input conv conv1" in caplog.text


@pytest.mark.slow
def test_a_load_needs_no_memory_for_the_whole(tmp_path: Path) -> None:
    """155 MiB of weights, of which the patch embedding is made anew and the head is cut off: the rest is the file's."""
    model = new("vit_base_patch16_224", depth=5, num_classes=8000)
    path = write(tmp_path, model)
    size = (path / "model.safetensors").stat().st_size
    del model
    plan = lowmem.plan(path, num_classes=10, in_chans=1)
    with lowmem.measure() as memory:
        result = lowmem.load(path, num_classes=10, in_chans=1)
    assert size > 150 << 20
    assert memory.peak <= plan.host.peak < 24 << 20
    assert result.model.patch_embed.proj.weight.shape[1] == 1
