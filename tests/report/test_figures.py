"""The figures show the numbers of the comparison: points, fronts, intervals and cliques.

Rows that are not drawn are counted in the caption.
"""

from __future__ import annotations

import html
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.report import axes, views
from finetune.report.figures import Figure, make_figures
from finetune.report.styles import make_styles
from finetune.report.traces import escape_tags, shorten

example = runpy.run_path(str(Path(__file__).with_name("comparison_example.py")))
CHOICES = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12)


@pytest.fixture
def comparison() -> dict[str, Any]:
    return example["comparison"]()


def draw(comparison: dict[str, Any]) -> dict[str, Figure]:
    return {figure.key: figure for figure in make_figures(comparison)}


def find_points(figure: Figure) -> dict[str, tuple[float, float, dict[str, Any], int]]:
    """Return x, y, trace and place of each row, by the label in its hover text."""
    found = {}
    for trace in figure.data:
        for place, hover in enumerate(trace.get("customdata", ())):
            bold = re.match(r"<b>(.*?)</b>", hover)
            assert bold is not None
            label = html.unescape(bold[1])
            found[label] = trace["x"][place], trace["y"][place], trace, place
    return found


@given(CHOICES, st.booleans())
def test_no_row_beats_a_row_on_the_front(pairs: list[tuple[int, int]], higher: bool) -> None:
    costs, values = [cost for cost, _ in pairs], [value if higher else -value for _, value in pairs]

    def beats(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return a != b and a[0] <= b[0] and a[1] >= b[1]

    expected = {i for i, pair in enumerate(pairs) if not any(beats(other, pair) for other in pairs)}
    found = views.find_front(costs, values, higher)
    assert set(found) == expected
    assert len(found) == len(expected)
    assert [costs[i] for i in found] == sorted(costs[i] for i in found)


def test_plotly_takes_every_figure(comparison: dict[str, Any]) -> None:
    from plotly.graph_objects import Figure as Checked

    made = make_figures(comparison)
    costs = [f"pareto_{key}" for key in ("peak_memory_bytes", "trained", "step_seconds", "stored_bytes")]
    assert [figure.key for figure in made] == [
        "differences",
        *costs,
        "by_sparsity",
        "curves",
        "critical_difference",
    ]
    for figure in made:
        Checked(figure.as_plotly())
        json.dumps(figure.as_plotly(), allow_nan=False)


def test_points_are_rows_in_readable_units(comparison: dict[str, Any]) -> None:
    scales = {"peak_memory_bytes": 2**20, "trained": 1e3, "step_seconds": 1e-3, "stored_bytes": 2**10}
    for key, scale in scales.items():
        found = find_points(draw(comparison)[f"pareto_{key}"])
        for row in comparison["rows"]:
            if row["mean"] is None:
                assert row["label"] not in found
                continue
            x, y, trace, place = found[row["label"]]
            assert (x, y) == (pytest.approx(row[key] / scale), pytest.approx(100 * row["mean"]))
            high, low = trace["error_y"]["array"][place], trace["error_y"]["arrayminus"][place]
            expected = (
                (None, None)
                if row["low"] is None
                else (100 * (row["high"] - row["mean"]), 100 * (row["mean"] - row["low"]))
            )
            assert (high, low) == (pytest.approx(expected[0]), pytest.approx(expected[1]))
            assert trace["marker"]["symbol"][place].endswith("-open") == row["single_seed"]


def test_the_front_is_a_step_line_through_the_rows_that_are_not_pale(comparison: dict[str, Any]) -> None:
    for cost in axes.COSTS:
        figure = draw(comparison)[f"pareto_{cost.key}"]
        line, found = figure.data[0], find_points(figure)
        steps = list(zip(line["x"], line["y"], strict=True))
        assert line["line"]["shape"] == "hv"
        assert steps[-1] == (max(x for x, *_ in found.values()), steps[-2][1])
        assert steps == sorted(steps)
        for x, y, trace, place in found.values():
            beaten = any((a, b) != (x, y) and a <= x and b >= y for a, b, *_ in found.values())
            assert (trace["marker"]["opacity"][place] < 1) == beaten
            assert ((x, y) in steps[:-1]) == (not beaten)


def test_a_lower_metric_can_be_better(comparison: dict[str, Any]) -> None:
    comparison["metric"] = {
        "name": "test.bits_per_byte",
        "words": "bits per byte",
        "higher_is_better": False,
        "percent": False,
    }
    comparison["task"] = "causal_lm"
    found = draw(comparison)
    steps = list(
        zip(found["pareto_trained"].data[0]["x"], found["pareto_trained"].data[0]["y"], strict=True)
    )[:-1]
    rows = [row for row in comparison["rows"] if row["mean"] is not None]
    best = min(rows, key=lambda row: (row["mean"], row["trained"]))
    assert steps[-1] == (best["trained"] / 1000, best["mean"])
    assert [y for _, y in steps] == sorted((y for _, y in steps), reverse=True)
    assert found["pareto_trained"].layout["yaxis"]["title"]["text"] == "test bits per byte, lower is better"
    assert (
        found["differences"].layout["xaxis"]["title"]["text"]
        == "difference in test bits per byte, left is better"
    )
    assert found["curves"].layout["yaxis"]["title"]["text"] == "validation bits per byte"


def test_a_method_has_one_colour_and_symbol_everywhere(comparison: dict[str, Any]) -> None:
    colours: dict[str, set[str]] = {}
    for figure in make_figures(comparison):
        for trace in figure.data:
            if "series" in trace.get("meta", {}) and "marker" in trace:
                look = trace["marker"]["color"] + trace["marker"]["symbol"][0].removesuffix("-open")
                colours.setdefault(trace["meta"]["series"], set()).add(look)
    assert {name: len(looks) for name, looks in colours.items()} == dict.fromkeys(
        ("lora", "snell", "spiel", "shira", "sara"), 1
    )
    assert len(set.union(*colours.values())) == 5
    assert make_styles(comparison) == make_styles(comparison | {"rows": comparison["rows"][::-1]})


def test_sparsity_is_drawn_as_density_and_rows_without_it_as_levels(comparison: dict[str, Any]) -> None:
    figure = draw(comparison)["by_sparsity"]
    lines = {trace["name"]: trace for trace in figure.data}
    means = {(row["by"]["method"], row["by"]["sparsity"]): row["mean"] for row in comparison["rows"]}
    assert set(lines) == {"lora", "snell", "spiel", "shira", "sara"}
    assert lines["snell"]["x"] == pytest.approx([0.1, 1, 10])
    assert lines["snell"]["y"] == pytest.approx(
        [100 * means["snell", sparsity] for sparsity in (0.999, 0.99, 0.9)]
    )
    assert lines["lora"]["x"] == pytest.approx([0.1, 10])
    assert lines["lora"]["y"] == [pytest.approx(100 * means["lora", None])] * 2
    assert figure.layout["xaxis"]["type"] == "log"


def test_levels_of_one_colour_have_dashes_of_their_own(comparison: dict[str, Any]) -> None:
    for row in comparison["rows"]:
        row["by"]["sparsity"] = None if row["by"]["method"] == "spiel" else row["by"]["sparsity"]
    figure = draw(comparison)["by_sparsity"]
    levels = [trace for trace in figure.data if trace["mode"] == "lines"]
    assert len(levels) == 4
    assert len({(level["line"]["color"], level["line"]["dash"]) for level in levels}) == 4
    assert figure.layout["showlegend"]


def test_other_settings_are_axes_too(comparison: dict[str, Any]) -> None:
    comparison["by"] = ["method", "rank", "optimizer.name"]
    for place, row in enumerate(comparison["rows"]):
        row["by"] = {
            "method": row["by"]["method"],
            "rank": 4 << place % 3,
            "optimizer.name": "sm3" if place % 2 else "adamw",
        }
    (setting,) = views.view_settings(comparison)
    assert setting.key == "rank"
    assert not setting.x.log
    assert sum(len(line) for line in setting.lines.values()) == 13
    assert all(re.fullmatch(r"\w+ optimizer\.name=(sm3|adamw)", name) for name in setting.lines)
    dashes = {(trace["meta"]["series"], trace["line"]["dash"]) for trace in draw(comparison)["by_rank"].data}
    assert len(dashes) == len(setting.lines)
    assert views.view_settings(comparison | {"by": ["method"]}) == []


def test_rows_that_differ_only_in_numbers_are_one_line(comparison: dict[str, Any]) -> None:
    for place, row in enumerate(comparison["rows"]):
        row["by"] = {"optimizer.lr": None if row["label"] == "lora" else 10.0 ** -(1 + place % 7)}
    (setting,) = views.view_settings(comparison | {"by": ["optimizer.lr"]})
    assert {name: len(line) for name, line in setting.lines.items()} == {"rows": 12}
    assert [level.label for level in setting.levels] == ["lora"]
    assert setting.x.log
    assert set(make_styles(comparison | {"by": ["optimizer.lr"]})) == {"rows"}


def test_a_density_of_zero_is_mentioned_but_not_drawn(comparison: dict[str, Any]) -> None:
    comparison["rows"][0]["by"]["sparsity"] = 1.0
    caption = draw(comparison)["by_sparsity"].caption
    assert "2 of 14 rows are not drawn" in caption


def test_curves_have_bands_where_there_are_seeds(comparison: dict[str, Any]) -> None:
    figure = draw(comparison)["curves"]
    lines = [trace for trace in figure.data if "fill" not in trace]
    bands = {trace["name"] for trace in figure.data if "fill" in trace}
    assert len(lines) == views.MOST_CURVES == 12
    assert "2 of 14 rows are not drawn (only the best 12 are)" in figure.caption
    alone = "sara sparsity=0.99"
    assert {trace["name"] for trace in lines} - bands == {alone} | {
        escape_tags(shorten(example["HOSTILE"]))
    }  # its band has the whole name
    row = comparison["rows"][0]
    assert lines[0]["y"] == pytest.approx([100 * point["mean"] for point in row["curve"]])
    count, band = len(row["curve"]), next(trace for trace in figure.data if "fill" in trace)
    assert band["y"][:count] == pytest.approx([100 * point["high"] for point in row["curve"]])
    assert band["y"][count:] == pytest.approx([100 * point["low"] for point in row["curve"]][::-1])
    looks = [(trace["line"]["color"], trace["line"]["dash"]) for trace in lines]
    assert len(set(looks)) == len(looks)


@pytest.mark.parametrize("count", [1, 3])
def test_curves_of_few_points_have_markers(comparison: dict[str, Any], count: int) -> None:
    for row in comparison["rows"]:
        row["curve"] = row["curve"][:count]
    lines = [trace for trace in draw(comparison)["curves"].data if "fill" not in trace]
    assert {trace["mode"] for trace in lines} == {"lines+markers"}
    assert (
        len({(trace["marker"]["color"], trace["marker"]["symbol"][0]) for trace in lines}) == len(lines) == 12
    )
    bars = [trace["error_y"]["array"] for trace in lines if "error_y" in trace]
    assert bars == (
        [[pytest.approx(100 * (row["high"] - row["mean"]))] for row in comparison["rows"][:12] if row["high"]]
        if count == 1
        else []
    )


def test_axes_of_shares_end_at_0_and_100(comparison: dict[str, Any]) -> None:
    clip = {"clipmin": -1.5, "clipmax": 101.5}
    limits = {key: figure.layout["yaxis"].get("autorangeoptions") for key, figure in draw(comparison).items()}
    assert {key for key, found in limits.items() if found == clip} == {
        key for key in limits if key.startswith(("pareto", "by_", "curves"))
    }
    comparison["metric"] |= {"name": "val.loss", "words": "validation loss", "percent": False}
    assert "autorangeoptions" not in draw(comparison)["pareto_trained"].layout["yaxis"]


def test_points_are_filled_where_a_difference_was_shown(comparison: dict[str, Any]) -> None:
    comparison["rows"][3]["versus"] |= {
        "low": None,
        "high": None,
        "p": None,
        "p_holm": None,
        "test": "none",
        "verdict": "untested",
    }
    figure = draw(comparison)["differences"]
    found = find_points(figure)
    rows = [row for row in comparison["rows"] if row["versus"]]
    assert [row["label"] for row in rows] == sorted(found, key=lambda label: found[label][1])
    for row in rows:
        x, _, trace, place = found[row["label"]]
        versus = row["versus"]
        assert x == pytest.approx(100 * versus["difference"])
        if versus["low"] is not None:
            arms = trace["error_x"]["arrayminus"][place], trace["error_x"]["array"][place]
            assert arms == pytest.approx(
                (100 * (versus["difference"] - versus["low"]), 100 * (versus["high"] - versus["difference"]))
            )
        assert trace["marker"]["symbol"][place].endswith("-open") == (
            versus["verdict"] in ("tie", "untested")
        )
    assert "lora" not in found
    assert "1 of 14 rows is not drawn" in figure.caption


def test_every_clique_has_a_bar_and_no_two_touch(comparison: dict[str, Any]) -> None:
    found = views.view_ranks(comparison)
    assert found is not None
    order = [point.label for point in found.points]
    ranks = comparison["critical_difference"]["ranks"]
    assert order == sorted(ranks, key=ranks.__getitem__)
    assert {tuple(order[first : last + 1]) for _, first, last in found.cliques} == {
        tuple(c) for c in comparison["critical_difference"]["cliques"]
    }
    for lane, first, last in found.cliques:
        assert not any(
            other == lane and (a, b) != (first, last) and a <= last and b >= first
            for other, a, b in found.cliques
        )
    bars = [
        trace
        for trace in draw(comparison)["critical_difference"].data
        if trace["name"] == "no difference shown"
    ]
    assert [(round(bar["y"][0]), round(bar["y"][1])) for bar in bars] == [
        (first, last) for _, first, last in found.cliques
    ]
    ruler = next(
        trace
        for trace in draw(comparison)["critical_difference"].data
        if trace["name"] == "critical difference"
    )
    assert ruler["x"] == [1, 1 + comparison["critical_difference"]["cd"]]


def test_a_clique_of_one_needs_no_bar(comparison: dict[str, Any]) -> None:
    comparison["critical_difference"] = {
        "ranks": {"a": 1.0, "b": 2.5, "c": 2.5},
        "cd": 1.0,
        "cliques": [["a"], ["b", "c"]],
        "blocks": 4,
    }
    found = views.view_ranks(comparison)
    assert found is not None
    assert found.cliques == [(0, 1, 2)]


def test_names_cannot_become_markup(comparison: dict[str, Any]) -> None:
    text = json.dumps([figure.as_plotly() for figure in make_figures(comparison)])
    assert set(re.findall(r"<\w*", text)) <= {"<b", "<br", "<extra", "<"}
    assert "&lt;script&gt;" in text
    names = [trace.get("name", "") for figure in make_figures(comparison) for trace in figure.data]
    assert not any("<" in name for name in names)


def test_nothing_to_draw_is_no_error(comparison: dict[str, Any]) -> None:
    comparison["rows"] = [row for row in comparison["rows"] if row["mean"] is None]
    comparison |= {"tests": [], "omnibus": None, "critical_difference": None}
    assert make_figures(comparison) == []


def test_one_row_alone(comparison: dict[str, Any]) -> None:
    row = comparison["rows"][0]
    row |= {"versus": None, "curve": []}
    found = draw(comparison | {"rows": [row], "critical_difference": None, "by": []})
    assert set(found) == {f"pareto_{cost.key}" for cost in axes.COSTS}


@given(st.floats(1e-6, 1e9), st.floats(1, 1e8))
def test_logarithmic_ticks_are_few_round_and_there(low: float, span: float) -> None:
    found = axes.choose_log_ticks(low, low * span)
    assert len(found) <= 12
    assert all(f"{place:e}"[0] in "1235" and set(f"{place:e}".split("e")[0][2:]) == {"0"} for place in found)
    assert found or span < 5
    assert all(low * 0.8 <= place <= low * span * 1.25 for place in found)


def test_short_keeps_both_ends() -> None:
    assert shorten("snell") == "snell"
    assert shorten("a" * 40 + "z" * 40) == "a" * 14 + "…" + "z" * 14
    assert len(shorten("x" * 99, 24)) <= 24
