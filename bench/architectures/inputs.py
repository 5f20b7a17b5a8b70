"""Seeded inputs that a model takes, found from the signature of its `forward`."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.comparison import tensors_in

Batch = dict[str, Any]
_ROWS, _LENGTH = 2, 8


def run(model: Any, batch: Batch) -> Any:
    """What the model returns, with seeded noise where a model draws any."""
    torch.manual_seed(5)
    with torch.no_grad():
        return model(**batch)


def find_batch(model: Any, known: Batch | None = None) -> tuple[Batch | None, Any]:
    """The first batch that the model takes, and what it returns; None and the first error where it takes none.

    Args:
        model: any transformers model, of tiny sizes.
        known: a batch that it took at another dtype, tried first.
    """
    reasons: list[str] = []
    tried: set[str] = set()
    for batch in itertools.chain([] if known is None else [_cast(known, model.dtype)], batches(model)):
        key = repr(
            [(name, getattr(value, "shape", value), getattr(value, "dtype", "")) for name, value in batch.items()]
        )
        if key in tried:
            continue
        tried.add(key)
        try:
            outputs = run(model, batch)
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {error}")
            continue
        if tensors_in(outputs):
            return batch, outputs
        reasons.append("it returns no tensors")
    return None, reasons[0]


def _cast(batch: Batch, dtype: torch.dtype) -> Batch:
    floats = {name for name, value in batch.items() if isinstance(value, torch.Tensor) and value.is_floating_point()}
    return {name: value.to(dtype) if name in floats else value for name, value in batch.items()}


def batches(model: Any) -> Iterator[Batch]:
    """Candidates, the fullest first: all that the signature knows, then with less and less of it."""
    names = inspect.signature(model.forward).parameters
    makers = {name: made for name, made in _MAKERS.items() if name in names}
    whole: Batch = {name: made[0](model) for name, made in makers.items()}
    if "use_cache" in names:
        whole["use_cache"] = False
    media = [name for name in whole if name.startswith(_MEDIA)]
    text = {name: value for name, value in whole.items() if name not in media}
    if "input_ids" in whole and "pixel_values" in whole:
        yield from _with_image_tokens(model, text)
    yield whole
    for name in media:
        for other in makers[name][1:]:
            yield {**whole, name: other(model)}
            yield {name: other(model)}
    if "input_ids" in whole and media:
        yield text
    mains = model.main_input_name if isinstance(model.main_input_name, list) else [model.main_input_name]
    for main in (*mains, "input_ids", *media):
        if main in whole:
            yield {name: whole[name] for name in (main, "decoder_input_ids") if name in whole}
            yield {main: whole[main]}


def _with_image_tokens(model: Any, text: Batch) -> Iterator[Batch]:
    """Text with as many placeholders as an image has features: what most models of images and text expect."""
    token = _config(model, "image_token_id", "image_token_index")
    if token is None:
        return
    pixels = _pixels(model)
    images: list[Batch] = [{"pixel_values": pixels}, {"pixel_values": pixels[:, None]}]
    names = inspect.signature(model.forward).parameters
    if "image_sizes" in names:
        images += [{**image, "image_sizes": torch.tensor([pixels.shape[2:]] * _ROWS)} for image in images]
    if "image_grid_thw" in names and hasattr(model.config, "vision_config"):
        images = [_patches(model)]
    for image in images:
        try:
            with torch.no_grad():
                features = _features_of(model.get_image_features(**image))
        except Exception:  # whatever a model raises for what it does not take
            continue
        count = sum(one.shape[:-1].numel() for one in features) // _ROWS
        ids = torch.cat([torch.full((_ROWS, count), token), text["input_ids"]], dim=1)
        batch = {**text, **image, "input_ids": ids}
        if "attention_mask" in batch:
            batch["attention_mask"] = torch.ones_like(ids)
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in names:
                batch[name] = (ids == token).to(torch.int64)
        yield batch


def _features_of(found: Any) -> list[torch.Tensor]:
    found = getattr(found, "pooler_output", found)
    return [found] if isinstance(found, torch.Tensor) else list(found)


def _patches(model: Any) -> Batch:
    """An image for each row as models of the Qwen-VL family take it: rows of flattened patches, and their grid."""
    vision = model.config.vision_config
    size = vision.patch_size**2 * (getattr(vision, "temporal_patch_size", None) or 1)
    channels = _config(model, "in_channels", "in_chans", "num_channels") or 3
    pixels = torch.randn(_ROWS * 16, channels * size, generator=_generator()).to(model.dtype)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]] * _ROWS)}


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def _config(model: Any, *names: str) -> Any:
    """The first value of these names in the config or a sub-config."""
    configs = [model.config, *(getattr(model.config, name, None) for name in getattr(model.config, "sub_configs", {}))]
    for config in configs:
        for name in names:
            value = getattr(config, name, None)
            if value is not None:
                return value
    return None


def _ids(model: Any) -> torch.Tensor:
    size = min(_config(model, "vocab_size") or 96, 80)
    return torch.randint(3, size, (_ROWS, _LENGTH), generator=_generator())


def _pixels(model: Any) -> torch.Tensor:
    size = _config(model, "image_size", "img_size") or 32
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = _config(model, "num_channels", "in_channels", "in_chans") or 3
    return torch.randn(_ROWS, channels, height, width, generator=_generator()).to(model.dtype)


def _video(model: Any) -> torch.Tensor:
    frames = _config(model, "num_frames") or 2
    return _pixels(model)[:, None].repeat(1, frames, 1, 1, 1)


def _waves(model: Any) -> torch.Tensor:
    return torch.randn(_ROWS, 1600, generator=_generator()).to(model.dtype)


def _features(model: Any) -> torch.Tensor:
    bins = _config(model, "num_mel_bins", "feature_size", "input_feat_per_channel", "input_dim") or 16
    length = 2 * (_config(model, "max_source_positions") or 32)
    return torch.randn(_ROWS, bins, length, generator=_generator()).to(model.dtype)


def _series(model: Any) -> torch.Tensor:
    length, channels = _config(model, "context_length") or 32, _config(model, "num_input_channels") or 1
    return torch.randn(_ROWS, length, channels, generator=_generator()).to(model.dtype)


Maker = Callable[[Any], Any]
_MEDIA = ("pixel_", "input_features", "input_values", "past_values", "bbox")
# Of each input the forms in which models take it, tried in turn.
_MAKERS: dict[str, tuple[Maker, ...]] = {
    "input_ids": (_ids,),
    "attention_mask": (lambda model: torch.ones(_ROWS, _LENGTH, dtype=torch.int64),),
    "decoder_input_ids": (_ids,),
    "pixel_values": (_pixels, _video),
    "pixel_values_videos": (_video,),
    "input_values": (_waves, lambda model: _waves(model)[:, None], lambda model: _features(model).transpose(1, 2)),
    "input_features": (
        _features,
        lambda model: _features(model).transpose(1, 2),
        lambda model: _features(model).transpose(1, 2)[:, None],
    ),
    "past_values": (_series,),
    "bbox": (
        lambda model: torch.tensor([1, 2, 10, 12]).repeat(_ROWS, _LENGTH, 1),
        lambda model: torch.tensor([0.1, 0.2, 0.5, 0.7]).repeat(_ROWS, _LENGTH, 2).to(model.dtype),
    ),
}
