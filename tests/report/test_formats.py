"""Tables for people and for programs: complete, escaped, and fitted to the terminal."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from finetune.report import formats
from finetune.report.comparison import compare

from ..support.run_folders import MakeRun

ODD = "a_b & 100% {x} <y> | *z* ~^\\ $5 #1 [ü]"


@pytest.fixture
def data(make_run: MakeRun, tmp_path: Path) -> dict[str, Any]:
    """Return three rows: one of three seeds, one with special characters and a failure, one of failures."""
    for seed in range(3):
        make_run("lora", seed, [1] * (45 - seed) + [0] * (5 + seed))
        make_run(
            "snell",
            seed,
            [1] * (30 - seed) + [0] * (20 + seed),
            result={"params": {"trained": 1_234_567}},
            dataset__note=ODD,
        )
    make_run("snell", 3, status="failed", dataset__note=ODD)
    make_run("head", 0, status="failed", result={"error": "exploded [bold]"})
    return compare([tmp_path / "outputs"], by=["dataset.note", "method"]).as_dict()


def printed(data: dict[str, Any], width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    for part in formats.show_in_terminal(data, width):
        console.print(part)
    text = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    return str(text)


def test_the_terminal_shows_everything(data: dict[str, Any]) -> None:
    text = printed(data, 240)
    first = text.splitlines()
    assert first[0].startswith("Fairness check: the rows differ in more")
    assert next(
        i for i, line in enumerate(first) if "Trained parameters differ by a factor of 35.2" in line
    ) < text[: text.index("───")].count("\n")
    numbers = (ODD, "1,234,567", "88.00", "3 (1 failed)", "0 (1 failed)", "difference", "worse", "512.0 MiB")
    for words in (*numbers, "out of memory", "exploded [bold]"):
        assert words in text, words
    assert len(re.findall(r"^row ", text, re.MULTILINE)) == 1


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_narrow_terminals_lose_nothing(data: dict[str, Any], width: int) -> None:
    text = printed(data, width)
    assert all(len(line) <= width for line in text.splitlines())
    assert len(re.findall(r"^row ", text, re.MULTILINE)) == 2
    if width >= 80:
        assert all(words in text for words in ("3 (1 failed)", "worse", "88.00", "512.0 MiB"))


def test_one_seed_and_no_findings(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("lora", 0, [1, 1, 0, 1])
    make_run("head", 0, [1, 1, 0, 1])
    text = printed(compare([tmp_path / "outputs"]).as_dict(), 200)
    assert text.startswith("Fairness check: the rows differ only in what is compared.")
    assert len(re.findall(r"one seed  ", text)) == 2
    assert text.count(" = ") == 2


def test_csv_reads_back(data: dict[str, Any]) -> None:
    rows = list(csv.DictReader(io.StringIO(formats.write_csv(data))))
    for line, row in zip(rows, data["rows"], strict=True):
        assert line["row"] == row["label"]
        assert line["dataset.note"] == (row["by"]["dataset.note"] or "")
        assert list(map(float, line["values"].split())) == row["values"]
        assert (float(line["mean"]) if line["mean"] else None) == row["mean"]
        assert line["versus_verdict"] == ((row["versus"] or {}).get("verdict") or "")
        assert line["command"] == row["command"]


def test_markdown_is_one_table_with_equal_cells(data: dict[str, Any]) -> None:
    text = formats.write_markdown(data)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(data["rows"])
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "\\<y\\>" in text
    assert "exploded \\[bold\\]" in text


def test_latex_escapes(data: dict[str, Any]) -> None:
    text = formats.write_latex(data)
    body = [line for line in text.splitlines() if not line.startswith("%")]
    assert body[0].startswith("\\begin{tabular}{lrrrr")
    columns = body[0].count("r", body[0].index("{l"))
    rows = body[body.index("\\midrule") + 1 : body.index("\\bottomrule")]
    assert all(len(re.findall(r"(?<!\\)&", row)) == columns for row in rows)
    escaped = r"a\_b \& 100\% \{x\} \textless{}y\textgreater{} | *z* \textasciitilde{}"
    escaped += r"\textasciicircum{}\textbackslash{} \$5 \#1 {[}ü]"
    assert escaped in text
    assert "\\textbf{88.00}" in text


@pytest.mark.processes
@pytest.mark.skipif(not shutil.which("pdflatex"), reason="needs pdflatex")
def test_latex_compiles(data: dict[str, Any], tmp_path: Path) -> None:
    head = "\\documentclass{article}\\usepackage{booktabs}\\begin{document}"
    (tmp_path / "t.tex").write_text(f"{head}{formats.write_latex(data)}\\end{{document}}")
    subprocess.run(
        ["pdflatex", "-halt-on-error", "t.tex"], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL
    )


def test_columns_that_would_be_empty_are_left_out(make_run: MakeRun, tmp_path: Path) -> None:
    changes = {"metrics": {"test": {"accuracy": 0.5}, "retention": {"accuracy": 0.25}}}
    make_run("lora", 0, [1, 0])
    alone = [column.heading for column in formats.make_columns(compare([tmp_path / "outputs"]).as_dict())]
    assert not {"retention accuracy %", "tuning trials", "p"} & set(alone)
    make_run("head", 0, [1, 0], result=changes, tuning={"parameter": "optimizer.lr", "trials": 5})
    both = compare([tmp_path / "outputs"]).as_dict()
    cells = {}
    for column in formats.make_columns(both):
        cells[column.heading] = [column.cell(row) for row in both["rows"]]
    assert sorted(cells["retention accuracy %"]) == ["-", "25.00"]
    assert sorted(cells["tuning trials"]) == ["5", "none"]
