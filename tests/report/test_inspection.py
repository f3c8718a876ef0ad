"""The table and the plots of an inspection, and that no other file is touched."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from finetune.report.drawing import draw_plots
from finetune.report.inspection import InspectionTable, make_grid, make_plots, summarise

OVERLAP = {"hits": 30, "of": 100, "chance": 0.2, "share": 0.3}


def row(**more: Any) -> dict[str, Any]:
    numbers = {
        "entries": 400,
        "changed": 100,
        "changed_bf16": 90,
        "change_norm": 3.0,
        "weight_norm": 30.0,
        "density": 0.25,
        "density_bf16": 0.225,
    }
    spectral = {
        "relative_norm": 0.1,
        "effective_rank": 7.25,
        "stable_rank": 2.0,
        "nss": 0.012,
        "angle_left": 3.0,
        "angle_right": 4.06,
        "gap": 0.1,
    }
    return {
        **numbers,
        **spectral,
        "overlap": {"magnitude": OVERLAP, "principal": OVERLAP, "low": {**OVERLAP, "share": None}},
        **more,
    }


@pytest.fixture
def found() -> dict[str, Any]:
    layers = [
        row(layer=f"l{b}.{r}", role=r, block=b, changed=10 * (b + 1))
        for b in (0, 2, -1)
        for r in ("q", "up")
        if (b, r) != (2, "up")
    ]
    return {
        "run": "outputs/t/r",
        "method": "shira",
        "step": 40,
        "dtype": "float32",
        "rank": 32,
        "alpha": 0.5,
        "mask": "changed",
        "total": row(layers=5),
        "roles": [row(role=r, layers=3) for r in ("q", "up")],
        "blocks": [row(block=b, layers=2) for b in (-1, 0, 2)],
        "layers": layers,
        "others": [{"parameter": "b", "entries": 9, "changed": 8, "relative_norm": 0.1}],
        "churn": [{"step": 11, "churn": 0.5}, {"step": 21, "churn": 0.125}],
        "folder": "x",
    }


def printed(table: InspectionTable, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    return str(text)


def test_the_table_fits_a_terminal_and_compares_with_chance(found: dict[str, Any]) -> None:
    text = printed(InspectionTable(found), 80)
    lines = text.splitlines()
    assert "…" not in text
    assert [line.split()[0] for line in lines if "%" in line and "x1.5" in line] == [
        "q",
        "up",
        "no",
        "block",
        "block",
        "all",
    ]
    whole = next(line for line in lines if line.startswith("all")).split()
    assert whole == ["all", "25%", "22.5%", "0.1", "7.2", "0.012", "4.1°", "x1.5", "x1.5", "-"]
    assert "Overlaps of the changed entries" in " ".join(text.split())
    assert "|g| " not in lines[0]


def test_the_mask_of_dense_runs_is_named(found: dict[str, Any]) -> None:
    found["mask"] = "changed_bf16"
    assert "the entries that differ in bfloat16" in " ".join(printed(InspectionTable(found), 80).split())


def test_parameters_outside_of_layers_have_a_line(found: dict[str, Any]) -> None:
    lines = summarise(found)
    assert lines[0] == "shira, step 40, weights in float32"
    assert "8 entries of 1 embeddings" in lines[1]
    assert "2 moves" in lines[2]
    assert summarise({**found, "churn": [], "others": []}) == lines[:1]


def test_the_grid_leaves_blanks_and_joins_layers_of_one_cell(found: dict[str, Any]) -> None:
    found["layers"].append(row(layer="more", role="q", block=0, changed=30))
    blocks, roles, values = make_grid(found["layers"], lambda rows: sum(r["changed"] for r in rows))
    assert (blocks, roles) == ([-1, 0, 2], ["q", "up"])
    assert [[v if not math.isnan(v) else None for v in line] for line in values] == [
        [0, 0],
        [40, 10],
        [30, None],
    ]


def test_plots_are_pngs_and_no_other_file_is_touched(found: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "inspect"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    made = draw_plots(make_plots(found), folder)
    assert [file.name for file in made] == ["density.png", "relative_norm.png", "churn.png"]
    assert sorted(p.name for p in tmp_path.rglob("*")) == sorted(
        ["inspect", "mine.txt", *(file.name for file in made)]
    )
    assert (folder / "mine.txt").read_text() == "mine"
    for file in made:
        with Image.open(file) as image:
            assert image.format == "PNG"
            assert min(image.size) > 100
            assert len(image.convert("RGB").getcolors(1 << 24) or []) > 10
    assert make_plots({**found, "layers": [], "churn": []}) == []


@pytest.mark.processes
def test_neither_matplotlib_nor_torch_is_imported_without_a_plot() -> None:
    code = "import sys, finetune.cli.app, finetune.report.inspection; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "matplotlib"} & set(done.stdout.split())
