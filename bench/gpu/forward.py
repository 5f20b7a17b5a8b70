"""The forward with layers in host memory or on disk and the rest on the device, by lowmem, accelerate, transformers.

All models of a place are loaded, then take turns, in one process: each has a map of the same places. What they put out
is compared with the model that is all on the device. Device memory is what the model itself holds there and what its
forward adds; the other models' is taken off.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.forward.loaders import transformers_class
from bench.forward.pages import give_back_mapped
from bench.page_cache import drop, warm
from bench.results import Row

from .bus import pinned_rate, release

# Tokens of one sequence, without a KV cache.
TOKENS = (1, 512)
# Where the layers lie; the embedding, the last norm and the head are on the device.
PLACES = {"cpu": "in host memory", "disk": "on disk"}
REFERENCE = "all on the device"
_DTYPE = "bfloat16"
# Of the largest logit: another kernel's rounding may differ by less, wrong weights by more.
_FAR = 0.05
_MIB = 1 << 20

Map = dict[str, str]


def device_map(source: Path, device: str, layers: str) -> Map:
    """Module → device, no module inside another. accelerate takes the one that is not `cpu` or `disk` for the main."""
    count = json.loads((source / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    kept = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    return {**dict.fromkeys(kept, device), **{f"model.layers.{n}": layers for n in range(count)}}


def _by_lowmem(**options: Any) -> Callable[[Path, Map, Path], Any]:
    def load(source: Path, placed: Map, _: Path) -> Any:
        import lowmem

        return lowmem.load(source, dtype=_DTYPE, device_map=placed, **options).model

    return load


def _by_transformers(source: Path, placed: Map, folder: Path) -> Any:
    options = {"dtype": _DTYPE, "device_map": placed, "offload_folder": str(folder)}
    return transformers_class(source).from_pretrained(source, **options)


_LOADERS = {
    REFERENCE: _by_lowmem(),
    "lowmem": _by_lowmem(dispatch="lowmem"),
    "lowmem, copied": _by_lowmem(dispatch="lowmem", residency="copy"),
    "lowmem, accelerate's hooks": _by_lowmem(dispatch="accelerate"),
    "transformers": _by_transformers,
}
# Copies in host memory are another thing than file pages there; of weights on disk there are none.
_LOADERS_OF = {"cpu": tuple(_LOADERS), "disk": tuple(name for name in _LOADERS if name != "lowmem, copied")}


@dataclass
class _Model:
    """One of them. `held` are bytes on the device that are its own, `peaks` with what a forward adds: tokens → most."""

    name: str
    module: Any = None
    held: int = 0
    load: float = 0.0
    status: str = "ok"
    reason: str = ""
    times: dict[tuple[int, str], list[float]] = field(default_factory=dict)
    peaks: dict[int, int] = field(default_factory=dict)
    differences: dict[int, float] = field(default_factory=dict)

    def failed(self, error: Exception) -> None:
        self.module = None
        self.status, self.reason = "failed", f"{type(error).__name__}: {error}".partition("\n")[0][:300]


class Turns:
    """All models of one place."""

    def __init__(self, source: Path, place: str, device: str, *, cold: bool) -> None:
        self._source, self._place, self._device = source, place, device
        self._cuda = torch.device(device).type == "cuda"
        self._files = sorted(source.glob("*.safetensors"))
        # Layers in memory are not read again.
        self._kinds = ("warm", "cold") if cold and place == "disk" else ("warm",)
        self._models: list[_Model] = []
        self._wanted: dict[int, torch.Tensor] = {}
        vocabulary = json.loads((source / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        self._ids = {
            count: torch.tensor([[(1000 + 97 * n) % vocabulary for n in range(count)]], device=device)
            for count in TOKENS
        }

    def run(self, rounds: int, folder: Path) -> list[Row]:
        """Load them, let each run once, for its caches and to compare, then by turns.

        `folder` is for what they write.
        """
        warm(self._files)
        for name in _LOADERS_OF[self._place]:
            self._models.append(self._load(name, folder / f"{self._place}-{len(self._models)}"))
        rates = []
        for turn in range(-1, rounds):
            if self._cuda:
                rates.append(pinned_rate(self._device))
            # Each round starts with another one, so that none always comes after the same.
            shift = max(0, turn) % len(self._models)
            for kind in self._kinds if turn >= 0 else ("warm",):
                for model in self._models[shift:] + self._models[:shift]:
                    for count in TOKENS:
                        self._turn(model, count, kind if turn >= 0 else None)
        away = self._layers()
        found = [_row(self._place, count, model) for count in TOKENS for model in self._models]
        return [{**row, "pinned": max(rates, default=None), "away": away} for row in found]

    def _load(self, name: str, folder: Path) -> _Model:
        folder.mkdir()
        model = _Model(name)
        release()
        before = self._allocated()
        placed = {"": self._device} if name == REFERENCE else device_map(self._source, self._device, self._place)
        started = time.perf_counter()
        try:
            model.module = _LOADERS[name](self._source, placed, folder)
            self._synchronize()
        except Exception as error:  # whatever another loader raises is told, and the others go on
            model.failed(error)
        model.load = time.perf_counter() - started
        release()
        model.held = self._allocated() - before
        return model

    def _turn(self, model: _Model, count: int, kind: str | None) -> None:
        """One forward; of `kind` None its time does not count."""
        if model.status != "ok":
            return
        if kind == "cold":
            # What all models have mapped; a page that any of them keeps is not cold.
            give_back_mapped(self._files)
            if drop(self._files):
                model.reason = "cold: pages stayed in the page cache"
                return
        else:
            warm(self._files)
        try:
            seconds, logits = self._forward(model, count)
        except Exception as error:
            model.failed(error)
            release()
            return
        if kind is not None:
            model.times.setdefault((count, kind), []).append(seconds)
        self._compare(model, count, logits)

    @torch.inference_mode()
    def _forward(self, model: _Model, count: int) -> tuple[float, torch.Tensor]:
        """Its seconds, and the logits in host memory."""
        before = self._allocated()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        self._synchronize()
        started = time.perf_counter()
        out = model.module(input_ids=self._ids[count], use_cache=False).logits
        self._synchronize()
        seconds = time.perf_counter() - started
        most = torch.cuda.max_memory_allocated(self._device) if self._cuda else 0
        model.peaks[count] = max(model.peaks.get(count, 0), model.held + most - before)
        logits = out.to("cpu", copy=True)
        del out
        # A forward may leave something for the next one.
        model.held += self._allocated() - before
        return seconds, logits

    def _compare(self, model: _Model, count: int, logits: torch.Tensor) -> None:
        wanted = self._wanted.setdefault(count, logits)
        far = difference(logits, wanted)
        model.differences[count] = max(model.differences.get(count, 0.0), far)
        if far and not far <= _FAR * float(wanted.abs().max()):
            model.status, model.reason = "differs", f"logits of {count} differ by up to {far:.3g}"

    def _layers(self) -> int:
        """Bytes of the layers, which each forward brings to the device."""
        import lowmem

        entries = lowmem.inspect(self._source).items()
        return sum(entry.nbytes for key, entry in entries if key.startswith("model.layers."))

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self._device)

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self._device) if self._cuda else 0


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """0 when they are equal bit for bit, else the most that an element differs by; infinite where it is no number."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return float("inf")
    if torch.equal(found.view(torch.uint8), wanted.view(torch.uint8)):
        return 0.0
    far = float((found.float() - wanted.float()).abs().max())
    return far if far == far else float("inf")


def run(source: Path, folder: Path, device: str, rounds: int, *, cold: bool, done: Callable[[list[Row]], None]) -> None:
    """Measure each place, and hand its rows to `done`.

    Args:
        source: the Llama.
        folder: of the disk on which loaders write, in a folder that is removed.
        device: where the forward computes; `cpu` tries the order of things without a device.
        rounds: turns of each model.
        cold: also with the files out of the page cache, where the layers are on disk.
        done: called with the rows of one place, of all its models.
    """
    with tempfile.TemporaryDirectory(prefix="offload-", dir=folder) as work:
        for place in PLACES:
            rows = Turns(source, place, device, cold=cold).run(rounds, Path(work))
            release()
            done(rows)


def _row(place: str, count: int, model: _Model) -> Row:
    counted = model.times if model.status == "ok" else {}
    times = {kind: counted.get((count, kind), []) for kind in ("warm", "cold")}
    return {
        "part": "forward",
        "layers": place,
        "tokens": count,
        "loader": model.name,
        "dtype": _DTYPE,
        "status": model.status,
        "reason": model.reason,
        "load": model.load,
        "peak": model.peaks.get(count),
        "held": model.held,
        "difference": model.differences.get(count),
        **times,
    }


def as_markdown(rows: Sequence[Row]) -> str:
    """A table for each place and number of tokens."""
    lines: list[str] = []
    for place, count in dict.fromkeys((row["layers"], row["tokens"]) for row in rows):
        found = [row for row in rows if (row["layers"], row["tokens"]) == (place, count)]
        pinned = found[0]["pinned"]
        bus = "" if pinned is None else f"; the bus needs {found[0]['away'] / pinned:.3f} s for them"
        lines += [
            f"**forward of {count}, layers ({found[0]['away'] / _MIB:.0f} MiB) {PLACES[place]}**{bus}",
            "",
            "| loader | warm, s | of lowmem's | cold, s | of lowmem's | device peak, MiB | logits | load, s | |",
            "|---|---:|---:|---:|---:|---:|---|---:|---|",
        ]
        own = next((row for row in found if row["loader"] == "lowmem"), None)
        lines += [_line(row, own) for row in found]
        lines.append("")
    return "\n".join(lines)


def _line(row: Row, own: Row | None) -> str:
    cells = [row["loader"]]
    for kind in ("warm", "cold"):
        least, ours = (min(one[kind], default=None) if one is not None else None for one in (row, own))
        cells.append("-" if least is None else f"{least:.4f}")
        same = row is own or row["loader"] == REFERENCE
        cells.append("-" if same or least is None or ours is None else f"{least / ours:.2f}x")
    cells.append("-" if not row["peak"] else f"{row['peak'] / _MIB:.0f}")
    far = row["difference"]
    cells.append("-" if far is None else "equal" if far == 0 else f"up to {far:.3g}")
    cells += [f"{row['load']:.2f}", f"{row['status']}: {row['reason']}" if row["status"] != "ok" else row["reason"]]
    return f"| {' | '.join(cells)} |"
