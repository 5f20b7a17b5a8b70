"""Memory over time as a picture: a measurement's lines, its marks, and levels such as the predicted peak.

matplotlib draws it, and is imported only when a picture is asked for. Nothing global is touched, no display is
needed, and a picture that cannot be made is known before the work that it would show.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._drafts import check_writable, new_content
from ._shared import catching_warnings
from .errors import OptionError, PlotError
from .sizes import GIB, MIB, format_size, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .memory import Measurement

__all__ = ["FORMATS", "Level", "draw", "parse_target", "save"]

FORMATS = ("png", "svg", "pdf")
# As many upright names fit beside each other on the width of a picture.
MOST_NAMES = 45
_LONGEST_NAME = 28
_LONGEST_TITLE = 100
# A level that is higher than this many times everything else would leave a flat line at the bottom.
_TOO_HIGH = 3.0
_DEVICE_COLOURS = ("tab:green", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan")
_SHARD = re.compile(r"(.*?)[-_.]?(\d{1,9})-of-(\d{1,9})(?:\.\w+)?")
_WEIGHT_FILE = re.compile(r"(.+)\.(?:safetensors|bin|pth?)")


@dataclass(frozen=True, slots=True)
class Level:
    """A size to compare with: a line across the picture.

    Attributes:
        name: what it is, such as `'predicted peak'`.
        size: bytes.
        device: such as `'cuda:0'`; None for the host.
        optional: only named, not drawn, where it is so high that it would flatten all else.
    """

    name: str
    size: int
    device: str | None = None
    optional: bool = False


@dataclass(frozen=True, slots=True)
class _Curve:
    label: str
    colour: str
    points: Sequence[tuple[float, int]]

    @property
    def highest(self) -> tuple[float, int]:
        return max(self.points, key=lambda point: point[1])


@dataclass(frozen=True, slots=True)
class _Panel:
    title: str
    curves: Sequence[_Curve]
    levels: Sequence[tuple[Level, str]]  # with their colours

    @property
    def top(self) -> int:
        heights = [curve.highest[1] for curve in self.curves]
        return max(*heights, *(level.size for level, _ in self.levels if not level.optional), 1)


def parse_target(path: str | os.PathLike[str]) -> Path:
    """The absolute path of a picture that can be written; nothing is left there yet.

    Raises:
        OptionError: not the path of a picture, or one that cannot be written.
        PlotError: matplotlib is not here.
    """
    try:
        text = os.fsdecode(path)
        if "\0" in text:
            raise ValueError("it holds a NUL")
        named = Path(text).expanduser()
        # In the folder that links lead to; a link of the file's own name is replaced.
        target = named.parent.resolve() / named.name
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        raise OptionError(f"plot: expected the path of a picture, found {shown(path)} ({error})") from error
    if named.suffix.lower().lstrip(".") not in FORMATS:
        raise OptionError(f"plot: expected a file that ends in .{', .'.join(FORMATS)}; found {shown(str(named))}")
    try:
        if not target.parent.is_dir():
            raise OptionError(f"plot: {shown(str(named))}: there is no folder {target.parent}; make it first")
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(target.stat().st_mode):
                raise OptionError(f"plot: {shown(str(named))} is there and is not a file; name another")
        check_writable(target.parent)
    except OSError as error:
        raise OptionError(f"plot: {shown(str(named))}: cannot be written: {error.strerror or error}") from error
    _matplotlib()
    return target


def save(figure: Figure, target: Path) -> None:
    """Write a picture, all of it or nothing; the file's suffix says the format.

    Raises:
        PlotError: it cannot be written.
    """
    try:
        with new_content(target) as file, catching_warnings, warnings.catch_warnings():
            # A name may hold letters that the font lacks; they are drawn as boxes.
            warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
            figure.savefig(file, format=target.suffix.lower().lstrip("."), dpi="figure")
    except OSError as error:
        raise PlotError(
            f"plot: {shown(str(target))}: cannot be written: {error.strerror or error}; name another folder"
        ) from error
    except RuntimeError as error:
        # Such as LaTeX, where the user's settings ask for it and it is not there.
        raise PlotError(f"plot: {shown(str(target))}: cannot be drawn: {error}; mend matplotlib's settings") from error


def draw(memory: Measurement, *, title: str, levels: Sequence[Level] = ()) -> Figure:
    """The picture of a finished measurement: the host's memory, beneath it the devices', over seconds.

    For a block both are what it added to what was there at its start; for a command they are the whole.

    Raises:
        MeasureError: the measurement is not finished.
        PlotError: matplotlib is not here.
    """
    panels = [_host_panel(memory, levels)]
    if memory.device_samples:
        panels.append(_device_panel(memory, levels))
    new_figure, new_canvas = _matplotlib()
    figure: Figure = new_figure(figsize=(10, 3.0 + 2.6 * len(panels)), dpi=120, layout="constrained")
    new_canvas(figure)
    rows: list[Axes] = list(figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0])
    for axes, panel in zip(rows, panels, strict=True):
        _draw_panel(axes, panel)
    rows[-1].set_xlabel("seconds")
    rows[-1].set_xlim(0, max(memory.seconds, 1e-6))
    _draw_marks(rows, memory)
    figure.suptitle(_cut(title, _LONGEST_TITLE), fontsize=11, parse_math=False, usetex=False)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure


def _host_panel(memory: Measurement, levels: Sequence[Level]) -> _Panel:
    added = " added" if memory.baseline else ""
    # The mapped pages of a program at its start are its libraries.
    mapped_before = memory.samples[0][2] - memory.samples[0][1] if memory.baseline else 0
    anonymous = [(at, size - memory.baseline) for at, size, _ in memory.samples]
    mapped = [(at, rss - size - mapped_before) for at, size, rss in memory.samples]
    return _Panel(
        f"host memory{added}",
        (
            _Curve(f"anonymous{added}", "tab:blue", anonymous),
            _Curve(f"mapped{added}", "tab:orange", mapped),
        ),
        [(level, "dimgray" if level.optional else "tab:red") for level in levels if level.device is None],
    )


def _device_panel(memory: Measurement, levels: Sequence[Level]) -> _Panel:
    curves, drawn = [], []
    for number, (device, samples) in enumerate(memory.device_samples.items()):
        colour = _DEVICE_COLOURS[number % len(_DEVICE_COLOURS)]
        before = samples[0][1] if memory.baseline else 0
        curves.append(_Curve(f"{device} added", colour, [(at, size - before) for at, size in samples]))
        drawn += [(level, colour) for level in levels if level.device == device]
    return _Panel("device memory added", curves, drawn)


def _draw_panel(axes: Axes, panel: _Panel) -> None:
    top = panel.top
    unit, factor = ("GiB", GIB) if top >= GIB else ("MiB", MIB)
    lowest = 0
    for order, curve in enumerate(panel.curves):
        times, sizes = [at for at, _ in curve.points], [size / factor for _, size in curve.points]
        at, peak = curve.highest
        label = f"{curve.label}, peak {format_size(peak)}"
        axes.plot(times, sizes, color=curve.colour, linewidth=1.5, label=label, zorder=3 - 0.1 * order)
        axes.fill_between(times, sizes, color=curve.colour, alpha=0.12, linewidth=0)
        axes.plot([at], [peak / factor], "o", color=curve.colour, markersize=4, label="_peak")
        lowest = min(lowest, *(size for _, size in curve.points))
    for level, colour in panel.levels:
        style = ":" if level.optional else "--"
        label = " ".join(filter(None, (level.device, level.name, format_size(level.size))))
        if level.optional and level.size > _TOO_HIGH * top:
            axes.plot([], [], style, color=colour, linewidth=1.2, label=f"{label} (above the picture)")
        else:
            axes.axhline(level.size / factor, linestyle=style, color=colour, linewidth=1.2, label=label)
            top = max(top, level.size)
    axes.set_ylabel(f"{panel.title} ({unit})")
    axes.set_ylim(1.05 * lowest / factor, 1.06 * top / factor)
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_marks(rows: Sequence[Axes], memory: Measurement) -> None:
    """A tick for every mark; a line and its name for as many as can be read."""
    marks = [(at, str(name)) for at, name in memory.marks if 0 <= at <= memory.seconds]
    if not marks:
        return
    named = list(_thinned(marks, memory.seconds / MOST_NAMES))
    short = _short_names([name for _, name in marks])
    for axes in rows:
        axes.vlines([at for at, _ in marks], 0.98, 1, transform=axes.get_xaxis_transform(), color="gray", linewidth=0.7)
        for at, _ in named:
            axes.axvline(at, color="gray", alpha=0.35, linewidth=0.7, zorder=0.5, label="_mark")
    for at, name in named:
        rows[0].text(
            at,
            1.015,
            short[name],
            transform=rows[0].get_xaxis_transform(),
            rotation=90,
            horizontalalignment="center",
            verticalalignment="bottom",
            fontsize=8,
            color="dimgray",
            parse_math=False,
            usetex=False,
        )
    if len(named) < len(marks):
        rows[0].plot([], [], color="gray", linewidth=0.7, label=f"{len(marks)} marks, {len(named)} of them named")


def _thinned(marks: Sequence[tuple[float, str]], apart: float) -> Iterator[tuple[float, str]]:
    """Those that stand `apart` from the one before, the first among them."""
    last = None
    for at, name in sorted(marks):
        if last is None or at - last >= apart:
            last = at
            yield at, name


def _short_names(names: Sequence[str]) -> dict[str, str]:
    """What is written for each: `model-00001-of-00003.safetensors` is `shard 1 of 3` among its like."""
    shards = {name: match for name in names if (match := _SHARD.fullmatch(name))}
    one_series = len({match[1] for match in shards.values()}) == 1
    short = {}
    for name in names:
        if match := shards.get(name):
            series = "shard" if one_series or not match[1] else _cut(match[1], _LONGEST_NAME - 10)
            short[name] = f"{series} {int(match[2])} of {int(match[3])}"
        else:
            file = _WEIGHT_FILE.fullmatch(name)
            short[name] = _cut(file[1] if file else name, _LONGEST_NAME)
    return short


def _cut(text: str, most: int) -> str:
    """`text` without control characters, its middle left out where it is longer than `most`."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


def _matplotlib() -> tuple[Any, Any]:
    """matplotlib's figure and the canvas that draws it without a display."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except Exception as error:
        # Not only ImportError: matplotlib reads the user's settings when it is imported, and refuses bad ones.
        raise PlotError(
            f"plot: drawing needs matplotlib, which cannot be imported ({error}); pip install 'lowmem[plot]'"
        ) from error
    return Figure, FigureCanvasAgg
