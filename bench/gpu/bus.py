"""The rate of the bus, and a device without what the last load left."""

from __future__ import annotations

import gc
from typing import Any

_SIZE = 256 << 20


def pinned_rate(device: str) -> float:
    """Bytes a second from pinned memory to the device: the best of ten copies of 256 MiB, timed by the device."""
    import torch

    source = torch.empty(_SIZE, dtype=torch.uint8, pin_memory=True)
    into = torch.empty(_SIZE, dtype=torch.uint8, device=device)
    event: Any = torch.cuda.Event
    best = 0.0
    with torch.cuda.device(device):
        for _ in range(10):
            begin, end = (event(enable_timing=True) for _ in range(2))
            begin.record()
            into.copy_(source, non_blocking=True)
            end.record()
            end.synchronize()
            best = max(best, source.nbytes / (begin.elapsed_time(end) / 1000))
    return best


def release() -> None:
    """What the last load left: between loads, and never inside of one."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
