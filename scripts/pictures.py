"""Make the pictures of README.md and of the documentation, in docs/images/.

    python scripts/pictures.py architecture     # architecture.svg: the package's folders and imports
    python scripts/pictures.py report           # report.png: an HTML report in a headless Chromium

The report is that of a real sweep in outputs/picture: five methods, three seeds, some minutes on two cores.
Finished runs are skipped, so the command can be given again.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"

SWEEP = [
    "method=lora,super_tuning,shira,sara,s2ft",
    "budget=49152",
    "seed=0,1,2",
    "train.steps=60",
    "train.threads=1",
    "name=picture",
]
WINDOW = (1280, 1000)
COLORS = 128
RULE = "A box imports only from rows below its own, or from boxes to its right."

# From top to bottom and from left to right. tests/test_pages.py checks that imports agree with RULE.
LAYERS: list[tuple[str, dict[str, str]]] = [
    ("commands", {"cli": "train, sweep, compare, eval, merge, export, analyze, verify ..."}),
    ("what is measured of runs", {"analyses": "update geometry, linear mode connectivity"}),
    (
        "many runs and finished runs",
        {
            "sweep": "grid, equal budgets, tuning, search, clusters",
            "testing": "the checks that every method passes",
            "artifacts": "merge, unmerge, export, compose, verify, reproduce, prune, compress",
        },
    ),
    ("processes", {"launch": "ranks, resume, fork server"}),
    (
        "one run",
        {
            "training": "build, begin, then for each step: before_step, forward and loss, backward, "
            "after_backward, optimizer step, after_step",
            "report": "tables, tests, fairness, HTML",
        },
    ),
    (
        "what a run is made of",
        {
            "methods": "one published method a file",
            "data": "rows to tensors",
            "models": "a frozen base with a new head",
            "storage": "the folder of a run",
        },
    ),
    (
        "interchangeable parts",
        {
            "schedules": "when the choice of entries is made again",
            "scores": "what entries are chosen by",
            "passes": "pruning and factoring of stored weights",
            "structures": "layers stored as other tensors",
            "selectors": "which blocks train at a step",
            "optim": "AdamW, SM3",
            "objectives": "the loss of a step",
        },
    ),
    (
        "settings and engine",
        {
            "config": "YAML and command line to frozen dataclasses",
            "core": "Method, Site, Part, Delta, Edit, Bank; the sparse engine: "
            "score x direction x scope x grain x schedule",
        },
    ),
    (
        "ground",
        {
            "registry": "names of methods and other kinds",
            "system": "signals, disk, safe reading",
            "errors": "what is raised",
        },
    ),
]

WIDTH, MARGIN, LABEL = 1080, 20, 180
ROW, GAP = 62, 10
TITLE_SIZE, TEXT_SIZE, CHARACTER = (
    15,
    12,
    6.1,
)  # pixels; the last is the mean width of a character of the text
FILLS = ("#e8eaf6", "#ede7f6", "#e3f2fd", "#e3f2fd", "#e0f2f1", "#f1f8e9", "#fff8e1", "#fbe9e7", "#eceff1")


def draw_architecture() -> str:
    """Draw the layers of the package as an SVG: one row per layer, one box per folder."""
    height = 2 * MARGIN + len(LAYERS) * (ROW + GAP) + 20
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" font-family="Helvetica, Arial, sans-serif">',
        "<title>The folders of the package in layers; each imports only from layers below its own</title>",
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff"/>',
    ]
    y = MARGIN
    for (label, boxes), fill in zip(LAYERS, FILLS, strict=True):
        lines.append(text_line(MARGIN, y + ROW / 2 + 4, TEXT_SIZE, "#546e7a", label))
        room = WIDTH - 2 * MARGIN - LABEL - GAP * (len(boxes) - 1)
        weights = [max(len(about), 30) for about in boxes.values()]
        x = float(MARGIN + LABEL)
        for (name, about), weight in zip(boxes.items(), weights, strict=True):
            width = room * weight / sum(weights)
            lines += draw_box(x, y, width, fill, f"{name}/" if has_folder(name) else name, about)
            x += width + GAP
        y += ROW + GAP
    lines.append(text_line(MARGIN + LABEL, y + 14, TEXT_SIZE, "#546e7a", RULE))
    return "\n".join([*lines, "</svg>", ""])


def has_folder(name: str) -> bool:
    """Tell whether a part of the package is a folder and not a single file."""
    return (ROOT / "finetune" / name).is_dir()


def draw_box(x: float, y: float, width: float, fill: str, title: str, about: str) -> list[str]:
    """Draw one box with a title and, below it, at most two lines of text."""
    lines = [
        f'<rect x="{x:.0f}" y="{y}" width="{width:.0f}" height="{ROW}" rx="6" '
        f'fill="{fill}" stroke="#90a4ae"/>',
        text_line(x + 10, y + 22, TITLE_SIZE, "#1a237e", title, bold=True),
    ]
    for number, row in enumerate(wrap_words(about, (width - 20) / CHARACTER)):
        lines.append(text_line(x + 10, y + 39 + 16 * number, TEXT_SIZE, "#263238", row))
    return lines


def wrap_words(text: str, width: float) -> list[str]:
    """Divide a text into rows of at most ``width`` characters."""
    rows = [""]
    for word in text.split():
        longer = f"{rows[-1]} {word}".strip()
        if len(longer) > width and rows[-1]:
            rows.append(word)
        else:
            rows[-1] = longer
    return rows


def text_line(x: float, y: float, size: int, color: str, text: str, bold: bool = False) -> str:
    """Write one line of text in SVG."""
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" fill="{color}"{weight}>{escape(text)}</text>'


def photograph_report(file: Path) -> None:
    """Train the sweep, compare it, and save a screenshot of the HTML report as a PNG of few colors."""
    from PIL import Image

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("The picture of the report needs chromium or google-chrome on the path.")
    finetune = [sys.executable, "-m", "finetune"]
    subprocess.run([*finetune, "sweep", *SWEEP], cwd=ROOT, check=True)
    with tempfile.TemporaryDirectory() as folder:
        page, shot = Path(folder, "report.html"), Path(folder, "report.png")
        subprocess.run([*finetune, "compare", "outputs/picture", "--out", str(page)], cwd=ROOT, check=True)
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        options += [f"--user-data-dir={folder}/profile", f"--window-size={WINDOW[0]},{WINDOW[1]}"]
        options += ["--virtual-time-budget=8000", f"--screenshot={shot}"]
        subprocess.run([chromium, *options, page.as_uri()], check=True, capture_output=True)
        with Image.open(shot) as image:
            image.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(file, optimize=True)
    print(f"{file}: {file.stat().st_size:,} bytes")


def main() -> None:
    """Make the pictures that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", nargs="+", choices=["architecture", "report"])
    wanted = parser.parse_args().pictures
    IMAGES.mkdir(parents=True, exist_ok=True)
    if "architecture" in wanted:
        (IMAGES / "architecture.svg").write_text(draw_architecture(), encoding="utf-8")
    if "report" in wanted:
        photograph_report(IMAGES / "report.png")


if __name__ == "__main__":
    main()
