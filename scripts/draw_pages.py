"""Draw pages of the project's prose at random, to be read with fresh eyes: ``python scripts/draw_pages.py --seed 13``.

Prose is every docstring, comment and message of the package, and the pages of docs/ and the README. A page holds
about 40 lines of it, from one file. The same seed draws the same pages from the same commit.
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


def docstrings(tree: ast.Module) -> list[tuple[int, str]]:
    """The docstrings of a module, its classes and functions, each with its line."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                found.append((node.body[0].lineno, text))
    return found


def comments(text: str) -> list[tuple[int, str]]:
    """The comments of a file, each with its line."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [(token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT]


def messages(tree: ast.Module, said: set[str]) -> list[tuple[int, str]]:
    """Texts of at least four words that are no docstrings: what the program tells people, each with its line."""
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


def prose_of(path: Path) -> list[str]:
    """The lines of prose in a file, in order, each with its line number."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return [f"{number:>4}  {line}" for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    tree = ast.parse(text)
    documented = docstrings(tree)
    said = {" ".join(docstring.split()) for _, docstring in documented}
    pieces = sorted([*documented, *comments(text), *messages(tree, said)])
    lines = []
    for number, piece in pieces:
        lines += [f"{number:>4}  {line}" for line in piece.splitlines() if line.strip()]
    return lines


def pages() -> list[tuple[str, list[str]]]:
    """Every page: its title and its lines."""
    files = [
        *sorted((ROOT / "finetune").rglob("*.py")),
        ROOT / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    ]
    found = []
    for file in files:
        lines = prose_of(file)
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
    everything = pages()
    drawn = random.Random(given.seed).sample(everything, given.count)
    print(f"{given.count} of {len(everything)} pages, seed {given.seed}")
    for title, lines in drawn:
        print(f"\n--- {title}", *lines, sep="\n")


if __name__ == "__main__":
    main()
