"""The device map of the cases that leave the decoder's layers on disk."""

from __future__ import annotations

LAYERS_TO_DISK = {"": "cpu", "model.layers": "disk"}
# The hooks of transformers and accelerate take no module inside another, so this one names each.
DISJOINT = {
    "model.embed_tokens": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
    "model.layers": "disk",
}
