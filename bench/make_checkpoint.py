"""Write a checkpoint with random weights for the benchmarks: `python -m bench.make_checkpoint llama-1b OUT`."""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lowmem.dtypes import itemsize
from lowmem.errors import LowmemError
from lowmem.sizes import parse_size
from lowmem.synthetic import Recipe, recipe_from_config, write_checkpoint

DTYPES = ("bfloat16", "float16", "float32")


def llama_1b(dtype: str) -> Recipe:
    return _llama("llama-1b", dtype, hidden=2048, layers=16, heads=32)


def llama_3b(dtype: str) -> Recipe:
    return _llama("llama-3b", dtype, hidden=3072, layers=28, heads=24)


def llama_125m(dtype: str) -> Recipe:
    return _llama("llama-125m", dtype, hidden=1024, layers=6, heads=16, vocabulary=32768, intermediate=4096)


def _llama(
    name: str,
    dtype: str,
    *,
    hidden: int,
    layers: int,
    heads: int,
    vocabulary: int = 128256,
    intermediate: int = 8192,
) -> Recipe:
    """Shapes and settings of https://huggingface.co/meta-llama/Llama-3.2-1B and -3B, or smaller."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        bos_token_id=min(128000, vocabulary - 2),
        eos_token_id=min(128001, vocabulary - 1),
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    return recipe_from_config(config, dtype=dtype, name=name)


def qwen3_moe(dtype: str) -> Recipe:
    """The structure of Qwen3-30B-A3B, narrower and with fewer layers."""
    return _qwen3_moe("qwen3-moe", dtype)


def many_experts(dtype: str) -> Recipe:
    """As many tensors of experts as large mixtures have, each of 2 KiB."""
    small = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    return _qwen3_moe("many-experts", dtype, num_hidden_layers=80, num_experts=128, **small, **heads)


def few_experts(dtype: str) -> Recipe:
    """A mixture small enough to run hundreds of times."""
    small = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_experts_per_tok": 2}
    return _qwen3_moe(
        "few-experts",
        dtype,
        num_hidden_layers=4,
        num_experts=16,
        bos_token_id=4094,
        eos_token_id=4095,
        **small,
        **heads,
    )


def _qwen3_moe(name: str, dtype: str, **changes: int) -> Recipe:
    from transformers import Qwen3MoeConfig

    # A dict, because the types of transformers' signature lack `head_dim`.
    settings: dict[str, Any] = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "moe_intermediate_size": 352,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "norm_topk_prob": True,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "tie_word_embeddings": False,
        **changes,
    }
    return recipe_from_config(Qwen3MoeConfig(**settings), dtype=dtype, name=name)


def one_3gb_tensor(dtype: str) -> Recipe:
    columns = 50_000
    rows = 3_000_000_000 // (columns * itemsize(dtype))
    return Recipe("one-3gb-tensor", {}, (("weight", (rows, columns)),), dtype)


def many_small(dtype: str) -> Recipe:
    # The sizes vary, so that neighbours are not alike by accident: 2 to 8 KiB in bfloat16.
    tensors = tuple((f"layers.{n}.weight", (8 + n % 25, 128)) for n in range(30_000))
    return Recipe("many-small", {}, tensors, dtype)


RECIPES: dict[str, tuple[Callable[[str], Recipe], str]] = {
    "llama-1b": (llama_1b, "the shape of Llama-3.2-1B: 1.24 B parameters, tied embeddings, 2.5 GB"),
    "llama-3b": (llama_3b, "the shape of Llama-3.2-3B: 3.21 B parameters, tied embeddings, 6.4 GB"),
    "llama-125m": (llama_125m, "a Llama of 125 M parameters, tied embeddings, 250 MB: for quick runs"),
    "qwen3-moe": (qwen3_moe, "12 layers of 64 experts, each expert in tensors of its own: 2.4 GB"),
    "many-experts": (many_experts, "80 layers of 128 experts, 31,443 tensors of a few KiB: 64 MB"),
    "few-experts": (few_experts, "4 layers of 16 experts: 18 MB, to run many times"),
    "one-3gb-tensor": (one_3gb_tensor, "a single tensor 'weight' of 3 GB in any dtype; no config.json"),
    "many-small": (many_small, "30,000 tensors of a few KiB: 150 MB; no config.json"),
}


def parser() -> argparse.ArgumentParser:
    names = "\n".join(f"  {name:<16}{text}" for name, (_, text) in RECIPES.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench.make_checkpoint",
        description="Write a safetensors checkpoint with random weights, to load or to measure with.\n"
        "It needs a few hundred MB of memory, most of it for importing torch and transformers.",
        epilog=f"names (sizes in bfloat16):\n{names}\n\n"
        "example:\n  python -m bench.make_checkpoint llama-1b /tmp/llama-1b --max-shard-size 500MB",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=RECIPES, metavar="NAME", help="which checkpoint; see below")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write into: a new or an empty one")
    parser.add_argument(
        "--max-shard-size", default="1GB", metavar="SIZE", help="limit of a file, such as 500MB or 1GiB (default: 1GB)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="type of the weights (default: bfloat16)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random numbers (default: 0)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    commands = parser()
    options = commands.parse_args(argv)
    build, _ = RECIPES[options.name]
    try:
        limit = parse_size(options.max_shard_size, "--max-shard-size")
        recipe = build(options.dtype)
        # write_checkpoint would import it: seconds that are no part of writing.
        importlib.import_module("torch")
        start = time.perf_counter()
        folder = write_checkpoint(recipe, options.out, max_shard_size=limit, seed=options.seed)
    except (LowmemError, OSError) as error:
        commands.error(str(error))
    seconds = time.perf_counter() - start
    files = _count(len(list(folder.glob("*.safetensors"))), "file")
    tensors = _count(len(recipe.tensors), "tensor")
    print(
        f"{folder}: {recipe.name}, {tensors}, {recipe.dtype}, {recipe.nbytes / 1e9:.2f} GB, "
        f"{files}, {seconds:.1f} s, {recipe.nbytes / 1e6 / seconds:.0f} MB/s"
    )
    return 0


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


if __name__ == "__main__":
    raise SystemExit(main())
