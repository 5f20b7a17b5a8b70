"""Code that nobody here has seen, run once on tensors without values: what it gives, and the memory that it takes."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from .._shared import silent
from .alone import alone
from .following import HERE, Followed
from .meta_kernels import import_meta_kernels

R = TypeVar("R")
# Beginnings of the names of functions whose kernels want their tensors dense, and take several passes; as those of
# interpolations do whose names end in `_aa` (antialias).
_OWN_MEMORY = ("linalg", "fft")


@torch.inference_mode(False)  # or others of torch's functions would be seen
def rehearse(
    counting: Counting, sources: Callable[[str], list[torch.Tensor]], run: Callable[[list[torch.Tensor]], R]
) -> R:
    """What `run` gives of tensors without values.

    Args:
        counting: counts what is made meanwhile.
        sources: makes them on a device.
        run: what is rehearsed; several times, where it is not content with where its tensors are.

    Raises:
        Exception: what `run` raised when it was run first.
    """
    refusal: Exception | None = None
    import_meta_kernels()
    try:
        # What it makes itself has no memory either; but the numbers by which it indexes may have to be there.
        for device, surrounding in (("meta", _on_meta), ("cpu", _in_disguise), ("meta", nullcontext)):
            with alone(), surrounding():
                given = sources(device)
                counting.reset()
                try:
                    with counting:
                        return run(given)
                except Exception as error:
                    traceback.clear_frames(error.__traceback__)
                    refusal = refusal or error
        assert refusal is not None
        raise refusal
    finally:
        # It knows this frame, which would be kept until the collector runs.
        del refusal


def _on_meta() -> AbstractContextManager[Any]:
    return torch.device("meta")


@contextmanager
def _in_disguise() -> Iterator[None]:
    """Tensors without values say that they are on the CPU: code may bring them there."""
    # Most operations need it not.
    from torch._subclasses.fake_tensor import FakeTensorMode

    # Every error is logged there besides.
    with silent(FakeTensorMode.__module__), FakeTensorMode(allow_non_fake_inputs=True):
        yield


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that are made inside of it, at the worst moment."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reset()

    def reset(self) -> None:
        """Forget what was counted."""
        self.most = 0
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if HERE.silent:
            return func(*args, **(kwargs or {}))
        before = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        made = _tensors(result)
        if not made:
            # As of all that is followed: nothing to count.
            return result
        for tensor in made:
            if _storage(tensor) not in before:
                storage = tensor.untyped_storage()
                self._held[_storage(tensor)] = StorageWeakRef(storage), storage.nbytes()  # type: ignore[no-untyped-call]
        self._held = {number: held for number, held in self._held.items() if not _is_gone(held[0])}
        held = sum(nbytes for _, nbytes in self._held.values())
        self.most = max(self.most, held + _of_kernel(func, (args, kwargs), made))
        return result


def _of_kernel(func: Any, arguments: Any, made: list[torch.Tensor]) -> int:
    """Bytes of what a kernel makes for itself, which no function of torch tells: what it wants dense and is not, and
    what lies between its passes, which is no more than what comes in or goes out.
    """
    name = func.overloadpacket.__name__.lstrip("_")
    if not name.startswith(_OWN_MEMORY) and not name.endswith("_aa"):
        return 0
    given = _tensors(arguments)
    between = max((tensor.nbytes for tensor in (*given, *made)), default=0)
    return sum(tensor.nbytes for tensor in given if not tensor.is_contiguous()) + between


def _storage(tensor: torch.Tensor) -> int:
    number: int = tensor.untyped_storage()._cdata
    return number


def _is_gone(storage: StorageWeakRef) -> bool:
    gone: bool = storage.expired()  # type: ignore[no-untyped-call]
    return gone


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        # What is followed has no memory, here or later.
        return [] if isinstance(value, Followed) else [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for part in value for t in _tensors(part)] if isinstance(value, (list, tuple)) else []
