"""Row-wise int8 as bitsandbytes has it (LLM.int8, arXiv:2208.07339): each row of a weight by its largest magnitude.

A weight of shape [out, in] is int8 `weight` [out, in] and fp32 `SCB` [out]: `SCB` is the row's largest magnitude, and
an element of the row is `weight * SCB / 127`.

1. `rows`: the arithmetic, of floats to int8 and back, in memory that is handed in
2. `linear`: a linear layer with such a weight
"""

from __future__ import annotations

from .linear import Int8Linear
from .rows import dequantise, least_work, measure, quantise, quantise_by, work_size

__all__ = ["Int8Linear", "dequantise", "least_work", "measure", "quantise", "quantise_by", "work_size"]
