"""Tiny transformers models and the comparison that every parity test ends in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lowmem
from bench.comparison import differences_of, every_tensor, same, ties_of
from lowmem.errors import BudgetError
from lowmem.offload.weights import MappedParameter, OffloadedParameter

__all__ = [
    "KINDS",
    "assert_same_model",
    "change_config",
    "every_tensor",
    "inputs_of",
    "model_class",
    "new_model",
    "outputs_of",
    "same",
    "ties_of",
]

# kind: (class, config class, changes to the config). Sizes are small and no two of them equal.
_TEXT = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_TEXT, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64},
    ),
    "llama-tied": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_TEXT, "intermediate_size": 48, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 96, "n_positions": 40, "n_embd": 32, "n_layer": 3, "n_head": 4},
    ),
    "bert-mlm": (
        "BertForMaskedLM",
        "BertConfig",
        {**_TEXT, "intermediate_size": 48, "max_position_embeddings": 40},
    ),
    "bert": (
        "BertModel",
        "BertConfig",
        {**_TEXT, "intermediate_size": 48, "max_position_embeddings": 40},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    ),
    "gemma": (
        "GemmaForCausalLM",
        "GemmaConfig",
        {**_TEXT, "intermediate_size": 48, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64},
    ),
    "qwen3": (
        "Qwen3ForCausalLM",
        "Qwen3Config",
        {**_TEXT, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64},
    ),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            **_TEXT,
            "num_hidden_layers": 2,
            "intermediate_size": 48,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "max_position_embeddings": 64,
        },
    ),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "image_size": 16,
            "patch_size": 8,
            "num_labels": 5,
        },
    ),
}


def new_model(kind: str, dtype: str = "float32") -> Any:
    """A model with seeded values, none of which is a round number: norms and biases too."""
    import transformers

    cls, config, changes = KINDS[kind]
    torch.manual_seed(7)
    made = getattr(transformers, config)(**changes)
    for name, token in (("eos_token_id", 1), ("pad_token_id", 0), ("bos_token_id", 2), ("decoder_start_token_id", 0)):
        if kind != "vit" and (name != "decoder_start_token_id" or kind == "t5"):
            setattr(made, name, token)
    model = getattr(transformers, cls)(made).to(getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape).to(parameter.dtype) * 0.05)
    model.config.architectures = [cls]
    return model


def model_class(folder: Path) -> Any:
    """The class that `config.json` names."""
    import transformers

    return getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])


def change_config(folder: Path, **changes: Any) -> None:
    """Rewrite values of `config.json`; None removes one."""
    path = folder / "config.json"
    table = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            table.pop(key, None)
        else:
            table[key] = value
    path.write_text(json.dumps(table))


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    """A seeded batch that the model takes."""
    generator = torch.Generator().manual_seed(3)
    if hasattr(model.config, "patch_size"):
        size = model.config.image_size
        return {"pixel_values": torch.randn(2, 3, size, size, generator=generator).to(model.dtype)}
    ids = torch.randint(3, model.config.vocab_size, (2, 7), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids[:, :4]
    return batch


def outputs_of(model: Any) -> torch.Tensor:
    """Logits, or the last hidden state of a headless model."""
    with torch.no_grad():
        result = model(**inputs_of(model))
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def is_on_disk(parameter: torch.Tensor) -> bool:
    """Whether a parameter is pages of a file, or has no values before it is used."""
    return isinstance(parameter, (MappedParameter, OffloadedParameter))


def least_ram(source: Path, **options: Any) -> int:
    """What the refusal says would do."""
    try:
        lowmem.plan(source, ram=1, **options)
    except BudgetError as error:
        return error.required
    raise AssertionError("a byte was enough")


def assert_same_model(ours: Any, theirs: Any) -> None:
    """Everything that a user of a transformers model can see is the same, bit for bit."""
    differences = list(differences_of(ours, theirs))
    assert not differences, "\n".join(differences[:10])
    assert same(outputs_of(ours), outputs_of(theirs))


Saved = Callable[..., Path]
