"""Run a plan: the only part that reads tensor bytes."""

from .cleanup import undisturbed
from .comparison import same_bytes
from .install import Installer, Snapshot
from .run import iterate, run

__all__ = ["Installer", "Snapshot", "iterate", "run", "same_bytes", "undisturbed"]
