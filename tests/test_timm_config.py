"""What is said of a config of timm where timm cannot be imported, and of timm's options elsewhere."""

from __future__ import annotations

import builtins
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import lowmem


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet10t", "pretrained_cfg": {}}))
    return tmp_path


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_what_is_not_installed_is_named_with_the_extra(
    package: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    importing(monkeypatch, ModuleNotFoundError(f"No module named '{package}'", name=package))
    with pytest.raises(
        lowmem.ModelError, match=rf"{package} is not installed; install lowmem\[vision\], or give model="
    ):
        lowmem.load(f"local-dir:{folder}")


def test_a_torchvision_of_another_torch_is_said_to_be_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    importing(monkeypatch, RuntimeError("operator torchvision::nms does not exist"))
    with pytest.raises(lowmem.ModelError, match=r"nms does not exist.*torchvision that belongs to torch"):
        lowmem.load(folder)


def test_what_timm_lacks_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    importing(monkeypatch, ModuleNotFoundError("No module named 'yaml'", name="yaml"))
    with pytest.raises(lowmem.ModelError, match=r"timm cannot be imported .*yaml.*install yaml"):
        lowmem.load(folder)


def importing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Let timm's import fail like this."""
    own = builtins.__import__

    def fail(name: str, *args: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "timm" and not (len(args) > 3 and args[3]):
            raise error
        return own(name, *args, **options)

    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.setattr(builtins, "__import__", fail)


@pytest.mark.parametrize(("option", "entry"), [("num_classes", "num_labels"), ("in_chans", "num_channels")])
def test_timms_options_are_refused_for_transformers(option: str, entry: str, saved: Callable[..., Path]) -> None:
    with pytest.raises(lowmem.OptionError, match=rf"{option}: .*timm.*model_kwargs={{'{entry}': 3}}"):
        lowmem.load(saved("llama"), **{option: 3})


def test_weights_alone_say_that_a_config_is_missing(folder: Path) -> None:
    (folder / "config.json").unlink()
    for source in (f"local:{folder}", f"local-dir:{folder}", folder):
        with pytest.raises(lowmem.ModelError, match=r"no config.json beside the weights.*timm.*model="):
            lowmem.load(source)
