"""Fill the first table of docs/results.md: the built-in image task, five methods, three seeds.

    python scripts/five_methods.py

The script runs ``finetune sweep`` and writes mean and standard deviation between the markers
``<!-- table -->``. Finished runs are skipped, so an interrupted command can be repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs" / "results.md"
SWEEP = ["method=head,lora,snell,shira,full", "seed=0,1,2", "train.steps=100", "name=five_methods"]
START, END = "<!-- table -->\n", "<!-- /table -->"


def show_spread(values: list[float]) -> str:
    """Write mean and standard deviation with one decimal."""
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def table_row(method: str, results: list[dict[str, Any]]) -> str:
    """Write the row of one method from the results of its seeds."""
    accuracies = [result["metrics"]["test"]["accuracy"] * 100 for result in results]
    memory = statistics.median([result["cost"]["peak_memory_bytes"] for result in results])
    trained, stored = results[0]["params"]["trained"], results[0]["stored_bytes"]
    shown = show_spread(accuracies)
    return f"| {method} | {shown} | {trained:,} | {stored / 2**10:,.0f} | {memory / 2**20:.0f} |"


def main() -> None:
    """Run the sweep and write the table into the page."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    command = [sys.executable, "-m", "finetune", "sweep", "--json", *SWEEP]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    by_method: dict[str, list[dict[str, Any]]] = {}
    for result in json.loads(done.stdout):
        by_method.setdefault(result["method"], []).append(result)
    first = next(iter(by_method.values()))
    base = [result["metrics"]["base"]["accuracy"] * 100 for result in first]
    lines = ["| method | test accuracy, % | trained | stored KiB | peak MiB |", "|---|---|---|---|---|"]
    lines.append(f"| base, with its new head untrained | {show_spread(base)} | 0 | 0 | |")
    for method, results in by_method.items():
        lines.append(table_row(method, results))
    before, _, rest = PAGE.read_text().partition(START)
    after = rest.partition(END)[2]
    PAGE.write_text(before + START + "\n".join(lines) + "\n" + END + after)
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
