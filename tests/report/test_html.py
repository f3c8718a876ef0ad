"""The HTML report: complete, independent of a network, and safe with any names and errors."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import ConfigError
from finetune.report import html
from finetune.report.figures import make_figures

example = runpy.run_path(str(Path(__file__).with_name("comparison_example.py")))
VOID = {"meta", "link", "input", "br", "img", "line", "circle", "path"}


class Page(HTMLParser):
    """Tags with their attributes, the text of each script, and the visible words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.scripts: list[tuple[dict[str, str], str]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attrs}
        self.tags.append((tag, found))
        if tag == "script":
            self.scripts.append((found, ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] = self.scripts[-1][0], self.scripts[-1][1] + data
        elif self.open and self.open[-1] != "style":
            self.words.append(data)

    def all(self, tag: str, **wanted: str) -> list[dict[str, str]]:
        """Attributes of all such tags; ``class_`` stands for ``class``."""
        return [
            found
            for name, found in self.tags
            if name == tag and all(found.get(k.rstrip("_")) == v for k, v in wanted.items())
        ]


@pytest.fixture
def comparison() -> dict[str, Any]:
    return example["comparison"]()


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(html.make_document(example["comparison"]()))


def read_words(page: Page) -> str:
    return " ".join(" ".join(page.words).split())


def test_the_page_loads_nothing(page: Page) -> None:
    links = [
        (tag, key, value)
        for tag, found in page.tags
        for key, value in found.items()
        if key in ("src", "href", "action", "srcset", "data")
    ]
    assert links == [("link", "href", "data:,")]
    (policy,) = [
        found["content"] for found in page.all("meta") if found.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy
    assert "unsafe-eval" not in policy
    assert re.search(r"script-src [^;]*unsafe", policy) is None
    style = Path(html.__file__).with_name("assets").joinpath("report.css").read_text()
    assert "url(" not in style
    assert "@import" not in style


def test_the_policy_allows_just_the_scripts_that_are_there(page: Page) -> None:
    (policy,) = [found["content"] for found in page.all("meta") if "http-equiv" in found]
    allowed = set(re.findall(r"'sha256-([^']+)'", policy))
    running = [text for found, text in page.scripts if "type" not in found]
    assert {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in running} == allowed
    assert len(running) == 2
    assert sum("plotly.js v" in text for text in running) == 1
    assert not any(key.startswith("on") for _, found in page.tags for key in found)


def test_a_row_names_the_plug_in_that_its_command_needs(page: Page, comparison: dict[str, Any]) -> None:
    (needed,) = [plugin for row in comparison["rows"] for plugin in row["plugins"]]
    words = f"the plug-in {needed}: add --plugins DIR with its folder, unless it is installed"
    assert read_words(page).count(words) == 1


def test_every_row_is_there_with_its_values_and_command(page: Page, comparison: dict[str, Any]) -> None:
    assert [found["data-value"] for found in page.all("th", scope="row") if "data-value" in found] == [
        row["label"] for row in comparison["rows"]
    ]
    assert [found["data-copy"] for found in page.all("button", class_="copy")] == [
        row["command"] for row in comparison["rows"]
    ]
    values = [found["data-value"] for found in page.all("td") if "data-value" in found]
    width = len(values) // len(comparison["rows"])
    table = [values[i : i + width] for i in range(0, len(values), width)]
    heads = [found["title"] for found in page.all("th", scope="col") if "aria-sort" in found]
    assert len(heads) == width + 1
    for row, cells in zip(comparison["rows"], table, strict=True):
        sparsity = "" if row["by"]["sparsity"] is None else str(row["by"]["sparsity"])
        mean, lost = (
            "" if row["mean"] is None else str(row["mean"]),
            str(row["failed"] + row["pruned"] + row["unfinished"]),
        )
        assert cells[:3] == [sparsity, mean, lost]
        kept = ["trained", "changed", "stored_bytes", "step_seconds", "peak_memory_bytes", "trials"]
        assert cells[-6:] == ["" if row[key] is None else str(row[key]) for key in kept]
    words = read_words(page)
    for shown in (
        "91.99 to 93.19",
        "1 failed",
        "1 unfinished",
        "single seed",
        "0 of 2",
        "one seed",
        "87.10 to 92.10, 95 % interval over 360 test",
    ):
        assert shown in words


def test_texts_of_configurations_are_not_markup(page: Page, comparison: dict[str, Any]) -> None:
    assert example["HOSTILE"] in "".join(page.words)
    assert "onerror=alert(1)" in read_words(page)
    assert not page.all("img")
    assert len(page.scripts) == 3
    assert page.open == []


def test_the_figures_can_be_read_back_from_their_script(page: Page, comparison: dict[str, Any]) -> None:
    (data,) = [text for found, text in page.scripts if found.get("type") == "application/json"]
    expected = [{"key": figure.key, **figure.as_plotly()} for figure in make_figures(comparison)]
    assert json.loads(data) == json.loads(json.dumps(expected))
    assert not set("<>&") & set(data)
    assert [found["id"] for found in page.all("div", class_="plot")] == [
        f"plot-{figure.key}" for figure in make_figures(comparison)
    ]


def test_fairness_stands_above_the_table(page: Page, comparison: dict[str, Any]) -> None:
    words = read_words(page)
    for finding in comparison["fairness"]:
        assert words.index(finding["words"]) < words.index("Results")
        assert all(value in words for value in finding["values"].values())
    assert all(note in words for note in comparison["notes"])
    assert "may decide which row wins (3 findings):" in words
    fair = read_words(Page(html.make_document(comparison | {"fairness": []})))
    assert "The rows differ only in what is compared." in fair


def test_the_first_sentences_name_the_best_row_and_its_ties(comparison: dict[str, Any]) -> None:
    words = read_words(Page(html.make_document(comparison)))
    assert "Best mean: spiel sparsity=0.9 with 92.59 % (95 % interval 91.99 to 93.19)." in words
    assert "These runs do not show a difference from snell sparsity=0.9 ." in words
    rows = comparison["rows"]
    rows[0]["rank"], rows[1]["rank"] = "best", ""
    assert "better than every other row that was tested" in read_words(Page(html.make_document(comparison)))
    rows[0] |= {"low": None, "high": None, "single_seed": True}
    assert "(one seed, so no interval)" in read_words(Page(html.make_document(comparison)))


def test_sorting_starts_from_the_order_of_the_rows(page: Page, comparison: dict[str, Any]) -> None:
    orders = [found["aria-sort"] for found in page.all("th") if "aria-sort" in found]
    assert orders.count("descending") == 1
    assert orders.index("descending") == 2  # after the row and its sparsity
    comparison["metric"] = {"name": "test.loss", "words": "loss", "higher_is_better": False, "percent": False}
    lower = Page(html.make_document(comparison))
    assert [found["aria-sort"] for found in lower.all("th") if "aria-sort" in found].index("ascending") == 2


def test_a_comparison_may_lack_almost_everything(comparison: dict[str, Any]) -> None:
    failed = comparison["rows"][-1]
    bare = {
        "rows": [failed],
        "tests": [],
        "omnibus": None,
        "critical_difference": None,
        "fairness": [],
        "notes": [],
        "baseline": None,
        "task": None,
    }
    page = Page(html.make_document(comparison | bare | {"by": []}))
    assert "nothing to compare yet" in read_words(page)
    assert not page.all("div", class_="plot")
    rows = [
        row
        | {
            "versus": row["versus"]
            and row["versus"] | dict.fromkeys(("low", "high", "p", "p_holm", "difference"))
        }
        for row in comparison["rows"]
    ]
    tests = [
        test | dict.fromkeys(("low", "high", "p", "p_holm", "difference")) for test in comparison["tests"]
    ]
    assert Page(html.make_document(comparison | {"rows": rows, "tests": tests})).open == []


def test_a_report_is_written_whole_or_not_at_all(
    tmp_path: Path, comparison: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "new" / "report.html"
    html.write_report(comparison, file)
    first = file.read_text(encoding="utf-8")
    assert first.startswith("<!doctype html>\n<!-- finetune compare -->")
    assert first == html.make_document(comparison)

    def full(self: Path, *_: Any, **__: Any) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(Path, "write_text", full)
        with pytest.raises(ConfigError, match="No space left"):
            html.write_report(comparison | {"notes": []}, file)
    assert file.read_text(encoding="utf-8") == first
    assert [path.name for path in file.parent.iterdir()] == ["report.html"]
    with pytest.raises(ConfigError, match=r"report\.html/x\.html cannot be written"):
        html.write_report(comparison, file / "x.html")


@pytest.mark.processes
def test_writing_a_report_imports_no_plotting_library(tmp_path: Path) -> None:
    here = Path(__file__).with_name("comparison_example.py")
    code = f"""
import runpy, sys
from finetune.report import html
html.make_document(runpy.run_path({str(here)!r})["comparison"]())
print(*sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    heavy = {"torch", "matplotlib", "numpy", "pandas", "plotly.graph_objs", "scipy"}
    assert not heavy & set(done.stdout.split())
