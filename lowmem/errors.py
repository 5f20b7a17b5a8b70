"""Every error that `lowmem` raises on purpose.

    LowmemError
    ├── SourceError          the path or scheme does not lead to a checkpoint
    ├── CheckpointError      a file of the checkpoint is damaged, missing or lies
    ├── UnsupportedError     readable, but of a kind that lowmem does not load
    ├── ModelError           the model cannot be built or cannot be loaded into
    │   └── OutOfMemoryError the host has no memory left to build it
    ├── KeysError            the keys or shapes of checkpoint and model differ
    ├── PlacementError       a device map that is incomplete, unknown or impossible
    ├── BudgetError          the plan needs more memory than it may use
    ├── OffloadError         the offload folder cannot be written or trusted
    ├── RunningError         what is asked of a model cannot be done with weights that are not in memory
    ├── OutputError          the result of a conversion cannot be written, or is not what was written
    ├── OptionError          an argument has a value that means nothing
    ├── MeasureError         memory could not be measured
    ├── RankError            another rank of a load that several do together has failed, or is gone
    ├── PlotError            a picture cannot be drawn here or cannot be written
    └── PeakExceededError    a measured peak is above the asserted limit

Messages name the file, the tensor, what was expected, what was found, and the remedy. README's catalogue is made of
this tree and of what each class says about itself.
"""

from __future__ import annotations

# Characters of a message: what is longer repeats what a file holds. Its end, with the remedy, is kept.
_LONGEST = 6000
_KEPT_OF_END = 1500


class LowmemError(Exception):
    """Base of all errors of lowmem; raised as such for a stream after a fork, a device that failed, a closed stdout.

    Its text is of a few KB at most, and nothing in it steers a terminal, whatever names a file holds.

    Remedy: catch it to catch them all; the message says what to do.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(harmless(arg) if isinstance(arg, str) else arg for arg in args))


def harmless(text: str) -> str:
    """`text` of bounded length, and what is not printable in it escaped as `repr` does, but for line ends and tabs."""
    text = _cut(text)
    if text.isprintable():
        return text
    return _cut("".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text))


def _cut(text: str) -> str:
    left = len(text) - _LONGEST
    if left <= 0:
        return text
    return f"{text[: _LONGEST - _KEPT_OF_END]} ... ({left} characters left out) ... {text[-_KEPT_OF_END:]}"


class SourceError(LowmemError):
    """The path, the name on the hub or the scheme does not lead to a checkpoint.

    Remedy: mend the path or the name; `download=True` fetches from the hub, and `variant`, `subfolder` or the file
    itself choose where there are several candidates, which the message lists.
    """


class CheckpointError(LowmemError):
    """A file of the checkpoint is damaged, missing, contradicts another, or was changed while it was read.

    Remedy: fetch the file that the message names anew; `lowmem check` says what else is wrong with the checkpoint.
    """


class UnsupportedError(LowmemError):
    """The checkpoint or model is of a kind that lowmem does not load.

    Remedy: the message says what loads or converts it; save the result once as safetensors.
    """


class ModelError(LowmemError):
    """The model cannot be built or cannot be loaded into, or a loaded model cannot be completed.

    Remedy: mend what the message names: the class, its arguments, `config.json`, or the function that makes the model.
    """


class OutOfMemoryError(ModelError, MemoryError):
    """The host has no memory left to build the model: caught as a `ModelError`, or as the `MemoryError` that it was.

    Remedy: build with less, as with a function that makes the model on meta, or free memory first.
    """


class KeysError(LowmemError):
    """Keys or shapes of the checkpoint and the model differ.

    Remedy: `lowmem diff` shows what differs, with the `rename` and `reshape` that would mend it; `skip` and
    `strict=False` leave out what need not fit.
    """


class PlacementError(LowmemError):
    """The device map is incomplete, unknown or impossible.

    Remedy: name every module and only devices that there are, or let `device_map="auto"` place them.
    """


class BudgetError(LowmemError):
    """The load, stream or conversion needs more memory than it is allowed; raised before the first read, where known.

    Attributes:
        required: least host bytes (anonymous peak) that this plan can do with.
        limit: bytes that it may use.

    Remedy: allow `required` bytes, or choose what the message offers: a smaller dtype, mapping, layers on disk.
    """

    def __init__(self, message: str, *, required: int, limit: int) -> None:
        super().__init__(message)
        self.required = required
        self.limit = limit


class OffloadError(LowmemError):
    """The offload folder cannot be written, or what is in it cannot be trusted.

    Remedy: give another folder, or make room and rights in this one; what the message says is not lowmem's, remove.
    """


class RunningError(LowmemError, RuntimeError):
    """What is asked of a model cannot be done with weights that are not in memory.

    Remedy: load without `"disk"` in the device map for this, or do it as the message says.
    """


class OutputError(LowmemError):
    """The folder of a conversion cannot be written, is in use, or does not hold what was written.

    Remedy: make room and rights, wait for the other conversion, or give another folder; a second run takes up the rest.
    """


class OptionError(LowmemError, ValueError):
    """An argument has a value that means nothing here.

    Remedy: give one of the values that the message names.
    """


class MeasureError(LowmemError):
    """Memory could not be measured on this system.

    Remedy: as the message says: a process that runs, one `measure()` a block, a device whose memory can be read.
    """


class RankError(LowmemError):
    """Another rank of a load that several do together has failed or is gone, and ended it for all.

    Attributes:
        rank: the global rank.

    Remedy: mend what the message says of that rank, whose own log has its error, and start all ranks again.
    """

    def __init__(self, message: str, *, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


class PlotError(LowmemError):
    """A picture cannot be drawn, because matplotlib is missing, or its file cannot be written.

    Remedy: `pip install 'lowmem[plot]'`, or give a file that can be written, ending in `.png`, `.svg` or `.pdf`.
    """


class PeakExceededError(LowmemError, AssertionError):
    """A measured peak is above the limit that was asserted.

    Remedy: use less in the block, or assert the limit that it may have.
    """
