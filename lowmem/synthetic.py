"""Checkpoints with random weights: the names and shapes of a real model, written in a few MiB of memory.

    recipe = llama_recipe(parse_size("1GiB"))
    write_checkpoint(recipe, "demo-model", max_shard_size=parse_size("256MiB"))
    write_headers(recipe, "only-to-plan", max_shard_size=parse_size("256MiB"))  # holes instead of weights

A `Recipe` says what a checkpoint holds. It comes from arithmetic (`llama_recipe`), from a transformers configuration
(`recipe_from_config`), or from a list of one's own. `write_checkpoint` streams it to disk; `write_headers` writes all
but the tensors, for models that no disk here would hold.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .checkpoint.safetensors import layout
from .dtypes import SAFETENSORS_NAMES, is_floating, itemsize, parse_dtype
from .errors import ModelError, OptionError, OutputError
from .sizes import MIB, format_size

# Bytes of random numbers that are generated once and then written again and again, each time from another offset.
_BLOCK = 4 * MIB
_STD = 0.02
_ONES = re.compile(r"(?:^|\.)(?:(?:\w*norm\w*|ln_\w+|ln\d*|bn\d*)\.weight|running_var)$", re.IGNORECASE)
_ZEROS = re.compile(r"(?:bias|running_mean)$")

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Recipe:
    """What a checkpoint holds, before a byte of it is written.

    Attributes:
        name: for people; files are not named after it.
        config: becomes `config.json`; when empty, that file is not written.
        tensors: (key, shape) in the order in which they fill the shards.
        dtype: torch name of a float, such as `"bfloat16"`.
        generation_config: becomes `generation_config.json`, if given.
        dtypes: key → torch dtype name, for the tensors that are not of `dtype`, such as integer buffers: these are
            written as zeros.
    """

    name: str
    config: Mapping[str, Any]
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    dtype: str = "bfloat16"
    generation_config: Mapping[str, Any] | None = None
    dtypes: Mapping[str, str] = field(default_factory=dict)

    def dtype_of(self, key: str) -> str:
        """The torch dtype name of one tensor."""
        return self.dtypes.get(key, self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(self._sizes().values())

    def _sizes(self) -> dict[str, int]:
        return {key: math.prod(shape) * itemsize(self.dtype_of(key)) for key, shape in self.tensors}


def write_checkpoint(
    recipe: Recipe,
    folder: str | Path,
    *,
    max_shard_size: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write `recipe` into a new or empty folder: safetensors shards, index, `config.json`.

    Weights of two and more dimensions are normal with a standard deviation of 0.02, norm weights are ones, biases are
    zeros. The random numbers come from one block of 4 MiB, which is written again and again from ever different
    offsets: tensors differ from each other, and the values of a tensor depend on the recipe and the seed only, not on
    how it is sharded. As statistics they are poor: a large tensor holds each number many times.

    Memory stays at a few MiB over that of torch, whatever the size of a tensor or shard. When the write is
    interrupted, all that it wrote is removed again.

    Args:
        recipe: what to write.
        folder: where to; parents are made.
        max_shard_size: bytes of tensors per file. Tensors fill shards in order, as transformers' `save_pretrained`
            does it; a tensor above the limit gets a file of its own.
        seed: of the random numbers.
        progress: called with (bytes written, bytes of all tensors) after each tensor or 4 MiB of one.

    Returns:
        The folder.

    Raises:
        OptionError: the recipe, the limit or the folder is not usable, or the disk has too little space left.
        OutputError: writing failed.
    """
    return _write(recipe, Path(folder), max_shard_size, lambda: _Data(recipe, seed), progress)


def write_headers(recipe: Recipe, folder: str | Path, *, max_shard_size: int) -> Path:
    """Write `recipe` as `write_checkpoint` does, but for the tensors: their place in each file is a hole.

    Every header, the index and `config.json` are what the whole checkpoint would have, and so are the sizes of the
    files, so that models too large for the disk can be looked at and planned. A hole takes no space (where the file
    system has sparse files) and reads as zeros.

    Args:
        recipe: what to write.
        folder: where to, new or empty; parents are made.
        max_shard_size: bytes of tensors per file.

    Returns:
        The folder.

    Raises:
        OptionError: the recipe, the limit or the folder is not usable.
        OutputError: writing failed, or the file system has no files of such a size.
    """
    return _write(recipe, Path(folder), max_shard_size, None, None)


def _write(
    recipe: Recipe,
    folder: Path,
    max_shard_size: int,
    make_data: Callable[[], _Data] | None,
    progress: Callable[[int, int], None] | None,
) -> Path:
    """Everything in order; without `make_data` tensors are holes."""
    _check(recipe, max_shard_size)
    made: list[Path] = []
    try:
        _claim(folder, 0 if make_data is None else recipe.nbytes, made)
        data = None if make_data is None else make_data()
        shards = _named_shards(recipe, max_shard_size)
        _write_json(folder, "config.json", recipe.config, made)
        _write_json(folder, "generation_config.json", recipe.generation_config, made)
        if len(shards) > 1:
            weight_map = {key: name for name, keys in shards.items() for key in keys}
            index = {"metadata": {"total_size": recipe.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
            _write_json(folder, _INDEX, index, made)
        # Weights come last: until the last of them has its name, one is missing, and whoever looks is told so.
        _write_shards(recipe, folder, shards, data, progress, made)
    except BaseException as error:
        _undo(made)
        if isinstance(error, OSError):
            raise OutputError(
                f"{error.filename or folder}: cannot be written: {error.strerror or error}; make room, or choose a "
                "folder on another disk"
            ) from error
        raise
    return folder


def plan_shards(recipe: Recipe, max_shard_size: int) -> list[list[str]]:
    """The keys of each shard, filled greedily in the order of the recipe.

    The same as `huggingface_hub.split_torch_state_dict_into_shards`: a tensor above `max_shard_size` bytes gets a
    shard of its own, which precedes the shard that was being filled.
    """
    shards: list[list[str]] = []
    filling: list[str] = []
    filled = 0
    for key, nbytes in recipe._sizes().items():
        if nbytes > max_shard_size:
            shards.append([key])
            continue
        if filled + nbytes > max_shard_size:
            shards.append(filling)
            filling, filled = [], 0
        filling.append(key)
        filled += nbytes
    return [*shards, filling] if filling else shards


def _check(recipe: Recipe, max_shard_size: int) -> None:
    if max_shard_size <= 0:
        raise OptionError(f"max_shard_size: expected at least 1 byte, found {max_shard_size}")
    if not recipe.tensors:
        raise OptionError(f"recipe {recipe.name!r}: expected tensors, found none")
    keys = {key for key, _ in recipe.tensors}
    if len(keys) != len(recipe.tensors):
        raise OptionError(f"recipe {recipe.name!r}: a key appears twice among its {len(recipe.tensors)} tensors")
    if not is_floating(recipe.dtype):
        raise OptionError(f"recipe {recipe.name!r}: dtype: expected a float such as 'bfloat16', found {recipe.dtype!r}")
    for key, dtype in recipe.dtypes.items():
        if dtype not in SAFETENSORS_NAMES:
            raise OptionError(f"recipe {recipe.name!r}: tensor {key!r}: safetensors cannot hold dtype {dtype!r}")


def _claim(folder: Path, nbytes: int, made: list[Path]) -> None:
    """Make the folder, or see that it is empty: what is there already is never mixed or overwritten."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        made.append(folder)
    elif not folder.is_dir():
        raise OptionError(f"{folder}: expected a folder, found a file; choose another path")
    elif next(folder.iterdir(), None) is not None:
        raise OptionError(f"{folder}: expected a new or empty folder, found files in it; remove them or choose another")
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise OptionError(
            f"{folder}: the checkpoint needs {format_size(nbytes)}, the disk has {format_size(free)} left; "
            "choose a smaller size or a folder on another disk"
        )


def _undo(made: list[Path]) -> None:
    for path in reversed(made):
        # The error that is on its way matters more than a file that cannot be removed.
        with contextlib.suppress(OSError):
            if path.is_dir():
                path.rmdir()
            else:
                path.unlink()


def _named_shards(recipe: Recipe, max_shard_size: int) -> dict[str, list[str]]:
    """File name → its keys."""
    shards = plan_shards(recipe, max_shard_size)
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": keys for number, keys in enumerate(shards, 1)}


def _write_shards(
    recipe: Recipe,
    folder: Path,
    shards: Mapping[str, list[str]],
    data: _Data | None,
    progress: Callable[[int, int], None] | None,
    made: list[Path],
) -> None:
    """Write every shard. Without `data` tensors are holes."""
    shapes = dict(recipe.tensors)
    total = recipe.nbytes
    done = 0
    for name, shard in shards.items():
        # The order of safetensors' save_file: wide dtypes first, so that each tensor is aligned; then by name.
        keys = sorted(shard, key=lambda key: (-itemsize(recipe.dtype_of(key)), key))
        head, spans, size = layout(((key, recipe.dtype_of(key), shapes[key]) for key in keys), {"format": "pt"})
        hidden = folder / f".{name}.tmp"
        made.append(hidden)
        with hidden.open("wb", buffering=MIB) as file:
            file.write(head)
            pieces = () if data is None else _all_pieces(data, keys, shapes, spans)
            for piece in pieces:
                file.write(piece)
                done += len(piece)
                if progress is not None:
                    progress(done, total)
            # What was not written is a hole.
            file.truncate(size)
        made.append(folder / name)
        hidden.rename(folder / name)


def _all_pieces(
    data: _Data, keys: list[str], shapes: Mapping[str, tuple[int, ...]], spans: Mapping[str, tuple[int, int]]
) -> Iterator[memoryview]:
    for key in keys:
        yield from data.pieces(key, shapes[key], spans[key][1])


def _write_json(folder: Path, name: str, value: Mapping[str, Any] | None, made: list[Path]) -> None:
    if not value:
        return
    hidden = folder / f".{name}.tmp"
    made += [hidden, folder / name]
    hidden.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    hidden.rename(folder / name)


class _Data:
    """The bytes of each tensor of a recipe."""

    def __init__(self, recipe: Recipe, seed: int) -> None:
        import torch

        self._recipe = recipe
        self._size = itemsize(recipe.dtype)
        self._count = _BLOCK // self._size
        dtype = getattr(torch, recipe.dtype)
        noise = torch.empty(self._count).normal_(0, _STD, generator=torch.Generator().manual_seed(seed)).to(dtype)
        # Twice in a row, so that a full block can be cut out from any offset.
        self._noise = _bytes_of(torch.cat([noise, noise]).view(torch.uint8))
        self._ones = _bytes_of(torch.ones(MIB // self._size, dtype=dtype).view(torch.uint8))
        self._zeros = memoryview(bytes(MIB))
        # The number of each tensor's first block: what a tensor holds must not depend on when it is written.
        self._first: dict[str, int] = {}
        number = 0
        for key, nbytes in recipe._sizes().items():
            self._first[key] = number
            number += -(-nbytes // _BLOCK)

    def pieces(self, key: str, shape: tuple[int, ...], nbytes: int) -> Iterator[memoryview]:
        """The tensor's `nbytes`, in pieces of at most 4 MiB."""
        if key in self._recipe.dtypes or (len(shape) < 2 and _ZEROS.search(key)):
            yield from _repeated(self._zeros, nbytes)
        elif len(shape) < 2 and _ONES.search(key):
            yield from _repeated(self._ones, nbytes)
        else:
            yield from self._random(self._first[key], nbytes)

    def _random(self, number: int, nbytes: int) -> Iterator[memoryview]:
        # The golden section spreads the offsets evenly. It is made odd and the count is a power of two, so block after
        # block begins at an element where none began before, for as many blocks as one has elements: 2 TiB at least.
        step = int(self._count * 0.6180339887) | 1
        for begin in range(0, nbytes, _BLOCK):
            at = number * step % self._count * self._size
            yield self._noise[at : at + min(_BLOCK, nbytes - begin)]
            number += 1


def _bytes_of(tensor: Any) -> memoryview:
    return memoryview(tensor.numpy())


def _repeated(block: memoryview, nbytes: int) -> Iterator[memoryview]:
    for begin in range(0, nbytes, len(block)):
        yield block[: nbytes - begin]


def recipe_from_config(config: Any, *, dtype: str | None = None, name: str | None = None) -> Recipe:
    """The checkpoint that `save_pretrained` would write for a transformers configuration, without any weights.

    The class in `architectures[0]` is built on the meta device. Tied duplicates are dropped, and what transformers
    fuses while it loads is taken apart again: the experts of Qwen3-MoE are
    `model.layers.N.mlp.experts.M.gate_proj.weight` and so on, as in the published files. Buffers that are not floats
    keep their dtype and are written as zeros.

    Args:
        config: a `transformers.PretrainedConfig` with `architectures`.
        dtype: torch name of a float; by default that of the configuration, or else bfloat16.
        name: of the recipe; by default that of the class.

    Raises:
        OptionError: not a float dtype.
        ModelError: transformers is missing, or it has no such class.
    """
    try:
        import torch
        import transformers
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError as error:
        raise ModelError(
            f"building a model from a configuration needs transformers 5: pip install 'lowmem[transformers]' ({error})"
        ) from error

    config = copy.deepcopy(config)
    dtype = _float_dtype(dtype or config.dtype or "bfloat16")
    config.dtype = dtype
    architectures = config.architectures or [None]
    build = getattr(transformers, str(architectures[0]), None)
    if build is None:
        raise ModelError(
            f"architectures: expected the name of a transformers class first, found {config.architectures!r}; "
            "set config.architectures, such as ['LlamaForCausalLM']"
        )
    with torch.device("meta"):
        model = build(config)
    dropped = {*model.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())}
    state = {key: tensor for key, tensor in model.state_dict().items() if key not in dropped}
    state = revert_weight_conversion(model, state)
    generation = getattr(model, "generation_config", None)
    return Recipe(
        name=name or str(architectures[0]),
        config=json.loads(config.to_json_string()),
        tensors=tuple((key, tuple(tensor.shape)) for key, tensor in state.items()),
        dtype=dtype,
        generation_config=json.loads(generation.to_json_string()) if generation is not None else None,
        dtypes={
            key: str(tensor.dtype).removeprefix("torch.")
            for key, tensor in state.items()
            if not tensor.dtype.is_floating_point
        },
    )


def _float_dtype(dtype: object) -> str:
    name = parse_dtype(dtype)
    if name == "auto":
        raise OptionError("dtype: expected the name of a float such as 'bfloat16', found 'auto'")
    return name


def llama_recipe(size_bytes: int) -> Recipe:
    """A `LlamaForCausalLM` whose bfloat16 checkpoint has about `size_bytes` bytes (within 2 %).

    Needs neither torch nor transformers. From 1 MiB upwards; embeddings and output are not tied. The proportions are
    those of published Llamas: the width grows as the cube root of the size and the depth with the width, a head has 64
    dimensions, and 4 heads share keys and values.

    Raises:
        OptionError: `size_bytes` is below 1 MiB.
    """
    if size_bytes < MIB:
        raise OptionError(f"size: expected at least 1 MiB for a Llama, found {format_size(size_bytes)}")
    count = size_bytes // 2
    # 13 hidden² parameters per layer and hidden / 128 layers, as in Llama 3; a multiple of 4 heads of 64.
    hidden = max(1, round((count * 128 / 13) ** (1 / 3) / 256)) * 256
    # The embedding and the output take at most 15 %, or a small model would be nothing else.
    vocab = max(64, min(128256, int(0.15 * count / (2 * hidden)) // 64 * 64))
    inner = count - 2 * vocab * hidden
    layers = max(1, round(inner / (13 * hidden**2)))
    # Attention takes 2.5 hidden² of each layer; the MLP takes what is left.
    intermediate = max(8, round((inner / layers - 2.5 * hidden**2) / (3 * hidden) / 8) * 8)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "dtype": "bfloat16",
        "eos_token_id": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": _STD,
        "intermediate_size": intermediate,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": hidden // 64,
        "num_hidden_layers": layers,
        "num_key_value_heads": hidden // 256,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": vocab,
    }
    return Recipe(
        name=f"llama-{format_size(size_bytes).replace(' ', '')}",
        config=config,
        tensors=tuple(_llama_tensors(vocab, hidden, hidden // 4, intermediate, layers)),
        generation_config={"bos_token_id": 1, "eos_token_id": 2},
    )


def _llama_tensors(
    vocab: int, hidden: int, shared: int, intermediate: int, layers: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Keys and shapes in the order of the model's state dict; `shared` is the width of keys and values."""
    yield "model.embed_tokens.weight", (vocab, hidden)
    for n in range(layers):
        layer = f"model.layers.{n}"
        yield f"{layer}.self_attn.q_proj.weight", (hidden, hidden)
        yield f"{layer}.self_attn.k_proj.weight", (shared, hidden)
        yield f"{layer}.self_attn.v_proj.weight", (shared, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{layer}.mlp.gate_proj.weight", (intermediate, hidden)
        yield f"{layer}.mlp.up_proj.weight", (intermediate, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, intermediate)
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)
