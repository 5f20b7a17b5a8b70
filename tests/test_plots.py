"""A measurement as a picture: what is drawn, at which height, and what is refused before."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from safetensors.torch import save_file

import lowmem
from lowmem import plots
from lowmem.errors import MeasureError, OptionError, PlotError
from lowmem.memory import Measurement
from lowmem.plots import Level
from lowmem.sizes import GIB, MIB

MAGIC = {"png": b"\x89PNG\r\n\x1a\n", "svg": b"<?xml", "pdf": b"%PDF-"}
LOOKS = [(0.0, 100 * MIB, 300 * MIB), (1.0, 164 * MIB, 396 * MIB), (3.0, 612 * MIB, 812 * MIB), (4.0, 356 * MIB, GIB)]


def measurement(
    looks: Sequence[tuple[float, int, int]] = LOOKS,
    *,
    baseline: int = 100 * MIB,
    marks: Sequence[tuple[float, str]] = (),
    devices: dict[str, list[tuple[float, int]]] | None = None,
) -> Measurement:
    made = Measurement(baseline=baseline, method="process")
    at = made._started
    made.complete(
        [(at + seconds, anonymous, rss) for seconds, anonymous, rss in looks],
        ended=at + looks[-1][0],
        gap=0.001,
        device_looks={name: [(at + seconds, size) for seconds, size in line] for name, line in (devices or {}).items()},
    )
    made._marks.extend(marks)
    return made


def curve(axes: Axes, start: str) -> Line2D:
    found = [line for line in axes.lines if str(line.get_label()).startswith(start)]
    assert len(found) == 1, [line.get_label() for line in axes.lines]
    return found[0]


def named(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def marked(axes: Axes) -> list[float]:
    return [line.get_xdata()[0] for line in axes.lines if line.get_label() == "_mark"]


def overlap(figure: Figure) -> bool:
    """Whether two names of marks touch each other as drawn."""
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    return any(one.overlaps(other) for at, one in enumerate(boxes) for other in boxes[:at])


def test_the_curves_are_the_samples_above_the_baseline():
    figure = plots.draw(measurement(), title="a block")
    (axes,) = figure.axes
    anonymous, mapped = curve(axes, "anonymous added"), curve(axes, "mapped added")
    assert list(anonymous.get_xdata()) == pytest.approx([0, 1, 3, 4])
    assert list(anonymous.get_ydata()) == [0, 64, 512, 256]
    # Of what is mapped, the libraries that were there at the start are left out.
    assert list(mapped.get_ydata()) == [0, 32, 0, 468]
    assert anonymous.get_label() == "anonymous added, peak 512.00 MiB"
    assert axes.get_ylabel() == "host memory added (MiB)"
    assert axes.get_xlabel() == "seconds"
    assert axes.get_xlim() == pytest.approx((0, 4))
    assert figure.get_suptitle() == "a block"


def test_of_a_command_the_whole_is_drawn():
    (axes,) = plots.draw(measurement(baseline=0), title="make").axes
    assert list(curve(axes, "anonymous, peak").get_ydata()) == [100, 164, 612, 356]
    assert list(curve(axes, "mapped, peak").get_ydata()) == [200, 232, 200, 668]
    assert axes.get_ylabel() == "host memory (MiB)"


def test_large_sizes_are_drawn_in_gib():
    (axes,) = plots.draw(measurement([(0, 0, 0), (1, 3 * GIB, 4 * GIB)], baseline=0), title="").axes
    assert list(curve(axes, "anonymous").get_ydata()) == [0, 3]
    assert axes.get_ylabel() == "host memory (GiB)"


def test_levels_lie_at_their_height_within_the_picture():
    levels = [Level("predicted peak", 600 * MIB), Level("ram", 700 * MIB, optional=True)]
    (axes,) = plots.draw(measurement(), title="", levels=levels).axes
    predicted, ram = curve(axes, "predicted peak 600.00 MiB"), curve(axes, "ram 700.00 MiB")
    assert set(predicted.get_ydata()) == {600}
    assert set(ram.get_ydata()) == {700}
    assert axes.get_ylim()[1] > 700
    assert predicted.get_color() != ram.get_color()


def test_a_limit_far_above_is_named_and_flattens_nothing():
    levels = [Level("predicted peak", 5 * GIB), Level("ram", 64 * GIB, optional=True)]
    (axes,) = plots.draw(measurement(), title="", levels=levels).axes
    ram = curve(axes, "ram 64.00 GiB (above the picture)")
    assert len(ram.get_ydata()) == 0
    # What was predicted is always drawn, however wrong.
    assert set(curve(axes, "predicted peak").get_ydata()) == {5}
    assert 5 < axes.get_ylim()[1] < 6


def test_devices_have_a_panel_of_their_own():
    devices = {"cuda:0": [(0, GIB), (4.0, 3 * GIB)], "cuda:1": [(0, 0), (4.0, GIB)]}
    levels = [Level("predicted peak", 600 * MIB), Level("predicted peak", 2 * GIB, "cuda:0")]
    memory = measurement(devices=devices, marks=[(1.0, "here")])
    host, device = plots.draw(memory, title="", levels=levels).axes
    assert list(curve(device, "cuda:0 added, peak 2.00 GiB").get_ydata()) == [0, 2]
    assert list(curve(device, "cuda:1 added").get_ydata()) == [0, 1]
    assert set(curve(device, "cuda:0 predicted peak").get_ydata()) == {2}
    assert set(curve(host, "predicted peak").get_ydata()) == {600}
    assert device.get_ylabel() == "device memory added (GiB)"
    assert marked(host) == marked(device) == [1.0]
    assert (named(host), named(device)) == (["here"], [])


def test_every_one_of_a_few_shards_is_named_at_its_time():
    marks = [(0.5 + at, f"model-{at + 1:05}-of-00003.safetensors") for at in range(3)]
    figure = plots.draw(measurement(marks=marks), title="")
    (axes,) = figure.axes
    assert marked(axes) == [0.5, 1.5, 2.5]
    assert named(axes) == ["shard 1 of 3", "shard 2 of 3", "shard 3 of 3"]
    assert [text.get_position()[0] for text in axes.texts] == [0.5, 1.5, 2.5]
    assert not overlap(figure)


@pytest.mark.parametrize("count", [40, 191, 2000])
def test_names_of_many_shards_are_thinned_and_every_shard_has_a_tick(count):
    marks = [(4 * at / count, f"model-{at + 1:05}-of-{count:05}.safetensors") for at in range(count)]
    figure = plots.draw(measurement(marks=marks), title="")
    (axes,) = figure.axes
    assert 20 <= len(named(axes)) <= plots.MOST_NAMES
    assert named(axes)[0] == f"shard 1 of {count}"
    ticks = [c for c in axes.collections if len(c.get_paths()) == count]
    assert len(ticks) == 1
    assert not overlap(figure)
    said = [line for line in axes.lines if str(line.get_label()).startswith(f"{count} marks, ")]
    assert len(said) == (len(named(axes)) < count)


@given(st.lists(st.floats(0, 4), max_size=60))
def test_named_marks_never_stand_too_close(times):
    kept = [at for at, _ in plots._thinned([(at, "x") for at in times], 0.1)]
    assert all(later - at >= 0.1 for at, later in itertools.pairwise(kept))
    assert set(kept) <= set(times)
    # And none is left out for nothing.
    assert all(any(0 <= at - one < 0.1 for one in kept) for at in times)


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["model-00001-of-00003.safetensors"], ["shard 1 of 3"]),
        (["pytorch_model-00002-of-00010.bin"], ["shard 2 of 10"]),
        (["a-00001-of-00002.safetensors", "b-00001-of-00001.safetensors"], ["a 1 of 2", "b 1 of 1"]),
        (["model.safetensors", "loaded", "v1.5"], ["model", "loaded", "v1.5"]),
        (["x" * 100], ["x" * 13 + "…" + "x" * 14]),
        (["a\x1b[2Jb\n\udcff"], ["a�[2Jb��"]),
        ([""], [""]),
    ],
)
def test_names_are_shortened(names, short):
    assert [plots._short_names(names)[name] for name in names] == short


def test_marks_outside_the_measured_time_are_left_out():
    (axes,) = plots.draw(measurement(marks=[(-0.1, "before"), (2.0, "in"), (4.1, "after")]), title="").axes
    assert named(axes) == ["in"]


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf", "PNG"])
def test_the_suffix_decides_the_format(suffix, tmp_path):
    target = tmp_path / f"memory.{suffix}"
    measurement(marks=[(1.0, "$odd_{name}$ 模型 \\x")]).plot(target, title="$\\frac{1}$ 模型")
    assert target.read_bytes().startswith(MAGIC[suffix.lower()])
    assert list(tmp_path.iterdir()) == [target]
    assert target.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_letters_that_the_font_lacks_are_no_noise(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measurement(marks=[(1.0, "模型")]).plot(tmp_path / "m.png")


def test_a_picture_replaces_the_one_before(tmp_path):
    target = tmp_path / "memory.png"
    target.write_bytes(b"old")
    measurement().plot(str(target))
    assert target.read_bytes().startswith(MAGIC["png"])


@pytest.mark.parametrize("name", ["memory.gif", "memory", "memory.png.txt", ".png", "", "no/such/folder/memory.png"])
def test_a_picture_that_cannot_be_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match=r"^plot: ") as refused:
        plots.parse_target(name)
    if "folder" in name:
        assert "there is no folder" in str(refused.value)
    else:
        assert ".png, .svg, .pdf" in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [3, None, "a\0b.png", ["x.png"]])
def test_what_is_no_path_is_refused(value):
    with pytest.raises(OptionError, match=r"^plot: expected the path of a picture"):
        plots.parse_target(value)


def test_what_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OptionError, match="is not a file"):
        plots.parse_target(tmp_path / "folder.png")
    with pytest.raises(OptionError, match="cannot be written"):
        plots.parse_target(tmp_path / ("n" * 300 + ".png"))
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match="there is no folder"):
        plots.parse_target(tmp_path / "file" / "x.png")
    if not Path("/proc/self").is_dir():
        pytest.skip("no folder here that refuses everybody")
    with pytest.raises(OptionError, match="cannot be written"):
        plots.parse_target("/proc/self/x.png")


def test_checking_a_target_leaves_nothing_and_changes_nothing(tmp_path):
    target = tmp_path / "memory.png"
    assert plots.parse_target(target) == target
    assert list(tmp_path.iterdir()) == []
    target.write_bytes(b"mine")
    plots.parse_target(target)
    assert target.read_bytes() == b"mine"


def test_a_failure_while_writing_leaves_what_was_there(tmp_path, monkeypatch):
    target = tmp_path / "memory.png"
    target.write_bytes(b"mine")

    def full(figure: Figure, file: object, **options: object) -> None:
        file.write(b"\x89PNG")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(PlotError, match=r"memory.png.*No space left on device"):
        measurement().plot(target)
    assert target.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [target]


def test_without_matplotlib_the_remedy_is_named(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PlotError, match=r"pip install 'lowmem\[plot\]'"):
        plots.parse_target(tmp_path / "memory.png")
    with pytest.raises(PlotError, match="matplotlib"):
        measurement().plot(tmp_path / "memory.png")
    assert list(tmp_path.iterdir()) == []


def test_bad_settings_of_matplotlib_are_one_message(tmp_path, monkeypatch):
    line = [
        sys.executable,
        "-m",
        "lowmem",
        "measure",
        "--plot",
        tmp_path / "memory.png",
        "--",
        sys.executable,
        "-c",
        "",
    ]
    repository = Path(__file__).parents[1]
    done = subprocess.run(
        line, capture_output=True, text=True, check=False, cwd=repository, env={**os.environ, "MPLBACKEND": "nonsense"}
    )
    assert done.returncode == 1
    assert done.stderr.startswith("lowmem: plot: drawing needs matplotlib")
    assert "nonsense" in done.stderr

    def no_latex(*_: object, **__: object) -> None:
        raise RuntimeError("latex could not be found")

    monkeypatch.setattr(Figure, "savefig", no_latex)
    with pytest.raises(PlotError, match="latex could not be found"):
        measurement().plot(tmp_path / "memory.png")
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_measurement_has_no_picture(tmp_path):
    with pytest.raises(MeasureError, match="not measured yet"):
        Measurement(baseline=1, method="process").plot(tmp_path / "memory.png")
    assert list(tmp_path.iterdir()) == []


def test_a_load_is_drawn_with_its_prediction_and_its_limit(tmp_path, monkeypatch):
    save_file({"weight": torch.ones(3, 2), "bias": torch.zeros(3)}, tmp_path / "w.safetensors")
    drawn = []
    draw = plots.draw
    monkeypatch.setattr(plots, "draw", lambda *args, **options: drawn.append(draw(*args, **options)) or drawn[-1])
    source = tmp_path / "w.safetensors"
    for ram in ("1GiB", None):
        report = lowmem.load(source, model=lambda: torch.nn.Linear(2, 3), dtype="float64", ram=ram).report
        report.plot(tmp_path / "load.svg")
        (axes,) = drawn.pop().axes
        assert set(curve(axes, "predicted peak").get_ydata()) == {report.predicted_peak / MIB}
        peak = max(curve(axes, "anonymous added").get_ydata())
        assert max(peak, 0) == report.peak / MIB
        limits = [str(line.get_label()) for line in axes.lines if str(line.get_label()).startswith("ram")]
        assert limits == (["ram 1.00 GiB (above the picture)"] if ram else [])
    assert (tmp_path / "load.svg").read_bytes().startswith(MAGIC["svg"])


def test_drawing_leaves_pyplot_and_the_display_alone(tmp_path):
    code = f"""
import sys
import lowmem
with lowmem.measure() as memory:
    memory.mark("x")
assert not [name for name in sys.modules if name.startswith("matplotlib")]
memory.plot({str(tmp_path / "memory.png")!r})
assert "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**{k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MPLBACKEND")}},
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "memory.png").read_bytes().startswith(MAGIC["png"])
