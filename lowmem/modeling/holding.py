"""Modules that a model does not have as its children while it is built: put where a load can reach them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from ..errors import ModelError
from .rules import Rules


class Holding:
    """What was put into a model for the time of a load.

    LLaVA's models keep a tower in a list, so that it is no child (`vision_tower = [tower]`), or build it later
    (`delay_load`). Here such a module is a child until `settle` puts it where the model has it.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self._settle: list[Callable[[], None]] = []
        self._kinds: dict[str, Rules] = {}
        # A module that the caller made is a part now.
        self.is_borrowed = False
        # Modules that are in lists when all is done.
        self.listed: list[nn.Module] = []

    def finish_by(self, front: str, rules: Rules) -> None:
        """Let the module whose names stand behind `front` be finished by rules of its own."""
        self._kinds[front] = rules

    def finish(self, missing: Collection[str]) -> None:
        """As `Rules.finish`, for these modules; `missing` are names in the whole model."""
        for front, rules in self._kinds.items():
            rules.finish([name[len(front) :] for name in missing if name.startswith(front)])

    def hold(self, model: nn.Module, path: str, made: nn.Module | None = None) -> None:
        """Make the module at a path, and every one on the way there, a child of the one that has it.

        Args:
            model: the model.
            path: of the module.
            made: a module that is to be there, if the model does not have its own.

        Raises:
            ModelError: there is no module at the path.
        """
        owner, walked = model, []
        leaves = path.split(".")
        for leaf in leaves[:-1] if made is not None else leaves:
            walked.append(leaf)
            child = owner._modules.get(leaf) or self._from_list(owner, leaf)
            if child is None:
                raise ModelError(_missing(owner, path, ".".join(walked)))
            owner = child
        if made is not None:
            self._put(owner, leaves[-1], made)

    def _from_list(self, owner: nn.Module, leaf: str) -> nn.Module | None:
        """The only module of a list, as a child; None where there is none."""
        held = owner.__dict__.get(leaf)
        if not isinstance(held, (list, tuple)) or len(held) != 1 or not isinstance(held[0], nn.Module):
            return None
        self._lend(owner, leaf, held, held[0])
        return held[0]

    def _put(self, owner: nn.Module, leaf: str, made: nn.Module) -> None:
        """A module where the owner has none yet, or another, or a list for one."""
        held = owner.__dict__.get(leaf)
        if isinstance(held, list):
            self._lend(owner, leaf, held, made)
        else:
            if leaf not in owner._modules:
                _check_place(owner, leaf)
            before = owner._modules.get(leaf)
            had = leaf in owner._modules
            attributes = {leaf: owner.__dict__.pop(leaf)} if leaf in owner.__dict__ else {}
            owner._modules[leaf] = made
            self._undo.append(lambda: _restore(owner, leaf, had, before, attributes))
        # As `load_model` of LLaVA's towers says it, which would load once more.
        if owner.__dict__.get("is_loaded") is False:
            self._settle.append(lambda: owner.__dict__.update(is_loaded=True))

    def _lend(self, owner: nn.Module, leaf: str, held: Any, module: nn.Module) -> None:
        del owner.__dict__[leaf]
        owner._modules[leaf] = module
        self.listed.append(module)

        def back() -> None:
            del owner._modules[leaf]
            owner.__dict__[leaf] = held

        def settle() -> None:
            # A layer that became int8 is another module now.
            loaded = owner._modules[leaf]
            back()
            if isinstance(held, list):
                held[:] = [loaded]
            elif loaded is not held[0]:
                owner.__dict__[leaf] = type(held)([loaded])

        self._undo.append(back)
        self._settle.append(settle)

    def undo(self) -> None:
        """The model as it was."""
        while self._undo:
            self._undo.pop()()

    def settle(self) -> None:
        """Loaded modules where the model has them."""
        for step in self._settle:
            step()
        self._settle.clear()
        self._undo.clear()


def _restore(owner: nn.Module, leaf: str, had: bool, before: nn.Module | None, attributes: dict[str, Any]) -> None:
    del owner._modules[leaf]
    if had:
        owner._modules[leaf] = before
    owner.__dict__.update(attributes)


def _check_place(owner: nn.Module, leaf: str) -> None:
    """Whether a module can be put there: where there is none yet, or nothing.

    LLaVA's towers have no attribute yet for what they build later; a name that is nearly one is none.

    Raises:
        ModelError: it is something else, or nearly the name of something else.
    """
    there = getattr(owner, leaf, None)
    # What the class has under this name, be it None, hides every child of this name.
    of_class = hasattr(type(owner), leaf)
    if leaf in owner._parameters or leaf in owner._buffers or of_class or there is not None:
        kind = "an attribute of its class" if of_class else type(there).__name__
        raise ModelError(
            f"source for {leaf!r}: expected a place for a module in {type(owner).__name__}, found {kind}; name the "
            "attribute that holds the module"
        )
    if hasattr(owner, leaf):
        return
    names = [name for name in (*owner._modules, *vars(owner)) if not name.startswith("_")]
    near = difflib.get_close_matches(leaf, names, n=1, cutoff=0.8)
    if near:
        raise ModelError(
            f"source for {leaf!r}: expected a module that {type(owner).__name__} has or builds later, found no such "
            f"attribute; did you mean {near[0]!r}?"
        )


def _missing(owner: nn.Module, path: str, at: str) -> str:
    leaf = at.rpartition(".")[2]
    found = owner.__dict__.get(leaf)
    kind = "nothing" if found is None else type(found).__name__
    names = ", ".join(map(repr, list(owner._modules)[:8])) or "none"
    if isinstance(found, (list, tuple)):
        kind = f"a {kind} of {len(found)}"
    return (
        f"source for {path!r}: expected a module at {at!r}, found {kind} in {type(owner).__name__} (modules there: "
        f"{names}); correct the path, or, where the module is built later, give model= (or auto_class=) to its "
        "lowmem.Source"
    )
