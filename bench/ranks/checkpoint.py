"""A Llama whose heads eight ranks can divide, of about the size that is wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.sources import settle
from lowmem.synthetic import Recipe, recipe_from_config, write_checkpoint

# Heads of keys and values: what ranks of tensor parallelism must divide.
HEADS = 8
_SHARDS = 5
_LARGE = 800_000_000


def make(folder: Path, size: int) -> Path:
    """The checkpoint's folder, written when it is not there; `write_checkpoint` leaves no half of one."""
    recipe = recipe_of(size)
    target = folder / recipe.name
    if not target.exists():
        write_checkpoint(recipe, target, max_shard_size=-(-recipe.nbytes // _SHARDS))
        settle()
    return target


def recipe_of(size: int) -> Recipe:
    """Of bfloat16 and about `size` bytes: as many layers as that takes."""
    # lowmem.synthetic.llama_recipe has nine such heads at 2.5 GB.
    one, two = _llama(size, 1), _llama(size, 2)
    layer = two.nbytes - one.nbytes
    return _llama(size, max(1, 1 + round((size - one.nbytes) / layer)))


def _llama(size: int, layers: int) -> Recipe:
    from transformers import LlamaConfig

    hidden = 2048 if size >= _LARGE else 512
    settings: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 16 * hidden,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": HEADS,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }
    return recipe_from_config(LlamaConfig(**settings), dtype="bfloat16", name=f"llama-{hidden}x{layers}")
