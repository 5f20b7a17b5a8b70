"""Tiny configs: a config class's own defaults with the sizes changed, in its sub-configs too."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

# The first pattern that matches a whole attribute name gives its value, where the default is a greater whole number.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"rotary_dim", 4),
    (r"num_encoder_blocks", 4),
    (r"(\w+_)?vocab_size", 96),
    (r"(max_position_embeddings|n_positions|max_(source|target)_positions|max_\w*seq\w*_len(gth)?|n_ctx)", 64),
    (r"(num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts)", 2),
    (r"(n_group|num_expert_group|topk_group|first_k_dense_replace)", 1),
    (r"(n_shared_experts|(moe_)?num_shared_experts?)", 1),
    (r"(n_routed_experts|(\w+_)?num_(\w+_)?experts)", 4),
    (r"(num_kv_heads|n_head_kv|kv_n_heads|(\w+_)?num_(\w+_)?key_value_heads)", 2),
    (r"((\w+_)?num_(\w+_)?heads|(\w+_)?n_heads?|(\w+_)?attention_heads|attention_head_num)", 4),
    (r"(\w+_)?(layers|n_layers?|num_(\w+_)?blocks|depth)", 2),
    (r"((\w+_)?(moe|expert)_intermediate_size|expert_ffn_hidden_size)", 24),
    (r"(\w+_)?(intermediate_size|ffn_dim|d_ff|n_inner|ffn_hidden_size|ff_dim|feed_forward_size|mlp_dim)", 48),
    (r"qk_head_dim", 16),
    (r"((\w+_)?head_dim|d_kv|head_size|kv_channels|attention_head_size)", 8),
    (r"\w+_lora_rank", 16),
    (r"(\w+_)?(hidden_size|d_model|n_embd|embedding_size|hidden_channels|dim_model|dim)", 32),
    (r"(\w+_)?(image_size|img_size)", 32),
    (r"(\w+_)?patch_size", 8),
    (r"(ssm_state_size|state_size|mamba_d_state)", 8),
    (r"(num_mel_bins|feature_size)", 16),
    (r"(num_queries|num_query_tokens)", 6),
    (r"(\w+_)?window_size", 4),
    (r"(num_conv_pos_embeddings|\w+_block_size)", 16),
    (r"num_conv_pos_embedding_groups", 4),
)
# Lists have a value for each stage, and keep their length: that of the first stage, and how much more each next has.
_LISTS: tuple[tuple[str, int, int], ...] = (
    (r"(depths|num_(encoder_)?blocks|block_sizes|block_repeats|num_block_repeats|blocks_per_stage)", 1, 0),
    (r"(hidden_sizes|embed_dims?|neck_hidden_sizes|embed_dim_per_stage)", 16, 8),
    (r"(num_(attention_)?heads|num_attention_heads_per_stage)", 2, 0),
    (r"(conv_dim|tdnn_dim)", 16, 0),
)
_TOKENS = re.compile(r"\w+_(token_id|token_index|token_idx|id)")
_LAYER_TYPES = re.compile(r"(\w+_)?layer_types|layers_block_type")
_PLAIN_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
_FIRST_SPECIAL = 80


def tiny_values(cls: Any, changes: Mapping[str, Any], default: Any = None) -> dict[str, Any]:
    """Arguments that make a tiny config of `cls`.

    Args:
        cls: a config class of transformers.
        changes: what is wanted otherwise; a dict under the name of a sub-config is for that; with a
            `model_type` in it, it is a config of that type instead.
        default: an instance whose values are shrunk, the class's own defaults otherwise.
    """
    default = cls() if default is None else default
    found: dict[str, Any] = {}
    special = _FIRST_SPECIAL
    for name, value in vars(default).items():
        if name.startswith("_") or name in ("transformers_version", "id2label", "label2id"):
            continue
        if isinstance(value, PreTrainedConfig):
            wanted = changes.get(name)
            if wanted is None or "model_type" not in wanted:
                found[name] = {**tiny_values(type(value), wanted or {}, value), "model_type": value.model_type}
        elif name in _PLAIN_TOKENS:
            if value is not None:
                found[name] = _PLAIN_TOKENS[name]
        elif isinstance(value, int) and not isinstance(value, bool) and _TOKENS.fullmatch(name):
            found[name], special = special, special + 1
        else:
            size = _tiny(name, value)
            if size is not None:
                found[name] = size
    _keep_kinds_of_layers(default, found)
    if "kv_lora_rank" in found and "num_key_value_heads" in found:
        # latent attention has as many of these as of the others
        found["num_key_value_heads"] = found["num_attention_heads"]
    for name, value in changes.items():
        if isinstance(value, Mapping) and "model_type" in value:
            found[name] = tiny_values(CONFIG_MAPPING[value["model_type"]], value)
        elif name not in found or not isinstance(getattr(default, name, None), PreTrainedConfig):
            found[name] = value
    return found


def _tiny(name: str, value: Any) -> Any:
    """The small value for an attribute, None where the default may stay."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return next((min(size, value) for pattern, size in _SIZES if re.fullmatch(pattern, name)), None)
    if isinstance(value, (list, tuple)) and value and all(isinstance(one, int) for one in value):
        for pattern, first, step in _LISTS:
            if re.fullmatch(pattern, name):
                return [first + i * step for i in range(len(value))]
        size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), None)
        return [size] * len(value) if size is not None and "size" in name else None
    if isinstance(value, dict) and "mrope_section" in value:
        return {**value, "mrope_section": [2, 1, 1]}
    return None


def _keep_kinds_of_layers(default: Any, found: dict[str, Any]) -> None:
    """One layer of each kind that the defaults have, two at least."""
    kinds = {
        name: list(dict.fromkeys(value))
        for name, value in vars(default).items()
        if _LAYER_TYPES.fullmatch(name) and value
    }
    if not kinds or "num_hidden_layers" not in found:
        return
    count = max(2, *(len(value) for value in kinds.values()), 0)
    found["num_hidden_layers"] = count
    found.update({name: [value[min(i, len(value) - 1)] for i in range(count)] for name, value in kinds.items()})
