"""Names of tensors and modules, and the patterns that pick some of them."""

from __future__ import annotations

import fnmatch
import functools
import re


def name_matches(name: str, pattern: str) -> bool:
    """Whether `pattern` names the tensor or a module around it: whole components, anywhere; `*` stands for anything.

    `"norm"` matches `model.norm.weight` but not `input_layernorm.weight`; `"*norm"` matches both;
    `"layers.0.mlp"` matches everything inside that module.
    """
    return _compiled(pattern).match(f".{name}.") is not None


@functools.lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    # Between dots, so that components stay whole; only `*` is special.
    literal = pattern.replace("[", "[[]").replace("?", "[?]")
    return re.compile(fnmatch.translate(f"*.{literal}.*"))
