"""A comparison as ``Comparison.as_dict()`` returns it, made without any run.

It has five methods, three sparsities, and rows that lack parts.
"""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

HOSTILE = "snell <script>alert('x')</script> & \"quoted\" ünï→ $5$ </script>"
SPARSITIES = (0.9, 0.99, 0.999)
LEVEL = {"lora": 0.915, "snell": 0.93, "spiel": 0.922, "shira": 0.90, "sara": 0.918}


def comparison() -> dict[str, Any]:
    """Return fourteen rows, best first.

    A row lacks one of three seeds, a row has a single seed, a row has only failures, and a label is hostile.
    """
    chance = random.Random(1)
    rows = [
        _row(chance, method, sparsity)
        for method in LEVEL
        for sparsity in ((None,) if method == "lora" else SPARSITIES)
    ]
    _special(rows)
    rows.append(_failed("amt sparsity=0.9", {"method": "amt", "sparsity": 0.9}))
    rows.sort(key=lambda row: -(row["mean"] if row["mean"] is not None else -1))
    base = next(row for row in rows if row["label"] == "lora")
    rows[0]["rank"] = rows[1]["rank"] = "tie"
    for row in rows:
        if row is not base and row["mean"] is not None:
            row["versus"] = _versus(row, base)
    return {
        "format": 1,
        "metric": {"name": "test.accuracy", "words": "accuracy", "higher_is_better": True, "percent": True},
        "task": "classification",
        "by": ["method", "sparsity"],
        "baseline": "lora",
        "rows": rows,
        "tests": [
            _test(a, b)
            for a, b in itertools.combinations([row for row in rows if row["mean"] is not None][:4], 2)
        ],
        "omnibus": {"test": "cochran q", "statistic": 31.4, "df": 12, "p": 0.0017},
        "critical_difference": _critical(rows),
        "fairness": _fairness(base["label"], rows[0]["label"]),
        "notes": [
            "method=lora has no sparsity, so it is run once per other setting; budget= matches counts.",
            "amt: <1 of 1> runs failed & is kept.",
        ],
    }


def _special(rows: list[dict[str, Any]]) -> None:
    by_label = {row["label"]: row for row in rows}
    by_label["snell sparsity=0.99"]["label"] = HOSTILE
    alone = by_label["sara sparsity=0.99"]
    alone.update(
        seeds=[0],
        finished=1,
        values=alone["values"][:1],
        mean=alone["values"][0],
        sd=None,
        low=None,
        high=None,
        single_seed=True,
    )
    alone["examples"] = {"count": 360, "low": 0.871, "high": 0.921}
    alone["curve"] = [{**point, "low": None, "high": None} for point in alone["curve"]]
    part = by_label["shira sparsity=0.999"]
    part.update(
        finished=2,
        failed=1,
        values=part["values"][:2],
        errors=["RunFailed: the loss is not finite at step 12 </script><img src=x onerror=alert(1)>"],
    )


def _row(chance: random.Random, method: str, sparsity: float | None) -> dict[str, Any]:
    density = 1.0 if sparsity is None else 10 * (1 - sparsity)
    middle = LEVEL[method] + 0.02 * math.log10(density) / 2
    values = [round(middle + chance.gauss(0, 0.006), 4) for _ in range(3)]
    label = method if sparsity is None else f"{method} sparsity={sparsity}"
    mean, sd = sum(values) / 3, math.sqrt(sum((v - sum(values) / 3) ** 2 for v in values) / 2)
    half = 4.302652729911275 * sd / math.sqrt(3)
    trained = int(36_000 * density) + 330
    command = f"finetune train method={method} 'name=a \"b\" & <c>' seed=0"
    if sparsity is not None:
        command += f" sparsity={sparsity}"
    retention = {"mean": 0.71 + chance.gauss(0, 0.01), "low": 0.69, "high": 0.73, "base": 0.74}
    step_seconds = 0.021 * (1 + chance.random())
    return {
        "label": label,
        "by": {"method": method, "sparsity": sparsity},
        "seeds": [0, 1, 2],
        "finished": 3,
        "failed": 0,
        "pruned": 0,
        "unfinished": 0,
        "missing": 0,
        "errors": [],
        "values": values,
        "mean": mean,
        "sd": sd,
        "low": mean - half,
        "high": mean + half,
        "single_seed": False,
        "base": 0.1025,
        "examples": None,
        "retention": retention,
        "trained": trained,
        "changed": 1 - (sparsity or 0),
        "stored_bytes": trained * (4 if sparsity is None else 5),
        "step_seconds": step_seconds,
        "peak_memory_bytes": int((480 + 90 * chance.random()) * 2**20),
        "train_seconds": 9.4,
        "trials": 5,
        "rank": "",
        "versus": None,
        "command": command,
        "plugins": [],
        "runs": [f"outputs/first/{method}-s{seed}" for seed in range(3)],
        "curve": [_point(step, mean, half) for step in range(0, 201, 20)],
    }


def _point(step: int, mean: float, half: float) -> dict[str, Any]:
    middle = 0.1 + (mean - 0.1) * (1 - math.exp(-step / 40))
    return {
        "step": step,
        "mean": middle,
        "low": middle - half,
        "high": middle + half,
        "loss": 2.3 * math.exp(-step / 60),
    }


def _failed(label: str, by: dict[str, Any]) -> dict[str, Any]:
    nothing = dict.fromkeys(("mean", "sd", "low", "high", "base", "retention", "trials", "versus"))
    costs = dict.fromkeys(
        ("trained", "changed", "stored_bytes", "step_seconds", "peak_memory_bytes", "train_seconds")
    )
    counts = {
        "finished": 0,
        "failed": 1,
        "pruned": 0,
        "unfinished": 1,
        "missing": 0,
        "errors": ["RunFailed: out of memory"],
    }
    rest = {
        "single_seed": False,
        "rank": "",
        "command": "finetune train method=amt seed=0",
        "plugins": ["mine <b> (SHA-256 0123456789)"],
        "runs": ["outputs/first/amt-s0"],
        "curve": [],
    }
    return {"label": label, "by": by, "seeds": [0, 1], "values": [], **counts, **nothing, **costs, **rest}


def _verdict(low: float, high: float) -> str:
    return "better" if low > 0 else "worse" if high < 0 else "tie"


def _versus(row: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    difference, half = row["mean"] - base["mean"], 0.011
    numbers = {
        "difference": difference,
        "low": difference - half,
        "high": difference + 1.2 * half,
        "p": 0.004,
        "p_holm": 0.021,
    }
    return {
        "against": base["label"],
        **numbers,
        "test": "paired bootstrap",
        "verdict": _verdict(difference - half, difference + 1.2 * half),
    }


def _test(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    difference = a["mean"] - b["mean"]
    numbers = {
        "difference": difference,
        "low": difference - 0.01,
        "high": difference + 0.01,
        "p": 0.01,
        "p_holm": 0.06,
    }
    return {
        "a": a["label"],
        "b": b["label"],
        **numbers,
        "verdict": _verdict(difference - 0.01, difference + 0.01),
        "test": "mcnemar mid-p",
    }


def _critical(rows: list[dict[str, Any]]) -> dict[str, Any]:
    labels = [row["label"] for row in rows if row["mean"] is not None]
    ranks = {label: 1.2 + 0.95 * place for place, label in enumerate(labels)}
    return {"ranks": ranks, "cd": 3.1, "cliques": [labels[i : i + 4] for i in (0, 3, 5, 9)], "blocks": 9}


def _fairness(first: str, second: str) -> list[dict[str, Any]]:
    return [
        {
            "kind": "trained",
            "what": "trained parameters",
            "values": {first: "360,330", second: "36,330"},
            "words": "The rows train between 690 and 360,330 parameters: budget= matches them.",
        },
        {
            "kind": "setting",
            "what": "optimizer.lr",
            "values": {first: "0.001", second: "<0.01>"},
            "words": "optimizer.lr is not the same in all.",
        },
        {
            "kind": "failures",
            "what": "failed runs",
            "values": {second: "1 of 3"},
            "words": "2 rows have failed runs, which can flatter them.",
        },
    ]
