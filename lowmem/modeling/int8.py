"""Which layers of a model are int8, and the exchange of their modules."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Int8Request:
    """What the user asked about int8, parsed.

    Attributes:
        quantize: make the linear layers int8 that are floats in the checkpoint.
        skip_modules: names or patterns of layers that stay floats then; None for transformers' own list.
        dequantize: make floats of what is int8 in the checkpoint.
        threshold: magnitude from which bitsandbytes computes activations in fp16; None for what the checkpoint's
            config says, or its default.
    """

    quantize: bool = False
    skip_modules: tuple[str, ...] | None = None
    dequantize: bool = False
    threshold: float | None = None


NO_INT8 = Int8Request()
