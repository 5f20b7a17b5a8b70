"""The conductor: source → checkpoint → skeleton → mapping → plan → engine → report."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from ._collector import paused_collector
from .checkpoint import Wish, make_wish
from .checkpoint.int8 import has_scales
from .divided import Company, agreed, at_home, check_ranks, is_divided, members_of, ranks_of
from .engine import Installer, Snapshot, run, undisturbed
from .errors import OptionError, PlacementError
from .fitting import Phases, fit
from .limits import accelerators_here
from .mapping import KeyDiff, diff_of, refuse
from .memory import anonymous_memory, measure
from .modeling.holding import Holding
from .modeling.int8 import bitsandbytes_here, finish_layers, mark
from .modeling.int8_choice import NO_INT8, Int8Request
from .modeling.meta_kernels import bytes_of_imports
from .modeling.request import ModelRequest, ModelSource, make_model_request
from .modeling.sharding import rank_here, reshard, retake
from .modeling.skeleton import Origin, Skeleton, find_origin
from .offload import attach, bring_weights, comes_at_use, give_up
from .planner import LoadPlan, LoadRequest, ProgressCallback, make_plan
from .planner.request import FilterFunction, Names, Renames, TransformsOption, checks_names, flag, make_request
from .report import LoadReport
from .sizes import shown
from .sources import Found, Sources, look_at


@dataclass(frozen=True, eq=False)
class LoadResult:
    """What `load` gives back.

    Attributes:
        model: the loaded module, in eval mode.
        plan: what was decided before the load.
        report: what happened, predicted beside measured.
    """

    model: nn.Module = field(repr=False)
    plan: LoadPlan
    report: LoadReport


@checks_names
def load(
    source: Sources,
    *,
    model: ModelSource = None,
    auto_class: Any = None,
    config: Any = None,
    attn_implementation: str | Mapping[str, str] | None = None,
    experts_implementation: str | Mapping[str, str] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    distributed_config: Any = None,
    dtype: Any = "auto",
    device_map: Any = None,
    max_memory: Mapping[Any, int | str] | None = None,
    ram: int | str | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    keep_fp32: Iterable[str] | None = (),
    residency: str = "map",
    strict: bool | str = True,
    staging: int | str | None = None,
    no_split: Iterable[str] | None = None,
    io: str = "auto",
    prefetch: bool = False,
    keep_cache: bool = False,
    dispatch: str = "lowmem",
    weights: str | None = None,
    ema: bool | None = None,
    variant: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    download: bool = False,
    prefix: str | None = None,
    only: Names = None,
    skip: Names = None,
    rename: Renames = None,
    reshape: str | Iterable[str] | None = None,
    preset: str | None = None,
    filter_fn: FilterFunction = None,
    transforms: TransformsOption = None,
    ignore_mismatched_sizes: bool = False,
    quantize: str | None = None,
    skip_modules: str | Iterable[str] | None = None,
    dequantize: bool = False,
    int8_threshold: float | None = None,
    read: str = "auto",
    trust_remote_code: bool = False,
    progress: ProgressCallback | None = None,
) -> LoadResult:
    """Load a checkpoint into a model, within a RAM budget.

    Args:
        source: a folder, an index file, a weights file (`.safetensors`, or pickled: `.bin`, `.pt`, `.pth`, `.ckpt`),
            or a model of the hub that is in its cache (`org/name`). Or several: module → source, such as
            `{"": "llm", "model.vision_tower": "tower.pth"}`, each a path or a `lowmem.Source` with options of its own;
            what a later one has a module for is read from that alone.
        model: a module, a callable that makes one (run with its parameters on meta), or None for the transformers
            model that `config.json` describes.
        auto_class: a class of transformers or its name: an auto class such as `"AutoModel"`, or a model class. Default:
            the class that `architectures` in the config names.
        config: a config of transformers, or the path of one. Default: the `config.json` beside the weights.
        attn_implementation: how a transformers model computes attention: `"eager"`, `"sdpa"`, …, or sub-config → one.
        experts_implementation: how it computes fused experts: `"eager"`, `"grouped_mm"`, …, likewise.
        model_kwargs: attributes of the config → what they are to be, such as `{"num_labels": 3}`; others go to the
            class.
        num_classes: of a timm model, outputs of its classifier; where the checkpoint has others it is initialised.
        in_chans: of a timm model, channels of its input; the first convolution is adapted as timm does it.
        distributed_config: a `DistributedConfig` of transformers, or its arguments such as `{"tp_size": 2}`: how the
            model's own plans divide it among the ranks of `torchrun`. A model of your own may be divided before
            (`fully_shard`, `parallelize_module`, …): each rank reads and holds its parts of DTensors only.
        dtype: `"auto"` (as the checkpoint has it), or a float dtype; floating tensors only. Also sub-config → dtype, of
            which that of `""`, the whole, counts, as in transformers.
        device_map: None (CPU), a device, `"auto"`, `"balanced"`, `"balanced_low_0"`, `"sequential"`, or module →
            device (`"cpu"`, `"disk"`, `"cuda:0"`, `0`); the nearest enclosing module wins.
        max_memory: device → bytes that its weights may take.
        ram: bound on the anonymous host memory that the load adds, such as `"8GiB"`. Default: what the machine, its
            cgroups and rlimits leave.
        offload_folder: where weights on disk go that must be cast or put together. Without it that is done whenever
            they are used; what an operation computes cannot be on disk then.
        keep_fp32: module or parameter names, or patterns with `*`, that stay in fp32 where the rest is fp16 or bf16.
        residency: `"map"` (same dtype on the CPU is file pages) or `"copy"` (the files can go after the load).
        strict: refuse missing and mismatched tensors; `"shapes"`: mismatched ones only, as `from_pretrained` does. What
            is not refused is initialised by the model's own rule.
        staging: bound on the readers' buffers, at least 1 MiB.
        no_split: class names of modules that an inferred device map keeps whole. Default: the model's own.
        io: how files are read: `"buffered"` (through the page cache), `"direct"` (past it, where the system can),
            `"mmap"`, or `"auto"`: by what is in the cache, the file system, and a trial of both ways.
        prefetch: ask the kernel to read mapped weights ahead, for the first forward.
        keep_cache: leave in the page cache what was read for copying and was not there before.
        dispatch: who brings weights on disk, or that wait in host memory, to where they compute: `"lowmem"`, ahead of
            their use and within `ram`, or `"accelerate"`, by its hooks.
        weights: path of the mapping inside a pickled file that holds the weights, such as `"state_dict"`. Default: the
            one that fits the model.
        ema: take averaged weights (True) or those that were trained (False) where a file has both.
        variant: take the files with this word in their names, such as `"fp16"`.
        subfolder: a folder inside the source that is meant, with its own config.
        revision: a branch, tag or commit of a model of the hub, as after `@` in the source.
        download: whether a model of the hub may be fetched; otherwise nothing uses the network.
        prefix: take only the keys inside this module, without it: `"backbone"` makes `backbone.a` into `a`.
        only: the checkpoint's tensors to take: names, modules, patterns with `*`, or a function of a key.
        skip: those to leave, likewise; the model's own rule initialises what they would have fed.
        rename: regular expression → replacement as `re.sub` takes them, a function of a key, or a list of these.
        reshape: the model's tensors, or patterns, that may be fed from another shape of as many elements.
        preset: a known change from one library's layout to another's, such as `"convnextv2->timm"`.
        filter_fn: a function of a state dict, or of one and the model, that gives the state dict to load, such as
            timm's `checkpoint_filter_fn`. It is run without values when the load is planned: what only renames or moves
            elements about costs nothing, and the rest is computed with the values of the tensors that it takes.
        transforms: the model's tensors, or patterns → what is done to what feeds them (`lowmem.interpolate`, …).
        ignore_mismatched_sizes: the model's own rule initialises what has another shape, though `strict`.
        quantize: `"int8"`: make the linear layers int8 while they are read, row by row, as bitsandbytes does it
            (LLM.int8). Layers that are int8 in the checkpoint are so without it.
        skip_modules: linear layers that stay floats then, by the beginning of their name up to a dot, or its end.
            Default: the list of transformers, which is the output embedding and the module of the last parameter; of a
            module of your own what is called `lm_head`. Tied layers and those of `keep_fp32` always stay floats.
        dequantize: make floats of what is int8 in the checkpoint.
        int8_threshold: magnitude from which bitsandbytes computes activations in fp16 instead of int8. Default: that of
            the checkpoint's config, or 6.
        read: of several ranks of torch.distributed, `"each"`: every one reads what it holds, or `"once"`: what ranks of
            a host hold alike is read by one of them and given to the others; every rank must then call `load`. Default:
            by how much is shared, and what the files lie on.
        trust_remote_code: whether Python files beside the checkpoint may run.
        progress: called with a `Progress` from the calling thread.

    Returns:
        The model, the plan, and the report of predicted beside measured memory.

    Raises:
        LowmemError: see `lowmem.errors`; a failed load leaves no thread, no temporary file and no changed model.
    """
    with Company() as company:
        reshard(model)
        # Before anything can be refused: who waits for this rank must hear of it.
        company.join(ranks_of(model, distributed_config, read))
        asked = make_model_request(
            model,
            auto_class=auto_class,
            config=config,
            attn_implementation=attn_implementation,
            experts_implementation=experts_implementation,
            model_kwargs=model_kwargs,
            num_classes=num_classes,
            in_chans=in_chans,
            distributed_config=distributed_config,
            trust_remote_code=flag(trust_remote_code, "trust_remote_code"),
        )
        request = make_request(
            dtype=dtype,
            device_map=device_map,
            max_memory=max_memory,
            ram=ram,
            offload_folder=offload_folder,
            keep_fp32=keep_fp32,
            residency=residency,
            strict=strict,
            staging=staging,
            no_split=no_split,
            io=io,
            prefetch=prefetch,
            keep_cache=keep_cache,
            dispatch=dispatch,
            prefix=prefix,
            only=only,
            skip=skip,
            rename=rename,
            reshape=reshape,
            preset=preset,
            filter_fn=filter_fn,
            transforms=transforms,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            quantize=quantize,
            skip_modules=skip_modules,
            dequantize=dequantize,
            int8_threshold=int8_threshold,
            read=read,
        )
        if progress is not None and not callable(progress):
            raise OptionError(f"progress: expected a function of one Progress, found {shown(progress)}")
        if asked.int8 is not None:
            request = replace(request, int8=asked.int8)
        files: dict[str, Any] = {"variant": variant, "subfolder": subfolder, "revision": revision, "download": download}
        check_ranks(asked, request)
        return _load(source, asked, request, make_wish(weights, ema), files, progress, company)


def _load(
    source: Sources,
    asked: ModelRequest,
    request: LoadRequest,
    wish: Wish,
    files: Mapping[str, Any],
    progress: ProgressCallback | None,
    company: Company,
) -> LoadResult:
    clock = Phases()
    held = anonymous_memory()
    found = look_at(source, rules=request.keys, wish=wish, **files)
    held = max(0, anonymous_memory() - held)
    clock.end("inspect")
    # Imports happen here: they are the program's, not the load's.
    origin = _find_origins(found, asked)
    if request.int8.quantize or any(map(has_scales, found.glances())):
        bitsandbytes_here()
    clock.end("import")
    imported = bytes_of_imports()
    if asked.distributed_config is not None:
        company.meet()
    with measure() as memory, ExitStack() as undo:
        clock.begin()
        skeleton, plan = _prepare(found, origin, request, undo, company=company, clock=clock)
        holding = found.holding
        # All that was pickled is described in it.
        del found
        check_present(plan)
        clock.end("plan")
        read = _execute(skeleton, plan, progress, lambda file: memory.mark(file.name), request.int8, holding, company)
        undo.pop_all()
        holding.settle()
        clock.end("weights")
    # The headers were read before the imports, and are the load's; what is only imported when it is needed is not.
    memory.baseline += bytes_of_imports() - imported - held
    return LoadResult(skeleton.model, plan, LoadReport(plan, clock.seconds, memory, read))


@checks_names
def plan(
    source: Sources,
    *,
    model: ModelSource = None,
    auto_class: Any = None,
    config: Any = None,
    attn_implementation: str | Mapping[str, str] | None = None,
    experts_implementation: str | Mapping[str, str] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    distributed_config: Any = None,
    weights: str | None = None,
    ema: bool | None = None,
    variant: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    download: bool = False,
    trust_remote_code: bool = False,
    **options: Any,
) -> LoadPlan:
    """Decide a load without doing it: no tensor byte is read. Takes the options of `load`, except `progress`.

    Raises:
        LowmemError: whatever `load` would refuse before its first byte.
    """
    asked = make_model_request(
        model,
        auto_class=auto_class,
        config=config,
        attn_implementation=attn_implementation,
        experts_implementation=experts_implementation,
        model_kwargs=model_kwargs,
        num_classes=num_classes,
        in_chans=in_chans,
        distributed_config=distributed_config,
        trust_remote_code=flag(trust_remote_code, "trust_remote_code"),
    )
    request = make_request(**options)
    wish = make_wish(weights, ema)
    with paused_collector(), ExitStack() as undo:
        files: dict[str, Any] = {"variant": variant, "subfolder": subfolder, "revision": revision, "download": download}
        found = look_at(source, rules=request.keys, wish=wish, **files)
        origin = _find_origins(found, asked)
        return _prepare(found, origin, request, undo, company=None, clock=Phases())[1]


@checks_names
def diff(
    source: Sources,
    *,
    model: ModelSource = None,
    auto_class: Any = None,
    config: Any = None,
    attn_implementation: str | Mapping[str, str] | None = None,
    experts_implementation: str | Mapping[str, str] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    distributed_config: Any = None,
    weights: str | None = None,
    ema: bool | None = None,
    variant: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    download: bool = False,
    trust_remote_code: bool = False,
    prefix: str | None = None,
    only: Names = None,
    skip: Names = None,
    rename: Renames = None,
    reshape: str | Iterable[str] | None = None,
    preset: str | None = None,
    filter_fn: FilterFunction = None,
    transforms: TransformsOption = None,
    dequantize: bool = False,
) -> KeyDiff:
    """What differs between the keys and shapes of a checkpoint and those of a model, and what would mend it.

    Reads no tensor byte. Takes the options of `load` that say what the source is and what its keys mean.

    Raises:
        LowmemError: the source or the model cannot be read, or a rule fits nothing.
    """
    asked = make_model_request(
        model,
        auto_class=auto_class,
        config=config,
        attn_implementation=attn_implementation,
        experts_implementation=experts_implementation,
        model_kwargs=model_kwargs,
        num_classes=num_classes,
        in_chans=in_chans,
        distributed_config=distributed_config,
        trust_remote_code=flag(trust_remote_code, "trust_remote_code"),
    )
    request = make_request(
        prefix=prefix,
        only=only,
        skip=skip,
        rename=rename,
        reshape=reshape,
        preset=preset,
        filter_fn=filter_fn,
        transforms=transforms,
        dequantize=dequantize,
    )
    wish = make_wish(weights, ema)
    with paused_collector(), ExitStack() as undo:
        files: dict[str, Any] = {"variant": variant, "subfolder": subfolder, "revision": revision, "download": download}
        found = look_at(source, rules=request.keys, wish=wish, **files)
        origin = _find_origins(found, asked)
        made = fit(found, origin, request, undo, Phases())
        return replace(diff_of(made.mapping, made.checkpoint, made.skeleton), opened=made.checkpoint.opened)


def _find_origins(found: Found, asked: ModelRequest) -> Origin:
    """What the model, and modules that it does not have yet, are made from; imports happen here."""
    origin = find_origin(found.glance(), asked)
    found.find_origins()
    return origin


def _prepare(
    found: Found, origin: Origin, request: LoadRequest, undo: ExitStack, company: Company | None, clock: Phases
) -> tuple[Skeleton, LoadPlan]:
    """Everything before the first byte.

    `company` is that of a load, which also compares tied tensors that the checkpoint holds twice; None for a plan.
    """
    with paused_collector():
        made = fit(found, origin, request, undo, clock)
        if company is not None:
            if is_divided(made.skeleton):
                company.join(members_of(made.skeleton))
            made = made.without_ties(request, *company.asked_about_ties())
        skeleton, checkpoint = made.skeleton, made.checkpoint
        refuse(made.mapping, checkpoint.source, request.strict, request.keys)
        targets = skeleton.targets
        if is_divided(skeleton):
            request = at_home(skeleton, request)
            made = made.on_rank(rank_here())
            skeleton = made.skeleton
        plan = make_plan(checkpoint, skeleton, made.mapping, request)
        if company is not None:
            plan = agreed(plan, targets, request, company)
        return skeleton, replace(plan, warnings=(*skeleton.warnings, *plan.warnings)) if skeleton.warnings else plan


def check_present(plan: LoadPlan, option: str = "device_map") -> None:
    """A plan may name devices of another machine; a load may not. `option` is the one that named them.

    Raises:
        PlacementError: a device of the plan is not here.
    """
    here = {"cpu", "disk"}
    # Nothing may stay where all the rest is brought to.
    named = [*plan.devices, plan.main_device]
    if here.issuperset(named):
        return
    here |= accelerators_here()
    lost = [d for d in named if d not in here]
    if lost:
        raise PlacementError(
            f"{option}: {lost[0]} is not on this machine (found: {', '.join(sorted(here))}); "
            "a plan can be made without it, a load cannot"
        )


def _execute(
    skeleton: Skeleton,
    plan: LoadPlan,
    progress: ProgressCallback | None,
    on_shard: Callable[[Path], None],
    int8: Int8Request = NO_INT8,
    holding: Holding | None = None,
    company: Company | None = None,
) -> dict[str, int]:
    """Run the plan, and give bytes by the way they were read; on any error a borrowed model is as it was before."""
    borrowed = skeleton.borrowed or (holding is not None and holding.is_borrowed)
    before = Snapshot(skeleton.model) if borrowed else None
    brought = None
    try:
        company = Company() if company is None else company
        read = run(plan, Installer(skeleton.model), progress, on_shard, company.watch, company.carrier)
        brought = bring_weights(skeleton.model, plan)
        fresh = [name for p in plan.placements if p.residency == "init" for name in p.names]
        if fresh:
            skeleton.rules.initialise(fresh)
            company.make_alike(plan, skeleton.model)
        if holding is not None:
            holding.finish(_unfed(plan))
        skeleton.rules.finish(_unfed(plan))
        skeleton.model.eval()
        if skeleton.int8 is not None:
            finish_layers(skeleton.model, skeleton.int8, int8, comes_at_use)
        attach(skeleton.model, plan, skeleton.rules, brought, () if holding is None else holding.listed)
        # What fails leaves no mark on a model's config.
        mark(skeleton.model, skeleton.int8, int8)
        retake(skeleton.model)
        company.settle()
    except BaseException:
        undo: list[Callable[[], None]] = []
        if brought is not None:
            undo.append(functools.partial(give_up, skeleton.model, brought))
        if before is not None:
            undo += [before.restore, functools.partial(retake, skeleton.model)]
        # At once, or a second Ctrl-C during the first would leave the others undone.
        undisturbed(*undo)
        raise
    return read


def _unfed(plan: LoadPlan) -> set[str]:
    """State-dict names that no key of the checkpoint fed directly."""
    mapping = plan.mapping
    return {*mapping.missing, *mapping.excused, *mapping.tied, *(m.target for m in mapping.mismatched)}


__all__ = ["LoadResult", "check_present", "diff", "load", "plan"]
