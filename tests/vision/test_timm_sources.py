"""Where models of timm come from, what is said of those that are damaged, and models that the user built by timm."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

timm = pytest.importorskip("timm", reason="timm is not installed: these need lowmem[dev-vision]")

import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from timm_models import assert_same, by_timm, new, write

import lowmem

COMMIT, OTHER = "0123abc" + "0" * 33, "4567def" + "0" * 33


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder that the test may change."""
    return write(tmp_path / "model", new("resnet10t"))


def refused(source: Any, *words: str, error: type[Exception] = lowmem.ModelError, **options: Any) -> None:
    with pytest.raises(error) as caught:
        lowmem.load(source, **options)
    for word in words:
        assert word in str(caught.value)


# The hub's cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two revisions of a model, and no network."""
    folder = tmp_path / "hub"
    repository = folder / "models--timm--resnet10t.test"
    for commit, ref, architecture in ((COMMIT, "main", "resnet10t"), (OTHER, "v1", "test_resnet")):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
        write(repository / "snapshots" / commit, new(architecture))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))

    def network(*args: object, **options: object) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr("socket.socket.connect", network)
    return folder


@pytest.mark.parametrize("name", ["timm/resnet10t.test", "timm/resnet10t.test@v1"])
def test_a_model_of_the_hubs_cache_is_what_timm_makes_of_it(name: str, cache: Path) -> None:
    expected = timm.create_model(f"hf-hub:{name}", pretrained=True, num_classes=3)
    for source in (f"hf-hub:{name}", name):
        result = lowmem.load(source, num_classes=3)
        assert_same(result.model, expected.eval(), but=result.report.initialised)
        assert result.model.pretrained_cfg == expected.pretrained_cfg
        assert result.model.pretrained_cfg["hf_hub_id"] == name
        assert result.model.default_cfg is result.model.pretrained_cfg
    by_option = lowmem.load("timm/resnet10t.test", revision="v1")
    assert by_option.model.pretrained_cfg["architecture"] == "test_resnet"


def test_a_file_of_the_folder_is_enough(own: Path) -> None:
    assert_same(lowmem.load(own / "model.safetensors").model, by_timm(own))


def test_a_relative_folder_is_told_as_it_was_given(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own.parent)
    expected = timm.create_model("local-dir:model", pretrained=True)
    assert lowmem.load("local-dir:model").model.pretrained_cfg == expected.pretrained_cfg


# What is damaged, or asked for in vain


def test_a_folder_without_a_config_says_what_is_missing(own: Path) -> None:
    (own / "config.json").unlink()
    refused(f"local-dir:{own}", "no config.json", "timm", "model=")
    result = lowmem.load(own, model=lambda: timm.create_model("resnet10t"))
    assert torch.equal(result.model.fc.bias, load_file(own / "model.safetensors")["fc.bias"])


def test_a_path_where_nothing_is_says_so(tmp_path: Path) -> None:
    for source in (f"local:{tmp_path}/gone", f"local-dir:{tmp_path}/gone", str(tmp_path / "gone")):
        refused(source, "gone", error=lowmem.SourceError)


def test_a_damaged_config_is_told_with_its_path(own: Path) -> None:
    config = own / "config.json"
    table = json.loads(config.read_text())
    config.write_text('{"architecture": "resnet10t", ')
    refused(own, str(config), "not valid JSON")
    for entries, words in (
        ({"architecture": 3}, ("'architecture'", "found 3")),
        ({"pretrained_cfg": [1]}, ("'pretrained_cfg'", "expected an object")),
        ({"model_args": "x"}, ("'model_args'", "expected an object")),
        ({"num_classes": "ten"}, ("'num_classes'", "'ten'")),
        ({"pretrained_cfg": {"input_size": [3, 224]}}, ("'input_size'", "[3, 224]")),
        ({"pretrained_cfg": {"no_such_entry": 1}}, ("resnet10t", "no_such_entry")),
        ({"model_args": {"no_such_argument": 1}}, ("resnet10t", "no_such_argument")),
        ({"architecture": "resnet10"}, ("'resnet10'", "resnet10t", "similar")),
    ):
        config.write_text(json.dumps({**table, **entries}))
        refused(own, str(config), *words)


def test_damaged_weights_are_told_with_their_path(own: Path) -> None:
    weights = own / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(lowmem.LowmemError, match=r"model\.safetensors"):
        lowmem.load(own)


def test_weights_of_another_input_are_refused_in_timms_words(own: Path) -> None:
    """The config says three channels, and the file has one."""
    state = load_file(own / "model.safetensors")
    state["conv1.0.weight"] = state["conv1.0.weight"][:, :1].contiguous()
    save_file(state, own / "model.safetensors")
    refused(own, "inconsistent with input_size", error=lowmem.KeysError, in_chans=2)


def test_options_that_mean_nothing_to_timm_are_refused_by_name(own: Path) -> None:
    for options, words in (
        ({"attn_implementation": "eager"}, ["attn_implementation", "timm"]),
        ({"experts_implementation": "eager"}, ["experts_implementation", "timm"]),
        ({"model_kwargs": {"pretrained": True}}, ["'pretrained'"]),
        ({"model_kwargs": {"checkpoint_path": "x"}}, ["'checkpoint_path'"]),
        ({"model_kwargs": {"device": "cpu"}}, ["'device'", "device_map"]),
        ({"model_kwargs": {"no_such": 1}}, ["'no_such'", "resnet10t does not take it"]),
        ({"model_kwargs": {"num_classes": 3}, "num_classes": 4}, ["num_classes", "leave one of them out"]),
        ({"num_classes": -1}, ["num_classes"]),
        ({"in_chans": 0}, ["in_chans"]),
    ):
        refused(own, *words, error=lowmem.OptionError, **options)
    assert lowmem.load(own, model_kwargs={"num_classes": 3}, num_classes=3).model.num_classes == 3


def test_an_overlay_changes_the_config(own: Path) -> None:
    overlay = {"pretrained_cfg_overlay": {"mean": (0.1, 0.2, 0.3)}}
    result = lowmem.load(own, model_kwargs=overlay)
    assert result.model.pretrained_cfg == by_timm(own, **overlay).pretrained_cfg


def test_a_folder_is_converted_but_not_to_int8(own: Path, tmp_path: Path) -> None:
    lowmem.convert(own, tmp_path / "out", max_shard_size="2MiB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert_same(lowmem.load(tmp_path / "out").model, by_timm(own))
    with pytest.raises(lowmem.UnsupportedError, match=r"one of timm; load with quantize='int8'"):
        lowmem.convert(own, tmp_path / "int8", quantize="int8")


def test_linear_layers_become_int8_while_they_are_read(own: Path) -> None:
    model = lowmem.load(own, num_classes=6, in_chans=1, quantize="int8", skip_modules=[]).model
    assert model.fc.weight.dtype != torch.int8  # initialised, so there is nothing to read
    write(own, new("vit_tiny_patch16_224"))
    result = lowmem.load(own, in_chans=1, quantize="int8")
    assert result.model.blocks[0].attn.qkv.weight.dtype == torch.int8
    image = torch.linspace(-1, 1, 64 * 64).reshape(1, 1, 64, 64)
    assert torch.allclose(result.model(image), by_timm(own, in_chans=1)(image), atol=0.02)


def test_weights_on_disk_give_the_same(own: Path, tmp_path: Path) -> None:
    """What is adapted needs a file of its own; another adaptation needs another."""
    image = torch.linspace(-1, 1, 2 * 64 * 64).reshape(1, 2, 64, 64)
    with pytest.raises(lowmem.PlacementError, match="offload_folder"):
        lowmem.load(own, in_chans=2, device_map="disk")
    for chans in (2, 1, 2):
        options = {"device_map": "disk", "offload_folder": tmp_path / "off"}
        model = lowmem.load(own, in_chans=chans, **options).model
        expected = by_timm(own, in_chans=chans)
        assert torch.allclose(model(image[:, :chans]), expected(image[:, :chans]), atol=1e-5)
        lowmem.release(model)


def test_a_class_of_transformers_makes_its_wrapper_of_it(own: Path) -> None:
    from transformers import AutoModelForImageClassification

    # transformers gives num_classes itself, and timm writes it down too.
    table = json.loads((own / "config.json").read_text())
    del table["model_args"]
    (own / "config.json").write_text(json.dumps(table))
    expected = AutoModelForImageClassification.from_pretrained(own)
    assert type(expected).__name__ == "TimmWrapperForImageClassification"
    assert_same(lowmem.from_pretrained(AutoModelForImageClassification, own), expected)


def test_other_threads_load_by_timm_meanwhile(own: Path) -> None:
    """Only the thread that builds for lowmem is kept from loading."""
    from lowmem.modeling import timm as room

    given: list[Any] = []
    loaded: list[torch.nn.Module] = []
    with room._captured(given):
        thread = threading.Thread(target=lambda: loaded.append(by_timm(own)))
        thread.start()
        thread.join()
    assert not given
    assert torch.equal(loaded[0].fc.bias, load_file(own / "model.safetensors")["fc.bias"])


# Models that the user built


def test_a_module_of_timm_is_filled_as_load_checkpoint_does(own: Path) -> None:
    expected = new("resnet10t", num_classes=1000)
    timm.models.load_checkpoint(expected, str(own / "model.safetensors"))
    for model in (timm.create_model("resnet10t"), lambda: timm.create_model("resnet10t")):
        assert_same(lowmem.load(own / "model.safetensors", model=model).model, expected.eval())


def test_a_filter_of_timm_is_the_users_to_give(tmp_path: Path) -> None:
    """Names of the original ConvNeXt, which timm's function turns into its own."""
    from timm.models.convnext import checkpoint_filter_fn

    model = new("convnext_atto", num_classes=10)
    state = {}
    for key, value in model.state_dict().items():
        name = key.replace("stages.", "stages.").replace("mlp.fc1", "pwconv1").replace("mlp.fc2", "pwconv2")
        name = name.replace("conv_dw", "dwconv").replace("head.fc", "head").replace("head.norm", "norm")
        name = name.replace("stem.", "downsample_layers.0.")
        if ".downsample." in name:
            stage, rest = name.removeprefix("stages.").split(".downsample.")
            name = f"downsample_layers.{stage}.{rest}"
        state[name.replace(".blocks.", ".")] = value
    torch.save({"model": state}, tmp_path / "original.pth")

    def make() -> torch.nn.Module:
        return timm.create_model("convnext_atto", depths=(1, 1, 1, 1), num_classes=10)

    result = lowmem.load(tmp_path / "original.pth", model=make, filter_fn=checkpoint_filter_fn)
    assert_same(result.model, model.eval())


def test_tensors_are_remapped_by_their_order(own: Path) -> None:
    from timm.models._helpers import remap_state_dict

    state = new("resnet10t").state_dict()
    # In the model's order, as a pickle keeps it.
    torch.save({f"x{i}": value for i, value in enumerate(state.values())}, own / "other.pth")
    result = lowmem.load(own / "other.pth", model=lambda: timm.create_model("resnet10t"), filter_fn=remap_state_dict)
    assert_same(result.model, by_timm(own))
