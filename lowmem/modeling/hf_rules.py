"""The rules of a transformers model: names, ties, dtypes, and what is done when its weights are there.

Each is read from the attributes and functions that `from_pretrained` reads (`transformers/modeling_utils.py`, version
5).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..checkpoint import TensorEntry
from ..int8 import Int8Linear
from .alone import alone, as_before
from .conversions import Conversion, Renaming
from .empty import real_tensors
from .hf_conversions import HFConversions
from .rules import Rules
from .targets import Target, dtype_name, owner_of, tensor_of, walk


@dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """What a model is given when its weights are there.

    Attributes:
        config: what `generate` takes its defaults from; None leaves the one that the model has.
        function: what stands for `generate`, with `model` as an argument; None for the model's own.
        epilogue: what the model's class does besides.
    """

    config: Any = None
    function: Callable[..., Any] | None = None
    epilogue: Callable[[nn.Module], None] | None = None


class TransformersRules(Rules):
    """The rules of a transformers model, read from the attributes that `from_pretrained` reads.

    Args:
        model: itself.
        built: whether lowmem built it, at its final dtypes.
        generation: what it is given when its weights are there.
        key_mapping: regular expression → replacement, applied to keys before transformers' own renames.
    """

    kind = "transformers"
    unties = True

    def __init__(
        self,
        model: nn.Module,
        built: bool,
        generation: Generation | None = None,
        key_mapping: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(model)
        self._generation = Generation() if generation is None else generation
        hf: Any = model
        self._hf = hf
        # A model that the caller built has whatever dtype it was built with; the request decides then.
        self.owns_dtypes = built
        self.no_split = tuple(sorted(hf._no_split_modules or ()))
        self.skip_keys = tuple(sorted(hf._skip_keys_device_placement or ()))
        self._conversions = HFConversions(model, key_mapping)

    def declared_ties(self) -> Mapping[str, str]:
        """`all_tied_weights_keys`: target → source."""
        ties: Mapping[str, str] = getattr(self._hf, "all_tied_weights_keys", None) or {}
        return ties

    def rename(self, entries: Mapping[str, TensorEntry], targets: Mapping[str, Target]) -> Renaming:
        """Old names, scoped prefixes, converters and the base model's prefix, by transformers' own description."""
        return self._conversions.rename(entries, targets)

    def convert(
        self, entries: Mapping[str, TensorEntry], renaming: Renaming, targets: Mapping[str, Target]
    ) -> list[Conversion]:
        """Fused experts and the like, by transformers' own description.

        Raises:
            KeysError: transformers cannot convert them.
        """
        return self._conversions.convert(entries, renaming, targets)

    def how_converted(self) -> str:
        """transformers' version, and every operation with its settings and its source."""
        return self._conversions.described()

    def keep_fp32(self, dtype: str, names: Iterable[str]) -> set[str]:
        """`_keep_in_fp32_modules` for fp16, `_keep_in_fp32_modules_strict` for fp16 and bf16."""
        if self.owns_dtypes and isinstance(whole := self._hf.config.dtype, torch.dtype):
            # Single modules may be built at other dtypes; that of the whole decides.
            dtype = dtype_name(whole)
        patterns: set[str] = set()
        if dtype == "float16":
            patterns.update(self._hf._keep_in_fp32_modules or ())
        if dtype in ("float16", "bfloat16"):
            patterns.update(self._hf._keep_in_fp32_modules_strict or ())
        if not patterns:
            return set()
        # Searched anywhere in the name, `*` for anything: core_model_loading.build_glob_alternation.
        matcher = re.compile("|".join(f"(?:{p.replace('*', '.*')})" for p in sorted(patterns)))
        return {name for name in names if matcher.search(name)}

    def vocabularies(self) -> Mapping[int, str]:
        """Every entry of the config, or of a sub-config, that ends in `vocab_size`."""
        return dict(_vocabularies(self._hf.config.to_dict(), ""))

    def may_miss(self, names: Collection[str]) -> set[str]:
        """`_keys_to_ignore_on_load_missing`."""
        return _searched(self._hf._keys_to_ignore_on_load_missing, names)

    def may_ignore(self, keys: Collection[str]) -> set[str]:
        """`_keys_to_ignore_on_load_unexpected`, and buffers that were persistent in old checkpoints."""
        patterns = set(self._hf._keys_to_ignore_on_load_unexpected or ())
        buffers = [name for name, _ in self._hf.named_buffers()]
        if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
            patterns.add(r"rotary_emb\.inv_freq")
        if any(name.endswith("position_ids") for name in buffers):
            patterns.add(r"(^|\.)position_ids$")
        return _searched(patterns, keys)

    def check_initialisable(self, names: Collection[str]) -> None:
        """`_init_weights` covers every module."""

    def initialise(self, names: Collection[str]) -> None:
        """`initialize_weights`, which touches only tensors that are not marked as initialised; mark all the rest.

        It also skips marked modules, but a parent may initialise the weights of its children (T5's attention does):
        only modules with nothing to initialise inside are marked.
        """
        wanted = set(names)
        concerned = {"", *(name[: dot.end()] for name in wanted for dot in re.finditer(r"\.", name))}
        followers = self._set_aside(name for name in self.declared_ties() if name in wanted)
        try:
            for prefix, module in walk(self.model):
                # nn.Module's own way to set an attribute looks through all of its tables.
                module.__dict__["_is_hf_initialized"] = prefix not in concerned
                held: list[tuple[str, Any]] = [*module._parameters.items(), *module._buffers.items()]
                for leaf, tensor in held:
                    if tensor is not None:
                        tensor._is_hf_initialized = prefix + leaf not in wanted or prefix + leaf in followers
            with as_before(), real_tensors():
                self._hf.initialize_weights()
        finally:
            for name, tensor in followers.items():
                owner, leaf = owner_of(self.model, name)
                owner._parameters[leaf] = tensor

    def _set_aside(self, names: Iterable[str]) -> dict[str, nn.Parameter]:
        """Put placeholders for tied parameters, whose values come from their source: once is enough."""
        followers: dict[str, nn.Parameter] = {}
        for name in names:
            owner, leaf = owner_of(self.model, name)
            parameter = owner._parameters.get(leaf)
            if parameter is not None:
                followers[name] = parameter
                owner._parameters[leaf] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        return followers

    def finish(self, missing: Collection[str]) -> None:
        """Rotary and other transient buffers, ties, generation config, eval mode."""
        with alone(), real_tensors():
            self._fill_meta_buffers()
            self._tie(missing)
        self._mark_loaded(missing)
        if not hasattr(self._hf, "_use_kernels"):
            self._hf._use_kernels = False
        self._hf._weight_conversions = self._conversions.used
        if self._generation.config is not None:
            self._hf.generation_config = self._generation.config
        if self._generation.function is not None:
            self._hf.generate = functools.partial(self._generation.function, model=self._hf)
        if self._generation.epilogue is not None:
            self._generation.epilogue(self._hf)
        super().finish(missing)

    def settle(self, module: nn.Module) -> None:
        """Free the parameters that the class froze (sinusoidal positions, backbones), where lowmem built the model.

        `from_pretrained` makes each anew: every float takes a gradient and nothing else does (`set_param_for_module`).
        The scales of an int8 layer are no parameter there.
        """
        if not self.owns_dtypes:
            return
        scales = module.SCB if isinstance(module, Int8Linear) else None
        for parameter in module._parameters.values():
            if parameter is None or parameter is scales:
                continue
            if parameter.requires_grad != parameter.is_floating_point():
                parameter.requires_grad_(not parameter.requires_grad)

    def _tie(self, missing: Collection[str]) -> None:
        """`tie_weights`, but for tensors that lie on different devices: each keeps its copy."""
        ties: dict[str, str] | None = getattr(self._hf, "all_tied_weights_keys", None)
        if not ties:
            return
        at = {name: tensor_of(self.model, name).device for pair in ties.items() for name in pair}
        apart = {name: source for name, source in ties.items() if at[name] != at[source]}
        for name in apart:
            del ties[name]
        self._hf.tie_weights(missing_keys=set(missing), recompute_mapping=False)
        ties.update(apart)

    def _mark_loaded(self, missing: Collection[str]) -> None:
        """As `from_pretrained` leaves them, so that a larger model around this one initialises itself and not this.

        `post_init` of such a model runs `initialize_weights` over all that is not marked.
        """
        for prefix, module in walk(self.model):
            module.__dict__["_is_hf_initialized"] = True
            transient = module._non_persistent_buffers_set
            held: list[tuple[str, Any]] = [*module._parameters.items(), *module._buffers.items()]
            for leaf, tensor in held:
                if tensor is not None and leaf not in transient and prefix + leaf not in missing:
                    tensor._is_hf_initialized = True

    def _fill_meta_buffers(self) -> None:
        """Buffers that no checkpoint holds are filled by `_init_weights`, as `from_pretrained` does."""
        lost = [name for name, buffer in self.model.named_buffers(remove_duplicate=False) if buffer.is_meta]
        for name in lost:
            owner, leaf = owner_of(self.model, name)
            buffer = owner._buffers[leaf]
            assert buffer is not None
            owner._buffers[leaf] = torch.empty_like(buffer, device="cpu")
        if lost:
            self.initialise(lost)


def _vocabularies(table: Mapping[str, Any], path: str) -> Iterator[tuple[int, str]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _vocabularies(value, f"{path}{key}.")
        elif isinstance(value, int) and key.endswith("vocab_size"):
            yield value, f"{path}{key}"


def _searched(patterns: Iterable[str] | None, names: Collection[str]) -> set[str]:
    if not patterns:
        return set()
    matcher = re.compile("|".join(f"(?:{p})" for p in patterns))
    return {name for name in names if matcher.search(name)}
