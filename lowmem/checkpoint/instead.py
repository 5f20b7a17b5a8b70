"""What is in a folder instead of a model's weights: it is called by its name, with what would help."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ..errors import SourceError, UnsupportedError
from ..sizes import shown
from .file_names import ADAPTER, PICKLES, SAFETENSORS, is_index, is_of_rank, is_weights, kind_of, listed
from .location import Place

# `PipelineModule.ckpt_layer_path` in deepspeed/runtime/pipe/module.py; experts have a _ behind the number.
_LAYER = re.compile(r"layer_\d+-")
# `get_checkpoint_name` in megatron/training/checkpointing.py of Megatron-LM: ranks of tensors, stages and experts.
_MEGATRON_RANK = re.compile(r"mp_rank_\d+(_\d+)*$")
_OF_MEGATRON = (
    "where it has several, make one with Megatron-LM's tools/checkpoint/convert.py "
    "(--target-tensor-parallel-size 1 --target-pipeline-parallel-size 1)"
)


def refuse_pipeline(place: Place) -> None:
    """A diffusers pipeline is several models, whatever lies beside its `model_index.json`."""
    if "model_index.json" in place.names and (below := _with_weights(place)):
        raise SourceError(
            f"{place.text}: model_index.json: a pipeline of several models, in {listed(below)}; "
            f"give one of them, {place.part(below[0])}"
        )


def refuse_ranks(place: Place, files: list[str]) -> None:
    """DeepSpeed's files of model states are whole models only where there is one, and ZeRO-3 did not divide it.

    Names from `_get_ckpt_name` and `_get_zero_ckpt_name` in deepspeed/runtime/engine.py.
    """
    states = [n for n in files if n.endswith("model_states.pt")]
    if layers := [n for n in states if _LAYER.match(n)]:
        raise UnsupportedError(
            f"{place.text}: a DeepSpeed checkpoint of a pipeline, which has a file for each layer ({listed(layers)}); "
            "give the path of a layer's file for that layer, or load it with DeepSpeed and save the whole model"
        )
    if len(states) > 1 or any(n.startswith("zero_pp_rank_") for n in states):
        raise UnsupportedError(
            f"{place.text}: a DeepSpeed checkpoint divided among processes ({listed(states)}); make one file of it "
            "with the zero_to_fp32.py beside it, or give the path of the part that you mean"
        )


def _adapters(place: Place) -> list[str]:
    """The files of changes to a base model, as peft and diffusers call them (`SAFETENSORS_WEIGHTS_NAME` in peft)."""
    return [n for n in place.names if ADAPTER.match(n) and n.lower().endswith((SAFETENSORS, *PICKLES))]


def left_adapters(place: Place, chosen: str = "") -> list[str]:
    """What to say of adapters beside weights: `from_pretrained` would put them on the model where peft is there."""
    left = [n for n in _adapters(place) if n != chosen]
    if not left:
        return []
    add = "peft.PeftModel.from_pretrained(result.model, FOLDER) puts it on the model"
    return [f"{listed(left)}: an adapter, which was left alone; {add}"]


def _only_adapters(place: Place, adapters: Sequence[str]) -> SourceError:
    """peft keeps the name of the base model (`PeftConfig` in peft/config.py)."""
    base = place.table("adapter_config.json").get("base_model_name_or_path")
    which = f" {shown(base)}" if isinstance(base, str) and base else ""
    given = f"{which}, which its adapter_config.json names" if which else " that its adapter_config.json names"
    return SourceError(
        f"{place.text}: only an adapter ({listed(adapters)}), which changes a base model; load the base model{given}, "
        f"then peft.PeftModel.from_pretrained(model, FOLDER), or give the path of {adapters[0]} for the "
        "adapter's own tensors"
    )


def of_ranks(text: str, names: Sequence[str]) -> UnsupportedError:
    """The error for what `save_pretrained(..., distributed_checkpoint=True)` of transformers wrote.

    Args:
        text: what the error calls the source.
        names: files of it.
    """
    return UnsupportedError(
        f"{text}: a distributed checkpoint of transformers, divided among processes ({listed(names)}), which lowmem "
        "does not read; transformers.distributed.checkpoint.consolidate_distributed_checkpoint(FOLDER) makes one of it"
    )


def _with_weights(place: Place) -> list[str]:
    return [
        folder
        for folder, names in place.below().items()
        if any(is_index(n) or is_weights(n, False) or is_weights(n, True) for n in names)
    ]


def refuse_unfinished(place: Place) -> None:
    """Refuse a folder into which a checkpoint is converted, or was until that was killed: some of it may be there.

    Raises:
        SourceError: it is one.
    """
    if place.has(".lowmem-convert/state.json"):
        raise SourceError(
            f"{place.text}: an unfinished conversion; run lowmem convert again with the same source and options, which "
            "goes on behind what is whole"
        )


def nothing(place: Place) -> SourceError | UnsupportedError:
    """The error for a place without weights, which says what is there instead."""
    adapters = _adapters(place)
    if adapters:
        return _only_adapters(place, adapters)
    if ranks := [n for n in place.names if is_of_rank(n)]:
        return of_ranks(place.text, ranks)
    if "latest_checkpointed_iteration.txt" in place.names:
        return SourceError(
            f"{place.text}: a Megatron checkpoint: its weights are in iter_*/mp_rank_*/model_optim_rng.pt; "
            f"give the path of that file where an iteration has one; {_OF_MEGATRON}"
        )
    below = _with_weights(place)
    if len(parts := [folder for folder in below if _MEGATRON_RANK.match(folder)]) > 1:
        raise UnsupportedError(
            f"{place.text}: a Megatron checkpoint divided among processes ({listed(parts)}), each with a part of every "
            f"tensor or of the layers; {_OF_MEGATRON}, or give the path of the part that you mean"
        )
    if any(folder.startswith("global_step") for folder in below):
        return SourceError(
            f"{place.text}: a DeepSpeed checkpoint: its weights are in {listed(below)}; give one of these folders "
            "(the file `latest` names the newest)"
        )
    if below:
        return SourceError(
            f"{place.text}: no weights in this folder itself, but in {listed(below)}; "
            f"give one of them, {place.part(below[0])}"
        )
    kinds = {name: kind for name in place.names if (kind := kind_of(name))}
    if kinds:
        return unsupported(place.text, kinds)
    return SourceError(
        f"{place.text}: no {SAFETENSORS} file, no pickled weights ({', '.join(PICKLES)}) and no index in this folder; "
        f"{place.empty}"
    )


def unsupported(text: str, kinds: Mapping[str, str]) -> UnsupportedError:
    """The error for weights of other libraries.

    Args:
        text: what the error calls the source.
        kinds: file → whose weights it holds, as `kind_of` says.
    """
    whose = ", ".join(dict.fromkeys(kinds.values()))
    if whose == "torch.distributed.checkpoint":
        remedy = "make one file: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pt"
    elif whose == "numpy":
        remedy = "write them with safetensors.numpy.save_file(dict(numpy.load(FILE)), 'model.safetensors')"
    elif whose == "GGUF":
        remedy = (
            "bring the model's safetensors, or make them of it: transformers' from_pretrained(FOLDER, gguf_file=NAME), "
            "which needs memory for the whole model, then save_pretrained"
        )
    else:
        remedy = "bring the model's safetensors, or convert these with the library that wrote them"
    return UnsupportedError(f"{text}: weights of a kind that lowmem does not read: {listed(kinds)} ({whose}); {remedy}")
