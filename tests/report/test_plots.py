"""Plots for papers: their size, their fonts, and the numbers that they show."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from finetune.errors import ConfigError
from finetune.report import figures, plots, traces, views
from finetune.report.styles import make_styles

example = runpy.run_path(str(Path(__file__).with_name("comparison_example.py")))["comparison"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    comparison = example()
    comparison["rows"][2]["by"]["method"] = comparison["rows"][2]["label"] = (
        "lora 日本語 $x_1$"  # no such glyphs; no mathematics either
    )
    return plots.write_plots(comparison, tmp_path_factory.mktemp("plots") / "deep" / "folder")


def test_each_figure_of_the_report_is_there_as_png_and_pdf(made: list[Path]) -> None:
    keys = [figure.key for figure in figures.make_figures(example())]
    assert [path.name for path in made] == [f"{key}.{kind}" for key in keys for kind in ("png", "pdf")]
    assert sorted(made) == sorted(made[0].parent.iterdir())


def test_png_is_a_column_wide(made: list[Path]) -> None:
    for path in made[::2]:
        with Image.open(path) as image:
            assert image.width == 990  # 3.3 inches at 300 dpi
            assert image.convert("L").getextrema()[0] < 100


def test_pdf_is_a_column_wide_and_holds_its_fonts(made: list[Path]) -> None:
    for path in made[1::2]:
        raw = path.read_bytes()
        box = re.search(rb"/MediaBox \[ 0 0 ([\d.]+)", raw)
        assert box is not None
        assert float(box[1]) == pytest.approx(3.3 * 72, abs=0.1)
        parts = [
            raw,
            *(
                zlib.decompressobj().decompress(part)
                for part in re.findall(rb"/FlateDecode[^>]*>>\s*stream\r?\n(.*?)\r?\nendstream", raw, re.S)
            ),
        ]
        whole = b"".join(parts)
        assert b"/FontFile2" in whole
        assert b"/Type3" not in whole
        assert b"CreationDate" not in whole


def test_points_and_intervals_are_the_rows() -> None:
    comparison = example()
    figure = dict(plots.draw_plots(comparison))["pareto_trained"]
    (axes,) = figure.axes
    drawn = {
        (round(float(bar[0].get_xdata()[0]), 6), round(float(bar[0].get_ydata()[0]), 6)): bar
        for bar in axes.containers
    }
    looks = make_styles(comparison)
    for row in comparison["rows"]:
        if row["mean"] is None:
            continue
        line, _, arms = drawn[round(row["trained"] / 1e3, 6), round(100 * row["mean"], 6)]
        assert to_hex(line.get_color()) == looks[row["by"]["method"]].colour
        assert (to_hex(line.get_markerfacecolor()) == "#ffffff") == row["single_seed"]
        if row["single_seed"]:
            assert not arms
        else:
            (segment,) = arms[0].get_segments()
            assert sorted(segment[:, 1]) == pytest.approx([100 * row["low"], 100 * row["high"]])
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "trained parameters, thousands"
    assert axes.get_ylabel() == "test accuracy in %,\nhigher is better"
    legend = {text.get_text() for text in figure.legends[0].get_texts()}
    assert legend == {"lora", "snell", "spiel", "shira", "sara"}


def with_levels() -> dict[str, Any]:
    """Return a comparison in which spiel has no sparsity, and two long names differ only in their middle."""
    comparison = example()
    for number, row in enumerate(row for row in comparison["rows"] if row["by"]["method"] == "spiel"):
        row["label"], row["by"]["sparsity"] = f"spiel optimizer.lr=0.00{number + 1}000 schedule=linear", None
    return comparison


def test_every_legend_lies_inside_its_figure_and_its_names_differ() -> None:
    with matplotlib.rc_context(plots.STYLE):
        found = dict(plots.draw_plots(with_levels()))
        for figure in found.values():
            figure.canvas.draw()
            for legend in figure.legends:
                box = legend.get_window_extent()
                assert box.x0 >= 0
                assert box.y0 >= 0
                assert box.x1 <= figure.bbox.x1
                assert box.y1 < figure.axes[0].get_window_extent().y0
                names = [text.get_text() for text in legend.get_texts()]
                assert len(set(names)) == len(names)
    (axes,) = found["by_sparsity"].axes
    assert axes.get_window_extent().height > 1.2 * found["by_sparsity"].dpi
    levels = [line for line in axes.lines if line.get_transform() == axes.get_yaxis_transform()]
    assert len(levels) == 4
    assert len({(line.get_color(), str(line._unscaled_dash_pattern)) for line in levels}) == 4


@pytest.mark.parametrize("count", [1, 3])
def test_curves_of_few_points_have_markers(count: int) -> None:
    comparison = example()
    for row in comparison["rows"]:
        row["curve"] = row["curve"][:count]
    figure = dict(plots.draw_plots(comparison))["curves"]
    (axes,) = figure.axes
    rows = [row for row in comparison["rows"] if row["curve"]][: views.MOST_CURVES]
    looks = {(to_hex(bar[0].get_color()), bar[0].get_marker()) for bar in axes.containers}
    assert (len(axes.containers), len(looks)) == (count * len(rows), len(rows))
    if count == 1:
        assert [bool(bar[2]) for bar in axes.containers] == [row["finished"] > 1 for row in rows]
    assert {line.get_marker() for line in axes.lines} >= {look for _, look in looks}


def test_axes_of_shares_end_at_0_and_100() -> None:
    comparison = example()
    wide, *others = comparison["rows"]
    ends = {"low": -0.25, "high": 1.25}
    wide |= ends | {"curve": [point | ends for point in wide["curve"]]}
    found = dict(plots.draw_plots(comparison))
    for key in ("pareto_trained", "by_sparsity", "curves"):
        assert found[key].axes[0].get_ylim() == traces.PERCENT_RANGE
    comparison["metric"] |= {"name": "val.loss", "words": "validation loss", "percent": False}
    assert dict(plots.draw_plots(comparison))["pareto_trained"].axes[0].get_ylim()[1] > 1.25
    narrow = dict(plots.draw_plots(example() | {"rows": others}))["pareto_trained"].axes[0].get_ylim()
    assert narrow[0] > 50


def test_differences_and_ranks_read_from_the_top() -> None:
    comparison = example()
    with matplotlib.rc_context(plots.STYLE):
        found = dict(plots.draw_plots(comparison))
    (axes,) = found["differences"].axes
    rows = [row for row in comparison["rows"] if row["versus"]]
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        traces.shorten(row["label"], plots.NARROW) for row in rows
    ]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    assert [bar[0].get_xdata()[0] for bar in axes.containers] == pytest.approx(
        [100 * row["versus"]["difference"] for row in rows]
    )
    assert not any(
        text.get_parse_math() for text in axes.get_yticklabels()
    )  # a name with dollars is no formula
    for bar, row in zip(axes.containers, rows, strict=True):
        (segment,) = bar[2][0].get_segments()
        assert list(segment[:, 0]) == pytest.approx([100 * row["versus"]["low"], 100 * row["versus"]["high"]])
    (axes,) = found["critical_difference"].axes
    bars = [line for line in axes.lines if line.get_linewidth() == 2.2]
    assert len(bars) == len(comparison["critical_difference"]["cliques"])


@pytest.mark.processes
def test_global_state_stays_as_it_was(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    comparison = example()
    comparison["rows"] = comparison["rows"][:2]
    comparison["critical_difference"] = None
    assert plots.write_plots(comparison, tmp_path, kinds=("png",))
    assert dict(matplotlib.rcParams) == before
    code = "import sys; from finetune.report import plots; plots.views; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "matplotlib", "numpy"} & set(loaded)


@pytest.mark.processes
def test_pyplot_is_not_imported(tmp_path: Path) -> None:
    here = Path(__file__).with_name("comparison_example.py")
    code = f"""
import runpy, sys
from pathlib import Path
from finetune.report import plots
comparison = runpy.run_path({str(here)!r})["comparison"]()
comparison["rows"] = comparison["rows"][:1]
comparison["critical_difference"] = None
plots.write_plots(comparison, Path("out"), kinds=("png",))
print(*sys.modules)
"""
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.split()
    assert "matplotlib.figure" in loaded
    assert not {"matplotlib.pyplot", "torch"} & set(loaded)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="cannot be written"):
        plots.write_plots(example(), tmp_path / "file" / "plots")
    assert (tmp_path / "file").read_text() == "mine"


def test_nothing_to_draw_writes_nothing(tmp_path: Path) -> None:
    comparison = example() | {"critical_difference": None}
    comparison["rows"] = comparison["rows"][-1:]
    assert plots.write_plots(comparison, tmp_path / "plots") == []
