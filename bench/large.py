"""Models that fit on no disk here, as recipes: names, shapes and settings of the published files, by arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from lowmem.synthetic import Recipe

Tensors = Iterator[tuple[str, tuple[int, ...]]]

# Rows and columns of a block of fp8 that has a scale.
_BLOCK = 128


def llama_405b(dtype: str = "bfloat16", layers: int = 126) -> Recipe:
    """https://huggingface.co/meta-llama/Llama-3.1-405B: 405,853,388,800 parameters in 1,137 tensors.

    Args:
        dtype: torch name of a float.
        layers: as many of the 126.
    """
    hidden, inner, heads, shared, vocabulary = 16384, 53248, 128, 8, 128256
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": dtype,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "head_dim": hidden // heads,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }

    def tensors() -> Tensors:
        yield "model.embed_tokens.weight", (vocabulary, hidden)
        for n in range(layers):
            layer = f"model.layers.{n}"
            for name, rows in (("q", hidden), ("k", hidden // heads * shared), ("v", hidden // heads * shared)):
                yield f"{layer}.self_attn.{name}_proj.weight", (rows, hidden)
            yield f"{layer}.self_attn.o_proj.weight", (hidden, hidden)
            yield from _gated(f"{layer}.mlp", hidden, inner)
            yield f"{layer}.input_layernorm.weight", (hidden,)
            yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (vocabulary, hidden)

    return Recipe("llama-405b", config, tuple(tensors()), dtype)


def _gated(path: str, hidden: int, inner: int) -> Tensors:
    yield f"{path}.gate_proj.weight", (inner, hidden)
    yield f"{path}.up_proj.weight", (inner, hidden)
    yield f"{path}.down_proj.weight", (hidden, inner)


def deepseek_v3(dtype: str = "bfloat16", layers: int = 61, experts: int = 256) -> Recipe:
    """https://huggingface.co/deepseek-ai/DeepSeek-V3 without its layer for several tokens: 671 B in 45,395 tensors.

    Each projection of each expert is a tensor of its own, which transformers fuses while it loads.

    Args:
        dtype: torch name of a float; what corrects the router's scores is fp32, as published.
        layers: as many of the 61, of which the first 3 have no experts.
        experts: as many of the 256 of each layer.
    """
    tensors = tuple(_deepseek_tensors(layers, experts))
    corrections = {key: "float32" for key, _ in tensors if key.endswith("e_score_correction_bias")}
    return Recipe("deepseek-v3", _deepseek_config(dtype, layers, experts), tensors, dtype, dtypes=corrections)


def deepseek_v3_fp8(layers: int = 61, experts: int = 256) -> Recipe:
    """The same as it is published: fp8 in blocks of 128 x 128, each with a scale."""
    plain = deepseek_v3("bfloat16", layers, experts)
    dtypes, tensors = dict(plain.dtypes), []
    for key, shape in plain.tensors:
        tensors.append((key, shape))
        if key.endswith(("_proj.weight", "_proj_with_mqa.weight")):
            dtypes[key] = "float8_e4m3fn"
            dtypes[f"{key}_scale_inv"] = "float32"
            tensors.append((f"{key}_scale_inv", tuple(math.ceil(n / _BLOCK) for n in shape)))
    quantization = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [_BLOCK, _BLOCK],
    }
    config = {**plain.config, "quantization_config": quantization}
    return Recipe("deepseek-v3-fp8", config, tuple(tensors), "bfloat16", dtypes=dtypes)


def _deepseek_config(dtype: str, layers: int, experts: int) -> dict[str, Any]:
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "torch_dtype": dtype,
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": layers,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_shared_experts": 1,
        "n_routed_experts": experts,
        "routed_scaling_factor": 2.5,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "qk_nope_head_dim": 128,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 1,
        "hidden_act": "silu",
        "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
        "attention_bias": False,
        "tie_word_embeddings": False,
    }


def _deepseek_tensors(layers: int, experts: int) -> Tensors:
    hidden, heads, query, latent, rope, nope, value = 7168, 128, 1536, 512, 64, 128, 128
    yield "model.embed_tokens.weight", (129280, hidden)
    for n in range(layers):
        attention = f"model.layers.{n}.self_attn"
        yield f"{attention}.q_a_proj.weight", (query, hidden)
        yield f"{attention}.q_a_layernorm.weight", (query,)
        yield f"{attention}.q_b_proj.weight", (heads * (nope + rope), query)
        yield f"{attention}.kv_a_proj_with_mqa.weight", (latent + rope, hidden)
        yield f"{attention}.kv_a_layernorm.weight", (latent,)
        yield f"{attention}.kv_b_proj.weight", (heads * (nope + value), latent)
        yield f"{attention}.o_proj.weight", (hidden, heads * value)
        mlp = f"model.layers.{n}.mlp"
        if n < 3:
            yield from _gated(mlp, hidden, 18432)
        else:
            yield f"{mlp}.gate.weight", (experts, hidden)
            yield f"{mlp}.gate.e_score_correction_bias", (experts,)
            yield from _gated(f"{mlp}.shared_experts", hidden, 2048)
            for expert in range(experts):
                yield from _gated(f"{mlp}.experts.{expert}", hidden, 2048)
        yield f"model.layers.{n}.input_layernorm.weight", (hidden,)
        yield f"model.layers.{n}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (129280, hidden)
