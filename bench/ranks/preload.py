"""What a rank has imported: the children's server, once, and each process under a kernel limit.

No torch operation runs here: no fork survives torch's threads.
"""

from __future__ import annotations

import gc

# What a load would import besides, when torch first computes with tensors without values.
import torch._dynamo
import torch.distributed._composable
import transformers.generation.utils
import transformers.models.llama.modeling_llama

import bench.ranks.child
import lowmem.loader

IMPORTED = (torch, transformers, bench.ranks.child, lowmem.loader)

gc.collect()
# Collections would walk past what the imports left, and write to pages that all children share.
gc.freeze()
