"""What a program that loads has imported: the children's server, once, and each process under a kernel limit.

No torch operation runs here: no fork survives torch's threads.
"""

from __future__ import annotations

import gc

from bench.vision.operators import declare, has_timm

declare()

import safetensors.torch  # noqa: E402
import transformers.generation.utils  # noqa: E402
import transformers.models.llama.modeling_llama  # noqa: E402

import bench.vision.child  # noqa: E402
import lowmem.loader  # noqa: E402

if has_timm():
    import timm  # noqa: F401

IMPORTED = (safetensors.torch, transformers, bench.vision.child, lowmem.loader)

gc.collect()
# Collections would walk past what the imports left, and write to pages that all children share.
gc.freeze()
