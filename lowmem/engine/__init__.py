"""Run a plan: the only part that reads tensor bytes."""

from .install import Installer
from .reading import same_bytes
from .run import run

__all__ = ["Installer", "run", "same_bytes"]
