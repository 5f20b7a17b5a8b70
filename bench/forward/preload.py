"""What the children's server imports once. No torch operation runs in it: no fork survives torch's threads."""

from __future__ import annotations

import gc

import accelerate
import safetensors.torch
import transformers.generation.utils
import transformers.models.llama.modeling_llama
import transformers.models.qwen3_moe.modeling_qwen3_moe

import bench.forward.child
import lowmem.loader

IMPORTED = (accelerate, safetensors.torch, transformers, bench.forward.child, lowmem.loader)

gc.collect()
# Collections would walk past what the imports left, and write to pages that all children share.
gc.freeze()
