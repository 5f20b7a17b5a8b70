"""What the children's server imports once. No torch operation runs in it: no fork survives torch's threads."""

from __future__ import annotations

import gc
import logging
from typing import Any

import accelerate
import safetensors.torch
import transformers.generation.utils
import transformers.models.llama.modeling_llama
import transformers.models.qwen3_moe.modeling_qwen3_moe

import bench.forward.child
import lowmem.loader

IMPORTED = (accelerate, safetensors.torch, transformers, bench.forward.child, lowmem.loader)

# Their bars and warnings would hide the bench's own lines. Untyped, as its functions are.
quiet: Any = transformers.logging
quiet.set_verbosity_error()
quiet.disable_progress_bar()
logging.getLogger("accelerate").setLevel(logging.ERROR)
gc.collect()
# Collections would walk past what the imports left, and write to pages that all children share.
gc.freeze()
