"""Fill the table of README.md: the built-in image task, five methods, three seeds.

    python scripts/readme_table.py

runs ``finetune sweep`` (finished runs are skipped, so it can be broken off and given again) and writes mean and standard deviation between the
markers.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parents[1] / "README.md"
SWEEP = ["method=head,lora,snell,shira,full", "seed=0,1,2", "train.steps=100", "name=readme"]


def spread(values: list[float], show: str) -> str:
    return f"{statistics.mean(values):{show}} ± {statistics.stdev(values):{show}}"


def row(method: str, results: list[dict[str, Any]]) -> str:
    tested = [r["metrics"]["test"]["accuracy"] * 100 for r in results]
    memory = statistics.median(r["cost"]["peak_memory_bytes"] for r in results)
    size, trained = results[0]["stored_bytes"] / 1024, results[0]["params"]["trained"]
    return f"| {method} | {spread(tested, '.1f')} | {trained:,} | {size:,.0f} | {memory / 2**20:.0f} |"


def main() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "finetune", "sweep", "--json", *SWEEP],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    results = json.loads(done.stdout)
    methods = list(dict.fromkeys(r["method"] for r in results))
    base = [r["metrics"]["base"]["accuracy"] * 100 for r in results if r["method"] == methods[0]]
    lines = ["| method | test accuracy, % | trained | stored KiB | peak MiB |", "|---|---|---|---|---|"]
    lines.append(f"| base, with its new head untrained | {spread(base, '.1f')} | 0 | 0 | |")
    lines += [row(m, [r for r in results if r["method"] == m]) for m in methods]
    before, _, rest = README.read_text().partition("<!-- table -->\n")
    text = "\n".join(lines)
    README.write_text(
        f"{before}<!-- table -->\n{text}\n<!-- /table -->{rest.partition('<!-- /table -->')[2]}"
    )
    print(text)


if __name__ == "__main__":
    main()
