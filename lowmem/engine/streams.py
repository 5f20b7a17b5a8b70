"""Streams of accelerators, their events, and host memory that they read by themselves."""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

import torch

_NEEDED = ("Stream", "Event", "stream", "current_stream")
# `cudaHostRegisterPortable`: pinned for every device, and not only for the current one.
_PORTABLE = 1


class Backend(Protocol):
    """Streams, events and memory of one device. The side stream is where weights are copied; None names it."""

    device: torch.device

    def enter(self) -> None:
        """Make it the current device of the calling thread, which is the library's own."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """A flat uint8 tensor on the device, that the side stream uses first. RuntimeError where there is no room."""

    def empty(self, stream: Any, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor on the device whose memory belongs to a stream. RuntimeError where there is no room."""

    def pinned(self, nbytes: int) -> torch.Tensor:
        """A flat uint8 tensor in host memory that copies are made of without waiting for them, if that can be had."""

    def pin(self, memory: torch.Tensor) -> bool:
        """Let copies be made of host memory that is there without waiting for them; False where that cannot be had."""

    def unpin(self, memory: torch.Tensor) -> None:
        """Undo that, when no copy reads it any more; never fails."""

    def current(self) -> Any:
        """The stream that the calling thread computes on."""

    def record(self, stream: Any) -> Any:
        """An event: all that a stream was asked for until now is done."""

    def wait(self, stream: Any, event: Any) -> None:
        """What a stream is asked for from now on waits for an event."""

    def finish(self, event: Any) -> None:
        """The calling thread waits for an event."""

    def copy(self, into: torch.Tensor, source: torch.Tensor) -> None:
        """Ask the side stream for a copy, of host memory or of the device's, without waiting for it."""

    def keep(self, tensor: torch.Tensor, stream: Any) -> None:
        """Memory that is let go of is nobody else's before a stream has done what it was asked for until then."""


class StreamBackend:
    """A kind of device whose module in torch has streams, as `torch.cuda`, `torch.xpu` and `torch.npu` have.

    Args:
        device: with its index.
        api: that module.
        patient: threads that wait for events leave their processor to others meanwhile, and are woken later.
    """

    def __init__(self, device: torch.device, api: Any, *, patient: bool = False) -> None:
        self.device = device
        self._api = api
        self._side = api.Stream(device=device)
        # Not every kind of device has the choice.
        self._kind = {"blocking": True} if patient and device.type == "cuda" else {}

    def enter(self) -> None:
        """Whoever leaves a stream goes back to the thread's device; CUDA would make a context there, on the first."""
        self._api.set_device(self.device)

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Memory belongs to the stream on which it is allocated: what it is first used by."""
        with self._api.stream(self._side):
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def empty(self, stream: Any, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """From the part of torch's cache that is the stream's."""
        with self._api.stream(stream):
            return torch.empty(shape, dtype=dtype, device=self.device)

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Where the system refuses to pin, ordinary memory, from which torch copies more slowly."""
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        except RuntimeError:
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu")

    def pin(self, memory: torch.Tensor) -> bool:
        """By CUDA's `cudaHostRegister`: just so many bytes, that end with their mapping.

        torch's own pinned memory is rounded up to a power of two, and kept for as long as the process lives.
        """
        if self.device.type != "cuda":
            return False
        # Without a device, CUDA would make a context on the first one.
        with self._api.device(self.device):
            refused = int(self._api.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, _PORTABLE))
            if refused:
                # CUDA remembers it for the thread, and the next kernel would be blamed for it.
                with contextlib.suppress(RuntimeError):
                    torch.empty(1, device=self.device).fill_(0)
        return not refused

    def unpin(self, memory: torch.Tensor) -> None:
        """By `cudaHostUnregister`; on a device that has failed it fails too, and the kernel takes the pages anyway."""
        with contextlib.suppress(RuntimeError), self._api.device(self.device):
            self._api.cudart().cudaHostUnregister(memory.data_ptr())

    def current(self) -> Any:
        """The current stream of the device."""
        return self._api.current_stream(self.device)

    def record(self, stream: Any) -> Any:
        """A new event."""
        event = self._api.Event(**self._kind)
        event.record(self._side if stream is None else stream)
        return event

    def wait(self, stream: Any, event: Any) -> None:
        """The host goes on."""
        (self._side if stream is None else stream).wait_event(event)

    def finish(self, event: Any) -> None:
        """Without the interpreter's lock."""
        event.synchronize()

    def copy(self, into: torch.Tensor, source: torch.Tensor) -> None:
        """On the side stream."""
        with self._api.stream(self._side):
            into.copy_(source, non_blocking=True)

    def keep(self, tensor: torch.Tensor, stream: Any) -> None:
        """Tell torch's allocator."""
        tensor.record_stream(stream)


class PlainBackend:
    """A device without streams, such as MPS: it does what it is asked for in one order, and copies are waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def enter(self) -> None:
        """Nothing."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """There."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def empty(self, stream: Any, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """There."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Ordinary memory."""
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")

    def pin(self, memory: torch.Tensor) -> bool:
        """It cannot."""
        return False

    def unpin(self, memory: torch.Tensor) -> None:
        """Nothing."""

    def current(self) -> None:
        """The only one."""

    def record(self, stream: Any) -> None:
        """Nothing."""

    def wait(self, stream: Any, event: Any) -> None:
        """Nothing."""

    def finish(self, event: Any) -> None:
        """Nothing."""

    def copy(self, into: torch.Tensor, source: torch.Tensor) -> None:
        """Done when it comes back."""
        into.copy_(source)

    def keep(self, tensor: torch.Tensor, stream: Any) -> None:
        """Nothing."""


def has_streams(api: Any) -> bool:
    """Whether torch's module of a kind of device has what `StreamBackend` needs."""
    return all(hasattr(api, name) for name in _NEEDED)
