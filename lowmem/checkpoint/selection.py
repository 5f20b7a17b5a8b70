"""Which files of a source are meant, where it has several sets: a variant, a folder inside it, a revision."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath

from ..errors import OptionError
from ..sizes import shown

_VARIANT = re.compile(r"[\w-]+(?:\.[\w-]+)*")


@dataclass(frozen=True, slots=True)
class Selection:
    """What the user said besides the source.

    Attributes:
        variant: the files that transformers writes with `save_pretrained(..., variant=)`, such as `fp16`; None for
            those without one.
        subfolder: a folder inside the source, with slashes, and without one at its ends; empty for the source itself.
        revision: a branch, tag or commit of a model of the hub; None for its default.
        download: whether the network may be used.
    """

    variant: str | None = None
    subfolder: str = ""
    revision: str | None = None
    download: bool = False

    def refuse_revision(self, text: str, why: str) -> None:
        """Refuse a revision of what has none; `main`, which others have for a default, says nothing.

        Raises:
            OptionError: there is one.
        """
        if self.revision not in (None, "main"):
            raise OptionError(
                f"revision: {text} is {why}, which has no revisions; leave {shown(self.revision)} out (only models of "
                "the hub, org/name, have them)"
            )

    def refuse_choice(self, text: str) -> None:
        """Refuse a choice among the files of a folder, where the source is a file.

        Raises:
            OptionError: there is one.
        """
        for option, value in (("variant", self.variant), ("subfolder", self.subfolder)):
            if value:
                raise OptionError(
                    f"{option}: {text} is a file, and {shown(value)} chooses among those of a folder; give the folder, "
                    "or leave it out"
                )


def make_selection(
    variant: str | None = None, subfolder: str | None = None, revision: str | None = None, download: bool = False
) -> Selection:
    """Parse what the user said.

    Raises:
        OptionError: a value that means nothing.
    """
    if not isinstance(download, bool):
        raise OptionError(f"download: expected True or False, found {shown(download)}")
    if variant is not None and not (isinstance(variant, str) and _VARIANT.fullmatch(variant)):
        raise OptionError(f"variant: expected a word such as 'fp16', found {shown(variant)}")
    if revision is not None and not (isinstance(revision, str) and is_revision(revision)):
        raise OptionError(f"revision: expected a branch, tag or commit of a model of the hub, found {shown(revision)}")
    return Selection(variant, _inside(subfolder), revision, download)


def is_revision(text: str) -> bool:
    """Whether a text can name a revision; none can leave the cache's folders."""
    return bool(text) and not (
        text.startswith("/") or "\\" in text or ".." in text.split("/") or not text.isprintable()
    )


def _inside(subfolder: str | None) -> str:
    if subfolder is None or subfolder == "":
        return ""
    if isinstance(subfolder, str) and "\0" not in subfolder and not PureWindowsPath(subfolder).drive:
        path = PurePosixPath(subfolder.replace("\\", "/"))
        if not path.is_absolute() and ".." not in path.parts:
            return "/".join(path.parts)
    raise OptionError(
        f"subfolder: expected a folder inside the source, such as 'text_encoder', found {shown(subfolder)}"
    )
