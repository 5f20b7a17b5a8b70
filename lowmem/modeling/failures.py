"""Whatever foreign code raises while a model is made becomes a `ModelError` that says where."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .._shared import interrupts_first
from ..errors import LowmemError, ModelError, OutOfMemoryError


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn an exception of foreign code into a `ModelError` that begins with `what`.

    lowmem's own errors and interrupts pass. A `SystemExit` does not: a model that cannot be made is no reason to end
    the caller's program.

    Raises:
        ModelError: with the kind and the text of what was raised; an `OutOfMemoryError` for a `MemoryError`.
    """
    try:
        with interrupts_first():
            yield
    except LowmemError:
        raise
    except MemoryError as error:
        raise OutOfMemoryError(
            f"{what}: out of host memory ({str(error) or 'MemoryError'}); free memory, or raise the limit (ulimit -v, "
            "cgroup) of this process"
        ) from error
    except (Exception, SystemExit) as error:
        raise ModelError(f"{what}: {describe(error)}") from error


def describe(error: BaseException) -> str:
    """Text of an error, with its kind where the text alone says little (`KeyError: 0`)."""
    text = str(error)
    return text if isinstance(error, (OSError, ValueError)) and text else f"{type(error).__name__}: {text}"
