"""Draw random pages of the project's prose for review: ``python scripts/draw_pages.py --seed 13``.

Prose means every docstring, comment and message of the package, the pages of docs/, and the README. A page
holds about 40 lines of one file. The same seed draws the same pages from the same commit.
"""

from __future__ import annotations

import argparse
import ast
import io
import random
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = 40  # lines


def find_docstrings(tree: ast.Module) -> list[tuple[int, str]]:
    """Return the docstrings of a module, its classes and its functions, each with its line number."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                found.append((node.body[0].lineno, text))
    return found


def find_comments(text: str) -> list[tuple[int, str]]:
    """Return the comments of a file, each with its line number."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [(token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT]


def find_messages(tree: ast.Module, said: set[str]) -> list[tuple[int, str]]:
    """Return texts of at least four words that are not in ``said``, each with its line number."""
    found = []
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = ast.unparse(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            text = node.value
        else:
            continue
        if len(text.split()) >= 4 and " ".join(text.split()) not in said:
            found.append((node.lineno, text))
    return found


def read_prose(path: Path) -> list[str]:
    """Return the lines of prose in a file, in order, each with its line number."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return [f"{number:>4}  {line}" for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    tree = ast.parse(text)
    documented = find_docstrings(tree)
    said = {" ".join(docstring.split()) for _, docstring in documented}
    pieces = sorted([*documented, *find_comments(text), *find_messages(tree, said)])
    lines = []
    for number, piece in pieces:
        lines += [f"{number:>4}  {line}" for line in piece.splitlines() if line.strip()]
    return lines


def make_pages() -> list[tuple[str, list[str]]]:
    """Return the title and the lines of every page."""
    files = [
        *sorted((ROOT / "finetune").rglob("*.py")),
        ROOT / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    ]
    found = []
    for file in files:
        lines = read_prose(file)
        name = file.relative_to(ROOT).as_posix()
        for start in range(0, len(lines), PAGE):
            found.append((f"{name}, part {start // PAGE + 1}", lines[start : start + PAGE]))
    return found


def main() -> None:
    """Print the drawn pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10)
    given = parser.parse_args()
    everything = make_pages()
    drawn = random.Random(given.seed).sample(everything, given.count)
    print(f"{given.count} of {len(everything)} pages, seed {given.seed}")
    for title, lines in drawn:
        print(f"\n--- {title}", *lines, sep="\n")


if __name__ == "__main__":
    main()
