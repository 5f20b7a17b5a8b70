"""Architectures of transformers loaded both ways and compared bit for bit: `python -m bench.parity`.

Each is built at tiny sizes with every value perturbed, saved by `save_pretrained` in several shards (which writes the
original format, so that what transformers fuses on load lies unfused on disk), and loaded with its own
`from_pretrained` and with `lowmem.load`, at the checkpoint's dtype, in bf16 and in fp32. The test suite runs the same
comparison, one test an architecture.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
import zlib
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import lowmem
from bench.architectures import ARCHITECTURES, Architecture, find_architectures, known_failure
from bench.architectures.inputs import find_batch, run
from bench.comparison import differences_of, every_tensor, same, same_outputs
from bench.results import write

HERE = Path(__file__).parent
DTYPES = ("auto", "bfloat16", "float32")
_SHARDS = 5
_NOISE = 0.1

Row = dict[str, Any]


def save(architecture: Architecture, folder: Path) -> None:
    """Write a checkpoint with seeded values, none of which is a round number; every third one in bf16."""
    model = architecture.build()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in model.state_dict(keep_vars=True).values():
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.add_(torch.rand(tensor.shape, generator=generator) * _NOISE)
    if zlib.crc32(architecture.model_type.encode()) % 3 == 0:
        model = model.to(torch.bfloat16)
    size = sum(tensor.nbytes for tensor in {id(t): t for t in every_tensor(model).values()}.values())
    model.save_pretrained(folder, max_shard_size=max(size // _SHARDS, 1))


def check(architecture: Architecture, folder: Path) -> Row:
    """Save an architecture in the empty `folder`, load it both ways, compare.

    Returns:
        A row of the table: `problems` has the first difference or error of each dtype, and is empty when there is
        none; `inputs` names what the model computed with, and is empty where it was not run; `no_inputs` is why not,
        at one dtype or at all.
    """
    row: Row = {"model_type": architecture.model_type, "class": architecture.cls, "family": architecture.family}
    save(architecture, folder)
    row["dtype"] = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("dtype")
    row["problems"] = {}
    batch = None
    for dtype in DTYPES:
        torch.manual_seed(3)
        theirs = architecture.model_class().from_pretrained(folder, dtype=dtype)
        if dtype == DTYPES[0]:
            row.update(_described(theirs, folder))
        try:
            torch.manual_seed(3)
            ours = lowmem.load(folder, dtype=dtype).model
        except lowmem.LowmemError as error:
            row["problems"][dtype] = f"{type(error).__name__}: {error}".replace(str(folder), "")
            continue
        found = next(differences_of(ours, theirs), None)
        taken, outputs = find_batch(theirs, batch)
        if taken is None:
            row["no_inputs"] = outputs
        elif found is None and not same_outputs(run(ours, taken), outputs):
            found = "outputs differ"
        batch = taken or batch
        if found is not None:
            row["problems"][dtype] = found
        if dtype == DTYPES[0] and found is None and (lost := _lost_by_saving(ours, theirs, folder)):
            row["problems"][dtype] = f"save_pretrained writes other tensors: {lost}"
    row["inputs"] = sorted(batch or ())
    return row


def _lost_by_saving(ours: Any, theirs: Any, folder: Path) -> list[str]:
    """Keys that the loaded model saves otherwise than they were, and than the other model saves them."""
    saved = _save_again(ours, folder / "ours")
    lost = _unlike(saved, _tensors_in(folder))
    # transformers itself does not bring each key back: it decides.
    return _unlike(saved, _save_again(theirs, folder / "theirs")) if lost else []


def _save_again(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return _tensors_in(folder)


def _tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def _unlike(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    return [key for key in {**a, **b} if key not in a or key not in b or not same(a[key], b[key])][:5]


def _described(model: Any, folder: Path) -> Row:
    """What the checkpoint of a model consists of."""
    checkpoint = lowmem.inspect(folder)
    return {
        "tensors": len(checkpoint),
        "files": len({str(entry.file) for entry in checkpoint.values()}),
        "conversions": conversions_of(model, checkpoint),
        "inputs": [],
        "no_inputs": "",
    }


def conversions_of(model: Any, keys: Iterable[str]) -> list[str]:
    """Names of the operations that transformers uses to load these keys into `model`, and `rename` where it does."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    mapping = get_model_conversion_mapping(model)
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    renamings: list[Any] = [one for one in mapping if not isinstance(one, WeightConverter)]
    state = model.state_dict()
    used: set[str] = set()
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if pattern is not None and name in state:
            converter = next(one for one in converters if pattern in one.source_patterns)
            used.add("+".join(type(operation).__name__ for operation in converter.operations))
        elif name != key and key not in state:
            used.add("rename")
    return sorted(used, key=lambda name: (name != "rename", name))


def make_results(rows: Sequence[Row]) -> dict[str, Any]:
    """What is written as JSON: versions, and a row for each architecture."""
    packages = ("lowmem", "torch", "transformers", "safetensors")
    versions = {name: lowmem.__version__ if name == "lowmem" else version(name) for name in packages}
    return {"versions": versions, "rows": list(rows)}


def as_markdown(results: dict[str, Any]) -> str:
    """The table, with what it says in one paragraph above it."""
    rows: list[Row] = results["rows"]
    same = sum(not row["problems"] for row in rows)
    ran = sum(bool(row["inputs"]) for row in rows)
    converted = [row for row in rows if set(row["conversions"]) - {"rename"}]
    operations = {name for row in converted for chain in row["conversions"] for name in chain.split("+")} - {"rename"}
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines = [
        "# Architectures that load as `from_pretrained` loads them",
        "",
        f"{len(rows)} architectures, each of another model type, at tiny sizes; {same} are the same in every way that "
        f"is compared, in all three dtypes; {len(rows) - same} are not, and say why. {len(converted)} need more than "
        f"renames ({', '.join(sorted(operations))}). {ran} were run, with the same outputs. {versions}. Written by "
        "`python -m bench.parity`.",
        "",
        "Saved by `save_pretrained` in several shards with perturbed values, and loaded both ways. Compared bit for "
        "bit: class, config, generation configs, each parameter and buffer (those outside of the state dict too) with "
        "dtype, strides and `requires_grad`, ties, shared memory, modes, what the model returns, and, at its own "
        "dtype, what the loaded model saves.",
        "",
        "| model type | class | family | saved as | tensors | conversions | auto | bf16 | fp32 | run with |",
        "|---|---|---|---|---:|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(_line, rows)]) + "\n"


def _line(row: Row) -> str:
    outcomes = [_cell(row["problems"].get(dtype, "ok")) for dtype in DTYPES]
    inputs = ", ".join(row["inputs"])
    if row["no_inputs"]:
        inputs = f"{inputs}; not at each dtype: " if inputs else "not run: "
        inputs += _cell(row["no_inputs"])
    conversions = ", ".join(row["conversions"]) or "-"
    cells = [row["model_type"], row["class"], row["family"], row["dtype"], str(row["tensors"]), conversions]
    return "| " + " | ".join([*cells, *outcomes, inputs]) + " |"


def _cell(text: str) -> str:
    """Without what would end a cell, and no longer than a line can hold."""
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= 160 else text[:157] + "..."


def _be_quiet() -> None:
    """Nothing of what tiny sizes make transformers and torch warn about: the reader wants a line a row."""
    import transformers

    logging: Any = transformers.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.parity", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these model types, and write nothing")
    options = parser.parse_args(argv)
    try:
        chosen = find_architectures(options.only) if options.only else ARCHITECTURES
    except KeyError as error:
        parser.error(f"no architecture here is called {error}")
    _be_quiet()
    torch.set_num_threads(1)
    rows = []
    for architecture in chosen:
        with tempfile.TemporaryDirectory(prefix="lowmem-parity-") as folder:
            rows.append(check(architecture, Path(folder)))
        problems = rows[-1]["problems"]
        print(f"{architecture.model_type:30} {architecture.cls:45} {problems or 'ok'}", flush=True)
    if not options.only:
        results = make_results(rows)
        write(results, HERE / "parity.json")
        (HERE / "parity.md").write_text(as_markdown(results), encoding="utf-8")
    unexpected = [row for row in rows if bool(row["problems"]) != bool(known_failure(row["model_type"]))]
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main())
